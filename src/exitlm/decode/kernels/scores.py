"""Logits of some rows with what is read of each at once: the best token, and whether all are numbers.

Where logits are cut over ranks and only that is read of them, :func:`digest` takes it from each part.
"""

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

    @classmethod
    def of_parts(cls, digests_TM4: Tensor, columns: int) -> Scores:
        """From the :func:`digest` of each of T parts, which have so many columns each; without logits, ``[M, 0]``."""
        largest_TM, at_TM, mass_TM, sum_TM = digests_TM4.unbind(-1)
        best_M, part_M = largest_TM.max(0)  # of equal ones, the first
        share_TM = torch.where(mass_TM == 0.0, 0.0, (largest_TM - best_M).exp())
        probability_M = 1.0 / (mass_TM * share_TM).sum(0)
        index_M = at_TM.gather(0, part_M[None])[0] + part_M * columns
        index, finite, probability = torch.stack([index_M, sum_TM.sum(0).isfinite(), probability_M]).tolist()
        none_M0 = digests_TM4.new_empty(len(part_M), 0)
        return cls(none_M0, [int(at) for at in index], [bool(number) for number in finite], probability)


def digest(logits_Mc: Tensor) -> Tensor:
    """Of one part of some rows, ``[M, 4]`` in float64: the largest logit, its index, the sum of the exponentials of all
    minus the largest, and the sum of all, which is a number where they are. A part may be empty."""
    M, columns = logits_Mc.shape
    if not columns:
        return torch.tensor([-torch.inf, 0.0, 0.0, 0.0], dtype=torch.float64, device=logits_Mc.device).expand(M, 4)
    wide_Mc = logits_Mc.double()
    largest_M, at_M = wide_Mc.max(-1)
    return torch.stack([largest_M, at_M.double(), (wide_Mc - largest_M[:, None]).exp().sum(-1), wide_Mc.sum(-1)], -1)


def log_probabilities(raw_V: Tensor, token: int, most: int) -> tuple[float, dict[int, float]]:
    """The log-probability of ``token`` and of the ``most`` likely tokens, under logits ``[V]``."""
    log_p = torch.log_softmax(raw_V.float() if raw_V.dtype != torch.float64 else raw_V, -1)
    if not most:
        return float(log_p[token]), {}
    values, ids = log_p.topk(min(most, len(log_p)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return float(log_p[token]), {i: value for i, value in pairs if value > -math.inf}  # an exit's candidates alone
