"""The user's cache directory: converted models, and digests of files that have not changed since they were hashed.

Everything in it can be deleted at any time. ``$EXITLM_CACHE``, else ``$XDG_CACHE_HOME/exitlm``, else
``~/.cache/exitlm``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from exitlm.errors import UserError
from exitlm.weights.publish import fresh_file

# A file changed this recently may change again within one tick of its file system's clock: its digest is not kept.
_SETTLED_SECONDS = 2.0


def cache_directory() -> Path:
    """Where converted models and digests are kept (not created here)."""
    if chosen := os.environ.get("EXITLM_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "exitlm"


def cannot_keep(place: Path, error: OSError) -> UserError:
    """The sentence for a cache that the operating system refused to write."""
    return UserError(
        f"cannot write the cache {place.parent}: {error.strerror or error}; set EXITLM_CACHE to a directory that can be"
    )


def stamp(files: Sequence[Path]) -> list[list[int | str]]:
    """What identifies the content of files without reading them: path, device, inode, size, and the times of the last
    change of content (mtime, which a program may set) and of anything (ctime, which none can)."""
    stamps: list[list[int | str]] = []
    for file in sorted(set(files)):
        try:
            status = file.stat()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from error
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        stamps.append([str(file.resolve()), *identity])
    return stamps


def kept_digest(files: Sequence[Path], label: str, compute: Callable[[], str]) -> str:
    """``compute()``, or what it gave before for the same files in the same state. Of several processes that ask at
    once, one computes it while the others wait.

    ``label`` keeps different digests of the same files apart. A cache that can't be read or written is no error.
    """
    before = stamp(files)
    key = json.dumps([label, before])
    place = cache_directory() / "digests" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if (digest := _kept(place, key)) is not None:
        return digest
    with _one_at_a_time(place.with_suffix(".lock")):
        if (digest := _kept(place, key)) is not None:
            return digest
        digest = compute()
        newest = max((int(value) for entry in before for value in entry[-2:]), default=0) / 1e9
        if time.time() - newest > _SETTLED_SECONDS and stamp(files) == before:
            with contextlib.suppress(UserError), fresh_file(place) as temporary:
                temporary.write_text(json.dumps({"key": key, "digest": digest}))
        return digest


def _kept(place: Path, key: str) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        kept = json.loads(place.read_text())
        if kept["key"] == key and isinstance(kept["digest"], str):
            return kept["digest"]
    return None


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold the operating system's lock on a file of the cache, which is gone afterwards; without a lock where the cache
    knows none."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
            stack.callback(path.unlink, missing_ok=True)
        yield
