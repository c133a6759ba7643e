"""Writing a model as a Hugging Face directory that ``transformers`` loads as it is, with the exits beside the weights.

Tensors keep their names and bits; one is in memory at a time. The directory appears when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exitlm.atomic import check_free, replace_directory
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel
from exitlm.model.families import FAMILIES
from exitlm.weights.adapter import attach, backbone_tensors, base_of, heads_to_write, is_adapter, write_adapter
from exitlm.weights.checkpoint import INDEX, SINGLE, Checkpoint, dtype_of
from exitlm.weights.load import load_model
from exitlm.weights.source import resolve
from exitlm.weights.tensorfile import DTYPE_NAMES, TensorsDigest, Written, raw_bytes, write_tensors

_SHARD_BYTES = 5_000_000_000
# What belongs to a model besides weights and config.json, and is copied as it is.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def export(
    source: EarlyExitModel | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a model and its exits to ``directory``, which must not exist or be empty.

    ``source`` is a model or what ``load_model`` takes (then the exits beside its weights come along). ``dtype`` None
    keeps that of the weights. No file of weights is larger than ``shard_bytes``, but for a larger tensor.

    Raises:
        UserError: the source can't be loaded, the model is not whole or has several adapters with an exit at one layer,
            or the directory is taken or can't be written.
    """
    directory = Path(directory)
    check_free(directory)
    chosen = None if dtype is None or (isinstance(dtype, str) and dtype == "auto") else dtype_of(dtype)
    model = source if isinstance(source, EarlyExitModel) else _load(source)
    if len(model.model.layers) != model.config.num_hidden_layers:
        raise UserError("the model has only some of its layers; load all of them to export it")
    heads = heads_to_write(model) if model.exit_sets() else {}
    with replace_directory(directory) as place:
        digest = _write_weights(place, backbone_tensors(model), chosen, shard_bytes)
        config = exported_config(model, chosen or model.dtype)
        (place / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if isinstance(model.checkpoint, Checkpoint):
            for name in _COPIED:
                if (model.checkpoint.directory / name).is_file():
                    shutil.copyfile(model.checkpoint.directory / name, place / name)
        if heads:
            write_adapter(place, heads, base_of(model, digest=digest, name=directory.name), dtype=chosen)


def _load(source: str | os.PathLike[str]) -> EarlyExitModel:
    path = resolve(source)
    model = load_model(source)
    if is_adapter(path):
        attach(model, [path])
    return model


def exported_config(model: EarlyExitModel, dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of a model: the one it was read from, flat where that was a text model within a larger one."""
    config = {key: value for key, value in model.config.hf.items() if key not in ("torch_dtype", "dtype")}
    if "text_config" in config:
        inner = config.pop("text_config")
        config.pop("vision_config", None)
        config = {**config, **{key: value for key, value in inner.items() if key not in ("torch_dtype", "dtype")}}
    config["model_type"] = model.config.model_type
    config["architectures"] = [FAMILIES[model.config.model_type].architectures[0]]
    config["tie_word_embeddings"] = model.config.tie_word_embeddings
    config["dtype"] = str(dtype).removeprefix("torch.")
    return config


def _write_weights(place: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, shard_bytes: int) -> str:
    """Write the tensors in the order of their names, in one file or several with an index; the digest of all."""
    digest = TensorsDigest()

    def maker(name: str, tensor: Tensor, chosen: torch.dtype) -> Callable[[], Tensor]:
        def make() -> Tensor:
            value = tensor.detach().to("cpu", chosen)
            digest.begin(name, DTYPE_NAMES[chosen], tuple(value.shape))
            digest.data(raw_bytes(value))
            return value

        return make

    shards: list[list[Written]] = [[]]
    size = 0
    for name, tensor in sorted(tensors.items()):
        chosen = dtype or tensor.dtype
        written = Written(name, chosen, tuple(tensor.shape), maker(name, tensor, chosen))
        if shards[-1] and size + written.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(written)
        size += written.nbytes
    if len(shards) == 1:
        write_tensors(place / SINGLE, shards[0], {"format": "pt"})
        return digest.hexdigest()
    total = sum(written.nbytes for shard in shards for written in shard)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(place / file, shard, {"format": "pt"})
        where |= {written.name: file for written in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (place / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return digest.hexdigest()
