"""Dtypes: which one a setting means, where bfloat16 is worth choosing, and what low precision asks of shapes."""

from __future__ import annotations

import torch

from exitlm.decode.kernels.formats import has_amx_bf16


def resolve_dtype(name: str, device: torch.device, fallback: torch.dtype) -> torch.dtype:
    """The dtype that ``name`` means. ``auto`` is bfloat16 where ``device`` computes in it natively and ``fallback`` is
    not float64, else ``fallback``."""
    if name != "auto":
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    return torch.bfloat16 if fallback != torch.float64 and native_bfloat16(device) else fallback


def padding(count: int, dtype: torch.dtype, step: int) -> int:
    """How many rows to add to ``count`` for a multiple of ``step`` in low precision, else 0: oneDNN compiles and keeps
    a kernel for every shape it meets (megabytes each, and slower than the product itself)."""
    return -count % step if dtype in (torch.bfloat16, torch.float16) else 0


def native_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32: CUDA from Ampere on, processors with AMX. A rule
    about the hardware and never a timing, so that one machine always computes the same numbers."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and has_amx_bf16()
