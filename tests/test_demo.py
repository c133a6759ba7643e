"""The demo: its pictures and figures from plain data; the slow set runs it on the real model, twice."""

import time
from importlib.resources import files
from pathlib import Path

import pytest

from exitlm import cli, demo, show
from exitlm.evaluate.plots import Point, depth_picture, speed_quality_picture
from exitlm.palette import palette

TOKENS = [("The", 8), (" sky", 30), (" is\n", 15), (" blue", 22), ("\u0000", 30)]


def test_depth_text_keeps_the_text() -> None:
    colours = palette([8, 15, 22], 30)
    assert show.depth_text(TOKENS, colours).plain == "".join(text for text, _ in TOKENS)
    assert show.legend(colours).plain.endswith("layer 30 (final head)")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_pictures_are_written(tmp_path: Path, suffix: str) -> None:
    colours = palette([8, 15, 22], 30)
    depth = depth_picture(tmp_path / "new" / f"depth.{suffix}", TOKENS * 20, colours, title="depth", note="tiny")
    points = [
        Point(label="full", agreement=1.0, speed=1.0, mode="full"),
        Point(label="0.9", agreement=0.9, speed=1.2, mode="threshold"),
    ]
    layers = {"threshold": [layer for _, layer in TOKENS], "lossless": []}
    curve = speed_quality_picture(tmp_path / f"curve.{suffix}", points, layers, colours, title="curve")
    assert all(path.stat().st_size > 1000 for path in (depth, curve))


def test_the_demo_asks_what_was_not_tuned_on() -> None:
    tuned_on = files("exitlm.train").joinpath("prompts/train.txt").read_text(encoding="utf-8").lower()
    assert not [prompt for prompt in demo.PROMPTS if prompt.lower() in tuned_on]
    assert not [topic for topic in ("purr", "suitcase", "lighthouse", "fibonacci") if topic in tuned_on]


def test_a_slow_processor_gets_a_smaller_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for native in (True, False):
        monkeypatch.setattr(demo, "native_bfloat16", lambda device, native=native: native)
        config = demo.tuning(tmp_path, quick=False)
        sizes.append((config.data.files, config.train.steps))
        assert demo.tuning(tmp_path, quick=True).train.steps == 20
    assert sizes == [(("self:100000",), 500), (("self:20000",), 150)]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    first = capsys.readouterr().out
    started = time.monotonic()
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    assert time.monotonic() - started < 240  # 2 minutes on a quiet machine
    for out in (first, capsys.readouterr().out):
        assert all(word in out for word in ("full", "lossless", "threshold 0.9", "acceptance", "layer 8"))
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("depth.png", "speed-quality.png"))
