"""Random passes, exits and rollbacks that two fused models must answer alike. Not a test: ``test_graphs.py`` and
``benchmarks/gpu_checks.py`` import it."""

import random
from typing import Any

import torch

from exitlm.decode.fused import FusedModel
from exitlm.decode.step import SequenceState
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.models import attach, leave_at, random_ids, worst
from tests.model.families import tiny_model

KINDS = ("mlp", "block", "lens", "norm")


def long_model(family: str, dtype: torch.dtype = torch.float64, **over: Any) -> EarlyExitModel:
    """A model with room for several buckets of keys, and every kind of exit."""
    model = tiny_model(family, dtype, num_hidden_layers=5, max_position_embeddings=2048, **over)
    configs = [ExitConfig(layer=e, kind=kind, gate=True) for e, kind in enumerate(KINDS, 1)]
    return attach(model, configs)


def difference(one: SequenceState, two: SequenceState) -> float:
    """The largest difference in held states, and in the keys and values of every position that segments hold."""
    assert one.depths.filled == two.depths.filled
    found = [0.0]
    for s, (first, end) in enumerate(one.segments):
        filled = one.depths.filled[s]
        for layer in range(first, end):
            stored = (state.cache.layers[layer][:, :, :filled] for state in (two, one))
            found.append(worst(*stored))
        if s + 1 < len(one.segments) and (count := filled - one.depths.filled[s + 1]):
            held = (state.depths.held[s][:count] for state in (two, one))
            found.append(worst(*held))
    return max(found)


def walk(pair: tuple[FusedModel, FusedModel], active: list[int], start: int, steps: int, seed: int) -> float:
    """Random passes, exits, caps and rollbacks from ``start`` positions on, the same on both sides; the largest
    difference in what comes out and in what is stored."""
    rng, found = random.Random(seed), [0.0]
    one, two = (SequenceState(fused, active, fused.new_cache(), start + 40 * steps + 64) for fused in pair)
    prompt = random_ids(start, seed)
    found.append(worst(two.prefill(prompt), one.prefill(prompt)))
    for _ in range(steps):
        tokens = random_ids(rng.choice((1, 1, 1, 2, 3, 5, 8, 13, 33)), rng.randrange(1000))
        leave, cap, back = rng.choice((None, *active)), rng.choice((None, None, 3)), rng.choice((0, 0, 1, 4))
        a, b = (state.advance(tokens, leave_at(leave), cap) for state in (one, two))
        if a.fired is not None or b.fired is not None:
            assert a.fired is not None
            assert b.fired is not None
            found.append(worst(b.fired.logits_K, a.fired.logits_K))
        if a.final_RD is not None or b.final_RD is not None:
            assert a.final_RD is not None
            assert b.final_RD is not None
            found.append(worst(b.final_RD, a.final_RD))
        for state in (one, two):
            state.truncate(state.length - min(back, state.length - 1))
        found.append(difference(one, two))
    return max(found)
