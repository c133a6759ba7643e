"""Loading the native library: it is right and loaded, or one sentence says why not and nothing is changed."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import exitlm.atomic  # noqa: F401 - loaded before a test gives up its rights
from exitlm import UserError
from exitlm.native import build, library
from exitlm.native.library import ABI, MAX_THREADS, NativeUnavailable, default_threads, open_library


def refusal(directory: Path) -> str:
    """Why the library of a directory can't be used: one sentence."""
    with pytest.raises(NativeUnavailable) as caught:
        open_library(directory)
    sentence = str(caught.value)
    assert sentence.count("\n") == 0
    assert sentence[0] in "t/"
    return sentence


@pytest.fixture
def no_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build is a failure of the test."""
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("the library was built"))


@pytest.fixture
def fresh(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process that has loaded nothing, whose package holds the stand-in."""
    monkeypatch.setattr(library, "_found", None)
    monkeypatch.setattr(library, "__file__", str(installed.with_name("library.py")))
    monkeypatch.delenv("EXITLM_NATIVE", raising=False)
    return installed


def test_a_library_without_sources_is_loaded(installed: Path, no_builds: None) -> None:
    found = open_library(installed.parent)
    assert (found.path, found.isa) == (installed, "stand-in")
    assert found.lib.exitcpu_abi() == ABI


def test_a_library_of_its_sources_is_loaded(checkout: Path, no_builds: None) -> None:
    assert open_library(checkout.parent).path == checkout


def test_a_missing_library_is_named(installed: Path) -> None:
    installed.unlink()
    assert refusal(installed.parent) == (
        f"the native library is missing ({installed}); install the wheel of exitlm for this machine"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="truncates an ELF file")
