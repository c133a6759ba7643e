"""What each process holds that decodes with P pipeline stages of T tensor ranks, and how long a token takes it: by
formula, before anything is loaded.

Parameters are those of ``exitlm.parallel.pipeline.split``, with which training counts; bytes follow from the formats
that they are packed in. A token reads every weight of the layers once, and the keys and values of its text, so that
seconds are bytes by a bandwidth that the caller assumes, or those of a table of costs. What processes send each other
is left out of both. Not here: who is where (the engine) and what was measured (``pricing/``).

Shapes: D hidden_size, V vocab_size, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from exitlm.decode.options import EngineConfig
from exitlm.decode.pricing.costs import Costs
from exitlm.errors import UserError
from exitlm.model.config import SLIDING, ModelConfig
from exitlm.model.exits import ExitConfig
from exitlm.parallel.pipeline.split import Split, StageCost, make_split, stage_costs
from exitlm.parallel.tensor import check_tensor
from exitlm.tables import aligned, scaled
from exitlm.values import whole
from exitlm.weights.adapter import is_adapter, read_adapter
from exitlm.weights.checkpoint import dtype_of, open_checkpoint
from exitlm.weights.source import resolve

Adapters = Sequence[Sequence[ExitConfig]]
"""The exits of a model, those of each adapter by themselves."""
_INT4 = 0.5 + 4 / 32  # and two 16-bit numbers for each group of 32
_Q8_0 = 1.0 + 2 / 32  # and one


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of a weight in the layers, in exit heads, in matrices of vocabulary by hidden size (the final head's, also
    where exits read it), and in the embedding. Formats as in ``kernels/formats.py``."""

    layers: float
    exits: float
    heads: float
    embedding: float

    @classmethod
    def of(cls, quant: str, itemsize: int) -> WeightBytes:
        """Of a resolved format, where the model's own weights have ``itemsize`` bytes (with ``stored``: on average)."""
        if quant in ("none", "stored"):
            return cls(layers=itemsize, exits=itemsize, heads=itemsize, embedding=itemsize)
        if quant == "q8_0":
            return cls(layers=_Q8_0, exits=_Q8_0, heads=_Q8_0, embedding=_Q8_0)
        if quant in ("int8", "int4"):
            return cls(layers=1.0 if quant == "int8" else _INT4, exits=1.0, heads=2.0, embedding=itemsize)
        assert quant in ("fp16", "bf16")
        return cls(layers=2.0, exits=2.0, heads=2.0, embedding=itemsize)


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """What one process has: the first tensor rank of a pipeline stage; the others have as much, or a little less.

    ``layers`` (0-based), ``exits`` (1-based layers, of all adapters), ``matrices`` of heads over the vocabulary or
    candidates, and ``parameters``. ``weight_bytes`` of them all, ``kv_bytes`` for the keys and values that are asked
    for. ``read_bytes`` are what one more token of a whole text reads in the layers, and in the final head where it is
    here; ``test_bytes`` what the tests of all exits read besides.
    """

    stage: int
    ranks: range
    layers: range
    exits: tuple[int, ...]
    has_embedding: bool
    has_final_head: bool
    matrices: int
    parameters: int
    weight_bytes: int
    kv_bytes: int
    read_bytes: int
    test_bytes: int


@dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """Seconds of one row in a stage: of its layers, and of the final head where it is there; and of its exits' tests
    besides, all of them."""

    layers: float
    tests: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model on ``pipeline`` x ``tensor`` processes, with room for the keys and values of ``sequences`` texts of
    ``context`` tokens. ``stages`` has one process of each stage; ``parameters`` are those of a process that has all."""

    pipeline: int
    tensor: int
    sequences: int
    context: int
    parameters: int
    stages: tuple[RankLayout, ...]

    def read_seconds(self, bandwidth: float) -> list[StageSeconds]:
        """Where a process reads so many bytes a second."""
        return [
            StageSeconds(layers=each.read_bytes / bandwidth, tests=each.test_bytes / bandwidth) for each in self.stages
        ]

    def table_seconds(self, costs: Sequence[Costs]) -> list[StageSeconds]:
        """By a table of one process for each stage, whose work T ranks share; what a pass costs besides stays."""
        found, depth = [], self.stages[-1].layers.stop
        for each, table in zip(self.stages, costs, strict=True):
            own = table.span(each.layers.start, each.layers.stop, 1, self.context) - table.cut()
            final = table.final() if each.has_final_head else 0.0
            tests = sum(table.tests(e) for e in set(each.exits) if e < depth and e in table.draft)
            found.append(StageSeconds(layers=(own + final) / self.tensor + table.cut(), tests=tests / self.tensor))
        return found


def make_layout(
    config: ModelConfig,
    adapters: Adapters,
    *,
    pipeline: int = 1,
    tensor: int = 1,
    weights: WeightBytes,
    kv_itemsize: int = 2,
    sequences: int = 1,
    context: int | None = None,
    bounds: Sequence[int] | None = None,
) -> Layout:
    """Lay a model out. ``bounds`` are the layers at which stages begin and the last one ends (None: stages of equal
    work, as training cuts them); an exit between two stages belongs to the one before. ``context`` None is 2,048
    tokens, or as many as the model takes.

    Raises:
        UserError: the model can't be cut like that, or does not take so long a text.
    """
    for name, value in (("pipeline", pipeline), ("tensor", tensor), ("the number of texts", sequences)):
        whole(value, name, least=1)
    longest = config.max_position_embeddings
    context = min(2048, longest) if context is None else whole(context, "the context", least=1)
    if context > longest:
        raise UserError(f"the context is {context} tokens, but the model takes {longest}; use at most that")
    check_tensor(config, [e for exits in adapters for e in exits], tensor, False, 0)
    split = _split(config, adapters, pipeline, bounds)
    (alone,) = _stages(config, adapters, _split(config, adapters, 1, None))
    found = []
    for index, stage in enumerate(_stages(config, adapters, split)):
        layers, depth = split.layers(index), config.num_hidden_layers
        read = [_positions(config, layer, context) for layer in layers]
        blocks = [_positions(config, e.layer - 1, context) for e in stage.exits if e.kind == "block"]
        position = 2 * config.num_key_value_heads // tensor * config.head_dim * kv_itemsize
        sizes = stage.bytes(weights, tensor)
        tested = [e for e in stage.exits if e.layer < depth]
        found.append(
            RankLayout(
                stage=index,
                ranks=range(index * tensor, (index + 1) * tensor),
                layers=layers,
                exits=tuple(sorted({e.layer for e in stage.exits})),
                has_embedding=stage.has_embedding,
                has_final_head=stage.has_final_head,
                matrices=stage.matrices,
                parameters=math.ceil(stage.count(tensor)),
                weight_bytes=math.ceil(sizes.all),
                kv_bytes=sequences * position * sum(read + blocks),
                read_bytes=math.ceil(sizes.layers + stage.has_final_head * sizes.head) + position * sum(read),
                test_bytes=math.ceil(sum(_test_bytes(config, e, weights, tensor) for e in tested)),
            )
        )
    return Layout(
        pipeline=pipeline,
        tensor=tensor,
        sequences=sequences,
        context=context,
        parameters=math.ceil(alone.count(1)),
        stages=tuple(found),
    )


def _split(config: ModelConfig, adapters: Adapters, pipeline: int, bounds: Sequence[int] | None) -> Split:
    """The stages' layers; who has an exit is the same for all adapters."""
    first = {e.layer: e for exits in reversed(adapters) for e in exits}
    exits = [first[layer] for layer in sorted(first)]
    if bounds is None:
        return make_split(config, exits, pipeline, place="end")
    counts = [b - a for a, b in pairwise(bounds)]
    return make_split(config, exits, pipeline, place="end", layers_per_stage=counts)


def _positions(config: ModelConfig, layer: int, context: int) -> int:
    """How many positions of a text of ``context`` tokens a layer keeps."""
    window = config.sliding_window if config.layer_types[layer] == SLIDING else None
    return context if window is None else min(window, context)


# ---- what is counted


