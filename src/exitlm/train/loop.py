"""The optimizer loop over exits of a frozen backbone: batches in, tuned heads out, with checkpoints on the way.

What happens in step ``s`` is a function of the settings, the data and the state after step ``s - 1``: the order of the
data and every draw are seeded by the step, so that a run that was killed and resumed ends with the same bits.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from exitlm.errors import UserError
from exitlm.train.data import batch_indices
from exitlm.train.heads import HeadBatch, Heads
from exitlm.train.hidden import HiddenStates, Row, join_optional
from exitlm.train.objective import (
    HeadInput,
    LossSettings,
    exit_weight,
    gate_loss,
    linear_losses,
    sampled_vocabulary,
)
from exitlm.train.run import RunConfig
from exitlm.train.sections import ObjectiveSection, TrainSection
from exitlm.train.stream import Stream

FREQUENT = 8000


class StopSignal:
    """Whether SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) arrived. A second Ctrl-C interrupts at once; the others may well come
    twice, from a cluster's scheduler and from the launcher that it told."""

    def __init__(self) -> None:
        self.name = ""
        self._ends = False

    def __bool__(self) -> bool:
        return bool(self.name)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal ends this block where it is, with :class:`Interrupted`: for long work that changes nothing."""
        self._ends = True
        try:
            if self.name:
                raise Interrupted
            yield
        finally:
            self._ends = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if self._ends:
            raise Interrupted


class Interrupted(SystemExit):
    """SIGTERM, SIGUSR1 or Ctrl-C arrived and everything is saved: leaves the program with exit code 0 unless caught."""

    def __init__(self) -> None:
        super().__init__(0)


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Turn these signals into a flag while the block runs; outside of the main thread nothing is changed."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {
        number: signal.signal(number, stop._receive) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def learning_rate(step: int, settings: TrainSection) -> float:
    """The rate of step ``step`` (from 0): linear warm-up, then cosine, line or constant, down to ``min_lr``."""
    warmup = min(settings.warmup, settings.steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.lr
    done = (step - warmup) / max(1, settings.steps - warmup)
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1.0 - done
    return settings.min_lr + (settings.lr - settings.min_lr) * left


@dataclass(frozen=True)
class StepResult:
    """Means over the tokens of one step, by exit."""

    loss: dict[int, float]
    agreement: dict[int, float]
    confidence: dict[int, float]
    weight: dict[int, float]
    gate_loss: dict[int, float]
    grad_norm: dict[int, float]
    lr: float
    tokens: int

    def values(self) -> dict[str, float]:
        """Flat names for the trackers."""
        out: dict[str, float] = {"lr": self.lr, "tokens": self.tokens}
        for name in ("loss", "agreement", "confidence", "weight", "gate_loss", "grad_norm"):
            out.update({f"{name}/{layer}": value for layer, value in getattr(self, name).items()})
        return out


class Trainer:
    """Heads, their optimizer and the data; :meth:`step` does one optimizer step."""

    def __init__(self, config: RunConfig, heads: Heads, hidden: HiddenStates, stream: Stream | None = None) -> None:
        """``stream`` says which blocks come when; None: all of them once per epoch."""
        self.config, self.heads, self.hidden, self.stream = config, heads, hidden, stream
        self.settings: TrainSection = config.train
        self.parameters = heads.parameters()
        matrices = [p for p in self.parameters.values() if p.dim() >= 2]
        vectors = [p for p in self.parameters.values() if p.dim() < 2]
        t = self.settings
        groups = [{"params": matrices, "weight_decay": t.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        groups = [g for g in groups if g["params"]]
        if not groups:
            raise UserError("these exits have nothing to tune (kind 'embed' with a shared matrix); choose another kind")
        self.optimizer = torch.optim.AdamW(groups, lr=t.lr, betas=t.betas, eps=t.eps)
        counts = hidden.blocks.counts(heads.model.config.vocab_size)
        order = counts.sort(descending=True, stable=True)
        self.frequent = order.indices[: max(1, min(FREQUENT, int((order.values > 0).sum())))]
        self.done = 0

    # ---- state

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments by name, and the candidates, without which the parameters mean nothing."""
        out: dict[str, Tensor] = {name: p.detach() for name, p in self.parameters.items()}
        for layer, head in self.heads.by_layer.items():
            if head.candidate_ids is not None:
                out[f"exits.{layer}.candidate_ids"] = head.candidate_ids
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                out[f"optimizer.{key}.{name}"] = value
        return out

    def restore(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """The inverse of :meth:`state`. Raises UserError where the candidates are not those of the parameters."""
        for layer, head in self.heads.by_layer.items():
            ids, before = head.candidate_ids, tensors.get(f"exits.{layer}.candidate_ids")
            if ids is not None and before is not None and not torch.equal(ids.cpu(), before):
                raise UserError(
                    f"the candidates of exit {layer} are not those the run began with (the special tokens of the base "
                    "changed); restore its tokenizer and configuration, or choose another directory"
                )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])
        for name, parameter in self.parameters.items():
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{k}.{name}" in tensors]
            state = {key: tensors[f"optimizer.{key}.{name}"].clone() for key in keys}
            if state:
                moved = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
                self.optimizer.state[parameter] = moved
        self.done = done

    # ---- one step

    def step(self) -> StepResult:
        """Forward, backward and update for the next global batch.

        Raises:
            UserError: a loss or gradient that is not finite, naming step and exit; nothing is updated then.
        """
        t, layers = self.settings, self.heads.layers
        blocks = self.hidden.blocks
        indices = self._indices()
        tokens = sum(blocks.targets(i) for i in indices)
        weights = exit_weights(self.config.objective, self.done, len(layers))
        weights = [w if self._in_turn(e) else 0.0 for e, w in enumerate(weights)]
        sums = {name: torch.zeros(len(layers), dtype=torch.float64) for name in ("loss", "agree", "sure", "gate")}
        self.optimizer.zero_grad(set_to_none=True)
        for number, start in enumerate(range(0, len(indices), t.microbatch)):
            self._microbatch(indices[start : start + t.microbatch], number, tokens, weights, sums)
        norms = self._clip()
        rate = learning_rate(self.done, t)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.done += 1
        by = {name: dict(zip(layers, total.tolist(), strict=True)) for name, total in sums.items()}
        weight = dict(zip(layers, weights, strict=True))
        return StepResult(by["loss"], by["agree"], by["sure"], weight, by["gate"], norms, rate, tokens)

    def _indices(self) -> list[int]:
        """The blocks of the next step."""
        t = self.settings
        if self.stream is None:
            return batch_indices(len(self.hidden), self.done, t.global_batch, t.seed)
        return self.stream.indices(range(self.done * t.global_batch, (self.done + 1) * t.global_batch))

    def _microbatch(
        self, indices: list[int], number: int, tokens: int, weights: list[float], sums: dict[str, Tensor]
    ) -> None:
        objective = self.config.objective
        rows = [self.hidden.row(i) for i in indices]
        batch = self.heads.batch(rows)
        wide = self.heads.master
        weight_N = batch.weights(1.0 / tokens, wide)
        sampled = self._samples()
        inputs = self._sampled(batch, rows, number) if sampled else batch.inputs
        result = linear_losses(
            inputs,
            weight_N,
            labels_N=batch.labels_N,
            teacher=batch.teacher,
            settings=loss_settings(objective, renormalise=sampled),
        )
        total = (result.loss_E * torch.tensor(weights, dtype=wide, device=self.heads.device)).sum()
        gates = torch.zeros_like(result.loss_E)
        for e, logit_N in enumerate(batch.gates):
            if logit_N is not None and objective.gate > 0 and self._in_turn(e):
                loss = gate_loss(logit_N, result.correct_EN[e], weight_N)
                total = total + objective.gate * loss
                gates[e] = loss.detach()
        self._check_finite(result.loss_E.detach() + gates, "loss")
        total.backward()  # type: ignore[no-untyped-call]
        sums["loss"] += result.loss_E.detach().double().cpu()
        sums["gate"] += gates.double().cpu()
        sums["agree"] += (result.correct_EN.to(wide) @ weight_N).double().cpu()
        sums["sure"] += (result.confidence_EN.to(wide) @ weight_N).double().cpu()

    def _in_turn(self, index: int) -> bool:
        """Whether the exit at ``index`` is trained in this step."""
        every = self.config.objective.rotate_exits
        return every < 2 or (index - self.done) % every == 0

    def _samples(self) -> bool:
        """Whether this step samples the vocabulary: not towards the end, and not where little would be left out."""
        o, vocab = self.config.objective, self.heads.model.config.vocab_size
        return (
            o.candidate_loss and self.done < o.candidate_share * self.settings.steps and vocab > 2 * o.candidate_tokens
        )

    def _sampled(self, batch: HeadBatch, rows: Sequence[Row], number: int) -> list[HeadInput]:
        """The inputs restricted to this microbatch's sampled vocabulary; candidate heads keep their candidates."""
        seed = (self.settings.seed * 1_000_003 + self.done) * 1_009 + number
        generator = torch.Generator().manual_seed(seed % (1 << 62))
        count, vocab = self.config.objective.candidate_tokens, self.heads.model.config.vocab_size
        best = join_optional([row.best_Nk for row in rows])
        needed = batch.labels_N if best is None else torch.cat([batch.labels_N, best.reshape(-1)])
        ids = sampled_vocabulary(needed, self.frequent, vocab, count, generator).to(self.heads.device)
        frozen: dict[int, Tensor] = {}  # the shared matrix's rows are taken once
        out = []
        for head in batch.inputs:
            if head.ids_K is None:
                weight = head.weight_KD
                if weight.requires_grad:
                    part_KD = weight[ids]
                else:
                    if id(weight) not in frozen:
                        frozen[id(weight)] = weight[ids]
                    part_KD = frozen[id(weight)]
                head = HeadInput(features_ND=head.features_ND, weight_KD=part_KD, ids_K=ids)
            out.append(head)
        return out

    def _clip(self) -> dict[int, float]:
        """Clip the gradient of each exit by itself: exits are independent, alone or together."""
        norms: dict[int, float] = {}
        for layer in self.heads.layers:
            mine = [p for name, p in self.parameters.items() if self.heads.owner(name) == layer and p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in mine if p.grad is not None])
            norms[layer] = float(norm)
            self._check_finite(torch.tensor([norms[layer]]), "gradient", layer)
            if self.settings.clip > 0:
                torch.nn.utils.clip_grads_with_norm_(mine, self.settings.clip, norm)
        return norms

    def _check_finite(self, values: Tensor, what: str, layer: int | None = None) -> None:
        if bool(torch.isfinite(values).all()):
            return
        bad = layer if layer is not None else self.heads.layers[int((~torch.isfinite(values)).nonzero()[0, 0])]
        raise UserError(
            f"step {self.done + 1}: the {what} of exit {bad} is not finite (NaN or infinite); nothing was updated "
            "and the last checkpoint is intact; start another run with a lower train.lr, or train.dtype = 'float32'"
        )


