"""How a linear layer's weights lie in memory while decoding, and which format a device gets by default.

Batch-1 decoding reads every weight once per token, so the format sets the speed. A format here is a function
``pack(weight [N, K], bias [N] | None) -> linear`` where ``linear(x [M, K]) -> [M, N]``. Rows of ``x`` are independent
in every format: no scale is shared between rows.

This file knows nothing of layers or models. The rule of :func:`choose_format` is about the processor, never about a
timing, so that the same machine always computes the same numbers.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from exitlm.errors import UserError, nearest
from exitlm.values import wrong

Linear = Callable[[Tensor], Tensor]

FORMATS = ("none", "fp16", "bf16", "int8", "int4")
GRID_FORMATS = ("int8", "int4")
NATIVE_FORMATS = ("stored", "q8_0")
"""Formats of the native kernels alone (see ``packed.py``), which have bf16 and fp16 as well."""
_INT4_GROUP = 32


class PlainLinear:
    """``F.linear`` in the dtype of the weights: the only format for float64 and for CUDA."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Fp16Linear:
    """FBGEMM's packed float16 weights with float32 activations: needs no special instructions beyond AVX2."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.packed = torch.ops.quantized.linear_prepack_fp16(
                weight.float().contiguous(), None if bias is None else bias.float()
            )
        self.operator = torch.ops.quantized.linear_dynamic_fp16.default

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.operator(x.float(), self.packed)
        return result


class Bf16Linear:
    """oneDNN's blocked bfloat16 weights: on processors with AMX tiles 16 rows cost what one costs."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16).contiguous(), 1)
        self.bias = None if bias is None else bias.to(torch.bfloat16)
        self.operator = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.operator(x.to(torch.bfloat16), self.packed, self.bias, "none", [], "")
        return result


