"""The token ids of one data file: written once into the cache, read by position.

A shard is published whole: it is written beside its place, synced and renamed, by the one process of a machine that
holds the operating system's lock, while the others wait and then use it. Reading takes no memory map, since a mapped
file that shrinks kills the process. How text becomes ids, and what they are cut into, is :mod:`exitlm.train.data`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import secrets
import shutil
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitlm.atomic import sync
from exitlm.errors import UserError
from exitlm.weights.store import cannot_keep

TOKENS, OFFSETS, META = "tokens.bin", "offsets.npy", "meta.json"


class Shard:
    """The ids in a file; ``shard[start:stop]`` reads a part of them. A file that was deleted stays readable; a fork
    shares the descriptor, a pickle opens the file again."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._length = os.fstat(self._descriptor).st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __reduce__(self) -> tuple[type[Shard], tuple[Path, np.dtype[Any]]]:
        return Shard, (self.path, self.dtype)

    def __getitem__(self, span: slice) -> NDArray[Any]:
        """The ids from ``start`` to before ``stop``, both counted from the front.

        Raises:
            UserError: the file ends before ``stop``, or can't be read.
        """
        start = (span.start or 0) * self.dtype.itemsize
        size = (len(self) if span.stop is None else span.stop) * self.dtype.itemsize - start
        data = b""
        try:
            while len(data) < size:
                if not (more := os.pread(self._descriptor, size - len(data), start + len(data))):
                    raise UserError(f"the token cache {self.path} changed while the run was reading it; start again")
                data += more
        except OSError as error:
            raise UserError(f"the token cache {self.path} cannot be read: {error.strerror}") from error
        return np.frombuffer(data, self.dtype)


Tokenised = tuple[Shard, NDArray[np.int64], str]
"""The ids of a file, where its documents begin and end in them ``[d+1]``, and the digest of both."""


def published(home: Path, dtype: np.dtype[Any]) -> Tokenised | None:
    """What is in the directory ``home``, or None where it is not whole."""
    try:
        meta = json.loads((home / META).read_text())
        shard, offsets, digest = Shard(home / TOKENS, dtype), np.load(home / OFFSETS), meta["digest"]
        if len(shard) != meta["tokens"] or not isinstance(digest, str) or not _are_offsets(offsets, len(shard)):
            return None
        return shard, offsets, digest
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"the token cache {home} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, EOFError, RecursionError):  # a crash left it empty, or it is damaged
        return None


def _are_offsets(found: Any, length: int) -> bool:
    """Whether they cut ``length`` ids into documents, in order."""
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype != np.int64 or not len(found):
        return False
    return bool(found[0] == 0 and found[-1] == length and (np.diff(found) >= 0).all())


def publish(
    home: Path, dtype: np.dtype[Any], write: Callable[[Path], None], stopped: Callable[[], bool] = lambda: False
) -> Tokenised:
    """What is in ``home`` (``<cache>/tokens/<key>``) after ``write(directory)`` has put :data:`TOKENS`,
    :data:`OFFSETS` and :data:`META` there, unless another process or thread has done so meanwhile.

    Raises:
        UserError: the cache can't be written.
        CancelledError: ``stopped()`` while waiting for the other.
    """
    if found := published(home, dtype):
        return found
    mark = f".{home.name}-{socket.gethostname()}-"
    staging = home.with_name(f"{mark}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with _alone(home.parents[1] / "locks" / home.name, stopped) as alone:
            if found := published(home, dtype):
                return found
            for left in home.parent.glob(f"{mark}*"):
                if alone and not left.name.startswith(f"{mark}{os.getpid()}-"):  # by one that was killed
                    shutil.rmtree(left, ignore_errors=True)
            staging.mkdir()
            write(staging)
            for written in (staging / TOKENS, staging / OFFSETS, staging / META, staging):
                sync(written)
            if not published(home, dtype):  # as ever, but where a file system has no locks
                shutil.rmtree(home, ignore_errors=True)
                staging.rename(home)
                sync(home.parent)
    except OSError as error:
        if not published(home, dtype):
            raise cannot_keep(home, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    found = published(home, dtype)
    if found is None:
        raise UserError(f"the token cache {home} changed while the run was writing it; start again")
    return found


@contextlib.contextmanager
def _alone(path: Path, stopped: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock that is the file ``path``; it dies with the process. False where the file system has no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:  # not a directory, and for writing: NFS locks nothing else
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if stopped():
                    raise CancelledError from None
                time.sleep(0.05)
                continue
            except OSError:
                held = False
            yield held
            return


def allow_open_files(count: int) -> None:
    """Let the process keep ``count`` more files open than before, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
