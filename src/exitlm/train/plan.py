"""What each optimizer step does, as plain data: which rows go where, and how much each loss counts.

Pure functions of the settings and the step, the same on every process. Rows of a step are dealt in slabs: microbatch m
of all data ranks together are the m-th slab. Filled schedules enlarge the batch by microbatches that pass only some of
the stages; what a token of them counts is chosen so that every exit's gradient stays that of its mean over the tokens
(``docs/training.md``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from exitlm.errors import UserError
from exitlm.model.exits import ExitConfig
from exitlm.parallel.mesh import Layout
from exitlm.parallel.pipeline.schedule import Schedule, make, max_microbatches
from exitlm.parallel.pipeline.split import Split
from exitlm.parallel.pipeline.stage import FINAL, StepPlan
from exitlm.train.loop import exit_weights
from exitlm.train.run import RunConfig
from exitlm.train.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a step's rows are cut: ``size`` rows a microbatch on each of ``data`` ranks, and the schedule, whose spans
    say how many microbatches there are."""

    size: int
    data: int
    schedule: Schedule

    @property
    def microbatches(self) -> int:
        """How many each data rank has, partial ones included."""
        return len(self.schedule.spans)

    @property
    def rows(self) -> int:
        """The rows of a step."""
        return self.microbatches * self.size * self.data

    def slab(self, step: int, microbatch: int) -> range:
        """The rows of a microbatch of all data ranks."""
        first = step * self.rows + microbatch * self.size * self.data
        return range(first, first + self.size * self.data)

    def mine(self, step: int, data_rank: int) -> list[int]:
        """All rows of a data rank, one microbatch after the other."""
        slabs = (self.slab(step, m) for m in range(self.microbatches))
        return [row for slab in slabs for row in slab[data_rank * self.size : (data_rank + 1) * self.size]]


