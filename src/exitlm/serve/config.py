"""Settings of a server: plain data, from flags and a TOML file, checked when it is made."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from exitlm.decode.generation import GenerationConfig
from exitlm.decode.options import EngineConfig
from exitlm.errors import UserError, nearest
from exitlm.values import flag, number, path_of, paths_of, settings_of, whole, words, wrong

KEY_VARIABLE = "EXITLM_API_KEY"
SECTIONS = ("model", "http", "limits", "engine", "replicas", "defaults")
LOGS = ("requests", "errors")
NOT_DEFAULTS = ("n", "logits_processor", "response_format", "prompt_logprobs", "logprobs", "prediction", "adapter")
"""Settings of a generation that belong to one request."""

Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is served. ``source``: a directory, a hub id, a .gguf file or smollm2. ``adapters``: directories of
    exits. ``name``: what clients call the base (None: the last part of ``source``). ``dtype``, ``device``, ``quant``
    and ``allow_other_base`` are those of :func:`exitlm.load`."""

    source: str = ""
    adapters: Sequence[str] = ()
    name: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    quant: str = "auto"
    allow_other_base: bool = False

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("no model is named; give one: exitlm serve MODEL, or source in section [model]")
        adapters = tuple(paths_of(self.adapters, "model.adapters"))
        name = self.name or Path(path_of(self.source, "model.source")).name.removesuffix(".gguf") or self.source
        _set(self, adapters=adapters, name=_name(name), allow_other_base=flag(self.allow_other_base, "model"))


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """Where the server listens and who may ask. ``api_keys``: any of them opens it; ``api_key_file`` has one a line.
    ``without_key``: listen beyond this machine although no key is asked for. ``cors_origins``: pages of these origins
    may ask from a browser. ``log``: a line for each request, or for those that failed; ``log_prompts`` puts prompts and
    answers into it."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Sequence[str] = ()
    api_key_file: str | None = None
    without_key: bool = False
    cors_origins: Sequence[str] = ()
    log: str = "requests"
    log_prompts: bool = False

    def __post_init__(self) -> None:
        port = whole(self.port, "http.port", least=0)
        if port > 65535:
            raise UserError(f"http.port is {port}, but must be a whole number from 0 to 65535")
        if not isinstance(self.host, str) or not self.host:
            raise wrong("http.host", self.host, "an address such as 127.0.0.1, or a host name")
        if self.log not in LOGS:
            raise UserError(f"http.log is {self.log!r}, but must be {' or '.join(LOGS)}{nearest(str(self.log), LOGS)}")
        keys = (*words(self.api_keys, "http.api_keys"), *_keys_of_file(self.api_key_file))
        for key in keys:
            if not key.isascii() or not key.isprintable() or " " in key or not key:
                raise UserError("an API key must be one word of printable ASCII characters")
        found = {"without_key": self.without_key, "log_prompts": self.log_prompts}
        _set(
            self, port=port, api_keys=keys, cors_origins=words(self.cors_origins, "http.cors_origins"),
            **{name: flag(value, f"http.{name}") for name, value in found.items()},
        )  # fmt: skip

    def check_reach(self) -> None:
        """Refuse to be reached by other machines without a key, unless told.

        Raises:
            UserError: that, and what to do.
        """
        if not self.api_keys and not self.without_key and not _is_loopback(self.host):
            raise UserError(
                f"host {self.host} can be reached by other machines, and no API key is set; give one with --api-key, "
                f"--api-key-file or {KEY_VARIABLE}, or allow everybody with --without-key"
            )


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What one request may ask for, and all together. ``body_bytes`` of a request; ``new_tokens`` of an answer (None:
    as many as fit into the context); ``prompts`` of a completion; ``choices``: n. ``queue``: texts that wait beside
    those that are decoded; more get status 429. ``deadline``: seconds that an answer may take; ``read_timeout``: that a
    request may take to arrive; ``write_timeout``: that a client may take to read what waits for it; ``drain``: that
    running answers have when the server is told to end."""

    body_bytes: int = 4 * 2**20
    new_tokens: int | None = None
    prompts: int = 128
    choices: int = 16
    queue: int = 256
    deadline: float = 600.0
    read_timeout: float = 30.0
    write_timeout: float = 60.0
    drain: float = 25.0

    def __post_init__(self) -> None:
        found: dict[str, Any] = {}
        for name, least in (("body_bytes", 1024), ("prompts", 1), ("choices", 1), ("queue", 0)):
            found[name] = whole(getattr(self, name), f"limits.{name}", least=least)
        if self.new_tokens is not None:
            found["new_tokens"] = whole(self.new_tokens, "limits.new_tokens", least=1)
        for name in ("deadline", "read_timeout", "write_timeout", "drain"):
            expected = "a number of seconds above 0"
            found[name] = number(getattr(self, name), f"limits.{name}", expected)
            if not 0.0 < found[name] < math.inf:
                raise UserError(f"limits.{name} is {found[name]}, but must be {expected}")
        _set(self, **found)


