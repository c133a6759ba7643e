"""Pipelined decoding by simulation: no trace hangs, every token comes, speed and use of stages are as calculated."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from exitlm.decode.pricing.costs import Costs
from exitlm.decode.pricing.scheduler import Limits, Pass
from exitlm.decode.pricing.stage_simulation import Pipeline, Simulated, expected_depth, pipeline, steady
from exitlm.decode.pricing.stages import StageView, next_stage_pass
from tests.decode.simulation import CPU, DEAR, GPU, cost_table

TABLES = {"cpu": CPU, "gpu": GPU, "dear": DEAR}
MESSAGE = 0.012  # 60 us, where a stage takes 5 ms


def stages_of(times: dict[int, float], stages: int, layers: int = 1) -> Costs:
    """A table by which a pass of one row through a stage takes 1."""
    return cost_table({rows: time * stages for rows, time in times.items()}, stages * layers)


def random_trace(seed: int) -> tuple[Pipeline, list[Simulated]]:
    """Any pipeline, exits, sequences and limits."""
    rng = random.Random(seed)
    stages, per = rng.randint(2, 8), rng.randint(1, 3)
    layers = stages * per
    exits = sorted(rng.sample(range(1, layers), rng.randint(0, min(3, layers - 1))))
    ones = [
        Simulated(
            key=key, mode=rng.choice(("full", "threshold", "lossless")), length=rng.randint(1, 20),
            firing={e: rng.choice((0.0, 0.2, 0.7, 1.0)) for e in exits}, right=dict.fromkeys(exits, rng.random()),
            prompt=rng.choice((0, 1, 5, 40)), arrival=rng.choice((0.0, 3.0 * rng.random())),
            max_pending=rng.choice((1, 2, 64)), max_draft=rng.choice((0, 1, 15)),
        )
        for key in range(rng.randint(1, 12))
    ]  # fmt: skip
    found = Pipeline(
        cuts=sorted({0, layers, *rng.sample(range(1, layers), stages - 1)}),
        costs=stages_of(rng.choice(list(TABLES.values())), stages, per),
        limits=Limits(max_rows=rng.choice((1, 3, 8, 512)), prefill_chunk=rng.choice((1, 7, 256))),
        message=rng.choice((0.0, MESSAGE, 0.2, 3.0)), jitter=rng.choice((0.0, 0.5)), queue=rng.choice((1, 2)),
        gather=rng.choice((0.0, 0.5)), seed=seed, keep=True,
    )  # fmt: skip
    return found, ones


def check_trace(seed: int) -> None:
    """Every token comes once, in order; the simulator itself asserts that no row overtakes or misses a test."""
    found, ones = random_trace(seed)
    found.run(ones)
    for one in ones:
        assert one.length <= len(one.emitted) <= one.length + one.max_draft
        assert one.emitted == sorted(one.emitted)
    for stage in range(found.stages):
        works = [work for work in found.work if work.stage == stage]
        assert all(before.end <= after.begin + 1e-9 for before, after in itertools.pairwise(works))


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_no_trace_hangs(start: int) -> None:
    for seed in range(start, start + 50):
        check_trace(seed)


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("start", range(1000, 3000, 50))  # one second each, so that the limit finds what hangs
def test_no_trace_hangs_in_many(start: int) -> None:
    for seed in range(start, start + 50):
        check_trace(seed)


def test_rows_that_are_never_run_are_a_deadlock() -> None:
    """What the traces would show of a policy that leaves rows where they are."""

    def lazy(view: StageView, limits: Limits) -> Pass | None:
        return None if view.first else next_stage_pass(view, limits)

    found, ones = pipeline(2, stages_of(CPU, 2), policy=lazy), [Simulated(key=0, mode="full", length=3)]
    with pytest.raises(AssertionError, match="no stage runs"):
        found.run(ones)


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("firing", [0.3, 0.5, 0.7, 0.9])
def test_one_sequence_is_as_fast_as_its_exits_allow(stages: int, firing: float) -> None:
    costs = stages_of(CPU, stages)
    run = steady(pipeline(stages, costs, message=MESSAGE), 1, "threshold", {1: firing}, tokens=2000)
    bound = 1.0 / expected_depth({1: firing}, stages)
    assert bound == pytest.approx(1.0 / (1 / stages + (1 - 1 / stages) * (1 - firing)))
    assert 0.9 * bound <= run.speed(costs) <= 1.1 * bound


def test_an_exit_within_the_first_stage_beats_one_token_for_each_of_its_passes() -> None:
    """The first stage computes several pending rows at once, so the bound is the exit's depth, not the stages."""
    costs = stages_of(GPU, 2, 4)
    run = steady(pipeline(2, costs, layers=8), 1, "threshold", {1: 0.95}, tokens=4000)
    assert run.speed(costs) > 4.0


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("sequences", [8, 16, 64])
def test_many_sequences_keep_all_stages_busy(table: str, sequences: int) -> None:
    costs = stages_of(TABLES[table], 4)
    for mode, firing in (("full", {}), ("threshold", {1: 0.5})):
        run = steady(pipeline(4, costs, message=MESSAGE), sequences, mode, firing, tokens=2000)
        share = sum(run.busy) / 4
        assert share >= 0.85 if firing else share >= 0.9
        if mode == "full":  # groups instead of one batch: T(B) / T(B / P)
            assert run.speed(costs) >= 0.9 * costs.full(sequences) / costs.full(sequences // 4)


@pytest.mark.parametrize("table", ["cpu", "gpu"])
@pytest.mark.parametrize("acceptance", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("sequences", [1, 4, 8])
def test_drafts_never_lose(table: str, acceptance: float, sequences: int) -> None:
    costs = stages_of(TABLES[table], 4)
    full = steady(pipeline(4, costs, message=MESSAGE), sequences, "full", {}, tokens=1000)
    run = steady(pipeline(4, costs, message=MESSAGE), sequences, "lossless", {1: 0.8}, {1: acceptance}, tokens=1000)
    assert run.rate >= full.rate * (0.98 if acceptance < 0.5 else 1.05)


def test_drafts_wait_for_certain_tokens() -> None:
    """A draft that is started shortly before the certain token comes delays it: what the rule of worth gains."""

    def always(view: StageView, limits: Limits) -> Pass | None:
        return next_stage_pass(replace(view, coming=float("inf")), limits)

    costs = stages_of(GPU, 4)
    more: dict[str, Any] = dict(mode="lossless", firing={1: 1.0}, right={1: 0.5}, tokens=1500)
    rates = [steady(pipeline(4, costs, message=MESSAGE, policy=p), 4, **more).rate for p in (next_stage_pass, always)]
    assert rates[0] > 1.1 * rates[1]


def test_waiting_for_others_pays_where_rows_are_free() -> None:
    costs = stages_of(GPU, 4)
    rates = [
        steady(pipeline(4, costs, jitter=0.1, gather=share), 32, "threshold", {1: 0.3}, tokens=2000).rate
        for share in (0.5, 0.0)
    ]
    assert rates[0] > 1.1 * rates[1]


def test_a_run_is_reproducible() -> None:
    runs = [random_trace(7) for _ in range(2)]
    for found, ones in runs:
        found.run(ones)
    assert runs[0][0].work == runs[1][0].work
