"""The picture of a load run on a server: how long answers took, and how many were on their way.

Plain numbers in, a PNG or SVG file out; who measured them is not known here. All times are in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exitlm.evaluate.plots import BAND, GREY, INK, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIRST, _WHOLE, _FAILED, _GAPS = "#2a8ff4", "#a45ee5", "#d43d51", "#00a878"
_MARKS = (50, 90, 99)  # percentiles
_SPAN = 30.0  # times whose largest is this many times the median have a logarithmic scale


@dataclass(frozen=True, kw_only=True)
class LoadRun:
    """What is drawn: for each request (when it was due, how long its ``first`` text and its ``whole`` answer took), the
    ``gaps`` between texts, when those that ``failed`` were due, and how many were ``running`` from a moment on."""

    first: Sequence[tuple[float, float]]
    whole: Sequence[tuple[float, float]]
    gaps: Sequence[float]
    failed: Sequence[float]
    running: Sequence[tuple[float, int]]


def load_picture(path: Path, run: LoadRun, *, title: str, note: str) -> Path:
    """Draw a run; ``title`` and ``note`` stand above it."""
    height = 6.6  # inches
    figure = new_figure((11.0, height))
    figure.set_layout_engine("constrained", rect=(0.005, 0.005, 0.99, 0.99 - 0.55 / height))
    grid = figure.add_gridspec(2, 2)
    _latencies(figure.add_subplot(grid[0, 0]), run)
    _shares(figure.add_subplot(grid[0, 1]), run)
    _running(figure.add_subplot(grid[1, 0] if run.gaps else grid[1, :]), run)
    if run.gaps:
        _gaps(figure.add_subplot(grid[1, 1]), run.gaps)
    for axes in figure.axes:
        axes.title.set(fontsize=10, color=INK)
        axes.grid(color=BAND)
        axes.set_axisbelow(True)
    figure.text(0.015, 1 - 0.12 / height, title, va="top", fontsize=12, fontweight="bold", color=INK)
    figure.text(0.015, 1 - 0.36 / height, note, va="top", fontsize=9, color=GREY)
    return save_figure(figure, path)


def _latencies(axes: "Axes", run: LoadRun) -> None:
    """How long each request took, at the time when it was due."""
    for points, colour, label in ((run.whole, _WHOLE, "whole answer"), (run.first, _FIRST, "first text")):
        if points:
            axes.plot(*zip(*points, strict=True), ".", color=colour, alpha=0.7, label=label)
    if run.failed:
        on_floor = axes.get_xaxis_transform()
        axes.plot(run.failed, [0.03] * len(run.failed), "x", color=_FAILED, transform=on_floor, label="failed")
    axes.set(title="how long requests took", xlabel="when they were due, s", ylabel="s")
    axes.set_ylim(bottom=0)
    if run.whole or run.failed:
        axes.legend(frameon=False, fontsize=9)


def _shares(axes: "Axes", run: LoadRun) -> None:
    """The share of the requests that took at most so long."""
    times = [seconds for _, seconds in (*run.first, *run.whole)]
    for points, colour, label in ((run.first, _FIRST, "first text"), (run.whole, _WHOLE, "whole answer")):
        _cumulative(axes, [seconds for _, seconds in points], colour, label)
    axes.set(title="share of requests within a time", xlabel="s")
    _scale(axes, times)
    if times:
        axes.legend(frameon=False, fontsize=9, loc="lower right")


def _gaps(axes: "Axes", gaps: Sequence[float]) -> None:
    """The share of the gaps between texts that were at most so long, with percentiles."""
    _cumulative(axes, [1e3 * gap for gap in gaps], _GAPS, "")
    axes.set(title="share of gaps between texts within a time", xlabel="ms")
    _scale(axes, [1e3 * gap for gap in gaps])
    for percent in _MARKS:
        value = 1e3 * float(np.percentile(gaps, percent))
        axes.plot([value], [percent / 100], "o", color=_GAPS, markeredgecolor="white", clip_on=False, zorder=4)
        axes.annotate(
            f"p{percent} {in_words(value / 1e3)}", (value, percent / 100), (8, -10),
            textcoords="offset points", fontsize=8, color=INK,
        )  # fmt: skip


def in_words(seconds: float) -> str:
    """A duration in three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _cumulative(axes: "Axes", times: Sequence[float], colour: str, label: str) -> None:
    ordered = sorted(times)
    if ordered:
        shares = [(rank + 1) / len(ordered) for rank in range(len(ordered))]
        axes.step([ordered[0], *ordered], [0.0, *shares], where="post", color=colour, linewidth=1.8, label=label)


def _scale(axes: "Axes", times: Sequence[float]) -> None:
    """Shares from 0 to 1 over times from 0, or over their logarithm where a few are far beyond the others."""
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    positive = sorted(time for time in times if time > 0)
    median = positive[len(positive) // 2] if positive else 0.0
    if positive and positive[-1] > _SPAN * median:
        axes.set_xscale("log")
        axes.set_xlim(left=max(positive[0], median / _SPAN))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_xlim(left=0)


def _running(axes: "Axes", run: LoadRun) -> None:
    """How many requests were on their way."""
    if run.running:
        moments, counts = zip(*run.running, strict=True)
        axes.fill_between(moments, counts, step="post", color=GREY, alpha=0.35, linewidth=0)
        axes.step(moments, counts, where="post", color=INK, linewidth=1.0)
    axes.set(title="requests on their way", xlabel="s")
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", integer=True, min_n_ticks=1)
