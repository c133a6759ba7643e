"""Find and load the native library, once per process, or say in one sentence why decoding goes without it.

The library is one file beside this one. In a wheel it is what was built with it. In a checkout its sources are there
too: a library that is missing, cut short or of other sources is built anew if there is a compiler. Nothing is
downloaded, and no directory but this one is looked into. What the library computes is not known here.

``EXITLM_NATIVE=0`` switches it off; ``EXITLM_THREADS`` is the number of threads.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from exitlm.errors import UserError, short
from exitlm.native import build

ABI = 2  # what csrc/exitcpu.h and the structs of this package agree upon
MAX_THREADS = 1024
_BUILD_SECONDS = 900.0  # how long another process may take to build it before this one goes without
_ELF_HEADER = struct.Struct("<16x 16x Q Q 6x H H H H 2x")  # program and section headers: offsets, then sizes and counts


class NativeUnavailable(UserError):
    """The native library can't be used: one sentence that says why."""


@dataclass(frozen=True)
class Library:
    """The loaded library. ``isa`` is the name of the instruction set that its kernels use on this processor."""

    lib: ctypes.CDLL
    path: Path
    isa: str


_lock = threading.Lock()
_found: Library | NativeUnavailable | None = None


def load() -> Library:
    """The native library, loaded and tested the first time.

    Raises:
        NativeUnavailable: it can't be used; what :func:`why_not` returns.
    """
    global _found
    if _switched_off():
        raise NativeUnavailable("the native library is switched off by EXITLM_NATIVE=0")
    with _lock:
        if _found is None:
            try:
                _found = open_library(Path(__file__).parent)
            except NativeUnavailable as error:
                _found = error
    if isinstance(_found, NativeUnavailable):
        raise NativeUnavailable(str(_found))
    return _found


def why_not() -> str | None:
    """Why the native library can't be used, in one sentence; None if it can."""
    try:
        load()
    except NativeUnavailable as error:
        return str(error)
    return None


def default_threads() -> int:
    """``EXITLM_THREADS``, else the number of cores that this process may run on.

    Raises:
        UserError: ``EXITLM_THREADS`` isn't a number from 1 to MAX_THREADS.
    """
    given = os.environ.get("EXITLM_THREADS", "").strip()
    if given:
        if not (given.isascii() and given.isdigit() and len(given) < 9 and 1 <= int(given) <= MAX_THREADS):
            raise UserError(
                f"EXITLM_THREADS is {short(given)}; set it to a number from 1 to {MAX_THREADS}, or unset it"
            )
        return int(given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores, 1), MAX_THREADS)


def open_library(directory: Path) -> Library:
    """Load the library of a directory, which its sources' digest must fit if they lie there in ``csrc``.

    Raises:
        NativeUnavailable: it can't be used.
    """
    try:
        path = directory / build.resolve_target(None).library
    except build.BuildError as error:
        raise NativeUnavailable(str(error)) from error
    sources = directory / "csrc"
    wanted = None
    if sources.is_dir():
        try:
            wanted = build.digest(sources)
        except OSError as error:
            raise NativeUnavailable(f"the sources of the native library can't be read: {error}") from error
    if fault := _fault(path, wanted):
        if wanted is None:
            raise NativeUnavailable(f"the native library {fault}; install the wheel of exitlm for this machine")
        _rebuild(path, sources, wanted, fault)
    return _load(path, wanted)


def _switched_off() -> bool:
    """Whether EXITLM_NATIVE says no."""
    given = os.environ.get("EXITLM_NATIVE", "").strip()
    if given not in ("", "0", "1"):
        raise UserError(
            f"EXITLM_NATIVE is {short(given)}; set it to 0 to decode without the native library, or unset it"
        )
    return given == "0"


def _fault(path: Path, wanted: str | None) -> str | None:
    """What is wrong with a library as a file: a verb and its object, or None. It is not loaded for that: a library that
    was cut short could end the process, and a stale one would stay in memory."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return f"is missing ({path})"
    except OSError as error:
        return f"can't be read ({path}: {error.strerror})"
    if content[:4] == b"\x7fELF" and len(content) < _elf_size(content):
        return f"is cut short ({path})"
    if wanted is not None and wanted.encode() not in content:
        return f"is of other sources than those beside it ({path})"
    return None


def _elf_size(content: bytes) -> int:
    """How many bytes a 64-bit ELF file must have, by its headers: both tables, and what the segments take."""
    if len(content) < 64:
        return 64
    segments, sections, segment_size, count, section_size, section_count = _ELF_HEADER.unpack_from(content)
    size = max(segments + segment_size * count, sections + section_size * section_count)
    if segment_size >= 56:
        for start in range(segments, min(segments + segment_size * count, len(content) - 55), segment_size):
            offset, taken = struct.unpack_from("<8x Q 16x Q", content, start)
            size = max(size, offset + taken)
    return int(size)


def _rebuild(path: Path, sources: Path, wanted: str, fault: str) -> None:
    """Build the library of a checkout, or let the process do it that began first."""
    from exitlm.atomic import locked  # what decodes from a wheel needs no locks

    try:
        with locked(path, timeout=_BUILD_SECONDS):
            if _fault(path, wanted) is None:
                return
            warnings.warn(f"the native library {fault}; building it", stacklevel=2)
            build.build(path, sources)
    except (build.BuildError, UserError) as error:
        raise NativeUnavailable(f"the native library {fault}, and building it failed: {error}") from error
    if still := _fault(path, wanted):
        raise NativeUnavailable(f"the native library {still}, though it was just built; its sources change meanwhile")


def _load(path: Path, wanted: str | None) -> Library:
    """Load a library and test it on this processor."""
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"the native library can't be loaded: {error}") from error
    try:
        lib.exitcpu_abi.restype = lib.exitcpu_check.restype = ctypes.c_int
        lib.exitcpu_digest.restype = lib.exitcpu_isa.restype = ctypes.c_char_p
        lib.exitcpu_after_fork.restype = None
        for function in (
            lib.exitcpu_abi, lib.exitcpu_check, lib.exitcpu_digest, lib.exitcpu_isa, lib.exitcpu_after_fork
        ):  # fmt: skip
            function.argtypes = ()
    except AttributeError as error:
        raise NativeUnavailable(f"{path} isn't the native library of exitlm: {error}") from error
    if (abi := lib.exitcpu_abi()) != ABI:
        raise NativeUnavailable(f"{path} was built for another exitlm: its interface is number {abi}, not {ABI}")
    if wanted is not None and (digest := lib.exitcpu_digest().decode(errors="replace")) != wanted:
        raise NativeUnavailable(
            f"{path} is of other sources than those beside it: their digest is {wanted}, not {digest}"
        )
    isa = lib.exitcpu_isa().decode(errors="replace")
    if (failed := lib.exitcpu_check()) != 0:
        raise NativeUnavailable(
            f"the native library computes wrong numbers on this processor ({isa}: its self test failed with {failed})"
        )
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lib.exitcpu_after_fork)  # the child has none of the threads
    return Library(lib, path, isa)