class Int8Linear:
    """8-bit weights with a scale per output channel, bfloat16 activations."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        scale = weight.float().abs().amax(1).clamp_min(1e-12) / 127
        self.packed = (weight.float() / scale[:, None]).round_().to(torch.int8)
        self.scale = scale.to(torch.bfloat16)
        self.bias = None if bias is None else bias.to(torch.bfloat16)
        self.operator = torch.ops.aten._weight_int8pack_mm.default

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.operator(x.to(torch.bfloat16), self.packed, self.scale)
        return result if self.bias is None else result.add_(self.bias)


def four_bit_grid(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and lowest value ``[N, K / 32]`` of each group of 32, and where the weights lie on 0..15, ``[N, K]``."""
    N, K = weight.shape
    groups = weight.float().view(N, K // _INT4_GROUP, _INT4_GROUP)
    high, low = groups.amax(-1), groups.amin(-1)
    scale = ((high - low) / 15).clamp_min(1e-12)
    steps = ((groups - low[..., None]) / scale[..., None]).clamp_(0, 15)
    return scale, low, steps.view(N, K)


def is_four_bit(weight: Tensor) -> bool:
    """Whether a matrix ``[N, K]`` lies on a 4-bit grid in groups of 32 already, so that int4 loses nothing of it."""
    N, K = weight.shape
    if K % _INT4_GROUP or N % 16 or weight.dtype == torch.float64:
        return False
    steps = four_bit_grid(weight[: min(N, 256)])[2]
    return bool((steps - steps.round()).abs().max() < 0.02)


class Int4Linear:
    """4-bit weights in groups of 32 with a scale and an offset each, bfloat16 activations."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        scale, low, steps = four_bit_grid(weight)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps.round_().to(torch.int32), 1)
        self.scales = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().to(torch.bfloat16)
        self.bias = None if bias is None else bias.to(torch.bfloat16)
        self.operator = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.operator(x.to(torch.bfloat16), self.packed, _INT4_GROUP, self.scales)
        return result if self.bias is None else result.add_(self.bias)


_PACKERS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "none": PlainLinear,
    "fp16": Fp16Linear,
    "bf16": Bf16Linear,
    "int8": Int8Linear,
    "int4": Int4Linear,
}


@functools.cache
def has_amx_bf16() -> bool:
    """Whether this processor multiplies bfloat16 tiles (AMX), as torch or the kernel reports it."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe()) if probe is not None else False


def sixteen_bit_format() -> str:
    """``bf16`` where the processor has AMX tiles (up to 16 rows cost what one costs), else that of output matrices:
    ``fp16`` (4 rows cost about 1.1 to 1.3 times one), or ``none`` where torch has no such kernel."""
    return "bf16" if has_amx_bf16() else _precise_format()


def _precise_format() -> str:
    return "fp16" if "fbgemm" in torch.backends.quantized.supported_engines else "none"


def choose_format(weights: Sequence[Tensor]) -> str:
    """The default format for a model whose layers hold these matrices.

    ``none`` on an accelerator and in float64; ``int4`` where all of them are on a 4-bit grid already (a Q4_1 GGUF) and
    the processor has AVX-512, since nothing is lost; else 16 bits.
    """
    if weights[0].device.type != "cpu" or weights[0].dtype == torch.float64:
        return "none"
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and all(map(is_four_bit, weights)) and _works("int4"):
        return "int4"
    return sixteen_bit_format()


def head_format(quant: str) -> str:
    """The format of the final output matrix, whose errors go into the text: float32 results at least.

    Logits that are bfloat16 lie on steps of 1/16 to 1/8, so that the best two tokens often tie, and a tie falls one way
    in a pass of one row and the other way when several rows are verified (of SmolLM2's lossless texts with int4 layers,
    10 of 16 differed from the full model's at such ties, and 1 of 16 with this).
    """
    return "none" if quant == "none" else _precise_format()


def exit_format(quant: str) -> str:
    """The format of exit heads: half the bytes of the final head's where layers are in a grid format too, since a test
    that does not fire must cost little; always computed one row at a time, so that no tie depends on the number."""
    return "int8" if quant in GRID_FORMATS else head_format(quant)


def check_quant(quant: str) -> None:
    """Refuse what is not the name of a format."""
    known = ("auto", *NATIVE_FORMATS, *FORMATS)
    if not isinstance(quant, str):
        raise wrong("quant", quant, f"one of {', '.join(known)}")
    if quant not in known:
        raise UserError(f"quant {quant!r} is unknown; use one of {', '.join(known)}{nearest(quant, known)}")


def resolve_format(quant: str, weights: Sequence[Tensor]) -> str:
    """Turn the user's ``quant`` into a format that a model whose layers hold these matrices can have, or refuse."""
    device, dtype = weights[0].device, weights[0].dtype
    check_quant(quant)
    if quant == "auto":
        return choose_format(weights)
    if quant != "none" and device.type != "cpu":
        raise UserError(f"quant '{quant}' is a format for CPUs, but the model is on {device}; use quant 'none' there")
    if quant != "none" and dtype == torch.float64:
        raise UserError(f"quant '{quant}' would round a float64 model; use quant 'none' or another dtype")
    if quant in ("int8", "int4") and not _works(quant):
        raise UserError(f"this processor and build of torch compute quant '{quant}' wrongly; use quant 'fp16' instead")
    return quant


@functools.cache
def _works(quant: str) -> bool:
    """Multiply a small matrix in the format and compare: some processors lack the instructions and saturate."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 64, generator=generator), torch.randn(3, 64, generator=generator)
    exact = F.linear(x, weight)
    try:
        found = _PACKERS[quant](weight, None)(x).float()
    except (RuntimeError, AttributeError):
        return False
    return bool((found - exact).abs().max() < 0.25 * exact.abs().max())


def pack_linear(weight: Tensor, bias: Tensor | None, quant: str) -> Linear:
    """Pack ``weight [N, K]`` in a resolved format; a shape that a grid format can't hold gets 16 bits. int4 has K in
    groups of 32 and N in blocks of 16; torch's int8 kernel reads rows in whole vectors, beyond their end if it must."""
    N, K = weight.shape
    if quant in GRID_FORMATS and (K % 32 or (quant == "int4" and N % 16)):
        quant = sixteen_bit_format()
    return _PACKERS[quant](weight, bias)
