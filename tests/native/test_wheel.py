"""Wheels: what they hold, what they are called, and that they load where there is no compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from exitlm.native import build
from tests.native.standin import write_sources

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from, without a library."""
    directory = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "CHANGELOG.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, directory)
    ignored = shutil.ignore_patterns("__pycache__", "*libexitcpu.*")
    shutil.copytree(ROOT / "src", directory / "src", ignore=ignored)
    native = directory / "src/exitlm/native"
    if not (native / "csrc").exists():
        write_sources(native / "csrc")
    (native / "libexitcpu.so").write_text("of a developer, who compiled it for this machine")
    return directory


def make(project: Path, out: Path, kind: str = "wheel", **environment: str) -> tuple[Path, str]:
    """Build a wheel or an sdist as `make wheels` does; the file, and what was printed."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(out)],
        cwd=project, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [made] = out.glob("exitlm-*")
    return made, done.stdout + done.stderr


def library_of(wheel: Path, place: Path) -> Path | None:
    """Unpack a wheel, and return its library."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    assert not list(place.rglob("csrc"))
    found = list(place.rglob("libexitcpu.*"))
    assert len(found) <= 1
    return found[0] if found else None


def load_elsewhere(wheel: Path, place: Path) -> str:
    """Install a wheel into an empty environment, load its library there with nothing on the PATH, and return what it
    says: its digest and its instruction set."""
    environment = place / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        check=True,
    )
    code = """
import sys
from exitlm.native.library import load
found = load()
assert "torch" not in sys.modules
print(found.lib.exitcpu_digest().decode(), found.isa, found.path)
"""
    (place / "no-programs").mkdir()
    bare = {"PATH": str(place / "no-programs"), "HOME": str(place)}
    done = subprocess.run([python, "-c", code], env=bare, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(environment) in done.stdout
    return done.stdout


def test_a_wheel_loads_where_there_is_no_compiler(project: Path, tmp_path: Path) -> None:
    target = build.host_target()
    assert target is not None
    wheel, _ = make(project, tmp_path / "dist", EXITLM_NATIVE_TARGET="")
    assert wheel.name.startswith("exitlm-")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert build.digest(project / "src/exitlm/native/csrc") in load_elsewhere(wheel, tmp_path)


def test_a_wheel_of_the_source_distribution_has_the_same_library(project: Path, tmp_path: Path) -> None:
    archive, _ = make(project, tmp_path / "sdist", "sdist")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    [source] = (tmp_path / "unpacked").iterdir()
    assert not list(source.rglob("libexitcpu.*"))
    wheel, _ = make(source, tmp_path / "dist")
    library = library_of(wheel, tmp_path / "wheel")
    assert library is not None
    assert build.carries(library, build.digest(project / "src/exitlm/native/csrc"))


def test_without_a_compiler_a_wheel_is_pure_and_says_so(project: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    hide = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *p: n != 'ziglang' and f(n, *p) or None"
    )
    (tmp_path / "bin" / "sitecustomize.py").write_text(hide)
    wheel, printed = make(
        project, tmp_path / "dist", PATH=str(tmp_path / "bin"), CXX="",
        PYTHONPATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    )  # fmt: skip
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "exitlm decodes without its native library: there is no C++ compiler here" in printed
    assert library_of(wheel, tmp_path / "wheel") is None


def test_a_target_that_cannot_be_built_is_an_error(project: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)],
        cwd=project, env={**os.environ, "EXITLM_NATIVE_TARGET": "vax"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "'vax' names no target" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compiler", [True, False])
def test_an_editable_install_has_the_library_beside_its_sources(
    project: Path, tmp_path: Path, compiler: bool, request: pytest.FixtureRequest
) -> None:
    from hatchling.builders.wheel import WheelBuilder

    if not compiler:
        request.getfixturevalue("bare_machine")
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    native = copy / "src/exitlm/native"
    target = build.host_target()
    assert target is not None
    for left in native.glob("libexitcpu.*"):
        left.unlink()
    builder = WheelBuilder(str(copy))
    hook = builder.get_build_hooks(str(tmp_path))["custom"]
    data = builder.get_default_build_data()
    hook.initialize("editable", data)
    assert build.carries(native / target.library, build.digest(native / "csrc")) is compiler
    assert data == builder.get_default_build_data()


@pytest.mark.skipif(find_spec("ziglang") is None, reason="needs the package ziglang")
@pytest.mark.parametrize(
    ("triple", "tag", "start"),
    [
        ("x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64", b"\x7fELF\x02\x01\x01"),
        ("aarch64-linux-gnu.2.17", "manylinux_2_17_aarch64", b"\x7fELF\x02\x01\x01"),
        ("aarch64-macos.11.0", "macosx_11_0_arm64", b"\xcf\xfa\xed\xfe"),
    ],
)
def test_wheels_for_other_machines(project: Path, tmp_path: Path, triple: str, tag: str, start: bytes) -> None:
    wheel, _ = make(project, tmp_path / "dist", EXITLM_NATIVE_TARGET=triple)
    assert wheel.name.endswith(f"-py3-none-{tag}.whl")
    library = library_of(wheel, tmp_path / "wheel")
    assert library is not None
    assert library.read_bytes().startswith(start)
    assert build.carries(library, build.digest(project / "src/exitlm/native/csrc"))
    host = build.host_target()
    if host is not None and host.triple == triple:
        load_elsewhere(wheel, tmp_path)
