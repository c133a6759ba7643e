"""The stand-in library, compiled once; and machines without compilers."""

import importlib.util
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from exitlm.native import build
from tests.native.standin import write_sources


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the stand-in. Not to be changed."""
    return write_sources(tmp_path_factory.mktemp("standin") / "csrc")


@pytest.fixture(scope="session")
def compiled(sources: Path) -> Path:
    """The stand-in library, beside its sources. Not to be changed."""
    target = build.host_target()
    assert target is not None
    library = sources.with_name(target.library)
    try:
        build.build(library, sources)
    except build.NoCompiler as error:
        pytest.skip(str(error))
    return library


@pytest.fixture
def installed(compiled: Path, tmp_path: Path) -> Path:
    """The stand-in library in a directory without sources, as a wheel installs it."""
    (tmp_path / "package").mkdir()
    return Path(shutil.copy(compiled, tmp_path / "package"))


@pytest.fixture
def checkout(compiled: Path, sources: Path, tmp_path: Path) -> Path:
    """The stand-in library in a directory with its sources."""
    shutil.copytree(sources, tmp_path / "checkout" / "csrc")
    return Path(shutil.copy(compiled, tmp_path / "checkout"))


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No compiler anywhere; what is put into the returned directory is on the PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.delenv("CXX", raising=False)
    find = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "ziglang" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return directory
