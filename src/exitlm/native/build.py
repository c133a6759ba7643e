"""Compile the native library: the one place that knows compilers, flags and targets.

Nothing but the standard library is imported: the build hook of the wheel (``hatch_build.py``) loads this file by its
path, and a developer runs ``python -m exitlm.native.build``. Loading the result is :mod:`exitlm.native.library`'s.

Without a target, the first compiler that works is taken: ``$CXX``, c++, g++, clang++, the clang of the PyPI package
ziglang. With a target (a triple of zig, such as ``aarch64-linux-gnu.2.17``) it is always ziglang's.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")

_COMPILE = (
    "-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden",
    "-fno-math-errno", "-ffp-contract=fast", "-fno-trapping-math", "-Wno-psabi",
)  # fmt: skip
_JOBS = 2
_DIGEST_DIGITS = 16
_MACHINES = {"amd64": "x86_64", "x86_64": "x86_64", "x64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}
_MACOS = "11.0"  # the first of arm64, and the first whose C++ library has the waits of atomics
_GLIBC = "2.17"
# Uses what the sources use of C++20 and of threads: an old compiler, or one without its library, fails here.
_PROBE = """
#include <atomic>
#include <thread>
extern "C" int probe() {
    std::atomic<int> value{0};
    std::thread other([&] { value = 1; value.notify_all(); });
    value.wait(0);
    other.join();
    return value;
}
"""


class BuildError(Exception):
    """The library can't be built: one sentence. ``output`` is what the compiler printed."""

    def __init__(self, sentence: str, output: str = "") -> None:
        super().__init__(sentence)
        self.output = output


class NoCompiler(BuildError):
    """Nothing on this machine can build it: no sources, no compiler, or a system that it isn't written for."""


@dataclass(frozen=True)
class _InstructionSet:
    """What a file of one instruction set needs: ``define`` tells the sources that it is compiled."""

    machine: str
    define: str
    flags: tuple[str, ...]
    zig_cpu: str  # the same for zig, which has its own names for processors and drops -m flags of features

    def flags_for(self, compiler: Compiler) -> tuple[str, ...]:
        return (f"-mcpu={self.zig_cpu}", *_vector_width(self.flags)) if compiler.zig else self.flags


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", *_AVX2, "-mprefer-vector-width=512",
)  # fmt: skip
# Every other .cpp of the sources is compiled for the plainest processor of its machine.
_INSTRUCTION_SETS = {
    "tiles_avx2.cpp": _InstructionSet("x86_64", "HAVE_AVX2", _AVX2, "x86_64+avx2+fma+f16c"),
    "tiles_avxvnni.cpp": _InstructionSet(
        "x86_64", "HAVE_AVXVNNI", (*_AVX2, "-mavxvnni"), "x86_64+avx2+fma+f16c+avxvnni"
    ),
    "tiles_avx512vnni.cpp": _InstructionSet(
        "x86_64", "HAVE_AVX512VNNI", _AVX512,
        "x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx512vnni+avx2+fma+f16c",
    ),
    "tiles_neon.cpp": _InstructionSet(
        "aarch64", "HAVE_NEON", ("-march=armv8.2-a+dotprod+fp16",), "generic+v8_2a+dotprod+fullfp16"
    ),
}  # fmt: skip


