"""How a head's loss meets the hidden states: when logits are computed, how many there are, and what counts."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import exitlm.train.head_loss as head_loss
from exitlm.model.exits import ExitConfig
from exitlm.parallel.mesh import Layout
from exitlm.parallel.pipeline.stage import FINAL
from exitlm.train.head_loss import HeadLosses
from exitlm.train.objective import LossSettings
from tests.parallel.cases import WAYS, Case, Meshes, exits_of, llama, trainer_of
from tests.parallel.chain import backward, forward, gradients, plan_of, split_of, stages_of
from tests.parallel.launch import launch
from tests.parallel.reference import Objective, Reference, Table, Values, random_table

EXITS = exits_of("2 norm shared", "3 mlp own", "4 block exits", "5 lens low_rank")
GATED = tuple(dataclasses.replace(e, gate=True) for e in EXITS)
CONFIG = llama(6, tie_word_embeddings=True)
COUNTS = (2, 2, 2)


# ---- how often, and how much


@contextmanager
def counted() -> Iterator[list[str]]:
    """The forwards of heads on a whole microbatch, in order."""
    calls: list[str] = []
    plain = {name: getattr(head_loss, name) for name in ("whole_loss", "chunked_losses")}

    def counting(name: str) -> Any:
        def run(*inputs: Any, **options: Any) -> Any:
            calls.append(name)
            return plain[name](*inputs, **options)

        return run

    try:
        for name in plain:
            setattr(head_loss, name, counting(name))
        yield calls
    finally:
        for name, function in plain.items():
            setattr(head_loss, name, function)


def head_forwards(cases: list[Case]) -> list[int]:
    """How many there are on this process in a step."""
    meshes, out = Meshes(), []
    for case in cases:
        trainer = trainer_of(case, meshes.of(case.layout))
        with counted() as calls:
            trainer.step()
        out.append(len(calls))
    return out


def test_a_deferred_head_computes_its_logits_once_for_each_microbatch() -> None:
    """32 in a step of 8 microbatches with an exit on each of the first three of four stages (training.md, section 3),
    also where the backward is split."""
    exits = exits_of("1 norm own", "2 norm own", "3 norm own")
    cases = [
        Case(
            layout=Layout(pipeline=4, schedule=schedule, stages_per_rank=1 if schedule == "1f1b" else 2),
            exits=exits,
            model=llama(4 if schedule == "1f1b" else 8),
            settings=(f"objective.exit_forward={way}", "exits.place=end"),
            microbatches=8,
            size=1,
            length=4,
        )
        for schedule in ("1f1b", "zbv", "zero_bubble")
        for way in ("deferred", "eager", "checkpoint")
    ]
    totals = [sum(counts) for counts in zip(*launch(4, head_forwards, cases), strict=True)]
    deferred, eager, checkpoint = totals[0::3], totals[1::3], totals[2::3]
    assert (deferred, eager) == ([32, 32, 32], [32, 32, 32])
    assert checkpoint[0] == 64
    assert min(checkpoint[1:]) > 64


class Logits(TorchDispatchMode):
    """The largest number of rows of any tensor that is as wide as the vocabulary."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.vocab:
                self.rows = max(self.rows, tensor.numel() // self.vocab)
        return out


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_a_deferred_head_never_holds_more_than_a_chunk_of_logits(splits: bool, distill: float) -> None:
    vocab, chunk, exits = 131, 16, exits_of("2 norm shared", "3 mlp own", "4 block exits")
    config, table = llama(6, vocab_size=vocab), random_table(8, 12, vocab, 0)
    losses = HeadLosses(settings=LossSettings(distill=distill), chunk=chunk, splits=splits)
    stages = stages_of(config, exits, split_of(config, exits, COUNTS), losses, carries=distill > 0)
    with Logits(vocab) as before:
        passed = forward(stages, table, plan_of(exits, table))
    assert before.rows == 0
    with Logits(vocab) as seen:
        backward(passed)
    assert seen.rows == chunk


def test_an_eager_head_holds_them_all() -> None:
    """What the two tests above can tell apart."""
    table = random_table(8, 12, 48, 0)
    stages = stages_of(CONFIG, EXITS, split_of(CONFIG, EXITS, COUNTS), HeadLosses(how="eager"))
    with Logits(48) as seen:
        forward(stages, table, plan_of(EXITS, table))
    assert seen.rows == 8 * 12


# ---- what counts


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_loss_and_gradient_of_the_reference(way: Any) -> None:
    table = random_table(3, 8, 48, 2)
    losses = HeadLosses(how=way, chunk=5)
    stages = stages_of(CONFIG, EXITS, split_of(CONFIG, EXITS, COUNTS), losses)
    plan = plan_of(EXITS, table)
    backward(forward(stages, table, plan))
    expected = Reference(CONFIG, EXITS, Values()).find(table, range(3), Objective(weights=plan.weights), plan.shares)
    found = gradients(stages, CONFIG, EXITS)
    for name, gradient in expected.gradients().items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)
    for head, sums in losses.take().items():
        assert float(sums[1]) == pytest.approx(expected.sums[head].loss, rel=1e-12)


