"""Putting files in place whole: written beside their destination, synced, then renamed.

A reader sees the old content or the new, never a part, whatever moment the writer dies at, and a full disk leaves
nothing behind. What the files hold is not known here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from exitlm.errors import UserError


def cannot_write(path: Path, error: OSError) -> UserError:
    """The sentence for a write that the operating system refused."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}; nothing was left half-written, "
        "free some space or choose another place"
    )


def sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """Yield a sibling of ``path`` to write; it takes the place of ``path`` if the block ends without an exception.

    Raises:
        UserError: the operating system refused (no space, no permission).
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _sibling(path)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def fresh_directory(path: Path) -> Iterator[Path]:
    """Yield a sibling directory to fill; it becomes ``path``, which must not exist or be empty, if the block succeeds.

    Raises:
        UserError: ``path`` holds something already, or the operating system refused.
    """
    check_free(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _sibling(path)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        os.rename(temporary, path)
        sync(path.parent)
    except OSError as error:
        check_free(path)
        raise cannot_write(path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_free(directory: Path) -> None:
    """Refuse a destination that exists and is not an empty directory."""
    if directory.is_dir():
        if any(directory.iterdir()):
            raise UserError(f"{directory} exists and is not empty; choose another directory or delete it first")
    elif directory.exists():
        raise UserError(f"{directory} is a file; choose a directory")


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, timeout: float = 60.0) -> Iterator[None]:
    """Hold the operating system's lock on a directory or a file: it dies with its process and leaves nothing behind.

    File systems without locks are tolerated. Raises UserError after ``timeout`` seconds.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}") from error
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    since = f"has been writing to {path} for {timeout:.0f} s" if timeout else f"writes to {path}"
                    raise UserError(f"another process {since}; wait for it, or choose another place") from None
                time.sleep(0.02)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


def _sibling(path: Path) -> Path:
    """A name beside ``path`` that no other writer uses; the leading dot keeps it out of listings."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