def _vector_width(flags: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(flag for flag in flags if flag.startswith("-mprefer-vector-width"))


@dataclass(frozen=True)
class Target:
    """A machine to build for. ``triple`` is zig's name of it; system is "linux" or "darwin"."""

    machine: str
    system: str
    triple: str
    wheel: str  # the platform tag of a wheel with its library, where only zig's rules apply

    @property
    def library(self) -> str:
        """The file name of the library."""
        return "libexitcpu.dylib" if self.system == "darwin" else "libexitcpu.so"


def host_target() -> Target | None:
    """This machine and system, or None where the library isn't written for the system."""
    machine = _MACHINES.get(platform.machine().lower(), platform.machine().lower())
    if platform.system() == "Darwin":
        return _target(f"{machine}-macos.{_MACOS}")
    if platform.system() == "Linux":
        return _target(f"{machine}-linux-" + (f"gnu.{_GLIBC}" if platform.libc_ver()[0] == "glibc" else "musl"))
    return None


def _target(triple: str) -> Target:
    """The target of a triple such as x86_64-linux-gnu.2.17, aarch64-linux-musl or aarch64-macos.11.0.

    Raises:
        BuildError: the triple isn't of that form, or of another system.
    """
    machine, _, rest = triple.partition("-")
    system, _, version = rest.partition("-") if rest.startswith("linux") else rest.partition(".")
    machine = _MACHINES.get(machine, machine)
    if system == "linux" and version.startswith("gnu.") and version[4:].replace(".", "").isdigit():
        return Target(machine, "linux", triple, f"manylinux_{version[4:].replace('.', '_')}_{machine}")
    if system == "linux" and version == "musl":
        return Target(machine, "linux", triple, f"musllinux_1_2_{machine}")
    if system == "macos" and version.replace(".", "").isdigit():
        arm = "arm64" if machine == "aarch64" else machine
        return Target(machine, "darwin", triple, f"macosx_{version.replace('.', '_')}_{arm}")
    raise BuildError(
        f"'{triple}' names no target; take one such as x86_64-linux-gnu.2.17, aarch64-linux-gnu.2.17 or "
        "aarch64-macos.11.0"
    )


def resolve_target(triple: str | None) -> Target:
    """The target of a triple, or this machine's.

    Raises:
        BuildError: see :func:`build`.
    """
    target = _target(triple) if triple else host_target()
    if target is None:
        raise NoCompiler(f"the native library is written for Linux and macOS, not for {platform.system()}")
    return target


def digest(sources: Path = SOURCES) -> str:
    """16 hexadecimal digits of the names and bytes of the sources, which the library carries.

    Raises:
        OSError: the directory can't be read.
    """
    total = hashlib.sha256()
    for file in _source_files(sources):
        content = file.read_bytes()
        total.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:_DIGEST_DIGITS]


def _source_files(sources: Path) -> list[Path]:
    return sorted(file for file in sources.iterdir() if file.suffix in (".cpp", ".h", ".inc"))


def carries(library: Path, wanted: str) -> bool:
    """Whether a file is a library of the sources with this digest. The file is searched, not loaded."""
    try:
        return wanted.encode() in library.read_bytes()
    except OSError:
        return False


@dataclass(frozen=True)
class Compiler:
    """A command that compiles C++, and how it links here."""

    command: tuple[str, ...]
    target: Target
    zig: bool = False
    link: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "ziglang" if self.zig else shlex.join(self.command)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run it; a command that can't be started fails with 127, as in a shell."""
        command = [*self.command, *map(str, arguments)]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False
            )
        except OSError as error:
            return subprocess.CompletedProcess(command, 127, "", f"{self.command[0]}: {error.strerror}")

    def compile_flags(self) -> tuple[str, ...]:
        """The flags of every file."""
        if self.zig:  # whose default is this machine's processor, and traps where C++ leaves behaviour undefined
            plain = "x86_64" if self.target.machine == "x86_64" else "generic"
            return (*_COMPILE, "-target", self.target.triple, f"-mcpu={plain}", "-fno-sanitize=undefined")
        if self.target.system == "darwin":
            return (*_COMPILE, f"-mmacosx-version-min={_MACOS}")
        return _COMPILE

    def link_choices(self) -> list[tuple[str, ...]]:
        """Flags to link with, best first. A Linux without the static C++ library links the shared one."""
        if self.target.system == "darwin":
            return [("-shared", "-lpthread", f"-Wl,-install_name,@rpath/{self.target.library}")]
        if self.zig:
            return [("-shared", "-s", "-lpthread", "-Wl,-z,defs")]
        shared = ("-shared", "-lpthread", "-Wl,-z,defs")
        return [(*shared, "-static-libstdc++", "-static-libgcc"), shared]


