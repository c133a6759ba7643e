"""The model that a run made, as one of its checkpoints holds it: whole, on the CPU, ready to be exported or decoded.

Both kinds of runs: exits tuned by one process (``tune.py``), and runs over a mesh of processes (``full.py``), whose
checkpoints are put together from what each process wrote.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from exitlm.errors import UserError
from exitlm.model.config import ModelConfig
from exitlm.model.decoder import EarlyExitModel
from exitlm.parallel.pipeline.split import make_split
from exitlm.parallel.pipeline.stage import Stage
from exitlm.parallel.tied import canonical
from exitlm.train import checkpoint as run_files
from exitlm.train import sharded
from exitlm.train.data import ByteTokenizer
from exitlm.train.exits import exit_configs
from exitlm.train.head_loss import HeadLosses
from exitlm.train.run import RunConfig
from exitlm.values import path_of
from exitlm.weights.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from exitlm.weights.load import load_model


def is_checkpoint(place: Path) -> bool:
    """Whether a directory is one checkpoint of a run."""
    place = Path(os.path.abspath(place))
    return (sharded.is_sharded(place) or run_files.is_checkpoint(place)) and (
        place.parent.parent / "run.toml"
    ).is_file()


def model_of_run(place: str | os.PathLike[str]) -> EarlyExitModel:
    """The model of a run with the values of one checkpoint (``place``), or of the newest that is whole (``place`` is
    the run's directory), finished or not.

    Raises:
        UserError: there is no whole checkpoint, or the base is not what it was.
    """
    place = Path(os.path.abspath(path_of(place, "the run")))
    one = is_checkpoint(place)
    out = place.parent.parent if one else place
    config = RunConfig.from_toml(out / "run.toml")
    places = [place] if one else list(reversed(run_files.list_checkpoints(out)))
    if any(sharded.is_sharded(p) for p in places):
        return _of_mesh(out, config, places, one)
    return _of_tuning(out, config, place if one else None)


def _opened(out: Path, config: RunConfig) -> Checkpoint:
    try:
        return open_checkpoint(config.model.base)
    except UserError as error:
        raise UserError(f"{error} (if it moved, write its place into model.base of {out / 'run.toml'})") from error


def _of_tuning(out: Path, config: RunConfig, place: Path | None) -> EarlyExitModel:
    found = run_files.newest(out) if place is None else run_files.read(place)
    if found is None:
        raise UserError(f"the run in {out} has no checkpoint yet; start it again, or export its base")
    opened = _opened(out, config)
    run_files.check_same(out, found.meta, {"base_digest": opened.digest()})
    model = load_model(opened)
    for e in exit_configs(config):
        ids = found.tensors.get(f"exits.{e.layer}.candidate_ids")
        if e.candidates and ids is None:
            raise UserError(f"this checkpoint of {out} lacks the candidates of exit {e.layer}; finish the run instead")
        model.add_exits([e], candidate_ids=ids)
    with torch.no_grad():
        for layer, head in model.exit_heads().items():
            for name, parameter in head.named_parameters():
                if f"exits.{layer}.{name}" in found.tensors:  # a matrix of several exits is there once
                    parameter.copy_(found.tensors[f"exits.{layer}.{name}"])
    return model


def _of_mesh(out: Path, config: RunConfig, places: list[Path], one: bool) -> EarlyExitModel:
    for place in places:
        try:
            meta = sharded.read_meta(place)
            break
        except run_files.Damaged as error:
            if one:
                raise
            if place == places[-1]:
                raise run_files.nothing_whole(out, str(error)) from error
            warnings.warn(f"{error}; taking the one before it", stacklevel=3)
    opened = _opened(out, config) if config.model.base else None
    if opened is not None:
        run_files.check_same(out, meta, {"base_digest": opened.digest()})
    exits, shape = exit_configs(config), ModelConfig.from_hf(meta["model"])
    dtype = torch.promote_types(getattr(torch, config.train.dtype), torch.float32)
    ids = torch.tensor(meta["candidate_ids"]) if meta["candidate_ids"] else None
    if config.train.parameters == "exits":
        assert opened is not None
        model = load_model(opened)
        model.add_exits(exits, candidate_ids=ids)
    else:
        with torch.device("meta"):
            stage = Stage(shape, exits, make_split(shape, exits, 1, place="end"), 0, HeadLosses())
        stage.to(dtype).to_empty(device="cpu")
        stage.tie()
        model = stage.model.eval()
        model.checkpoint = opened
        for head in model.exit_heads().values():
            if head.config.candidates:
                chosen = torch.arange(head.config.candidates) if ids is None else ids[: head.config.candidates]
                head.candidate_ids = chosen.sort().values
    tensors = {
        f"model.{canonical(name, shape, exits)}": parameter.detach()
        for name, parameter in model.named_parameters()
        if config.train.parameters == "all" or name.startswith("exits.")
    }
    sharded.load(place, tensors, alone=True)
    return model


def recorded(config: RunConfig, base: str) -> dict[str, Any]:
    """The settings that go into an adapter; ``base`` is the model's name, not where it lay on this machine."""
    tree = {name: asdict(getattr(config, name)) for name in ("model", "exits", "objective", "data", "train")}
    return tree | {"model": {**asdict(config.model), "base": base}}


def versions() -> dict[str, str]:
    """Of what a run was made with."""
    out = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("exitlm", "transformers", "safetensors"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "source tree"
    return out


def write_tokenizer(place: Path, directory: Path) -> None:
    """Put the tokenizer of a run (its directory, or a checkpoint) beside its exported model, where it did not come with
    the base: that of ``data.tokenizer``, or one of transformers for bytes."""
    place = Path(os.path.abspath(place))
    config = RunConfig.from_toml((place.parent.parent if is_checkpoint(place) else place) / "run.toml")
    name = config.data.tokenizer
    if name not in ("", "bytes"):
        load_tokenizer(Path(name)).save_pretrained(str(directory))
    elif not config.model.base:
        byte_tokenizer().save_pretrained(str(directory))


def byte_tokenizer() -> Any:
    """:class:`ByteTokenizer` as one of transformers: the same ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in byte-level BPE
    names = {byte: chr(byte) for byte in shown}
    names |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in names)}
    tokenizer = Tokenizer(models.BPE(vocab={name: byte for byte, name in names.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    assert tokenizer.token_to_id("<|end|>") == ByteTokenizer.eos_id
    wrapped: Any = PreTrainedTokenizerFast
    return wrapped(tokenizer_object=tokenizer, eos_token="<|end|>")