def exit_weights(objective: ObjectiveSection, step: int, count: int) -> list[float]:
    """The weight of each exit's loss at ``step``."""
    first = objective.weight_init if isinstance(objective.weight_init, tuple) else (objective.weight_init,) * count
    last = objective.weight if isinstance(objective.weight, tuple) else (objective.weight,) * count
    return [exit_weight(step, a, b, objective.warmup_steps, objective.warmup) for a, b in zip(first, last, strict=True)]


def loss_settings(objective: ObjectiveSection, *, renormalise: bool = False) -> LossSettings:
    """The objective's part that a chunk of tokens needs."""
    return LossSettings(
        distill=objective.distill,
        temperature=objective.distill_temperature,
        confidence_weighted=objective.confidence_weighted,
        confidence_temperature=objective.temperature,
        renormalise=renormalise,
    )


class Clock:
    """Tokens per second over the recent past."""

    def __init__(self) -> None:
        self.last, self.rate = time.perf_counter(), 0.0

    def tick(self, tokens: int) -> float:
        """Count ``tokens`` since the last call and return the smoothed rate."""
        now = time.perf_counter()
        rate = tokens / max(1e-9, now - self.last)
        self.rate = rate if self.rate == 0.0 else 0.9 * self.rate + 0.1 * rate
        self.last = now
        return self.rate


def validation_values(scores: Mapping[int, Any]) -> dict[str, float]:
    """Flat names for the trackers."""
    out: dict[str, float] = {}
    for layer, s in scores.items():
        out[f"validation/loss/{layer}"] = s.loss
        out[f"validation/agreement/{layer}"] = s.agreement
    return out
