"""A sequence's text never depends on its company: alone and among others, early and late, with blocks shared, memory
short and requests dropped, in float64. What is stored at any moment is what a full pass stores."""

import random
from dataclasses import dataclass

import pytest

from exitlm.decode.generation import Generation
from tests.decode.company import alone, draw_company, together
from tests.model.families import FAMILIES

FAST, SLOW = 6, 63  # companies for each of 8 families


def check_alike(mine: Generation, its: Generation) -> None:
    """The same text; where nothing is drafted, by the same layers; the same scores to rounding."""
    assert mine.token_ids == its.token_ids
    assert mine.text == its.text
    assert mine.finish_reason == its.finish_reason
    if mine.stats.mode != "lossless":
        assert mine.exit_layers == its.exit_layers
        for a, b in zip(mine.trace, its.trace, strict=True):
            assert a.confidence == pytest.approx(b.confidence, abs=1e-12)
    for a, b in zip(mine.trace, its.trace, strict=True):
        assert (a.logprob is None) == (b.logprob is None)
        assert a.logprob is None or a.logprob == pytest.approx(b.logprob, abs=1e-12)
        assert a.top_logprobs == pytest.approx(b.top_logprobs, abs=1e-12)
    assert len(mine.prompt_logprobs) == len(its.prompt_logprobs)
    for (a, tops), (b, other) in zip(mine.prompt_logprobs, its.prompt_logprobs, strict=True):
        assert a == pytest.approx(b, abs=1e-12)
        assert tops == pytest.approx(other, abs=1e-12)


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


def run(family: str, count: int, seen: Seen) -> None:
    for number in range(count):
        rng = random.Random(f"{family} company {number}")
        company = draw_company(rng, family)
        expected = alone(company)
        found, engine = together(company, rng, check_every=rng.choice([0, 1, 3]))
        for index, generation in found.items():
            try:
                check_alike(generation, expected[index])
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


@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_depends_on_its_company(family: str) -> None:
    seen = Seen()
    run(family, FAST, seen)
    assert seen.compared > 2 * FAST


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_depends_on_its_company_in_many_cases(family: str) -> None:
    seen = Seen()
    run(family, SLOW, seen)
    assert seen.compared > 2 * SLOW
    assert min(seen.stopped, seen.pending) > SLOW / 10
    assert min(seen.shared, seen.drafted, seen.early) > SLOW / 2
    assert seen.preempted > SLOW / 10 or family == "mistral"  # windows of 8 positions leave room for all
