"""A pipeline stage: some layers, the exits among them, and what the ends of the model need.

A stage owns its exits, so that a schedule knows nothing of them (EE-LLM, arXiv 2312.04916, section 3.1 and Proposition
3.1: back-propagate the own losses plus <gradient from the next stage, hidden>). How a loss is attached to the hidden
states is given from outside (:class:`Losses`). Every tensor has its global name. Not here: schedules and messages.

Shapes: B rows of a microbatch, T positions (in hidden states this rank's part of them under sequence parallelism), D
hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from exitlm.model.config import SLIDING, ModelConfig
from exitlm.model.decoder import EarlyExitModel, attention_mask
from exitlm.model.exits import ExitConfig, ExitHead
from exitlm.model.layers import AttentionContext, DecoderLayer, Tap
from exitlm.parallel.pipeline.split import Split

FINAL = 0
"""What stands for the final head where exits go by their layers: there may be an exit at the last layer, too."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What a step asks of every stage, as plain data.

    ``weights``: the weight of each exit's loss by layer, the final head's under ``FINAL``; one that is not named rests.
    ``shares``: what a token counts in the mean of each loss. ``scale`` multiplies every loss (fp16). ``dropped``:
    layers (0-based) that a microbatch skips. ``bottom``: microbatches that go back through the last stages only, from
    stage ``bottom[m]`` on; there a token counts ``bottom_share``. ``measure``: losses are counted, nothing is trained.
    """

    weights: Mapping[int, float]
    shares: Mapping[int, float]
    scale: float = 1.0
    dropped: Mapping[int, frozenset[int]] = field(default_factory=dict)
    bottom: Mapping[int, int] = field(default_factory=dict)
    bottom_share: float = 0.0
    measure: bool = False

    def share(self, layer: int, microbatch: int) -> float:
        """What a token of a microbatch counts in the loss of the exit after ``layer``."""
        return self.bottom_share if microbatch in self.bottom else self.shares[layer]


@dataclass(frozen=True)
class Position:
    """A head on this stage: the exit after ``layer``, or the final one (``layer`` is ``FINAL``, ``exit`` None)."""

    layer: int
    exit: ExitHead | None
    model: EarlyExitModel
    context: AttentionContext


class Loss(Protocol):
    """The loss of a head on one microbatch."""

    def weights(self) -> Tensor | None:
        """Asked once, before any layer runs: a tensor [1] to back-propagate last, for the gradients of the head's
        weights. None where :meth:`attach` sees to them."""
        ...

    def attach(self, tap: Tap, carried: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The hidden states unchanged, and ``carried``, such that back-propagation through them adds the loss."""
        ...


class Losses(Protocol):
    """The losses of all heads."""

    def __call__(self, position: Position, labels_BT: Tensor, plan: StepPlan, microbatch: int) -> Loss:
        """That of one head."""
        ...


class FrozenOutput(NamedTuple):
    """What the layers of a frozen stage give: hidden states for the next one, what its exits read by layer, and on the
    last stage the final head's features, where exits learn from them."""

    hidden: Tensor
    taps: dict[int, tuple[Tensor | None, ...]]
    features: Tensor | None


