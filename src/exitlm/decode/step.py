"""One pass of the pending-token loop: new tokens go in, and either an exit fires or the last layer is reached.

```
advance(tokens): h = embed(tokens); run segment 1
  at an exit: hold h behind the segment; the newest position is tested
      fires      -> stop here: everything held stays pending
      otherwise  -> run the next segment on all that is held, in one pass
  at the end: hidden states of every position that arrived
```
Every (token, layer) is computed once (EE-LLM's KV recomputation runs pending tokens again from layer 1). What a firing
exit means (emit, or draft) is the engine's affair.

Shapes: M new rows, R rows that arrive at the end, D hidden_size, K rows of an exit's output matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from exitlm.decode.cache import Depths, KeyValueCache, boundaries
from exitlm.decode.fused import FusedHead, FusedModel, Rows
from exitlm.decode.graphs import attention_backends
from exitlm.decode.rules import SCORES, ExitRule, certain, decayed, fires

PREFILL_ROWS = 512


@dataclass
class Fired:
    """An exit that fired for the newest position."""

    layer: int
    head: FusedHead
    logits_K: Tensor


@dataclass
class Outcome:
    """``fired`` is the exit that decided, or None; ``final_RD`` the states that reached the end, or None."""

    fired: Fired | None
    final_RD: Tensor | None


class Test(Protocol):
    """Decides at an exit whether the newest position leaves; the three tensors are one row each."""

    def __call__(
        self, head: FusedHead, hidden_1D: Tensor, residual_1D: Tensor, block_1D: Tensor | None
    ) -> Fired | None: ...


@dataclass
class RuleTest:
    """The test of an :class:`ExitRule` for one token: call it at each exit in order.

    ``confidence`` collects the score at each exit tried; ``skip`` names exits that are not tried.
    """

    rule: ExitRule
    position: int = 0
    length: int = 1
    skip: frozenset[int] = frozenset()
    confidence: dict[int, float] = field(default_factory=dict)
    _streak: int = 0
    _previous: int | None = None

    def __call__(
        self, head: FusedHead, hidden_1D: Tensor, residual_1D: Tensor, block_1D: Tensor | None
    ) -> Fired | None:
        layer, name = head.layer, self.rule.name
        if layer in self.skip or layer not in self.rule.thresholds:
            return None
        threshold = self.rule.thresholds[layer]
        score = head.gate(hidden_1D[0]) if name == "gate" else 1.0
        if name == "gate" and not fires(score, threshold):  # without the head's logits
            self.confidence[layer] = score
            return None
        logits = head.logits(hidden_1D, residual_1D, block_1D)[0]
        if name in ("gate", "fixed"):
            score *= certain(logits)
        elif name == "patience":
            token = head.token(int(logits.argmax())) if certain(logits) == 1.0 else None
            self._streak = self._streak + 1 if token == self._previous else 1
            self._previous = token
            score = math.nan if token is None else min(1.0, self._streak / self.rule.patience)
        else:
            score = SCORES[name](logits)
            if name == "decay":
                threshold = decayed(threshold, self.position, self.length)
        self.confidence[layer] = score
        return Fired(layer, head, logits) if fires(score, threshold) else None


class SequenceState:
    """Cache, depths and pending states of one sequence under a set of active exits."""

    def __init__(self, fused: FusedModel, active: Sequence[int], cache: KeyValueCache, capacity: int) -> None:
        self.fused, self.cache, self.capacity = fused, cache, capacity
        cache.reserve(capacity)
        self.rotations, self.reach = fused.rotations(capacity)
        self.segments = boundaries(active, fused.config.num_hidden_layers)
        self.depths = Depths(len(self.segments), 64, fused.config.hidden_size, fused.dtype, fused.device)
        self.layer_rows = 0

    @property
    def length(self) -> int:
        """Positions that have passed the first segment."""
        return self.depths.length

    def advance(self, tokens: Sequence[int], test: Test | None = None, max_pending: int | None = None) -> Outcome:
        """Run new ``tokens``; at each exit ``test`` decides for the newest. When more than ``max_pending`` positions
        would stay pending, the pass goes on to the end for their keys and values, and ``fired`` still tells who
        decided."""
        fused, depths = self.fused, self.depths
        hidden = fused.embed(tokens)
        fired: Fired | None = None
        last = len(self.segments) - 1
        for s, (_, end) in enumerate(self.segments):
            head = None if s == last else fused.heads[end]
            hidden, residual, block = self._segment(s, hidden, head)
            if head is None:
                break
            if test is not None and fired is None:
                if head.block is not None and block is not None:
                    block = head.block.feed_forward(block)
                fired = test(head, hidden[-1:], residual[-1:], block)
            hidden = depths.hold(s, hidden)
            if fired is not None and (max_pending is None or depths.pending <= max_pending):
                depths.high_water = max(depths.high_water, depths.pending)
                return Outcome(fired, None)
        return Outcome(fired, hidden)

    def _segment(self, index: int, hidden_MD: Tensor, head: FusedHead | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run segment ``index`` on its next rows: what comes out, the residual of the last piece and, for a block exit
        ``head`` behind it, the block's stream of the newest row. Rows go in pieces, so that memory is bounded however
        many were pending."""
        fused, depths = self.fused, self.depths
        first, end = self.segments[index]
        block: Tensor | None = None
        out = []
        for piece in torch.split(hidden_MD, PREFILL_ROWS):
            rows = Rows(fused, self.rotations, depths.filled[index], len(piece))
            done, residual = fused.run(piece, first, end, rows, self.cache)
            depths.filled[index] = rows.end
            self.layer_rows += rows.count * (end - first)
            if head is not None and head.block is not None:
                with attention_backends(fused.device):
                    block = head.block.attend(done, rows, self.cache)[-1:]  # every row leaves its key there
            out.append(done)
        return out[0] if len(out) == 1 else torch.cat(out), residual, block

    def prefill(self, tokens: Sequence[int], total: int = 0) -> Tensor:
        """Begin anew: run a text through all layers in pieces of bounded size; the last hidden state ``[1, D]``.

        ``total`` is the length of the text with what is not to be run yet (default: ``tokens``). Where the rotations
        depend on the length (longrope), they are made for it, and ``reach`` says up to which length they hold: a text
        that grows beyond is prefilled again, as in transformers.
        """
        self.truncate(0)
        self.rotations, self.reach = self.fused.rotations(self.capacity, max(total, len(tokens)))
        final: Tensor | None = None
        for at in range(0, len(tokens), PREFILL_ROWS):
            final = self.advance(tokens[at : at + PREFILL_ROWS]).final_RD
        assert final is not None
        return final[-1:]

    def truncate(self, length: int) -> None:
        """Roll back to ``length`` positions at every depth."""
        self.depths.truncate(length)


def expand_logits(head: FusedHead, logits_K: Tensor, vocab_size: int) -> Tensor:
    """Logits of a candidate head over the whole vocabulary ``[V]``: -inf outside of the candidates."""
    if head.candidate_ids is None:
        return logits_K
    return logits_K.new_full((vocab_size,), -torch.inf).index_copy_(0, head.candidate_ids, logits_K)