@dataclass(frozen=True)
class _Count:
    """Parameters: all of them, and how many no tensor rank cuts."""

    all: int = 0
    whole: int = 0

    def of_rank(self, tensor: int) -> float:
        """How many the first of so many ranks has."""
        return (self.all - self.whole) / tensor + self.whole

    def __add__(self, other: _Count) -> _Count:
        return _Count(self.all + other.all, self.whole + other.whole)

    def __sub__(self, other: _Count) -> _Count:
        return _Count(self.all - other.all, self.whole - other.whole)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of one rank: of everything, of the layers, and of the final head."""

    all: float
    layers: float
    head: float


@dataclass(frozen=True)
class _Stage:
    """A stage's parameters by the formats that they have. ``head`` is the final head's matrix, also where only exits
    read it; ``tied`` says that it is the embedding, too. ``norm`` is the final one."""

    exits: tuple[ExitConfig, ...]
    has_embedding: bool
    has_final_head: bool
    tied: bool
    matrices: int
    of_layers: _Count
    of_exits: _Count
    matrix: _Count
    head: _Count
    norm: _Count

    def count(self, tensor: int) -> float:
        """Parameters of one rank, a tied matrix once."""
        parts = [self.of_layers, self.of_exits, self.head, self.norm]
        if self.has_embedding and not (self.tied and self.head.all):
            parts.append(self.matrix)
        return sum(part.of_rank(tensor) for part in parts)

    def bytes(self, weights: WeightBytes, tensor: int) -> _Sizes:
        """Bytes of one rank. A tied matrix is there twice where the output has a format of its own."""
        layers, head = self.of_layers.of_rank(tensor) * weights.layers, self.head.of_rank(tensor) * weights.heads
        rest = self.of_exits.of_rank(tensor) * weights.exits + self.norm.of_rank(tensor) * weights.embedding
        one = self.tied and self.head.all and weights.heads == weights.embedding
        if self.has_embedding and not one:
            rest += self.matrix.of_rank(tensor) * weights.embedding
        return _Sizes(layers + head + rest, layers, head)


def _stages(config: ModelConfig, adapters: Adapters, split: Split) -> list[_Stage]:
    """What the stages of a split hold: differences of what training counts for a model with exits and one without."""
    plain = stage_costs(config, [], replace(split, owners={}))
    matrix = _Count(config.vocab_size * config.hidden_size)
    found = []
    for index, cost in enumerate(plain):
        mine = [[_as_held(e) for e in exits if e.layer in split.exits(index)] for exits in adapters]
        shares = any(e.output == "shared" for exits in mine for e in exits)
        norm = _Count(config.hidden_size, config.hidden_size) if cost.has_final_head else _Count()
        own = sum((_exits(config, exits) for exits in mine), _Count())
        found.append(
            _Stage(
                exits=tuple(e for exits in mine for e in exits),
                has_embedding=cost.has_embedding,
                has_final_head=cost.has_final_head,
                tied=config.tie_word_embeddings,
                matrices=sum(_matrices(exits) for exits in mine) + (shares or cost.has_final_head),
                of_layers=_Count(cost.layer_parameters, cost.whole - norm.whole),
                of_exits=own,
                matrix=matrix,
                head=matrix if shares or cost.has_final_head else _Count(),
                norm=norm,
            )
        )
    return found


def _as_held(e: ExitConfig) -> ExitConfig:
    """Decoding keeps a copy of the rows of candidates, whose matrix is then its own."""
    return replace(e, output="own") if e.candidates and e.output == "shared" else e


def _matrices(exits: Sequence[ExitConfig]) -> int:
    """Matrices over the vocabulary or candidates that only exits have."""
    return sum(e.output in ("own", "low_rank") for e in exits) + any(e.output == "exits" for e in exits)


def _exits(config: ModelConfig, exits: Sequence[ExitConfig]) -> _Count:
    """Parameters of exit heads without the final head's matrix."""
    one = Split(bounds=(0, config.num_hidden_layers), owners={e.layer: 0 for e in exits})
    (cost,), (plain,) = stage_costs(config, exits, one), stage_costs(config, [], replace(one, owners={}))
    return _of(cost) - _of(plain)


def _of(cost: StageCost) -> _Count:
    return _Count(cost.parameters, cost.whole)


def _test_bytes(config: ModelConfig, e: ExitConfig, weights: WeightBytes, tensor: int) -> float:
    """Bytes that a rank reads for the test of an exit, its token included."""
    size = _exits(config, [e]).of_rank(tensor) * weights.exits
    if e.output == "shared":
        size += config.vocab_size * config.hidden_size / tensor * weights.heads
    return size


# ---- in words