def _exports(target: Target, place: Path) -> tuple[str, ...]:
    """A flag that keeps all symbols of the library to itself but its interface: the C++ library that is linked into it
    must not meet another one in the process. ``place`` is a directory for the file that the linker of Linux wants."""
    if target.system == "darwin":  # whose libraries find their own symbols first
        return ()
    (place / "exports").write_text("{ global: exitcpu_*; local: *; };\n")
    return (f"-Wl,--version-script={place / 'exports'}",)


def _candidates(target: Target, cross: bool) -> Iterator[Compiler]:
    if not cross:
        seen = set()
        for words in (_chosen(), ["c++"], ["g++"], ["clang++"]):
            found = shutil.which(words[0]) if words else None
            if found and (key := (os.path.realpath(found), *words[1:])) not in seen:
                seen.add(key)
                yield Compiler(tuple(words), target)
    if importlib.util.find_spec("ziglang") is not None:
        yield Compiler((sys.executable, "-m", "ziglang", "c++"), target, zig=True)


def _chosen() -> list[str]:
    """The words of $CXX, which may name a launcher and flags."""
    given = os.environ.get("CXX", "")
    try:
        return shlex.split(given)
    except ValueError:  # an open quote
        return [given]


def find_compiler(target: Target, cross: bool = False) -> Compiler:
    """The first compiler that builds a small library of C++20; ``cross`` leaves the choice to ziglang.

    Raises:
        NoCompiler: there is none; the sentence says which were tried.
    """
    failures, output = [], []
    with tempfile.TemporaryDirectory(prefix="exitlm-probe-") as name:
        place = Path(name)
        (place / "probe.cpp").write_text(_PROBE)
        exports = _exports(target, place)
        for compiler in _candidates(target, cross):
            for link in compiler.link_choices():
                flags: list[str | Path] = [*compiler.compile_flags(), place / "probe.cpp", *link, *exports]
                done = compiler.run(*flags, "-o", place / "probe.so")
                if done.returncode == 0:
                    return Compiler(compiler.command, target, compiler.zig, link)
            failures.append(f"{compiler.name} ({_reason(done)})")
            output.append(done.stderr)
    if cross and not failures:
        raise NoCompiler(f"building for {target.triple} takes the package ziglang: pip install ziglang")
    remedy = "install g++ or clang++ of 2021 or later, or `pip install ziglang`"
    if failures:
        raise NoCompiler(f"no C++20 compiler works here: {', '.join(failures)}; {remedy}", "\n".join(output))
    raise NoCompiler(f"there is no C++ compiler here; {remedy}")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    telling = [
        line
        for line in lines
        if re.search("error|undefined (reference|symbol)", line, re.IGNORECASE)
        and not re.search("collect2: |linker command failed", line)
    ]
    telling = telling or lines
    return telling[0][:200] if telling else f"exit status {done.returncode}"


