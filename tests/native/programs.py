"""C++ programs that tests compile from the library and from sources in ``csrc`` beside this file. Not a test."""

import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from exitlm.native import build

CSRC = Path(__file__).parent / "csrc"
PLAIN = ("-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", f"-I{build.SOURCES}")
X86_64 = platform.machine().lower() in ("x86_64", "amd64")


def compiler() -> str:
    """This machine's C++ compiler for programs; the test is skipped where there is none."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no compiler of C++ programs")
    return found


def program(
    place: Path,
    sources: Mapping[Path, Sequence[str]],
    flags: Sequence[str] = ("-O1",),
    command: Sequence[str] | None = None,
    link: Sequence[str] = ("-pthread",),
) -> Path:
    """Compile each source with its own flags behind those of all, and link them into ``place / "program"``."""
    command = [compiler()] if command is None else list(command)
    objects = []
    for source, own in sources.items():
        objects.append(str(place / f"{source.stem}.o"))
        subprocess.run([*command, *PLAIN, *flags, *own, "-c", str(source), "-o", objects[-1]], check=True, timeout=900)
    subprocess.run([*command, *flags, *objects, *link, "-o", str(place / "program")], check=True, timeout=600)
    return place / "program"


def run(command: Sequence[str | Path], timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever that is."""
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, check=False)
