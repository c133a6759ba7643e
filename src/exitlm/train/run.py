"""The run file: one tree of frozen settings, read from TOML, changed by ``a.b=c`` overrides, saved with the run.

Every section is a dataclass and every field a key of the TOML file. An unknown key, section or choice is an error that
names the nearest known one. Nothing here reads data or weights: what depends on the model (the default exits, ``auto``)
is resolved by :mod:`exitlm.train.tune` and :mod:`exitlm.train.full`.
"""

from __future__ import annotations

import contextlib
import json
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from exitlm.errors import UserError, nearest, short
from exitlm.train.sections import (
    CheckpointSection,
    DataSection,
    ExitsSection,
    LoggingSection,
    ModelSection,
    ObjectiveSection,
    ParallelSection,
    TrainSection,
)
from exitlm.values import number, path_of, unboxed

# What a key must at least be, and the keys that hold finite numbers from 0 on.
_LEAST = {
    "train.steps": 1,
    "train.global_batch": 1,
    "train.microbatch": 1,
    "train.warmup": 0,
    "train.validate_every": 0,
    "train.seed": 0,
    "data.seq_len": 2,
    "data.validation_sequences": 1,
    "data.self_batch": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "logging.every": 1,
    "objective.warmup_steps": 0,
    "objective.candidate_tokens": 2,
    "objective.rotate_exits": 0,
    "train.patience": 1,
    "parallel.data": 1,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.stages_per_rank": 0,
}
# What it must at most be: more is a mistake (of tokens for sequences, say), and would take for ever or all memory.
_MOST = {
    "data.seq_len": 1 << 24,
    "train.global_batch": 1 << 24,
    "train.microbatch": 1 << 20,
    "train.steps": 1 << 32,
    "parallel.timeout": 1e7,
    "train.lr": 1e30,
    "objective.distill_temperature": 1e6,
}
_NUMBERS = (
    "train.lr",
    "train.min_lr",
    "train.weight_decay",
    "train.clip",
    "train.hidden_cache_gib",
    "objective.gate",
    "objective.weight",
    "objective.weight_init",
    "data.self_temperature",
    "data.weights",
    "model.init_std",
    "objective.final",
    "train.eps",
    "train.spike",
)
_POSITIVE = (
    "objective.distill_temperature",
    "objective.temperature",
    "parallel.backward_forward_ratio",
    "parallel.timeout",
    "model.rope_theta",
    "model.rms_norm_eps",
)
_SHARES = ("objective.distill", "objective.candidate_share", "objective.layer_dropout")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of one run."""

    model: ModelSection = field(default_factory=ModelSection)
    exits: ExitsSection = field(default_factory=ExitsSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], defaults: RunConfig | None = None) -> RunConfig:
        """Build from a nested mapping; raises :class:`UserError` for unknown keys and wrong types. What the tree leaves
        out is as in ``defaults`` (None: those of the sections)."""
        config: RunConfig = _build(defaults or cls(), tree, "")
        return config

    @classmethod
    def from_toml(cls, path: str | Path, defaults: RunConfig | None = None) -> RunConfig:
        """Read a run file."""
        path = path_of(path, "the run file")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"the run file {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"the run file {path} is not UTF-8 text") from error
        return cls.from_text(text, str(path), defaults)

    @classmethod
    def from_text(cls, text: str, name: str = "run file", defaults: RunConfig | None = None) -> RunConfig:
        """Read the text of a run file; ``name`` is what errors call it."""
        try:
            tree = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # beside those of TOML: a number of more than 4,300 digits
            raise UserError(f"{name} is not valid TOML: {error}") from error
        return cls.from_dict(tree, defaults)

    def typed(self) -> RunConfig:
        """The same settings with every value of the type that its key asks for, which one made in Python may not be."""
        tree = asdict(self)
        for name, values in tree.items():
            if isinstance(values, dict):
                tree[name] = {_key(key): value for key, value in values.items()}
        return type(self).from_dict(tree)

    def with_overrides(self, overrides: Sequence[str]) -> RunConfig:
        """Apply ``section.key=value`` strings in order; values are TOML, or plain strings where that fails."""
        config = self
        for override in overrides:
            key, equals, text = override.partition("=")
            section, dot, name = key.strip().partition(".")
            if not equals or not dot:
                raise UserError(f"'{override}' is no override; write section.key=value, such as train.steps=100")
            old = getattr(config, _section(section))
            config = replace(config, **{section: _build(old, {name: _parse_value(text.strip())}, section)})
        return config

    def flat(self) -> dict[str, Any]:
        """``{"section.key": value}`` of every setting, tuples as lists."""
        out: dict[str, Any] = {}
        for section in fields(self):
            values = getattr(self, section.name)
            for f in fields(values):
                value = getattr(values, f.name)
                out[f"{section.name}.{_key(f.name)}"] = list(value) if isinstance(value, tuple) else value
        return out

    def to_toml(self) -> str:
        """The whole tree as TOML; :meth:`from_text` gives the same tree back."""
        lines: list[str] = []
        section = ""
        for key, value in self.flat().items():
            head, name = key.split(".")
            if head != section:
                lines += ([""] if lines else []) + [f"[{head}]"]
                section = head
            lines.append(f"{name} = {_toml_value(value)}")
        return "\n".join(lines) + "\n"

    def check(self) -> None:
        """Refuse values that can't work, each with one sentence that names the key."""
        t, d, o, e = self.train, self.data, self.objective, self.exits
        flat = self.flat()
        for key, least in _LEAST.items():
            if flat[key] < least:
                raise UserError(f"{key} is {flat[key]}, but must be at least {least}")
        for key, most in _MOST.items():
            if flat[key] > most:
                raise UserError(f"{key} is {flat[key]}, but must be at most {most:.15g}")
        for key in ("parallel.fill_warmup", "parallel.fill_cooldown"):
            if flat[key] != "auto" and flat[key] < 0:
                raise UserError(f"{key} is {flat[key]}, but must be at least 0, or 'auto'")
        for key in _NUMBERS:
            for value in _as_tuple(flat[key]):
                if not math.isfinite(value) or value < 0:
                    raise UserError(f"{key} is {value}, but must be a finite number that is not negative")
        for key in _SHARES:
            if not 0.0 <= flat[key] <= 1.0:
                raise UserError(f"{key} is {flat[key]}, but must be in [0, 1]")
        for key in _POSITIVE:
            if not (math.isfinite(flat[key]) and flat[key] > 0):
                raise UserError(f"{key} is {flat[key]}, but must be a positive number")
        if not all(0.0 <= beta < 1.0 for beta in t.betas):
            raise UserError(f"train.betas is {list(t.betas)}, but both must be in [0, 1)")
        if t.global_batch % t.microbatch and t.microbatch < t.global_batch:
            less = t.global_batch - t.global_batch % t.microbatch
            raise UserError(
                f"train.global_batch ({t.global_batch}) must be a multiple of train.microbatch ({t.microbatch}); use "
                f"{less} or {less + t.microbatch}"
            )
        if not d.files:
            raise UserError(
                "data.files is empty: name at least one file, or self:100000 for text the model writes itself"
            )
        if d.weights and len(d.weights) != len(d.files):
            raise UserError(f"data.weights has {len(d.weights)} values for {len(d.files)} files; give one per file")
        if d.weights and not sum(d.weights) > 0:
            raise UserError("data.weights are all 0; give at least one file a positive weight")
        if e.layers:
            count = len(e.layers)
            sized = [(f"exits.{f.name}", getattr(e, f.name)) for f in fields(e) if f.name != "layers"]
            for key, many in [*sized, ("objective.weight", o.weight), ("objective.weight_init", o.weight_init)]:
                if isinstance(many, tuple) and len(many) != count:
                    raise UserError(f"{key} has {len(many)} values for {count} exits; give one value, or one per exit")


