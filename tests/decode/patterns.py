"""Random passes, exits and rollbacks of several sequences that two fused models must answer alike. Not a test:
``test_graphs.py`` and ``benchmarks/gpu_checks.py`` import it."""

import random
from collections.abc import Sequence
from typing import Any

import torch

from exitlm.decode.kernels.fused import FusedModel
from exitlm.decode.kernels.runner import Arrived, Runner
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.driver import MAX_ROLLBACK, Driver, advance_many, make_runner
from tests.decode.models import attach, random_ids, worst
from tests.model.families import tiny_model

KINDS = ("mlp", "block", "lens", "norm")


def long_model(
    family: str, dtype: torch.dtype = torch.float64, kinds: Sequence[str] = KINDS, **over: Any
) -> EarlyExitModel:
    """A model with room for several buckets of keys, and an exit of each of these kinds behind its first layers."""
    model = tiny_model(family, dtype, num_hidden_layers=5, max_position_embeddings=2048, **over)
    return attach(model, [ExitConfig(layer=e, kind=kind, gate=True) for e, kind in enumerate(kinds, 1)])


def difference(one: Driver, two: Driver) -> float:
    """The largest difference in held states, and in the keys and values of every position that segments hold."""
    assert one.filled == two.filled
    found = [worst(b, a) for a, b in zip(one.held, two.held, strict=True) if len(a)]
    for entry in range(len(one.runner.pool.stores)):
        a, b = one.stored(entry), two.stored(entry)
        if a.numel():
            found.append(worst(b, a))
    return max(found, default=0.0)


def newest_logits(runner: Runner, boundary: int, arrived: Arrived) -> torch.Tensor:
    """Logits ``[1, K]`` of the newest row at a boundary, or ``[M, V]`` of all rows at the end."""
    rows = range(len(arrived.hidden_MD))
    return (
        runner.final_logits(arrived, rows)
        if boundary == runner.segments
        else runner.exit_logits(boundary, arrived, rows[-1:])
    )


def walk(pair: tuple[FusedModel, FusedModel], start: int, steps: int, seed: int, sequences: int = 3) -> float:
    """Random passes, exits, caps and rollbacks of sequences that have ``start`` positions and more, the same on both
    sides; the largest difference in what comes out and in what is stored."""
    rng, found = random.Random(seed), [0.0]
    longest = start + 8 * sequences + 40 * steps
    runners = [make_runner(fused, 2 * sequences * (longest + 64)) for fused in pair]
    texts = [random_ids(longest, seed * 100 + i) for i in range(sequences)]
    sides = [[Driver(runner, scatter=i % 3, leave_windows=i % 2 == 1) for i in range(sequences)] for runner in runners]
    for i, text in enumerate(texts):
        one, two = (side[i].prefill(text[: start + 8 * i]) for side in sides)
        found.append(worst(two.hidden_MD, one.hidden_MD))
    for _ in range(steps):
        chosen = rng.sample(range(sequences), rng.randint(1, sequences))
        counts = {i: rng.choice((1, 1, 1, 2, 3, 5, 8, 13, 33) if len(chosen) == 1 else (1, 1, 2, 3, 9)) for i in chosen}
        boundary, cap = rng.choice((None, *range(1, runners[0].segments + 1))), rng.choice((None, None, 3))
        last = runners[0].segments if boundary is None else boundary
        outcomes = [
            advance_many([(side[i], texts[i][side[i].length :][: counts[i]]) for i in chosen], last) for side in sides
        ]
        for a, b in zip(*outcomes, strict=True):
            logits = (newest_logits(runner, last, each) for runner, each in zip(runners, (a, b), strict=True))
            found.append(worst(*reversed(list(logits))))
        for i in chosen:
            back = rng.choice((0, 0, 1, MAX_ROLLBACK))
            for side in sides:
                if cap is not None and side[i].pending > cap:
                    side[i].advance([])
                side[i].truncate(max(side[i].length - back, side[i].floor, 1))
            found.append(difference(sides[0][i], sides[1][i]))
    return max(found)
