"""Optimizer steps: against a plain loop, over microbatches, with and without the cache, and when numbers break."""

import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exitlm.errors import UserError
from exitlm.model.exits import ExitConfig
from exitlm.train.backbone import TorchBackbone
from exitlm.train.data import Blocks, batch_indices
from exitlm.train.heads import Heads
from exitlm.train.hidden import HiddenStates, Wanted
from exitlm.train.loop import Trainer, exit_weights, learning_rate, stop_signal
from exitlm.train.run import ObjectiveSection, RunConfig, TrainSection
from tests.model.families import tiny_model

EXITS = [
    ExitConfig(layer=1, gate=True, branch=True),
    ExitConfig(layer=2, kind="mlp", output="own"),
    ExitConfig(layer=3, kind="block", output="low_rank", rank=8),
    ExitConfig(layer=4, kind="norm", candidates=30, gate=True),
]
# A gradient that is zero but for rounding (an exit at L begins as the final head's copy) makes a step of 1e-7 at the
# usual eps of 1e-8, and another one wherever sums are ordered otherwise; at this eps such a step is below 1e-12.
TAME = "train.eps=1e-4"
FAST = ["train.steps=6", "train.global_batch=4", "train.microbatch=2", "train.warmup=2", "train.dtype=float64"]


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    """Nine blocks of one to three pieces of random ids."""
    g = np.random.Generator(np.random.PCG64(0))
    ids = g.integers(3, 97, 400).astype(np.uint16)
    segments, bounds, at = [], [0], 0
    for _ in range(9):
        for _ in range(int(g.integers(1, 4))):
            size = int(g.integers(4, 14))
            segments.append([0, at, at + size, int(g.integers(0, 3))])
            at += size
        bounds.append(len(segments))
    return Blocks([ids], np.array(segments), np.array(bounds), "d")


def trainer(
    blocks: Blocks,
    tmp_path: Path,
    *overrides: str,
    exits: list[ExitConfig] = EXITS,
    keep: str = "memory",
    family: str = "llama",
) -> Trainer:
    layers = ",".join(str(e.layer) for e in exits)
    config = RunConfig().with_overrides([f"exits.layers=[{layers}]", *FAST, *overrides])
    config.check()
    model = tiny_model(family)
    for p in model.parameters():
        p.requires_grad_(False)
    model.add_exits(exits, candidate_ids=torch.arange(30) * 3)
    wanted = Wanted(
        exits=tuple(e.layer for e in exits),
        whole=frozenset(e.layer for e in exits if e.kind == "block"),
        teacher=config.objective.candidate_loss,
    )
    hidden = HiddenStates(TorchBackbone(model), blocks, wanted, keep=keep, limit=1e9, home=tmp_path / "hidden")
    return Trainer(config, Heads(model, getattr(torch, config.train.dtype)), hidden)


