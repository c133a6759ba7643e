"""The user's cache directory: converted models, and digests of files that have not changed since they were hashed.

Everything in it can be deleted at any time. ``$EXITLM_CACHE``, else ``$XDG_CACHE_HOME/exitlm``, else
``~/.cache/exitlm``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from exitlm.atomic import locked, replace_file
from exitlm.errors import UserError

# A file changed this recently may change again within one tick of its file system's clock: its digest is not kept.
_SETTLED_SECONDS = 2.0
_LOCK_SECONDS = 3600.0  # how long one process waits for the digest that another computes


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
    with contextlib.ExitStack() as alone:
        with contextlib.suppress(UserError):  # a cache that can't be written has no locks
            alone.enter_context(locked(place.parents[1] / "locks" / place.stem, timeout=_LOCK_SECONDS))
        if (digest := _kept(place, key)) is not None:
            return digest
        digest = compute()
        newest = max((int(value) for entry in before for value in entry[-2:]), default=0) / 1e9
        if time.time() - newest > _SETTLED_SECONDS and stamp(files) == before:
            with contextlib.suppress(UserError), replace_file(place) as temporary:
                temporary.write_text(json.dumps({"key": key, "digest": digest}))
        return digest


def _kept(place: Path, key: str) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        kept = json.loads(place.read_text())
        if kept["key"] == key and isinstance(kept["digest"], str):
            return kept["digest"]
    return None
