"""What a caller gives, as Python's own values: whole numbers, numbers, switches, words, paths.

A scalar of numpy or torch counts as the number it holds, and a bool is not a number. Anything else raises a
:class:`UserError` that names the argument, its value and type, and what it must be.
"""

import dataclasses
import operator
import os
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, TypeVar

from exitlm.errors import UserError, nearest, short

Settings = TypeVar("Settings")


def wrong(name: str, value: Any, expected: str) -> UserError:
    """The sentence for a value of another type than the ``expected`` one."""
    return UserError(f"{name} is {short(value)} ({type(value).__name__}), but must be {expected}")


def unboxed(value: Any) -> Any:
    """Numbers of numpy and torch as Python's own, arrays as lists; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def whole(value: Any, name: str, *, least: int | None = None) -> int:
    """A whole number, which must be ``least`` or more."""
    expected = "a whole number" if least is None else f"a whole number from {least}"
    found = unboxed(value)
    try:
        if isinstance(found, bool):
            raise TypeError
        number = operator.index(found)
    except TypeError:
        raise wrong(name, value, expected) from None
    if least is not None and number < least:
        raise UserError(f"{name} is {short(number)}, but must be {expected}")
    return number


def wholes(values: Any, name: str, expected: str = "a sequence of whole numbers") -> list[int]:
    """Whole numbers in a list, an array or anything else that holds some."""
    try:
        return [whole(value, name) for value in elements(values, name, expected)]
    except UserError:
        raise wrong(name, values, expected) from None


def elements(values: Any, name: str, expected: str) -> list[Any]:
    """What a collection holds; a text and a mapping are none."""
    found = unboxed(values)
    if isinstance(found, str | bytes | bytearray | Mapping) or not isinstance(found, Iterable):
        raise wrong(name, values, expected)
    return list(found)


def seed_of(value: Any, name: str = "seed") -> int:
    """A whole number that torch's generators take as a seed."""
    found = whole(value, name)
    if not -(2**63) <= found < 2**64:
        raise UserError(f"{name} is {short(found)}, but must be a whole number of at most 64 bits")
    return found


def number(value: Any, name: str, expected: str = "a number") -> float:
    """A real number as a float; it may be infinite or NaN."""
    found = unboxed(value)
    if isinstance(found, bool) or not isinstance(found, Real):
        raise wrong(name, value, expected)
    try:
        return float(found)
    except OverflowError:
        raise UserError(f"{name} is {short(value)}, but must be {expected} that a float can hold") from None


def flag(value: Any, name: str) -> bool:
    """True or False, and nothing that Python would take for one of them."""
    found = unboxed(value)
    if not isinstance(found, bool):
        raise wrong(name, value, "True or False")
    return found


def words(value: Any, name: str) -> tuple[str, ...]:
    """One text or several."""
    expected = "a text or a sequence of texts"
    found = [value] if isinstance(value, str) else elements(value, name, expected)
    if not all(isinstance(word, str) for word in found):
        raise wrong(name, value, expected)
    return tuple(found)


def path_of(value: Any, name: str, expected: str = "a path (a text or a pathlib.Path)") -> str:
    """A path that the operating system can be asked for."""
    try:
        found = os.fspath(value)
        usable = bool(found) and b"\0" not in os.fsencode(found)
    except (TypeError, UnicodeEncodeError):
        found, usable = None, False
    if not usable or not isinstance(found, str):
        raise wrong(name, value, expected)
    return found


def paths_of(value: Any, name: str) -> list[str]:
    """One path or several."""
    if isinstance(value, str | os.PathLike):
        return [path_of(value, name)]
    return [path_of(one, name) for one in elements(value, name, "a path or a sequence of paths")]


def settings_of(kind: type[Settings], options: Mapping[str, Any], owner: str) -> Settings:
    """Settings of a dataclass from a mapping; an unknown name is refused with the nearest known one. ``owner`` is what
    the message says they belong to."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise UserError(f"{owner} has no setting '{name}'{nearest(name, known)}")
    return kind(**options)