@dataclass(frozen=True, kw_only=True)
class ReplicasConfig:
    """Copies of the server on Ray Serve. ``number``: how many (0: this process alone, without Ray). ``most``: up to how
    many they may become under load (None: ``number``). ``ongoing``: requests that one has at a time; others wait, as
    many as ``limits.queue`` (None: ``engine.max_sequences``). ``target``: requests in progress per replica, waiting
    ones with them, that scaling aims at (None: half of ``ongoing``). ``cpus`` and ``gpus``: what one reserves; its
    threads are as many as its ``cpus`` unless ``engine.threads`` says otherwise (``gpus`` None: 1 where
    ``model.device`` is not cpu). ``fronts``: processes that take requests and hand them out."""

    number: int = 0
    most: int | None = None
    ongoing: int | None = None
    target: float | None = None
    cpus: float = 1.0
    gpus: float | None = None
    fronts: int = 1

    def __post_init__(self) -> None:
        found: dict[str, Any] = {"number": whole(self.number, "replicas.number", least=0)}
        found["fronts"] = whole(self.fronts, "replicas.fronts", least=1)
        if self.most is not None:
            found["most"] = whole(self.most, "replicas.most", least=1)
            if found["most"] < found["number"]:
                raise UserError(
                    f"replicas.most is {found['most']}, but must be at least replicas.number, {self.number}"
                )
        if self.ongoing is not None:
            found["ongoing"] = whole(self.ongoing, "replicas.ongoing", least=1)
        for name, zero in (("target", False), ("cpus", True), ("gpus", True)):
            if (value := getattr(self, name)) is not None:
                expected = f"a number {'from' if zero else 'above'} 0"
                found[name] = number(value, f"replicas.{name}", expected)
                if not 0.0 <= found[name] < math.inf or (found[name] == 0.0 and not zero):
                    raise UserError(f"replicas.{name} is {found[name]}, but must be {expected}")
        _set(self, **found)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The settings of a server. ``defaults``: settings of a generation where a request names none, fields of
    :class:`~exitlm.decode.generation.GenerationConfig`."""

    model: ModelConfig
    http: HttpConfig = field(default_factory=HttpConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [f.name for f in dataclasses.fields(GenerationConfig) if f.name not in NOT_DEFAULTS]
        for name in self.defaults:
            if name not in known:
                raise UserError(f"section [defaults] has no setting '{name}'{nearest(name, known)}")
        GenerationConfig.of(self.defaults)

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> ServeConfig:
        """From sections of settings, as a TOML file has them.

        Raises:
            UserError: an unknown section or key (with the nearest known one), or a value that is none.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name, section in tree.items():
            if name not in known:
                raise UserError(f"the server has no section [{name}]{nearest(name, known)}")
            if not isinstance(section, Mapping):
                raise wrong(name, section, f"a section of settings, [{name}]")
        return cls(
            model=settings_of(ModelConfig, tree.get("model", {}), "section [model]"),
            http=settings_of(HttpConfig, tree.get("http", {}), "section [http]"),
            limits=settings_of(LimitsConfig, tree.get("limits", {}), "section [limits]"),
            engine=EngineConfig.of(tree.get("engine", {})),
            replicas=settings_of(ReplicasConfig, tree.get("replicas", {}), "section [replicas]"),
            defaults=dict(tree.get("defaults", {})),
        )


def read_tree(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The sections of a TOML file. Raises :class:`UserError` where it can't be read."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a TOML file: {error}") from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error


def merged(*trees: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sections of settings over one another: what comes later counts."""
    found: dict[str, dict[str, Any]] = {}
    for tree in trees:
        for name, section in tree.items():
            if not isinstance(section, Mapping):
                raise wrong(name, section, f"a section of settings, [{name}]")
            found[name] = {**found.get(name, {}), **section}
    return found


def _keys_of_file(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = Path(path_of(path, "http.api_key_file")).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"the file of API keys {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the file of API keys {path} is not text in UTF-8; write one key a line") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UserError(f"the file of API keys {path} holds none; write one a line")
    return keys


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name or ":" in name or not name.isprintable():
        raise UserError(f"model.name is {name!r}, but must be a word without ':', which separates an adapter's name")
    return name


def _set(settings: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(settings, name, value)
