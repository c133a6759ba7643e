"""The pictures of docs/training.md, drawn from the library's own pure functions: no process runs, nothing is measured.

python benchmarks/training_pictures.py

What a picture shows by numbers is the published 7B run (configs/pretrain-7b.toml) or the small one
(configs/tiny-3d.toml), as their files stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from drawing import BLUE, GREEN, OUT, RED, ROOT, VIOLET, Drawing, shrink

from exitlm.evaluate.plots import BAND, GREY, INK, new_figure, save_figure, timeline_picture
from exitlm.parallel.pipeline.schedule import Timeline, make, simulate
from exitlm.parallel.pipeline.split import StageCost, stage_costs
from exitlm.train.data import pack
from exitlm.train.estimate import estimate, model_shape
from exitlm.train.exits import exit_configs
from exitlm.train.head_loss import tokens_at_once
from exitlm.train.loop import exit_weights
from exitlm.train.run import TRAINING, RunConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES, MICROBATCHES = 4, 8


def run_file(name: str, *overrides: str) -> RunConfig:
    """The settings of a published run, changed."""
    return RunConfig.from_toml(ROOT / "configs" / name, TRAINING).with_overrides(overrides)


def save(figure: Figure, name: str) -> None:
    """Write a picture with 64 colours, which it does not exceed to the eye."""
    shrink(save_figure(figure, OUT / f"training-{name}.png"))


# ---- curves and bars


def weights() -> None:
    """The weights of the exits' losses over the steps."""
    config = run_file("tiny-3d.toml")
    layers, steps = config.exits.layers, np.arange(0, 101)
    figure = new_figure((8.0, 2.7))
    axes = figure.subplots()
    for shape, line in (("linear", "-"), ("cosine", "--")):
        objective = run_file("tiny-3d.toml", f"objective.warmup={shape}").objective
        curves = np.array([exit_weights(objective, int(step), len(layers)) for step in steps]).T
        for layer, colour, curve in zip(layers, (GREEN, BLUE), curves, strict=True):
            axes.plot(steps, curve, line, color=colour, linewidth=2, label=f"exit {layer}, {shape}")
    axes.axhline(config.objective.final, color=GREY, linewidth=2, label="final head")
    axes.axvline(config.objective.warmup_steps, color=GREY, linewidth=1, linestyle=":")
    axes.text(config.objective.warmup_steps + 1, 0.62, "warmup_steps", color=GREY, fontsize=9)
    axes.set(xlabel="step", ylabel="weight of the loss", xlim=(0, 100), ylim=(-0.03, 1.08))
    axes.grid(color=BAND)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    save(figure, "weights")


def deferred() -> None:
    """How many microbatches' logits each stage holds, over the time of a step."""
    config = run_file("pretrain-7b.toml")
    tokens = config.train.microbatch * config.data.seq_len
    chunk = tokens_at_once(model_shape(config).vocab_size, "cuda") / tokens
    line = simulate(make("1f1b", STAGES, MICROBATCHES))
    figure = new_figure((10.0, 4.4))
    rows = figure.subplots(STAGES, 1, sharex=True, sharey=True)
    for rank, axes in enumerate(rows):
        moments, eager = held(line, rank)
        axes.fill_between(moments, eager, step="post", color="#d3c0ee", linewidth=0, label="eager")
        for event in line.ranks[rank]:
            if event.action.op == "B":
                axes.fill_between([event.start, event.end], chunk, color=GREEN, linewidth=0)
        axes.fill_between([], [], color=GREEN, linewidth=0, label="deferred")
        axes.set(xlim=(0, line.makespan), yscale="log", ylim=(chunk / 2, 2 * STAGES))
        axes.set_yticks([chunk, 1, STAGES], [f"1/{1 / chunk:.0f}", "1", f"{STAGES}"], fontsize=8)
        axes.minorticks_off()
        axes.set_ylabel(f"stage {rank}", fontsize=9)
        axes.set_facecolor(BAND)
    rows[0].legend(frameon=False, fontsize=9, loc="lower right", ncols=2, bbox_to_anchor=(1.0, 0.98))
    rows[0].set_title(
        "microbatches whose logits are held (logarithmic), one exit on each stage, 1F1B", loc="left", fontsize=10
    )
    rows[-1].set_xlabel("time, in forwards of a rank's layers")
    figure.tight_layout(h_pad=0.4)
    save(figure, "deferred")


