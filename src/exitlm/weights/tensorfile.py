"""One safetensors file: its header checked against its size, its tensors mapped, and a writer that streams.

The library's own ``save_file`` needs every tensor in memory at once; :func:`write_tensors` holds one at a time, so that
converting or exporting a model costs one tensor of memory. Reading goes through the library and copies nothing.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exitlm.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# An entry takes 100 to 150 bytes, and no known shard has 100,000 tensors (DeepSeek-V3 has 91,000 in 163 of them).
_MAX_HEADER = 1 << 25
_MAX_DIMENSIONS = 64  # torch's own limit
_CHUNK = 1 << 22
_ALIGNMENT = 64  # of the data in files written here, so that mapped rows suit vector loads


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name there, its dtype by name, its shape, and where its bytes lie."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Written:
    """A tensor to write: ``make()`` is called once, when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def damaged(path: Path, what: str) -> UserError:
    """The sentence for a file that is cut short or corrupt."""
    return UserError(f"{path} is truncated or damaged ({what}); download or copy it again")


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata. Refuses a file that does not hold what it says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, _MAX_HEADER))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if size < 8 or length > size - 8:
        raise damaged(path, "its header is longer than the file")
    if length > _MAX_HEADER:
        raise UserError(
            f"{path} has a header of {length} bytes, more than the {_MAX_HEADER} that any model needs; choose another "
            "file"
        )
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:  # of text, of JSON, or of a number of more than 4,300 digits
        raise damaged(path, "its header is no JSON") from error
    if not isinstance(raw, dict):
        raise damaged(path, "its header is no table")
    metadata = raw.pop("__metadata__", None) or {}
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in raw.items()}
    if sum(entry.end - entry.start for entry in entries.values()) > size - 8 - length:
        raise damaged(path, "its tensors overlap")
    return entries, {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}


def _entry(path: Path, name: str, value: Any, base: int, size: int) -> Entry:
    try:
        dtype, shape = str(value["dtype"]), tuple(value["shape"])
        start, end = (n + base for n in value["data_offsets"])
        if len(shape) > _MAX_DIMENSIONS or not all(isinstance(n, int) for n in (*shape, start, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"the entry of tensor '{name}' is malformed") from error
    if dtype not in DTYPES:
        raise UserError(f"{path}: tensor '{name}' has dtype {dtype}, which exitlm does not read; use F32, F16 or BF16")
    if (
        min(shape, default=0) < 0
        or not base <= start <= end
        or end - start != math.prod(shape) * DTYPES[dtype].itemsize
    ):
        raise damaged(path, f"the size of tensor '{name}' contradicts its shape")
    if end > size:
        raise damaged(path, f"it ends inside tensor '{name}'")
    return Entry(path, name, dtype, shape, start, end)


def open_file(path: Path) -> Any:
    """The library's handle on a file, whose tensors are mapped when asked for."""
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from error


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in memory order, without a copy where it lies contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def write_tensors(path: Path, tensors: Iterable[Written], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, one tensor in memory at a time, in the order given.

    Raises:
        UserError: a tensor holds NaN or infinity; the file is then incomplete.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            value = tensor.make()
            assert (value.dtype, tuple(value.shape)) == (tensor.dtype, tensor.shape), tensor.name
            if not is_finite(value):
                raise UserError(
                    f"tensor '{tensor.name}' holds NaN or infinity in {str(value.dtype).removeprefix('torch.')}, and "
                    "nothing was written; put its values right, or write them in a wider dtype (float32)"
                )
            file.write(raw_bytes(value))


class TensorsDigest:
    """SHA-256 over tensors in the order of their names: name, dtype, shape and bytes of each."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def begin(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self._hash.update(f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode())

    def data(self, chunk: bytes | bytearray | memoryview) -> None:
        self._hash.update(chunk)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest_of_entries(entries: Mapping[str, Entry]) -> str:
    """The :class:`TensorsDigest` of tensors on the disk, read in pieces and never mapped."""
    digest, buffer = TensorsDigest(), memoryview(bytearray(_CHUNK))
    files: dict[Path, BinaryIO] = {}
    try:
        for name in sorted(entries):
            entry = entries[name]
            digest.begin(name, entry.dtype, entry.shape)
            if entry.file not in files:
                files[entry.file] = entry.file.open("rb", buffering=0)
            file = files[entry.file]
            file.seek(entry.start)
            left = entry.end - entry.start
            while left:
                count = file.readinto(buffer[: min(left, _CHUNK)])  # type: ignore[attr-defined]
                if not count:
                    raise damaged(entry.file, f"it ends inside tensor '{name}'")
                digest.data(buffer[:count])
                left -= count
    except OSError as error:
        raise UserError(f"cannot read the weights: {error}") from error
    finally:
        for file in files.values():
            file.close()
    return digest.hexdigest()


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The :class:`TensorsDigest` of tensors in memory; equal to that of a file with the same tensors."""
    digest = TensorsDigest()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.begin(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        digest.data(raw_bytes(tensor))
    return digest.hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
