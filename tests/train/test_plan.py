"""What a step does, as plain data: which rows go where, what a token counts, which layers rest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.errors import UserError
from exitlm.model.exits import ExitConfig
from exitlm.parallel.mesh import Layout
from exitlm.parallel.pipeline.split import Split
from exitlm.parallel.pipeline.stage import FINAL
from exitlm.train.plan import Geometry, dropped_layers, geometry, plan_step
from exitlm.train.run import TRAINING, RunConfig

EXITS = [ExitConfig(layer=2, kind="norm"), ExitConfig(layer=4, kind="mlp"), ExitConfig(layer=6, kind="norm")]
FOUR = Split(bounds=(0, 2, 4, 6, 8), owners={2: 1, 4: 1, 6: 3})


def config_of(*overrides: str) -> RunConfig:
    return TRAINING.with_overrides(
        ["exits.layers=[2,4,6]", "objective.weight=[0.5,0.25,1]", "objective.weight_init=[0.5,0.25,1]", *overrides]
    )


def four(*overrides: str, data: int = 1, count: int = 4) -> tuple[RunConfig, Geometry]:
    """Settings of four stages, and how their steps are cut."""
    sizes = [f"parallel.data={data}", "parallel.pipeline=4", f"train.global_batch={2 * data * count}"]
    config = config_of(*sizes, *overrides)
    layout = Layout(data=data, pipeline=4, schedule=config.parallel.schedule)
    return config, geometry(config, layout, FOUR, frozen=False, teacher=False)


@dataclass
class Counts:
    """A stream whose row p has ``p % 7`` labels."""

    def valid(self, rows: Sequence[int]) -> int:
        return sum(row % 7 for row in rows)


STREAM: Any = Counts()


# ---- rows


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from(["1f1b", "filled", "gpipe"]), st.integers(0, 5))
def test_the_ranks_share_the_rows_of_a_step(data: int, rounds: int, schedule: str, step: int) -> None:
    """Each row on one rank, in slabs that all ranks cut alike."""
    _, cut = four(f"parallel.schedule={schedule}", data=data, count=4 * rounds)
    mine = [cut.mine(step, rank) for rank in range(data)]
    assert sorted(row for rows in mine for row in rows) == list(range(step * cut.rows, (step + 1) * cut.rows))
    for m in range(cut.microbatches):
        slab = [row for rows in mine for row in rows[m * cut.size : (m + 1) * cut.size]]
        assert slab == list(cut.slab(step, m))
    assert cut.microbatches == 4 * rounds + (3 if schedule == "filled" else 0)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("train.global_batch=6", "train.microbatch=4"), "multiple of train.microbatch x parallel.data .* use 4"),
        (("train.global_batch=4", "train.microbatch=2"), "fewer than its 4 pipeline ranks; use a .* at least 8"),
    ],
)
def test_too_few_microbatches_are_refused(overrides: tuple[str, ...], says: str) -> None:
    """One forward, one backward needs as many as there are ranks."""
    config = config_of("parallel.pipeline=4", *overrides)
    with pytest.raises(UserError, match=says):
        geometry(config, Layout(pipeline=4), FOUR, frozen=False, teacher=False)
    if "fewer" in says:
        free = config.with_overrides(["parallel.schedule=gpipe"])
        assert geometry(free, Layout(pipeline=4, schedule="gpipe"), FOUR, frozen=False, teacher=False).microbatches == 2
        assert geometry(config, Layout(pipeline=4), FOUR, frozen=True, teacher=False).microbatches == 2


def test_filled_bubbles_and_a_teacher_are_refused() -> None:
    config = config_of("parallel.pipeline=4", "parallel.schedule=filled", "train.global_batch=8")
    with pytest.raises(UserError, match="never reach the final head"):
        geometry(config, Layout(pipeline=4, schedule="filled"), FOUR, frozen=False, teacher=True)


def test_a_frozen_model_has_schedules_of_its_own() -> None:
    config, _ = four("parallel.schedule=zbv")
    layout = Layout(pipeline=4)
    assert geometry(config, layout, FOUR, frozen=True, teacher=False).schedule.name == "tuning"
    assert geometry(config, layout, FOUR, frozen=True, teacher=True).schedule.name == "1f1b"


def test_a_step_without_labels_is_refused() -> None:
    @dataclass
    class Empty:
        def valid(self, rows: Sequence[int]) -> int:
            return 0

    config, cut = four()
    stream: Any = Empty()
    with pytest.raises(UserError, match="step 3 has no token"):
        plan_step(config, EXITS, FOUR, cut, stream, 2)


# ---- what counts


def test_every_token_of_a_step_counts_the_same() -> None:
    config, cut = four(data=2)
    step = plan_step(config, EXITS, FOUR, cut, STREAM, 3)
    tokens = STREAM.valid(range(3 * 16, 4 * 16))
    assert step.tokens == tokens
    assert step.plan.shares == dict.fromkeys((2, 4, 6, FINAL), 1.0 / tokens)
    assert step.plan.weights == {2: 0.5, 4: 0.25, 6: 1.0, FINAL: 1.0}
    assert (step.divisors, step.plan.bottom, step.plan.dropped) == ({}, {}, {})


def test_filled_bubbles_count_by_the_rule() -> None:
    """Two full rounds; then the bottom ones back to stages 2 and 3, and a top one up to stage 1. One up to stage 0
    would meet no exit."""
    config, cut = four("parallel.schedule=filled", count=8)
    tokens = {m: STREAM.valid(cut.slab(0, m)) for m in range(11)}
    assert [cut.schedule.spans[m] for m in range(8, 11)] == [(2, 3), (3, 3), (0, 1)]
    full = sum(tokens[m] for m in range(8))
    step = plan_step(config, EXITS, FOUR, cut, STREAM, 0)
    near, far = 1.0 / (full + tokens[10]), 1.0 / full  # one top microbatch reaches stage 1, none stage 3
    assert step.plan.shares == {2: near, 4: near, 6: far, FINAL: far}
    assert (step.plan.bottom, step.plan.bottom_share) == ({8: 2, 9: 3}, 1.0 / full)
    assert [step.plan.share(4, m) for m in (0, 8, 10)] == [near, far, near]
    both = 1.0 + (tokens[8] + tokens[9]) / full
    assert step.divisors == {0: 1.0, 1: 1.0, 2: 1.0 + tokens[8] / full, 3: both}
    assert step.tokens == full


def test_weights_rise_and_exits_take_turns() -> None:
    rising, cut = four("objective.weight_init=[0,0,0]", "objective.warmup_steps=4")
    found = [plan_step(rising, EXITS, FOUR, cut, STREAM, step).plan.weights[2] for step in range(6)]
    assert found == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    turning, cut = four("objective.rotate_exits=2")
    seen = [set(plan_step(turning, EXITS, FOUR, cut, STREAM, step).plan.weights) for step in range(4)]
    assert seen == [{2, 6, FINAL}, {4, FINAL}] * 2
    frozen = [set(plan_step(turning, EXITS, FOUR, cut, STREAM, step, frozen=True).plan.weights) for step in range(2)]
    assert frozen == [{2, 6}, {4}]


def test_the_scale_is_for_all() -> None:
    config, cut = four()
    assert plan_step(config, EXITS, FOUR, cut, STREAM, 0, scale=64.0).plan.scale == 64.0


# ---- layers that rest


def often(layers: Sequence[frozenset[int]]) -> list[float]:
    """How often each of eight layers rests."""
    return [sum(layer in gone for gone in layers) / len(layers) for layer in range(8)]


def drawn(step: int) -> list[frozenset[int]]:
    """What rests in a step of runs with 2000 seeds."""
    config = config_of("objective.layer_dropout=0.6", "train.steps=101")
    seeded = (config.with_overrides([f"train.seed={seed}"]) for seed in range(2000))
    return [dropped_layers(config, EXITS, FOUR, step, 1)[0] for config in seeded]


def test_layers_rest_as_often_as_layerskip_says() -> None:
    """Rarer below and before; never in the first step; a layer that an mlp exit looks into stays."""
    expected = [0.6 * (2.0 ** (layer / 7) - 1.0) for layer in range(8)]
    expected[3] = 0.0
    assert often(drawn(100)) == pytest.approx(expected, abs=0.04)
    assert often(drawn(50)) == pytest.approx([chance * (2.0**0.5 - 1.0) for chance in expected], abs=0.04)
    assert not any(drawn(0))
    assert dropped_layers(config_of(), EXITS, FOUR, 100, 4) == {}


def test_which_layers_rest_depends_on_seed_and_step_alone() -> None:
    """So that all processes agree, whatever their layout, and a run that goes on draws what it would have drawn."""
    config = config_of("objective.layer_dropout=1.0", "train.steps=9")
    once = dropped_layers(config, EXITS, FOUR, 8, 64)
    assert once == dropped_layers(config, EXITS, FOUR, 8, 64)
    assert len(set(once.values())) == 1
    assert set(dropped_layers(config, EXITS, FOUR, 8, 8).values()) == set(once.values())
    assert len({dropped_layers(config, EXITS, FOUR, step, 1)[0] for step in range(9)}) > 2
    assert len({dropped_layers(config.with_overrides([f"train.seed={n}"]), EXITS, FOUR, 8, 1)[0] for n in range(9)}) > 2
    other = Split(bounds=(0, 8), owners={2: 0, 4: 0, 6: 0})
    assert once == dropped_layers(config, EXITS, other, 8, 64)
