"""Where the loss of a head meets the hidden states: eagerly, checkpointed, or deferred to the backward pass.

:class:`HeadLosses` gives pipeline stages a loss to attach (``exitlm.parallel.pipeline.stage.Losses``): an identity on
the hidden states whose back-propagation adds the loss's gradient, so that any schedule which sends the hidden states'
gradient trains every exit (EE-LLM, arXiv 2312.04916, Proposition 3.1). The three ways give the same gradient:

* ``eager`` computes the logits in the forward and keeps their gradient: one [N, V] for each microbatch under way.
* ``checkpoint`` throws it away and computes it again in the backward.
* ``deferred`` computes nothing before the backward, and then chunk by chunk: it never holds more than a chunk of
  logits. Only this one can learn from the final head's features, which come back with the gradient.

The losses themselves are in ``objective.py``. N tokens, D hidden_size, K rows of an output matrix on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from exitlm.model.layers import Tap
from exitlm.parallel.pipeline.stage import FINAL, Position, StepPlan
from exitlm.train.objective import (
    Chunked,
    LossJob,
    LossSettings,
    Teacher,
    VocabularyPart,
    chunk_tokens,
    chunked_losses,
    gate_loss,
    whole_loss,
)

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""The most that a chunk of logits takes in float32, by type of device. Every chunk reads the output matrix twice and
adds to its gradient: what computes faster needs more tokens for the time of that."""

COUNTED = ("tokens", "loss", "accuracy", "confidence", "confidence_weight", "gate_loss")


def tokens_at_once(rows: int, device: str) -> int:
    """How many tokens a head with an output matrix of so many rows works on at once on a type of device."""
    return chunk_tokens(max(1, rows), CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]))


@dataclass(kw_only=True)
class HeadLosses:
    """The losses of all heads of a process. ``settings`` holds for exits, the final head has plain cross-entropy.
    ``group`` are the tensor ranks (None for one), ``sequence`` whether hidden states are split over them. ``splits``:
    the schedule runs the two halves of a backward apart (zero bubble). ``autocast``: what heads with parameters in
    another dtype compute in. ``chunk`` tokens at a time; 0 is automatic."""

    settings: LossSettings = field(default_factory=LossSettings)
    gate_weight: float = 0.0
    how: Literal["eager", "checkpoint", "deferred"] = "deferred"
    group: dist.ProcessGroup | None = None
    sequence: bool = False
    splits: bool = False
    autocast: torch.dtype | None = None
    chunk: int = 0
    sums: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, position: Position, labels_BT: Tensor, plan: StepPlan, microbatch: int) -> HeadJob:
        """See ``exitlm.parallel.pipeline.stage.Losses``."""
        return HeadJob(self, position, labels_BT, plan, plan.share(position.layer, microbatch))

    def record(self, job: HeadJob, values: Recorded) -> None:
        """Add the values of a microbatch to the sums of its head."""
        counted = (job.labels_N >= 0).to(values.confidence_N.dtype)
        new = [
            counted.sum(),
            values.loss / job.share,
            (values.correct_N * counted).sum(),
            (values.confidence_N * counted).sum(),
            values.weight / job.share,
            values.gate / job.share,
        ]
        added = torch.stack([torch.as_tensor(x, device=counted.device).double() for x in new])
        layer = job.position.layer
        self.sums[layer] = self.sums[layer] + added if layer in self.sums else added

    def take(self) -> dict[int, Tensor]:
        """The sums since the last call by head, in the order of ``COUNTED``."""
        sums, self.sums = self.sums, {}
        return sums


@dataclass(frozen=True)
class Recorded:
    """Detached values of one microbatch."""

    loss: Tensor
    weight: Tensor
    correct_N: Tensor
    confidence_N: Tensor
    gate: Tensor | float = 0.0


def recorded(found: Chunked) -> Recorded:
    """The values of one head."""
    return Recorded(found.loss_E[0], found.weight_E[0], found.correct_EN[0], found.confidence_EN[0])


