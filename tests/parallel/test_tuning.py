"""The pipeline of a frozen model: exits tuned over several processes have the gradients that one process gives them."""

import dataclasses
import logging
from typing import Any

import pytest
import torch

from exitlm.model.exits import ExitConfig
from exitlm.parallel.mesh import Layout
from exitlm.parallel.pipeline.runner import Runner
from exitlm.parallel.pipeline.schedule import Action, Message, make
from tests.parallel.cases import WAYS, Case, Meshes, exits_of, llama, run_cases, trainer_of, truth
from tests.parallel.launch import launch

EXITS = exits_of("2 norm own", "3 lens own", "4 block exits", "6 mlp exits")
GATED = tuple(dataclasses.replace(e, gate=True) for e in EXITS)
SHARED = exits_of("1 embed shared", "2 norm shared", "6 lens shared")
MODEL = llama(8, vocab_size=49, tie_word_embeddings=True)
FINAL = ("objective.distill=0.5", "objective.distill_temperature=1.5")


def tuned(layout: Layout, *settings: str, exits: tuple[ExitConfig, ...] = EXITS, **options: Any) -> Case:
    return Case(layout=layout, model=MODEL, exits=exits, settings=settings, frozen=True, microbatches=3, **options)


@pytest.mark.parametrize(
    "layout",
    [Layout(pipeline=2), Layout(pipeline=4), Layout(pipeline=2, data=2), Layout(pipeline=2, data=2, shard=False)],
    ids=str,
)
def test_exits_of_a_frozen_pipeline_have_the_gradient_of_one_process(layout: Layout) -> None:
    """From labels, from the final head, whose features travel back, and with gates; also where a stage has no exit, or
    one without anything to train."""
    run_cases(
        [
            *(tuned(layout, f"objective.exit_forward={way}") for way in WAYS),
            tuned(layout, *FINAL),
            tuned(layout, *FINAL, "objective.gate=0.6", "objective.confidence_weighted=true", exits=GATED),
            tuned(layout, exits=SHARED),
            tuned(layout, *FINAL, exits=SHARED),
            tuned(layout, "objective.rotate_exits=2", step=1),
        ]
    )


def test_exits_of_a_frozen_pipeline_with_tensor_ranks() -> None:
    layout = Layout(pipeline=2, tensor=2)
    few: dict[str, Any] = {"size": 1}
    run_cases(
        [
            tuned(layout, **few),
            tuned(layout, *FINAL, "objective.gate=0.6", exits=GATED, **few),
            tuned(dataclasses.replace(layout, sequence=False), *FINAL, exits=SHARED, **few),
        ]
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_exits_of_a_frozen_pipeline_on_eight_processes() -> None:
    layout = Layout(data=2, tensor=2, pipeline=2)
    run_cases([tuned(layout), tuned(layout, *FINAL, "objective.gate=0.6", exits=GATED)])


def test_hidden_states_are_sent_before_the_exits_run() -> None:
    """The next stage does not wait for the work of this one's exits, and nothing is sent back."""
    programs = make("tuning", 4, 6).messages()
    for rank, program in enumerate(programs):
        for at, op in enumerate(program):
            if isinstance(op, Action) and op.op == "F" and rank < 3:
                assert program[at + 1] == Message("send", rank + 1, op.microbatch)
        work = [op for op in program if isinstance(op, Action)]
        assert [op.op for op in work] == ["F", "B"] * 6
        assert {op.peer - rank for op in program if isinstance(op, Message) and op.kind == "send"} <= {1}


def layers_run(case: Case) -> dict[str, Any]:
    """Which layers this process has, how often each ran in a step, and the most microbatches that were held at once."""
    logging.disable(logging.CRITICAL)
    trainer = trainer_of(case, Meshes().of(case.layout))
    runs: dict[int, int] = {}
    for stage in trainer.stages:
        for index, layer in stage.model.model.layers.by_number().items():
            runs[index] = 0

            def count(*_: Any, index: int = index) -> None:
                runs[index] += 1

            layer.register_forward_pre_hook(count)
            plain = layer.parts

            def parts(*inputs: Any, plain: Any = plain, index: int = index) -> Any:
                runs[index] += 1
                return plain(*inputs)

            layer.parts = parts
    held, runner = [0], trainer.runner
    assert isinstance(runner, Runner)
    backward = runner._exits

    def exits(number: int) -> None:
        held.append(len(runner.held))
        backward(number)

    runner._exits = exits
    trainer.step()
    names = [name for stage in trainer.stages for name, _ in stage.tensors()]
    return {"runs": runs, "held": max(held), "head": any(name.startswith(("model.norm", "lm_head")) for name in names)}


def test_layers_beyond_the_last_exit_are_neither_there_nor_run() -> None:
    """Six of eight, each once for a microbatch; no stage holds more than one microbatch."""
    found = launch(2, layers_run, tuned(Layout(pipeline=2)))
    assert found[0]["runs"] | found[1]["runs"] == dict.fromkeys(range(6), 3)
    assert not any(rank["head"] for rank in found)
    assert [rank["held"] for rank in found] == [1, 1]


def test_with_distillation_all_layers_run() -> None:
    found = launch(2, layers_run, tuned(Layout(pipeline=2), *FINAL))
    assert found[0]["runs"] | found[1]["runs"] == dict.fromkeys(range(8), 3)
    assert found[1]["head"]


def gradients(case: Case) -> dict[str, torch.Tensor]:
    """This process's gradients; exits have float32 parameters whatever the model has."""
    logging.disable(logging.CRITICAL)
    trainer = trainer_of(case, Meshes().of(case.layout))
    trainer.step()
    backbone = [p for s in trainer.stages for p in s.model.backbone_parameters()]
    assert {local.dtype for local in trainer.shards.local} == {torch.float32}
    assert all(not p.requires_grad and p.grad is None for p in backbone)
    out = {}
    for name, local in zip(trainer.shards.names, trainer.shards.local, strict=True):
        assert local.grad is not None
        out[name] = local.grad
    return out


def test_a_frozen_model_in_bfloat16_is_close_to_float64() -> None:
    """To 5% of the gradient's norm, as a model that is trained with all parameters."""
    for settings in ((), FINAL):
        case = tuned(Layout(pipeline=2), *settings, "train.dtype=bfloat16", exits=exits_of("2 norm own", "6 lens own"))
        found = {name: grad for rank in launch(2, gradients, case) for name, grad in rank.items()}
        exact = truth(dataclasses.replace(case, settings=settings)).gradients
        assert found.keys() == exact.keys()
        wrong = sum(float((found[name].double() - grad).pow(2).sum()) for name, grad in exact.items())
        assert (wrong / sum(float(grad.pow(2).sum()) for grad in exact.values())) ** 0.5 < 0.05
