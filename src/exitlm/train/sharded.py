"""Checkpoints that many processes write together, each its part, by torch's distributed checkpoints (DCP).

They lie where a run's other checkpoints do, in ``checkpoints/step-00000050``, and appear when they are whole: written
beside their place, perhaps while training goes on, hashed, synced and renamed. Names are global and tied matrices have
one, so that any layout of processes reads what any other wrote. Not here: what a run keeps besides (``checkpoint.py``).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

from exitlm.errors import UserError
from exitlm.train.checkpoint import list_checkpoints, remove
from exitlm.weights.publish import sync

FORMAT = 1
META = "sharded.json"
_DCP = ".metadata"


@dataclass
class _Pending:
    place: Path
    staging: Path
    meta: dict[str, Any]
    future: Future[Any]


class Writer:
    """Saves checkpoints of a run; all processes call the same methods in the same order. ``group`` is a process group
    of its own for the writing, which goes on beside the training."""

    def __init__(self, out: Path, keep: int, asynchronous: bool, device: torch.device) -> None:
        self.out, self.keep, self.asynchronous, self.device = out, keep, asynchronous, device
        self.group = dist.new_group(backend="gloo")
        self.pending: _Pending | None = None

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Begin to save, after any save before has ended. Tensors may change once this returns."""
        self.finish()
        place = self.out / "checkpoints" / f"step-{int(meta['step']):08d}"
        staging = place.with_name(f".{place.name}.tmp")
        problem = ""
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            except OSError as error:
                problem = str(error.strerror)
        if self._everywhere(problem):
            _warn(place, problem or "another process could not write")
            return
        storage = FileSystemWriter(staging, single_file_per_rank=True, sync_files=True)
        state = dict(tensors)
        future: Future[Any] = Future()
        try:
            if self.asynchronous:
                begun = state_dict_saver.async_save(state, storage_writer=storage, process_group=self.group)
                assert isinstance(begun, Future)
                future = begun
            else:
                state_dict_saver.save(state, storage_writer=storage, process_group=self.group)
                future.set_result(None)
        except (CheckpointException, OSError, RuntimeError) as error:
            future.set_exception(error)
        self.pending = _Pending(place, staging, dict(meta), future)
        if not self.asynchronous:
            self.finish()

    @property
    def done(self) -> bool:
        """Whether this process has written its part of what is pending."""
        return self.pending is not None and self.pending.future.done()

    def finish(self) -> None:
        """Wait for a pending save and publish it. One that failed is told and thrown away; the run goes on with the
        checkpoints before."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        problem = ""
        try:
            pending.future.result()
            part = _digests(pending.staging, dist.get_rank(), dist.get_world_size())
        except (CheckpointException, OSError, RuntimeError, ValueError) as error:
            problem, part = _reason(error), {}
        if not self._everywhere(problem):
            parts: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, part, group=self.group)
            if dist.get_rank() == 0:
                try:
                    files = {name: entry for part in parts for name, entry in part.items()}
                    meta = {**pending.meta, "format": FORMAT, "files": files}
                    (pending.staging / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
                    for path in (pending.staging / META, pending.staging / _DCP, pending.staging):
                        sync(path)
                    if pending.place.exists():  # left by an earlier life of the run, and found damaged
                        remove(pending.place)
                    pending.staging.rename(pending.place)
                    sync(pending.place.parent)
                    for old in list_checkpoints(self.out)[: -self.keep]:
                        remove(old)
                except OSError as error:
                    problem = str(error.strerror)
            if not self._everywhere(problem):
                return
        if problem or dist.get_rank() == 0:
            _warn(pending.place, problem or "another process could not write")
        if dist.get_rank() == 0:
            shutil.rmtree(pending.staging, ignore_errors=True)

    def _everywhere(self, problem: str) -> bool:
        """Whether any process has a problem."""
        bad = torch.tensor(int(bool(problem)))
        dist.all_reduce(bad, dist.ReduceOp.MAX, group=self.group)
        return bool(bad)


def _warn(place: Path, reason: str) -> None:
    warnings.warn(
        f"{place} was not saved ({reason}); the run goes on, and the checkpoints before are untouched: free some space",
        stacklevel=3,
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        first = next(iter(error.failures.values()), error)
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().split("\n")[-1] or type(error).__name__


def _digests(place: Path, part: int, parts: int) -> dict[str, list[Any]]:
    """Size and sha256 of this process's share of the files."""
    files = sorted(p for p in place.iterdir() if p.name != META)
    out = {}
    for path in files[part::parts]:
        with path.open("rb") as handle:
            out[path.name] = [path.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest()]
    return out


def is_sharded(place: Path) -> bool:
    """Whether a directory is a checkpoint of this kind."""
    return (place / META).is_file()


def read_meta(place: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """What a checkpoint says of itself, after a look at this process's share of its files.

    Raises:
        UserError: it is damaged.
    """
    try:
        meta: dict[str, Any] = json.loads((place / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"it has format {meta['format']}")
        names = sorted(meta["files"])
        found = {path.name for path in place.iterdir()} - {META}
        if found != set(names):
            raise ValueError(f"{sorted(found ^ set(names))[0]} is missing or too much")
        for name in names[part::parts]:
            size, digest = meta["files"][name]
            if (place / name).stat().st_size != size:
                raise ValueError(f"the size of {name} is wrong")
            with (place / name).open("rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                    raise ValueError(f"the digest of {name} is wrong")
        return meta
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place} is damaged ({error})") from error


def newest(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, found by all processes together; damaged ones are skipped with a warning."""
    names: list[Any] = [[p.name for p in reversed(list_checkpoints(out))]]
    dist.broadcast_object_list(names, src=0)
    for name in names[0]:
        place, problem, meta = out / "checkpoints" / name, "", {}
        try:
            meta = read_meta(place, dist.get_rank(), dist.get_world_size())
        except UserError as error:
            problem = str(error)
        problems: list[str] = ["" for _ in range(dist.get_world_size())]
        dist.all_gather_object(problems, problem)
        first = next((p for p in problems if p), "")
        if not first:
            return place, meta
        if dist.get_rank() == 0:
            warnings.warn(f"{first}; going on from the one before it", stacklevel=2)
    return None


def load(place: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a checkpoint into ``tensors``, by name, whatever layout wrote it; with all processes, or one without group.

    Raises:
        UserError: a tensor that it lacks, or that has another shape there.
    """
    try:
        state_dict_loader.load(dict(tensors), storage_reader=FileSystemReader(place), no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{place} can't be read as a checkpoint of this model ({_reason(error)})") from error