def build(
    library: Path | None = None, sources: Path = SOURCES, triple: str | None = None, extra: Sequence[str] = ()
) -> str:
    """Compile the sources into ``library`` (beside them by default), which takes the place of a former one when whole.

    Args:
        triple: the target, in zig's words; this machine if None.
        extra: flags for every compilation and the link, such as ``-fsanitize=address``.

    Returns:
        What the compiler printed: warnings.

    Raises:
        NoCompiler: this machine can't build it.
        BuildError: the sources don't compile, the target is unknown, or a file can't be written.
    """
    target = resolve_target(triple)
    library = library or sources.parent / target.library
    if not sources.is_dir():
        raise NoCompiler(f"the sources of the native library aren't here: {sources} doesn't exist")
    temporary = library.with_name(f".{library.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()  # before minutes of work that could not be kept
        try:
            compiler = find_compiler(target, cross=triple is not None)
            output = _compile(compiler, sources, temporary, tuple(extra))
            _sync(temporary)
            os.replace(temporary, library)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(f"cannot build {library}: {error}") from error
    return output


def _compile(compiler: Compiler, sources: Path, library: Path, extra: tuple[str, ...]) -> str:
    """Compile every file, _JOBS at a time, and link; returns what was printed."""
    defines: list[str] = []
    jobs: list[tuple[Path, tuple[str, ...]]] = []
    # The tiles take longest, and the generic ones longest of all.
    for file in sorted(
        sources.glob("*.cpp"), key=lambda file: (file.stem != "tiles_generic", "tiles" not in file.stem)
    ):
        special = _INSTRUCTION_SETS.get(file.name)
        if special is None:
            jobs.append((file, ()))
        elif special.machine == compiler.target.machine and _knows(compiler, special.flags_for(compiler)):
            jobs.append((file, special.flags_for(compiler)))
            defines.append(f"-D{special.define}=1")
    if not jobs:
        raise NoCompiler(f"the sources of the native library aren't here: {sources} holds no .cpp")
    carried = digest(sources)

    with tempfile.TemporaryDirectory(prefix="exitlm-native-") as name, ThreadPoolExecutor(_JOBS) as pool:

        def compile_one(file: Path, flags: tuple[str, ...]) -> tuple[Path, str]:
            compiled = Path(name) / f"{file.stem}.o"
            own = [f'-DEXITCPU_DIGEST="{carried}"'] if file.name == "dispatch.cpp" else []
            done = compiler.run(*compiler.compile_flags(), *flags, *defines, *own, *extra, "-c", file, "-o", compiled)
            if done.returncode != 0:
                raise BuildError(f"{compiler.name} cannot compile {file.name}: {_reason(done)}", done.stderr)
            return compiled, done.stderr

        waiting = [pool.submit(compile_one, *job) for job in jobs]
        try:
            results = [job.result() for job in waiting]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        objects = [compiled for compiled, _ in results]
        link = (*compiler.link, *_exports(compiler.target, Path(name)), *extra)
        # zig's flags to compile hold the target, which it needs here too
        done = compiler.run(*compiler.compile_flags(), *objects, *link, "-o", library)
        if done.returncode != 0:
            raise BuildError(f"{compiler.name} cannot link the native library: {_reason(done)}", done.stderr)
        return "".join([printed for _, printed in results] + [done.stderr])


def _knows(compiler: Compiler, flags: Sequence[str]) -> bool:
    """Whether a compiler takes these flags (gcc before 11 doesn't know -mavxvnni)."""
    with tempfile.TemporaryDirectory(prefix="exitlm-probe-") as name:
        source = Path(name) / "empty.cpp"
        source.touch()
        return (
            compiler.run(*compiler.compile_flags(), *flags, "-c", source, "-o", source.with_suffix(".o")).returncode
            == 0
        )


def _sync(path: Path) -> None:
    """Wait until a file is on the disk: a library that is half there after a crash could end the process."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def is_current(library: Path, sources: Path = SOURCES) -> bool:
    """Whether a library is of these sources, and not older than the flags in this file."""
    try:
        return library.stat().st_mtime >= Path(__file__).stat().st_mtime and carries(library, digest(sources))
    except OSError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m exitlm.native.build``: build what isn't up to date. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m exitlm.native.build", description="Build the native CPU library.")
    parser.add_argument(
        "--target", metavar="TRIPLE", help="build for another machine, with ziglang (pip install ziglang)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to put it (default: beside the sources)")
    parser.add_argument("--force", action="store_true", help="build it even if it is up to date")
    parser.add_argument("--optional", action="store_true", help="succeed with a note where nothing can build it")
    given = parser.parse_args(arguments)
    if given.target and not given.out:
        parser.error("--target needs --out: the place beside the sources is this machine's")
    try:
        library = given.out or SOURCES.parent / resolve_target(given.target).library
        if not (given.force or given.target) and is_current(library, SOURCES):
            print(f"{library} is up to date")
            return 0
        output = build(library, SOURCES, given.target)
    except NoCompiler as error:
        if error.output and not given.optional:
            print(error.output, file=sys.stderr)
        print(f"exitlm decodes without its native library: {error}" if given.optional else error, file=sys.stderr)
        return 0 if given.optional else 1
    except BuildError as error:
        print(error.output, error, sep="\n", file=sys.stderr)
        return 1
    if output:
        print(output, file=sys.stderr)
    print(f"{library} is built")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