def learning(splits: bool) -> HeadLosses:
    """Everything an exit can learn from."""
    settings = LossSettings(distill=0.4, temperature=1.7, confidence_weighted=True, confidence_temperature=0.8)
    return HeadLosses(settings=settings, gate_weight=0.6, splits=splits)


@pytest.mark.parametrize("gate", [0.0, 0.7])
@pytest.mark.parametrize("confidence", [None, 1.0, 0.6])
@pytest.mark.parametrize(("distill", "temperature"), [(0.0, 1.0), (0.4, 1.0), (0.4, 2.5), (1.0, 1.0), (1.0, 0.7)])
def test_whatever_an_exit_learns_from_it_has_the_gradient_of_the_reference(
    distill: float, temperature: float, confidence: float | None, gate: float
) -> None:
    """Labels, the final head at some temperature, or both; tokens weighted by their confidence; a gate; candidates."""
    few = ExitConfig(layer=1, kind="norm", candidates=9, gate=True)
    exits, table = (few, *GATED), random_table(3, 8, 48, 2)
    ids = torch.arange(3, 30, 3)
    settings = LossSettings(
        distill=distill,
        temperature=temperature,
        confidence_weighted=confidence is not None,
        confidence_temperature=confidence or 1.0,
    )
    losses = HeadLosses(settings=settings, gate_weight=gate, chunk=5)
    carries = distill > 0 or gate > 0
    stages = stages_of(CONFIG, exits, split_of(CONFIG, exits, COUNTS), losses, carries=carries, candidate_ids=ids)
    plan = plan_of(exits, table)
    backward(forward(stages, table, plan))
    objective = Objective(
        weights=plan.weights,
        distill=distill,
        temperature=temperature,
        weighted=settings.confidence_weighted,
        confidence_temperature=settings.confidence_temperature,
        gate=gate,
    )
    reference = Reference(CONFIG, exits, Values(), candidate_ids=ids)
    expected, found = reference.find(table, range(3), objective, plan.shares), gradients(stages, CONFIG, exits)
    for name, gradient in expected.gradients().items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(gradient)), gradient, rtol=0, atol=1e-12)
    for head, sums in losses.take().items():
        wanted = expected.sums[head]
        weight = wanted.confidence_weight if confidence is not None and head != FINAL else wanted.tokens
        values = [wanted.tokens, wanted.loss, wanted.accuracy, wanted.confidence, weight, wanted.gate_loss]
        assert sums.tolist() == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize("splits", [False, True])
