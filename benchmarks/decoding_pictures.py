"""The pictures of docs/decoding.md: recorded passes of the engine on a small random model, and formulas.

python benchmarks/decoding_pictures.py

The engine is the library's own; a spy around ``Runner.run`` notes which rows of which sequences each pass took. The
model has random weights, so that its texts mean nothing, and exits after layers 4 and 8 of 12. Nothing is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from drawing import BLUE, GREEN, OUT, PALE, RED, VIOLET, Drawing, shrink

from exitlm.decode.batch import Batch
from exitlm.decode.engine import Engine
from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.kernels.fused import FusedModel
from exitlm.decode.options import EngineConfig
from exitlm.decode.pricing.measure_costs import ideal
from exitlm.decode.sampling.noise import noise
from exitlm.evaluate.plots import BAND, GREY, INK, new_figure, save_figure
from exitlm.model import EarlyExitModel, ModelConfig
from exitlm.model.exits import ExitConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYERS, EXITS = 12, (4, 8)
ORANGE = "#c26a00"
# T(n) of the packed 4-bit format on a CPU with AVX512 (benchmarks/RESULTS.md, decode-rows), T(1) = 1.
CPU_ROWS, CPU_TIMES = (1, 2, 4, 8, 16), (1.0, 1.134, 1.342, 2.011, 3.464)


def save(figure: Figure, name: str) -> None:
    """Write a picture with 64 colours."""
    shrink(save_figure(figure, OUT / f"decoding-{name}.png"))


# ---- recorded passes


@dataclass(frozen=True)
class State:
    """A sequence between two passes: positions that have passed each segment, and what follows the prompt."""

    filled: tuple[int, ...]
    prompt: int
    tokens: tuple[int, ...]
    drafts: tuple[int, ...]

    @property
    def length(self) -> int:
        """Verified tokens and drafts."""
        return len(self.tokens) + len(self.drafts)


@dataclass(frozen=True)
class Recorded:
    """A pass: its boundaries, the rows (start, count) of each sequence in it, and all sequences before and after."""

    first: int
    last: int
    rows: Mapping[int, tuple[int, int]]
    before: Mapping[int, State]
    after: Mapping[int, State]


def small_model(family: str = "llama", seed: int = 0) -> EarlyExitModel:
    """Twelve random layers of which the later ones change less, so that an exit is often right."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "eos_token_id": 2, "head_dim": 8,
    }  # fmt: skip
    if family == "llama":
        config = transformers.LlamaConfig(**sizes)
    else:
        kinds = (["sliding_attention"] * 2 + ["full_attention"]) * (LAYERS // 3)
        config = transformers.Gemma3TextConfig(**sizes, sliding_window=8, layer_types=kinds)
    model = EarlyExitModel(ModelConfig.from_hf(config.to_dict())).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1.5 if int(name.split(".")[2]) < EXITS[0] else 0.9)
            if name.startswith("lm_head"):
                weight.mul_(5.0)
    model.add_exits([ExitConfig(layer=layer, kind="norm") for layer in EXITS], seed=seed)
    return model


def make_engine(model: EarlyExitModel, **options: Any) -> Engine:
    """An engine that measures nothing."""
    costs = replace(ideal(FusedModel(model, "none")), layer=((1.0, 4.0),))  # 16 rows cost what four passes of one do
    return Engine(model, quant="none", costs=costs, options=EngineConfig(**options))


def states(engine: Engine) -> dict[int, State]:
    """All sequences that run."""
    return {
        s.key: State(tuple(s.filled), s.prompt_length, tuple(s.ids), tuple(d.token for d in s.drafts))
        for s in engine.roster.running
    }


@contextlib.contextmanager
def spied(engine: Engine, found: list[tuple[int, int, dict[int, tuple[int, int]]]]) -> Iterator[None]:
    """Note the rows of each pass of the engine's runner. A part belongs to the sequence that holds its slots."""
    run = engine.runner.run

    def note(first: int, last: int, batch: Batch, hidden_MD: torch.Tensor) -> Any:
        rows = {}
        for part in batch.parts:
            for sequence in engine.roster.running:
                table = sequence.tables[0]
                held = table.end >= part.end and table.freed * table.block_size <= part.start
                if held and tuple(table.slots(part.start, part.count)) == part.writes[0]:
                    rows[sequence.key] = (part.start, part.count)
        found.append((first, last, rows))
        return run(first, last, batch, hidden_MD)

    engine.runner.run = note  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.runner.run = run  # type: ignore[method-assign]


