"""A model's matrices in the bytes of the GGUF file that they came from: what a kernel for its grids reads.

A parameter that was changed since it was loaded is not what the file holds, and has no stored form any more.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from exitlm.errors import UserError
from exitlm.model import EarlyExitModel
from exitlm.native.pack import RAW_TYPES, RawMatrix
from exitlm.weights.gguf import unpermute
from exitlm.weights.gguf_config import Architecture, architecture_of, hf_name
from exitlm.weights.gguf_file import GGUFFile

_LOOKED_AT = 4
"""Rows of each matrix that are compared."""


class StoredMatrices:
    """The stored matrices of a model: a callable of a parameter's name and the parameter."""

    def __init__(self, model: EarlyExitModel) -> None:
        self._model = model
        checkpoint = model.checkpoint
        self._path = None if checkpoint is None else checkpoint.source

    @property
    def lost(self) -> bool:
        """Whether there was a file that can't be read any more."""
        return self._path is not None and self._file is None

    @functools.cached_property
    def _file(self) -> tuple[GGUFFile, Architecture, dict[str, str]] | None:
        if self._path is None:
            return None
        try:
            file = GGUFFile(self._path)
            architecture = architecture_of(file.metadata, str(self._path))
        except UserError:  # gone, or another one by now: the model runs from its conversion
            return None
        names = {hf_name(name, architecture): name for name in file.tensors}
        return file, architecture, {target: name for target, name in names.items() if target is not None}

    def __call__(self, name: str, parameter: Tensor) -> RawMatrix | None:
        """The matrix ``[N, K]`` of a parameter as it is stored; None if it is not."""
        if self._file is None or parameter.dtype != torch.float32:
            return None
        file, architecture, names = self._file
        if name not in names:
            return None
        tensor = file.tensors[names[name]]
        if len(tensor.shape) != 2 or tensor.type not in RAW_TYPES:
            return None
        rows = file.raw(names[name])
        heads = {"q_proj": self._model.config.num_attention_heads, "k_proj": self._model.config.num_key_value_heads}
        count = heads.get(name.split(".")[-2], 0)
        if architecture.permuted and count:
            rows = np.ascontiguousarray(unpermute(rows, count))
        chosen = np.linspace(0, len(rows) - 1, _LOOKED_AT).astype(int)
        values = torch.from_numpy(file.values(tensor.type, np.ascontiguousarray(rows[chosen])))
        same = parameter.detach()[torch.from_numpy(chosen)]
        if count_of_changes(parameter) or not torch.equal(values, same):
            return None
        return RawMatrix(tensor.type, rows, tensor.shape[1])


def count_of_changes(parameter: Tensor) -> int:
    """How often a tensor was changed in place, as torch counts it: not through ``.data``, and not where the tensor was
    made in inference mode."""
    return 0 if parameter.is_inference() else parameter._version
