"""Where one JSON value ends, in a text that arrives in pieces.

This finds the end and nothing more: numbers and words may be any, a comma may be the last of an object, and strings may
hold raw line breaks. What can't be inside of JSON at all (a mark of markup, a bracket that closes another kind) ends
the value as broken.
"""

from __future__ import annotations

import re
from enum import Enum, auto

BLANKS = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\]*')
_SCALAR = re.compile(r"[A-Za-z0-9+.\-_]*")
_OPENERS = {"{": "}", "[": "]"}


class Status(Enum):
    """How far a value has come."""

    OPEN = auto()
    DONE = auto()
    BROKEN = auto()


class _Place(Enum):
    """What comes next, outside or inside of a string or scalar."""

    VALUE = auto()
    KEY = auto()
    COLON = auto()
    COMMA = auto()
    SCALAR = auto()
    STRING = auto()
    ESCAPED = auto()


class JsonValue:
    """Scans one value. ``status`` is OPEN until its last character was fed, or one that can't be in it."""

    def __init__(self) -> None:
        self.status = Status.OPEN
        self._place = _Place.VALUE
        self._closers: list[str] = []  # what closes each container that is open
        self._key = False  # the string that is open is a key

    def feed(self, text: str, at: int) -> int:
        """Scan ``text`` from ``at``; the position behind the last character that belongs to the value."""
        while at < len(text) and self.status is Status.OPEN:
            match self._place:
                case _Place.STRING:
                    at = end_of(_PLAIN, text, at)
                    if at < len(text):
                        if text[at] == '"':
                            self._string_ended()
                        else:
                            self._place = _Place.ESCAPED
                        at += 1
                case _Place.ESCAPED:
                    self._place = _Place.STRING
                    at += 1
                case _Place.SCALAR:
                    at = end_of(_SCALAR, text, at)
                    if at < len(text):
                        self._value_ended()
                case _:
                    at = end_of(BLANKS, text, at)
                    if at < len(text):
                        at += self._structure(text[at])
        return at

    def _structure(self, char: str) -> int:
        """Take a character outside of strings and scalars; 1 if it belongs to the value and is used up, else 0."""
        if self._closers and char == self._closers[-1] and self._place is not _Place.COLON:
            self._closers.pop()
            self._value_ended()
            return 1
        if self._place is _Place.VALUE and char in _OPENERS:
            self._closers.append(_OPENERS[char])
            self._place = _Place.KEY if char == "{" else _Place.VALUE
        elif char == '"' and self._place in (_Place.VALUE, _Place.KEY):
            self._key = self._place is _Place.KEY
            self._place = _Place.STRING
        elif char == ":" and self._place is _Place.COLON:
            self._place = _Place.VALUE
        elif char == "," and self._place is _Place.COMMA:
            self._place = _Place.KEY if self._closers[-1] == "}" else _Place.VALUE
        elif self._place is _Place.VALUE and end_of(_SCALAR, char, 0):
            self._place = _Place.SCALAR
        else:
            self.status = Status.BROKEN
            return 0
        return 1

    def _string_ended(self) -> None:
        if self._key:
            self._key = False
            self._place = _Place.COLON
        else:
            self._value_ended()

    def _value_ended(self) -> None:
        if self._closers:
            self._place = _Place.COMMA
        else:
            self.status = Status.DONE


def end_of(pattern: re.Pattern[str], text: str, at: int) -> int:
    """The end of what ``pattern``, which matches everywhere, matches from ``at`` on."""
    found = pattern.match(text, at)
    assert found is not None
    return found.end()
