"""The pictures of early-exit decoding: depth per token, the speed-quality curve, the histogram of exit depths.

Plain data in, a PNG or SVG file out (the suffix of the path decides). matplotlib, an extra, is loaded when a picture is
drawn; nothing here measures or knows a model.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitlm.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, BAND = "#22262b", "#8a8f98", "#eceff2"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting on the speed-quality curve: agreement with the full model in 0..1, speed as a ratio to ``full``."""

    label: str
    agreement: float
    speed: float
    mode: str


def depth_picture(
    path: Path, tokens: Sequence[tuple[str, int]], colours: Mapping[int, str], *, title: str, note: str, width: int = 84
) -> Path:
    """Draw a text with a bar above each token as high as the layers it used; ``tokens`` are (text, exit layer).

    ``colours`` maps each exit layer, and the final one (the deepest), to ``#rrggbb``; a row holds ``width`` characters.
    ``title`` stands above the text, ``note`` below it.
    """
    from matplotlib.patches import Patch, Rectangle

    final = max(colours)
    lines = _wrap(tokens, width)
    advance, gap, bar = 0.6, 3.1, 1.35  # character width, row height and tallest bar, in units of the font's size
    size = 10.5  # points
    inch = size / 72
    top, bottom = 3.2, 1.9
    span = (width * advance + 2, top + len(lines) * gap + bottom)
    figure = new_figure((span[0] * inch, span[1] * inch))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(-1, span[0] - 1), ylim=(-span[1], 0))
    axes.axis("off")
    axes.text(span[0] - 2, 1 - span[1], note, fontsize=size * 0.9, color=GREY, ha="right", va="center")
    axes.text(0, -1.6, title, fontsize=size * 1.15, fontweight="bold", color=INK, va="center")
    for row, line in enumerate(lines):
        base = -(top + row * gap + bar)
        x = 0.0
        for text, layer in line:
            wide = len(text) * advance
            shade = colours[layer] if layer != final else "#c9ced6"
            axes.add_patch(Rectangle((x + 0.04, base), wide - 0.08, bar, color=BAND, linewidth=0))
            axes.add_patch(Rectangle((x + 0.04, base), wide - 0.08, bar * layer / final, color=shade, linewidth=0))
            ink = INK if layer == final else colours[layer]
            weight = "normal" if layer == final else "bold"
            axes.text(x, base - 0.75, text, fontsize=size, family="monospace", color=ink, weight=weight, va="center")
            x += wide
    marks = [
        Patch(color=colours[layer] if layer != final else "#c9ced6", label=f"layer {layer}")
        for layer in sorted(colours)
    ]
    marks[-1].set_label(f"layer {final} (final head)")
    axes.legend(
        handles=marks, loc="lower left", ncols=len(marks), frameon=False, fontsize=size * 0.9, borderaxespad=0.1
    )
    return save_figure(figure, path)


def _wrap(tokens: Sequence[tuple[str, int]], width: int) -> list[list[tuple[str, int]]]:
    """Cut tokens into rows of at most ``width`` characters, at newlines too; unprintable characters become dots."""
    lines: list[list[tuple[str, int]]] = [[]]
    used = 0
    for text, layer in tokens:
        for index, part in enumerate(text.split("\n")):
            shown = "".join(c if c.isprintable() else "·" for c in part)[:width]
            if index and lines[-1]:
                lines.append([])
                used = 0
            if used + len(shown) > width:
                lines.append([])
                shown, used = shown.lstrip(), 0
            if shown:
                lines[-1].append((shown, layer))
                used += len(shown)
    return [line for line in lines if line] or [[("·", max((layer for _, layer in tokens), default=1))]]