class HeadJob:
    """The loss of one head on one microbatch: a token counts ``share`` in it, and its gradient ``factor`` times.
    ``apart``: the gradients of the weights are ``kept`` until they are asked for."""

    def __init__(self, losses: HeadLosses, position: Position, labels_BT: Tensor, plan: StepPlan, share: float) -> None:
        self.losses, self.position, self.plan, self.share = losses, position, plan, share
        self.factor = plan.weights[position.layer] * plan.scale
        self.labels_N = labels_BT.reshape(-1)
        self.head, self.final = position.exit, position.layer == FINAL
        self.apart = losses.splits and not plan.measure
        self.kept: tuple[Tensor | None, ...] | None = None
        self.leaf: Tensor | None = None

    def weights(self) -> Tensor | None:
        """See ``exitlm.parallel.pipeline.stage.Loss``."""
        if not self.apart:
            return None
        parameters = self.parameters() if self.losses.how == "deferred" else []
        end: Tensor = _Weights.apply(self, self.matrix(), *parameters)  # type: ignore[no-untyped-call]
        return end

    def attach(self, tap: Tap, carried: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ``exitlm.parallel.pipeline.stage.Loss``."""
        if self.plan.measure:
            self.measure(tap)
            return tap.hidden, carried
        if self.losses.how != "deferred":
            loss = self.eager(tap)
            hidden: Tensor = _Attach.apply(tap.hidden, loss)  # type: ignore[no-untyped-call]
            return hidden, carried
        inputs = (tap.hidden, tap.residual, tap.normed, carried)
        matrix = self.matrix()
        self.leaf = matrix if matrix.is_leaf and matrix.requires_grad else None
        weights = (matrix.detach(),) if self.apart else (matrix, *self.parameters())
        out = _Deferred.apply(self, *inputs, *weights)  # type: ignore[no-untyped-call]
        return (out, None) if carried is None else out

    def parameters(self) -> list[nn.Parameter]:
        """What the features depend on besides the tap, and is trained."""
        if self.head is None:
            return [p for p in self.position.model.model.norm.parameters() if p.requires_grad]
        others = ("output.", "output_up.", *(() if self.losses.gate_weight else ("gate.",)))
        return [p for name, p in self.head.named_parameters() if not name.startswith(others) and p.requires_grad]

    def matrix(self) -> Tensor:
        """This rank's rows of the output matrix, ``[K, D]`` (low rank: ``[K, rank]``); differentiable."""
        head = self.head
        if head is None or head.config.output == "shared":
            weight = local_part(self.position.model.lm_head.weight)
            ids = self.ids()
            return weight if ids is None else weight[ids - self._first()]
        weight = local_part(head.output_up.weight if head.config.output == "low_rank" else head.output.weight)
        return weight if self.losses.autocast is None else weight.to(self.losses.autocast)

    def _first(self) -> int:
        """The first token id whose row this rank has: matrices are cut as by :func:`torch.chunk`."""
        group, size = self.losses.group, self.position.model.config.vocab_size
        return 0 if group is None else min(size, -(-size // dist.get_world_size(group)) * dist.get_rank(group))

    def ids(self) -> Tensor | None:
        """The token ids of this rank's rows, where the head is restricted to candidates."""
        ids = None if self.head is None else self.head.candidate_ids
        if ids is None or self.losses.group is None:
            return ids
        first, count = self._first(), local_part(self.position.model.lm_head.weight).shape[0]
        return ids[(ids >= first) & (ids < first + count)]

    def features(self, tap: Tap) -> Tensor:
        """What the output matrix reads, ``[B, T, D]`` (low rank: ``[B, T, rank]``)."""
        if self.head is None:
            return self.position.model.final_features(tap.hidden)
        low = self.losses.autocast
        with nullcontext() if low is None else torch.autocast(tap.hidden.device.type, low):
            features: Tensor = self.head.features(tap, self.position.context)
            if self.head.config.output == "low_rank":
                features = self.head.output_down(features)
        return features if low is None else features.to(low)

    def gate(self, tap: Tap) -> Tensor | None:
        """The gate's log-odds of this rank's positions ``[B, T]``, where it is trained."""
        if self.head is None or not self.head.config.gate or self.losses.gate_weight == 0.0:
            return None
        wide = tap.hidden.to(self.head.gate.weight.dtype)
        return self.head.gate_logit(wide)

    def loss_job(self, full_ND: Tensor, teacher_ND: Tensor | None, chunk: int) -> LossJob:
        """The loss as ``objective.py`` wants it, of features ``[N, D]``."""
        wide = torch.promote_types(full_ND.dtype, torch.float32)
        teacher = None
        if teacher_ND is not None and not self.final:
            weight = local_part(self.position.model.lm_head.weight).detach()
            teacher = Teacher(features_ND=teacher_ND, weight_VD=weight)
        group = self.losses.group
        return LossJob(
            ids=(self.ids(),),
            weight_N=(self.labels_N >= 0).to(wide) * self.share,
            labels_N=self.labels_N,
            teacher=teacher,
            settings=LossSettings() if self.final else self.losses.settings,
            chunk=chunk,
            part=None if group is None else VocabularyPart(group=group, first=self._first()),
        )

    # ---- sequence parallelism

    def gather(self, x_BTD: Tensor) -> Tensor:
        """``[N, D]`` of the whole sequence, from this rank's part of it."""
        x_BTD = x_BTD.detach()
        group = self.losses.group
        if group is not None and self.losses.sequence:
            parts = [torch.empty_like(x_BTD) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, x_BTD.contiguous(), group=group)
            x_BTD = torch.cat(parts, 1)
        return x_BTD.reshape(-1, x_BTD.shape[-1])

    def scatter(self, grad_ND: Tensor, like_BTD: Tensor) -> Tensor:
        """The inverse for gradients: summed over the ranks, this rank's part of the sequence ``[B, T, D]``."""
        group = self.losses.group
        if group is None:
            return grad_ND.reshape(like_BTD.shape)
        if not self.losses.sequence:
            dist.all_reduce(grad_ND, group=group)
            return grad_ND.reshape(like_BTD.shape)
        parts = grad_ND.reshape(like_BTD.shape[0], -1, like_BTD.shape[2]).chunk(dist.get_world_size(group), 1)
        mine = torch.empty_like(like_BTD, dtype=grad_ND.dtype, memory_format=torch.contiguous_format)
        dist.reduce_scatter(mine, [part.contiguous() for part in parts], group=group)
        return mine

    def part_of_sequence(self, value_N: Tensor, like_BT: Tensor) -> Tensor:
        """This rank's part of a value by token, ``[B, T]``."""
        whole_BT = value_N.reshape(like_BT.shape[0], -1)
        if self.losses.group is None or not self.losses.sequence:
            return whole_BT
        return whole_BT.chunk(dist.get_world_size(self.losses.group), 1)[dist.get_rank(self.losses.group)]

    # ---- forward and backward

    def gradients(self, tap: Tap, matrix: Tensor, teacher: Tensor | None, needs: Sequence[bool]) -> Gradients:
        """Forward and backward of the head in chunks; ``needs`` says for the tap's three tensors, the matrix and each
        of :meth:`parameters` whether a gradient is wanted."""
        with torch.enable_grad():
            tap = tap.map(lambda tensor: tensor.detach().requires_grad_())
            features, gate = self.features(tap), self.gate(tap)
        inputs = [tap.hidden, tap.residual, tap.normed, *self.parameters()]
        wanted = [x for x, need in zip(inputs, [*needs[:3], *needs[4:]], strict=True) if need and x is not None]
        full = self.gather(features)
        chunk = self.losses.chunk or tokens_at_once(len(matrix), matrix.device.type)
        job = self.loss_job(full, None if teacher is None else self.gather(teacher), chunk)
        found = chunked_losses(
            job,
            [full],
            [matrix.detach()],
            [bool(wanted), needs[3]],
            factor=self.factor,
            onto=[self._gradient_so_far(job.weight_N.dtype) if needs[3] else None],
        )
        grad_full, grad_matrix = found.grad_features[0], found.grad_weights[0]
        ends: list[Tensor] = []
        seeds: list[Tensor | None] = []
        if grad_full is not None and features.requires_grad:
            ends.append(features)
            seeds.append(self.scatter(grad_full.to(job.weight_N.dtype), features).to(features.dtype))
        values = recorded(found)
        if gate is not None:
            with torch.enable_grad():
                right = self.part_of_sequence(found.correct_EN[0], gate)
                loss = gate_loss(gate, right, self.part_of_sequence(job.weight_N, gate))
                ends.append(loss * (self.losses.gate_weight * self.plan.scale))
            seeds.append(None)
            values = replace(values, gate=self._over_sequence(loss.detach()))
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if ends and wanted:
            grads = torch.autograd.grad(ends, wanted, seeds, allow_unused=True)
        by_id = {id(x): grad for x, grad in zip(wanted, grads, strict=True)}
        self.losses.record(self, values)
        return Gradients(
            tap=[by_id.get(id(x)) for x in inputs[:3]],
            matrix=None if grad_matrix is None else grad_matrix.to(self._summed_in(matrix)),
            parameters=[by_id.get(id(x)) for x in inputs[3:]],
            features=features.detach(),
        )

    def _summed_in(self, matrix: Tensor) -> torch.dtype:
        """The dtype that the matrix's gradient has: that of its sums over microbatches (see :func:`sum_in`)."""
        dtype: torch.dtype | None = getattr(self.leaf, "grad_dtype", None)
        return dtype or matrix.dtype

    def _gradient_so_far(self, dtype: torch.dtype) -> Tensor | None:
        """What the matrix has gathered of earlier microbatches, taken out of it: the new gradient is added to it and
        returned in its place, so that there is never a second one of its size."""
        if self.apart or self.leaf is None or self.leaf.grad is None or self.leaf.dtype != dtype:
            return None
        gathered, self.leaf.grad = self.leaf.grad, None
        return gathered

    def _over_sequence(self, value: Tensor) -> Tensor:
        if self.losses.group is not None and self.losses.sequence:
            dist.all_reduce(value, group=self.losses.group)
        return value

    def measure(self, tap: Tap) -> None:
        """Count cross-entropy, accuracy and confidence."""
        full, matrix = self.gather(self.features(tap)), self.matrix()
        chunk = self.losses.chunk or tokens_at_once(len(matrix), matrix.device.type)
        job = self.loss_job(full, None, chunk)
        found = chunked_losses(replace(job, settings=LossSettings()), [full], [matrix], [False, False])
        self.losses.record(self, recorded(found))

    def eager(self, tap: Tap) -> Tensor:
        """The loss with its logits' gradient kept, or computed again in the backward (``how`` "checkpoint")."""

        def run(hidden: Tensor, residual: Tensor | None, normed: Tensor | None) -> tuple[Tensor, ...]:
            matrix = self.matrix().detach() if self.apart else self.matrix()
            out = _Eager.apply(self, self.features(Tap(hidden, residual, normed)), matrix)  # type: ignore[no-untyped-call]
            return tuple(out)

        taps = (tap.hidden, tap.residual, tap.normed)
        if self.losses.how == "checkpoint":
            loss, *values = checkpoint(run, *taps, use_reentrant=False, preserve_rng_state=False)
        else:
            loss, *values = run(*taps)
        self.losses.record(self, Recorded(loss.detach(), *values))
        attached: Tensor = loss
        return attached


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Of the tap's tensors, the matrix and the parameters; and the head's ``features``, detached."""

    tap: list[Tensor | None]
    matrix: Tensor | None
    parameters: list[Tensor | None]
    features: Tensor


def local_part(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter; differentiable."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class _Attach(torch.autograd.Function):
    """The hidden states unchanged; the loss receives the gradient 1 when theirs arrives. A detached copy and not a
    view: a view breaks schedules that split the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return hidden.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones((), dtype=ctx.dtype)


class _Eager(torch.autograd.Function):
    """The fields of :class:`Recorded`; keeps the gradient of the logits, as wide as the vocabulary."""

    @staticmethod
    def forward(ctx: Any, job: HeadJob, features: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        full = job.gather(features)
        loss, correct_N, confidence_N, grad_NK, weight = whole_loss(job.loss_job(full, None, len(full)), full, matrix)
        ctx.job, ctx.like = job, features
        ctx.save_for_backward(full, matrix, grad_NK.to(full.dtype))
        ctx.mark_non_differentiable(weight, correct_N, confidence_N)
        return loss, weight, correct_N, confidence_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        full, matrix, grad_NK = ctx.saved_tensors
        factor = ctx.job.factor * grad
        into_features = ctx.job.scatter((grad_NK @ matrix).to(grad.dtype) * factor, ctx.like).to(full.dtype)
        into_matrix = ((grad_NK.T @ full) * factor).to(matrix.dtype)
        if ctx.job.apart:
            ctx.job.kept = (into_matrix,)
            return None, into_features, None
        return None, into_features, into_matrix


class _Weights(torch.autograd.Function):
    """Gives a head's weights the gradients that its job kept. For schedules that split the backward: these go from the
    ends of a stage's parameters to the nodes that the hidden states passed, and back from each of them. A matrix of two
    heads would lead from one to the other through all that lies between, a second time. This node hangs on the end of
    the stage. As the first that was made it is also the last to run when the backward is not split.
    """

    @staticmethod
    def forward(ctx: Any, job: HeadJob, matrix: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.job = job
        return torch.zeros(1, dtype=matrix.dtype, device=matrix.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.job.kept = ctx.job.kept, None
        assert kept is not None, "the weights of a head came before the head"
        return None, *kept


class _Deferred(torch.autograd.Function):
    """The hidden states (and ``carried``) unchanged, and all of the head in the backward.

    What is trained is an input, so that its gradient goes the usual way through hooks; or one of :class:`_Weights`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        job: HeadJob,
        hidden: Tensor,
        residual: Tensor | None,
        normed: Tensor | None,
        carried: Tensor | None,
        matrix: Tensor,
        *parameters: nn.Parameter,
    ) -> Any:
        ctx.job, ctx.carries = job, carried is not None
        ctx.save_for_backward(hidden, residual, normed, matrix)
        return hidden.detach() if carried is None else (hidden.detach(), carried.detach())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_carried: Tensor | None = None) -> tuple[Tensor | None, ...]:
        hidden, residual, normed, matrix = ctx.saved_tensors
        job, needs = ctx.job, ctx.needs_input_grad
        wanted = [True] * (1 + len(job.parameters())) if job.apart else needs[5:]
        found = job.gradients(Tap(hidden, residual, normed), matrix, grad_carried, [*needs[1:4], *wanted])
        into_hidden, into_residual, into_normed = found.tap
        if needs[1]:
            into_hidden = grad if into_hidden is None else grad + into_hidden
        weights: tuple[Tensor | None, ...] = (found.matrix, *found.parameters)
        if job.apart:
            job.kept, weights = weights, (None,)
        back = found.features if job.final and ctx.carries else grad_carried
        return None, into_hidden, into_residual, into_normed, back, *weights
