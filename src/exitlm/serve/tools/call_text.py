"""The text of one call: its name, and its arguments as they arrive.

Two forms: a JSON object that holds both (:class:`CallObject`), and arguments whose name came before
(:class:`BareArguments`). Neither knows what stands around a call.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto

from exitlm.serve.tools.json_value import BLANKS, JsonValue, Status, end_of

ARGUMENTS = ("arguments", "parameters")


class CallText:
    """A call that is being read. ``status`` is OPEN until its last character was fed, or one that can't be in it.

    ``started``: the name is known and the arguments have begun, so it is a call, whatever follows. ``raw``: what was
    read and is neither name nor arguments of a started call; it is text if the call breaks.
    """

    def __init__(self, name: str = "") -> None:
        self.status = Status.OPEN
        self.name = name
        self.started = False
        self.raw = ""
        self._arguments = ""

    def feed(self, text: str, at: int) -> int:
        """Read ``text`` from ``at``; the position behind the last character that belongs to the call."""
        raise NotImplementedError

    def take(self) -> str:
        """The arguments that have come since the last time; none before the call has started."""
        if not self.started:
            return ""
        taken, self._arguments = self._arguments, ""
        return taken

    def _start(self) -> None:
        self.started, self.raw = True, ""


class BareArguments(CallText):
    """``{ARGUMENTS}`` of a known name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._value = JsonValue()

    def feed(self, text: str, at: int) -> int:
        if not self.started:
            begin, at = at, end_of(BLANKS, text, at)
            self.raw += text[begin:at]
            if at == len(text):
                return at
            if text[at] != "{":
                self.status = Status.BROKEN
                return at
            self._start()
        begin, at = at, self._value.feed(text, at)
        self._arguments += text[begin:at]
        self.status = self._value.status
        return at


class _Place(Enum):
    """What comes next in the object, between its keys and values."""

    BRACE = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA = auto()


class CallObject(CallText):
    """``{"name": NAME, "arguments": {ARGUMENTS}}``, with its keys in any order.

    The arguments may be called parameters, or be missing: ``{}`` then. Other keys are read over.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        """``names``: those that a call may have; empty for any."""
        super().__init__()
        self._names = names
        self._place = _Place.BRACE
        self._key = ""
        self._value: JsonValue | None = None  # of a key or value that is being read
        self._read = ""  # of it
        self._seen = False  # the arguments have begun

    def feed(self, text: str, at: int) -> int:
        while at < len(text) and self.status is Status.OPEN:
            begin = at
            if self._value is None:
                at = end_of(BLANKS, text, at)
                self.raw += text[begin:at]
                if at < len(text) and self._structure(text[at]):
                    self.raw += text[at]
                    at += 1
            else:
                at = self._value.feed(text, at)
                self._keep(text[begin:at])
                if self._value.status is Status.BROKEN:
                    self.status = Status.BROKEN
                elif self._value.status is Status.DONE:
                    self._value_ended()
        if self.status is Status.DONE:
            self.raw = ""
        return at

    def _structure(self, char: str) -> bool:
        """Take a character between keys and values; False if it is not used up: it begins one, or breaks the call."""
        place = self._place
        if place is _Place.BRACE and char == "{":
            self._place = _Place.KEY
        elif place in (_Place.KEY, _Place.COMMA) and char == "}" and self.name:
            if not self._seen:
                self._start()
                self._arguments = "{}"
            self.status = Status.DONE
        elif place is _Place.COLON and char == ":":
            self._place = _Place.VALUE
        elif place is _Place.COMMA and char == ",":
            self._place = _Place.KEY
        elif place in (_Place.KEY, _Place.VALUE) and self._may_begin(char):
            self._value, self._read = JsonValue(), ""
            if place is _Place.VALUE and self._key in ARGUMENTS:
                self._seen = True
                if self.name:
                    self._start()
            return False
        else:
            self.status = Status.BROKEN
            return False
        return True

    def _may_begin(self, char: str) -> bool:
        """Whether a key, or the value of the key, may begin with ``char``."""
        if self._place is _Place.KEY or self._key == "name":
            return char == '"' and not (self._place is _Place.VALUE and self.name)
        return self._key not in ARGUMENTS or (char == "{" and not self._seen)

    def _keep(self, piece: str) -> None:
        """Keep a piece of the key or value that is being read."""
        if self._place is _Place.VALUE and self._key in ARGUMENTS:
            self._arguments += piece
            if self.started:
                return
        else:
            self._read += piece
        self.raw += piece

    def _value_ended(self) -> None:
        self._value = None
        if self._place is _Place.KEY:
            self._key, self._place = _string(self._read), _Place.COLON
            return
        self._place = _Place.COMMA
        if self._key == "name":
            self.name = _string(self._read)
            if not self.name or (self._names and self.name not in self._names):
                self.status = Status.BROKEN
            elif self._seen:
                self._start()


def _string(read: str) -> str:
    """What a JSON string says; nothing where it is none, or can't be written in UTF-8."""
    try:
        found = json.loads(read)
        found.encode()
    except ValueError:
        return ""
    return str(found)
