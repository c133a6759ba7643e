"""Data ranks, sharded or whole, beside tensor and pipeline ranks; and half precision with sums in float32."""

import dataclasses
import logging
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from exitlm.parallel.mesh import Layout
from tests.parallel.cases import SCHEDULES, Case, Meshes, exits_of, llama, run_cases, trainer_of, truth
from tests.parallel.launch import launch
from tests.parallel.reference import Values

EXITS = exits_of("1 norm shared", "2 lens own", "3 mlp exits", "4 block exits")


def per_rank(schedule: str) -> int:
    return 2 if schedule in ("interleaved", "zero_bubble", "zbv") else 1


def test_eight_processes_have_the_gradient_of_one() -> None:
    """Two data, two tensor and two pipeline ranks: sharded or whole, with and without sequence parallelism; and four
    pipeline ranks, whose bubbles have room to be filled."""
    eight = Layout(data=2, tensor=2, pipeline=2)
    layouts = [
        eight,
        dataclasses.replace(eight, schedule="zero_bubble", stages_per_rank=2),
        dataclasses.replace(eight, schedule="filled"),
        dataclasses.replace(eight, schedule="zbv", stages_per_rank=2, shard=False, sequence=False),
    ]
    model = llama(4, vocab_size=49, tie_word_embeddings=True)
    cases = [Case(layout=layout, exits=EXITS, model=model, size=1, length=4, microbatches=2) for layout in layouts]
    for layout in (Layout(data=2, pipeline=4, schedule="filled"), Layout(tensor=2, pipeline=4, schedule="filled")):
        cases.append(Case(layout=layout, exits=EXITS, model=model, size=1, length=4, microbatches=4))
        made = cases[-1].job().geometry.schedule
        assert (made.filled_warmup, made.filled_cooldown) == (1, 2)
    run_cases(cases)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eight_processes_have_the_gradient_of_one_in_many_cases(schedule: str) -> None:
    eight = Layout(data=2, tensor=2, pipeline=2, schedule=schedule, stages_per_rank=per_rank(schedule))
    model = llama(6, vocab_size=49, tie_word_embeddings=True)
    for options in ({}, {"shard": False}, {"sequence": False}):
        layout = dataclasses.replace(eight, **options)
        cases = [
            Case(layout=layout, exits=EXITS, model=model, settings=(f"objective.exit_forward={way}", *more))
            for way in ("eager", "checkpoint", "deferred")
            for more in ((), ("train.recompute=layers",))
        ]
        if schedule != "filled":
            cases.append(Case(layout=layout, exits=EXITS, model=model, settings=("objective.distill=0.5",)))
        run_cases(cases)


@pytest.mark.parametrize("shard", [True, False])
def test_data_ranks_have_the_gradient_of_one_process(shard: bool) -> None:
    """Also with parameters that do not divide among them, and with layers that are skipped now and then."""
    gated = tuple(dataclasses.replace(e, gate=True) for e in EXITS)
    model = llama(4, vocab_size=49)
    two = Layout(data=2, pipeline=2, shard=shard)
    dropping = ("objective.layer_dropout=1.0", "train.steps=2")
    run_cases(
        [
            Case(layout=Layout(data=4, shard=shard), exits=gated, model=model, settings=("objective.distill=0.5",)),
            Case(layout=two, exits=gated, model=model, settings=("objective.distill=0.5",)),
            Case(layout=two, exits=EXITS, model=model, settings=dropping, step=1),
            Case(
                layout=dataclasses.replace(two, schedule="zbv", stages_per_rank=2),
                exits=EXITS,
                model=model,
                settings=(*dropping, "train.recompute=layers"),
                step=1,
            ),
        ]
    )


def test_a_stage_that_skips_all_its_layers_in_the_last_backward_loses_no_gradient() -> None:
    """That backward reduces the gradients of all others over the data ranks."""
    cases = [
        Case(
            layout=Layout(data=2, pipeline=4, schedule="filled"),
            exits=exits_of("4 norm shared"),
            model=llama(4),
            settings=("objective.layer_dropout=1.0", "train.steps=2", f"train.seed={seed}"),
            step=1,
            size=1,
            length=4,
        )
        for seed in range(4)
    ]
    assert any(case.dropped(1, 0) & {0, 1, 2} for case in cases), "the cases are not what they are for"
    run_cases(cases)


