"""Exit rules: whether a token leaves at an exit. Pure functions of tensors and numbers.

A rule gives a score in [0, 1]; it fires iff ``threshold < 1 and score >= threshold``, so 1.0 never fires (even on a
saturated softmax) and 0.0 always does. Logits that are not finite give the score NaN, which never fires. Sources:
maximum probability (EE-LLM section 4), margin and decaying threshold (CALM, arXiv 2207.07061), entropy (BranchyNet),
patience (arXiv 2006.04152). The gate is a trained probe and needs no logits at all.

Shapes: T rows of logits, ``[T, K]``; K tokens of the vocabulary or of the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from exitlm.errors import UserError, nearest
from exitlm.values import number

RULES = ("probability", "margin", "entropy", "gate", "patience", "fixed", "decay")
PATIENCE_REACHED = 1.0 - 1e-9  # patience's default threshold on its score, the share of the asked-for agreeing exits
DECAY_RATE = 4.0


def _wide(logits_TK: Tensor) -> Tensor:
    """At least float32: in bfloat16 a probability near 1 would be off by several percent."""
    return logits_TK.float() if logits_TK.dtype in (torch.float16, torch.bfloat16) else logits_TK


def probability(logits_TK: Tensor) -> Tensor:
    """The largest probability of each row."""
    return torch.softmax(_wide(logits_TK), -1).amax(-1).clamp(0.0, 1.0)


def margin(logits_TK: Tensor) -> Tensor:
    """The largest minus the second largest probability of each row."""
    if logits_TK.shape[-1] == 1:
        return certain(logits_TK)
    top = torch.softmax(_wide(logits_TK), -1).topk(2).values
    return top[..., 0] - top[..., 1]


def entropy(logits_TK: Tensor) -> Tensor:
    """One minus the entropy over its maximum log K, for each row: 1 is certain, 0 is uniform."""
    if logits_TK.shape[-1] == 1:
        return certain(logits_TK)
    log_p = torch.log_softmax(_wide(logits_TK), -1)
    found = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
    return (1.0 - found / math.log(logits_TK.shape[-1])).clamp(0.0, 1.0)


def certain(logits_TK: Tensor) -> Tensor:
    """1 for each row, the score of a rule that asks nothing of the logits; NaN where one of them is NaN or plus
    infinity, or all are minus infinity."""
    best = _wide(logits_TK).amax(-1)
    return torch.where(best.isfinite(), 1.0, torch.nan).to(best.dtype)


SCORES = {
    "probability": probability, "margin": margin, "entropy": entropy, "decay": probability, "gate": certain,
    "fixed": certain, "patience": certain,
}  # fmt: skip
"""What each rule reads of an exit's logits, row by row. A gate has its own score, which this one multiplies."""


def fires(score: float, threshold: float) -> bool:
    """The one comparison of all rules."""
    return threshold < 1.0 and score >= threshold


def decayed(threshold: float, position: int, length: int) -> float:
    """CALM's threshold over the output position: ``0.9 * t + 0.1 * exp(-4 * position / length)``, clipped to [0, 1];
    1.0 stays 1.0 and 0.0 stays 0.0."""
    if threshold in (0.0, 1.0):
        return threshold
    return min(1.0, max(0.0, 0.9 * threshold + 0.1 * math.exp(-DECAY_RATE * position / max(1, length))))


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """A rule with its numbers, resolved for a model: one threshold per active exit layer."""

    name: str
    thresholds: Mapping[int, float]
    patience: int = 2

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise UserError(f"rule '{self.name}' is unknown; use one of {', '.join(RULES)}{nearest(self.name, RULES)}")
        for layer, threshold in self.thresholds.items():
            check_threshold(threshold, f"threshold of exit {layer}")
        if self.patience < 1:
            raise UserError(f"patience is {self.patience}, but at least 1 exit must agree; use 1 or more")


@dataclass
class ExitTest:
    """The test of one token by a rule, exit after exit: state of the rule, and the score at each exit tried.

    ``skip`` names exits that are not tried.
    """

    rule: ExitRule
    position: int = 0
    length: int = 1
    skip: frozenset[int] = frozenset()
    confidence: dict[int, float] = field(default_factory=dict)
    _streak: int = 0
    _previous: int | None = None

    def tries(self, layer: int) -> bool:
        """Whether the exit at this layer is tried."""
        return layer in self.rule.thresholds and layer not in self.skip

    def fires(self, layer: int, score: float, token: int | None = None) -> bool:
        """Note the score of the exit at ``layer`` (see :data:`SCORES`) and its best ``token``: whether it fires."""
        threshold = self.rule.thresholds[layer]
        if self.rule.name == "patience":
            token = None if math.isnan(score) else token
            self._streak = self._streak + 1 if token == self._previous else 1
            self._previous = token
            score = math.nan if token is None else min(1.0, self._streak / self.rule.patience)
        elif self.rule.name == "decay":
            threshold = decayed(threshold, self.position, self.length)
        self.confidence[layer] = score
        return fires(score, threshold)


def check_threshold(threshold: Any, what: str = "threshold") -> float:
    """The threshold as a float. One that is not a number, is NaN or lies outside of [0, 1] is refused."""
    found = number(threshold, what, "a number between 0 (always exit) and 1 (never exit)")
    if not 0.0 <= found <= 1.0:  # NaN fails the comparison
        raise UserError(f"{what} is {found}, but must lie between 0 (always exit) and 1 (never exit)")
    return found