class Stage(nn.Module):
    """The layers ``split.layers(index)`` of a model with their exits, built on the current default device.

    ``carries``: beside the hidden states a second tensor goes up through the stages, and what comes back on it are the
    final head's features, which exits learn from. ``frozen``: only exits are trained.
    """

    def __init__(
        self,
        config: ModelConfig,
        exits: Sequence[ExitConfig],
        split: Split,
        index: int,
        losses: Losses,
        *,
        carries: bool = False,
        frozen: bool = False,
        recompute: bool = False,
        across_documents: bool = False,
        dtype: torch.dtype = torch.float32,
        candidate_ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.index, self.split, self.losses, self.dtype = index, split, losses, dtype
        self.first, self.last = index == 0, index == split.stages - 1
        self.final, self.carries, self.frozen = split.final and self.last, carries, frozen
        self.recompute, self.across_documents = recompute, across_documents
        self.plan: StepPlan | None = None
        self.model = EarlyExitModel(config, split.layers(index))
        mine = [e for e in exits if e.layer in split.exits(index)]
        for e in sorted(mine, key=lambda e: e.layer):
            self.model.exits[str(e.layer)] = ExitHead(e, config, candidate_ids)
        reads_final = self.final or any(e.output == "shared" for e in mine) or (carries and bool(mine))
        if not self.first:
            del self.model.model.embed_tokens
        if not self.final:
            del self.model.model.norm
        if not reads_final:
            del self.model.lm_head
        self.tie()

    @property
    def layers(self) -> range:
        """The 0-based layers of this stage."""
        return self.split.layers(self.index)

    def tie(self) -> None:
        """Make the copies of a matrix on this stage one parameter; again after they were cut over tensor ranks."""
        sharing = [head for head in self.model.exit_heads().values() if head.config.output == "exits"]
        for head in sharing[1:]:
            head.output.weight = sharing[0].output.weight
        if self.model.config.tie_word_embeddings and self.first and "lm_head" in dict(self.model.named_children()):
            self.model.lm_head.weight = self.model.model.embed_tokens.weight

    def tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter once, by its global name."""
        return self.model.named_parameters()

    def forward(
        self,
        x: Tensor,
        carried: Tensor | None = None,
        *,
        labels: Tensor,
        documents: Tensor,
        microbatch: Tensor | int,
        plan: StepPlan | None = None,
        taps: Mapping[int, tuple[Tensor | None, ...]] | None = None,
    ) -> Any:
        """Ids [B, T] or hidden states [B, T, D] in; out comes what :meth:`_whole`, or on a frozen stage :meth:`_layers`
        and, given ``taps``, :meth:`_exits` say. ``documents`` [B, T] numbers the pieces of each row, on the CPU.
        ``plan`` None is the attribute of that name: torch's schedules pass tensors only."""
        plan = plan or self.plan
        assert plan is not None
        number = microbatch if isinstance(microbatch, int) else int(microbatch.reshape(-1)[0])
        context = self.context(documents, labels.device)
        if taps is not None:
            return self._exits(taps, x if self.carries else None, context, labels, plan, number)
        hidden = self.model.embed(x) if self.first else x
        if self.frozen and not plan.measure:
            return self._layers(hidden, context)
        return self._whole(hidden, carried, context, labels, plan, number)

    def _whole(
        self,
        hidden: Tensor,
        carried: Tensor | None,
        context: AttentionContext,
        labels: Tensor,
        plan: StepPlan,
        number: int,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states, and ``carried`` beside them where the model carries; the last stage gives a tensor [1] whose
        back-propagation is that of all losses."""
        if self.carries and carried is None and not plan.measure:
            carried = torch.zeros_like(hidden).requires_grad_()
        heads = dict(self.model.exit_heads()) | ({FINAL: None} if self.final else {})
        losses = {
            layer: self.losses(Position(layer, head, self.model, context), labels, plan, number)
            for layer, head in heads.items()
            if layer in plan.weights
        }
        ends = [end for loss in losses.values() if (end := loss.weights()) is not None]
        dropped = plan.dropped.get(number, frozenset())
        tap = Tap(hidden)
        for done in range(self.layers.start, self.layers.stop + 1):
            if done > self.layers.start and done - 1 not in dropped:
                tap = self._run(done - 1, tap.hidden, context)
            if done in losses and done != FINAL:
                hidden, carried = losses[done].attach(tap, carried)
                tap = replace(tap, hidden=hidden)
        if FINAL in losses:
            hidden, carried = losses[FINAL].attach(Tap(tap.hidden), carried)
            tap = Tap(hidden)
        out = Anchor.attach(None, carried, tap.hidden) if self.last else tap.hidden
        if ends:  # one node that all hang on, and none of Python: what torch 2.11 can begin a second half at
            out = out + torch.cat(ends).sum().to(out.dtype)
        return out if self.last or carried is None else (out, carried)

    @torch.no_grad()
    def _layers(self, hidden: Tensor, context: AttentionContext) -> FrozenOutput:
        """The pass of a frozen stage."""
        mine = self.split.exits(self.index)
        taps: dict[int, tuple[Tensor | None, ...]] = {}
        tap = Tap(hidden)
        for done in range(self.layers.start, self.layers.stop + 1):
            if done > self.layers.start:
                tap = self._run(done - 1, tap.hidden, context)
            if done in mine:
                taps[done] = (tap.hidden, tap.residual, tap.normed)
        features = self.model.final_features(tap.hidden) if self.final and self.carries else None
        return FrozenOutput(tap.hidden, taps, features)

    def _exits(
        self,
        taps: Mapping[int, tuple[Tensor | None, ...]],
        features: Tensor | None,
        context: AttentionContext,
        labels: Tensor,
        plan: StepPlan,
        number: int,
    ) -> Tensor | None:
        """A tensor [1] whose back-propagation is that of the losses of a frozen stage's exits; None without any.
        ``features``: those of the final head."""
        carried = None if features is None else torch.zeros_like(features).requires_grad_()
        passed = []
        for layer, (hidden, residual, normed) in taps.items():
            if layer in plan.weights:
                assert hidden is not None
                head = self.model.exits[str(layer)]
                position = Position(layer, head, self.model, context)
                trained = any(p.requires_grad for p in head.parameters())  # if not, its loss is to be counted still
                tap = Tap(hidden.detach().requires_grad_(not trained), residual, normed)
                hidden, carried = self.losses(position, labels, plan, number).attach(tap, carried)
                passed.append(hidden)
        if not passed:
            return None
        return Anchor.attach(features, carried, *passed)

    def _run(self, index: int, hidden: Tensor, context: AttentionContext) -> Tap:
        """One layer; what an ``mlp`` exit reads of it comes along where there is one."""
        layer: DecoderLayer = self.model.model.layers[str(index)]
        number = str(index + 1)
        inside = number in self.model.exits and self.model.exits[number].config.kind == "mlp"
        run = layer.parts if inside else layer
        if self.recompute and not self.frozen:
            out = checkpoint(run, hidden, context, use_reentrant=False, preserve_rng_state=False)
        else:
            out = run(hidden, context)
        return Tap(*out) if inside else Tap(out)

    def context(self, documents_BT: Tensor, device: torch.device) -> AttentionContext:
        """Positions and masks: each piece of a row is a sequence of its own, unless they are read ``across``."""
        rows, count = documents_BT.shape
        places = torch.arange(count, device=device).expand(rows, count)
        if self.across_documents or not bool(documents_BT.any()):
            return self.model.context(places, dtype=self.dtype)
        documents = documents_BT.to(device)
        begins = documents != F.pad(documents[:, :-1], (1, 0), value=-1)
        positions = places - torch.where(begins, places, 0).cummax(1).values
        context = self.model.context(positions, dtype=self.dtype)
        same = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
        masks: dict[str, Tensor | None] = {}
        for kind in context.masks:
            window = self.model.config.sliding_window if kind == SLIDING else None
            mask = attention_mask(count, 0, window=window, device=device)
            masks[kind] = same if mask is None else same & mask
        return replace(context, masks=masks)


class Anchor(torch.autograd.Function):
    """A tensor [1] to begin back-propagation at: ``carried`` receives ``features`` (None: zeros), the hidden states
    zeros, and the losses on the way add theirs."""

    @staticmethod
    def forward(ctx: Any, features: Tensor | None, carried: Tensor | None, *hidden: Tensor) -> Tensor:
        ctx.features, ctx.carries = features, carried is not None
        ctx.like = [(x.shape, x.dtype, x.device) for x in hidden]
        return torch.zeros(1, dtype=hidden[0].dtype, device=hidden[0].device)

    @classmethod
    def attach(cls, features: Tensor | None, carried: Tensor | None, *hidden: Tensor) -> Tensor:
        """The tensor for these."""
        end: Tensor = cls.apply(features, carried, *hidden)  # type: ignore[no-untyped-call]
        return end

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        carried = None
        if ctx.carries:
            carried = ctx.features if ctx.features is not None else zeros[0].clone()
        return (None, carried, *zeros)
