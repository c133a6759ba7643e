"""Megatron checkpoint directories as EE-LLM writes them: one file per tensor-parallel and pipeline rank, read safely.

``latest_checkpointed_iteration.txt`` names ``iter_0000123`` (or ``release``), and there lie ``mp_rank_TT/`` or, with
pipeline stages, ``mp_rank_TT_PPP/model_optim_rng.pt``: pickles of the model's tensors, the settings of the training and
often an optimizer. They go through torch's restricted reader, so that nothing in them runs: a few known classes become
empty stand-ins, a file that names any other class is refused. Tensors are mapped, not loaded. What the tensors mean is
not known here (``megatron.py``).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exitlm.errors import UserError
from exitlm.weights.checkpoint import FLOATS

TRACKER = "latest_checkpointed_iteration.txt"
_SHARD, _OPTIMIZER = "model_optim_rng.pt", "distrib_optim.pt"
_RANKS = "mp_rank_*"
# Classes of what lies beside a model and says nothing of it: enums among the settings, which some versions of Python
# 3.11 wrote as the getattr of a class, and numpy's random state. None of these names is looked up, getattr neither.
_KNOWN = (
    "builtins.getattr",
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnMaskType",
    "megatron.core.transformer.enums.AttnType",
    "megatron.model.enums.AttnMaskType",
    "megatron.model.enums.AttnType",
    "megatron.model.enums.LayerType",
    "megatron.model.enums.ModelType",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
)
_PLAIN = (bool, int, float, str, list, tuple, type(None))


class _StandIn:
    """What an object of a known class becomes: nothing at all."""

    def __new__(cls, *_: object) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class MegatronCheckpoint:
    """One iteration of a training. ``settings`` are its command line's, as far as they are numbers, texts and lists."""

    directory: Path
    settings: Mapping[str, Any]
    iteration: Any
    tensor_ranks: int
    pipeline_ranks: int

    def stage(self, rank: int) -> list[dict[str, Tensor]]:
        """The mapped tensors of a pipeline stage by their joined names (``encoder.layers.0.mlp ...``), for each
        tensor-parallel rank.

        Raises:
            UserError: a shard is damaged, or of another iteration.
        """
        shards = []
        for tensor_rank in range(self.tensor_ranks):
            path = self.directory / _rank_name(tensor_rank, rank, self.pipeline_ranks) / _SHARD
            found = _read(path)
            if found.get("iteration") != self.iteration:
                raise UserError(
                    f"{path} is of iteration {found.get('iteration')}, but the first shard of {self.iteration}; "
                    "copy all shards of one iteration"
                )
            shards.append(dict(_tensors(path, found["model"])))
        return shards


def is_megatron(source: Path) -> bool:
    """Whether a directory is a Megatron checkpoint, or one iteration of it."""
    return source.is_dir() and ((source / TRACKER).is_file() or any(source.glob(_RANKS)))


def open_megatron(source: Path) -> MegatronCheckpoint:
    """The latest iteration of a checkpoint, or the one whose directory is given; all its shards are there.

    Raises:
        UserError: ``source`` is no such directory, is incomplete or damaged, or a file of it names an unknown class.
    """
    directory = _iteration(source)
    found = {path.name for path in directory.glob(_RANKS) if (path / _SHARD).is_file()}
    first = min(found & {_rank_name(0, 0, 1), _rank_name(0, 0, 2)}, default=None)
    if first is None:
        only = any(directory.glob(f"{_RANKS}/{_OPTIMIZER}"))
        what = f"only an optimizer's state ({_OPTIMIZER})" if only else "no first shard"
        raise UserError(
            f"{directory} holds {what}, a Megatron model lies in mp_rank_00/{_SHARD} or mp_rank_00_000/{_SHARD}; "
            "copy all shards, or give another directory"
        )
    shard = _read(directory / first / _SHARD)
    settings = {str(key): value for key, value in vars(shard["args"]).items() if isinstance(value, _PLAIN)}
    sizes = []
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        size = settings.get(key)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"{directory / first / _SHARD} says {key} is {size!r}, it must be a positive integer")
        sizes.append(size)
    names = (_rank_name(tensor, stage, sizes[1]) for stage in range(sizes[1]) for tensor in range(sizes[0]))
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise UserError(
            f"{directory} lacks {missing}/{_SHARD}: its settings speak of {sizes[0]} tensor-parallel ranks in each of "
            f"{sizes[1]} pipeline stages; copy all shards (a tuning run that loaded some stages saved only these)"
        )
    if len(found) != sizes[0] * sizes[1]:
        raise UserError(
            f"{directory} holds {len(found)} shards, but its settings speak of {sizes[0]} tensor-parallel ranks in "
            f"each of {sizes[1]} pipeline stages; remove those of another run"
        )
    return MegatronCheckpoint(directory, settings, shard.get("iteration"), *sizes)


def _rank_name(tensor_rank: int, stage: int, stages: int) -> str:
    return f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")


def _iteration(source: Path) -> Path:
    """The directory with the shards."""
    tracker = source / TRACKER
    if not tracker.is_file():
        return source
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if re.fullmatch(r"[0-9]{1,15}", text) and int(text) > 0:
        name = f"iter_{int(text):07d}"
    elif text == "release":
        name = text
    else:
        raise UserError(
            f"{tracker} says {text[:40]!r}, but must hold the number of an iteration or 'release'; correct it, or give "
            "an iter_ directory"
        )
    if not (source / name).is_dir():
        raise UserError(f"{tracker} names {name}, but there is no such directory; correct it, or give an iter_ one")
    return source / name


def _read(path: Path) -> dict[str, Any]:
    """What a shard holds, with its ``args`` and ``model`` checked for their types only."""
    try:
        unknown = sorted(
            set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace", *_KNOWN}
        )
        if unknown:
            raise UserError(
                f"{path} holds an object of {unknown[0]}, which is no part of a Megatron checkpoint; nothing of it was "
                "run, do not trust this file"
            )
        stand_ins = [(_StandIn, name) for name in _KNOWN]
        with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle fails in as many ways as there are bytes
        raise UserError(f"{path} is damaged, or torch.save (1.6 or newer) did not write it; copy it again") from error
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        kept = ", ".join(sorted(map(str, found))[:6]) if isinstance(found, dict) else type(found).__name__
        raise UserError(
            f"{path} has no 'model' in it (it holds {kept or 'nothing'}): an optimizer's state alone or an interleaved "
            "pipeline can't be imported, choose another checkpoint"
        )
    if not isinstance(found.get("args"), argparse.Namespace):
        raise UserError(f"{path} has no 'args', the settings that explain its tensors; choose another checkpoint")
    version = found.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 2:
        raise UserError(
            f"{path} has checkpoint_version {version}, whose queries, keys and values lie in another order; save it "
            "with Megatron-LM 2 or newer"
        )
    return found


def _tensors(path: Path, part: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested tables by their names joined with dots, without the ``language_model`` around most."""
    for key, value in part.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _tensors(path, value, "" if name == "language_model" else f"{name}.")
        elif (
            isinstance(value, Tensor)
            and value.device.type == "cpu"
            and value.layout == torch.strided
            and value.dtype in FLOATS.values()
        ):
            yield name, value.detach()
        else:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{path}: '{name}' is of {kind}, which is no weight's; choose another checkpoint")
