"""Files and directories put in place whole, and a lock for one writer at a time.

A reader sees the old content or the new, never a part, at whatever moment the writer dies; a write that fails leaves
nothing behind. What the files hold is not known here. Nothing in this module needs a POSIX system.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from exitlm.errors import UserError

# What a file system says that knows no locks.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
# What writing fails with when the error names no file: a full or broken disk, a quota, a limit of file sizes.
_NO_ROOM = {errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}
# A file name may have 255 bytes on most file systems; longer ones than this get a temporary name without them.
_LONG_NAME = 180


@contextlib.contextmanager
def locked(path: Path, *, timeout: float = 60.0) -> Iterator[None]:
    """Let one process and thread at a time into the block for ``path``, which need not exist.

    The operating system's lock is on a hidden empty file beside ``path``, which stays. It is free again when its
    process dies. A file system without locks lets everybody in.

    Raises:
        UserError: another holder kept it for ``timeout`` seconds (0: one attempt), or the file can't be made.
    """
    assert timeout >= 0, "filelock would wait without end"
    lock = FileLock(_beside(path, "lock"), timeout=timeout)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        since = f"has been writing to {path} for {timeout:g} s" if timeout else f"writes to {path}"
        raise UserError(f"another process {since}; wait for it, or choose another place") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UserError(
                f"cannot lock {path}: {error.strerror or error}; choose a place that can be written"
            ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path in the directory of ``path`` to write a file to; the file becomes ``path`` if the block succeeds.

    Missing parents are made. A symbolic link is replaced, not followed. Of several writers the last one wins.

    Raises:
        UserError: the operating system refused to write (no space, no permission, ``path`` is a directory).
    """
    temporary = _beside(path, "tmp")
    try:
        with _sentences(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            assert os.path.lexists(temporary), "the block wrote nothing"
            _sync_file(temporary)
            os.replace(temporary, path)
            _sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new directory beside ``path`` to fill; it becomes ``path`` if the block succeeds.

    ``path`` must not exist or be an empty directory, unless ``overwrite`` is true: then a former directory is moved
    aside for the moment of the exchange, in which a reader finds none, and deleted. Of several writers that overwrite,
    the last one wins; of several that don't, the first.

    Raises:
        UserError: ``path`` is a file or, without ``overwrite``, holds something; or the operating system refused.
    """
    temporary = _beside(path, "tmp")
    try:
        with _sentences(path, temporary):
            check_free(path, overwrite=overwrite)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            for place in temporary.rglob("*"):
                if not place.is_symlink():
                    sync(place)
            _sync_directory(temporary)
            _exchange(temporary, path, overwrite)
            _sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Refuse what :func:`replace_directory` would not replace. Another writer may move it at any moment.

    Raises:
        UserError: it is a file or, without ``overwrite``, a directory that holds something.
    """
    try:
        occupied = any(path.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        if os.path.lexists(path):
            raise UserError(f"{path} is a file; choose a directory") from None
        return
    if occupied and not overwrite:
        raise _occupied(path)


def _occupied(path: Path) -> UserError:
    return UserError(f"{path} exists and is not empty; choose another directory or delete it first")


def _exchange(new: Path, path: Path, overwrite: bool) -> None:
    """Rename ``new`` to ``path``; with ``overwrite``, whatever directory is there makes room."""
    former: Path | None = None
    try:
        while True:
            if os.name == "nt":  # elsewhere a rename replaces an empty directory
                with contextlib.suppress(OSError):
                    path.rmdir()
            try:
                os.rename(new, path)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if not overwrite:
                    raise _occupied(path) from None
            if former is not None:  # that of another writer, who came between
                shutil.rmtree(former, ignore_errors=True)
            former = _beside(path, "old")
            with contextlib.suppress(FileNotFoundError):  # another writer moved it first
                os.rename(path, former)
    except BaseException:
        if former is not None:
            with contextlib.suppress(OSError):
                os.rename(former, path)
        raise
    finally:
        if former is not None:
            shutil.rmtree(former, ignore_errors=True)


@contextlib.contextmanager
def _sentences(path: Path, temporary: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write ``path`` into a sentence. Any other error passes as it is: one about
    a file that the block reads, or about a connection."""
    try:
        yield
    except OSError as error:
        named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        if named:
            ours = any(
                name in (path, path.parent, *path.parent.parents) or temporary in (name, *name.parents)
                for name in named
            )
        else:
            ours = error.errno in _NO_ROOM
        if not ours:
            raise
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """The sentence for a write that the operating system refused."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}; nothing was left half-written, "
        "free some space or choose another place"
    )


def sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a directory, are on the disk."""
    (_sync_directory if path.is_dir() else _sync_file)(path)


def _beside(path: Path, kind: str) -> Path:
    """A hidden name in the directory of ``path``: the same each time for a lock, else one that no other writer uses."""
    if not path.name or path.name == "..":
        raise UserError(f"'{path}' names no file; give a path that ends in a name")
    name = path.name
    if len(os.fsencode(name)) > _LONG_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return path.with_name(f".{name}.lock" if kind == "lock" else f".{name}.{os.getpid()}-{secrets.token_hex(4)}.{kind}")


def _sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    _sync(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only what may be written


def _sync_directory(path: Path) -> None:
    """Wait until the entries of a directory are on the disk, on systems that have a call for it."""
    if os.name != "nt":
        try:
            _sync(path, os.O_RDONLY)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such call
                raise


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
