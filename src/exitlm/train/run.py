"""The run file: one tree of frozen settings, read from TOML, changed by ``a.b=c`` overrides, saved with the run.

Every section is a dataclass and every field a key of the TOML file. An unknown key, section or choice is an error that
names the nearest known one. Nothing here reads data or weights: what depends on the model (the default exits, ``auto``)
is resolved by :mod:`exitlm.train.tune`.
"""

from __future__ import annotations

import json
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from exitlm.errors import UserError, nearest

Kind = Literal["embed", "norm", "mlp", "block", "lens"]
Output = Literal["shared", "own", "exits", "low_rank"]
Init = Literal["auto", "copy", "random", "identity", "closed_form"]
Dtype = Literal["auto", "float64", "float32", "bfloat16"]


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
)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """What is tuned."""

    base: str = ""
    """Directory, hub id, .gguf file, or "smollm2" for the packaged model."""
    dtype: Dtype = "auto"
    """The dtype of the frozen backbone; auto is bfloat16 where the device computes in it natively (decoding then does
    too), else the checkpoint's."""
    device: str = "auto"
    """auto is cuda where there is one, else cpu."""


@dataclass(frozen=True, kw_only=True)
class ExitsSection:
    """Where the exits are and how their heads are built; ``kind``, ``output``, ``rank``, ``candidates``, ``init``,
    ``gate`` and ``branch`` take one value, or a list with one per exit."""

    layers: tuple[int, ...] = ()
    """1-based layers; empty: three, evenly placed."""
    kind: Kind | tuple[Kind, ...] = "lens"
    output: Output | tuple[Output, ...] = "shared"
    rank: int | tuple[int, ...] = 64
    candidates: int | tuple[int, ...] = -1
    """Restrict the head to this many token ids, the most frequent of the training data; 0: the whole vocabulary; -1:
    4096 where the vocabulary has more than 16384 tokens, else the whole one."""
    init: Init | tuple[Init, ...] = "auto"
    """auto: closed_form for a lens, copy for the others."""
    gate: bool | tuple[bool, ...] = False
    """A probe that predicts from the hidden state alone whether the exit agrees with the final head: cheaper to test
    than a head's largest probability, and less precise."""
    branch: bool | tuple[bool, ...] = True
    """An MLP that starts at zero beside the lens (ignored for the other kinds)."""

    def of(self, name: str, index: int) -> Any:
        """The value of setting ``name`` for the exit at ``index`` of ``layers``."""
        value = getattr(self, name)
        return value[index] if isinstance(value, tuple) else value


