"""The C side as Python sees it: its structures, and its functions with their arguments checked.

Structures hold addresses; whoever makes one keeps what they point to. Sizes that do not fit are refused here, and once
more on the other side, before anything is read.

Shapes: M rows, D hidden size, N and K rows and columns of a matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p

import numpy as np
from numpy.typing import NDArray

from exitlm.native.pack import FORMATS, PAIR, packed_bytes

PART_ALL, PART_ATTENTION, PART_MLP = range(3)
ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
QK_NORMS = (None, "head", "full")
HEAD_DIMS = (32, 64, 96, 128, 160, 192, 256)
MOST_GROUPED = 64
"""Query heads that may share one head of keys."""
_REASONS = {
    1: "its interface is another",
    2: "a matrix does not fit",
    3: "a shape is not supported",
    4: "the rows of a pass do not fit their blocks",
    5: "there is too little memory",
}


class Matrix(ctypes.Structure):
    """A packed matrix: ``rows`` and ``cols`` are whole multiples of 32."""

    _fields_ = (
        ("data", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int32),
        ("cols", c_int32),
        ("format", c_int32),
        ("digits", c_int32),
        ("stride", c_int64),
    )


def matrix(
    packed: NDArray[np.uint8], format: str, rows: int, cols: int, digits: int, bias: int | None = None
) -> Matrix:
    """A matrix of ``rows`` padded rows; ``bias`` is the address of as many floats. ``packed`` must stay alive."""
    address = packed.ctypes.data
    assert address % 64 == 0
    return Matrix(address, bias, rows, cols, FORMATS.index(format), digits)


def twin(both: Matrix, which: int, bias: int | None = None) -> Matrix:
    """The first or the second of two matrices that were packed with their pairs of blocks in turn."""
    pair = packed_bytes(FORMATS[both.format], PAIR, both.cols)
    return Matrix(both.data + which * pair, bias, both.rows // 2, both.cols, both.format, both.digits, 2 * pair)


class Layer(ctypes.Structure):
    """A decoder layer, see exitcpu.h."""

    _fields_ = (
        *((name, Matrix) for name in ("queries", "keys", "values", "out", "gate", "up", "down")),
        *((name, c_void_p) for name in ("norm_attention", "norm_mlp", "norm_queries", "norm_keys")),
        *((name, c_void_p) for name in ("post_attention", "post_mlp", "cache")),
        ("slots", c_int64),
        *((name, c_int32) for name in ("group", "window", "rotation", "rotary", "qk_norm", "activation")),
    )


class Shape(ctypes.Structure):
    """What all layers of a model share."""

    _fields_ = (
        *((name, c_int32) for name in ("hidden", "heads", "kv_heads", "head_dim", "inner", "half_cache")),
        ("eps", c_float),
        ("scale", c_float),
    )


class CBatch(ctypes.Structure):
    """The rows of a pass."""

    _fields_ = (
        *((name, c_int32) for name in ("rows", "parts", "groups", "block_size", "width", "positions")),
        *((name, c_void_p) for name in ("starts", "counts", "variants", "blocks", "rotations")),
    )


class Head(ctypes.Structure):
    """An output head, see exitcpu.h."""

    _fields_ = (
        *((name, Matrix) for name in ("lens", "gate", "up", "down", "first", "second")),
        *((name, c_void_p) for name in ("norm_mlp", "post_mlp", "norm")),
        *((name, c_int32) for name in ("activation", "unit", "adds", "width")),
    )


_FUNCTIONS = {
    "exitcpu_isa": (c_char_p, ()),
    "exitcpu_use": (c_int, (c_char_p,)),
    "exitcpu_check": (c_int, ()),
    "exitcpu_threads": (c_int, (c_int,)),
    "exitcpu_layers": (
        c_int,
        (POINTER(Shape), c_void_p, c_int32, c_int32, POINTER(CBatch), c_void_p, c_void_p),
    ),
    "exitcpu_head": (
        c_int,
        (POINTER(Shape), POINTER(Head), c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "exitcpu_matmul": (c_int, (POINTER(Matrix), c_int32, c_void_p, c_void_p)),
    "exitcpu_packed_bytes": (c_int64, (c_int32, c_int32, c_int32)),
    "exitcpu_read": (c_double, (c_void_p, c_int64, c_int32)),
}


class Kernels:
    """The functions of a loaded library."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        found: bytes = self.lib.exitcpu_isa()
        return found.decode()

    def use(self, isa: str) -> bool:
        """Switch to another instruction set; False if this processor has it not."""
        return int(self.lib.exitcpu_use(isa.encode())) == 0

    def threads(self, count: int) -> None:
        """Run with so many threads from now on."""
        _checked(self.lib.exitcpu_threads(count))

    def layers(
        self, shape: Shape, layers: int, count: int, part: int, batch: CBatch, hidden: int, residual: int | None
    ) -> None:
        """``count`` layers from the address ``layers`` on, on the floats at ``hidden`` ``[M, D]``, in place; see
        exitcpu.h."""
        _checked(self.lib.exitcpu_layers(byref(shape), layers, count, part, byref(batch), hidden, residual))

    def head(
        self, shape: Shape, head: Head, rows: int, hidden: int, scores: int, best: int, top: int, mass: int | None
    ) -> None:
        """Scores ``[M, N]`` of a head, and of each row the best token, its score, and the sum of exponentials."""
        _checked(self.lib.exitcpu_head(byref(shape), byref(head), rows, hidden, scores, best, top, mass))

    def matmul(self, matrix: Matrix, x_MK: NDArray[np.float32]) -> NDArray[np.float32]:
        """``x`` times a packed matrix, ``[M, N]``."""
        assert x_MK.flags.c_contiguous
        assert x_MK.dtype == np.float32
        assert x_MK.shape[1] == matrix.cols
        out = np.empty((len(x_MK), matrix.rows), np.float32)
        _checked(self.lib.exitcpu_matmul(byref(matrix), len(x_MK), x_MK.ctypes.data, out.ctypes.data))
        return out

    def read(self, data: NDArray[np.uint8], rounds: int = 5) -> float:
        """Seconds that all threads take to read an array."""
        return float(self.lib.exitcpu_read(data.ctypes.data, len(data) // 64 * 64, rounds))


def _checked(code: int) -> None:
    if code:
        raise RuntimeError(f"the native kernels refuse a call: {_REASONS.get(code, code)}")


def addresses(values: Sequence[int]) -> NDArray[np.uintp]:
    """An array of addresses."""
    return np.array(values, np.uintp)
