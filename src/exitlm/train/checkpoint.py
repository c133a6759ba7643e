"""A run's directory: who may write to it, its settings, its checkpoints.

A checkpoint is a directory of its own, filled beside its place, synced and renamed, so that a kill at any instant
leaves the previous one whole. It holds the heads, the optimizer's moments and the step; data order and draws are
functions of the step, so nothing else is needed to go on bit-identically. Only safetensors and JSON, never pickle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from exitlm.atomic import replace_directory, replace_file
from exitlm.errors import UserError
from exitlm.train.run import RunConfig, differences
from exitlm.weights.tensorfile import Written, write_tensors

FORMAT = 1
_TENSORS = "state.safetensors"
_META = "state.json"
KINDS = {_META: "exitlm tune in one process", "sharded.json": "exitlm train"}
"""The file by which a checkpoint of each kind of run is known."""


class Damaged(UserError):
    """A checkpoint that is not what was written: the one before it may be."""


def nothing_whole(out: Path, last: str) -> UserError:
    """The sentence for a run all of whose checkpoints are damaged, the ``last`` one as it says: nothing is thrown away
    for the user."""
    return UserError(f"{last}, and no other is whole; restore one, or delete {out / 'checkpoints'} to begin again")


def check_format(place: Path, found: Any, known: int) -> None:
    """Refuse a checkpoint of another format: it is whole, but not for this version.

    Raises:
        UserError: a newer version wrote it.
        ValueError: it says nothing that could be one.
    """
    if isinstance(found, int) and found > known:
        raise UserError(f"{place} was written by a newer version of exitlm (format {found}); update exitlm")
    if found != known:
        raise ValueError(f"it has format {found}")


@dataclass(frozen=True)
class Checkpoint:
    """``tensors``: parameters as ``exits.8.lens.weight``, moments as ``optimizer.exp_avg.exits.8.lens.weight``.
    ``meta``: step, digests of base and data, the last validation."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """How many optimizer steps are done."""
        return int(self.meta["step"])


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Own a run's directory; the lock is the operating system's and dies with its process.

    Raises:
        UserError: another process owns it, or it can't be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"the run cannot write to {out}: {error.strerror}; choose another directory") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {out}; wait for it, or choose another directory") from error
        yield


def claim(out: Path, config: RunConfig, kind: str = _META) -> None:
    """Write the settings of a new run, or compare with those of the run that is there. ``kind`` is the file by which
    its checkpoints are known.

    Raises:
        UserError: the directory belongs to a run with other settings (named), to one of the other kind, or to an
            adapter that no such run made.
    """
    saved, places, adapter = out / "run.toml", list_checkpoints(out), (out / "exits.json").exists()
    for other, made_by in KINDS.items():
        if other != kind and any((place / other).exists() for place in places):
            raise UserError(f"{out} holds a run of {made_by}; choose another directory")
    if not saved.exists() or not (adapter or places):  # nothing depends yet on what was set before
        if adapter:
            raise UserError(f"{out} holds an exit adapter already; choose another directory")
        with replace_file(saved) as path:
            path.write_text(config.to_toml(), encoding="utf-8")
        return
    changed = differences(RunConfig.from_toml(saved), config)
    if changed:
        raise UserError(
            f"{out} holds a run with other settings ({'; '.join(changed)}); "
            "start it with the same settings to go on, or choose another directory"
        )


def check_same(out: Path, meta: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Refuse to go on with another base or other data than the run began with; ``now`` maps names to digests."""
    for name, digest in now.items():
        before = meta.get(name)
        if before != digest:
            raise UserError(
                f"the {name.replace('_', ' ')} changed since the run in {out} began "
                f"({str(before)[:12]} then, {digest[:12]} now); restore it, or choose another directory"
            )


def check_same_model(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a model whose configuration is not the one that the run began with."""
    for key, value in json.loads(json.dumps(dict(now))).items():
        if key in before and before[key] != value:
            raise UserError(
                f"the model is not the one that the run in {out} began with ({key}: {before[key]!r} then, {value!r} "
                "now); restore it, or choose another directory"
            )


def save(out: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int) -> Path:
    """Publish a checkpoint and drop all but the newest ``keep``.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    place = out / "checkpoints" / f"step-{int(meta['step']):08d}"
    if place.exists():  # left by an earlier life of the run and found damaged, else it would have been resumed from
        remove(place)
    with replace_directory(place) as home:
        write_tensors(home / _TENSORS, [_written(name, tensor.detach()) for name, tensor in tensors.items()], {})
        with (home / _TENSORS).open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        (home / _META).write_text(json.dumps({**meta, "format": FORMAT, "sha256": digest}, indent=1))
    retain(place, keep)
    return place


def retain(place: Path, keep: int) -> None:
    """Drop all but the newest ``keep`` checkpoints up to ``place``, and later ones: those of an earlier life of the run
    that could not be read, or else it would have gone on from them."""
    names = list_checkpoints(place.parent.parent)
    before, after = [p for p in names if p.name < place.name], [p for p in names if p.name > place.name]
    for old in [*before[: max(0, len(before) - keep + 1)], *after]:
        remove(old)


def _written(name: str, tensor: Tensor) -> Written:
    return Written(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def newest(out: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is skipped with a warning. None where there is none yet.

    Raises:
        UserError: none is whole, or one can't be read.
    """
    places = list_checkpoints(out)
    for place in reversed(places):
        try:
            return read(place)
        except Damaged as error:
            if place == places[0]:
                raise nothing_whole(out, str(error)) from error
            warnings.warn(f"{error}; going on from the one before it", stacklevel=2)
    return None


def is_checkpoint(place: Path) -> bool:
    """Whether a directory is one checkpoint of a run."""
    place = Path(os.path.abspath(place))
    return (place / _META).is_file() and (place.parent.parent / "run.toml").is_file()


def read(place: Path) -> Checkpoint:
    """The checkpoint in its directory.

    Raises:
        Damaged: it is not what was written.
        UserError: the system does not let it be read.
    """
    try:
        meta = json.loads((place / _META).read_text())
        with (place / _TENSORS).open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        check_format(place, meta["format"], FORMAT)
        if meta["sha256"] != digest:
            raise ValueError("its digest is wrong")
        return Checkpoint(load_file(place / _TENSORS), meta)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{place} is damaged ({error})") from error
    except OSError as error:
        raise cannot_read(place, error) from error


def cannot_read(place: Path, error: OSError) -> UserError:
    """The sentence for a checkpoint that may be whole, but that the system does not give."""
    return UserError(f"{place} can't be read ({error.strerror or error}); put that right, and start again")


def leave_nothing(out: Path) -> None:
    """Take back the directory of a run that could not begin."""
    if [p.name for p in out.iterdir()] == [".lock"]:
        shutil.rmtree(out, ignore_errors=True)


def clean(out: Path) -> None:
    """Remove what a killed run left half-written."""
    home = out / "checkpoints"
    for place in [*home.glob(".step-*"), *home.glob(".old-*"), *out.glob(".run.toml.*"), *out.glob(".metrics.jsonl.*")]:
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


def list_checkpoints(out: Path) -> list[Path]:
    """The places of a run's checkpoints, the oldest first.

    Raises:
        UserError: the system does not say what is there.
    """
    place = out / "checkpoints"
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise cannot_read(place, error) from error
    return sorted(place / name for name in names if name.startswith("step-") and (place / name).is_dir())


def remove(place: Path) -> None:
    """Out of the way at once, so that no half-deleted directory looks like a checkpoint."""
    doomed = place.with_name(f".old-{place.name}-{os.getpid()}")
    place.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
