"""A sequence's text never depends on its company: alone and among others, early and late, with blocks shared, memory
short and requests dropped, in float64, and by the native kernels to the last bit of every confidence and score. What is
stored at any moment is what a full pass stores."""

import random
from dataclasses import dataclass

import pytest

from exitlm.decode.generation import Generation
from tests.decode.arithmetic import FLOAT64, Arithmetic, params, slow_params
from tests.decode.company import alone, draw_company, together

FAST, SLOW = 6, 63  # companies for each of 8 families
FAST_NATIVE = 5


def check_alike(mine: Generation, its: Generation, tolerance: float) -> None:
    """The same text; where nothing is drafted, by the same layers; the same scores within ``tolerance``."""
    assert mine.token_ids == its.token_ids
    assert mine.text == its.text
    assert mine.finish_reason == its.finish_reason
    if mine.stats.mode != "lossless":
        assert mine.exit_layers == its.exit_layers
        for a, b in zip(mine.trace, its.trace, strict=True):
            assert a.confidence == pytest.approx(b.confidence, abs=tolerance)
    for a, b in zip(mine.trace, its.trace, strict=True):
        assert (a.logprob is None) == (b.logprob is None)
        assert a.logprob is None or a.logprob == pytest.approx(b.logprob, abs=tolerance)
        assert a.top_logprobs == pytest.approx(b.top_logprobs, abs=tolerance)
    assert len(mine.prompt_logprobs) == len(its.prompt_logprobs)
    for (a, tops), (b, other) in zip(mine.prompt_logprobs, its.prompt_logprobs, strict=True):
        assert a == pytest.approx(b, abs=tolerance)
        assert tops == pytest.approx(other, abs=tolerance)


@dataclass
class Seen:
    """What happened in all companies of a family: the test can fail only where these things do."""

    compared: int = 0
    preempted: int = 0
    shared: int = 0
    pending: int = 0
    drafted: int = 0
    stopped: int = 0
    early: int = 0


def run(family: str, count: int, seen: Seen, arithmetic: Arithmetic = FLOAT64) -> None:
    for number in range(count):
        rng = random.Random(f"{family} company {number}")
        company = draw_company(rng, family, arithmetic=arithmetic)
        expected = alone(company)
        found, engine = together(company, rng, check_every=rng.choice([0, 1, 3]))
        for index, generation in found.items():
            try:
                check_alike(generation, expected[index], arithmetic.tolerance)
            except AssertionError as error:
                raise AssertionError(f"{family} {number}, request {index}: {company.requests[index]}") from error
            seen.compared += 1
            seen.preempted += generation.stats.preemptions
            seen.shared += generation.stats.shared_tokens
            seen.pending += generation.stats.max_pending > 1
            seen.drafted += generation.stats.drafted
            seen.stopped += generation.finish_reason == "stop"
            seen.early += min(generation.exit_layers, default=4) < 4
        assert engine.memory.hidden.used == 0
        for allocator in engine.memory.pool.allocators:
            allocator.check()
            assert allocator.used == 0


@pytest.mark.parametrize(("arithmetic", "family", "count"), params(FAST, FAST_NATIVE))
def test_no_text_depends_on_its_company(arithmetic: Arithmetic, family: str, count: int) -> None:
    seen = Seen()
    run(family, count, seen, arithmetic)
    assert seen.compared > 2 * count


@pytest.mark.parametrize(("arithmetic", "family", "count"), slow_params(SLOW))
def test_no_text_depends_on_its_company_in_many_cases(arithmetic: Arithmetic, family: str, count: int) -> None:
    seen = Seen()
    run(family, count, seen, arithmetic)
    assert seen.compared > 2 * count
    assert min(seen.stopped, seen.pending) > count / 10
    assert min(seen.shared, seen.drafted, seen.early) > count / 2
    assert seen.preempted > count / 10 or family == "mistral"  # windows of 8 positions leave room for all