def test_the_loss_scale_covers_exits_and_gates(splits: bool) -> None:
    """Of half precision: 4096 times the scale is 4096 times every gradient, to the last bit, and the same losses."""
    table, found = random_table(3, 8, 48, 2), []
    for scale in (1.0, 4096.0):
        losses = learning(splits)
        stages = stages_of(CONFIG, GATED, split_of(CONFIG, GATED, COUNTS), losses, carries=True)
        backward(forward(stages, table, plan_of(GATED, table, scale=scale)))
        found.append((gradients(stages, CONFIG, GATED), losses.take()))
    for name, gradient in found[0][0].items():
        assert torch.equal(found[1][0][name], 4096.0 * gradient), name
    for head, sums in found[0][1].items():
        assert torch.equal(found[1][1][head], sums)


def test_the_gate_learns_whatever_its_exit_weighs() -> None:
    """Its loss has a weight of its own, as where exits are tuned on one process."""
    table, objective = random_table(3, 8, 48, 2), Objective(weights={2: 0.0, 4: 0.5, 0: 1.0}, distill=1.0, gate=0.6)
    exits = (GATED[0], GATED[2])
    losses = HeadLosses(settings=LossSettings(distill=1.0), gate_weight=0.6)
    stages = stages_of(CONFIG, exits, split_of(CONFIG, exits, COUNTS), losses, carries=True)
    plan = dataclasses.replace(plan_of(exits, table), weights=objective.weights)
    backward(forward(stages, table, plan))
    found = gradients(stages, CONFIG, exits)
    assert float(found["exits.2.gate.weight"].abs().max()) > 1e-3
    for name, g in Reference(CONFIG, exits, Values()).find(table, range(3), objective, plan.shares).gradients().items():
        torch.testing.assert_close(found[name], g, rtol=0, atol=1e-12)


def test_the_final_head_learns_nothing_from_exits_that_learn_from_it() -> None:
    table = random_table(3, 8, 48, 2)
    split, found = split_of(CONFIG, EXITS, COUNTS), []
    for weight in (0.0, 5.0):
        losses = HeadLosses(settings=LossSettings(distill=1.0))
        stages = stages_of(CONFIG, EXITS, split, losses, carries=True)
        plan = plan_of(EXITS, table)
        plan = dataclasses.replace(plan, weights={layer: weight if layer else 1.0 for layer in plan.weights})
        backward(forward(stages, table, plan))
        found.append(stages[-1].model.model.norm.weight.grad)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_a_token_counts_is_as_wide_as_the_sums(dtype: torch.dtype) -> None:
    """A mask times a Python number would be float32, and 1/3 wrong in the eighth digit of a float64 gradient."""
    table = random_table(2, 8, 48, 0)
    losses = HeadLosses()
    stages = stages_of(CONFIG, (), split_of(CONFIG, (), (6,)), losses, dtype=dtype)
    plan = dataclasses.replace(plan_of((), table), shares={FINAL: 1.0 / 3.0})
    model = stages[0].model
    position = head_loss.Position(FINAL, None, model, stages[0].context(table.documents, torch.device("cpu")))
    job = losses(position, table.labels, plan, 0).loss_job(torch.zeros(16, 16, dtype=dtype), None, 4)
    assert job.weight_N.dtype == torch.promote_types(dtype, torch.float32)
    assert set(job.weight_N.unique().tolist()) == {0.0, torch.tensor(1.0 / 3.0, dtype=job.weight_N.dtype).item()}


def test_a_microbatch_without_a_label_counts_nothing() -> None:
    table = random_table(3, 8, 48, 2)
    empty = Table(ids=table.ids, labels=torch.full_like(table.labels, -100), documents=table.documents)
    losses = learning(False)
    stages = stages_of(CONFIG, GATED, split_of(CONFIG, GATED, COUNTS), losses, carries=True)
    backward(forward(stages, empty, plan_of(GATED, table)))
    assert not any(bool(gradient.any()) for gradient in gradients(stages, CONFIG, GATED).values())
    assert all(not bool(sums.any()) for sums in losses.take().values())