def describe(layout: Layout, *, bandwidth: float | None = None, costs: Sequence[Costs] = ()) -> str:
    """What the layout is, and a line for each stage's processes. Times come from a ``bandwidth`` in bytes per second of
    each process, or from a table of ``costs`` for each stage; without either there are none.

    Raises:
        UserError: a bandwidth that is none.
    """
    times: list[StageSeconds] = []
    if costs:
        times, known = layout.table_seconds(costs), "by the table of costs"
    elif bandwidth is not None:
        if not 1.0 <= bandwidth <= 1e18:
            raise UserError(f"the assumed bandwidth is {bandwidth:g} bytes/s, but must be a positive number")
        times, known = layout.read_seconds(bandwidth), f"at {scaled(bandwidth)}B/s a process"
    world = layout.pipeline * layout.tensor
    exits = ", ".join(map(str, sorted({e for each in layout.stages for e in each.exits}))) or "no layer"
    texts = f"{layout.sequences} text{'s' * (layout.sequences > 1)} of {layout.context} tokens"
    lines = [
        f"model  {scaled(layout.parameters)} parameters; exits after {exits}",
        f"ranks  {world} = pipeline {layout.pipeline} x tensor {layout.tensor}, with the keys and values of {texts}",
    ]
    if times:
        deep, tests = sum(each.layers for each in times), sum(each.tests for each in times)
        slowest = max(each.layers + each.tests for each in times)
        lines.append(f"time   {_ms(deep)} a token of one text, and {_ms(tests)} where every exit is tested, {known}")
        if layout.pipeline > 1:
            lines.append(f"       {_ms(slowest)} from pass to pass where all stages are busy")
    rows = [
        ["rank", "layers", "exits", "V x D", "parameters", "weights", "keys", "GiB", *["ms", "tests"] * bool(times)]
    ]
    for index, each in enumerate(layout.stages):
        rows.append(_row(each))
        if times:
            rows[-1] += [f"{seconds * 1e3:.3g}" for seconds in (times[index].layers, times[index].tests)]
    lines += aligned(rows)
    lines.append(
        "V x D: matrices of embedding (in) and heads (out); parameters to GiB: of one process, by formula; tensor ranks"
    )
    lines.append("of a stage are alike" + "; ms: of one row, without messages" * bool(times))
    return "\n".join(lines)


def _row(each: RankLayout) -> list[str]:
    first, last = each.ranks.start, each.ranks.stop - 1
    sizes = (each.weight_bytes, each.kv_bytes, each.weight_bytes + each.kv_bytes)
    return [
        f"{first}" if first == last else f"{first}-{last}",
        f"{each.layers.start + 1}-{each.layers.stop}",
        " ".join(map(str, each.exits)) or "-",
        " + ".join(["in"] * each.has_embedding + [f"{each.matrices} out"] * (each.matrices > 0)) or "-",
        scaled(each.parameters),
        *(f"{size / 2**30:.2f}" for size in sizes),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def described(
    source: str, adapters: Sequence[str], options: EngineConfig, *, quant: str = "auto", dtype: str = "auto",
    gigabytes: float | None = None,
) -> str:  # fmt: skip
    """What a model's files and an engine's settings make of each process, without loading weights. ``gigabytes``: what
    a process reads in a second (None: what this one does, measured).

    Raises:
        UserError: there is no such model, or it can't be laid out so.
    """
    checkpoint = open_checkpoint(source)
    place = resolve(source)
    directories = [Path(name) for name in adapters] or ([place] if is_adapter(place) else [])
    config, exits = checkpoint.model_config, [read_adapter(directory).exits for directory in directories]
    own = checkpoint.dtype if dtype == "auto" else dtype_of(dtype)
    weights = WeightBytes.of("none" if quant == "auto" else quant, own.itemsize)
    if checkpoint.source is not None and quant in ("auto", "stored"):  # as many bytes as the file has, on average
        count = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
        each = checkpoint.source.stat().st_size / count
        weights = WeightBytes(layers=each, exits=each, heads=each, embedding=each)
    bounds = None
    if options.layers_per_stage is not None:
        bounds = (0, *itertools.accumulate(options.layers_per_stage))
    layout = make_layout(
        config, exits, pipeline=options.pipeline, tensor=options.tensor, weights=weights, bounds=bounds,
        kv_itemsize=2 if options.kv_dtype == "float16" else 4, sequences=min(16, options.max_sequences),
    )  # fmt: skip
    return describe(layout, bandwidth=_bandwidth() if gigabytes is None else gigabytes * 1e9)


def _bandwidth() -> float:
    """Bytes that this process reads in a second, by the best of a few sums over more than a cache holds."""
    values, best = np.ones(1 << 25), math.inf
    for _ in range(4):
        begun = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - begun)
    return float(values.nbytes / best)