def run(t: Trainer, steps: int) -> dict[str, torch.Tensor]:
    while t.done < steps:
        t.step()
    return {name: tensor.clone() for name, tensor in t.state().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_step_is_the_plain_one(blocks: Blocks, tmp_path: Path) -> None:
    """Losses and gradients of one global batch against full logits of the model, all kinds of heads at once."""
    t = trainer(
        blocks, tmp_path, "objective.distill=0.3", "objective.weight=[1, 0.5, 0.25, 2]", "train.clip=0",
        "objective.weight_init=[1, 0.5, 0.25, 2]", "objective.gate=0.7", "objective.distill_temperature=1.5",
    )  # fmt: skip
    t.optimizer.step = lambda *_: None
    result = t.step()
    found = {name: p.grad for name, p in t.parameters.items()}

    model = t.heads.model
    chosen = [s for i in batch_indices(len(blocks), 0, 4, 0) for s in blocks[i]]
    valid = sum(s.targets for s in chosen)
    assert result.tokens == valid
    total = torch.zeros((), dtype=torch.float64)
    for segment in chosen:
        ids = segment.ids[None]
        context = model.context_for(1, ids.shape[1] - 1)
        taps = model.taps(ids[:, :-1], [1, 2, 3, 4], context=context)
        teacher = model.logits(ids[:, :-1])[0, segment.first :]
        labels = ids[0, 1 + segment.first :]
        for weight, (layer, head) in zip((1, 0.5, 0.25, 2), model.exit_heads().items(), strict=True):
            logits = head.project(head.features(taps[layer], context), model.lm_head.weight)[0, segment.first :]
            vocabulary = torch.arange(97) if head.candidate_ids is None else head.candidate_ids
            log_q = torch.full((len(labels), 97), -math.inf, dtype=torch.float64)
            log_q[:, vocabulary] = logits.log_softmax(-1)
            ce = -log_q[torch.arange(len(labels)), labels]
            log_p = (teacher / 1.5).log_softmax(-1)[:, vocabulary]
            mass = log_p.exp().sum(-1, keepdim=True)
            kl = (log_p.exp() * (log_p - mass.log() - (logits / 1.5).log_softmax(-1))).sum(-1) * 1.5**2
            loss = 0.7 * ce.where(ce.isfinite(), torch.zeros(())) + 0.3 * kl
            total = total + weight * loss.sum() / valid
            if head.config.gate:
                right = (log_q.argmax(-1) == teacher.argmax(-1)).double()
                gate = head.gate_logit(taps[layer].hidden)[0, segment.first :]
                total = (
                    total
                    + 0.7 * torch.nn.functional.binary_cross_entropy_with_logits(gate, right, reduction="sum") / valid
                )
    grads = torch.autograd.grad(total, list(t.parameters.values()))
    for (name, mine), grad in zip(found.items(), grads, strict=True):
        assert mine is not None
        assert (mine - grad).abs().max() <= 1e-12, name


def test_microbatches_do_not_change_the_result(blocks: Blocks, tmp_path: Path) -> None:
    one, four = (run(trainer(blocks, tmp_path, f"train.microbatch={m}", TAME), 3) for m in (4, 1))
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-9, atol=1e-12)


def test_microbatches_do_not_change_the_gradient(blocks: Blocks, tmp_path: Path) -> None:
    """Before any optimizer turns what is zero into a step."""
    found = []
    for size in (4, 2, 1):
        t = trainer(blocks, tmp_path, f"train.microbatch={size}", "train.clip=0")
        t.step()
        found.append({name: p.grad for name, p in t.parameters.items()})
    for name, grad in found[0].items():
        assert grad is not None
        assert max(float((grad - other[name]).abs().max()) for other in found[1:]) <= 1e-12, name


@pytest.mark.parametrize(
    "overrides", [[], ["objective.candidate_loss=true", "objective.candidate_tokens=20"], ["train.dtype=bfloat16"]]
)
def test_the_cache_changes_no_bit(blocks: Blocks, tmp_path: Path, overrides: list[str]) -> None:
    states = [run(trainer(blocks, tmp_path, *overrides, keep=keep), 6) for keep in ("memory", "disk", "none")]
    assert same(states[0], states[1])
    assert same(states[0], states[2])


@pytest.mark.parametrize("overrides", [[], ["objective.candidate_loss=true", "objective.candidate_tokens=20"]])
def test_restored_state_goes_on_bit_identically(blocks: Blocks, tmp_path: Path, overrides: list[str]) -> None:
    whole = run(trainer(blocks, tmp_path, *overrides), 6)
    first = run(trainer(blocks, tmp_path, *overrides), 3)
    second = trainer(blocks, tmp_path, *overrides)
    second.restore(first, 3)
    assert same(run(second, 6), whole)


def test_exits_are_tuned_alike_alone_and_together(blocks: Blocks, tmp_path: Path) -> None:
    together = run(trainer(blocks, tmp_path, "train.clip=0.01", TAME), 4)
    alone = run(trainer(blocks, tmp_path, "train.clip=0.01", TAME, exits=[EXITS[1]]), 4)
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, together[name], rtol=1e-9, atol=1e-12)


