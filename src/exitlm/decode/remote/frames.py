"""Frames: what goes over a link. A fixed header, whole numbers, floating-point numbers, and raw tensors.

```
header   magic 4s | kind B | 3 spare bytes | ints I | floats I | tensors I | bytes of all that follows Q
payload  ints int64 ... | of each tensor its dtype and shape, 8 int64 | floats float64 ... | bytes of the tensors
```
Numbers have the byte order of the machine, which both ends must share (``hello.py``).
Nothing is ever unpickled: a frame that is no such thing raises :class:`BadFrame`, and so does one that announces
more bytes than a limit, before they are read. What the numbers mean stands in ``messages.py``.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

MAGIC = b"EXLM"
HEADER = struct.Struct("<4sB3xIIIQ")
MAX_FRAME = 1 << 30  # bytes; a link takes less where it needs less
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
_RECORD = 8  # numbers that describe a tensor: dtype, how many dimensions, and up to six of them
_MAX_TENSORS = 64


class BadFrame(Exception):
    """What came over a link is no frame; nothing more can be read from it."""


class Kind(IntEnum):
    """What a frame is."""

    TEXT = 0  # a JSON object, as one tensor of bytes: what is said while a link is made
    TENSOR = 1  # a piece of a tensor that a stage keeps
    PASS = 2  # rows to take from one boundary to another
    CLEAR = 3  # blocks to overwrite
    DONE = 4  # what a pass brought
    FAILED = 5  # a JSON object: a pass broke off


_KINDS = tuple(Kind)


@dataclass(frozen=True)
class Frame:
    """One frame."""

    kind: Kind
    ints: Sequence[int] = ()
    floats: Sequence[float] = ()
    tensors: Sequence[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Size:
    """What a header announces."""

    kind: Kind
    ints: int
    floats: int
    tensors: int
    payload: int


def encode(frame: Frame) -> list[bytes | memoryview]:
    """The pieces of a frame, to be sent one after the other. Tensors on a CPU are not copied."""
    records: list[int] = []
    pieces: list[bytes | memoryview] = []
    size = 0
    for tensor in frame.tensors:
        held = tensor
        if held.device.type != "cpu" or not held.is_contiguous():
            held = held.contiguous().cpu()
        shape = held.shape
        records += [_DTYPES.index(held.dtype), len(shape), *shape, *(0,) * (_RECORD - 2 - len(shape))]
        if held.numel():
            flat = held.reshape(-1).view(torch.uint8) if held.dtype == torch.bfloat16 or not shape else held
            pieces.append(flat.numpy().data.cast("B"))
            size += held.numel() * held.element_size()
    numbers = array("q", [*frame.ints, *records]).tobytes() + array("d", frame.floats).tobytes()
    size += len(numbers)
    header = HEADER.pack(MAGIC, frame.kind, len(frame.ints), len(frame.floats), len(frame.tensors), size)
    return [header + numbers, *pieces]


def read_header(data: bytes | bytearray | memoryview, limit: int) -> Size:
    """What a header announces.

    Raises:
        BadFrame: it is none, or announces more than ``limit`` bytes.
    """
    magic, kind, ints, floats, tensors, payload = HEADER.unpack(data)
    if magic != MAGIC:
        raise BadFrame("what came is no frame of exitlm")
    if kind >= len(_KINDS):
        raise BadFrame(f"a frame of kind {kind} came, which is none")
    if payload > limit:
        raise BadFrame(f"a frame of {payload} bytes came, but at most {limit} are taken")
    if tensors > _MAX_TENSORS or 8 * (ints + floats + _RECORD * tensors) > payload:
        raise BadFrame("a frame came whose parts do not fit into it")
    return Size(_KINDS[kind], ints, floats, tensors, payload)


def decode(size: Size, payload: bytearray) -> Frame:
    """A frame. Its tensors lie in ``payload``.

    Raises:
        BadFrame: the parts are not what the header says.
    """
    count = size.ints + _RECORD * size.tensors
    found = struct.unpack_from(f"{count}q{size.floats}d", payload)
    numbers, values, at = found[:count], found[count:], 8 * (count + size.floats)
    tensors = []
    for i in range(size.tensors):
        code, dimensions, *shape = numbers[size.ints + _RECORD * i : size.ints + _RECORD * (i + 1)]
        if not (0 <= code < len(_DTYPES) and 0 <= dimensions <= len(shape)) or min(shape) < 0:
            raise BadFrame("a frame came with a tensor that is none")
        dtype, count = _DTYPES[code], math.prod(shape[:dimensions])
        if count * dtype.itemsize > size.payload - at:
            raise BadFrame("a frame came with a tensor that does not fit into it")
        tensors.append(
            torch.frombuffer(payload, dtype=dtype, count=count, offset=at).view(shape[:dimensions])
            if count and at % dtype.itemsize == 0
            else _copied(payload, dtype, count, at).view(shape[:dimensions])
        )
        at += count * dtype.itemsize
    if at != size.payload:
        raise BadFrame("a frame came with bytes that belong to nothing")
    return Frame(size.kind, numbers[: size.ints], values, tensors)


def _copied(payload: bytearray, dtype: torch.dtype, count: int, at: int) -> Tensor:
    """A tensor that may not lie where its bytes do."""
    found = torch.empty(count, dtype=dtype)
    if count:
        found.view(torch.uint8).numpy()[:] = memoryview(payload)[at : at + count * dtype.itemsize]
    return found
