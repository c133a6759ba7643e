"""Building the native library: which compiler, which flags for which file, and what a failure leaves behind."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from exitlm.native import build

HOST = build.host_target()
X86_64 = HOST is not None and HOST.machine == "x86_64"
REAL = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
REAL_PATH = os.environ.get("PATH", "")

Program = Callable[[str, str], Path]


@pytest.fixture
def program(bare_machine: Path) -> Program:
    """Write a shell script under a name on the PATH of a machine without compilers."""

    def write(name: str, script: str) -> Path:
        path = bare_machine / name
        path.write_text(f"#!/bin/sh\nPATH='{REAL_PATH}'\n{script}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def copied(sources: Path, tmp_path: Path) -> Path:
    """Sources to change."""
    return Path(shutil.copytree(sources, tmp_path / "copy" / "csrc"))


def sets_of(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).exitcpu_standin_sets())


def test_the_digest_is_of_names_and_bytes(copied: Path) -> None:
    first = build.digest(copied)
    assert len(first) == 16
    (copied / "notes.txt").write_text("not a source")
    assert build.digest(copied) == first
    (copied / "standin.h").rename(copied / "renamed.h")
    renamed = build.digest(copied)
    (copied / "rest.inc").touch()
    longer = build.digest(copied)
    (copied / "rest.inc").write_text(" ")
    assert len({first, renamed, longer, build.digest(copied)}) == 4


def test_the_digest_knows_where_files_end(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for directory, first, second in ((one, "ab", "c"), (other, "a", "bc")):
        directory.mkdir()
        (directory / "a.h").write_text(first)
        (directory / "b.h").write_text(second)
    assert build.digest(one) != build.digest(other)


@pytest.mark.skipif(not X86_64, reason="the stand-in's files are for x86-64")
def test_each_file_gets_the_flags_of_its_instruction_set(compiled: Path, sources: Path) -> None:
    """A file with the wrong flags doesn't compile; the one for NEON isn't compiled at all."""
    assert sets_of(compiled) in (1 + 2 + 4, 1 + 4)  # gcc before 11 has no AVX-VNNI
    assert build.carries(compiled, build.digest(sources))


@pytest.mark.skipif(not X86_64 or REAL is None, reason="needs a compiler for x86-64")
def test_a_compiler_that_lacks_an_instruction_set_builds_the_others(
    program: Program, sources: Path, tmp_path: Path
) -> None:
    program("c++", f'case "$*" in *-mavxvnni*) echo "error: no -mavxvnni" >&2; exit 1;; esac\nexec {REAL} "$@"')
    build.build(tmp_path / "lib.so", sources)
    assert sets_of(tmp_path / "lib.so") == 1 + 4


@pytest.mark.skipif(REAL is None, reason="needs a compiler")
def test_cxx_comes_first_and_may_have_words(
    program: Program, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = tmp_path / "used"
    program("launcher", f'echo "$1" >> {used}\nexec "$@"')
    program("c++", "exit 1")
    monkeypatch.setenv("CXX", f"launcher {REAL}")
    build.build(tmp_path / "lib.so", sources)
    assert set(used.read_text().split()) == {REAL}


@pytest.mark.skipif(REAL is None, reason="needs a compiler")
def test_a_compiler_that_does_not_work_gives_way_to_the_next(
    program: Program, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", 'an "open quote')
    program("c++", 'echo "error: too old for c++20" >&2; exit 1')
    program("clang++", f'exec {REAL} "$@"')
    build.build(tmp_path / "lib.so", sources)
    assert build.carries(tmp_path / "lib.so", build.digest(sources))


@pytest.mark.skipif(REAL is None, reason="needs a compiler")
def test_without_a_static_library_of_cplusplus_the_shared_one_is_linked(
    program: Program, sources: Path, tmp_path: Path
) -> None:
    program("c++", f'case "$*" in *-static-libstdc++*) echo "error: no -lstdc++" >&2; exit 1;; esac\nexec {REAL} "$@"')
    build.build(tmp_path / "lib.so", sources)
    assert build.carries(tmp_path / "lib.so", build.digest(sources))


def test_without_a_compiler_the_sentence_says_what_to_install(
    bare_machine: Path, sources: Path, tmp_path: Path
) -> None:
    with pytest.raises(build.NoCompiler, match=r"no C\+\+ compiler here; install g\+\+ .* `pip install ziglang`"):
        build.build(tmp_path / "lib.so", sources)
    assert not list(tmp_path.glob("*lib*"))


def test_compilers_that_do_not_work_are_named_with_their_reasons(
    program: Program, sources: Path, tmp_path: Path
) -> None:
    program("c++", 'echo "warning: old" >&2; echo "c++: error: unrecognized option -std=c++20" >&2; exit 1')
    program("g++", "exit 3")
    with pytest.raises(build.NoCompiler) as caught:
        build.build(tmp_path / "lib.so", sources)
    assert "c++ (c++: error: unrecognized option -std=c++20), g++ (exit status 3)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sources_that_do_not_compile_leave_the_former_library(compiled: Path, copied: Path) -> None:
    library = copied.with_name(compiled.name)
    shutil.copy(compiled, library)
    (copied / "layers.cpp").write_text("int broken( {\n")
    with pytest.raises(build.BuildError, match=r"cannot compile layers\.cpp: .*error") as caught:
        build.build(library, copied)
    assert not isinstance(caught.value, build.NoCompiler)
    assert "layers.cpp" in caught.value.output
    assert library.read_bytes() == compiled.read_bytes()
    assert sorted(path.name for path in library.parent.iterdir()) == ["csrc", library.name]


def test_a_function_that_is_nowhere_is_an_error(compiled: Path, copied: Path, tmp_path: Path) -> None:
    """A linker of Linux would leave it to the loader."""
    (copied / "layers.cpp").write_text(
        '#include "standin.h"\nint nowhere();\nEXPORT int exitcpu_more() { return nowhere(); }'
    )
    with pytest.raises(build.BuildError, match=r"cannot link the native library: .*nowhere"):
        build.build(tmp_path / "lib.so", copied)
    assert not list(tmp_path.glob("*lib*"))


def test_warnings_are_returned(compiled: Path, copied: Path, tmp_path: Path) -> None:
    (copied / "layers.cpp").write_text("#warning look here\n")
    assert "look here" in build.build(tmp_path / "lib.so", copied)


def test_flags_for_every_file_can_be_added(compiled: Path, copied: Path, tmp_path: Path) -> None:
    (copied / "layers.cpp").write_text("#ifndef MORE\n#error less\n#endif\n")
    build.build(tmp_path / "lib.so", copied, extra=["-DMORE"])
    assert (tmp_path / "lib.so").exists()


def test_absent_sources_and_places_are_named(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(build.NoCompiler, match=r"sources .* aren't here: .*nowhere doesn't exist"):
        build.build(tmp_path / "lib.so", tmp_path / "nowhere")
    with pytest.raises(build.BuildError, match=r"cannot build .*absent/lib\.so: .*No such file"):
        build.build(tmp_path / "absent" / "lib.so", sources)


@pytest.mark.parametrize(
    ("triple", "machine", "library", "wheel"),
    [
        ("x86_64-linux-gnu.2.17", "x86_64", "libexitcpu.so", "manylinux_2_17_x86_64"),
        ("aarch64-linux-gnu.2.17", "aarch64", "libexitcpu.so", "manylinux_2_17_aarch64"),
        ("aarch64-macos.11.0", "aarch64", "libexitcpu.dylib", "macosx_11_0_arm64"),
        ("x86_64-linux-musl", "x86_64", "libexitcpu.so", "musllinux_1_2_x86_64"),
    ],
)
def test_a_target_names_its_library_and_wheel(triple: str, machine: str, library: str, wheel: str) -> None:
    target = build.resolve_target(triple)
    assert (target.machine, target.library, target.wheel) == (machine, library, wheel)


@pytest.mark.parametrize(
    "triple", ["x", "x86_64-linux", "x86_64-linux-gnu", "x86_64-windows-gnu", "arm64-macos", "-", " "]
)
def test_an_unknown_target_is_one_sentence(triple: str) -> None:
    with pytest.raises(build.BuildError, match=r"names no target; take one such as x86_64-linux-gnu\.2\.17"):
        build.resolve_target(triple)


def test_another_machine_takes_ziglang(bare_machine: Path, sources: Path, tmp_path: Path) -> None:
    with pytest.raises(build.NoCompiler, match=r"building for aarch64-macos\.11\.0 takes the package ziglang"):
        build.build(tmp_path / "lib.dylib", sources, "aarch64-macos.11.0")


def test_a_system_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Windows")
    with pytest.raises(build.NoCompiler, match="written for Linux and macOS, not for Windows"):
        build.resolve_target(None)


@pytest.fixture
def command(compiled: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``main`` builds the stand-in; returns where it puts the library."""
    monkeypatch.setattr(build, "SOURCES", copied)
    return copied.with_name(compiled.name)