def held(line: Timeline, rank: int) -> tuple[Any, Any]:
    """Times, and how many microbatches a rank holds from then on: each from its forward to the end of its backward."""
    changes = sorted(
        [(event.start, 1) for event in line.ranks[rank] if event.action.op == "F"]
        + [(event.end, -1) for event in line.ranks[rank] if event.action.op == "B"]
    )
    moments, steps = zip((0.0, 0), *changes, (line.makespan, 0), strict=True)
    return np.array(moments), np.cumsum(steps)


def balance() -> None:
    """What each stage holds, by the two places of exits; and the work of a split that is not even."""
    figure = new_figure((11.0, 3.7))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1))
    for axes, place in ((left, "end"), (middle, "next")):
        config = run_file("pretrain-7b.toml", f"exits.place={place}")
        costs, matrix = costs_of(config)
        parts = {
            "layers": [cost.layer_parameters for cost in costs],
            "embedding": [matrix * cost.has_embedding for cost in costs],
            "exit": [matrix * (cost.head_matrices - cost.has_final_head) for cost in costs],
            "final head": [matrix * cost.has_final_head for cost in costs],
        }
        stack(axes, parts, 1e9, "parameters, in 1e9")
        axes.set_title(f'parameters, place = "{place}"', fontsize=10)
        axes.set_ylim(0, 2.1)
    settings = ("exits.layers=[8]", "objective.weight=0.1", "objective.weight_init=0.1", "model.vocab_size=128000")
    costs, _ = costs_of(run_file("pretrain-7b.toml", *settings))
    even, _ = costs_of(run_file("pretrain-7b.toml", *settings, "parallel.layers_per_stage=[8,8,8,8]"))
    exits = [(cost.head_flops * (not cost.has_final_head)) * 3 for cost in costs]
    parts = {
        "layers": [cost.layer_flops * 3 for cost in costs],
        "exit": exits,
        "final head": [cost.head_flops * 3 - e for cost, e in zip(costs, exits, strict=True)],
    }
    stack(right, parts, 1e9, "work per token, GFLOP")
    most = max(cost.forward_flops + cost.backward_flops for cost in even) / 1e9
    right.axhline(most, color=RED, linewidth=1.2, linestyle=":")
    right.text(-0.42, most * 1.02, "the most with 8 layers on each", fontsize=8, color=RED)
    right.set_title("work, balanced: exit 8 alone, V = 128,000", fontsize=10)
    right.set_ylim(0, 14.9)
    split = estimate(run_file("pretrain-7b.toml", *settings)).split
    right.set_xticks(range(STAGES), [f"{i}\n{len(split.layers(i))} layers" for i in range(STAGES)])
    names = [("layers", GREY), ("embedding", BLUE), ("exit", VIOLET), ("final head", GREEN)]
    legend(figure, names)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    save(figure, "balance")


def costs_of(config: RunConfig) -> tuple[list[StageCost], int]:
    """What each stage of a run costs, and the size of one matrix over the vocabulary."""
    model = model_shape(config)
    costs = stage_costs(model, exit_configs(config), estimate(config).split, config.data.seq_len)
    return costs, model.vocab_size * model.hidden_size


def stack(axes: Axes, parts: Mapping[str, Sequence[float]], unit: float, what: str) -> None:
    """A bar for each stage, made of parts."""
    colours = {"layers": "#c9ced6", "embedding": BLUE, "exit": VIOLET, "final head": GREEN}
    below = np.zeros(STAGES)
    for name, sizes in parts.items():
        values = np.array(sizes, dtype=float) / unit
        axes.bar(range(STAGES), values, 0.7, below, color=colours[name], edgecolor="white", linewidth=0.8)
        below += values
    for stage, total in enumerate(below):
        axes.text(stage, 0.02 * below.max(), f"{total:.3g}", ha="center", va="bottom", fontsize=9, color=INK)
    axes.set(xlabel="stage", ylabel=what, xticks=range(STAGES))


def legend(figure: Figure, names: Sequence[tuple[str, str]]) -> None:
    """Coloured squares above everything."""
    from matplotlib.patches import Patch

    marks = [Patch(color="#c9ced6" if colour == GREY else colour, label=name) for name, colour in names]
    figure.legend(handles=marks, loc="upper center", ncols=len(marks), frameon=False, fontsize=9)


# ---- timelines