@dataclass(frozen=True, kw_only=True)
class ObjectiveSection:
    """The loss of each exit: ``weight * ((1 - distill) * CE + distill * KL(final || exit)) + gate * BCE``."""

    weight: float | tuple[float, ...] = 1.0
    weight_init: float | tuple[float, ...] = 1.0
    """The weight at step 0; it goes to ``weight`` over ``warmup_steps``."""
    warmup_steps: int = 0
    warmup: Literal["linear", "cosine"] = "linear"
    confidence_weighted: bool = False
    """Weight each token with the exit's own (detached) maximum probability."""
    distill: float = 1.0
    """0: cross-entropy with the text; 1: distillation from the final head alone, needs no labels."""
    distill_temperature: float = 1.0
    gate: float = 1.0
    """The weight of the gate's loss, for exits that have a gate."""
    candidate_loss: bool = True
    """Train on a sampled part of the vocabulary, and on the whole one only in the last part of the run: on a CPU
    several times as fast, and as good. Small vocabularies are always whole."""
    candidate_tokens: int = 3072
    """How many token ids are drawn per step, half of them frequent and half uniform, besides those the batch needs."""
    candidate_share: float = 0.7
    """The share of the steps that use the sampled vocabulary."""


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """What is read, or written by the model itself."""

    files: tuple[str, ...] = ("self:100000",)
    """Text, JSONL, Parquet, Hugging Face dataset directories, globs; or "self:N": N tokens that the model writes."""
    validation_files: tuple[str, ...] = ()
    """Empty: part of ``files`` is held out, or held-out prompts are answered greedily."""
    validation_sequences: int = 32
    """How many sequences are held out (or held-out prompts answered), and the most that a validation reads."""
    tokenizer: str = ""
    """Empty: the base's own; "bytes"; or a directory with a tokenizer."""
    seq_len: int = 256
    prompts: str = ""
    """Prompts for self text, a text file with one per line or JSONL with "prompt"; empty: the packaged ones."""
    self_temperature: float = 0.9
    self_batch: int = 64
    """How many prompts are answered at once."""
    self_dtype: Dtype = "auto"
    """auto: bfloat16 where the device computes in it natively, else the backbone's."""


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The optimizer and its schedule; ``global_batch`` and ``microbatch`` count sequences."""

    steps: int = 500
    global_batch: int = 8
    microbatch: int = 8
    lr: float = 2e-3
    min_lr: float = 2e-5
    warmup: int = 20
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """The largest gradient norm of one exit; 0 clips nothing."""
    seed: int = 0
    dtype: Dtype = "auto"
    """What the heads compute in; parameters and optimizer keep at least float32. auto: bfloat16 where native."""
    validate_every: int = 100
    """0: only after the last step."""
    hidden_cache: Literal["memory", "disk", "none"] = "memory"
    """Where the frozen backbone's hidden states are kept once computed; the result does not depend on it."""
    hidden_cache_gib: float = 4.0
    """The most that the cache may hold; what does not fit is computed again."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """Where the run lives, and how often it is saved."""

    dir: str = ""
    every: int = 100
    """Steps between checkpoints; 0: only at the start and the end, and when the run is interrupted."""
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class LoggingSection:
    """``metrics.jsonl`` is always written; trackers are extras."""

    every: int = 1
    tensorboard: bool = False
    wandb: str = ""
    """A project's name; empty: off."""
    trackio: str = ""
    """A project's name; empty: off."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of one run."""

    model: ModelSection = field(default_factory=ModelSection)
    exits: ExitsSection = field(default_factory=ExitsSection)
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> RunConfig:
        """Build from a nested mapping; raises :class:`UserError` for unknown keys and wrong types."""
        config: RunConfig = _build(cls, tree, "")
        return config

    @classmethod
    def from_toml(cls, path: str | Path) -> RunConfig:
        """Read a run file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"the run file {path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"the run file {path} is not UTF-8 text") from error
        return cls.from_text(text, str(path))

    @classmethod
    def from_text(cls, text: str, name: str = "run file") -> RunConfig:
        """Read the text of a run file; ``name`` is what errors call it."""
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{name} is not valid TOML: {error}") from error
        return cls.from_dict(tree)

    def with_overrides(self, overrides: Sequence[str]) -> RunConfig:
        """Apply ``section.key=value`` strings in order; values are TOML, or plain strings where that fails."""
        config = self
        for override in overrides:
            key, equals, text = override.partition("=")
            section, dot, name = key.strip().partition(".")
            if not equals or not dot:
                raise UserError(f"'{override}' is no override; write section.key=value, such as train.steps=100")
            patch = _build(_section_type(section), {name: _parse_value(text.strip())}, section, only={name})
            old = getattr(config, section)
            config = replace(config, **{section: replace(old, **{name: getattr(patch, name)})})
        return config

    def flat(self) -> dict[str, Any]:
        """``{"section.key": value}`` of every setting, tuples as lists."""
        out: dict[str, Any] = {}
        for section in fields(self):
            values = getattr(self, section.name)
            for f in fields(values):
                value = getattr(values, f.name)
                out[f"{section.name}.{f.name}"] = list(value) if isinstance(value, tuple) else value
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
        for key in _NUMBERS:
            for number in _as_tuple(flat[key]):
                if not math.isfinite(number) or number < 0:
                    raise UserError(f"{key} is {number}, but must be a finite number that is not negative")
        for key, number in (("objective.distill", o.distill), ("objective.candidate_share", o.candidate_share)):
            if not 0.0 <= number <= 1.0:
                raise UserError(f"{key} is {number}, but must be in [0, 1]")
        if not (math.isfinite(o.distill_temperature) and o.distill_temperature > 0):
            raise UserError(f"objective.distill_temperature is {o.distill_temperature}, but must be a positive number")
        if not all(0.0 <= beta < 1.0 for beta in t.betas):
            raise UserError(f"train.betas is {list(t.betas)}, but both must be in [0, 1)")
        if t.global_batch % t.microbatch and t.microbatch < t.global_batch:
            raise UserError(
                f"train.global_batch ({t.global_batch}) must be a multiple of train.microbatch ({t.microbatch})"
            )
        if not d.files:
            raise UserError(
                "data.files is empty: name at least one file, or self:100000 for text the model writes itself"
            )
        if e.layers:
            count = len(e.layers)
            sized = [(f"exits.{f.name}", getattr(e, f.name)) for f in fields(e) if f.name != "layers"]
            for key, many in [*sized, ("objective.weight", o.weight), ("objective.weight_init", o.weight_init)]:
                if isinstance(many, tuple) and len(many) != count:
                    raise UserError(f"{key} has {len(many)} values for {count} exits; give one value, or one per exit")


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What differs between two runs in one directory, as ``key: old -> new``; logging, retention and the place of the
    cache never change a result and may differ, and whether the base is the same is seen by its digest."""
    free = {
        "model.base",
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
        if before[key] != value and key not in free and not key.startswith("logging.")
    ]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _section_type(name: str) -> Any:
    hints = get_type_hints(RunConfig)
    if name not in hints:
        raise UserError(f"unknown section '{name}' in the run's settings{nearest(name, hints)}")
    return hints[name]


def _build(kind: Any, tree: Mapping[str, Any], where: str, only: set[str] | None = None) -> Any:
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{where}.{name}" if where else name
        if name not in known:
            what = "key" if where else "section"
            raise UserError(f"unknown {what} '{key}' in the run's settings{nearest(name, known)}")
        if is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise UserError(f"'{key}' is a section; write [{key}] and its keys below")
            values[name] = _build(hints[name], value, key)
        else:
            values[name] = _coerce(value, hints[name], key)
    return kind(**values)


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """``value`` as the type ``hint`` asks for, or a :class:`UserError` that says what is expected."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        listed = isinstance(value, (list, tuple))
        for option in options:
            if (get_origin(option) is tuple) == listed:
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
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
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
    except tomllib.TOMLDecodeError:
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
