"""What the page sends, where it connects to, and what it says when the server refuses."""

from collections.abc import Callable

import pytest

from tests.browser.chromium import SHIFT, Tab
from tests.browser.mock import Mock
from tests.browser.steps import ask, mode, send, shown, task

pytestmark = pytest.mark.browser
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def test_a_request_is_openais_with_one_field_more(tab: Tab, mock: Mock) -> None:
    ask(tab, "short one")
    assert mock.sent(CHAT) == [
        {
            "model": "tiny:early", "temperature": 0, "max_tokens": 256, "stream": True,
            "stream_options": {"include_usage": True}, "messages": [{"role": "user", "content": "short one"}],
            "exitlm": {"mode": "lossless", "trace": True},
        }
    ]  # fmt: skip


def test_every_setting_reaches_the_server(tab: Tab, mock: Mock) -> None:
    mode(tab, "threshold")
    tab.click("#more summary")
    for field, value in {"temperature": "0.5", "max-tokens": "12", "seed": "7", "system": "Be brief."}.items():
        tab.js(f"document.querySelector('#{field}').focus(); document.querySelector('#{field}').select()")
        tab.type(value)
    tab.js("document.querySelector('#rule').value = 'margin'")
    tab.js("document.querySelector('#threshold').focus()")
    tab.press("Home")
    for _ in range(3):
        tab.press("ArrowRight")
    tab.click("#exits label", 1)
    ask(tab, "short one")
    body = mock.sent(CHAT)[0]
    assert body["exitlm"] == {"mode": "threshold", "trace": True, "threshold": 0.03, "rule": "margin", "exits": [3, 9]}
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.5, 12, 7)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    mode(tab, "full")
    task(tab, "completion")
    ask(tab, "short two")
    body = mock.sent(COMPLETION)[0]
    assert body["prompt"] == "short two"
    assert body["exitlm"] == {"mode": "full", "trace": True}  # the others would have no effect
    mode(tab, "lossless")
    tab.click("#tuned")
    ask(tab, "short three")
    assert "threshold" not in mock.sent(COMPLETION)[1]["exitlm"]


def test_a_model_without_exits_is_asked_for_none(tab: Tab, mock: Mock) -> None:
    """The first model with exits is chosen; one without refuses their settings, so they are not sent."""
    assert tab.js("document.querySelector('#model').value") == "tiny:early"
    mode(tab, "threshold")
    tab.js("document.querySelector('#threshold').focus()")
    tab.press("Home")
    tab.js(
        "const model = document.querySelector('#model'); model.value = 'tiny'; model.dispatchEvent(new Event('change'))"
    )
    inputs = "[...document.querySelectorAll('input[name=mode]')]"
    assert tab.js(f"{inputs}.map((input) => [input.value, input.disabled, input.checked])") == [
        ["full", False, False], ["lossless", False, True], ["threshold", True, False],
    ]  # fmt: skip
    assert tab.text("#model-note") == "12 layers; no exits"
    assert tab.text("#threshold-note") == "Without effect in a model without exits."
    assert tab.js("document.querySelector('#threshold').disabled")
    ask(tab, "short")
    assert mock.sent(CHAT)[0]["model"] == "tiny"
    assert mock.sent(CHAT)[0]["exitlm"] == {"mode": "lossless", "trace": True}


def test_exits_that_tuning_left_out_do_not_count(tab: Tab, mock: Mock) -> None:
    """Neither in the threshold that is shown nor among the exits that are in use, until they are chosen."""
    assert tab.text("#threshold-value") == "0.80 to 0.90, tuned"
    tab.js(
        "const model = document.querySelector('#model'); model.value = 'tiny:quick';"
        " model.dispatchEvent(new Event('change'))"
    )
    assert tab.text("#threshold-value") == "0.87, tuned"
    assert tab.each("#exits input", "(box) => [box.value, box.checked]") == [["3", False], ["6", True]]
    ask(tab, "short one")
    tab.click("#more summary")
    tab.click("#exits label", 0)
    ask(tab, "short two")
    assert [body["exitlm"].get("exits") for body in mock.sent(CHAT)] == [None, [3, 6]]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("busy now", "The server is busy; try again in 3 seconds. The queue of 32 requests is full."),
        ("wrong", "max_tokens is 9999, but the context holds 512 tokens."),
        ("failing", "The engine has failed."),
        ("broken", "The connection ended before the answer was complete."),
    ],
)
def test_an_error_is_a_sentence(tab: Tab, prompt: str, sentence: str) -> None:
    status = ask(tab, prompt)
    assert tab.text(".problem span") == sentence
    assert status == sentence
    assert len(shown(tab)) == (6 if prompt in ("failing", "broken") else 0)  # what had come stays
    assert tab.text(".problem button") == "Try again"


