"""Matrices in every stored type, their packed bytes read back one by one, and small layers for the kernels. Not a test.

``unpacked`` reads the layouts of exitcpu.h by arithmetic on addresses, value by value, and shares no line with
``exitlm.native.pack``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from exitlm.native import abi, library
from exitlm.native.pack import PAIR, RAW_TYPES, RawMatrix, format_of, pack

ISAS = ("avx512vnni", "avxvnni", "avx2", "neon", "generic")
REASON = library.why_not()
needs_native = pytest.mark.skipif(REASON is not None, reason=str(REASON))
FLOATS = ("F16", "BF16", "F32")
TYPES = tuple(type for type in RAW_TYPES if type not in FLOATS)
SUPERBLOCKS = ("Q4_K", "Q6_K")


@functools.cache
def kernels() -> abi.Kernels:
    """The functions of the library."""
    return abi.Kernels(library.load().lib)


@contextmanager
def forced(isa: str) -> Iterator[None]:
    """Another instruction set for a while; the test is skipped where this processor has it not."""
    found, before = kernels(), kernels().isa
    if not found.use(isa):
        pytest.skip(f"this processor has no {isa}, or the library was built for another machine")
    try:
        assert found.isa == isa
        yield
    finally:
        assert found.use(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Another number of threads for a while; what the engines of other tests choose comes back."""
    kernels().threads(count)
    try:
        yield
    finally:
        kernels().threads(library.default_threads())


# ---- matrices


def cols_for(type: str) -> tuple[int, ...]:
    """Numbers of columns that a type can have: one group or block, and several."""
    return (256, 768) if type in SUPERBLOCKS else (32, 96, 320)