def record(
    engine: Engine, requests: Sequence[tuple[int, Sequence[int], GenerationConfig]]
) -> tuple[list[Recorded], dict[int, Generation]]:
    """Decode requests that arrive at given steps: the passes, and each key's generation."""
    frames: list[Recorded] = []
    generations: dict[int, Generation] = {}
    waiting, step = sorted(requests, key=lambda request: request[0]), 0
    while waiting or engine.roster.running or engine.roster.waiting:
        while waiting and waiting[0][0] <= step:
            engine.add(*waiting.pop(0)[1:])
        before = states(engine)
        passes: list[tuple[int, int, dict[int, tuple[int, int]]]] = []
        with spied(engine, passes):
            events = engine.step()
        for event in events:
            if event.generation is not None:
                generations[event.key] = event.generation
        frames += [Recorded(*one, before, states(engine)) for one in passes]
        step += 1
    return frames, generations


# ---- one sequence: which positions have gone how deep


def segments(axes: Axes, low: int, high: int) -> None:
    """Axes of positions by segments."""
    bounds = (0, *EXITS, LAYERS)
    axes.set(xlim=(low - 0.5, high + 0.5), ylim=(-0.62, len(bounds) - 1 + 0.35), facecolor="white")
    axes.set_yticks([i + 0.5 for i in range(len(bounds) - 1)], [f"{a + 1}-{b}" for a, b in pairwise(bounds)])
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=8, colors=GREY)
    for spine in axes.spines.values():
        spine.set_visible(False)


def cell(axes: Axes, position: int, segment: int, colour: str, words: str = "", ink: str = "white") -> None:
    """What one segment computed for one position."""
    from matplotlib.patches import Rectangle

    place, edge = (position - 0.46, segment + 0.04), GREY if colour == "white" else colour
    looks: dict[str, Any] = {"linestyle": ":" if colour == "white" else "-", "linewidth": 0.7}
    axes.add_patch(Rectangle(place, 0.92, 0.92, facecolor=colour, edgecolor=edge, **looks))
    axes.text(position, segment + 0.5, words, ha="center", va="center", fontsize=8, color=ink)


def snapshot(axes: Axes, frame: Recorded, key: int, low: int, high: int) -> None:
    """A sequence after a pass: what the pass has computed, what was there, and where hidden states wait."""
    segments(axes, low, high)
    bounds = (0, *EXITS, LAYERS)
    state = frame.after[key]
    start, count = frame.rows[key]
    for position in range(low, min(high, max(state.length, start + count) - 1) + 1):
        for segment in range(len(bounds) - 1):
            new = start <= position < start + count and frame.first <= segment < frame.last
            done = position < state.filled[segment]
            dropped = not done and (new or position < frame.before[key].filled[segment])
            cell(axes, position, segment, RED if dropped else BLUE if new else PALE if done else "white")
        if state.filled[-1] <= position < state.filled[0]:
            depth = sum(position < filled for filled in state.filled)
            axes.plot(position, depth, "o", color=GREEN, markersize=8, markeredgecolor="white", zorder=3)
        drafted = position >= len(state.tokens)
        fresh = not drafted and state.filled[0] <= position < frame.before[key].filled[0]
        axes.text(position, -0.33, f"{'new ' * fresh}t{position}", ha="center", va="center", fontsize=8,
                  color=ORANGE if drafted else INK, fontweight="bold" if drafted else "normal")  # fmt: skip


