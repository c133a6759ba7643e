"""What a GGUF file holds: its metadata as plain values, and its tensors as bytes that are mapped, not read.

The ``gguf`` package reads files too, but keeps several objects for every string of the vocabulary (seconds and
hundreds of MiB for a large one) and says little about a file that is cut short; its ``dequantize`` is what
:meth:`GGUFFile.array` uses. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3,
little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitlm.errors import UserError, short

# GGML type id -> name, elements per block, bytes per block. (A "Q4_K" file mixes types: rows that no block of 256 fits
# are Q5_0 or Q8_0, and some matrices Q6_K.)
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_ALIGNMENT = 32
_CHUNK = 1 << 22  # elements
_MAX_DIMENSIONS = 4
# Gemma 3's header has 262,144 tokens and takes 6 MB; one with as many merges takes 10 MB.
_MAX_HEADER, _MAX_ITEMS = 100_000_000, 1 << 22


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file. ``shape`` is in memory order (rows first), as numpy and torch have it."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class GGUFFile:
    """An open GGUF file: ``metadata`` by key and ``tensors`` by name."""

    def __init__(self, path: Path) -> None:
        """Read the header of ``path``.

        Raises:
            UserError: the file can't be read, is no GGUF, is truncated or damaged, or has an unsupported tensor type.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                head = file.read(8)
                if head[:4] != b"GGUF":
                    raise UserError(f"{path} is no GGUF file; give a .gguf file or a model directory")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        version = int.from_bytes(head[4:8], "little")
        if version not in (2, 3):
            raise UserError(f"{path} has GGUF version {version}, exitlm reads versions 2 and 3 in little-endian order")
        self._at = 8
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            count, keys = self._unpack("QQ")
            for _ in range(keys):
                key = self._string()
                if key in self.metadata:
                    raise self._damaged(f"its header has the key {short(key)} twice")
                self.metadata[key] = self._value(*self._unpack("I"))
            infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
            for _ in range(count):
                name, type_id, shape, offset = self._tensor_info()
                if name in infos:
                    raise self._damaged(f"it has the tensor {short(name)} twice")
                infos[name] = type_id, shape, offset
        except UnicodeDecodeError as error:
            raise self._damaged("a text in its header is corrupt") from error
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"its alignment is {short(alignment)}")
        base = -(-self._at // alignment) * alignment
        for name, (type_id, shape, offset) in infos.items():
            self._add_tensor(name, type_id, shape, base + offset)

    def _add_tensor(self, name: str, type_id: int, shape: tuple[int, ...], start: int) -> None:
        if type_id not in TYPES:
            raise UserError(
                f"{self.path}: tensor '{name}' has GGML type {type_id}, which exitlm does not read; choose a file with "
                f"{', '.join(sorted(label for label, _, _ in TYPES.values()))}"
            )
        label, block, size = TYPES[type_id]
        if min(shape, default=0) < 1 or shape[-1] % block:
            raise self._damaged(f"tensor '{name}' is malformed")
        nbytes = math.prod(shape) // block * size
        if start + nbytes > len(self._map):
            raise self._damaged(f"it ends inside tensor '{name}'")
        self.tensors[name] = GGUFTensor(name, label, shape, start, nbytes)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path} is truncated or damaged ({what}); download or copy it again")

    def _skip(self, length: int) -> int:
        """Go on by ``length`` bytes of the header; returns where they begin."""
        start, self._at = self._at, self._at + length
        if self._at > len(self._map):
            raise self._damaged("it ends inside its header")
        if self._at > _MAX_HEADER:
            raise UserError(
                f"{self.path} has a header of more than {_MAX_HEADER} bytes, which no model needs; choose another file"
            )
        return start

    def _unpack(self, codes: str) -> tuple[Any, ...]:
        return struct.unpack_from("<" + codes, self._map, self._skip(struct.calcsize("<" + codes)))

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start = self._skip(length)
        return self._map[start : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, length = self._unpack("IQ")
            if length > _MAX_ITEMS:
                raise self._damaged(f"its header has a list of {length} items, more than {_MAX_ITEMS}")
            if item in _SCALARS:
                values = list(self._unpack(f"{length}{_SCALARS[item]}"))
                return [shortest(value) for value in values] if item == _FLOAT32 else values
            if item != _STRING:
                raise self._damaged(f"its header holds a list of type {item}")
            return [self._string() for _ in range(length)]
        if kind not in _SCALARS:
            raise self._damaged(f"its header holds a value of type {kind}")
        (value,) = self._unpack(_SCALARS[kind])
        return shortest(value) if kind == _FLOAT32 else value

    def _tensor_info(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        (dimensions,) = self._unpack("I")
        if dimensions > _MAX_DIMENSIONS:
            raise self._damaged(f"tensor '{name}' has {dimensions} dimensions")
        shape = tuple(reversed(self._unpack(f"{dimensions}Q")))
        type_id, offset = self._unpack("IQ")
        return name, type_id, shape, offset

    def array(self, name: str) -> NDArray[Any]:
        """The values of a tensor: float32, or float16 for an F16 tensor (BF16 comes as the float32 of equal value).

        Quantised values are those of the ``gguf`` package's ``dequantize``.
        """
        tensor = self.tensors[name]
        count = math.prod(tensor.shape)
        if tensor.type in ("F32", "F16"):
            dtype = np.dtype("<f4" if tensor.type == "F32" else "<f2")
            return np.frombuffer(self._map, dtype, count, tensor.start).reshape(tensor.shape)
        raw = self.raw(name)
        values: NDArray[Any] = np.empty((len(raw), tensor.shape[-1]), np.float32)
        step = max(1, _CHUNK // tensor.shape[-1])  # the package needs several times the memory of what it makes
        for first in range(0, len(raw), step):
            values[first : first + step] = self.values(tensor.type, raw[first : first + step])
        return values.reshape(tensor.shape)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor's rows, ``[rows, bytes of a row]``, where they lie in the file."""
        tensor = self.tensors[name]
        rows = math.prod(tensor.shape) // tensor.shape[-1]
        return np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.start).reshape(rows, -1)

    @staticmethod
    def values(type: str, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The values of rows in a type, float32."""
        if type in ("F32", "F16"):
            return raw.view("<f4" if type == "F32" else "<f2").astype(np.float32)
        try:
            from gguf import GGMLQuantizationType, dequantize
        except ImportError:
            raise UserError(
                "reading quantised GGUF files needs the gguf package; install it: pip install gguf"
            ) from None
        found: NDArray[np.float32] = dequantize(raw, GGMLQuantizationType[type])
        return found


def shortest(value: float) -> float:
    """The shortest decimal that rounds to this float32: 9.999999747e-06 was written as 1e-05."""
    return float(str(np.float32(value)))