def speed_quality_picture(
    path: Path,
    points: Sequence[Point],
    exit_layers: Mapping[str, Sequence[int]],
    colours: Mapping[int, str],
    *,
    title: str,
) -> Path:
    """Draw the speed-quality curve beside the histogram of exit depths.

    ``points``: those of mode ``threshold`` are joined by a line, by agreement; the others (``as tuned``: thresholds and
    exits that tuning and costs chose, ``lossless``, ``full``) stand alone.
    ``exit_layers``: for each mode, the layer that every one of its tokens left at.
    """
    figure = new_figure((10.5, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold", color=INK)
    _curve(left, points)
    _histogram(right, exit_layers, colours)
    figure.tight_layout()
    return save_figure(figure, path)


def _curve(axes: "Axes", points: Sequence[Point]) -> None:
    curve = sorted((p for p in points if p.mode == "threshold"), key=lambda p: p.agreement)
    axes.axhline(1, color=GREY, linewidth=1, linestyle=":")
    axes.plot([p.agreement for p in curve], [p.speed for p in curve], "o-", color="#2a8ff4", label="threshold")
    for point in curve:
        axes.annotate(
            point.label, (point.agreement, point.speed), (0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    for mode, mark, colour in (("as tuned", "D", "#00a878"), ("lossless", "*", "#a45ee5"), ("full", "s", GREY)):
        others = [p for p in points if p.mode == mode]
        axes.plot(
            [p.agreement for p in others], [p.speed for p in others], mark, color=colour, label=mode, markersize=10
        )
    axes.set(xlabel="agreement with the full model (same prefix)", ylabel="speed, full = 1", title="speed and quality")
    axes.margins(0.1, 0.18)
    axes.legend(frameon=False, fontsize=9)
    axes.grid(color=BAND)
    axes.set_axisbelow(True)


def _histogram(axes: "Axes", exit_layers: Mapping[str, Sequence[int]], colours: Mapping[int, str]) -> None:
    from matplotlib.patches import Patch

    layers = sorted(colours)
    counts = {mode: Counter(found) for mode, found in exit_layers.items()}
    wide = 0.8 / max(len(counts), 1)
    looks: dict[str, dict[str, Any]] = {
        mode: {"alpha": 1 - 0.5 * index / max(len(counts) - 1, 1), "hatch": "//" if index else ""}
        for index, mode in enumerate(counts)
    }
    for index, (mode, count) in enumerate(counts.items()):
        total = max(sum(count.values()), 1)
        places = [at + (index - (len(counts) - 1) / 2) * wide for at in range(len(layers))]
        bars = axes.bar(
            places,
            [count[layer] / total for layer in layers],
            wide * 0.92,
            color=[colours[layer] for layer in layers],
            edgecolor="white",
            linewidth=0,
            **looks[mode],
        )
        axes.bar_label(bars, [f"{count[layer] / total:.0%}" for layer in layers], fontsize=8, padding=2)
    axes.set(
        xticks=range(len(layers)),
        xticklabels=[f"{layer}" for layer in layers],
        xlabel="layer",
        ylabel="share of tokens",
    )
    axes.set_title("where tokens leave")
    axes.margins(y=0.15)
    handles = [
        Patch(facecolor=GREY, edgecolor="white", linewidth=0, label=mode, **look) for mode, look in looks.items()
    ]
    axes.legend(handles=handles, frameon=False, fontsize=9)


_WORK = {"F": "#2a8ff4", "B": "#00a878", "I": "#00a878", "W": "#a45ee5"}
_WORK_NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}

_PALE = 0.45
_MAX_PIECES, _MAX_RANKS = 1 << 12, 128  # take matplotlib 20 s, and each piece is a few pixels wide

Work = tuple[str, int, float, float]


def timeline_picture(
    path: Path,
    timelines: Sequence[tuple[str, Sequence[Sequence[Work]]]],
    *,
    partial: Collection[int] = (),
    names: Mapping[str, str] | None = None,
) -> Path:
    """Draw pipeline schedules below each other on one scale: per title, for every rank its work as (op, microbatch,
    start, end), op one of F, B, I and W. ``partial``: microbatches that pass only some of the stages, which are paler.
    ``names``: what the legend calls an op, where it is not as usual.

    Raises:
        UserError: too much work or too many ranks for a picture.
    """
    pieces, tallest = sum(len(work) for _, ranks in timelines for work in ranks), max(len(r) for _, r in timelines)
    if pieces > _MAX_PIECES or tallest > _MAX_RANKS:
        raise UserError(
            f"a picture of {pieces} pieces of work on {tallest} ranks can't be read; use fewer microbatches or ranks "
            f"(at most {_MAX_PIECES} pieces on {_MAX_RANKS} ranks), or leave the picture out"
        )
    from matplotlib.patches import Patch

    span = max(end for _, ranks in timelines for work in ranks for _, _, _, end in work)
    heights = [len(ranks) for _, ranks in timelines]
    figure = new_figure((min(16.0, 3 + span * 0.22), 0.8 + 0.34 * sum(heights) + 0.8 * len(heights)))
    subplots = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)
    used: set[str] = set()
    called = {**_WORK_NAMES, **(names or {})}
    for axes, (title, ranks) in zip(subplots[:, 0], timelines, strict=True):
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        for rank, work in enumerate(ranks):
            for op, microbatch, start, end in work:
                used.add(op)
                pale = microbatch in partial
                shade = (_WORK[op], _PALE if pale else 1.0)
                axes.broken_barh([(start, end - start)], (rank - 0.42, 0.84), facecolor=shade, edgecolor="white")
                ink, middle = INK if pale else "white", (start + end) / 2
                axes.text(middle, rank, str(microbatch), ha="center", va="center", fontsize=7, color=ink)
        axes.set(ylim=(len(ranks) - 0.5, -0.5), yticks=range(len(ranks)), xlim=(0, span), ylabel="rank")
        axes.set_facecolor(BAND)
    subplots[-1, 0].set_xlabel("time, in forwards of a rank's layers")
    marks = [Patch(color=_WORK[op], label=called[op]) for op in "FBIW" if op in used]
    if partial:
        marks.append(Patch(facecolor=(GREY, _PALE), label="pale: partial microbatches"))
    figure.legend(handles=marks, loc="upper right", ncols=len(marks), frameon=False, fontsize=8)
    figure.tight_layout()
    return save_figure(figure, path)


_TOKENS = {"new": "#2a8ff4", "fired": "#00a878", "final": "#a45ee5", "fill": GREY, "refused": "#d43d51"}
_TOKEN_NAMES = {
    "new": "computed", "fired": "an exit at the stage's end gave the token", "final": "the last layer gave it",
    "fill": "token known: keys and values only", "refused": "behind a wrong draft",
}  # fmt: skip

_PALE_KINDS = ("fill", "refused")
_Pass = tuple[float, float, Sequence[tuple[str, str]]]


def _token_looks(kind: str) -> dict[str, Any]:
    return {
        "facecolor": (_TOKENS[kind], _PALE if kind in _PALE_KINDS else 1.0),
        "hatch": "////" if kind == "fill" else None,
    }


def decode_picture(path: Path, decodes: Sequence[tuple[str, Sequence[Sequence[_Pass]]]]) -> Path:
    """Draw pipelined decodes below each other on one scale: per title, for every stage its passes as (start, end, what
    is in it); these are (words, kind), kind one of new, fired, final, fill and refused.

    Raises:
        UserError: too many passes or stages for a picture.
    """
    pieces = sum(len(passes) for _, stages in decodes for passes in stages)
    tallest = max(len(stages) for _, stages in decodes)
    if pieces > _MAX_PIECES or tallest > _MAX_RANKS:
        raise UserError(
            f"a picture of {pieces} passes on {tallest} stages can't be read; use fewer tokens or stages (at most "
            f"{_MAX_PIECES} passes on {_MAX_RANKS} stages), or leave the picture out"
        )
    from matplotlib.patches import Patch

    span = max(end for _, stages in decodes for passes in stages for _, end, _ in passes)
    heights = [len(stages) for _, stages in decodes]
    widest = max(
        sum(len(words) for words, _ in cells) for _, stages in decodes for passes in stages for *_, cells in passes
    )
    wide, high = 3 + span * max(0.22, 0.09 * widest), 0.8 + 0.34 * sum(heights) + 0.8 * len(heights)
    figure = new_figure((min(16.0, wide), high))
    subplots = figure.subplots(len(decodes), 1, sharex=True, squeeze=False, height_ratios=heights)
    used: set[str] = set()
    for axes, (title, stages) in zip(subplots[:, 0], decodes, strict=True):
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        for stage, passes in enumerate(stages):
            for start, end, cells in passes:
                wide = (end - start) / len(cells)
                for index, (words, kind) in enumerate(cells):
                    used.add(kind)
                    left = start + index * wide
                    axes.broken_barh([(left, wide)], (stage - 0.42, 0.84), edgecolor="white", **_token_looks(kind))
                    ink = INK if kind in _PALE_KINDS else "white"
                    axes.text(left + wide / 2, stage, words, ha="center", va="center", fontsize=7, color=ink)
        axes.set(ylim=(len(stages) - 0.5, -0.5), xlim=(0, span), ylabel="stage")
        axes.set_yticks(range(len(stages)), [str(stage) for stage in range(1, len(stages) + 1)])
        axes.set_facecolor(BAND)
    subplots[-1, 0].set_xlabel("time, in passes of one row through a stage")
    marks = [
        Patch(edgecolor="white", label=words, **_token_looks(kind))
        for kind, words in _TOKEN_NAMES.items()
        if kind in used
    ]
    figure.legend(handles=marks, loc="lower center", ncols=len(marks), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    return save_figure(figure, path)


def new_figure(size: tuple[float, float]) -> "Figure":
    """A figure of ``size`` inches that no window and no global state of pyplot knows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib; install it with: pip install 'exitlm[plots]'") from None
    return Figure(figsize=size, dpi=144, facecolor="white")


def check_picture(path: Path) -> None:
    """Refuse a path that no picture can be written to, before the work of which it is the picture.

    Raises:
        UserError: no such format, or no matplotlib.
    """
    formats = new_figure((1, 1)).canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise UserError(f"no picture can be written to {path}; let its name end in .png, .svg or .pdf")


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a figure in the format that the suffix of ``path`` names; returns ``path``.

    Raises:
        UserError: no such format, or a file stands where a directory must be.
    """
    check_picture(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"no picture can be written to {path}; {path.parent} is a file, not a directory") from None
    figure.savefig(path)
    return path
