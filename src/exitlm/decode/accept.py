"""The acceptance rule of lossless decoding: draws from exactly the full model's distribution.

Speculative sampling (arXiv 2211.17192, 2302.01318): a draft x drawn from q is kept with probability min(1, p(x)/q(x));
a refused one is replaced by a draw from the normalised (p - q)+. Both p and q are taken after the sampler's filters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exitlm.decode.sample import draw


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The distribution ``[V]`` of the token that replaces a refused draft: the normalised positive part of p - q."""
    rest = (p_V - q_V).clamp_min(0.0)
    total = rest.sum()
    return rest / total if float(total) > 0.0 else p_V


def accept(p_V: Tensor, q_V: Tensor | None, token: int, generator: torch.Generator) -> int:
    """Return ``token`` if the draft is accepted, else another token. ``q_V`` None means the draft was certain (q is 1
    at ``token``), as a prompt-lookup draft is. Uses one uniform number, and one more after a refusal."""
    q = 1.0 if q_V is None else float(q_V[token])
    u = torch.rand((), generator=generator, dtype=torch.float64).item()
    if u * q < float(p_V[token]):
        return token
    certain = torch.zeros_like(p_V).index_fill_(0, torch.tensor(token, device=p_V.device), 1.0) if q_V is None else q_V
    return draw(residual(p_V, certain.to(p_V.dtype)), generator)
