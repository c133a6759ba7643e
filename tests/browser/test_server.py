"""The page and the real server: what the engine says of its tokens is what the page shows."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

import exitlm
from exitlm.serve.playground import page, page_headers
from tests.browser.chromium import Tab
from tests.browser.steps import ask, mode, send, shown, task, tip
from tests.checkpoints import write_checkpoint
from tests.serve.conftest import Served, serving

pytestmark = pytest.mark.browser
EXITS, LAYERS, TOKENS, THRESHOLD = [1, 3], 4, 24, 0.02
LOADED = "document.querySelectorAll('#model option').length"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of random weights, whose answers are any characters at all."""
    return write_checkpoint(tmp_path_factory.mktemp("served"), max_position_embeddings=2048)


def loaded(directory: Path) -> exitlm.LLM:
    """The model, with exits that no one tuned."""
    model = exitlm.load(directory, dtype="float64")
    model.add_exits(EXITS, kind="norm")
    return model


@pytest.fixture(scope="module")
def reference(directory: Path, cache: None) -> exitlm.LLM:
    return loaded(directory)


@pytest.fixture(scope="module")
def server(directory: Path, cache: None) -> Iterator[Served]:
    with serving(loaded(directory)) as found:
        yield found


@pytest.fixture
def tab(new_tab: Callable[..., Tab], server: Served) -> Tab:
    """The page of the real server, with short answers and a threshold that this model reaches now and then."""
    found = new_tab()
    found.goto(f"{server.url}/")
    found.wait(LOADED)
    set_number(found, "max-tokens", TOKENS)
    found.js(f"const slider = document.querySelector('#threshold'); slider.value = {THRESHOLD};"
             " slider.dispatchEvent(new Event('input'))")  # fmt: skip
    return found


def set_number(tab: Tab, field: str, value: float) -> None:
    """Fill in a number."""
    tab.js(f"document.querySelector('#{field}').value = {value}")


def test_the_server_sends_the_page_with_its_policy(server: Served) -> None:
    found = httpx.get(f"{server.url}/")
    assert found.content == page()
    assert {name: found.headers[name] for name in page_headers()} == page_headers()


@pytest.mark.parametrize("of", ["full", "lossless", "threshold"])
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_the_page_shows_what_the_engine_did(tab: Tab, reference: exitlm.LLM, of: str, kind: str) -> None:
    """The same tokens at the same layers as the facade gives, which runs the same engine without a server."""
    mode(tab, of)
    task(tab, kind)
    ask(tab, "A text")
    options = {} if of == "full" else {"threshold": THRESHOLD}
    prompt = [{"role": "user", "content": "A text"}] if kind == "chat" else "A text"
    expected = reference.generate(prompt, mode=of, max_new_tokens=TOKENS, **options)  # type: ignore[arg-type]
    tokens = shown(tab)
    assert [token["layer"] for token in tokens] == expected.exit_layers
    assert "".join(token["text"] for token in tokens) == expected.text
    if of == "threshold":
        assert len(set(expected.exit_layers)) > 1  # or else the threshold says nothing
        place = next(i for i, layer in enumerate(expected.exit_layers) if layer in EXITS)
        tab.hover("#conversation .token .ink", place)
        assert f"Left at layer {expected.exit_layers[place]} of {LAYERS}" in tip(tab)
        score = expected.trace[place].confidence[expected.exit_layers[place]]
        assert f"{score:.3f}" in tab.text("#tip")


def test_a_lossless_path_is_identical_side_by_side(tab: Tab) -> None:
    """Also where chance decides: both sides have the same seed, and float64 keeps the path exact."""
    mode(tab, "lossless")
    set_number(tab, "temperature", 0.9)
    tab.click("#compare")
    ask(tab, "Chance")
    assert tab.text(".verdict .line") == f"Identical: all {len(shown(tab))} tokens are the same."
    assert tab.texts(".badge") == ["batch-independent"] * 2


def test_a_threshold_parts_from_full_and_says_where(tab: Tab, reference: exitlm.LLM) -> None:
    mode(tab, "threshold")
    tab.click("#compare")
    ask(tab, "A text")
    sides = [
        reference.generate([{"role": "user", "content": "A text"}], max_new_tokens=TOKENS, **options)  # type: ignore[arg-type]
        for options in ({"mode": "full"}, {"mode": "threshold", "threshold": THRESHOLD})
    ]
    texts = [[token.text for token in side.trace] for side in sides]
    first = next(i for i, (full, early) in enumerate(zip(*texts, strict=True)) if full != early)
    assert tab.text(".verdict .line").startswith(f"The first difference is token {first + 1}: ")


def test_stop_frees_what_the_answer_held(tab: Tab, server: Served) -> None:
    set_number(tab, "max-tokens", 1900)
    send(tab, "Go on and on")
    tab.wait("document.querySelectorAll('#conversation .token').length > 3")
    tab.click("#stop")
    tab.wait("document.querySelector('#stop').hidden")
    tab.wait("document.querySelector('#live-running').textContent === '0'")
    assert len(shown(tab)) < 1900


def test_refusals_of_the_server_are_sentences(tab: Tab) -> None:
    ask(tab, "Much " * 1000)  # 5,000 tokens into a context of 2,048
    said = tab.text(".problem span")
    assert "2048" in said
    assert said.endswith(".")
    assert tab.js("document.querySelectorAll('#conversation .token').length") == 0


def test_the_base_alone_has_no_exits(tab: Tab) -> None:
    """The model with exits is chosen at first; the base writes, too."""
    assert tab.js("document.querySelector('#model').value").endswith(":exits")
    tab.js("const model = document.querySelector('#model'); model.selectedIndex = 0;"
           " model.dispatchEvent(new Event('change'))")  # fmt: skip
    assert "no exits" in tab.text("#model-note")
    ask(tab, "A text")
    assert {token["layer"] for token in shown(tab)} == {LAYERS}


def test_a_key_opens_the_real_server(new_tab: Callable[..., Tab], directory: Path, cache: None) -> None:
    with serving(loaded(directory), http={"api_keys": ["sesame"]}) as guarded:
        tab = new_tab()
        tab.goto(f"{guarded.url}/")
        tab.wait("document.activeElement.id === 'key'")
        tab.type("wrong")
        tab.press("Enter")
        tab.wait("!document.querySelector('#notice').hidden")
        tab.js("document.querySelector('#key').focus(); document.querySelector('#key').select()")
        tab.type("sesame")
        tab.press("Enter")
        tab.wait(LOADED)
        set_number(tab, "max-tokens", 4)
        ask(tab, "Open")
        assert len(shown(tab)) == 4
