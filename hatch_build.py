"""The build hook of exitlm's wheels: compiles the native library, for a wheel and for an editable install.

Without a compiler the wheel is pure, with a note. ``EXITLM_NATIVE_TARGET`` names another machine to build a wheel for
(a triple of zig, see ``make wheels``); there a library that can't be built is an error.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

PACKAGE = Path("src/exitlm/native")


class NativeLibrary(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling before and after it writes a wheel."""

    _temporary: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        package = Path(self.root) / PACKAGE
        build = load_build(package / "build.py")
        triple = os.environ.get("EXITLM_NATIVE_TARGET") or None
        try:
            target = build.resolve_target(triple)
            if version == "editable":
                if not build.is_current(package / target.library, package / "csrc"):
                    build.build(package / target.library, package / "csrc")
                return
            self._temporary = tempfile.mkdtemp(prefix="exitlm-wheel-")
            library = Path(self._temporary) / target.library
            build.build(library, package / "csrc", triple)
        except build.BuildError as error:
            if triple:
                self.app.abort(f"{error.output}\n{error}".strip())
            self.app.display_warning(f"exitlm decodes without its native library: {error}")
            return
        build_data["force_include"][str(library)] = f"exitlm/native/{target.library}"
        build_data["pure_python"] = False
        # A compiler of this machine links this machine's C library: no promise of manylinux can be made for it.
        local = triple is None and target.system == "linux"
        build_data["tag"] = f"py3-none-{local_platform() if local else target.wheel}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)


def local_platform() -> str:
    """The platform tag of what is built here for here, such as linux_x86_64."""
    return next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))


def load_build(path: Path) -> ModuleType:
    """exitlm's build module, without importing exitlm or what it depends on."""
    spec = importlib.util.spec_from_file_location("exitlm_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