def random_raw(type: str, rows: int, cols: int, seed: int = 0, spread: float = 0.3) -> RawMatrix:
    """A matrix in which every byte of the steps and of the small scales is random, and values are about ``spread``."""
    rng = np.random.default_rng([seed, rows, cols])
    if type in FLOATS:
        values = rng.normal(0, spread, (rows, cols)).astype(np.float32)
        words = {"F32": values, "F16": values.astype(np.float16), "BF16": (values.view(np.uint32) >> 16).astype("<u2")}
        return RawMatrix(type, np.ascontiguousarray(words[type]).view(np.uint8).reshape(rows, -1), cols)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    raw = rng.integers(0, 256, (rows, cols // block, size), dtype=np.uint8)
    largest = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q8_0": 128, "Q4_K": 15 * 63, "Q6_K": 32 * 128}[type]
    scales = {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(type, (0,))
    for at in scales:
        count = (rows, cols // block)
        scale = rng.uniform(0.2, 1.0, count) * rng.choice([-1, 1], count) * 2 * spread / largest
        if at == 2 and type == "Q4_1":
            scale *= largest
        raw[:, :, at : at + 2] = scale.astype("<f2")[..., None].view(np.uint8)
    return RawMatrix(type, raw.reshape(rows, -1), cols)


def values_of(raw: RawMatrix) -> NDArray[np.float32]:
    """The values ``[N, K]`` of a matrix, as the ``gguf`` package has them."""
    if raw.type in FLOATS:
        words = np.ascontiguousarray(raw.rows).view({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[raw.type])
        return (words.astype(np.uint32) << 16).view(np.float32) if raw.type == "BF16" else words.astype(np.float32)
    return gguf.dequantize(np.ascontiguousarray(raw.rows), gguf.GGMLQuantizationType[raw.type]).astype(np.float32)


@dataclass(frozen=True)
class Unpacked:
    """``step [N, K]``: integers of a grid (a value is ``scale * step + offset``); None where values are floats."""

    values: NDArray[np.float64]
    step: NDArray[np.int64] | None = None


def unpacked(format: str, packed: NDArray[np.uint8], rows: int, cols: int) -> Unpacked:
    """Read packed bytes by the layouts of exitcpu.h; ``rows`` padded to whole pairs of blocks. Exact in float64."""
    n, k = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    second, lane, group = n // 16 % 2, n % 16, k // 32  # of a pair of blocks, the first or the second
    start = n // 32 * (len(packed) // (rows // 32))
    byte = packed.astype(np.int64)

    def half(at: NDArray[Any]) -> NDArray[np.float64]:
        return (byte[at] | byte[at + 1] << 8).astype(np.uint16).view(np.float16).astype(np.float64)

    def nibble(at: NDArray[Any], i: NDArray[Any]) -> NDArray[np.int64]:
        """Input i of a group: in part i // 8, byte i % 4 of the lane, the upper half for the second four."""
        both = byte[at + 64 * (i // 8) + 4 * lane + i % 4]
        return np.where(i % 8 < 4, both & 15, both >> 4)

    def signed(at: NDArray[Any], i: NDArray[Any]) -> NDArray[np.int64]:
        return byte[at + 64 * (i // 4) + 4 * lane + i % 4] - 128

    if format == "q4":
        at = start + 640 * group + 320 * second
        step = nibble(at + 64, k % 32)
        return Unpacked(half(at + 2 * lane) * step + half(at + 32 + 2 * lane), step)
    if format == "q8":
        at = start + 1088 * group
        step = signed(at + 64 + 512 * second, k % 32)
        return Unpacked(half(at + 32 * second + 2 * lane) * step, step)
    if format == "k4":
        at, of = start + 4736 * (k // 256) + 2368 * second, group % 8
        step = nibble(at + 320 + 256 * of, k % 32)
        scale, offset = byte[at + 64 + 32 * of + lane], byte[at + 80 + 32 * of + lane]
        return Unpacked(half(at + 2 * lane) * scale * step - half(at + 32 + 2 * lane) * offset, step)
    if format == "k6":
        at, of = start + 8832 * (k // 256) + 4416 * second, group % 8
        step = signed(at + 320 + 512 * of, k % 32)
        small = byte[at + 64 + 32 * of + 16 * (k % 32 // 16) + lane].astype(np.uint8).view(np.int8).reshape(n.shape)
        return Unpacked(half(at + 2 * lane) * small * step, step)
    size = 4 if format == "f32" else 2
    at = start + size * (32 * k + 16 * second + lane)
    word = sum(byte[at + i] << (8 * i) for i in range(size))
    if format == "f16":
        return Unpacked(half(at))
    bits = word << 16 if format == "bf16" else word
    return Unpacked(np.asarray(bits, np.int64).astype(np.uint32).view(np.float32).astype(np.float64))


# ---- for the kernels


def aligned(content: NDArray[Any]) -> NDArray[Any]:
    """A copy that begins at 64 bytes."""
    held = np.empty(content.nbytes + 64, np.uint8)
    at = -held.ctypes.data % 64
    found = held[at : at + content.nbytes].view(content.dtype).reshape(content.shape)
    found[...] = content
    return found


@dataclass
class Packed:
    """A packed matrix with its struct, and what the struct points to."""

    raw: RawMatrix
    digits: int = 2
    bias: NDArray[np.float32] | None = None
    c: abi.Matrix = field(init=False)

    def __post_init__(self) -> None:
        rows = -(-self.raw.count // PAIR) * PAIR
        self._bytes = aligned(pack(self.raw))
        address = None
        if self.bias is not None:
            self._bias = aligned(np.pad(self.bias, (0, rows - len(self.bias))).astype(np.float32))
            address = self._bias.ctypes.data
        self.c = abi.matrix(self._bytes, format_of(self.raw.type), rows, self.raw.cols, self.digits, address)

    def times(self, x_MK: NDArray[np.float32]) -> NDArray[np.float32]:
        """The product with rows of activations, without the padding, ``[M, N]``."""
        return kernels().matmul(self.c, np.ascontiguousarray(x_MK))[:, : self.raw.count]


def random_rows(rows: int, cols: int, seed: int = 0) -> NDArray[np.float32]:
    """Activations whose sizes differ between rows, groups and elements, as those of real streams do."""
    rng = np.random.default_rng([seed, cols])
    x = rng.normal(0, 1, (rows, cols)) * np.exp(rng.normal(0, 1, (rows, 1)))
    return np.asarray(x * np.repeat(np.exp(rng.normal(0, 1, (rows, cols // 32))), 32, 1), np.float32)


NOWHERE = 1 << 6
"""An address that no process has mapped: who reads there is ended by the system."""


class SmallLayer:
    """One decoder layer of two sequences as structs, all sizes good. ``unreadable``: weights and cache lie nowhere, so
    that a call that is not refused ends the process instead of passing by luck."""

    HIDDEN, INNER, DIM, HEADS, KV = 64, 96, 32, 4, 2
    BLOCK_SIZE, SLOTS = 4, 32

    def __init__(self, unreadable: bool = False) -> None:
        D, inner, Dh, H, Hkv = self.HIDDEN, self.INNER, self.DIM, self.HEADS, self.KV
        self.shape = abi.Shape(D, H, Hkv, Dh, inner, 0, 1e-6, Dh**-0.5)
        self.layer = abi.Layer()
        sizes = {"queries": (H * Dh, D), "keys": (Hkv * Dh, D), "values": (Hkv * Dh, D), "out": (D, H * Dh)}
        sizes |= {"gate": (inner, D), "up": (inner, D), "down": (D, inner)}
        self.matrices = {n: Packed(random_raw("Q8_0", *size, seed=i)) for i, (n, size) in enumerate(sizes.items())}
        for name, matrix in self.matrices.items():
            setattr(self.layer, name, matrix.c)
        self.norm, self.cache = aligned(np.ones(D, np.float32)), aligned(np.zeros((2, Hkv, self.SLOTS, Dh), np.float32))
        self.layer.norm_attention = self.layer.norm_mlp = self.norm.ctypes.data
        self.layer.cache, self.layer.slots, self.layer.rotary = self.cache.ctypes.data, self.SLOTS, Dh
        self.starts, self.counts = np.array([3, 0], np.int32), np.array([2, 1], np.int32)
        self.variants, self.blocks = np.zeros(2, np.int32), np.array([[5, 2], [1, 0]], np.int32)
        self.table = aligned(np.ones((16, Dh), np.float32))
        self.tables = np.full(4, self.table.ctypes.data, np.uintp)
        self.batch = abi.CBatch(
            3, 2, 1, self.BLOCK_SIZE, 2, 16, self.starts.ctypes.data, self.counts.ctypes.data,
            self.variants.ctypes.data, self.blocks.ctypes.data, self.tables.ctypes.data,
        )  # fmt: skip
        self.hidden = aligned(random_rows(3, D))
        self.part, self.count = abi.PART_ALL, 1
        if unreadable:
            for name in sizes:
                getattr(self.layer, name).data = NOWHERE
            self.layer.cache = NOWHERE

    def run(self) -> NDArray[np.float32]:
        """The rows behind the layer; RuntimeError where the kernels refuse."""
        import ctypes

        found = aligned(self.hidden)
        kernels().layers(
            self.shape, ctypes.addressof(self.layer), self.count, self.part, self.batch, found.ctypes.data, None
        )
        return found
