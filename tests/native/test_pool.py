"""The pool of threads, by a program of its own: a thread that loses its core holds up nobody, however busy the machine
is. The threads are held by the test, so that what would wait for one of them waits until the program is ended."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from exitlm.native import build
from tests.native.programs import CSRC, program, run

SANITIZERS = ("thread", "address,undefined")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="plain"),
        *(
            pytest.param((f"-fsanitize={each}", "-fno-sanitize-recover=all", "-g"), id=each, marks=pytest.mark.slow)
            for each in SANITIZERS
        ),
    ],
)
def test_a_thread_without_a_core_holds_up_nobody(flags: Sequence[str], tmp_path: Path) -> None:
    sources = {CSRC / "pool_program.cpp": (), build.SOURCES / "pool.cpp": ()}
    done = run([program(tmp_path, sources, ["-O1", *flags]), *([] if flags else ["short of memory"])])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\n0 failures\n")
