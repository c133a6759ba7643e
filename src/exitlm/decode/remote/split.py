"""How the layers of a model are split over the stages of a pipeline: by what layers and heads take on each machine.

A pure function. The slowest stage limits how many tokens a second there can be, so that its time is the least possible;
of the splits that are as good, the one whose stages are most alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exitlm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of one layer, and of the final head, for one row, on the machine of a stage."""

    layer: float
    head: float


def cuts_of(speeds: Sequence[Speed], layers: int, exits: Mapping[int, float]) -> tuple[int, ...]:
    """The layers below each cut between stages, one less than there are ``speeds``. ``exits``: of each exit's layer,
    the share of the final head's time that its test takes.

    Raises:
        UserError: fewer layers than stages.
    """
    check(len(speeds), layers)

    def seconds(stage: int, start: int, stop: int) -> float:
        heads = sum(share for layer, share in exits.items() if start < layer <= stop and layer < layers)
        return (stop - start) * speeds[stage].layer + (heads + (stop == layers)) * speeds[stage].head

    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(len(speeds)):
        reached: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        left = len(speeds) - stage - 1
        for start, (most, squares, cuts) in best.items():
            for stop in range(start + 1, layers - left + 1) if left else (layers,):
                taken = seconds(stage, start, stop)
                found = (max(most, taken), squares + taken * taken, (*cuts, stop))
                if stop not in reached or found < reached[stop]:
                    reached[stop] = found
        best = reached
    return best[layers][2][:-1]


def given_cuts(counts: Sequence[int], stages: int, layers: int) -> tuple[int, ...]:
    """The cuts where the number of layers of each stage is given. Raises :class:`UserError` where they don't fit."""
    check(stages, layers)
    if len(counts) != stages or sum(counts) != layers:
        raise UserError(
            f"engine.layers_per_stage {list(counts)} does not share {layers} layers among {stages} stages; give "
            f"{stages} positive numbers with the sum {layers}, or leave it out"
        )
    return tuple(itertools.accumulate(counts))[:-1]


def check(stages: int, layers: int) -> None:
    """Refuse more stages than layers."""
    if stages > layers:
        raise UserError(f"{stages} stages can't share {layers} layers; use engine.pipeline from 1 to {layers}")
