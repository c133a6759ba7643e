"""Logits of some rows with what is read of each at once: the best token, and whether all are numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from exitlm.decode.sampling.sampler import finite_rows


@dataclass(frozen=True, slots=True)
class Scores:
    """``logits_MK`` ``[M, K]``; ``best`` is the first of each row's largest (no meaning where it is not ``finite``).
    ``probability`` is the largest probability of each row, where it came with the logits (no meaning, either)."""

    logits_MK: Tensor
    best: list[int]
    finite: list[bool]
    probability: list[float] | None = None

    @classmethod
    def of(cls, logits_MK: Tensor) -> Scores:
        """Look at logits."""
        return cls(logits_MK, logits_MK.argmax(-1).tolist(), finite_rows(logits_MK))


def log_probabilities(raw_V: Tensor, token: int, most: int) -> tuple[float, dict[int, float]]:
    """The log-probability of ``token`` and of the ``most`` likely tokens, under logits ``[V]``."""
    log_p = torch.log_softmax(raw_V.float() if raw_V.dtype != torch.float64 else raw_V, -1)
    if not most:
        return float(log_p[token]), {}
    values, ids = log_p.topk(min(most, len(log_p)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return float(log_p[token]), {i: value for i, value in pairs if value > -math.inf}  # an exit's candidates alone
