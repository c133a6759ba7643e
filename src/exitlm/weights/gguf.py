"""GGUF files: converted once, into a directory of the user's cache that looks like any Hugging Face checkpoint.

Quantised tensors become float32; a file whose matrices are all F16 or BF16 keeps every tensor as it is stored. What
llama.cpp's converter did to the values is undone: the pairwise order of q and k rows, the 1 that Gemma's norms hold.
The cache is keyed by the content of the file, so a copy or a fresh installation finds the same conversion.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitlm.atomic import locked, replace_directory
from exitlm.errors import UserError
from exitlm.model import ModelConfig
from exitlm.weights.gguf_config import (
    ROPE_FACTORS,
    TOP_TENSORS,
    Architecture,
    architecture_of,
    hf_config,
    hf_name,
)
from exitlm.weights.gguf_file import GGUFFile
from exitlm.weights.gguf_tokenizer import write_tokenizer
from exitlm.weights.store import cache_directory, cannot_keep, kept_digest
from exitlm.weights.tensorfile import DTYPE_NAMES, TensorsDigest, Written, digest_of_file, raw_bytes, write_tensors

# Counts up when a conversion of the same file would come out differently.
CONVERSION = 1
RECORD = "conversion.json"
_HALF = {"F16": torch.float16, "BF16": torch.bfloat16}


def converted(path: Path) -> Path:
    """The directory that holds the conversion of a GGUF file, made now if there is none.

    Raises:
        UserError: the file is damaged or not supported, or the cache can't be written (``EXITLM_CACHE`` moves it).
    """
    content = kept_digest([path], "file", lambda: digest_of_file(path))
    place = cache_directory() / "gguf" / f"{path.stem}-{content[:20]}-{CONVERSION}"
    if not _is_whole(place):
        file = GGUFFile(path)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_keep(place, error) from error
        with locked(place.parent, timeout=3600):
            if not _is_whole(place):  # another process may have been faster
                shutil.rmtree(place, ignore_errors=True)
                with replace_directory(place) as directory:
                    convert(file, directory)
    return place


def _is_whole(directory: Path) -> bool:
    return recorded_digest(directory) is not None


def recorded_digest(directory: Path) -> str | None:
    """The digest that a conversion's weights had when it was made; None if there are none, or they were changed."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        status = (directory / "model.safetensors").stat()
        unchanged = (status.st_size, status.st_mtime_ns) == (record["size"], record["mtime_ns"])
        return record["digest"] if unchanged and isinstance(record["digest"], str) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def tokenizer_problem(directory: Path) -> str | None:
    """Why a conversion has no tokenizer; None if it has one, or is no conversion."""
    try:
        problem = json.loads((directory / RECORD).read_text(encoding="utf-8"))["tokenizer_problem"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return problem if isinstance(problem, str) else None


def convert(file: GGUFFile, directory: Path) -> None:
    """Write config.json, model.safetensors, the tokenizer and a record of the conversion into ``directory``."""
    where = str(file.path)
    architecture = architecture_of(file.metadata, where)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    factors = file.array(ROPE_FACTORS) if ROPE_FACTORS in shapes else None
    config = hf_config(file.metadata, shapes, factors, where)
    _check_config(config, where)
    makers = _makers(file, architecture, config)
    config["dtype"] = str(_main_dtype(file)).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    digest = TensorsDigest()

    def hashed(name: str, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def made() -> Tensor:
            tensor = make()
            digest.begin(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
            digest.data(raw_bytes(tensor))
            return tensor

        return made

    tensors = [Written(name, dtype, shape, hashed(name, make)) for name, (dtype, shape, make) in sorted(makers.items())]
    weights = directory / "model.safetensors"
    write_tensors(weights, tensors, {"format": "pt"})
    problem: str | None = None
    try:
        write_tokenizer(file.metadata, directory)
    except UserError as error:
        problem = str(error)
    status = weights.stat()
    record = {
        "source": file.path.name,
        "digest": digest.hexdigest(),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "tokenizer_problem": problem,
    }
    (directory / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse what no model can be before anything is converted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are told when the conversion is read
            ModelConfig.from_hf(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


Maker = tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]


def _main_dtype(file: GGUFFile) -> torch.dtype:
    """float16 or bfloat16 if every matrix is stored in one of them (the embedding's, if in both), else float32."""
    types = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return _HALF[file.tensors["token_embd.weight"].type] if types <= set(_HALF) else torch.float32


def _makers(file: GGUFFile, architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Maker]:
    """For each HF name its dtype, its shape, and how to make it. A tensor the architecture does not have is refused."""
    keep = _main_dtype(file) != torch.float32
    makers: dict[str, Maker] = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_FACTORS or "rot_embd" in name:
            continue
        target = hf_name(name, architecture)
        if target is None:
            raise UserError(
                f"{file.path}: tensor '{name}' is not part of a {config['model_type']} model; choose another file"
            )
        dtype = _HALF.get(tensor.type, torch.float32) if keep else torch.float32
        makers[target] = (dtype, tensor.shape, _maker(file, name, architecture, config, dtype))
    _check_complete(file, architecture, config)
    _add_zero_biases(makers, config)
    return makers


def _check_complete(file: GGUFFile, architecture: Architecture, config: Mapping[str, Any]) -> None:
    needed = [name for name in TOP_TENSORS if name != "output.weight"]
    needed += [
        f"blk.{i}.{part}.weight" for i in range(config["num_hidden_layers"]) for part in architecture.layer_tensors
    ]
    absent = [name for name in needed if name not in file.tensors]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(
            f"{file.path} lacks the tensor '{absent[0]}'{more}; it is incomplete, download or copy it again"
        )


def _add_zero_biases(makers: dict[str, Maker], config: Mapping[str, Any]) -> None:
    """HF configurations know biases of all projections of a block or of none: those that the file lacks are zero."""
    groups = {
        "attention_bias": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    }
    for key, projections in groups.items():
        if not config.get(key):
            continue
        for index in range(config["num_hidden_layers"]):
            for projection in projections:
                name = f"model.layers.{index}.{projection}"
                dtype, shape, _ = makers[f"{name}.weight"]
                zeros = (dtype, shape[:1], lambda n=shape[0], dtype=dtype: torch.zeros(n, dtype=dtype))
                makers.setdefault(f"{name}.bias", zeros)


def _maker(
    file: GGUFFile, name: str, architecture: Architecture, config: Mapping[str, Any], dtype: torch.dtype
) -> Callable[[], Tensor]:
    part = name.split(".")[2] if name.startswith("blk.") else ""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(part, 0)
    if architecture.permuted and heads and file.tensors[name].shape[0] % (2 * heads):
        raise UserError(f"{file.path}: tensor '{name}' does not fit {heads} heads; the file is damaged, choose another")

    def make() -> Tensor:
        values = file.array(name)
        if architecture.permuted and heads:
            values = unpermute(values, heads)
        if architecture.norm_offset and name.endswith("norm.weight"):
            values = values.astype(np.float32) - np.float32(architecture.norm_offset)
        own = values if values.flags.writeable and values.flags.c_contiguous else np.array(values)
        return torch.from_numpy(own).to(dtype)

    return make


def unpermute(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of each head from pairs (x0, y0, x1, y1 ...) to halves (x0, x1 ... y0, y1 ...)."""
    paired = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return paired.swapaxes(1, 2).reshape(values.shape)
