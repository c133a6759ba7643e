"""Logits of some rows with what is read of each at once: the best token, and whether all are numbers."""

from __future__ import annotations

from dataclasses import dataclass

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
