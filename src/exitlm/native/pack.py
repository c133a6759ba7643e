"""Weights as the native kernels read them: pairs of blocks of 16 output rows, and of each pair groups of 32 inputs.

A matrix comes as the bytes of its rows in one of the types of a GGUF file, or as floats, and keeps its values: nothing
is rounded here but by :func:`quantised`, which a user asks for by name. docs/native.md draws the layouts.

Shapes: N rows (outputs), K columns (inputs), G = K / 32 groups, B = N / 16 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FORMATS = ("q4", "q8", "k4", "k6", "f16", "bf16", "f32")
"""The layouts, in the order of their numbers in exitcpu.h."""
GRIDS = FORMATS[:4]
BLOCK, GROUP, PAIR = 16, 32, 32
_SUPER = 256
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class RawMatrix:
    """A matrix as it is stored: ``rows [N, bytes of a row]`` of ``cols`` values in a type of GGUF files (``Q4_0``,
    ``Q4_1``, ``Q5_0``, ``Q8_0``, ``Q4_K``, ``Q6_K``) or of floats (``F16``, ``BF16``, ``F32``)."""

    type: str
    rows: Bytes
    cols: int

    @property
    def count(self) -> int:
        """N, the number of rows."""
        return len(self.rows)

    def take(self, rows: Any) -> RawMatrix:
        """Some rows, by a slice or by their numbers."""
        return RawMatrix(self.type, self.rows[rows], self.cols)


_OF_TYPE = {
    "Q4_0": "q4",
    "Q4_1": "q4",
    "Q5_0": "q8",
    "Q8_0": "q8",
    "Q4_K": "k4",
    "Q6_K": "k6",
    "F16": "f16",
    "BF16": "bf16",
    "F32": "f32",
}
_FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
RAW_TYPES = tuple(_OF_TYPE)


def raw_of(weight_NK: Tensor) -> RawMatrix:
    """A float matrix as it is."""
    held = weight_NK.detach().contiguous()
    size = held.element_size()
    rows = held.view(torch.uint8 if size == 1 else torch.int16 if size == 2 else torch.int32).numpy().view(np.uint8)
    return RawMatrix(_FLOATS[held.dtype], rows.reshape(len(held), -1), held.shape[1])


def quantised(weight_NK: Tensor) -> RawMatrix:
    """A matrix rounded to 8 bits in groups of 32, as Q8_0 does. K must be a multiple of 32."""
    N, K = weight_NK.shape
    groups = weight_NK.detach().float().reshape(N, K // GROUP, GROUP)
    scale = (groups.abs().amax(-1) / 127).to(torch.float16)
    inverse = torch.where(scale > 0, 1.0 / scale.float(), torch.zeros(()))
    steps = (groups * inverse[..., None]).round_().clamp_(-127, 127).to(torch.int8)
    raw = np.empty((N, K // GROUP, 34), np.uint8)
    raw[:, :, :2] = scale.contiguous().view(torch.int16).numpy()[..., None].view(np.uint8)
    raw[:, :, 2:] = steps.numpy().view(np.uint8)
    return RawMatrix("Q8_0", raw.reshape(N, -1), K)


def format_of(type: str) -> str:
    """The layout of a type; one that has none is a ``KeyError``."""
    return _OF_TYPE[type]


def fits(type: str, cols: int) -> bool:
    """Whether a matrix of a type can be laid out."""
    return type in _OF_TYPE and cols % (_SUPER if _OF_TYPE[type] in ("k4", "k6") else GROUP) == 0


def packed_bytes(format: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix whose rows are padded to whole pairs of blocks."""
    groups = cols // GROUP
    one = {
        "q4": groups * 640,
        "q8": groups * 1088,
        "k4": groups // 8 * 4736,
        "k6": groups // 8 * 8832,
        "f16": cols * 64,
        "bf16": cols * 64,
        "f32": cols * 128,
    }[format]
    return -(-rows // PAIR) * one


def pack(matrix: RawMatrix) -> Bytes:
    """The packed bytes of a matrix; rows that fill the last pair of blocks are zero."""
    more = -matrix.count % PAIR
    rows = matrix.rows
    if more:
        rows = np.concatenate([rows, np.zeros((more, rows.shape[1]), np.uint8)])
    N, K = len(rows), matrix.cols
    packed: Bytes = np.ascontiguousarray(_PACKERS[matrix.type](np.ascontiguousarray(rows), N, K)).reshape(-1)
    assert len(packed) == packed_bytes(format_of(matrix.type), N, K)
    return packed


def in_turn(first: RawMatrix, second: RawMatrix) -> RawMatrix:
    """The rows of two matrices of one shape and type, 32 of the one and 32 of the other in turn: what is read together
    then lies together."""
    both = np.stack([each.rows.reshape(each.count // PAIR, PAIR, -1) for each in (first, second)], 1)
    return RawMatrix(first.type, both.reshape(2 * first.count, -1), first.cols)


# ---- one function for each type


def _halves(raw: Bytes) -> NDArray[np.float16]:
    return np.ascontiguousarray(raw).view(np.float16)[..., 0]


def _q4(steps: Bytes, scale: NDArray[np.float16], offset: NDArray[np.float16]) -> Bytes:
    """``steps [N, K]`` in 0..15, ``scale`` and ``offset`` ``[N, G]``."""
    N, G = scale.shape
    packed = np.empty((N // BLOCK, G, 320), np.uint8)
    for at, values in ((0, scale), (32, offset)):
        packed[:, :, at : at + 32] = _by_block(values)
    packed[:, :, 64:] = _nibbles(steps, N, G)
    return _in_pairs(packed)


def _in_pairs(packed: Bytes) -> Bytes:
    """``[B, groups, bytes]`` with the groups of two neighbouring blocks in turn, ``[B / 2, groups, 2, bytes]``."""
    B, groups, size = packed.shape
    return packed.reshape(B // 2, 2, groups, size).swapaxes(1, 2)


def _by_block(values: NDArray[Any]) -> Bytes:
    """``[N, G]`` to the bytes of 16 rows' values for each block and group, ``[B, G, 16 * size]``."""
    N, G = values.shape
    return np.ascontiguousarray(values.reshape(N // BLOCK, BLOCK, G).transpose(0, 2, 1)).view(np.uint8)


def _nibbles(steps: Bytes, N: int, G: int) -> Bytes:
    """Byte j of a row in part p of a group: input 8 p + j below, 8 p + 4 + j above, ``[B, G, 256]``."""
    parts = steps.reshape(N // BLOCK, BLOCK, G, 4, 2, 4)
    both: Bytes = parts[..., 0, :] | (parts[..., 1, :] << np.uint8(4))
    return both.transpose(0, 2, 3, 1, 4).reshape(N // BLOCK, G, 256)


def _parts(values: Bytes, N: int, G: int) -> Bytes:
    """Part p of a group holds inputs 4 p to 4 p + 3 of each row, plus 128, ``[B, G, 512]``."""
    stored: Bytes = (values ^ np.uint8(0x80)).reshape(N // BLOCK, BLOCK, G, 8, 4)
    return stored.transpose(0, 2, 3, 1, 4).reshape(N // BLOCK, G, 512)


def _q4_0(rows: Bytes, N: int, K: int) -> Bytes:
    raw = rows.reshape(N, K // GROUP, 18)
    scale = _halves(raw[:, :, :2])
    return _q4(_low_high(raw[:, :, 2:]), scale, (scale.astype(np.float32) * -8.0).astype(np.float16))


def _q4_1(rows: Bytes, N: int, K: int) -> Bytes:
    raw = rows.reshape(N, K // GROUP, 20)
    return _q4(_low_high(raw[:, :, 4:]), _halves(raw[:, :, :2]), _halves(raw[:, :, 2:4]))


def _low_high(raw: Bytes) -> Bytes:
    """Sixteen inputs in the lower halves of the bytes, and the next sixteen in the upper ones."""
    return np.concatenate([raw & 15, raw >> 4], -1)


def _q8(values: Bytes, scale: NDArray[np.float16]) -> Bytes:
    """``values [N, K]`` of signed bytes, ``scale [N, G]``."""
    N, G = scale.shape
    packed = np.empty((N // PAIR, G, 1088), np.uint8)
    packed[:, :, :64] = _in_pairs(_by_block(scale)).reshape(N // PAIR, G, 64)
    packed[:, :, 64:] = _in_pairs(_parts(values, N, G)).reshape(N // PAIR, G, 1024)
    return packed


def _q8_0(rows: Bytes, N: int, K: int) -> Bytes:
    raw = rows.reshape(N, K // GROUP, 34)
    return _q8(raw[:, :, 2:], _halves(raw[:, :, :2]))


def _q5_0(rows: Bytes, N: int, K: int) -> Bytes:
    """A fifth bit for each input, and 16 taken away: what a signed byte holds."""
    raw = rows.reshape(N, K // GROUP, 22)
    fifth = np.unpackbits(raw[:, :, 2:6], axis=-1, bitorder="little")
    values = (_low_high(raw[:, :, 6:]) | (fifth << 4)).astype(np.int8) - np.int8(16)
    return _q8(values.view(np.uint8), _halves(raw[:, :, :2]))


def _q4_k(rows: Bytes, N: int, K: int) -> Bytes:
    """Groups of 32 with 6-bit scales and offsets under the two halves of a block of 256."""
    S = K // _SUPER
    raw = rows.reshape(N, S, 144)
    small = raw[:, :, 4:16]
    scale, offset = np.empty((N, S, 8), np.uint8), np.empty((N, S, 8), np.uint8)
    scale[:, :, :4], offset[:, :, :4] = small[:, :, :4] & 63, small[:, :, 4:8] & 63
    scale[:, :, 4:] = (small[:, :, 8:] & 15) | (small[:, :, :4] >> 6 << 4)
    offset[:, :, 4:] = (small[:, :, 8:] >> 4) | (small[:, :, 4:8] >> 6 << 4)
    pairs = raw[:, :, 16:].reshape(N, S, 4, 32)  # two groups share their bytes
    steps = np.stack([pairs & 15, pairs >> 4], 3).reshape(N, K)
    B = N // BLOCK
    packed = np.empty((B, S, 2368), np.uint8)
    packed[:, :, :32] = _by_block(_halves(raw[:, :, :2]))
    packed[:, :, 32:64] = _by_block(_halves(raw[:, :, 2:4]))
    both = np.stack([_by_block(each.reshape(N, 8 * S)).reshape(B, S, 8, 16) for each in (scale, offset)], 3)
    packed[:, :, 64:320] = both.reshape(B, S, 256)
    packed[:, :, 320:] = _nibbles(steps, N, 8 * S).reshape(B, S, 2048)
    return _in_pairs(packed)


def _q6_k(rows: Bytes, N: int, K: int) -> Bytes:
    """Groups of 16 with 8-bit scales under the half of a block of 256; 32 is taken from each value."""
    S = K // _SUPER
    raw = rows.reshape(N, S, 210)
    low, high = raw[:, :, :128].reshape(N, S, 2, 64), raw[:, :, 128:192].reshape(N, S, 2, 32)
    parts = [
        (low[..., :32] & 15) | ((high & 3) << 4),
        (low[..., 32:] & 15) | ((high >> 2 & 3) << 4),
        (low[..., :32] >> 4) | ((high >> 4 & 3) << 4),
        (low[..., 32:] >> 4) | ((high >> 6) << 4),
    ]
    values = (np.stack(parts, 3).reshape(N, K).astype(np.int8) - np.int8(32)).view(np.uint8)
    B = N // BLOCK
    packed = np.zeros((B, S, 4416), np.uint8)
    packed[:, :, :32] = _by_block(_halves(raw[:, :, 208:]))
    packed[:, :, 64:320] = _by_block(raw[:, :, 192:208].reshape(N, 16 * S)).reshape(B, S, 256)
    packed[:, :, 320:] = _parts(values, N, 8 * S).reshape(B, S, 4096)
    return _in_pairs(packed)


def _floats(size: int) -> Any:
    def packed(rows: Bytes, N: int, K: int) -> Bytes:
        values = rows.view(f"u{size}").reshape(N // PAIR, PAIR, K)
        return np.ascontiguousarray(values.transpose(0, 2, 1)).view(np.uint8)

    return packed


_PACKERS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
    "F16": _floats(2),
    "BF16": _floats(2),
    "F32": _floats(4),
}
