"""Texts by a pipeline of stages are those of one process: any split, any company, any mode, whatever is dropped."""

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from exitlm.decode.generation import Generation
from exitlm.decode.remote.engine import PipelinedEngine
from exitlm.model import EarlyExitModel
from tests.decode.arithmetic import FLOAT64, NATIVE, Arithmetic, param
from tests.decode.company import Company, alone, draw_company, together
from tests.decode.remote.threads import pipelined
from tests.model.families import FAMILIES

FAST, SLOW = 13, 63


def draw_stages(rng: random.Random, layers: int) -> list[int]:
    """How many layers each of two to four stages has."""
    cuts = sorted(rng.sample(range(1, layers), rng.randint(1, 3)))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, layers], strict=True)]


class Stages(Arithmetic):
    """An arithmetic whose engines are pipelines of ``counts`` layers."""

    counts: list[int]

    def engine(self, model: EarlyExitModel, **given: Any) -> PipelinedEngine:
        """A pipeline instead of an engine of one process."""
        options = {key: value for key, value in given.items() if key in ("options", "tokenizer", "costs")}
        engine = pipelined(model, self.counts, quant=self.quant, **options)
        assert engine.fused.exact
        return engine


def stages(arithmetic: Arithmetic, counts: list[int]) -> Stages:
    """The same arithmetic in several processes."""
    found = Stages(**{name: getattr(arithmetic, name) for name in arithmetic.__dataclass_fields__})
    object.__setattr__(found, "counts", counts)
    return found


def check(found: Generation, expected: Generation, arithmetic: Arithmetic) -> None:
    """One text of a pipeline and of one process."""
    assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
    assert found.finish_reason == expected.finish_reason
    mine, theirs = found.trace, expected.trace
    close = pytest.approx([token.logprob for token in theirs if token.logprob is not None], rel=1e-9, abs=1e-12)
    assert [token.logprob for token in mine if token.logprob is not None] == close
    for (one, some), (other, others) in zip(found.prompt_logprobs, expected.prompt_logprobs, strict=True):
        assert (one, some) == (pytest.approx(other, rel=1e-9), pytest.approx(others, rel=1e-9))
    assert [token.stage for token in theirs] == [None] * len(theirs)
    if found.stats.mode != "lossless":
        assert found.exit_layers == expected.exit_layers
        for one, other in zip(mine, theirs, strict=True):
            assert one.confidence == pytest.approx(other.confidence, rel=1e-9, abs=1e-12, nan_ok=True)


def compare(company: Company, rng: random.Random) -> None:
    """What a company gets from a pipeline is what each of it gets alone from one process."""
    expected = alone(company)
    counts = draw_stages(rng, company.model.config.num_hidden_layers)
    several = replace(company, arithmetic=stages(company.arithmetic, counts))
    found, engine = together(several, rng)
    assert isinstance(engine, PipelinedEngine)
    try:
        ends = list(itertools.accumulate(counts))
        for index, generation in found.items():
            stages_of = [1 + sum(end < layer for end in ends) for layer in generation.exit_layers]
            assert [token.stage for token in generation.trace] == stages_of
            check(generation, expected[index], company.arithmetic)
        assert engine.memory.hidden.used == 0
        assert all(allocator.used == 0 for allocator in engine.memory.pool.allocators)
    finally:
        engine.close()


def cases(count: int, slow: bool = False) -> list[Any]:
    """(arithmetic, family, count): every family in float64 and in one of the native arithmetics, or in each."""
    native = [(each, family) for i, family in enumerate(FAMILIES) for each in (NATIVE if slow else [NATIVE[i % 3]])]
    both = [*((FLOAT64, family) for family in FAMILIES), *native]
    return [param(arithmetic, family, count, slow=slow) for arithmetic, family in both]


@pytest.mark.parametrize(("arithmetic", "family", "count"), cases(FAST) + cases(SLOW, slow=True))
def test_a_company_gets_from_a_pipeline_what_each_gets_alone(arithmetic: Arithmetic, family: str, count: int) -> None:
    for seed in range(count):
        rng = random.Random(f"stages {family} {seed}")
        compare(draw_company(rng, family, arithmetic=arithmetic), rng)
