"""How layers are split over stages: the slowest stage is as quick as can be, also where machines differ."""

import itertools
import random

import pytest

from exitlm.decode.remote.split import Speed, cuts_of, given_cuts
from exitlm.errors import UserError


def slowest(cuts: tuple[int, ...], speeds: list[Speed], layers: int, exits: dict[int, float]) -> float:
    """Seconds of the slowest stage, written out."""
    ends = (0, *cuts, layers)
    found = []
    for stage, speed in enumerate(speeds):
        start, stop = ends[stage], ends[stage + 1]
        heads = sum(share for layer, share in exits.items() if start < layer <= stop and layer != layers)
        found.append((stop - start) * speed.layer + (heads + (stop == layers)) * speed.head)
    return max(found)


@pytest.mark.parametrize("seed", range(60))
def test_no_other_split_has_a_quicker_slowest_stage(seed: int) -> None:
    rng = random.Random(seed)
    layers, stages = rng.randint(4, 9), rng.randint(1, 4)
    speeds = [Speed(layer=rng.choice([1.0, 1.0, 2.5, 0.3]), head=rng.choice([0.5, 4.0])) for _ in range(stages)]
    exits = {layer: rng.choice([1.0, 0.1]) for layer in rng.sample(range(1, layers + 1), rng.randint(0, 3))}
    cuts = cuts_of(speeds, layers, exits)
    assert len(cuts) == stages - 1
    assert list(cuts) == sorted(set(cuts))
    every = itertools.combinations(range(1, layers), stages - 1)
    best = min(slowest(other, speeds, layers, exits) for other in every)
    assert slowest(cuts, speeds, layers, exits) == pytest.approx(best)


def test_a_slow_machine_gets_fewer_layers() -> None:
    assert cuts_of([Speed(layer=1.0, head=0.0), Speed(layer=3.0, head=0.0)], 12, {}) == (9,)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="5 stages can't share 4 layers"):
        cuts_of([Speed(layer=1.0, head=1.0)] * 5, 4, {})
    with pytest.raises(UserError, match=r"\[2, 3\] does not share 4 layers among 2 stages"):
        given_cuts([2, 3], 2, 4)
    assert given_cuts([1, 3], 2, 4) == (1,)