def test_a_truncated_library_is_refused_wherever_it_ends(installed: Path, no_builds: None) -> None:
    """The loader of Linux maps such a file and dies at the first page that isn't there."""
    whole = installed.read_bytes()
    for size in (*range(4, 64, 7), 64, 100, 400, 4096, len(whole) // 2, len(whole) - 4096, len(whole) - 1):
        installed.write_bytes(whole[:size])
        assert "is cut short" in refusal(installed.parent)
    for size in range(4):
        installed.write_bytes(whole[:size])
        assert "can't be loaded" in refusal(installed.parent)
    installed.write_bytes(whole)
    open_library(installed.parent)


def test_a_file_that_is_no_library_is_refused(installed: Path, no_builds: None) -> None:
    whole = bytearray(installed.read_bytes())
    installed.write_text("not a library\n" * 1000)
    assert "can't be loaded" in refusal(installed.parent)
    whole[18] ^= 0xFF  # of another machine
    installed.write_bytes(whole)
    assert "can't be loaded" in refusal(installed.parent)
    installed.unlink()
    installed.mkdir()
    assert "can't be read" in refusal(installed.parent)


def test_a_library_that_lacks_a_function_is_refused(compiled: Path, sources: Path, installed: Path) -> None:
    build.build(installed, sources, extra=["-DSTANDIN_WITHOUT_FORKS"])
    assert "isn't the native library of exitlm" in refusal(installed.parent)
    assert "exitcpu_after_fork" in refusal(installed.parent)


def test_another_interface_is_refused(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_ABI", str(ABI + 1))
    assert f"its interface is number {ABI + 1}, not {ABI}" in refusal(installed.parent)


def test_a_library_that_computes_wrong_numbers_is_refused(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_CHECK", "3")
    assert "wrong numbers on this processor (stand-in: its self test failed with 3)" in refusal(installed.parent)


@pytest.mark.parametrize("fault", ["missing", "stale", "cut short"])
def test_a_checkout_builds_what_it_lacks(checkout: Path, fault: str) -> None:
    if fault == "missing":
        checkout.unlink()
    elif fault == "stale":
        (checkout.parent / "csrc" / "more.h").touch()
    else:
        checkout.write_bytes(checkout.read_bytes()[:5000])
    with pytest.warns(UserWarning, match="building it") as told:
        found = open_library(checkout.parent)
    assert found.lib.exitcpu_digest().decode() == build.digest(checkout.parent / "csrc")
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_library(checkout.parent)


def test_a_stale_library_without_a_compiler_is_named(checkout: Path, bare_machine: Path) -> None:
    (checkout.parent / "csrc" / "more.h").touch()
    before = checkout.read_bytes()
    sentence = refusal(checkout.parent)
    assert "is of other sources than those beside it" in sentence
    assert "building it failed: there is no C++ compiler here" in sentence
    assert checkout.read_bytes() == before


def test_sources_that_do_not_compile_are_named(checkout: Path) -> None:
    (checkout.parent / "csrc" / "layers.cpp").write_text("int broken( {")
    assert "building it failed: " in refusal(checkout.parent)
    assert "cannot compile layers.cpp" in refusal(checkout.parent)


def test_a_library_that_only_mentions_the_digest_is_refused(checkout: Path, no_builds: None) -> None:
    """The digest is searched in the file first, then compared with what the library says."""
    (checkout.parent / "csrc" / "more.h").touch()
    wanted = build.digest(checkout.parent / "csrc")
    checkout.write_bytes(checkout.read_bytes() + wanted.encode())
    assert f"their digest is {wanted}, not " in refusal(checkout.parent)


def test_of_two_processes_one_builds(checkout: Path) -> None:
    (checkout.parent / "csrc" / "more.h").touch()
    code = "import sys, pathlib, exitlm.native.library as l; l.open_library(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(checkout.parent)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert "".join(printed).count("; building it") == 1


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """A directory that this process can't write, even as root."""
    directory.chmod(0o555)
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        directory.chmod(0o755)


@pytest.fixture
def public_place(checkout: Path) -> Iterator[Path]:
    """The checkout where everybody may read it."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(shutil.copytree(checkout.parent, Path(name) / "package"))
        for place in (Path(name), directory, *directory.rglob("*")):
            place.chmod(0o755)
        yield directory


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs rights as POSIX has them")
def test_a_read_only_package_is_loaded_and_never_written(public_place: Path) -> None:
    with read_only(public_place):
        assert open_library(public_place).isa == "stand-in"
    (public_place / "csrc" / "more.h").touch()
    before = sorted(public_place.iterdir())
    with read_only(public_place):
        sentence = refusal(public_place)
    assert "is of other sources than those beside it" in sentence
    assert "Permission denied" in sentence
    assert sorted(public_place.iterdir()) == before


def test_the_library_is_looked_for_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.why_not() is None
    fresh.unlink()
    assert library.load() is library.load()
    monkeypatch.setattr(library, "_found", None)
    first = library.why_not()
    assert first is not None
    assert "is missing" in first
    fresh.touch()
    assert library.why_not() == first
    with pytest.raises(UserError, match="is missing"):
        library.load()


def test_the_library_is_switched_off_by_the_environment(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, reason in (("1", None), ("0", "the native library is switched off by EXITLM_NATIVE=0"), ("", None)):
        monkeypatch.setenv("EXITLM_NATIVE", value)
        assert library.why_not() == reason
    monkeypatch.setenv("EXITLM_NATIVE", "off")
    with pytest.raises(UserError, match="EXITLM_NATIVE is 'off'; set it to 0"):
        library.load()


@pytest.mark.parametrize("value", ["0", "-1", "2.0", "two", "١", str(MAX_THREADS + 1), "9" * 5000])
def test_an_impossible_number_of_threads_is_one_sentence(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXITLM_THREADS", value)
    with pytest.raises(
        UserError, match=r"^EXITLM_THREADS is '.{1,60}; set it to a number from 1 to 1024, or unset it$"
    ):
        default_threads()


def test_threads_are_those_given_or_the_cores_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXITLM_THREADS", " 3 ")
    assert default_threads() == 3
    monkeypatch.delenv("EXITLM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 5}, raising=False)
    assert default_threads() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert default_threads() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert default_threads() == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_tells_the_library(installed: Path) -> None:
    lib = open_library(installed.parent).lib
    assert lib.exitcpu_standin_forks() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads beside a fork
        child = os.fork()
    if child == 0:
        os._exit(10 + lib.exitcpu_standin_forks())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11
    assert lib.exitcpu_standin_forks() == 0


def test_loading_needs_neither_torch_nor_posix(installed: Path) -> None:
    """As on a system without these modules, and in an environment with nothing but exitlm."""
    code = f"""
import os, sys
from pathlib import Path
for name in ("fcntl", "pwd", "grp", "resource", "termios", "torch", "numpy", "filelock"):
    sys.modules[name] = None
for name in ("fork", "register_at_fork", "sched_getaffinity", "geteuid", "getuid"):
    if hasattr(os, name):
        delattr(os, name)
from exitlm.native import library
assert library.default_threads() >= 1
assert library.open_library(Path({str(installed.parent)!r})).isa == "stand-in"
del sys.modules["filelock"]
import exitlm.atomic
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs nm of Linux")
def test_the_library_keeps_its_other_symbols_to_itself(compiled: Path, sources: Path, tmp_path: Path) -> None:
    """The C++ library that is linked into it must not meet the one of torch."""
    copy = Path(shutil.copytree(sources, tmp_path / "csrc"))
    (copy / "pool.cpp").write_text("#include <thread>\nvoid pool() { std::thread([] {}).join(); }\n")
    build.build(tmp_path / "lib.so", copy)
    command = ["nm", "-D", "--defined-only", str(tmp_path / "lib.so")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listed.splitlines()}
    assert {"exitcpu_abi", "exitcpu_isa"} < names
    assert all(name.startswith("exitcpu_") for name in names)
