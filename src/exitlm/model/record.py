"""What tuning leaves in an exit: how well it does on held-out text, and what decoding needs to know of it.

Plain data, in memory and as JSON. This file knows nothing of how the figures are measured or of files; it does not
decide which exits are tested either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from exitlm.errors import UserError
from exitlm.values import elements, flag, number, whole, wrong


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Coverage and precision of an exit at several thresholds: at ``scores[i]`` the exit fires for a share
    ``coverage[i]`` of the held-out tokens and is right for ``precision[i]`` of those. All values lie in 0..1.

    ``extra`` holds the keys of a file that this version does not know.

    Raises:
        UserError: a line is empty or of another length, or a value is not a share.
    """

    scores: tuple[float, ...]
    coverage: tuple[float, ...]
    precision: tuple[float, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("scores", "coverage", "precision"):
            name_of = f"calibration.{name}"
            values = elements(getattr(self, name), name_of, "a list of shares from 0 to 1")
            if not values:
                raise UserError(f"{name_of} is empty; give one value for each score")
            object.__setattr__(self, name, tuple(_share(value, name_of) for value in values))
            if len(values) != len(self.scores):
                raise UserError(f"{name_of} has {len(values)} values for {len(self.scores)} scores; give one for each")
        _check_extra(self)

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """The inverse of :meth:`to_json`. Raises UserError for anything else."""
        if not isinstance(data, Mapping):
            raise wrong("calibration", data, "a table")
        missing = [name for name in ("scores", "coverage", "precision") if name not in data]
        if missing:
            raise UserError(f"calibration has no {missing[0]}; give scores, coverage and precision")
        return cls(**_by_field(cls, data))

    def to_json(self) -> dict[str, Any]:
        """What an adapter's table holds."""
        return {
            "scores": list(self.scores),
            "coverage": list(self.coverage),
            "precision": list(self.precision),
            **self.extra,
        }


@dataclass(frozen=True, kw_only=True)
class ExitRecord:
    """What tuning measured of one exit on held-out text; None where it was not measured.

    ``agreement``: share of tokens whose best id is the final head's; ``accuracy``: share whose best id is the next
    token of the text, where the final head was not run. ``loss`` is per token, in nats; ``tokens`` were measured.
    ``rule`` (``gate`` or ``probability``) gives the scores of which ``threshold`` is one; at it the exit fires for the
    share ``coverage`` of all tokens and is right for the share ``precision`` of those. ``tested``: whether mode
    ``threshold`` tests this exit by default; None: it does if the threshold is below 1. ``training`` describes the run.
    ``extra`` holds the keys of a file that this version does not know, so that they outlive loading and saving.

    Raises:
        UserError: a value has a wrong type, or threshold or coverage does not lie in 0..1.
    """

    agreement: float | None = None
    accuracy: float | None = None
    loss: float | None = None
    tokens: int | None = None
    rule: str | None = None
    threshold: float | None = None
    coverage: float | None = None
    precision: float | None = None
    calibration: Calibration | None = None
    tested: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, read in _READERS.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, read(value, name))
        if not isinstance(self.calibration, Calibration | None):
            raise wrong("calibration", self.calibration, "a Calibration")
        _check_extra(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExitRecord:
        """The inverse of :meth:`to_json`; a key that is absent is None, unknown keys go to ``extra``.

        Raises:
            UserError: a value has a wrong type or range. Null is one for ``rule``, ``threshold`` and ``coverage``.
        """
        for name in ("rule", "threshold", "coverage"):
            if name in data and data[name] is None:  # a number that was not finite: no guess may replace it
                raise wrong(name, None, "a text" if name == "rule" else _SHARE)
        values = _by_field(cls, data)
        if values.get("calibration") is not None:
            values["calibration"] = Calibration.from_json(values["calibration"])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """What an adapter's table holds: the fields that are known, in their order, with ``extra`` among them."""
        found: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "extra":
                found |= value
            elif value is not None:
                found[entry.name] = value.to_json() if isinstance(value, Calibration) else value
        return found


_SHARE = "a share from 0 to 1"


def _share(value: Any, name: str) -> float:
    found = number(value, name, _SHARE)
    if not 0.0 <= found <= 1.0:
        raise UserError(f"{name} is {found}, but must be {_SHARE}")
    return found


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    return value


def _table(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise wrong(name, value, "a table")
    return value


_READERS: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("agreement", "accuracy", "loss", "precision"), number),
    **dict.fromkeys(("threshold", "coverage"), _share),
    "tokens": whole,
    "rule": _text,
    "tested": flag,
    "training": _table,
}


def _by_field(kind: type[Calibration | ExitRecord], data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``kind`` for a table of a file: its fields, and the rest as ``extra``."""
    names = {entry.name for entry in fields(kind)} - {"extra"}
    known = {key: value for key, value in data.items() if key in names}
    return {**known, "extra": {key: value for key, value in data.items() if key not in names}}


def _check_extra(entry: Calibration | ExitRecord) -> None:
    known = {one.name for one in fields(entry)} & set(_table(entry.extra, "extra"))
    if known:
        raise UserError(f"extra holds '{min(known)}', which is a field of its own; give it there")
