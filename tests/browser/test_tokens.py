"""Tokens on the page: the right text in the colour of the right layer, and what hover and focus show of each."""

from collections import Counter

import pytest

from tests.browser import scripts
from tests.browser.chromium import Tab
from tests.browser.mock import Mock
from tests.browser.steps import TOKEN, ask, confidences, mode, send, shown, task, tip

pytestmark = pytest.mark.browser
FRAMES = (
    "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))"  # all is drawn after two
)


def written(prompt: str, of: str) -> list[scripts.Token]:
    """The tokens that the mock writes."""
    return [token for chunk in scripts.answer(prompt, of) for token in chunk]


def keys(tab: Tab) -> dict[int, str]:
    """The legend: a colour for each layer."""
    return dict(tab.each(".key", "(key) => [Number(key.dataset.layer), getComputedStyle(key).backgroundColor]"))


@pytest.mark.parametrize("of", ["full", "lossless", "threshold"])
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_each_token_has_the_colour_of_its_layer(tab: Tab, of: str, kind: str) -> None:
    mode(tab, of)
    task(tab, kind)
    ask(tab, "essay")
    tokens, expected, colours = shown(tab), written("essay", of), keys(tab)
    assert [(token["text"], token["layer"]) for token in tokens] == [(token.text, token.layer) for token in expected]
    assert list(colours) == [*scripts.THRESHOLDS, scripts.LAYERS]
    assert len(set(colours.values())) == 4
    assert all(token["colour"] == colours[token["layer"]] for token in tokens)


@pytest.mark.parametrize("prompt", ["characters", "cut characters and bytes"])
def test_text_is_exact_however_it_arrives(tab: Tab, prompt: str) -> None:
    """Characters of several tokens, ends without text, line ends of the protocol, comments, bytes one by one."""
    ask(tab, prompt)
    tokens, expected = shown(tab), written(prompt, "lossless")
    assert [token["text"] for token in tokens] == [token.text for token in expected]
    assert [token["layer"] for token in tokens] == [token.layer for token in expected]
    for token in tokens:
        assert ("silent" in token["classes"]) == (token["text"] == "")
        assert ("newline" in token["classes"]) == (token["text"] != "" and not token["text"].strip("\n"))


def test_markup_from_the_model_stays_text(tab: Tab) -> None:
    scripts_before = tab.js("document.querySelectorAll('script').length")
    ask(tab, "markup")
    tab.hover(f"{TOKEN} .ink", 3)
    tip(tab)
    assert "".join(token["text"] for token in shown(tab)) == scripts.MARKUP
    assert tab.js("document.querySelectorAll('.text *:not(.token, .ink), img').length") == 0
    assert tab.js("document.querySelectorAll('script').length") == scripts_before
    assert tab.js("window.owned === undefined")
    task(tab, "completion")
    ask(tab, scripts.MARKUP)
    assert tab.text(".text .prompt") == scripts.MARKUP
    assert tab.js("document.querySelectorAll('.prompt *').length") == 0


def test_html_is_refused_by_the_page_itself(tab: Tab) -> None:
    """Not even its own script could put a text in as HTML, or run an attribute."""
    for attempt in ("document.body.innerHTML = '<p>'", "document.body.setAttribute('onclick', 'owned = 3')"):
        assert tab.js(f"(() => {{ try {{ {attempt}; }} catch (error) {{ return error.name; }} }})()") == "TypeError"
    tab.forgive("This document requires 'Trusted")  # what the policy has just refused


def test_hover_tells_what_became_of_a_token(tab: Tab) -> None:
    ask(tab, "essay")
    expected = written("essay", "lossless")
    at = {  # one token of each kind
        "accepted": next(i for i, token in enumerate(expected) if token.source == "exit" and token.layer == 9),
        "refused": next(i for i, token in enumerate(expected) if token.refused),
        "copied": next(i for i, token in enumerate(expected) if token.source == "lookup"),
        "final": next(i for i, t in enumerate(expected) if t.source == "final" and t.tested and t.tested[9] < 0.9),
    }
    says = {
        "accepted": ["Left at layer 9 of 12, draft accepted", "Drafted by the exit at layer 9 and accepted"],
        "refused": [
            "Left at layer 12 of 12, draft refused",
            "“·wrong”, drafted by the exit at layer 9, was refused here",
        ],
        "copied": ["Left at layer 12 of 12, draft accepted", "Drafted from the text before and accepted"],
        "final": ["Left at layer 12 of 12", "All 12 layers computed it."],
    }
    for kind, i in at.items():
        tab.hover(f"{TOKEN} .ink", i)
        tab.wait(f"document.querySelector('#tip').textContent.includes('token {i + 1}')")
        found = tip(tab)
        assert expected[i].text.replace(" ", "·") in found
        assert all(sentence in found for sentence in says[kind]), (kind, found)
        assert ("draft" in found.split("computed it")[0]) == (kind != "final")
        assert confidences(tab) == {
            layer: (f"{score:.3f}", score >= scripts.THRESHOLDS[layer]) for layer, score in expected[i].tested.items()
        }
    classes = [token["classes"] for token in shown(tab)]
    assert [i for i, of in enumerate(classes) if "refused" in of] == [
        i for i, token in enumerate(expected) if token.refused
    ]
    assert [i for i, of in enumerate(classes) if "copied" in of] == [
        i for i, t in enumerate(expected) if t.source == "lookup"
    ]


