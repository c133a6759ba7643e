"""Checkpoints that many processes write together, each its part, by torch's distributed checkpoints (DCP).

They lie where a run's other checkpoints do, in ``checkpoints/step-00000050``, and appear when they are whole: written
beside their place, perhaps while training goes on, hashed, synced and renamed. Names are global and tied matrices have
one, so that any layout of processes reads what any other wrote. Not here: what a run keeps besides (``checkpoint.py``).
"""

from __future__ import annotations

import hashlib
import json
import pickle
import secrets
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import metadata, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from exitlm.atomic import sync
from exitlm.errors import UserError
from exitlm.train.checkpoint import (
    Damaged,
    cannot_read,
    check_format,
    list_checkpoints,
    nothing_whole,
    remove,
    retain,
)

FORMAT = 1
META = "sharded.json"
_DCP = ".metadata"
# What can go wrong while a checkpoint is written or read.
FAILURES = (CheckpointException, OSError, RuntimeError, ValueError, pickle.UnpicklingError)


@dataclass
class _Pending:
    place: Path
    staging: Path
    meta: dict[str, Any]
    written: Future[dict[str, list[Any]]]
    keep: int


class Writer:
    """Saves checkpoints of a run; all processes call the same methods in the same order. ``group`` is a process group
    of its own for the writing, which goes on beside the training; ``timeout`` in seconds is its longest wait. ``saved``
    is the last step that was published."""

    def __init__(
        self, out: Path, keep: int, asynchronous: bool, timeout: float = 600.0, saved: int | None = None
    ) -> None:
        self.out, self.keep, self.asynchronous, self.saved = out, keep, asynchronous, saved
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.pending: _Pending | None = None
        life = [secrets.token_hex(4)]
        dist.broadcast_object_list(life, src=0, group=self.group)
        self.life = life[0]  # a process that outlives the run before writes elsewhere

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, beside: bool = False) -> None:
        """Begin to save, after any save before has ended. Tensors may change once this returns. ``beside``: it takes
        the place of none of those that are kept. Raises UserError as :meth:`finish` does."""
        self.finish()
        place = self.out / "checkpoints" / f"step-{int(meta['step']):08d}"
        staging = place.with_name(f".{place.name}.{self.life}.tmp")
        problem = ""
        if self.rank == 0:
            try:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
                sync(self.out)
            except OSError as error:
                problem = _reason(error)
        if problem := self._first(problem):
            self._failed(place, problem)
            return
        storage = Storage(staging, single_file_per_rank=True, sync_files=True)
        state, options = dict(tensors), {"storage_writer": storage, "process_group": self.group}
        begun: Future[Any] = Future()
        try:
            if self.asynchronous:
                found = state_dict_saver.async_save(state, **options)
                assert isinstance(found, Future)
                begun = found
            else:
                begun.set_result(state_dict_saver.save(state, **options))
        except FAILURES as error:
            begun.set_exception(error)
        self.pending = _Pending(place, staging, dict(meta), self._digested(begun, staging), self.keep + beside)
        if not self.asynchronous:
            self.finish()

    def _digested(self, begun: Future[Any], staging: Path) -> Future[dict[str, list[Any]]]:
        """The digests of what this process has written, once it has; in the thread that wrote."""
        out: Future[dict[str, list[Any]]] = Future()

        def digest(begun: Future[Any]) -> None:
            try:
                begun.result()
                out.set_result(_digests(staging, self.rank))
            except BaseException as error:
                out.set_exception(error)

        begun.add_done_callback(digest)
        return out

    @property
    def done(self) -> bool:
        """Whether this process has written its part of what is pending."""
        return self.pending is not None and self.pending.written.done()

    def finish(self) -> None:
        """Wait for a pending save and publish it. One that failed is told and thrown away; the run goes on with the
        checkpoints before.

        Raises:
            UserError: it failed and there is none before, so that the run would go on for nothing.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        problem, part = "", {}
        try:
            part = pending.written.result()
        except FAILURES as error:
            problem = _reason(error)
        if not (problem := self._first(problem)):
            parts: list[dict[str, Any]] = [{} for _ in range(self.world)]
            dist.all_gather_object(parts, part, group=self.group)
            if self.rank == 0:
                problem = self._publish(pending, {name: entry for part in parts for name, entry in part.items()})
            problem = self._first(problem)
        if not problem:
            self.saved = int(pending.meta["step"])
            return
        if self.rank == 0:
            shutil.rmtree(pending.staging, ignore_errors=True)
        self._failed(pending.place, problem)

    def _publish(self, pending: _Pending, files: Mapping[str, Any]) -> str:
        """Put what all have written in its place; what the system has against it."""
        try:
            meta = {**pending.meta, "format": FORMAT, "files": files}
            (pending.staging / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
            for path in (pending.staging / META, pending.staging / _DCP, pending.staging):
                sync(path)
            if pending.place.exists():  # left by an earlier life of the run, and found damaged
                remove(pending.place)
            pending.staging.rename(pending.place)
            sync(pending.place.parent)
        except OSError as error:
            return _reason(error)
        with suppress(OSError):  # the next one tries again
            retain(pending.place, pending.keep)
        return ""

    def _first(self, problem: str) -> str:
        """The problem of the first process that has one."""
        problems = ["" for _ in range(self.world)]
        dist.all_gather_object(problems, problem, group=self.group)
        return next((p for p in problems if p), "")

    def _failed(self, place: Path, reason: str) -> None:
        if self.saved is None:
            raise UserError(
                f"{place} could not be saved ({reason}), and the run has no other checkpoint; put that right, or "
                "choose another checkpoint.dir, and start again"
            )
        if self.rank == 0:
            warnings.warn(
                f"{place} was not saved ({reason}); the run goes on, and the checkpoints before are untouched",
                stacklevel=4,
            )


class Storage(FileSystemWriter):
    """Says what the system has against writing, where torch tells of positions in a file."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """See torch's."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from error


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        first = next(iter(error.failures.values()), error)
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().split("\n")[-1] or type(error).__name__