TRAINING = RunConfig(
    exits=ExitsSection(kind="norm", candidates=0, branch=False),
    objective=ObjectiveSection(weight=0.25, weight_init=0.0, distill=0.0, gate=0.0, candidate_loss=False),
    data=DataSection(files=()),
    train=TrainSection(
        parameters="all",
        steps=200,
        global_batch=32,
        microbatch=2,
        lr=3e-4,
        min_lr=3e-5,
        weight_decay=0.1,
        dtype="float32",
        validate_every=50,
    ),
    checkpoint=CheckpointSection(dir="runs/train", every=50, keep=3),
)
"""The defaults of ``exitlm train``: all parameters, exits of kind norm, the loss of EE-LLM."""


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What differs between two runs in one directory, as ``key: old -> new``. What never changes a result (but for the
    order of sums) may differ: logging, retention, the layout of processes, how exits are run. Whether the base is the
    same is seen by its digest."""
    free = {
        "model.base",
        "model.device",
        "objective.exit_forward",
        "train.recompute",
        "train.compile",
        "train.spike",
        "train.patience",
        "train.microbatch",
        "checkpoint.async",
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.dir",
        "train.hidden_cache",
        "train.hidden_cache_gib",
    }
    before, after = old.flat(), new.flat()
    return [
        f"{key}: {_toml_value(before[key])} -> {_toml_value(value)}"
        for key, value in after.items()
        if before[key] != value and key not in free and not key.startswith(("logging.", "parallel."))
    ]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _section(name: str) -> str:
    known = {f.name for f in fields(RunConfig)}
    if name not in known:
        raise UserError(f"unknown section '{name}' in the run's settings{nearest(name, known)}")
    return name


def _key(name: str) -> str:
    """The key in a run file for a field: ``async_`` stands for a word that Python keeps to itself."""
    return name.removesuffix("_")


def _build(base: Any, tree: Mapping[str, Any], where: str) -> Any:
    """``base`` with the values of ``tree``."""
    hints = get_type_hints(type(base))
    known = {_key(f.name): f.name for f in fields(base)}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            what = "key" if where else "section"
            raise UserError(f"unknown {what} '{path}' in the run's settings{nearest(str(key), known)}")
        name = known[key]
        if is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise UserError(f"'{path}' is a section; write [{path}] and its keys below")
            values[name] = _build(getattr(base, name), value, path)
        else:
            values[name] = _coerce(value, hints[name], path)
    return replace(base, **values)


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """``value`` as the type ``hint`` asks for, or a :class:`UserError` that says what is expected."""
    value = unboxed(value)
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{key} is {value!r}, but must be UTF-8 text, as the run file is") from None
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        listed = isinstance(value, (list, tuple))
        fitting = [option for option in options if (get_origin(option) is tuple) == listed]
        if len(fitting) == 1:
            return _coerce(value, fitting[0], key)
        for option in fitting:
            with contextlib.suppress(UserError):
                return _coerce(value, option, key)
        raise UserError(f"{key} is {_toml_value(value)}, but must be {_describe(hint)}")
    if origin is tuple:
        element = get_args(hint)
        if isinstance(value, (str, int, float)) and element[-1] is Ellipsis:
            value = [value]
        if not isinstance(value, (list, tuple)) or (element[-1] is not Ellipsis and len(value) != len(element)):
            raise UserError(f"{key} is {_toml_value(value)}, but must be {_describe(hint)}")
        kinds = element[:1] * len(value) if element[-1] is Ellipsis else element
        return tuple(_coerce(v, kind, key) for v, kind in zip(value, kinds, strict=True))
    if origin is Literal:
        if value not in get_args(hint):
            raise UserError(
                f"{key} is {_toml_value(value)}, but must be {_describe(hint)}{nearest(str(value), get_args(hint))}"
            )
        return value
    if isinstance(value, int) and value.bit_length() > 63:
        raise UserError(f"{key} is {short(value)}, but a whole number must fit into 64 bits")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return number(value, key)
    if type(value) is not hint:
        raise UserError(f"{key} is {_toml_value(value)}, but must be {_describe(hint)}")
    return value


def _describe(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(a) for a in get_args(hint))
    if get_origin(hint) is tuple:
        element = get_args(hint)
        count = "" if element[-1] is Ellipsis else f"{len(element)} of "
        return f"a list, {count}each {_describe(element[0])}"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in get_args(hint))
    return names.get(hint, str(hint))


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        if "," in text and not text.startswith(("[", '"', "'")):
            return [_parse_value(part.strip()) for part in text.split(",") if part.strip()]
        return text


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