def filled() -> None:
    """Bubble filling beside plain 1F1B."""
    made = make("filled", STAGES, MICROBATCHES)
    pale = [m for m, span in made.spans.items() if span != (0, STAGES - 1)]
    path = OUT / "training-filled.png"
    shrink(timeline_picture(path, [timed("filled"), timed("1f1b")], partial=pale))


def tuning() -> None:
    """Exits on a frozen model beside 1F1B."""
    names = {"B": "backward (tuning: of exits alone, with their forward)"}
    shrink(timeline_picture(OUT / "training-tuning.png", [timed("tuning"), timed("1f1b")], names=names))


def timed(name: str) -> tuple[str, list[list[tuple[str, int, float, float]]]]:
    """A schedule as ``timeline_picture`` wants it."""
    line = simulate(make(name, STAGES, MICROBATCHES))
    work = [[(e.action.op, e.action.microbatch, e.start, e.end) for e in events] for events in line.ranks]
    return f"{name}: makespan {line.makespan:g}, utilisation {line.utilisation:.1%}", work


# ---- drawings


def stages() -> None:
    """Which stage has which exit, and what goes between stages."""
    config = run_file("pretrain-7b.toml")
    split = estimate(config).split
    draw = Drawing.of(106, 36)
    wide, gap = 19.0, 8.0
    for stage in range(STAGES):
        x = 3 + stage * (wide + gap)
        draw.box(x, 12, wide, 12)
        layers = split.layers(stage)
        draw.words(x + wide / 2, 22.4, f"stage {stage}: layers {layers.start + 1}-{layers.stop}")
        for i in range(len(layers)):
            draw.box(x + 1.3 + i * 2.1, 13.5, 1.5, 7, facecolor="#c9ced6", linewidth=0)
        heads = [(f"exit {n}", VIOLET, x + 3.5, f"$w_{{{n}}} L_{{{n}}}$") for n in split.exits(stage)]
        if stage == STAGES - 1:
            heads.append(("final head", GREEN, x + wide - 3.5, "$L_{final}$"))
        for name, colour, at, loss in heads:
            draw.box(at - 4, 26, 8, 3, name, facecolor=colour, linewidth=0, ink="white")
            draw.arrow((at, 24), (at, 26), colour)
            draw.arrow((at, 29), (at, 31.5), colour)
            draw.words(at, 33, loss, color=colour, fontsize=12)
        if stage < STAGES - 1:
            draw.arrow((x + wide, 19.5), (x + wide + gap, 19.5), BLUE, f"$x_{stage}$")
            draw.arrow((x + wide + gap, 15), (x + wide, 15), RED, f"$g_{stage}$")
        own = " + ".join(loss for *_, loss in heads)
        later = f"$\\langle g_{stage}, x_{stage}\\rangle$" if stage < STAGES - 1 else ""
        draw.words(x + wide / 2, 6.3, " + ".join(part for part in (own, later) if part), fontsize=12)
    draw.words(3, 9.6, "Each stage back-propagates, with g as a constant:", ha="left", color=GREY)
    draw.words(3, 2.6, "Blue: hidden states. Red: their gradient. There is no other message.", ha="left", color=GREY)
    save(draw.figure, "stages")


def tied() -> None:
    """The copies of a shared matrix, and the sum of their gradients."""
    draw = Drawing.of(97, 27)
    wide, gap = 19.0, 5.0
    names = {0: "embedding", 1: "exit 2", 3: "final head"}
    for stage in range(STAGES):
        x = 3 + stage * (wide + gap)
        draw.box(x, 13, wide, 12)
        draw.words(x + wide / 2, 23, f"stage {stage}")
        if stage in names:
            words = f"{names[stage]}\na copy of W"
            draw.box(x + 2.5, 15, wide - 5, 5.6, words, facecolor=BLUE, linewidth=0, ink="white")
            draw.arrow((x + wide / 2 - 3, 13), (x + wide / 2 - 3, 8.2), RED)
            draw.words(x + wide / 2 - 6, 10.6, "own\ngradient", color=RED, fontsize=8)
            draw.arrow((x + wide / 2 + 3, 8.2), (x + wide / 2 + 3, 13), GREEN)
            draw.words(x + wide / 2 + 5.6, 10.6, "sum", color=GREEN, fontsize=8)
    words = "one all-reduce after the last backward"
    draw.box(3, 4.6, 4 * wide + 3 * gap, 3.6, words, facecolor="#c9ced6", linewidth=0)
    draw.words(3, 1.8, "each process sends its own shard of W: 1 / (data x tensor) of it", ha="left", color=GREY)
    save(draw.figure, "tied")


