"""Packed matrices of a model in one file of the user's cache: written once, then mapped, so that several processes
share its pages and loading reads nothing.

The file is published whole, and holds its own length and a digest of its table; one that is damaged or of another
layout is made anew. What the matrices themselves hold is not verified: that would read them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exitlm.atomic import locked, replace_file
from exitlm.native.pack import FORMATS, packed_bytes

LAYOUT = 3
"""Counts up when the same matrix would be packed otherwise."""
_MAGIC = b"exitpack"
_HEAD = struct.Struct("<8sIIQ16s")  # magic, layout, length of the table, length of the file, digest of all this
_PAGE = 4096
_WRITTEN = 1 << 25
"""Bytes that are written at once, so that the system keeps them in large pages."""
Bytes = NDArray[np.uint8]
Packed = tuple[str, int, int, Bytes]
"""Format, rows (padded), columns, and the packed bytes."""


class Damaged(ValueError):
    """A file that is no pack of this layout."""


def read(path: Path) -> tuple[dict[str, Packed], str]:
    """The matrices of a file by name, mapped, and the mark that it was written with.

    Raises:
        OSError: it can't be read.
        Damaged: it is cut short, or something else.
    """
    with path.open("rb") as file:
        try:
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise Damaged(f"{path} is empty") from error
    with suppress(OSError, AttributeError):  # where the system has them: half of the time of reading is gone
        held.madvise(mmap.MADV_HUGEPAGE)
    try:
        magic, layout, size, length, digest = _HEAD.unpack_from(held)
        if magic != _MAGIC or layout != LAYOUT or length != len(held):
            raise Damaged(f"{path} is cut short or of another layout")
        text = held[_HEAD.size : _HEAD.size + size]
        if digest != _digest(text, length):
            raise Damaged(f"{path} is damaged")
        table = json.loads(text)
        whole = np.frombuffer(held, np.uint8)
        found = {}
        for name, (format, rows, cols, start) in table["matrices"].items():
            count = packed_bytes(FORMATS[FORMATS.index(format)], rows, cols)
            if rows % 32 or cols % 32 or start % 64 or not 0 < start <= start + count <= length:
                raise Damaged(f"{path} holds a matrix that does not fit")
            found[name] = format, rows, cols, whole[start : start + count]
        return found, table["mark"]
    except Damaged:
        raise
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path} is damaged") from error


def write(path: Path, matrices: Mapping[str, Packed], mark: str) -> None:
    """Write matrices to a file, unless another process has just done so.

    Raises:
        OSError: there is no room, or no permission.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table: dict[str, tuple[str, int, int, int]] = {}
    # the table's own length moves where matrices begin: room for it is counted first
    size = len(json.dumps({"mark": mark, "matrices": {name: [*each[:3], 1 << 60] for name, each in matrices.items()}}))
    at = -(-(_HEAD.size + size) // _PAGE) * _PAGE
    for name, (format, rows, cols, packed) in matrices.items():
        table[name] = format, rows, cols, at
        at = -(-(at + len(packed)) // _PAGE) * _PAGE
    text = json.dumps({"mark": mark, "matrices": table}).encode()
    with locked(path), replace_file(path) as partial, partial.open("wb", buffering=_WRITTEN) as file:
        file.write(_HEAD.pack(_MAGIC, LAYOUT, len(text), at, _digest(text, at)) + text)
        for name, (*_, packed) in matrices.items():
            file.write(bytes(table[name][3] - file.tell()))
            file.write(packed.data)
        file.write(bytes(at - file.tell()))


def _digest(table: bytes, length: int) -> bytes:
    """16 bytes that tell whether the table is what was written."""
    return hashlib.sha256(_HEAD.pack(_MAGIC, LAYOUT, len(table), length, b"") + table).digest()[:16]