def marks(figure: Figure, named: Sequence[tuple[str, str]], *, waits: bool = True) -> None:
    """Coloured squares, and the dot of a hidden state, below everything."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=colour, edgecolor=GREY if colour == "white" else colour, label=name,
              linestyle=":" if colour == "white" else "-")
        for name, colour in named
    ]  # fmt: skip
    if waits:
        handles.append(Line2D([], [], marker="o", color=GREEN, linestyle="", markersize=8, label="hidden state waits"))
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9)


def pending() -> None:
    """Tokens that leave at an exit, and the pass that takes their rows along."""
    config = GenerationConfig(
        mode="threshold", exits=(EXITS[0],), threshold=0.6, max_new_tokens=20, ignore_eos=True
    )  # fmt: skip
    frames, generations = record(make_engine(small_model(seed=2)), [(0, range(5, 11), config)])
    ((key, found),) = generations.items()
    deep = next(i for i, frame in enumerate(frames) if frame.first and frame.rows[key][1] > 2)
    waited = frames[deep].rows[key][1] - 1
    shown = frames[deep - 1 - waited : deep + 1]
    start = frames[deep].rows[key][0]
    low, high = start - 2, start + waited + 1
    figure = new_figure((11.0, 6.0))
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.0, 0.92))
    for axes, frame in zip(top.subplots(1, len(shown)), shown, strict=True):
        snapshot(axes, frame, key, low, high)
        number = frames.index(frame)
        rows, last = frame.rows[key][1], (0, *EXITS, LAYERS)[frame.last]
        what = "the rule fires" if frame.after[key].length > frame.before[key].length else "it does not fire"
        if frame.last == len(EXITS) + 1:
            what = "nothing waits now"
        begin = (0, *EXITS, LAYERS)[frame.first] + 1
        head = f"pass {number}: {rows} row{'s' * (rows > 1)},\nlayers {begin}-{last};\n{what}"
        axes.set_title(head, fontsize=9, color=INK, loc="left")
        if frame is shown[0]:
            axes.set_ylabel("layers", fontsize=9, color=INK)
    marks(top, [("computed in this pass", BLUE), ("before", PALE), ("not yet", "white")])
    top.subplots_adjust(left=0.06, right=0.99, bottom=0.13, top=0.78, wspace=0.2)
    axes = bottom.subplots()
    prompt = frames[0].rows[key][1]
    segments(axes, prompt - 1, prompt + len(found.token_ids) - 2)
    for number, frame in enumerate(frames):
        begin, count = frame.rows[key]
        for position in range(max(begin, prompt - 1), begin + count):
            for segment in range(frame.first, frame.last):
                left = position - prompt + 1
                early = left < len(found.exit_layers) and found.exit_layers[left] < LAYERS
                cell(axes, position, segment, GREEN if early and segment == 0 else BLUE if early else PALE, f"{number}",
                     "white" if early else INK)  # fmt: skip
    for left, layer in enumerate(found.exit_layers):
        looks = {"color": GREEN, "fontweight": "bold"} if layer < LAYERS else {"color": INK}
        axes.text(prompt - 1 + left, -0.33, f"{layer}", ha="center", va="center", fontsize=8, **looks)
    axes.set_ylabel("layers", fontsize=9, color=INK)
    axes.set_xticks([])
    axes.set_title("the whole text: in which pass each position went through each layer, and (below) the layer whose "
                   "head gave its token", fontsize=9)  # fmt: skip
    marks(bottom, [("left at the exit", GREEN), ("came along later", BLUE), ("went on to the end", PALE)], waits=False)
    bottom.subplots_adjust(left=0.06, right=0.99, bottom=0.13, top=0.88)
    save(figure, "pending")


def verify() -> None:
    """Drafts at an exit, one pass that verifies them, and what is rolled back."""
    config = GenerationConfig(
        mode="lossless", exits=(EXITS[0],), threshold=0.4, max_new_tokens=30, ignore_eos=True, adaptive=False,
        draft=("exits",), max_draft=3,
    )  # fmt: skip
    frames, generations = record(make_engine(small_model(seed=2)), [(0, range(5, 11), config)])
    (key,) = generations
    at = next(
        i for i, frame in enumerate(frames)
        if frame.first and frame.last > len(EXITS) and len(frame.before[key].drafts) == 3
        and 0 < len(frame.after[key].tokens) - len(frame.before[key].tokens) - 1 < 3
    )  # fmt: skip
    known, drafted = len(frames[at].before[key].tokens), len(frames[at].before[key].drafts)
    taken = len(frames[at].after[key].tokens) - known - 1
    shown = [frame for frame in frames[1:at] if len(frame.before[key].tokens) == known][-drafted - 1 :]
    low, high = known - 2, known + drafted
    figure = new_figure((11.0, 3.6))
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1))
    first = frames[frames.index(shown[0])]
    snapshot(panels[0], first, key, low, high)
    panels[0].set_title("the newest row reaches the exit,\nits rule fires: a first draft", fontsize=9, loc="left")
    before = shown[-1]
    snapshot(panels[1], before, key, low, high)
    panels[1].set_title(f"{drafted} drafts (bold); the row of the last one\nis on its way, too", fontsize=9, loc="left")
    frame = frames[at]
    snapshot(panels[2], frame, key, low, high)
    panels[2].set_title(f"one deep pass over {frame.rows[key][1]} rows accepts {taken}, gives the\nnext token itself,"
                        " and drops the refused row", fontsize=9, loc="left")  # fmt: skip
    panels[0].set_ylabel("layers", fontsize=9, color=INK)
    marks(figure, [("computed in this pass", BLUE), ("before", PALE), ("not yet", "white"),
                   ("computed, then rolled back", RED)])  # fmt: skip
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.14, top=0.82, wspace=0.14)
    save(figure, "verify")


# ---- several sequences


def batch() -> None:
    """Passes in order, each as deep as its layers and as wide as its rows."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    common: dict[str, Any] = {"ignore_eos": True, "exits": (EXITS[0],)}
    requests = [
        (0, range(5, 9), GenerationConfig(mode="full", max_new_tokens=12, ignore_eos=True)),
        (0, range(9, 12), GenerationConfig(mode="threshold", threshold=0.5, max_new_tokens=14, **common)),
        (6, range(12, 20), GenerationConfig(mode="lossless", threshold=0.4, adaptive=False, draft=("exits",),
                                            max_draft=3, max_new_tokens=14, **common)),
    ]  # fmt: skip
    frames, generations = record(make_engine(small_model(seed=2), prefill_chunk=4), requests)
    keys, colours = sorted(generations), (BLUE, GREEN, VIOLET)
    shown, bounds = frames[:22], (0, *EXITS, LAYERS)
    figure = new_figure((11.0, 3.7))
    axes = figure.subplots()
    side, gap, x = 0.8, 1.1, 0.0
    for number, frame in enumerate(shown):
        count = sum(rows for _, rows in frame.rows.values())
        low, high = bounds[frame.first], bounds[frame.last]
        style = "round,pad=0,rounding_size=0.25"
        axes.add_patch(FancyBboxPatch((x, low + 0.12), count * side + 0.4, high - low - 0.24, boxstyle=style,
                                      facecolor=BAND, edgecolor=GREY, linewidth=0.7))  # fmt: skip
        left = x + 0.2
        for key in keys:
            start, rows = frame.rows.get(key, (0, 0))
            for i in range(rows):
                prompt = start + i < frame.before.get(key, frame.after[key]).prompt if key in frame.after else False
                shade = (colours[keys.index(key)], 0.35 if prompt else 1.0)
                axes.add_patch(Rectangle((left + 0.06, low + 0.4), side - 0.12, high - low - 0.8, facecolor=shade,
                                         linewidth=0))  # fmt: skip
                left += side
        axes.text(x + count * side / 2 + 0.2, -0.75, f"{number}", ha="center", va="center", fontsize=8, color=GREY)
        x += count * side + gap
    for layer in EXITS:
        axes.axhline(layer, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    axes.set(xlim=(-0.5, x), ylim=(-1.3, LAYERS + 0.2), facecolor="white", xticks=[])
    axes.set_yticks([0, *EXITS, LAYERS], ["0", *(f"exit {layer}" for layer in EXITS), f"{LAYERS}"], fontsize=9)
    axes.set_ylabel("layers", fontsize=9, color=INK)
    axes.set_xlabel("passes, one after the other; as wide as they have rows", fontsize=9)
    axes.tick_params(length=0, colors=GREY)
    for spine in axes.spines.values():
        spine.set_visible(False)
    names = [("A: full", BLUE), ("B: threshold", GREEN), ("C: lossless, arrives later", VIOLET)]
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in names]
    handles.append(Patch(facecolor=(GREY, 0.35), label="pale: rows of a prompt"))
    figure.legend(handles=handles, loc="upper center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    save(figure, "batch")


# ---- memory


def blocks() -> None:
    """Block tables of two sequences that begin alike, in a group without and in one with a window."""
    engine = make_engine(small_model("gemma3"), block_size=4, prefix_sharing=True, kv_bytes=210_000, max_sequences=2,
                         max_rows=8, prefill_chunk=8)  # fmt: skip
    prompt = list(range(5, 27))
    config = GenerationConfig(mode="full", max_new_tokens=20, ignore_eos=True)
    engine.add(prompt, config)
    for _ in range(3):
        engine.step()
    engine.add([*prompt[:17], *range(30, 39)], config)
    while len(engine.roster.running) < 2 or any(s.generated < 8 for s in engine.roster.running):
        engine.step()
    draw = Drawing.of(106, 44)
    wide, colours = 4.9, (BLUE, VIOLET)
    for number, group in enumerate(engine.memory.pool.groups):
        y = 24.5 if number == 0 else 4.3
        name = "layers that see everything" if group.window is None else f"layers with a window of {group.window}"
        draw.words(2, y + 16.4, f"{name}", ha="left", fontweight="bold")
        tables = [s.tables[number] for s in engine.roster.running]
        uses: dict[int, int] = {}
        for table in tables:
            for block in table.blocks:
                uses[block] = uses.get(block, 0) + 1
        allocator = engine.memory.pool.allocators[number]
        for i, table in enumerate(tables):
            top = y + 11.0 - 4.2 * i
            draw.words(2, top + 1.6, f"sequence {'AB'[i]}", ha="left", color=colours[i])
            for index in range(table.freed):
                draw.box(14 + index * wide, top, wide - 0.6, 3.2, "–", facecolor="white", linestyle=":", ink=GREY)
            for index, block in enumerate(table.blocks, table.freed):
                shared = uses[block] > 1
                draw.box(14 + index * wide, top, wide - 0.6, 3.2, f"{block}",
                         facecolor=GREEN if shared else colours[i], linewidth=0, ink="white")  # fmt: skip
        draw.words(2, y + 1.6, "the pool", ha="left", color=INK)
        count = min(20, allocator.num_blocks)
        for block in range(count):
            owner = next((i for i, table in enumerate(tables) if block in table.blocks), None)
            look: dict[str, Any] = {"facecolor": "white", "ink": GREY, "linestyle": ":"}
            if uses.get(block, 0) > 1:
                look = {"facecolor": GREEN, "ink": "white", "linewidth": 0}
            elif owner is not None:
                look = {"facecolor": colours[owner], "ink": "white", "linewidth": 0}
            elif allocator.published(block):
                look = {"facecolor": PALE, "ink": INK, "linewidth": 0}
            draw.box(14 + block * wide, y, wide - 0.6, 3.2, f"{block}", **look)
    keys = [("A's", BLUE), ("B's", VIOLET), ("both", GREEN), ("nobody's, kept for its prefix", PALE),
            ("free, or (–) given back: out of the window", "white")]  # fmt: skip
    x = 14.0
    for name, colour in keys:
        draw.box(x, 0.4, 2.2, 1.8, facecolor=colour, linewidth=0.8 if colour == "white" else 0)
        draw.words(x + 3, 1.3, name, ha="left", fontsize=8.5)
        x += 6 + 0.82 * len(name)
    save(draw.figure, "blocks")


# ---- sampling


def race() -> None:
    """The same noise for a draft and for the token: two positions, one draft accepted and one refused."""
    words = ("the", "a", "its", "one", "this", "no", "my", "any")
    p = np.array([0.36, 0.22, 0.13, 0.1, 0.08, 0.05, 0.04, 0.02])
    q = np.array([0.27, 0.33, 0.08, 0.12, 0.06, 0.08, 0.03, 0.03])
    found: dict[bool, int] = {}
    for position in range(64):
        drawn = noise(7, 0, position, vocab_size=len(p)).numpy()
        found.setdefault(bool((p / drawn).argmax() == (q / drawn).argmax()), position)
    figure = new_figure((11.0, 4.6))
    panels = figure.subplots(2, 3, width_ratios=(1.15, 0.9, 1.15))
    place = np.arange(len(p))
    for row, (same, position) in zip(panels, sorted(found.items(), reverse=True), strict=True):
        drawn = noise(7, 0, position, vocab_size=len(p)).numpy()
        pairs = ((q, GREEN, -0.2, "exit, q"), (p, BLUE, 0.2, "full model, p"))
        for values, colour, shift, name in pairs:
            row[0].bar(place + shift, values, 0.38, color=colour, label=name)
            times = values / drawn
            bars = row[2].bar(place + shift, times / times.max(), 0.38, color=colour, alpha=0.45)
            bars[int(times.argmax())].set_alpha(1.0)
        row[1].bar(place, drawn, 0.6, color=GREY)
        draft, token = words[int((q / drawn).argmax())], words[int((p / drawn).argmax())]
        verdict = "accepted" if same else "refused"
        row[2].set_title(f"the exit drafts “{draft}”, the token is “{token}”: {verdict}", fontsize=9)
        row[0].set_title(f"output position {position}: two distributions", fontsize=9)
        row[1].set_title("one noise E, of seed and position", fontsize=9)
        for axes in row:
            axes.set_xticks(place, words, fontsize=8)
            axes.set_yticks([])
            axes.set_facecolor("white")
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
    panels[0, 0].legend(frameon=False, fontsize=9)
    panels[1, 0].set_xlabel("p and q", fontsize=9)
    panels[1, 1].set_xlabel("E: small is fast", fontsize=9)
    panels[1, 2].set_xlabel("q / E and p / E: the largest wins (strong colour)", fontsize=9)
    figure.tight_layout()
    save(figure, "race")


# ---- what scheduling can gain


def flat(rows: float) -> float:
    """A device whose passes take the same time up to 200 rows, and in proportion to them from there on."""
    return max(1.0, rows / 200)


def cpu(rows: float) -> float:
    """The measured table, and beyond it in proportion."""
    if rows >= CPU_ROWS[-1]:
        return CPU_TIMES[-1] * rows / CPU_ROWS[-1]
    return float(np.interp(rows, CPU_ROWS, CPU_TIMES))


def speed(times: Any, sequences: int, k: int, *, below: float, fires: float, accepted: float = 1.0) -> float:
    """S(B, k): tokens per second of at most ``k`` shallow steps before each deep pass, against plain decoding."""
    p = fires * accepted
    tokens = sum(p**i for i in range(k))
    shallow = 0.0
    for i in range(k):
        active = 1 - (1 - fires**i) ** sequences
        if active > 0:
            shallow += active * times(sequences * fires**i / active)
    rows = sequences * sum(fires**i for i in range(k))
    return float(tokens * times(sequences) / (below * shallow + (1 - below) * times(rows)))


def best(times: Any, sequences: int, **chances: float) -> float:
    """S at the best k; plain decoding is always there."""
    return max([1.0, *(speed(times, sequences, k, **chances) for k in range(1, 25))])


def gain() -> None:
    """S(B) for two tables, and how many exits must fire for a shallow step to be worth its time."""
    figure = new_figure((11.0, 3.9))
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    for fires, colour in ((0.7, BLUE), (0.5, VIOLET), (0.2, GREY)):
        for times, line, name in ((flat, "-", "flat to 200 rows"), (cpu, "--", "CPU, 4 bits")):
            speeds = [best(times, size, below=0.25, fires=fires) for size in sizes]
            left.plot(sizes, speeds, line, color=colour, linewidth=2, label=f"q = {fires}, {name}")
    left.set_xscale("log", base=2)
    left.set_xticks([1, 2, 4, 8, 16, 32, 64, 128, 256], ["1", "2", "4", "8", "16", "32", "64", "128", "256"])
    left.set(xlabel="B, sequences decoded together", ylabel="S, speed against plain decoding", ylim=(0.96, 2.2))
    left.legend(frameon=False, fontsize=8.5, loc="upper right")
    left.set_title("threshold, an exit at f = 0.25, the best k", fontsize=10)
    shares = np.linspace(0, 0.99, 100)
    for below, colour in ((0.25, BLUE), (0.5, VIOLET), (0.75, RED)):
        speeds = [best(lambda rows: 1.0, 10**6, below=below, fires=float(q)) for q in shares]
        right.plot(shares, speeds, color=colour, linewidth=2, label=f"f = {below}")
        right.plot([below], [1.0], "o", color=colour, markersize=7)
    right.set(xlabel="q, how often the rule fires", ylabel="S", xlim=(0, 1), ylim=(0.96, 2.2))
    right.legend(frameon=False, fontsize=9, loc="upper left")
    right.set_title("many sequences, rows free: worth it from q = f on", fontsize=10)
    for axes in (left, right):
        axes.grid(color=BAND)
        axes.set_axisbelow(True)
    figure.tight_layout()
    save(figure, "gain")


def main() -> None:
    """Draw all of them into docs/img."""
    for draw in (pending, verify, batch, blocks, race, gain):
        draw()
        print(OUT / f"decoding-{draw.__name__}.png")


if __name__ == "__main__":
    main()