def test_trying_again_replaces_what_failed(tab: Tab, mock: Mock) -> None:
    ask(tab, "busy now")
    tab.click(".problem button")
    tab.wait("document.querySelectorAll('.problem').length === 1 && document.querySelector('#stop').hidden")
    assert [body["messages"] for body in mock.sent(CHAT)] == [[{"role": "user", "content": "busy now"}]] * 2
    assert tab.js("document.querySelectorAll('.turn').length") == 1


def test_a_server_that_is_gone_is_said_to_be(tab: Tab, mock: Mock) -> None:
    mock.close()
    ask(tab, "short")
    assert tab.text(".problem span") == "The server cannot be reached; is it running?"


def test_a_key_is_asked_for_and_kept_for_this_tab_alone(new_tab: Callable[..., Tab], mock: Mock) -> None:
    mock.key = "sesame"
    tab = new_tab()
    tab.goto(mock.url)
    tab.wait("!document.querySelector('#notice').hidden")
    assert tab.text("#notice") == "The server wants a valid API key. The API key is missing or wrong."
    assert tab.wait("document.activeElement.id") == "key"
    tab.type("sesame")
    tab.press("Enter")
    tab.wait("document.querySelectorAll('#model option').length === 3")
    assert tab.js("document.querySelector('#notice').hidden")
    ask(tab, "short")
    assert mock.seen[-1].headers["Authorization"] == "Bearer sesame"
    assert (
        tab.js("JSON.stringify([{ ...sessionStorage }, { ...localStorage }, document.cookie])")
        == '[{"exitlm.key":"sesame"},{},""]'
    )
    tab.goto("about:blank")
    tab.goto(mock.url)
    tab.wait("document.querySelectorAll('#model option').length === 3")


def test_the_page_waits_for_a_model_that_loads(new_tab: Callable[..., Tab], mock: Mock) -> None:
    mock.loading = True
    tab = new_tab()
    tab.goto(mock.url)
    tab.wait("!document.querySelector('#notice').hidden")
    assert tab.text("#notice") == "The model is still loading."
    mock.loading = False
    tab.wait("document.querySelectorAll('#model option').length === 3 && document.querySelector('#notice').hidden")


def test_nothing_comes_from_anywhere_else(tab: Tab, mock: Mock) -> None:
    ask(tab, "markup")
    tab.click("#theme")
    tab.wait("document.querySelector('#live-rate').textContent !== '–'")
    assert tab.requested
    assert {url.split(":")[0] if url.startswith("data:") else url[: len(mock.url)] for url in tab.requested} <= {
        mock.url,
        "data",
    }
    assert tab.js("fetch('http://localhost:1/').then(() => 'sent', (error) => error.name)") == "TypeError"
    tab.forgive("localhost:1/")  # the page's policy has just forbidden what the test tried


def test_the_batch_is_live(tab: Tab) -> None:
    """Sums over labels, and a rate from a counter that grows between two looks."""
    tab.wait("document.querySelector('#live-rate').textContent !== '–'")
    assert [tab.text(f"#live-{name}") for name in ("running", "waiting", "ratio", "cache")] == [
        "3",
        "4",
        "1.62×",
        "25%",
    ]
    assert int(tab.text("#live-rate")) > 0


def test_a_wrong_setting_is_named(tab: Tab, mock: Mock) -> None:
    tab.js("document.querySelector('#max-tokens').value = -3")
    send(tab, "short")
    assert tab.text("#status").startswith("Max tokens: ")
    assert tab.js("document.activeElement.id") == "max-tokens"
    assert not mock.sent(CHAT)


def test_shift_and_enter_starts_a_line(tab: Tab, mock: Mock) -> None:
    tab.js("document.querySelector('#prompt').focus()")
    tab.type("short")
    tab.press("Enter", SHIFT)
    tab.type("question")
    tab.press("Enter")
    tab.wait("document.querySelectorAll('.facts b').length")
    assert mock.sent(CHAT)[0]["messages"][0]["content"] == "short\nquestion"


def test_clear_forgets_the_conversation(tab: Tab, mock: Mock) -> None:
    ask(tab, "short one")
    tab.click("#clear")
    assert tab.js("document.querySelectorAll('.turn').length") == 0
    ask(tab, "short two")
    assert mock.sent(CHAT)[1]["messages"] == [{"role": "user", "content": "short two"}]


def test_clear_in_mid_answer_forgets_it_too(tab: Tab, mock: Mock) -> None:
    send(tab, "hold on")
    tab.wait("document.querySelectorAll('#conversation .token').length")
    tab.click("#clear")
    tab.wait("document.querySelector('#stop').hidden")
    ask(tab, "short")
    assert mock.sent(CHAT)[1]["messages"] == [{"role": "user", "content": "short"}]


@pytest.mark.parametrize("prompt", ["failing", "busy now"])
def test_what_failed_is_no_part_of_the_conversation(tab: Tab, mock: Mock, prompt: str) -> None:
    ask(tab, prompt)
    ask(tab, "short")
    assert mock.sent(CHAT)[1]["messages"] == [{"role": "user", "content": "short"}]
