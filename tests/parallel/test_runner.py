"""Every schedule, on four processes and with random exits: the gradient of one process, to 1e-12 in float64.

The cases are drawn by seeds; ``pytest -m slow`` runs many more of them.
"""

import dataclasses
from typing import Any

import pytest
import torch

from exitlm.parallel.mesh import Layout
from exitlm.parallel.pipeline.runner import TorchRunner
from exitlm.parallel.pipeline.schedule import fill_room
from tests.parallel.cases import (
    SCHEDULES,
    WAYS,
    Case,
    Meshes,
    drawn,
    exits_of,
    llama,
    run_cases,
    trainer_of,
    truth,
)
from tests.parallel.launch import launch

LAYOUTS = (Layout(pipeline=4), Layout(pipeline=2, data=2), Layout(pipeline=2, tensor=2))
SHARED = exits_of("2 norm shared", "3 lens own", "4 mlp exits", "5 block shared", "8 norm exits")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gradient_is_that_of_one_process(schedule: str) -> None:
    """Eager, checkpointed and deferred exits, tied matrices and own ones."""
    run_cases([drawn(seed, schedule, way, tied=seed == 0, layout=LAYOUTS[0]) for way in WAYS for seed in (0, 1)])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["PP4", "PP2 DP2", "PP2 TP2"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gradient_of_many_random_models_is_that_of_one_process(schedule: str, layout: Layout) -> None:
    count = 12 if layout.tensor == 1 else 4
    run_cases(
        [
            drawn(seed, schedule, way, tied=tied, layout=layout, rounds=2)
            for seed in range(2, 2 + count)
            for way in WAYS
            for tied in (True, False)
        ]
    )


@pytest.mark.parametrize(("place", "output"), [("next", "shared"), ("end", "exits")])
def test_heads_on_one_stage_may_share_a_matrix_where_the_backward_is_split(place: str, output: str) -> None:
    """With layers between them: torch would go through these a second time."""
    layout = Layout(pipeline=2, schedule="zbv", stages_per_rank=2)
    run_cases(
        [
            Case(
                layout=dataclasses.replace(layout, schedule=schedule),
                exits=exits_of(f"3 norm {output}", f"4 block {output}", f"6 lens {output}"),
                model=llama(6, tie_word_embeddings=output == "shared"),
                settings=(
                    "parallel.layers_per_stage=[1,1,3,1]",
                    f"objective.exit_forward={way}",
                    f"exits.place={place}",
                ),
                microbatches=4 if schedule == "zbv" else 2,
                size=1,
            )
            for schedule in ("zero_bubble", "zbv")
            for way in WAYS
        ]
    )


def test_a_gate_that_nothing_trains_rests_where_the_backward_is_split() -> None:
    layout = Layout(pipeline=2, schedule="zbv", stages_per_rank=2)
    gated = (dataclasses.replace(SHARED[0], gate=True), SHARED[1])
    run_cases(
        [
            Case(layout=layout, exits=gated, model=llama(4), settings=("objective.gate=0.0", f"objective.distill={d}"))
            for d in (0.0, 0.5)
        ]
    )


# ---- bubble filling


def filling(pipeline: int, warmup: int, cooldown: int, alike: bool) -> Case:
    """Tied and own matrices around bubbles that are filled, with weights that differ."""
    return Case(
        layout=Layout(pipeline=pipeline, schedule="filled"),
        exits=SHARED if pipeline < 8 else (*SHARED, *exits_of("9 mlp exits")),
        model=llama(8 if pipeline < 8 else 10, tie_word_embeddings=True),
        microbatches=pipeline,
        size=1,
        length=4,
        alike=alike,
        seed=10 * warmup + cooldown,
        settings=(f"parallel.fill_warmup={warmup}", f"parallel.fill_cooldown={cooldown}"),
    )


@pytest.mark.parametrize(
    ("pipeline", "fills"),
    [
        (2, [(0, 0)]),
        (4, [(a, b) for a in range(3) for b in range(3)]),
        (8, [(4, 4), (0, 3)]),
        pytest.param(8, [(a, b) for a in range(5) for b in range(5)], marks=pytest.mark.slow),
    ],
)
def test_filled_bubbles_give_the_weighted_sum(pipeline: int, fills: list[tuple[int, int]]) -> None:
    """Of different microbatches by the rule, and of the same ones; that this is right there, the next test shows."""
    assert max(max(fill) for fill in fills) == fill_room(pipeline, 2.0)
    cases = [filling(pipeline, *fill, alike=False) for fill in fills]
    run_cases([*cases, filling(pipeline, *max(fills), alike=True)])


@pytest.mark.parametrize("pipeline", [2, 4, 8])
def test_the_rule_gives_the_gradient_of_one_sample_where_all_microbatches_are_that_sample(pipeline: int) -> None:
    """Of every stage: no exit counts more, and none less, for the microbatches that fill bubbles."""
    room = fill_room(pipeline, 2.0)
    for fill in {(room, room), (room, 0), (0, room), (room // 2, room)}:
        case = filling(pipeline, *fill, alike=True)
        single = dataclasses.replace(case, layout=Layout(), microbatches=1)
        one, many = truth(single).gradients, truth(case).gradients
        assert one.keys() == many.keys()
        for name, gradient in one.items():
            torch.testing.assert_close(many[name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zbv"])
def test_the_number_of_microbatches_does_not_scale_gradients(schedule: str) -> None:
    layout = Layout(pipeline=2, schedule=schedule, stages_per_rank=1 + (schedule == "zbv"))
    for many in (4, 8):
        case = Case(layout=layout, exits=SHARED, microbatches=many, size=1, alike=True)
        one = truth(dataclasses.replace(case, layout=Layout(), microbatches=1)).gradients
        for name, gradient in truth(case).gradients.items():
            torch.testing.assert_close(gradient, one[name], rtol=0, atol=1e-12)
        run_cases([case])


# ---- what torch.distributed.pipelining would do by itself (training.md, section 8)


def watched(case: Case) -> dict[str, Any]:
    """What the stages of this process see and give in the first step."""
    trainer = trainer_of(case, Meshes().of(case.layout))
    seen: list[tuple[int, int, int]] = []
    outputs: list[Any] = []
    for stage in trainer.stages:

        def forward(*inputs: Any, plain: Any = stage.forward, index: int = stage.index, **options: Any) -> Any:
            seen.append((index, int(options["microbatch"].reshape(-1)[0]), int(options["labels"].sum())))
            out = plain(*inputs, **options)
            outputs.extend(out if isinstance(out, tuple) else (out,))
            return out

        stage.forward = forward
    assert isinstance(trainer.runner, TorchRunner)
    merged: list[Any] = []
    trainer.runner.schedule._merge_outputs = merged.append
    trainer.step()
    return {"calls": seen, "views": sum(out._is_view() for out in outputs), "merged": len(merged)}


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    """What both processes of a pipeline of four stages saw."""
    layout = Layout(pipeline=2, schedule="zbv", stages_per_rank=2)
    return launch(2, watched, Case(layout=layout, exits=exits_of("2 norm shared", "4 lens own"), model=llama(6)))


def test_no_stage_runs_before_the_first_step(seen: list[dict[str, Any]]) -> None:
    """Shapes are told, not found out by a forward and backward of every stage."""
    for rank in seen:
        assert len({(stage, number) for stage, number, _ in rank["calls"]}) == len(rank["calls"]) == 8


def test_every_stage_reads_the_labels_of_its_microbatch(seen: list[dict[str, Any]]) -> None:
    labels = [{(number, total) for _, number, total in rank["calls"]} for rank in seen]
    assert labels[0] == labels[1]
    assert [number for number, _ in sorted(labels[0])] == [0, 1, 2, 3]


def test_no_output_of_a_stage_is_a_view(seen: list[dict[str, Any]]) -> None:
    """It could not be detached where the backward is split."""
    assert [rank["views"] for rank in seen] == [0, 0]


def test_outputs_of_microbatches_are_not_put_together(seen: list[dict[str, Any]]) -> None:
    """Nobody reads them."""
    assert [rank["merged"] for rank in seen] == [0, 0]
