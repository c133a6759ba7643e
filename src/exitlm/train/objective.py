"""The losses of exits as pure functions of tensors: chunked cross-entropy and distillation, the gate, the schedules.

Follows EE-LLM (arXiv 2312.04916, section 3) for the weighted losses and the confidence weights, EE-Tuning (arXiv
2402.00518) for the frozen backbone. This file knows neither modules nor data, and draws no random number of its own.

Under tensor parallelism every rank has some rows of each matrix (:class:`VocabularyPart`); sums over the vocabulary are
then sums over the ranks, and what is returned by token is the same on all of them.

Shapes: N tokens, D width of the features, V vocab_size, K rows of a head's matrix on this rank (V, or the ids it is
restricted to), E heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 32 << 20
SIZE_STEP = 512


@dataclass(frozen=True, kw_only=True)
class HeadInput:
    """What one head multiplies: ``features_ND @ weight_KD.T``; ``ids_K`` (sorted) names the rows, None all of them."""

    features_ND: Tensor
    weight_KD: Tensor
    ids_K: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The final head: ``features_ND @ weight_VD.T``. ``argmax_N`` and ``lse_N`` (log-sum-exp of the logits divided by
    the distillation temperature) spare the full product where every student is restricted to ids."""

    features_ND: Tensor
    weight_VD: Tensor
    argmax_N: Tensor | None = None
    lse_N: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """``(1 - distill) * CE + distill * temperature**2 * KL(teacher || exit)``, each token times its weight.

    For a head restricted to ids, KL compares with the teacher's distribution within these ids. ``renormalise`` False
    (candidates) weights each token with the teacher's probability of all of them, so that tokens which the candidates
    don't cover count less; True (sampled vocabulary) does not."""

    distill: float = 0.0
    temperature: float = 1.0
    confidence_weighted: bool = False
    confidence_temperature: float = 1.0
    renormalise: bool = False


@dataclass(frozen=True, kw_only=True)
class VocabularyPart:
    """The rows of the output matrices that this rank has: from ``first`` on. The ranks of ``group`` have the whole
    vocabulary between them."""

    group: dist.ProcessGroup
    first: int

    def total(self, *sums_N: Tensor) -> tuple[Tensor, ...]:
        """Each of the tensors, summed over the ranks."""
        joined = torch.stack(sums_N)
        dist.all_reduce(joined, group=self.group)
        return tuple(joined.unbind(0))

    def largest(self, value_N: Tensor) -> Tensor:
        """The largest value of the ranks."""
        out = value_N.clone()
        dist.all_reduce(out, dist.ReduceOp.MAX, group=self.group)
        return out


@dataclass(frozen=True, kw_only=True)
class LossResult:
    """``loss_E``: weighted sums, differentiable. ``correct_EN``: the exit's best id is the teacher's (the label where
    there is no teacher). ``confidence_EN``: the exit's largest probability."""

    loss_E: Tensor
    correct_EN: Tensor
    confidence_EN: Tensor


def linear_losses(
    heads: Sequence[HeadInput],
    weight_N: Tensor,
    *,
    labels_N: Tensor | None = None,
    teacher: Teacher | None = None,
    settings: LossSettings,
    chunk: int | None = None,
) -> LossResult:
    """Loss, agreement and confidence of several heads without ever holding ``[N, V]``: loss and gradient are computed
    ``chunk`` tokens at a time (default: about 32 MiB of logits) in one pass, the teacher's logits once for all heads.

    ``weight_N`` holds each token's share (such as 1 / valid tokens of the batch). Gradients reach features and weights
    of the heads; never the teacher. Logits are reduced in float32 (float64 for float64 inputs)."""
    assert heads
    assert labels_N is not None or teacher is not None
    assert settings.distill == 0.0 or teacher is not None, "distillation needs a teacher"
    assert settings.distill == 1.0 or labels_N is not None, "cross-entropy needs labels"
    widest = max(len(h.weight_KD) for h in heads)
    job = LossJob(
        ids=tuple(h.ids_K for h in heads),
        weight_N=weight_N,
        labels_N=labels_N,
        teacher=teacher,
        settings=settings,
        chunk=chunk or chunk_tokens(widest),
    )
    flat = [t for h in heads for t in (h.features_ND, h.weight_KD)]
    loss_E, correct_EN, confidence_EN = _ChunkedLosses.apply(job, *flat)  # type: ignore[no-untyped-call]
    return LossResult(loss_E=loss_E, correct_EN=correct_EN, confidence_EN=confidence_EN)


