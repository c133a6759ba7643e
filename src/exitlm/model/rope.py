"""Rotary position embedding: inverse frequencies and cos/sin tables, as pure functions of a :class:`RopeConfig`.

Not here: which layer uses which table (``decoder.py``) and how a checkpoint spells its settings (``config.py``).
Sources: RoFormer (arXiv 2104.09864); linear scaling (position interpolation, arXiv 2306.15595); Llama 3.1's piecewise
scaling (arXiv 2407.21783); LongRoPE (arXiv 2402.13753). Layout: the two halves of the rotary dimensions are the two
coordinates of each rotated pair ("rotate half", as in HF checkpoints).

Shapes: B rows, T positions, R rotary dimensions (even), F = R / 2 frequencies.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RopeKind = Literal["default", "linear", "llama3", "longrope"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """One rotary embedding. ``dim`` counts the rotary dimensions of a head (even; partial rotary already applied).

    ``base_dim``: what the exponents are divided by where that is not ``dim`` (0: it is).
    """

    theta: float
    dim: int
    base_dim: int = 0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0


@functools.lru_cache(maxsize=64)
def inverse_frequencies(rope: RopeConfig, dtype: torch.dtype, long: bool = False) -> tuple[float, ...]:
    """Return the F inverse frequencies in radians per position, computed in ``dtype`` (float32 or float64).

    ``long`` selects the long factors of longrope. Values are plain numbers, exact in ``dtype``, so that the cache
    holds no tensor of any device or autograd mode.
    """
    # Explicitly on the CPU: a surrounding `torch.device("meta")` must not reach this computation.
    exponent = torch.arange(0, rope.dim, 2, dtype=torch.int64, device="cpu").to(dtype) / (rope.base_dim or rope.dim)
    if rope.kind == "longrope":
        stretch = torch.tensor(rope.long_factor if long else rope.short_factor, dtype=dtype, device="cpu")
        inverse = 1.0 / (stretch * rope.theta**exponent)
    else:
        inverse = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        inverse = _llama3(inverse, rope)
    return tuple(inverse.tolist())


def _llama3(inverse: Tensor, rope: RopeConfig) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, and blend the band between."""
    wavelength = 2 * math.pi / inverse
    longest = rope.original_max_position_embeddings / rope.low_freq_factor
    shortest = rope.original_max_position_embeddings / rope.high_freq_factor
    blend = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * inverse / rope.factor + blend * inverse
    scaled = torch.where(wavelength > longest, inverse / rope.factor, inverse)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), blended, scaled)


def rotary_tables(
    rope: RopeConfig, positions: Tensor, dtype: torch.dtype, total_length: int | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``(cos, sin)``, each [..., T, R], for ``positions`` [B, T] or [T]; the attention factor is folded in.

    Angles are computed in float64 for a float64 ``dtype``, else in float32, then rounded to ``dtype``.
    ``total_length`` matters to longrope alone: sequences longer than the original context use the long factors. None
    means the largest position of this call plus one (as transformers does); a tensor is broadcast against
    ``positions``, so that ``positions + 1`` makes a token's rotation independent of the tokens processed with it.
    """
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    inverse = torch.tensor(inverse_frequencies(rope, precise), dtype=precise, device=positions.device)
    if rope.kind == "longrope":
        if total_length is None:
            total_length = positions.max() + 1
        use_long = torch.as_tensor(total_length, device=positions.device) > rope.original_max_position_embeddings
        stretched = torch.tensor(inverse_frequencies(rope, precise, True), dtype=precise, device=positions.device)
        inverse = torch.where(use_long[..., None], stretched, inverse)
    angles = positions[..., None].to(precise) * inverse
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * rope.attention_factor).to(dtype), (angles.sin() * rope.attention_factor).to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of ``heads`` [B, H, T, Dh] by tables [B, 1, T, R]; the rest passes through.

    The result has the dtype of ``heads`` even where the tables are more precise.
    """
    size = cos.shape[-1]
    turned = heads[..., :size]
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cos + torch.cat((-second, first), dim=-1) * sin).to(heads.dtype)
    return turned if size == heads.shape[-1] else torch.cat((turned, heads[..., size:]), dim=-1)
