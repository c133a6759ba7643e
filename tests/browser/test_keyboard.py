"""The page without a pointer: everything can be reached, operated and read with keys alone."""

import pytest

from tests.browser import scripts
from tests.browser.chromium import SHIFT, Tab
from tests.browser.mock import Mock
from tests.browser.steps import ENDED, TOKEN

pytestmark = pytest.mark.browser
PLACE = "[...document.querySelectorAll('#conversation .token')].indexOf(document.activeElement)"


def focused(tab: Tab) -> str:
    """The id, or else the name and value, or else the class of what has the focus."""
    return tab.js(
        "(({ id, name, value, className }) => id || (name ? `${name}=${value}` : className))(document.activeElement)"
    )


def tab_to(tab: Tab, wanted: str, modifiers: int = 0) -> None:
    """Press Tab until something has the focus."""
    seen = []
    while (found := focused(tab)) != wanted:
        assert len(seen) < 60, f"Tab does not reach {wanted}; it reaches {seen}"
        seen.append(found)
        tab.press("Tab", modifiers)


def test_a_whole_visit_by_keyboard(tab: Tab, mock: Mock) -> None:
    assert focused(tab) == "prompt"  # ready to write
    tab_to(tab, "mode=lossless", SHIFT)
    tab.press("ArrowRight")
    assert focused(tab) == "mode=threshold"
    tab_to(tab, "threshold")
    tab.press("ArrowLeft")
    tab_to(tab, "compare")
    tab.press("Space")
    tab_to(tab, "prompt")
    tab.type("differ")
    tab.press("Enter")
    tab.wait(f"document.querySelectorAll('.turn').length === 1 && {ENDED}")
    full, other = mock.sent("/v1/chat/completions")
    assert (full["exitlm"]["mode"], other["exitlm"]["mode"]) == ("full", "threshold")
    assert other["exitlm"]["threshold"] == pytest.approx(0.79)
    assert focused(tab) == "prompt"
    tab_to(tab, "small", SHIFT)  # "Show it", the last button before the prompt
    tab.press("Enter")
    assert focused(tab) == "token differs"
    assert "token 8" in tab.text("#tip")


def test_arrows_move_between_tokens(tab: Tab) -> None:
    tab.type("essay")
    tab.press("Enter")
    tab.wait(f"document.querySelectorAll('.turn').length === 1 && {ENDED}")
    tab_to(tab, "token", SHIFT)
    assert tab.js(PLACE) == 0
    expected = [token for chunk in scripts.answer("essay", "lossless") for token in chunk]
    for place in (1, 2, 3):
        tab.press("ArrowRight")
        assert tab.js(PLACE) == place
        assert f"token {place + 1}" in tab.text("#tip")
        assert f"layer {expected[place].layer} of 12" in tab.text("#tip")
        assert tab.js("document.activeElement.getAttribute('aria-describedby')") == "tip"
    tab.press("ArrowLeft")
    assert tab.js(PLACE) == 2
    before = tab.js("document.activeElement.lastChild.getBoundingClientRect().toJSON()")
    tab.press("ArrowDown")
    after = tab.js("document.activeElement.lastChild.getBoundingClientRect().toJSON()")
    assert before["bottom"] <= after["top"] + 2 < before["bottom"] + before["height"]  # the next line
    assert abs((after["left"] + after["right"]) / 2 - (before["left"] + before["right"]) / 2) < 60
    tab.press("ArrowUp")
    assert abs(tab.js(PLACE) - 2) <= 1
    tab.press("End")
    assert tab.js(PLACE) == len(expected) - 1
    tab.press("Home")
    assert tab.js(PLACE) == 0
    tab.press("ArrowLeft")
    assert tab.js(PLACE) == 0
    tab.press("ArrowRight")
    tab.press("Escape")
    assert tab.js("document.querySelector('#tip').hidden")
    tab.press("Tab")  # an answer is one stop
    assert not tab.js(f"document.activeElement.matches('{TOKEN}')")
    tab.press("Tab", SHIFT)
    assert tab.js(PLACE) == 1  # and remembers its place
    assert tab.js(f"document.querySelectorAll('{TOKEN}[tabindex=\"0\"]').length") == 1


def test_escape_stops_an_answer(tab: Tab, mock: Mock) -> None:
    tab.type("hold on")
    tab.press("Enter")
    tab.wait(f"document.querySelectorAll('{TOKEN}').length === 3")
    tab.press("Escape")
    tab.wait("document.querySelector('#stop').hidden")
    assert mock.dropped.wait(60)
    assert tab.text("#status") == "Stopped after 3 tokens."


def test_stop_takes_over_the_focus_of_send(tab: Tab, mock: Mock) -> None:
    tab.type("hold on")
    tab.press("Tab")
    assert focused(tab) == "send"
    tab.press("Space")
    tab.wait("document.activeElement.id === 'stop'")
    mock.go_on.set()
    tab.wait("document.activeElement.id === 'prompt'")


def test_everything_has_a_name(tab: Tab) -> None:
    """What a screen reader says of each control, as the browser itself computes it."""
    tab.js("for (const panel of document.querySelectorAll('details')) panel.open = true")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "button",
        "textbox",
        "slider",
        "checkbox",
        "radio",
        "combobox",
        "spinbutton",
        "link",
        "image",
        "DisclosureTriangle",
    }
    controls = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(controls) > 15
    assert [node for node in controls if not node.get("name", {}).get("value")] == []