def gathered(case: Case) -> dict[str, bool]:
    """Whether the parameters of this process are whole after each microbatch's forward, and have gradients after the
    step."""
    trainer = trainer_of(case, Meshes().of(case.layout))
    after: list[bool] = []

    def hook(module: Any, inputs: Any, out: Any) -> None:
        after.extend(
            not isinstance(p, DTensor) for layer in module.model.model.layers.values() for p in layer.parameters()
        )

    for stage in trainer.stages:
        assert isinstance(stage, FSDPModule)
        stage.register_forward_hook(hook)
    trainer.shards.clear()
    trainer.step()
    return {
        "whole": all(after),
        "some": bool(after),
        "gradients": all(p.grad is not None for p in trainer.shards.whole),
    }


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble", "zbv"])
def test_a_pipeline_keeps_parameters_gathered_between_microbatches(schedule: str) -> None:
    """Resharded after the forward, schedules that split the backward would leave no gradient, in silence."""
    layout = Layout(data=2, pipeline=2, schedule=schedule, stages_per_rank=per_rank(schedule))
    found = launch(4, gathered, Case(layout=layout, exits=EXITS, model=llama(4), size=1))
    assert found == [{"whole": True, "some": True, "gradients": True}] * 4


@pytest.mark.parametrize(
    "case",
    [
        Case(layout=Layout(data=2, pipeline=2), exits=exits_of("1 norm own", "4 mlp own"), model=llama(4), frozen=True),
        Case(layout=Layout(data=2, pipeline=4, schedule="filled"), exits=EXITS, model=llama(4), size=1),
        Case(layout=Layout(data=2), exits=EXITS, model=llama(4), size=1),
    ],
    ids=["frozen", "filled", "one stage"],
)
def test_our_own_loop_reduces_the_gradients_with_the_last_backward(case: Case) -> None:
    assert all(rank["gradients"] for rank in launch(case.layout.world, gathered, case))


# ---- half precision


def everything(cases: list[Case], scale: float) -> list[dict[str, Tensor]]:
    """All gradients of a step of each case, by name, on every process."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    meshes, out = Meshes(), []
    for case in cases:
        trainer = trainer_of(case, meshes.of(case.layout))
        trainer.progress.scale = scale
        trainer.step()
        assert {local.grad.dtype for local in trainer.shards.local if local.grad is not None} == {torch.float32}
        assert {local.dtype for local in trainer.shards.local} == {torch.float32}
        mine: dict[str, Tensor] = {}
        for name, whole, local in zip(trainer.shards.names, trainer.shards.whole, trainer.shards.local, strict=True):
            assert local.grad is not None
            grad = local.grad
            if isinstance(whole, DTensor):
                grad = DTensor.from_local(
                    grad, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
                ).full_tensor()
            mine[name] = grad
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        out.append({name: grad for part in every for name, grad in part.items()})
    return out


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The relative error of the whole gradient."""
    wrong = sum(float((found[name].double() - g.double()).pow(2).sum()) for name, g in expected.items())
    return (wrong / sum(float(g.double().pow(2).sum()) for g in expected.values())) ** 0.5


@pytest.mark.parametrize(("dtype", "scale"), [("bfloat16", 1.0), ("float16", 256.0)])
def test_half_precision_is_as_close_to_float64_as_a_plain_model_in_it(dtype: str, scale: float) -> None:
    """To 1.5 times the error of a plain model whose weights and work are in this dtype (3% and 0.4% of the norm)."""
    layouts = [
        Layout(data=2, pipeline=2),
        Layout(data=2, pipeline=2, schedule="zbv", stages_per_rank=2),
        Layout(tensor=2, pipeline=2),
        Layout(data=4, shard=False),
    ]
    cases = [
        Case(layout=layout, exits=EXITS, model=llama(4), microbatches=2, seed=1, settings=(f"train.dtype={dtype}",))
        for layout in layouts
    ]
    for case, found in zip(cases, launch(4, everything, cases, scale)[0], strict=True):
        exact = truth(dataclasses.replace(case, settings=("train.dtype=float64",))).gradients
        plain = truth(case, values=Values(case.seed, getattr(torch, dtype))).gradients
        assert off(found, exact) < 1.5 * off(plain, exact) < 0.06, case


def test_gradients_are_summed_in_float32() -> None:
    """Whatever the schedule, the same sums of bfloat16 gradients: 1e-6 apart with torch 2.13 (7e-5 with 2.15), where
    sums in bfloat16 would be 2e-3 apart. Heads that share a matrix on a stage, and weights' halves of backwards that
    follow each other, are part of it."""
    cases = [
        Case(
            layout=Layout(pipeline=4, schedule=schedule, stages_per_rank=per_rank(schedule)),
            exits=exits_of("2 norm shared", "3 lens own", "5 mlp exits", "7 block shared", "8 norm shared"),
            model=llama(8),
            size=1,
            length=4,
            microbatches=12,
            packed=False,
            settings=("train.dtype=bfloat16",),
        )
        for schedule in ("1f1b", "gpipe", "interleaved", "zero_bubble", "zbv")
    ]
    first, *others = launch(4, everything, cases, 1.0)[0]
    for case, found in zip(cases[1:], others, strict=True):
        assert off(found, first) < 2e-4, case
