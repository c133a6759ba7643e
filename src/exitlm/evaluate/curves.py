"""The curves of a run: what training or tuning wrote into ``metrics.jsonl``, read and drawn.

Plain numbers in, a PNG or SVG file out; nothing here knows the model or the settings of the run. The names are those of
the file: ``loss/8`` is the loss of layer 8's exit, ``loss/final`` that of the final head, ``validation/loss/8`` the
first on held-out text. Here the final head goes by the number ``FINAL``, behind every layer's.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exitlm.errors import UserError
from exitlm.evaluate.plots import BAND, GREY, INK, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics = Sequence[Mapping[str, Any]]
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # steps and values

FILE = "metrics.jsonl"
FINAL = 1 << 20
_TITLES = {
    "loss": "loss",
    "accuracy": "accuracy",
    "agreement": "agreement with the final head",
    "weight": "loss weight",
}
_DOT: dict[str, Any] = dict(marker="o", markersize=5, markeredgecolor="white", linestyle="", clip_on=False)
_CROSS: dict[str, Any] = dict(marker="x", color="#d43d51", linestyle="")
_PLAIN = "#2a8ff4"
_LEGEND = 8  # entries in a row
_NOISE = 0.2  # a curve that turns at this share of its points is smoothed (noise alone turns at two thirds),
_LEAST = 20  # if it has as many points,
_WINDOW = 25  # over this part of them,
_PLACES = 500  # and shown at no more places than these
_SPAN = 3.0  # curves whose largest value is this many times the smallest are drawn on a logarithmic scale


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``, in order; a line that a kill has torn is left out.

    Raises:
        UserError: there is no such directory or file, or no line with a finite loss.
    """
    what = "name the directory that exitlm train or exitlm tune writes to"
    if not run.is_dir():
        raise UserError(f"there is no directory {run}; {what}")
    if not (run / FILE).is_file():
        raise UserError(f"{run} holds no {FILE}; {what}")
    lines = (run / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    metrics = _numbered([found for line in lines if (found := _parsed(line)) is not None])
    if not any(len(curve(metrics, f"loss/{layer}")[0]) for layer in layers_of(metrics)):
        raise UserError(f"{run / FILE} holds no step with a finite loss; wait for the run's first steps")
    return metrics


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and _is_finite(found.get("step")) else None


def _numbered(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with a number for the final head."""
    return [{re.sub(r"/final$", f"/{FINAL}", key): value for key, value in line.items()} for line in metrics]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def layers_of(metrics: Metrics) -> list[int]:
    """The layers whose exits have a loss, ascending, and the final head behind them if it has one."""
    return sorted({int(key[5:]) for line in metrics for key in line if re.fullmatch(r"loss/\d+", key)})


def heads_of(metrics: Metrics) -> tuple[list[int], int]:
    """The exit layers, and the number of the final head. A run that trains only exits has no loss of that."""
    return [layer for layer in layers_of(metrics) if layer != FINAL], FINAL


def run_curves(path: Path, metrics: Metrics, colours: Mapping[int, str], *, title: str) -> Path:
    """Draw the curves of a run: a panel for the losses, and one for everything else that its lines hold.

    ``colours`` maps each exit layer, and ``FINAL``, to ``#rrggbb``.
    """
    heads = {layer: colours[layer] for layer in layers_of(metrics)}
    panels: list[Callable[[Axes], None]] = [
        partial(_heads, metrics=metrics, colours=heads, name=name)
        for name in _TITLES
        if _worth_a_panel(name, [curve(metrics, f"{name}/{layer}")[1] for layer in heads])
    ]
    if any(key == "lr" or key.startswith("grad_norm") for line in metrics for key in line):
        panels.append(partial(_optimizer, metrics=metrics, colours=heads))
    if len(curve(metrics, "tokens_per_second")[0]):
        panels.append(partial(_speed, metrics=metrics))
    columns = 3 if len(panels) == 4 else 2  # below the losses, which take the first row
    rows = 1 + math.ceil((len(panels) - 1) / columns)
    legend = _legend(metrics, heads)
    head = 0.5 + 0.2 * math.ceil(len(legend) / _LEGEND)  # inches
    height = head + 3.9 + 2.7 * (rows - 1)
    figure = new_figure((11.0, height))
    from matplotlib.lines import Line2D  # not before new_figure has said that it is missing

    figure.set_layout_engine("constrained", rect=(0.005, 0.005, 0.99, 0.99 - head / height))
    grid = figure.add_gridspec(rows, columns, height_ratios=[3.9] + [2.7] * (rows - 1))
    places = [grid[0, :], *(grid[1 + i // columns, i % columns] for i in range(len(panels) - 1))]
    steps = [line["step"] for line in metrics]
    for place, panel in zip(places, panels, strict=True):
        axes = figure.add_subplot(place)
        panel(axes)
        axes.title.set(fontsize=10, color=INK)
        axes.set_xlabel("step")
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.grid(color=BAND)
        axes.set_axisbelow(True)
        axes.set_xlim(min(steps) - 0.5, max(steps) + 0.5)
    figure.text(0.015, 1 - 0.12 / height, title, va="top", fontsize=12, fontweight="bold", color=INK)
    figure.legend(
        handles=[Line2D([], [], label=label, **look) for label, look in legend], loc="upper left", ncols=_LEGEND,
        bbox_to_anchor=(0.01, 1 - 0.4 / height), borderaxespad=0.0, frameon=False, fontsize=9,
    )  # fmt: skip
    return save_figure(figure, path)


def _worth_a_panel(name: str, values: Sequence[NDArray[np.float64]]) -> bool:
    """Whether there is something to see; weights that never change are not."""
    return any(len(each) and (name != "weight" or np.ptp(each) > 0) for each in values)


def _legend(metrics: Metrics, colours: Mapping[int, str]) -> list[tuple[str, dict[str, Any]]]:
    """What colours and marks mean: words, and the looks of a line."""
    entries: list[tuple[str, dict[str, Any]]] = [
        ("final head" if layer == FINAL else f"layer {layer}", {"color": colour, "linewidth": 2.5})
        for layer, colour in colours.items()
    ]
    if any(key.startswith("validation/") for line in metrics for key in line):
        entries.append(("on held-out text", {**_DOT, "color": GREY}))
    if skipped := curve(metrics, "skipped")[1].max(initial=0.0):
        entries.append((f"skipped steps ({skipped:.0f})", _CROSS))
    return entries


def _heads(axes: "Axes", *, metrics: Metrics, colours: Mapping[int, str], name: str) -> None:
    """One curve per head, with dots for what held-out text gave."""
    for layer, colour in colours.items():
        _draw(axes, curve(metrics, f"{name}/{layer}"), colour)
        steps, values = curve(metrics, f"validation/{name}/{layer}")
        if len(steps):  # the layout would make room for dots that are nowhere
            axes.plot(steps, values, **_DOT, color=colour, zorder=4)
    axes.set_title(_TITLES[name])
    if name in ("accuracy", "agreement"):
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    elif name == "loss":
        _scale(axes)


def _optimizer(axes: "Axes", *, metrics: Metrics, colours: Mapping[int, str]) -> None:
    """The learning rate on the left scale, gradient norms on the right one, a cross where steps were skipped."""
    steps, rate = curve(metrics, "lr")
    axes.plot(steps, rate, color=INK, linestyle="--", linewidth=1.3)
    axes.set_ylim(0, _above(rate))
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    right = axes.twinx()
    for layer, colour in colours.items():
        _draw(right, curve(metrics, f"grad_norm/{layer}"), colour)
    _draw(right, curve(metrics, "grad_norm"), GREY)
    _scale(right)
    steps, total = curve(metrics, "skipped")
    more = steps[np.diff(total, prepend=0.0) > 0]
    axes.plot(more, np.full(len(more), 0.04), **_CROSS, transform=axes.get_xaxis_transform())
    axes.set_title("learning rate (dashed), gradient norm (right)")


def _speed(axes: "Axes", *, metrics: Metrics) -> None:
    points = curve(metrics, "tokens_per_second")
    _draw(axes, points, _PLAIN)
    axes.set_ylim(0, _above(points[1]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_title("tokens per second")


def curve(metrics: Metrics, name: str) -> Curve:
    """The steps at which ``name`` was measured, ascending, and its values; what is no finite number is left out."""
    found = {float(line["step"]): float(line[name]) for line in metrics if _is_finite(line.get(name))}
    steps = sorted(found)
    return np.array(steps), np.array([found[step] for step in steps])


def smoothed(points: Curve) -> Curve:
    """Running medians, which a single spike does not move; a curve that is smooth comes back as it is. The window is
    symmetric at the beginning, where losses fall steeply, and cut off at the end."""
    steps, values = points
    change = np.diff(values)
    if len(values) < _LEAST or np.mean(change[1:] * change[:-1] < 0) < _NOISE:
        return points
    half = len(values) // _WINDOW // 2 + 1
    places = np.unique(np.linspace(0, len(values) - 1, _PLACES).astype(np.int64))
    medians = [np.median(values[max(i - half, 0) : i + min(half, i) + 1]) for i in places]
    return steps[places], np.array(medians)


def _draw(axes: "Axes", points: Curve, colour: str) -> None:
    """A curve, and where it is noisy its smoothed self before it; a single point as a point."""
    line = smoothed(points)
    if line is not points:
        axes.plot(*points, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(*line, color=colour, linewidth=1.8, marker="." if len(line[0]) == 1 else "")


def _above(values: NDArray[np.float64]) -> float:
    """The top of a scale that begins at 0."""
    return 1.08 * float(values.max(initial=0.0)) or 1.0


def _scale(axes: "Axes") -> None:
    """A logarithmic scale where the values span more than a linear one shows well."""
    from matplotlib.ticker import LogLocator, NullLocator

    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()])
    span = values.max() / values.min() if len(values) and values.min() > 0 else 1.0
    if span > _SPAN:
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if span < 30 else (1.0, 3.0) if span < 1e4 else (1.0,)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=30))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
