"""KEY=VALUE words of the command line as names and values; what the names mean is checked where they are used.

A value is JSON (``["a", "b"]``, ``{"8": 0.9}``, ``null``), TOML (``nan``, ``1_000``, ``'text'``), a number as C writes
it (``.5``), numbers with commas between them (``8,15``), or else the text itself. Run files have a reader of their own
(:mod:`exitlm.train.run`), which knows the type that each key asks for.
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from exitlm.errors import UserError

_NUMBER = re.compile(r"[+-]?(\d{1,300}\.?\d{0,300}|\.\d{1,300})([eE][+-]?\d{1,3})?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d{1,300}", re.ASCII)
_PYTHON = {"True": True, "False": False, "None": None}


def assignments(words: Sequence[str], sections: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings that ``words`` (KEY=VALUE) give, and those of each of the ``sections``: ``section.key=value``.

    A key that is given twice has its last value.

    Raises:
        UserError: a word without a key or an equals sign.
    """
    plain: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"'{word}' is not a setting; write KEY=VALUE, such as top_k=40")
        section, dot, name = key.partition(".")
        if dot and section in parts:
            parts[section][name] = value_of(text.strip())
        else:
            plain[key] = value_of(text.strip())
    return plain, parts


def given_settings(flags: Mapping[str, Any], words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a generation from its flags (None: not given) and from ``--set``, and those of the engine.

    Raises:
        UserError: a word that is no setting, exits that are no layers, or a setting that is given twice.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if "exits" in given:
        layers = value_of(given["exits"])
        given["exits"] = [layers] if isinstance(layers, int) else layers
        if not isinstance(given["exits"], list):
            raise UserError(f"--exits is '{layers}', but must be layers such as 8,15 (an adapter goes to --adapter)")
    settings, sections = assignments(words, ("engine",))
    for name in given:
        if name in settings:
            raise UserError(f"{name} is given twice, by --{name.replace('_', '-')} and by --set; leave one of them out")
    return {**given, **settings}, sections.get("engine", {})


def value_of(text: str) -> Any:
    """The value that a text stands for; the text itself where it stands for nothing else."""
    if text in _PYTHON:
        return _PYTHON[text]
    for read in (_json, _toml, _number, _numbers):
        try:
            return numbered(read(text))
        except (ValueError, RecursionError):  # beside those of the grammar: a number of more than 4,300 digits
            continue
    return text


def numbered(value: Any) -> Any:
    """A mapping whose keys are all whole numbers as texts, as in JSON, with numbers as keys; anything else as it is."""
    if isinstance(value, Mapping) and value and all(re.fullmatch(r"[0-9]{1,18}", str(key)) for key in value):
        return {int(key): item for key, item in value.items()}
    return value


def _json(text: str) -> Any:
    return json.loads(text)


def _toml(text: str) -> Any:
    tree = tomllib.loads(f"value = {text}")
    if len(tree) > 1 or not isinstance(tree["value"], bool | int | float | str | list | dict):
        raise ValueError  # several lines, or a date
    return tree["value"]


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError
    return float(text)


def _numbers(text: str) -> list[int | float]:
    parts = [part.strip() for part in text.split(",")]
    return [int(part) if _WHOLE.fullmatch(part) else _number(part) for part in parts]