def _digests(place: Path, rank: int) -> dict[str, list[Any]]:
    """Size and sha256 of the files that a process wrote; the first one also those of DCP's own."""
    mine = [path for path in place.iterdir() if path.name.startswith(f"__{rank}_")]
    out = {}
    for path in [*mine, *([place / _DCP] if rank == 0 else [])]:
        with path.open("rb") as handle:
            out[path.name] = [path.stat().st_size, hashlib.file_digest(handle, "sha256").hexdigest()]
    return out


def is_sharded(place: Path) -> bool:
    """Whether a directory is a checkpoint of this kind."""
    return (place / META).is_file()


def read_meta(place: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """What a checkpoint says of itself, after a look at this process's share of its files.

    Raises:
        Damaged: it is not what was written. Files that nobody asked for don't matter.
        UserError: the system does not let it be read.
    """
    try:
        meta: dict[str, Any] = json.loads((place / META).read_text(encoding="utf-8"))
        check_format(place, meta["format"], FORMAT)
        names = sorted(meta["files"])
        if _DCP not in names or not isinstance(meta["step"], int):
            raise ValueError(f"{META} does not say what it should")
        for name in names[part::parts]:
            size, digest = meta["files"][name]
            if (place / name).stat().st_size != size:
                raise ValueError(f"the size of {name} is wrong")
            with (place / name).open("rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                    raise ValueError(f"the digest of {name} is wrong")
        return meta
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{place} is damaged ({error})") from error
    except OSError as error:
        raise cannot_read(place, error) from error


def newest(out: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, found by all processes together; damaged ones are skipped with a warning.
    None where there is none yet.

    Raises:
        UserError: none is whole, or one can't be read.
    """
    names: list[Any] = [[p.name for p in reversed(list_checkpoints(out))]]
    dist.broadcast_object_list(names, src=0)
    for name in names[0]:
        place, problem, meta = out / "checkpoints" / name, "", {}
        try:
            meta = read_meta(place, dist.get_rank(), dist.get_world_size())
        except Damaged as error:
            problem = str(error)
        problems: list[str] = ["" for _ in range(dist.get_world_size())]
        dist.all_gather_object(problems, problem)
        first = next((p for p in problems if p), "")
        if not first:
            return place, meta
        if name == names[0][-1]:
            raise nothing_whole(out, first)
        if dist.get_rank() == 0:
            warnings.warn(f"{first}; going on from the one before it", stacklevel=2)
    return None


class Reader(FileSystemReader):
    """Reads the index of a checkpoint, a pickle, without running anything that it may name: a run's directory may come
    from elsewhere. (Tensors are read by torch with ``weights_only``.)"""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """See torch's."""
        with (Path(self.path) / _DCP).open("rb") as file:
            found = _Index(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError("it is no index")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Index(pickle.Unpickler):
    """What is not known here is not even imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # as some versions of Python 3.11 wrote members of enums
            return _member
        if module == "pathlib._local":  # where Python 3.13 alone has the classes of pathlib
            module = "pathlib"
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        found = getattr({"torch": torch, Metadata.__module__: metadata}.get(module), name, None)
        if isinstance(found, torch.dtype) or (isinstance(found, type) and found.__module__ == Metadata.__module__):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index")


_HARMLESS = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
}


def _member(kind: Any, name: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind[name]
    raise pickle.UnpicklingError("it asks for an attribute")


def load(place: Path, tensors: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Read a checkpoint into ``tensors``, by name, whatever layout wrote it: all processes of a run together, or this
    one ``alone``.

    Raises:
        UserError: a tensor that it lacks, or that has another shape there.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            state_dict_loader.load(dict(tensors), storage_reader=Reader(place), no_dist=alone)
    except FAILURES as error:
        raise UserError(f"{place} can't be read as a checkpoint of this model ({_reason(error)})") from error
