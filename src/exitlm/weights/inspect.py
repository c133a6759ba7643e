"""What a directory, an adapter or a GGUF file holds, as plain data and as text. Nothing is loaded or converted."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exitlm.errors import UserError
from exitlm.model import ModelConfig
from exitlm.weights.adapter import Adapter, is_adapter, read_adapter
from exitlm.weights.checkpoint import HEAD, TOKENIZER_FILES, Checkpoint, read_json
from exitlm.weights.gguf_config import ROPE_FACTORS, hf_config
from exitlm.weights.gguf_file import GGUFFile
from exitlm.weights.source import display_name, resolve

MOST_VALUES = 12  # a longer list is only counted


def describe(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What is at a path (or hub id, or packaged name), as plain data; ``kind`` is model, gguf or adapter.

    ``supported`` is True, or the sentence that says why exitlm can't load it. Sizes are in bytes.

    Raises:
        UserError: there is nothing that can be described, or it is damaged.
    """
    path = resolve(source)
    if not path.is_dir():
        return _gguf(path)
    if (path / "config.json").is_file():
        found = _model(Checkpoint(path, display_name(source)))
        found["exits"] = _adapter(read_adapter(path)) if is_adapter(path) else None
        return found
    if is_adapter(path) or (path / "checkpoints").is_dir():
        return _adapter(read_adapter(path))
    raise UserError(f"{path} holds neither a model (config.json) nor exits (exits.json); give a directory that does")


def _model(checkpoint: Checkpoint) -> dict[str, Any]:
    entries, directory = checkpoint.entries, checkpoint.directory
    tied = _maths(checkpoint.config).get("tied_embeddings", False)
    counted = [entry for name, entry in entries.items() if not (tied and name == HEAD)]
    types = Counter[str]()
    for entry in counted:
        types[entry.dtype] += 1
    settings = read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").is_file() else {}
    return {
        "kind": "model",
        "path": str(directory),
        "name": checkpoint.name,
        **_maths(checkpoint.config),
        "parameters": sum(math.prod(entry.shape) for entry in counted),
        "tensors": dict(types),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "bytes": sum(entry.end - entry.start for entry in entries.values()),
        "files": sorted({entry.file.name for entry in entries.values()}),
        "tokenizer": next((name for name in TOKENIZER_FILES if (directory / name).is_file()), None),
        "chat_template": "chat_template" in settings or (directory / "chat_template.jinja").is_file(),
    }


def _gguf(path: Path) -> dict[str, Any]:
    file = GGUFFile(path)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    metadata = file.metadata
    try:
        factors = file.array(ROPE_FACTORS) if ROPE_FACTORS in shapes else None
        maths = _maths(hf_config(metadata, shapes, factors, str(path)))
    except UserError as error:
        maths = {"model_type": metadata.get("general.architecture"), "supported": str(error)}
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    return {
        "kind": "gguf",
        "path": str(path),
        "name": metadata.get("general.name") or path.stem,
        **maths,
        "parameters": sum(math.prod(shape) for name, shape in shapes.items() if name != ROPE_FACTORS),
        "tensors": dict(Counter(tensor.type for tensor in file.tensors.values())),
        "bytes": path.stat().st_size,
        "files": [path.name],
        "license": metadata.get("general.license"),
        "tokenizer": f"{kind}{f' ({pre})' if pre else ''}, {len(tokens)} tokens" if tokens else None,
        "chat_template": "tokenizer.chat_template" in metadata,
    }


def _maths(config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        read = ModelConfig.from_hf(config)
    except UserError as error:
        return {"model_type": config.get("model_type"), "supported": str(error)}
    return {
        "model_type": read.model_type,
        "supported": True,
        "layers": read.num_hidden_layers,
        "hidden_size": read.hidden_size,
        "heads": read.num_attention_heads,
        "key_value_heads": read.num_key_value_heads,
        "vocabulary": read.vocab_size,
        "context": read.max_position_embeddings,
        "rope": read.rope.kind,
        "tied_embeddings": read.tie_word_embeddings,
    }


def _adapter(adapter: Adapter) -> dict[str, Any]:
    return {
        "kind": "adapter",
        "path": str(adapter.directory),
        "version": adapter.meta["version"],
        "base": dict(adapter.meta["base"]),
        "parameters": sum(t.numel() for t in adapter.tensors.values() if t.is_floating_point()),
        "bytes": sum(tensor.nbytes for tensor in adapter.tensors.values()),
        "exits": [
            {
                "layer": config.layer,
                "kind": config.kind,
                "output": config.output,
                "candidates": config.candidates,
                "gate": config.gate,
                "branch": config.branch,
                "record": adapter.records[config.layer].to_json(),
            }
            for config in adapter.exits
        ],
        "training": adapter.meta.get("training"),
    }


def show(source: str | os.PathLike[str]) -> None:
    """Print what :func:`describe` finds: a table of properties, and one of the exits."""
    from rich.console import Console
    from rich.table import Table

    found = describe(source)
    console = Console(highlight=False)
    exits = found if found["kind"] == "adapter" else found.get("exits")
    properties = Table(
        title=f"{found['kind']}: {found.get('name') or found['path']}", show_header=False, title_justify="left"
    )
    properties.add_column(style="bold")
    properties.add_column(overflow="fold")
    for key, value in found.items():
        if key not in ("kind", "name", "exits", "training"):
            properties.add_row(key.replace("_", " "), _text(key, value))
    console.print(properties)
    if exits:
        rows = exits["exits"]
        table = Table(title="exits", title_justify="left")
        for heading in ("layer", "kind", "output", "candidates", "gate", "branch", "record"):
            table.add_column(heading)
        for row in rows:
            table.add_row(*(_text(key, value) for key, value in row.items()))
        console.print(table)
    if found.get("training"):
        console.print("training: " + _text("training", found["training"]))


def _text(key: str, value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key == "bytes":
        return f"{value / 1e6:,.1f} MB"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(str(name), entry)}" for name, entry in value.items())
    if isinstance(value, list):
        if len(value) > MOST_VALUES:
            return f"{len(value)} values"
        return ", ".join(_text("", entry) for entry in value)
    return str(value)
