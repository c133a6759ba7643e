"""The picture of the page in the README: the packaged model, with the exits that ``make demo`` has tuned."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import exitlm
from tests.browser.chromium import Tab
from tests.browser.steps import TOKEN, ask, mode, shown, tip
from tests.serve.conftest import serving

pytestmark = pytest.mark.browser
ADAPTER = next((place for place in map(Path, ("runs/demo/adapter", "runs/demo-quick/adapter")) if place.is_dir()), None)


@pytest.mark.skipif(ADAPTER is None, reason="needs the exits of make demo")
def test_the_demo_s_model_beside_itself(new_tab: Callable[..., Tab], shots: Path, tmp_path: Path) -> None:
    """Early exit beside ``full``: both answer, some tokens leave early, and the tip tells where one did."""
    assert ADAPTER is not None
    adapter = shutil.copytree(ADAPTER, tmp_path / "demo")  # which names it
    with serving(exitlm.load("smollm2", adapter=adapter), model={"source": "smollm2"}) as server:
        tab = new_tab(width=1240, height=860)
        tab.goto(f"{server.url}/")
        tab.wait("document.querySelectorAll('#model option').length")
        tab.js(
            "for (const [id, value] of [['max-tokens', 72], ['threshold', 0.6]]) {"
            " const field = document.querySelector('#' + id); field.value = value;"
            " field.dispatchEvent(new Event('input')); }"
        )
        mode(tab, "threshold")
        tab.click("#compare")
        ask(tab, "Why do cats purr?")
        layers = [int(layer) for layer in tab.each(TOKEN, "(node) => node.dataset.layer")]
        exits = [token["layer"] for token in shown(tab)]
        full = layers[: -len(exits)]
        assert full
        assert set(full) == {30}
        assert len(set(exits)) > 2
        early = [i for i, layer in enumerate(layers) if layer < 30]
        tab.hover(f"{TOKEN} .ink", early[len(early) // 2])
        assert "skipped" in tip(tab)
        tab.shot(shots / "playground.png")