def test_exits_may_share_a_matrix_of_their_own(blocks: Blocks, tmp_path: Path) -> None:
    exits = [ExitConfig(layer=e, kind="norm", output="exits") for e in (1, 3)]
    t = trainer(blocks, tmp_path, exits=exits)
    assert list(t.parameters) == ["exits.1.norm.weight", "exits.1.output.weight", "exits.3.norm.weight"]
    before = t.parameters["exits.1.output.weight"].detach().clone()
    t.step()
    assert t.heads.by_layer[3].output.weight is t.parameters["exits.1.output.weight"]
    assert not torch.equal(before, t.parameters["exits.1.output.weight"])


def test_backbone_stays_and_the_loss_falls(blocks: Blocks, tmp_path: Path) -> None:
    t = trainer(blocks, tmp_path, "train.steps=40", "train.lr=3e-3")
    before = {name: p.clone() for name, p in t.heads.model.named_parameters() if not name.startswith("exits.")}
    first = t.step().loss
    run(t, 39)
    last = t.step().loss
    assert all(last[layer] < first[layer] for layer in (1, 2, 3))
    for name, p in t.heads.model.named_parameters():
        if name in before:
            assert torch.equal(p, before[name])
            assert p.grad is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_low_precision_keeps_wide_parameters(blocks: Blocks, tmp_path: Path, dtype: str) -> None:
    t = trainer(blocks, tmp_path, f"train.dtype={dtype}")
    result = t.step()
    assert all(
        p.dtype == torch.float64 and p.grad is not None and p.grad.dtype == torch.float64 for p in t.parameters.values()
    )
    assert all(math.isfinite(x) for x in result.values().values())


@pytest.mark.parametrize("layer", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_the_update(blocks: Blocks, tmp_path: Path, layer: int) -> None:
    t = trainer(blocks, tmp_path)
    run(t, 2)
    name = {1: "exits.1.lens.bias", 2: "exits.2.norm.weight"}[layer]
    with torch.no_grad():
        t.parameters[name][0] = math.nan
    before = t.state()
    before = {key: value.clone() for key, value in before.items()}
    with pytest.raises(UserError, match=rf"step 3: the loss of exit {layer} is not finite"):
        t.step()
    assert t.done == 2
    for key, value in t.state().items():
        torch.testing.assert_close(value, before[key], equal_nan=True, rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_stops_before_the_update(blocks: Blocks, tmp_path: Path) -> None:
    t = trainer(blocks, tmp_path)
    before = run(t, 1)
    t.parameters["exits.3.norm.weight"].register_hook(lambda grad: grad * math.inf)
    with pytest.raises(UserError, match=r"step 2: the gradient of exit 3 is not finite"):
        t.step()
    assert same(t.state(), before)


def test_weights_and_rate_follow_their_schedules() -> None:
    objective = ObjectiveSection(weight=(1.0, 0.5), weight_init=0.0, warmup_steps=2)
    assert [exit_weights(objective, s, 2) for s in (0, 1, 5)] == [[0.0, 0.0], [0.5, 0.25], [1.0, 0.5]]
    settings = TrainSection(steps=10, warmup=4, lr=1.0, min_lr=0.1)
    rates = [learning_rate(s, settings) for s in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[7] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    linear = TrainSection(steps=10, warmup=0, lr=1.0, min_lr=0.0, schedule="linear")
    assert learning_rate(5, linear) == pytest.approx(0.5)
    assert learning_rate(9, TrainSection(steps=10, warmup=0, lr=0.3, schedule="constant")) == 0.3
    assert learning_rate(1, TrainSection(steps=2, warmup=100, lr=1.0)) == 1.0


def test_signals_become_a_flag_and_handlers_return() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signal() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop
        assert stop.name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_step_values_are_flat_numbers(blocks: Blocks, tmp_path: Path) -> None:
    values: dict[str, Any] = trainer(blocks, tmp_path).step().values()
    assert {"lr", "tokens", "loss/1", "agreement/4", "confidence/2", "weight/3", "gate_loss/1", "grad_norm/4"} <= set(
        values
    )
    assert all(isinstance(value, int | float) for value in values.values())