def chunk_tokens(vocab_size: int, limit: int = CHUNK_BYTES) -> int:
    """How many tokens' logits (float32) make at most ``limit`` bytes: a power of two, so that few shapes occur, at
    least 16."""
    return 1 << max(4, int(math.log2(max(16, limit // (4 * vocab_size)))))


@dataclass(frozen=True, kw_only=True)
class LossJob:
    """What the losses of several heads on one list of tokens share; ``ids`` as in :class:`HeadInput`, those of this
    rank's rows where there is a ``part``."""

    ids: tuple[Tensor | None, ...]
    weight_N: Tensor
    labels_N: Tensor | None
    teacher: Teacher | None
    settings: LossSettings
    chunk: int
    part: VocabularyPart | None = None


class Scratch:
    """``[chunk, K]`` matrices, allocated once: fresh pages for every chunk cost as much as a softmax, and large blocks
    that come and go between small ones that stay leave holes in the heap."""

    def __init__(self, chunk: int, device: torch.device) -> None:
        self.chunk, self.device = chunk, device
        self.held: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def get(self, name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        key = (name, width, dtype)
        if key not in self.held:
            self.held[key] = torch.empty(self.chunk, width, dtype=dtype, device=self.device)
        return self.held[key][:rows]

    def product(self, name: str, x_nD: Tensor, weight_KD: Tensor, wide: torch.dtype) -> Tensor:
        """``x @ weight.T`` in the dtype of ``x``, then as ``wide``."""
        n, width = len(x_nD), len(weight_KD)
        narrow = self.get(name, n, width, x_nD.dtype)
        torch.mm(x_nD, weight_KD.T, out=narrow)
        return narrow if narrow.dtype == wide else self.get(name, n, width, wide).copy_(narrow)


@dataclass(frozen=True, kw_only=True)
class Chunked:
    """Values as in :class:`LossResult`, and the gradients of each loss for features and matrix (None where not asked
    for); under tensor parallelism those for the features are this rank's part of a sum. ``weight_E`` is the sum of the
    tokens' weights, confidences among their factors where these weigh."""

    loss_E: Tensor
    weight_E: Tensor
    correct_EN: Tensor
    confidence_EN: Tensor
    grad_features: list[Tensor | None]
    grad_weights: list[Tensor | None]


@torch.no_grad()
def chunked_losses(
    job: LossJob,
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    needs: Sequence[bool],
    *,
    factor: float = 1.0,
    onto: Sequence[Tensor | None] = (),
) -> Chunked:
    """Losses and gradients, ``job.chunk`` tokens at a time. ``needs`` says for features and matrix of each head in turn
    whether its gradient is wanted. Gradients are those of ``factor`` times the losses; those of a matrix are added to
    its tensor in ``onto``, in place, where there is one."""
    N, E, device = len(job.weight_N), len(features), features[0].device
    wide = torch.promote_types(features[0].dtype, torch.float32)
    buffers = Scratch(min(job.chunk, N), device)
    loss_E, weight_E = torch.zeros(2, E, dtype=wide, device=device)
    correct_EN = torch.zeros(E, N, dtype=torch.bool, device=device)
    confidence_EN = torch.zeros(E, N, dtype=wide, device=device)
    grad_features = [torch.empty_like(f) if needs[2 * e] else None for e, f in enumerate(features)]
    before = onto or [None] * E
    grad_weights = [
        (torch.empty_like(w, dtype=wide) if b is None else b) if needs[2 * e + 1] else None
        for e, (w, b) in enumerate(zip(weights, before, strict=True))
    ]
    for start in range(0, N, job.chunk):
        span = slice(start, start + job.chunk)
        teacher = _TeacherChunk(job, span, wide, buffers)
        for e in range(E):
            x, W = features[e][span], weights[e]
            logits = buffers.product("logits", x, W, wide)
            wants = needs[2 * e] or needs[2 * e + 1]
            loss, correct, confidence, weight_n, grad = chunk_loss(
                job, span, logits, job.ids[e], teacher, buffers, wants
            )
            loss_E[e] += loss
            weight_E[e] += weight_n.sum()
            correct_EN[e, span] = correct
            confidence_EN[e, span] = confidence
            if not wants:
                continue
            if x.dtype != wide:
                grad = buffers.get("logits", len(x), len(W), x.dtype).copy_(grad)
            weight_n1 = (weight_n * factor)[:, None]  # wide: rounded, one weight of all would scale the whole gradient
            if (into := grad_features[e]) is not None:
                into[span] = (grad @ W) * weight_n1
            if (sums := grad_weights[e]) is not None:
                first = start == 0 and before[e] is None
                add_product(sums, grad.T, (x * weight_n1).to(x.dtype), first)
    return Chunked(
        loss_E=loss_E,
        weight_E=weight_E,
        correct_EN=correct_EN,
        confidence_EN=confidence_EN,
        grad_features=grad_features,
        grad_weights=grad_weights,
    )


def add_product(sums_KD: Tensor, a_Kn: Tensor, b_nD: Tensor, first: bool) -> None:
    """Add ``a @ b`` to ``sums``, or put it there if it is the ``first``. Where dtypes differ, a CPU does it in blocks
    that stay in its cache: in one piece it takes three times as long."""
    if sums_KD.dtype == a_Kn.dtype:
        sums_KD.addmm_(a_Kn, b_nD, beta=0 if first else 1)
        return
    rows = 4096 if sums_KD.device.type == "cpu" else max(1, len(sums_KD))
    for start in range(0, len(sums_KD), rows):
        part = a_Kn[start : start + rows] @ b_nD
        if first:
            sums_KD[start : start + rows] = part
        else:
            sums_KD[start : start + rows] += part


@torch.no_grad()
def whole_loss(job: LossJob, features_ND: Tensor, weight_KD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of one head on all tokens at once: the loss, correct and confidence by token as in :class:`LossResult`, the
    gradient of the loss with respect to the logits ``[N, K]``, and the sum of the tokens' weights."""
    wide = torch.promote_types(features_ND.dtype, torch.float32)
    span, buffers = slice(0, len(features_ND)), Scratch(len(features_ND), features_ND.device)
    logits = buffers.product("logits", features_ND, weight_KD, wide)
    teacher = _TeacherChunk(job, span, wide, buffers)
    loss, correct_N, confidence_N, weight_N, grad = chunk_loss(job, span, logits, job.ids[0], teacher, buffers, True)
    return loss, correct_N, confidence_N, grad.mul_(weight_N[:, None]), weight_N.sum()


class _ChunkedLosses(torch.autograd.Function):
    """Gradients are made in the forward, chunk by chunk, and only scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, job: LossJob, *flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = chunked_losses(job, flat[0::2], flat[1::2], ctx.needs_input_grad[1:])
        ctx.grads = [g for pair in zip(found.grad_features, found.grad_weights, strict=True) for g in pair]
        ctx.dtypes = [t.dtype for t in flat]
        ctx.mark_non_differentiable(found.correct_EN, found.confidence_EN)
        return found.loss_E, found.correct_EN, found.confidence_EN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_E: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if g is None else (g * grad_E[i // 2].to(g.dtype)).to(ctx.dtypes[i]) for i, g in enumerate(ctx.grads)
        ]
        return (None, *grads)


@dataclass(frozen=True)
class _Softmax:
    """Probabilities [n, K] and, by token: the largest one, log-sum-exp, and the id of the largest. ``out`` may be the
    logits themselves: every element is read before it is written."""

    q: Tensor
    peak: Tensor
    lse: Tensor
    best: Tensor


def _softmax(logits: Tensor, ids: Tensor | None, part: VocabularyPart | None, out: Tensor) -> _Softmax:
    if part is None:
        top, at = logits.max(-1)
        q = torch.softmax(logits, -1, out=out)
        peak = q.gather(1, at[:, None])[:, 0]
        return _Softmax(q, peak, top - peak.log(), at if ids is None else ids[at])
    if logits.shape[1]:
        mine, at = logits.max(-1)
    else:  # a rank may have no row of a restricted head
        mine, at = (logits.new_full((len(logits),), x) for x in (-torch.inf, 0))
    top = part.largest(mine)
    q = torch.sub(logits, top[:, None], out=out).exp_()
    (mass,) = part.total(q.sum(-1))
    q /= mass[:, None]
    best = at.long() if ids is None else ids[at.long()] if len(ids) else at.long()
    best = best + part.first if ids is None else best
    best = -part.largest(torch.where(mine == top, -best, -(1 << 40)))  # of equal ones the first, as without ranks
    return _Softmax(q, 1.0 / mass, top + mass.log(), best)


class _TeacherChunk:
    """The teacher's logits of one chunk, computed once for every set of ids that a head asks for."""

    def __init__(self, job: LossJob, span: slice, wide: torch.dtype, buffers: Scratch) -> None:
        self.job, self.span, self.wide, self.teacher, self.buffers = job, span, wide, job.teacher, buffers
        self.cache: dict[int, tuple[Tensor, Tensor, Tensor | float]] = {}
        self.full: Tensor | None = None
        self.argmax: Tensor | None = None
        if self.teacher is None:
            return
        restricted = all(ids is not None for ids in job.ids)
        spared = job.settings.distill == 0.0 or job.settings.renormalise or self.teacher.lse_N is not None
        if self.teacher.argmax_N is None or not (restricted and spared):
            self.full = buffers.product("teacher", self.teacher.features_ND[span], self.teacher.weight_VD, wide)
        if self.teacher.argmax_N is not None:
            self.argmax = self.teacher.argmax_N[span]
        elif self.full is not None and job.part is None:
            self.argmax = self.full.max(-1).indices
        elif self.full is not None:
            q = buffers.get("q", len(self.full), self.full.shape[1], wide)
            self.argmax = _softmax(self.full, None, job.part, q).best

    def distribution(self, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | float]:
        """``(p [n, K], sum of p log(p / mass) [n], mass [n])`` at the distillation temperature; mass is the sum of p, a
        number where it is 1. Sums over this rank's rows only."""
        key = 0 if ids is None else id(ids)
        if key not in self.cache:
            self.cache[key] = self._distribution(ids, key)
        return self.cache[key]

    def _distribution(self, ids: Tensor | None, key: int) -> tuple[Tensor, Tensor, Tensor | float]:
        assert self.teacher is not None
        tau, part = self.job.settings.temperature, self.job.part
        rows = ids if ids is None or part is None else ids - part.first
        if rows is None:
            assert self.full is not None
            scaled = self.full
        elif self.full is not None:
            scaled = self.full[:, rows]
        else:
            x, W = self.teacher.features_ND[self.span], self.teacher.weight_VD[rows]
            scaled = self.buffers.product(f"teacher{key}", x, W, self.wide)
        if tau != 1.0:
            scaled = scaled / tau
        p = self.buffers.get(f"p{key}", len(scaled), scaled.shape[1], self.wide)
        if ids is None or self.job.settings.renormalise:
            lse = _softmax(scaled, ids, part, p).lse
            return p, _summed(part, torch.linalg.vecdot(p, scaled)) - lse, 1.0
        if self.teacher.lse_N is not None:
            lse = self.teacher.lse_N[self.span].to(self.wide)
        else:
            assert self.full is not None
            if part is None:
                lse = (self.full / tau).logsumexp(-1)
            else:
                lse = _softmax(self.full / tau, None, part, torch.empty_like(self.full)).lse
        torch.sub(scaled, lse[:, None], out=p).exp_()
        mass = _summed(part, p.sum(-1))
        return p, _summed(part, torch.linalg.vecdot(p, scaled)) - mass * lse - torch.xlogy(mass, mass), mass


def _summed(part: VocabularyPart | None, value_n: Tensor) -> Tensor:
    """``value_n`` over the whole vocabulary."""
    return value_n if part is None else part.total(value_n)[0]


def chunk_loss(
    job: LossJob, span: slice, logits: Tensor, ids: Tensor | None, teacher: _TeacherChunk, buffers: Scratch, wants: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(loss, correct [n], confidence [n], weight [n], grad [n, K])`` of one head in one chunk. If ``wants``, ``grad``
    is the gradient of the unweighted loss with respect to the logits, in one of the buffers: (1 - distill) (q - onehot)
    for the cross-entropy, distill * tau (mass * q_tau - p) for the distillation. Rows of weight 0 may hold anything."""
    s, tau, part = job.settings, job.settings.temperature, job.part
    labels = None if job.labels_N is None else job.labels_N[span]
    plain = s.distill == 0.0 and ids is None  # only the cross-entropy: q may take the place of the logits
    column, has = _columns(labels, ids, logits.shape[1], part) if labels is not None else (None, None)
    at_label = torch.zeros(len(logits), dtype=logits.dtype, device=logits.device)
    if column is not None and logits.shape[1]:
        at_label = logits.gather(1, column[:, None])[:, 0]
    sure = None
    if s.confidence_weighted and s.confidence_temperature != 1.0:
        warm = logits / s.confidence_temperature
        sure = _softmax(warm, ids, part, warm).peak
    own = _softmax(logits, ids, part, logits if plain else buffers.get("q", len(logits), logits.shape[1], logits.dtype))
    q, confidence, lse = own.q, own.peak, own.lse
    reference = teacher.argmax if teacher.argmax is not None else labels
    assert reference is not None
    correct = own.best == reference
    weight_n = job.weight_N[span].to(logits.dtype)
    if s.confidence_weighted:
        weight_n = weight_n * (confidence if sure is None else sure)

    loss_n = torch.zeros_like(lse)
    keep_n: Tensor | float = 0.0  # the factor of q in the gradient, by token
    mine = p = None
    if s.distill < 1.0:
        assert has is not None
        known = mine = has.to(logits.dtype) * (1.0 - s.distill)
        if part is not None:
            known, at_label = part.total(mine, torch.where(has, at_label, 0.0))
        loss_n = known * (lse - at_label)
        keep_n = known
    if s.distill > 0.0:
        p, negative_entropy, mass = teacher.distribution(ids)
        cross = _summed(part, torch.linalg.vecdot(p, logits)) / tau
        if tau == 1.0:
            keep_n = keep_n + s.distill * mass
            lse_tau, soft = lse, None
        else:
            warm = logits / tau
            soft = _softmax(warm, ids, part, torch.empty_like(warm))
            lse_tau = soft.lse
        loss_n = loss_n + s.distill * tau**2 * (negative_entropy - cross + mass * lse_tau)
    loss = (loss_n * weight_n).sum()
    if not wants:
        return loss, correct, confidence, weight_n, logits

    if plain and column is not None and mine is not None:
        if logits.shape[1]:
            q.scatter_add_(1, column[:, None], -mine[:, None])
        return loss, correct, confidence, weight_n, q
    if s.distill == 1.0 and tau == 1.0 and isinstance(keep_n, float):
        assert p is not None
        torch.sub(q, p, out=logits)
        return loss, correct, confidence, weight_n, logits
    torch.mul(q, keep_n[:, None] if isinstance(keep_n, Tensor) else keep_n, out=logits)
    if p is not None:
        logits.sub_(p, alpha=s.distill * tau)
        if soft is not None:
            factor = s.distill * tau * (mass[:, None] if isinstance(mass, Tensor) else mass)
            logits.add_(soft.q.mul_(factor))
    if column is not None and mine is not None and logits.shape[1]:
        logits.scatter_add_(1, column[:, None], -mine[:, None])
    return loss, correct, confidence, weight_n, logits


def _columns(labels: Tensor, ids: Tensor | None, width: int, part: VocabularyPart | None) -> tuple[Tensor, Tensor]:
    """The column of each label among this rank's ``width`` ones (any where it has none), and whether it has one."""
    if ids is not None:
        if not width:
            return torch.zeros_like(labels), torch.zeros_like(labels, dtype=torch.bool)
        column = torch.searchsorted(ids, labels).clamp_(max=width - 1)
        return column, ids[column] == labels
    column = labels if part is None else labels - part.first
    return column.clamp(0, width - 1), (column >= 0) & (column < width) & (labels >= 0)


def gate_loss(gate_logit_N: Tensor, correct_N: Tensor, weight_N: Tensor) -> Tensor:
    """Weighted sum of the binary cross-entropy of "this exit's argmax is the final argmax"."""
    losses = F.binary_cross_entropy_with_logits(gate_logit_N, correct_N.to(gate_logit_N.dtype), reduction="none")
    return (losses * weight_N.to(losses.dtype)).sum()


def exit_weight(step: int, initial: float, target: float, steps: int, shape: str) -> float:
    """The weight of an exit's loss at ``step``: from ``initial`` to ``target`` over ``steps``, up or down, along a line
    or half a cosine (EE-LLM section 3.1.2)."""
    done = 1.0 if steps == 0 else min(1.0, step / steps)
    if shape == "cosine":
        done = 0.5 * (1.0 - math.cos(math.pi * done))
    return initial + (target - initial) * done


def sampled_vocabulary(
    needed_ids: Tensor, frequent_ids: Tensor, vocab_size: int, count: int, generator: torch.Generator
) -> Tensor:
    """Sorted distinct ids for one step of the candidate loss: those that the batch needs (labels, the teacher's best),
    ``count // 2`` draws from the frequent ids and as many from the whole vocabulary (rare ids must be among them),
    which also fills up to a multiple of ``SIZE_STEP`` in large vocabularies, so that few shapes occur."""
    half = count // 2
    chosen = torch.zeros(vocab_size, dtype=torch.bool)
    chosen[needed_ids.reshape(-1).cpu().long()] = True
    chosen[frequent_ids[torch.randint(len(frequent_ids), (half,), generator=generator)]] = True
    uniform = torch.randperm(vocab_size, generator=generator)
    chosen[uniform[: count - half]] = True
    if vocab_size >= 16 * SIZE_STEP:
        rest = uniform[~chosen[uniform]]
        chosen[rest[: -int(chosen.sum()) % SIZE_STEP]] = True
    return chosen.nonzero()[:, 0]


def candidate_vocabulary(counts_V: Tensor, special_ids: Sequence[int], size: int) -> Tensor:
    """The ids for heads with up to ``size`` candidates, best first: all special ids, then the most frequent ones; ties
    and unseen tokens go to the lower id, which BPE vocabularies give to the more frequent token."""
    assert 0 < size <= len(counts_V)
    rank = counts_V.long().clone()
    if special_ids:
        rank[torch.tensor(sorted(set(special_ids)))] = torch.iinfo(torch.long).max
    return rank.sort(descending=True, stable=True).indices[:size]
