"""Side by side: full and early exit on one prompt and seed, and where they part."""

import pytest

from tests.browser import scripts
from tests.browser.chromium import Tab
from tests.browser.mock import Mock
from tests.browser.steps import ask, mode, send, shown

pytestmark = pytest.mark.browser


def differing(tab: Tab) -> list[int]:
    """The place of the token that is marked, on each side; -1 for none."""
    return tab.each(".answer", "(side) => [...side.querySelectorAll('.token')].findIndex((t) => t.matches('.differs'))")


def compare(tab: Tab, of: str, prompt: str) -> str:
    """Run a prompt on both sides; the verdict."""
    mode(tab, of)
    tab.click("#compare")
    ask(tab, prompt)
    return tab.text(".verdict .line")


def test_both_sides_get_the_same_prompt_and_seed(tab: Tab, mock: Mock) -> None:
    tab.js("document.querySelector('#temperature').value = 0.7")
    compare(tab, "lossless", "essay of both")
    full, other = mock.sent("/v1/chat/completions")
    assert (full.pop("exitlm"), other.pop("exitlm")) == (
        {"mode": "full", "trace": True},
        {"mode": "lossless", "trace": True},
    )
    assert full == other
    assert isinstance(full["seed"], int)
    assert f"Seed {full['seed']}." in tab.text("#status")


def test_without_chance_no_seed_is_made_up(tab: Tab, mock: Mock) -> None:
    compare(tab, "lossless", "essay")
    assert all("seed" not in body for body in mock.sent("/v1/chat/completions"))


def test_identical_texts_are_called_so(tab: Tab) -> None:
    verdict = compare(tab, "lossless", "essay")
    count = len(shown(tab))
    assert count == len(scripts.words(scripts.ESSAY))
    assert verdict == f"Identical: all {count} tokens are the same."
    assert differing(tab) == [-1, -1]
    assert tab.texts(".answer h3") == ["Full", "Lossless"]
    assert tab.texts(".race .rate") == ["61.3 tokens/s", "104 tokens/s (1.70×)"]


def test_the_first_differing_token_is_marked(tab: Tab) -> None:
    verdict = compare(tab, "threshold", "differ")
    assert differing(tab) == [7, 7]
    assert verdict.startswith("The first difference is token 8: “·in” in full, “·tiny” in threshold.")
    assert tab.js("document.querySelectorAll('.differs').length") == 2
    tab.click(".verdict button")
    assert tab.js("document.activeElement.classList.contains('differs')")
    assert "token 8" in tab.text("#tip")


def test_a_text_that_ends_sooner_differs_where_it_ends(tab: Tab) -> None:
    verdict = compare(tab, "threshold", "shorter")
    assert differing(tab) == [20, -1]
    assert "token 21: “" in verdict
    assert "the end in threshold" in verdict


def test_a_stopped_comparison_claims_no_more_than_it_saw(tab: Tab, mock: Mock) -> None:
    mode(tab, "lossless")
    tab.click("#compare")
    tab.js("document.querySelector('#together').checked = true")
    send(tab, "hold on")
    for side, count in (("first", 1), ("last", 3)):
        tab.wait(f"document.querySelectorAll('.answer:{side}-child .token').length === {count}")
    tab.click("#stop")
    assert tab.text(".verdict .line") == "The same in the 1 token that both have."
    assert len(mock.sent("/v1/chat/completions")) == 2


def test_sides_run_one_after_the_other_unless_told(tab: Tab, mock: Mock) -> None:
    tab.click("#compare")
    send(tab, "hold on")
    tab.wait("document.querySelectorAll('.answer .token').length === 1")
    assert len(mock.sent("/v1/chat/completions")) == 1
    mock.go_on.set()
    assert tab.text(".verdict .line").startswith("Identical")
    assert [body["exitlm"]["mode"] for body in mock.sent("/v1/chat/completions")] == ["full", "lossless"]


def test_full_is_not_compared_with_itself(tab: Tab) -> None:
    mode(tab, "full")
    tab.click("#compare")
    assert tab.js("document.querySelector('input[name=mode]:checked').value") == "lossless"
    mode(tab, "full")
    assert tab.js("document.querySelector('#compare').checked") is False


def test_the_conversation_goes_on_with_the_early_exit(tab: Tab, mock: Mock) -> None:
    compare(tab, "threshold", "differ")
    ask(tab, "essay again")
    expected = "".join(token.text for chunk in scripts.answer("differ", "threshold") for token in chunk)
    assert mock.sent("/v1/chat/completions")[-1]["messages"] == [
        {"role": "user", "content": "differ"}, {"role": "assistant", "content": expected},
        {"role": "user", "content": "essay again"},
    ]  # fmt: skip
