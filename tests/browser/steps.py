"""What the tests do on the page, as a person does."""

from __future__ import annotations

from typing import Any

from tests.browser.chromium import Tab

TOKEN = "#conversation .token"
ENDED = "document.querySelector('#stop').hidden && !document.querySelector('.busy')"


def mode(tab: Tab, name: str) -> None:
    """Choose full, lossless or threshold."""
    tab.click(f"label:has(input[name=mode][value={name}])")


def task(tab: Tab, name: str) -> None:
    """Choose chat or completion."""
    tab.click(f"label:has(input[name=task][value={name}])")


def send(tab: Tab, prompt: str) -> None:
    """Write a prompt and send it."""
    tab.js("document.querySelector('#prompt').focus(); document.querySelector('#prompt').select()")
    tab.type(prompt)
    tab.click("#send")


def ask(tab: Tab, prompt: str) -> str:
    """Send a prompt, wait for the end of the answer, and return what the status line says."""
    turns = tab.js("document.querySelectorAll('.turn').length")
    send(tab, prompt)
    tab.wait(f"document.querySelectorAll('.turn').length === {turns + 1} && {ENDED}")
    return tab.wait("document.querySelector('#status').textContent")


def shown(tab: Tab) -> list[dict[str, Any]]:
    """The tokens of the last answer: text, layer (None without a trace), classes and colour."""
    found = tab.each(
        ".turn:last-child .answer:last-child .token",
        """(node) => ({ text: node.textContent, layer: node.dataset.layer, classes: [...node.classList],
            colour: getComputedStyle(node.querySelector(".ink")).backgroundColor })""",
    )
    return [{**token, "layer": int(token["layer"]) if "layer" in token else None} for token in found]


def tip(tab: Tab) -> str:
    """What the page shows of the token that is pointed at or focused."""
    tab.wait("!document.querySelector('#tip').hidden")
    return tab.text("#tip")


def confidences(tab: Tab) -> dict[int, tuple[str, bool]]:
    """The confidence at each exit in the tip, and whether it is said to fire."""
    rows = tab.each("#tip tr", "(row) => [...row.children].map((cell) => cell.textContent)")
    return {int(name.removeprefix("layer ")): (value, "fires" in fires) for name, _, value, fires in rows}