def test_the_command_builds_what_is_not_up_to_date(command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main([]) == 0
    assert "is built" in capsys.readouterr().out
    first = command.stat()
    assert build.main([]) == 0
    assert "up to date" in capsys.readouterr().out
    assert command.stat().st_ino == first.st_ino
    os.utime(command, (0, 0))  # older than the flags
    assert build.main([]) == 0
    assert "is built" in capsys.readouterr().out
    (command.parent / "csrc" / "layers.cpp").write_text("int more;")
    assert build.main([]) == 0
    assert "is built" in capsys.readouterr().out
    assert build.main(["--force"]) == 0
    assert "is built" in capsys.readouterr().out


def test_the_command_fails_with_what_the_compiler_printed(command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command.parent / "csrc" / "layers.cpp").write_text("int broken( {")
    for optional in ([], ["--optional"]):  # an error in the sources is one even where the library is optional
        assert build.main(optional) == 1
        printed = capsys.readouterr().err
        assert printed.splitlines()[-1].startswith(("c++ cannot compile layers.cpp: ", "g++ cannot", "clang++ cannot"))
        assert "int broken(" in printed


def test_the_command_may_go_without_a_compiler(
    command: Path, bare_machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main([]) == 1
    assert capsys.readouterr().err.startswith("there is no C++ compiler here; ")
    assert build.main(["--optional"]) == 0
    assert capsys.readouterr().err.startswith("exitlm decodes without its native library: there is no C++ compiler")
    assert not command.exists()


def test_another_target_needs_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build.main(["--target", "aarch64-macos.11.0"])
    assert "--target needs --out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not X86_64 or shutil.which("nm") is None, reason="needs nm, and the instruction sets of x86-64")
@pytest.mark.parametrize("name", sorted(name for name in build._INSTRUCTION_SETS if "neon" not in name))
def test_no_file_of_an_instruction_set_gives_its_code_away(name: str, compiled: Path, tmp_path: Path) -> None:
    """A function of a template or an inline function is in every object file that uses it, and the linker takes one of
    them for all: a processor without AVX-512 would run the one of the file for AVX-512."""
    assert HOST is not None
    compiler = build.find_compiler(HOST)
    flags = (*compiler.compile_flags(), *build._INSTRUCTION_SETS[name].flags)
    done = compiler.run(*flags, "-c", build.SOURCES / name, "-o", tmp_path / "tiles.o")
    assert done.returncode == 0, done.stderr
    command = ["nm", "--defined-only", "--format=posix", str(tmp_path / "tiles.o")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kinds = {line.split()[0]: line.split()[1] for line in listed.splitlines()}
    assert [symbol for symbol, kind in kinds.items() if kind in "WVu"] == []
    assert "T" in kinds.values() or "D" in kinds.values() or "R" in kinds.values()
