"""``exitlm serve``: its flags, and what they set."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from exitlm.errors import UserError

if TYPE_CHECKING:
    pass

_SECTION_OF = {
    "model": ("source", "adapters", "name", "dtype", "device", "quant"),
    "engine": ("pipeline", "tensor", "stages_at", "stage_key_file", "stage_certificate"),
}


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Over how many processes a model is spread."""
    add = parser.add_argument
    add("--pipeline", type=int, metavar="P", help="stages, each with some layers in a process of its own (default: 1)")
    add("--tensor", type=int, metavar="T", help="processes that share the matrices of each stage (default: 1)")


def add_serve(parser: argparse.ArgumentParser, model_help: str) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help=f"{model_help} (default: what --config names)")
    add("--config", metavar="FILE", help="settings in TOML: sections model, http, limits, engine, defaults")
    add("--name", metavar="NAME", help="what clients call the model (default: the last part of MODEL)")
    add("--host", metavar="H", help="the address to listen on (default: 127.0.0.1)")
    add("--port", type=int, metavar="P", help="(default: 8000)")
    add("--api-key", metavar="K", help="ask clients for this key (default: EXITLM_API_KEY, else none)")
    add("--api-key-file", metavar="FILE", help="a file with one key a line; any of them opens the server")
    add("--without-key", action="store_true", help="listen beyond this machine although no key is asked for")
    add("--replicas", type=int, metavar="N", help="copies of the server, on Ray Serve (default: 0, this process alone)")
    add("--dtype", metavar="D", help="of the weights, such as float32 (default: the checkpoint's)")
    add("--device", metavar="D", help="cpu (default) or cuda")
    add("--quant", metavar="Q", help="how weights are packed on a CPU (see exitlm generate --help)")
    add_processes(parser)
    add("--dry-run", action="store_true", help="say what each process would hold and take, and load nothing")
    add("--bandwidth", type=float, metavar="GB/S", help="what a process reads, in a dry run (default: measured here)")
    add("--stages-at", metavar="HOST:PORT", help="wait there for the other stages (exitlm stage --join HOST:PORT)")
    add("--stage-key-file", metavar="FILE", help="what stages have to know (default: EXITLM_STAGE_KEY)")
    add("--stage-certificate", metavar="FILE", help="a certificate and its key (PEM): links to stages are encrypted")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any setting of the file, such as limits.queue=64 defaults.mode=threshold engine.max_sequences=16",
    )


def serve(
    model: str | None = None,
    *,
    config: str | None = None,
    adapter: Sequence[str] | None = None,
    set: Sequence[str] = (),
    dry_run: bool = False,
    bandwidth: float | None = None,
    **flags: Any,
) -> int:
    """Answer many clients over HTTP, as OpenAI's API does; ``flags`` are settings of the server, or None."""
    from exitlm.assignments import assignments
    from exitlm.serve.config import KEY_VARIABLE, SECTIONS, ServeConfig, merged, read_tree

    given: dict[str, dict[str, Any]] = {"model": {}, "http": {}, "engine": {}, "replicas": {}}
    if (number := flags.pop("replicas", None)) is not None:
        given["replicas"]["number"] = number
    for name, value in {"source": model, "adapters": adapter, **flags}.items():
        if value is not None and value is not False:  # a port of 0 equals False
            section = next((section for section, names in _SECTION_OF.items() if name in names), "http")
            given[section][name] = value
    if flags.get("allow_other_base"):
        given["model"]["allow_other_base"] = given["http"].pop("allow_other_base")
    if "api_key" in given["http"]:
        given["http"]["api_keys"] = [given["http"].pop("api_key")]
    elif os.environ.get(KEY_VARIABLE) and "api_key_file" not in given["http"]:
        given["http"]["api_keys"] = [os.environ[KEY_VARIABLE]]
    plain, sections = assignments(set, SECTIONS)
    if plain:
        word = next(iter(plain))
        raise UserError(f"'{word}' names no section; write --set SECTION.KEY=VALUE, with one of {', '.join(SECTIONS)}")
    settings = ServeConfig.of(merged({} if config is None else read_tree(config), given, sections))
    if dry_run:
        from exitlm.decode.layout import described

        m, engine = settings.model, settings.engine
        print(described(m.source, m.adapters, engine, quant=m.quant, dtype=m.dtype, gigabytes=bandwidth))
        return 0
    if bandwidth is not None:
        raise UserError("--bandwidth is what a dry run assumes; give --dry-run, too, or leave it out")
    try:
        if settings.replicas.number:
            from exitlm.serve.ray_app import serve_replicas
        else:
            from exitlm.serve.server import serve
    except ModuleNotFoundError as error:
        extra = "ray" if error.name == "ray" else "serve"
        raise UserError(f"serve needs {error.name}; install it with: pip install 'exitlm[{extra}]'") from None
    if settings.replicas.number:
        return serve_replicas(settings)
    from exitlm.llm import served

    return serve(settings, served)