def geometry(config: RunConfig, layout: Layout, split: Split, *, frozen: bool, teacher: bool) -> Geometry:
    """How the steps of a run are cut.

    Raises:
        UserError: a batch that does not divide, or fewer microbatches than the schedule can run.
    """
    t, p = config.train, config.parallel
    per_round = t.microbatch * p.data
    if t.global_batch % per_round:
        raise UserError(
            f"train.global_batch ({t.global_batch}) must be a multiple of train.microbatch x parallel.data "
            f"({t.microbatch} x {p.data}); use {max(1, t.global_batch // per_round) * per_round}"
        )
    count = t.global_batch // per_round
    most = max_microbatches(layout.schedule, layout.stages)
    if count > most:
        raise UserError(
            f"a step has {count} microbatches on each data rank, more than {most}; use a smaller train.global_batch "
            "(which counts sequences), or a larger train.microbatch"
        )
    if not frozen and p.schedule != "gpipe" and count < layout.pipeline:
        raise UserError(
            f"a step has {count} microbatches, fewer than its {layout.pipeline} pipeline ranks; use a "
            f"train.global_batch of at least {layout.pipeline * per_round}, or a smaller train.microbatch"
        )
    if frozen and not teacher:
        schedule = make("tuning", layout.pipeline, count)
    elif layout.pipeline == 1 or frozen:
        schedule = make("1f1b", layout.pipeline, count)
    elif p.schedule == "filled":
        if teacher:
            raise UserError(
                "schedule 'filled' has microbatches that never reach the final head, which exits are to learn from "
                "here; use schedule '1f1b', or objective.distill = 0 without gates"
            )
        fills = [None if n == "auto" else n for n in (p.fill_warmup, p.fill_cooldown)]
        schedule = make(
            "filled",
            layout.pipeline,
            count,
            ratio=p.backward_forward_ratio,
            fill_warmup=fills[0],
            fill_cooldown=fills[1],
            first_exit=min(split.owners.values(), default=split.stages - 1),
        )
    else:
        schedule = make(p.schedule, layout.pipeline, count, stages_per_rank=layout.stages_per_rank)
    return Geometry(size=t.microbatch, data=p.data, schedule=schedule)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: the plan for all stages, by what each stage's gradient is divided, and how many tokens count in its
    full microbatches."""

    plan: StepPlan
    divisors: Mapping[int, float] = field(default_factory=dict)
    tokens: int


def plan_step(
    config: RunConfig,
    exits: Sequence[ExitConfig],
    split: Split,
    geometry: Geometry,
    stream: Stream,
    step: int,
    *,
    frozen: bool = False,
    scale: float = 1.0,
) -> Step:
    """What step ``step`` (from 0) does.

    With n full microbatches of N tokens: an exit counts ``w / (N + those of the top ones that reach it)`` per token on
    full and top microbatches and ``w / N`` on bottom ones; the gradient of stage s is divided by 1 plus the tokens of
    the bottom microbatches that go back through it, over N.

    Raises:
        UserError: a step whose rows hold nothing to predict.
    """
    o, spans = config.objective, geometry.schedule.spans
    last = split.stages - 1
    counts = {m: stream.valid(geometry.slab(step, m)) for m in spans}
    full = sum(counts[m] for m, span in spans.items() if span == (0, last) or geometry.schedule.stages != split.stages)
    if not full:
        raise UserError(f"step {step + 1} has no token to learn from; the data holds too little text")
    weights = dict(zip([e.layer for e in exits], exit_weights(o, step, len(exits)), strict=True))
    if o.rotate_exits > 1:
        weights = {w: v for i, (w, v) in enumerate(weights.items()) if (i - step) % o.rotate_exits == 0}
    tops = {m: hi for m, (lo, hi) in spans.items() if geometry.schedule.stages == split.stages and hi < last}
    bottoms = {m: lo for m, (lo, hi) in spans.items() if lo > 0}
    shares = {
        layer: 1.0 / (full + sum(counts[m] for m, hi in tops.items() if hi >= split.owners[layer])) for layer in weights
    }
    if not frozen:
        weights[FINAL] = o.final
        shares[FINAL] = 1.0 / full
    divisors = {
        s: 1.0 + sum(counts[m] for m, lo in bottoms.items() if lo <= s) / full for s in range(split.stages) if bottoms
    }
    plan = StepPlan(
        weights=weights,
        shares=shares,
        scale=scale,
        dropped=dropped_layers(config, exits, split, step, len(spans)) if not frozen else {},
        bottom=bottoms,
        bottom_share=1.0 / full,
    )
    return Step(plan=plan, divisors=divisors, tokens=full)


def dropped_layers(
    config: RunConfig, exits: Sequence[ExitConfig], split: Split, step: int, microbatches: int
) -> dict[int, frozenset[int]]:
    """Which layers (0-based) each microbatch of a step skips: layer l of L with the probability
    ``rate * (2^(l / (L - 1)) - 1) * (2^(step / (steps - 1)) - 1)`` (LayerSkip, arXiv 2404.16710, section 4.1.1). One
    draw for the whole batch, so that no layout of processes changes it. A layer inside which an ``mlp`` exit reads
    stays."""
    rate, depth = config.objective.layer_dropout, split.bounds[-1]
    if rate == 0.0:
        return {}
    time = 2.0 ** (step / max(1, config.train.steps - 1)) - 1.0
    stays = {e.layer - 1 for e in exits if e.kind == "mlp"}
    layers = [layer for layer in range(depth) if layer not in stays]
    chances = {layer: rate * time * (2.0 ** (layer / max(1, depth - 1)) - 1.0) for layer in layers}
    seed = config.train.seed
    dropped = frozenset(layer for layer, chance in chances.items() if _uniform(seed, step, layer) < chance)
    return dict.fromkeys(range(microbatches), dropped)


def _uniform(*numbers: int) -> float:
    """A number in [0, 1) that is a function of the given ones."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / math.ldexp(1.0, 64)