def tensor() -> None:
    """A head whose matrix is cut by vocabulary, with hidden states cut by position."""
    draw = Drawing.of(106, 35)
    for rank, y in ((0, 20.5), (1, 7.0)):
        half, ids = (("first", "0 to V/2"), ("second", "V/2 to V"))[rank]
        draw.words(1, y + 5.5, f"rank {rank}", ha="left", fontweight="bold")
        logits = f"logits of a chunk\nof positions, by\nthe rows {ids}"
        for x, wide, words, looks in (
            (8, 16, f"hidden states,\n{half} half of\nthe positions", {}),
            (35, 15, "hidden states,\nall positions", {}),
            (55, 18, logits, {"facecolor": "#e3d3f6", "edgecolor": VIOLET}),
            (89, 15, "loss, accuracy,\nconfidence\nby token", {}),
        ):
            draw.box(x, y, wide, 11, **looks)
            draw.words(x + wide / 2, y + 6.7, words)
        for start, end in ((24, 28), (31, 35), (50, 55), (73, 77), (85, 89)):
            draw.arrow((start, y + 7), (end, y + 7), BLUE)
        for start, end in ((55, 31), (28, 24)):
            draw.arrow((start, y + 2), (end, y + 2), RED)
    draw.box(28, 6.5, 3, 25, facecolor="#c9ced6", linewidth=0)
    draw.words(29.5, 19, "all-gather", rotation=90)
    draw.words(29.5, 4.9, "and back: reduce-scatter of the gradient", color=RED)
    draw.box(77, 6.5, 8, 25, facecolor="#c9ced6", linewidth=0)
    draw.words(81, 19, "all-reduce\nby token:\nlargest,\nsum of exp,\nlogit of\nthe label")
    draw.words(1, 1.8, "No process holds the logits of a token whole, or sends them.", ha="left", color=GREY)
    save(draw.figure, "tensor")


def rows() -> None:
    """How documents are cut into rows, and who sees whom in one."""
    lengths, seq_len = [22, 9, 14, 30, 6, 12], 24
    offsets = np.cumsum([0, *lengths])
    segments, bounds = pack(offsets, seq_len)
    colours = (BLUE, GREEN, VIOLET, "#e8a33d", RED, "#17a2b8")
    owner = np.searchsorted(offsets, segments[:, 0], side="right") - 1
    figure = new_figure((10.0, 3.2))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.7, 1, 1))
    for row in range(len(bounds) - 1):
        at = 0
        for number in range(bounds[row], bounds[row + 1]):
            size = segments[number, 1] - segments[number, 0] - 1
            left.broken_barh([(at, size)], (row - 0.4, 0.8), facecolor=colours[owner[number]], edgecolor="white")
            left.text(at + size / 2, row, f"{'ABCDEF'[owner[number]]}", ha="center", va="center", color="white")
            at += size
    left.set(xlim=(0, seq_len), ylim=(len(bounds) - 1.5, -0.5), yticks=range(len(bounds) - 1), facecolor=BAND)
    left.set(xlabel="position", ylabel="row")
    left.set_title("six documents, A to F, in rows of 24", fontsize=10)
    row = int(np.argmax(np.diff(bounds)))
    sizes = [int(b - a - 1) for a, b in segments[bounds[row] : bounds[row + 1], :2]]
    place = np.arange(seq_len)
    piece = np.searchsorted(np.cumsum(sizes), place, side="right")
    past = place[:, None] >= place[None, :]
    for axes, seen, title in (
        (middle, past & (piece[:, None] == piece[None, :]), f"row {row}: who sees whom"),
        (right, past, "across_documents = true"),
    ):
        shown = np.ones((seq_len, seq_len, 3))
        for number in range(len(sizes) + 1):
            shade = colours[owner[bounds[row] + number]] if number < len(sizes) else "#dfe3e8"
            shown[(piece == number)[:, None] & seen] = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        axes.imshow(shown, interpolation="nearest")
        axes.set(xlabel="position seen", ylabel="position")
        axes.set_title(title, fontsize=10)
    figure.tight_layout()
    save(figure, "rows")


def main() -> None:
    """Draw all of them into docs/img."""
    for draw in (weights, stages, deferred, filled, balance, tied, tensor, tuning, rows):
        draw()
        print(OUT / f"training-{draw.__name__}.png")


if __name__ == "__main__":
    main()
