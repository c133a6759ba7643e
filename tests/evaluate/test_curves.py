"""The curves of a run: what is read from its metrics, how it is smoothed, and what is drawn of it."""

import json
import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exitlm.errors import UserError
from exitlm.evaluate.curves import FINAL, curve, heads_of, layers_of, read_metrics, run_curves, smoothed

COLOURS = {2: "#00a878", 4: "#a45ee5", FINAL: "#8a8f98"}


def write(run: Path, lines: Iterable[Mapping[str, Any]], end: str = "") -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return run


def training(steps: int = 40, **over: float) -> list[dict[str, Any]]:
    """What a training run with exits 2 and 4 of 8 layers writes."""
    noise = np.random.default_rng(0).normal(0.0, 0.1, steps)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        line: dict[str, Any] = {"step": step, "lr": 1e-3 / step, "tokens": 512, "tokens_per_second": 900.0 + step}
        for layer in COLOURS:
            line |= {f"loss/{layer}": 2.0 + 3.0 / step + noise[step - 1], f"weight/{layer}": step / steps}
            line |= {f"accuracy/{layer}": 0.5, f"confidence/{layer}": 0.4}
            if step % 20 == 0:
                line[f"validation/loss/{layer}"] = 2.5
        lines.append(line | {"grad_norm": 1.0 + 1.0 / step, "skipped": 2 if step > 30 else 0} | over)
    return lines


def words(picture: Path) -> set[str]:
    """The words of an SVG picture; matplotlib draws each as paths, with the word as a comment."""
    return {line[5:-4] for line in map(str.strip, picture.read_text().splitlines()) if line.startswith("<!-- ")}


def drawn(path: Path, metrics: list[dict[str, Any]], colours: Mapping[int, str] = COLOURS) -> set[str]:
    return words(run_curves(path, metrics, colours, title="a run"))


def test_what_is_torn_or_no_metric_is_left_out(tmp_path: Path) -> None:
    run = write(
        tmp_path, training(3), end='\n7\n[]\n{"loss/2": 1}\n{"step": "x", "loss/2": 1}\n{"step": 4, "loss/2": 1.'
    )
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3]


def test_a_line_that_is_no_text_is_left_out(tmp_path: Path) -> None:
    run = write(tmp_path, training(2))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\x00{")
    assert len(read_metrics(run)) == 2


@pytest.mark.parametrize(
    "text", ["", "\n\n", '{"step": 1, "lo', '{"step": 1, "lr": 0.1}\n', '{"step": 1, "loss/2": NaN}\n']
)
def test_a_run_without_a_step_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no step with a finite loss"):
        read_metrics(tmp_path)


def test_no_directory_and_no_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no directory"):
        read_metrics(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        read_metrics(tmp_path)


def test_the_final_head_comes_behind_the_exits(tmp_path: Path) -> None:
    losses = {"step": 1, "loss/10": 1.0, "loss/2": 1.0, "validation/loss/12": 1.0, "loss": 1.0}
    assert layers_of([losses]) == [2, 10]
    assert heads_of([losses]) == ([2, 10], FINAL)
    (line,) = read_metrics(write(tmp_path, [losses | {"loss/final": 2.0, "validation/loss/final": 3.0}]))
    assert (line[f"loss/{FINAL}"], line[f"validation/loss/{FINAL}"]) == (2.0, 3.0)
    assert heads_of([line]) == ([2, 10], FINAL)


def test_a_run_without_exits_is_read(tmp_path: Path) -> None:
    assert heads_of(read_metrics(write(tmp_path, [{"step": 1, "loss/final": 2.0}]))) == ([], FINAL)


def test_a_curve_is_in_order_and_finite() -> None:
    lines = [{"step": s, "a": v} for s, v in ((3, 1.0), (1, 2), (2, math.nan), (4, math.inf), (5, True), (3, 4.0))]
    steps, values = curve(lines, "a")
    assert steps.tolist() == [1, 3]
    assert values.tolist() == [2, 4]
    assert curve(lines, "b")[0].tolist() == []


def test_a_smooth_curve_stays_and_a_noisy_one_becomes_its_medians() -> None:
    steps = np.arange(300.0)
    falling = (steps, np.exp(-steps / 30))
    assert smoothed(falling) is falling
    noisy = np.exp(-steps / 30) + np.random.default_rng(0).normal(0.0, 0.1, 300)
    noisy[150] = 1e6  # a spike
    at, found = smoothed((steps, noisy))
    assert at.tolist() == steps.tolist()
    expected = [np.median(noisy[max(i - 7, 0) : i + min(7, i) + 1]) for i in range(300)]
    assert found.tolist() == expected
    assert found.max() < 2
    few = (steps[:10], noisy[:10])
    assert smoothed(few) is few
    assert len(smoothed((np.arange(9000.0), np.tile(noisy, 30)))[0]) == 500


def test_a_training_run_is_drawn(tmp_path: Path) -> None:
    found = drawn(tmp_path / "new" / "curves.svg", training())
    assert {"a run", "layer 2", "layer 4", "final head", "on held-out text", "skipped steps (2)"} <= found
    assert {"loss", "accuracy", "loss weight", "tokens per second"} <= found
    assert "learning rate (dashed), gradient norm (right)" in found


def test_what_says_nothing_gets_no_panel(tmp_path: Path) -> None:
    metrics = [{"step": 1, "loss/2": 1.0, "weight/2": 0.25}, {"step": 2, "loss/2": math.nan, "weight/2": 0.25}]
    found = drawn(tmp_path / "curves.svg", metrics)
    assert {"loss", "layer 2"} <= found
    assert not {"loss weight", "accuracy", "tokens per second", "on held-out text", "final head"} & found
    assert not any("gradient" in word or "skipped" in word for word in found)


def test_a_tuning_run_has_no_final_head(tmp_path: Path) -> None:
    metrics = [{"step": s, "loss/2": 1 / s, "agreement/2": 0.5, "grad_norm/2": 1.0, "lr": 0.1} for s in (1, 2, 3)]
    found = drawn(tmp_path / "curves.svg", metrics, {2: "#00a878", FINAL: "#8a8f98"})
    assert {"layer 2", "agreement with the final head"} <= found
    assert "final head" not in found


@pytest.mark.parametrize("steps", [1, 2, 500])
def test_runs_of_any_length_are_drawn_without_a_warning(tmp_path: Path, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = run_curves(tmp_path / "curves.png", training(steps), COLOURS, title="a run")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("losses", [(0.0, 5.0), (1e-7, 1e7), (-1.0, 1.0)])
def test_losses_of_any_size_are_drawn(tmp_path: Path, losses: tuple[float, float]) -> None:
    metrics = [{"step": s, "loss/2": loss, "lr": 0.0} for s, loss in enumerate(losses)]
    assert "loss" in drawn(tmp_path / "curves.svg", metrics)


def test_a_name_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    for name in ("curves", "curves.txt"):
        with pytest.raises(UserError, match=r"let its name end in \.png, \.svg or \.pdf"):
            run_curves(tmp_path / name, training(3), COLOURS, title="a run")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_one_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'exitlm\[plots\]'"):
        run_curves(tmp_path / "curves.png", training(3), COLOURS, title="a run")