def test_in_threshold_mode_the_exit_itself_decides(tab: Tab) -> None:
    mode(tab, "threshold")
    ask(tab, "essay")
    expected = written("essay", "threshold")
    i = next(i for i, token in enumerate(expected) if token.layer == 3)
    tab.hover(f"{TOKEN} .ink", i)
    found = tip(tab)
    assert "The exit at layer 3 was sure enough; 9 layers skipped." in found
    assert "draft" not in found


def test_the_asked_threshold_says_which_exit_fires(tab: Tab) -> None:
    tab.js("document.querySelector('#threshold').focus()")
    tab.press("End")  # 1: no exit fires
    ask(tab, "essay")
    i = next(i for i, token in enumerate(written("essay", "lossless")) if token.source == "exit")
    tab.hover(f"{TOKEN} .ink", i)
    tab.wait(f"document.querySelector('#tip').textContent.includes('token {i + 1}')")
    fired = [fires for _, fires in confidences(tab).values()]
    assert fired
    assert not any(fired)


def test_the_histogram_counts_every_token_once(tab: Tab) -> None:
    def bars() -> dict[str, int]:
        return dict(tab.each("#histogram g", "(bar) => [bar.dataset.layer, Number(bar.dataset.count)]"))

    ask(tab, "essay")
    first = Counter(str(token.layer) for token in written("essay", "lossless"))
    assert bars() == first
    assert sum(first.values()) == len(shown(tab))
    widths = tab.each("#histogram g", "(bar) => Number(bar.querySelector('rect').getAttribute('width'))")
    most = max(first.values())
    assert widths == pytest.approx([170 * count / most for count in bars().values()], abs=0.01)
    mode(tab, "threshold")
    ask(tab, "short")
    second = Counter(str(token.layer) for token in written("short", "threshold"))
    assert {layer: count for layer, count in bars().items() if count} == second
    tab.click("label:has(input[name=scope][value=all])")
    assert bars() == first + second
    assert "Tokens by exit layer: layer 3: " in tab.js(
        "document.querySelector('#histogram').getAttribute('aria-label')"
    )


def test_without_a_trace_the_text_is_plain(tab: Tab) -> None:
    ask(tab, "untraced essay")
    tokens = shown(tab)
    assert "".join(token["text"] for token in tokens) == scripts.ESSAY
    assert {token["layer"] for token in tokens} == {None}
    assert {token["colour"] for token in tokens} == {"rgba(0, 0, 0, 0)"}
    tab.hover(f"{TOKEN} .ink", 2)
    assert "no trace" in tip(tab)
    assert tab.js("document.querySelector('#depth-none').hidden") is False


def test_facts_of_an_answer(tab: Tab) -> None:
    ask(tab, "short")
    tokens = written("short", "lossless")
    facts = tab.text(".facts")
    mean = sum(token.layer for token in tokens) / len(tokens)
    for fact in (f"{len(tokens)} tokens", f"{mean:.1f} of 12 layers on average", "104 tokens/s", "ended at max tokens"):
        assert fact in facts
    assert tab.text(".badge") == "batch-independent"


def test_layer_numbers_can_be_shown(tab: Tab) -> None:
    ask(tab, "short")
    number = f"getComputedStyle(document.querySelector('{TOKEN}'), '::after').content"
    assert tab.js(number) == "none"
    tab.click("#numbers")
    assert tab.js(number) == f'"{written("short", "lossless")[0].layer}"'


def test_tokens_come_one_after_the_other(tab: Tab, mock: Mock) -> None:
    """What has come is shown while the rest has not, and Stop tells the server."""
    send(tab, "hold on")
    tab.wait(f"document.querySelectorAll('{TOKEN}').length === 3")
    assert "busy" in tab.js("document.querySelector('.answer').className")
    assert tab.js("document.querySelector('#send').hidden && !document.querySelector('#stop').hidden")
    tab.click("#stop")
    tab.wait("document.querySelector('#stop').hidden")
    assert "stopped" in tab.text(".facts")
    assert tab.text("#status") == "Stopped after 3 tokens."
    assert mock.dropped.wait(60)
    assert tab.js("document.activeElement.id") == "prompt"


def test_new_text_stays_in_view_unless_the_reader_scrolls_up(tab: Tab, mock: Mock) -> None:
    tab.resize(1280, 420)
    end = "(({ scrollHeight, scrollTop, clientHeight }) => scrollHeight - scrollTop - clientHeight)"
    ask(tab, "essay")
    ask(tab, "essay")
    tab.wait(f"{end}(document.querySelector('#middle')) < 2")
    send(tab, "hold on")
    tab.wait(
        f"document.querySelectorAll('.turn:last-child .token').length && {end}(document.querySelector('#middle')) < 2"
    )
    tab.js(f"document.querySelector('#middle').scrollTop = 0; {FRAMES}")
    before = tab.js("document.querySelector('#middle').scrollHeight")
    mock.go_on.set()
    tab.wait("document.querySelector('#stop').hidden")
    tab.js(FRAMES)
    assert tab.js("document.querySelector('#middle').scrollHeight") > before
    assert tab.js("document.querySelector('#middle').scrollTop") == 0
