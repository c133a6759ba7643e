"""From logits to a distribution to a token: the sampler's filters, in the usual order and with the usual meaning.

repetition penalty (arXiv 1909.05858) -> temperature -> top-k -> top-p (arXiv 1904.09751) -> min-p (arXiv 2407.01082).
Temperature 0 is greedy. Shapes: logits and probabilities are one row ``[V]``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exitlm.errors import UserError
from exitlm.values import number, whole

_COLDEST = 1e-30  # a temperature below is rounded to 0 in float32


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The settings of sampling; pure apart from the generator that is handed in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, math.inf),
        ):
            expected = f"a number from {low:g} to {high:g}"
            value = number(getattr(self, name), name, expected)
            if not low <= value <= high or value == math.inf:
                raise UserError(f"{name} is {value}, but must be {expected}")
            object.__setattr__(self, name, value)
        if self.top_p == 0.0:
            raise UserError("top_p is 0, which leaves no token; use a number above 0, or temperature 0 for greedy text")
        if self.repetition_penalty == 0.0:
            raise UserError("repetition_penalty is 0, but logits are divided by it; use 1 for no penalty")
        object.__setattr__(self, "top_k", whole(self.top_k, "top_k", least=0))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def plain(self) -> bool:
        """Whether the argmax of the raw logits is the token: nothing depends on the text before."""
        return self.greedy and self.repetition_penalty == 1.0

    def penalise(self, logits_V: Tensor, text: Sequence[int]) -> Tensor:
        """Divide the positive and multiply the negative logits of the tokens in ``text``."""
        if self.repetition_penalty == 1.0 or not text:
            return logits_V
        ids = torch.tensor(sorted(set(text)), device=logits_V.device)
        picked = logits_V[ids]
        changed = torch.where(picked > 0, picked / self.repetition_penalty, picked * self.repetition_penalty)
        return logits_V.index_copy(0, ids, changed)

    def distribution(self, logits_V: Tensor, text: Sequence[int]) -> Tensor:
        """Probabilities ``[V]`` after all filters. Greedy gives all mass to the argmax."""
        logits_V = self.penalise(logits_V, text)
        if logits_V.dtype in (torch.float16, torch.bfloat16):
            logits_V = logits_V.float()
        if self.greedy:
            return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
        # the largest logit becomes 0 first, so that a tiny temperature can't overflow
        logits_V = (logits_V - logits_V.max()) / max(self.temperature, _COLDEST)
        if 0 < self.top_k < len(logits_V):
            floor = logits_V.topk(self.top_k).values[-1]
            logits_V = logits_V.masked_fill(logits_V < floor, -torch.inf)
        probabilities = torch.softmax(logits_V, -1)
        if self.top_p < 1.0:
            ordered, order = probabilities.sort(descending=True)
            before = ordered.cumsum(0) - ordered
            ordered = ordered.masked_fill(before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).index_copy_(0, order, ordered)
        if self.min_p > 0.0:
            probabilities = probabilities.masked_fill(probabilities < self.min_p * probabilities.max(), 0.0)
        return probabilities / probabilities.sum()


def sampler_of(settings: Any) -> Sampler:
    """The sampler of settings that have its fields among others."""
    return Sampler(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(Sampler)})


def draw(probabilities_V: Tensor, generator: torch.Generator) -> int:
    """One token from ``[V]`` by inversion: one uniform number per draw, made on the CPU whatever the device."""
    cumulative = probabilities_V.double().cumsum(0)
    point = torch.rand((), generator=generator, dtype=torch.float64).item() * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, cumulative.new_tensor(point), right=True))
    while index >= len(probabilities_V) or float(probabilities_V[index]) == 0.0:  # rounding at the upper end only
        index -= 1
    return index


def finite_rows(logits_RV: Tensor) -> list[bool]:
    """Whether the logits of each row are finite, in one pass over them."""
    wide = torch.promote_types(logits_RV.dtype, torch.float32)
    found: list[bool] = logits_RV.sum(-1, dtype=wide).isfinite().tolist()
    return found
