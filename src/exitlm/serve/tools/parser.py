"""From the text of an answer, in pieces of any size, to deltas: the machine that all formats share.

What it gives depends on the text alone and never on where it was cut. Arguments are passed on as they arrive. A call
counts once its name is known and its arguments have begun; what looked like one until then, and is none, is text. What
follows where a call breaks after that is text too, so all that a model writes arrives, but for the layout of calls:
their markers, and the blanks around them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import ClassVar

from exitlm.serve.tools.call_text import CallObject, CallText
from exitlm.serve.tools.deltas import Delta, Text, ToolArguments, ToolStart, merge
from exitlm.serve.tools.json_value import BLANKS, Status, end_of

_BLANKS = " \t\r\n"


class Parser(ABC):
    """Reads one answer: :meth:`feed` its text, then :meth:`finish` once.

    ``finished`` is set when a call has ended and ``parallel`` was False: nothing that follows is read, so the
    generation may end.
    """

    opener: ClassVar[str]  # what begins calls within text
    closer: ClassVar[str] = ""  # what ends them
    markers: ClassVar[tuple[str, ...]]  # those that a tokenizer may hold as special tokens

    def __init__(self, new_id: Callable[[], str], *, names: Collection[str] = (), parallel: bool = True) -> None:
        """See :meth:`exitlm.serve.tools.formats.Format.parser`."""
        self.finished = False
        self._new_id, self._names, self._parallel = new_id, frozenset(names), parallel
        self._text, self._at = "", 0  # what was fed, and how much of it is read
        self._held = ""  # what was read and is text, unless a call starts
        self._call: CallText | None = None
        self._list = False  # within the brackets of a list of calls
        self._count = 0  # of calls that have started
        self._deltas: list[Delta] = []
        self._ended = False
        # A state reads on from where the text stands, and says whether it got on: if not, it needs more text.
        self._state: Callable[[], bool] = self._first_state()

    def feed(self, text: str) -> list[Delta]:
        """What is certain with ``text``; often nothing."""
        assert not self._ended
        if self.finished:
            return []
        self._text, self._at = self._text[self._at :] + text, 0
        while not self.finished and self._state():
            pass
        return self._taken()

    def finish(self) -> list[Delta]:
        """The rest, at the end of the answer."""
        rest = self.feed("")
        self._ended = True
        if not self.finished and self._state not in self._layout_states():
            call = self._call
            raw = "" if call is None or (call.started and not call.raw.strip(_BLANKS)) else call.raw
            self._say(self._held + raw + self._text[self._at :])
        return merge([*rest, *self._taken()])

    def _taken(self) -> list[Delta]:
        taken, self._deltas = merge(self._deltas), []
        return taken

    # ---- what formats say

    def _first_state(self) -> Callable[[], bool]:
        return self._in_text

    def _layout_states(self) -> tuple[Callable[[], bool], ...]:
        """The states in which what remains at the end belongs to calls that have ended."""
        return (self._closing, self._after)

    @abstractmethod
    def _opened(self) -> bool:
        """The state behind :attr:`opener`: begin a call with :meth:`_begin`, or :meth:`_fall_back`."""

    # ---- states

    def _in_text(self) -> bool:
        """Outside of calls. Blanks are kept back as long as a call may follow them."""
        found = self._text.find(self.opener, self._at) if self._may_call else -1
        end = len(self._text) - self._opener_begun() if found < 0 else found
        shown = self._at + len(self._text[self._at : end].rstrip(_BLANKS))
        self._say(self._text[self._at : shown])
        self._at = shown
        if found < 0:
            return False
        self._hold(found + len(self.opener))
        self._state = self._opened
        return True

    def _object_next(self) -> bool:
        """An object begins a call, or there is none."""
        if not self._hold_blanks():
            return False
        if self._text[self._at] == "{":
            self._begin(CallObject())
        else:
            self._fall_back()
        return True

    def _in_call(self) -> bool:
        call = self._call
        assert call is not None
        before = call.started
        self._at = call.feed(self._text, self._at)
        if call.started and not before:
            self._held = ""
            self._deltas.append(ToolStart(self._count, self._new_id(), call.name))
            self._count += 1
        if fragment := call.take():
            self._deltas.append(ToolArguments(self._count - 1, fragment))
        if call.status is Status.OPEN:
            return False
        self._call = None
        if call.status is Status.DONE:
            self.finished = not self._parallel
            self._state = self._closing
        elif call.started:
            self._text, self._at = call.raw + self._text[self._at :], 0
            self._state = self._closing
        else:
            self._held += call.raw
            self._fall_back()
        return True

    def _closing(self) -> bool:
        """Behind a call: the rest of a list, and the marker that ends calls."""
        if not self._skip_blanks():
            return False
        if self._list:
            char = self._text[self._at]
            self._list = char == ","
            if char == "," and self._may_call:
                self._hold(self._at + 1)
                self._state = self._object_next
            elif char == "]":
                self._at += 1
            else:
                self._list, self._state = False, self._in_text
            return True
        there = self._expect(self.closer, self._at)
        if there is None:
            return False
        if there:
            self._at += len(self.closer)
        self._state = self._after
        return True

    def _after(self) -> bool:
        """Behind calls and what ends them."""
        if not self._skip_blanks():
            return False
        self._state = self._in_text
        return True

    # ---- steps

    @property
    def _may_call(self) -> bool:
        return self._parallel or self._count == 0

    def _opener_begun(self) -> int:
        """The length of the longest end of the text that begins an opener."""
        if not self._may_call:
            return 0
        most = min(len(self.opener) - 1, len(self._text) - self._at)
        return next((n for n in range(most, 0, -1) if self._text.endswith(self.opener[:n])), 0)

    def _expect(self, marker: str, at: int) -> bool | None:
        """Whether ``marker`` comes at ``at``; None where the text is too short to say."""
        if self._text.startswith(marker, at):
            return True
        return None if marker.startswith(self._text[at:]) else False

    def _say(self, text: str) -> None:
        if text:
            self._deltas.append(Text(text))

    def _hold(self, end: int) -> None:
        """Read up to ``end``: text, unless a call starts."""
        self._held += self._text[self._at : end]
        self._at = end

    def _hold_blanks(self) -> bool:
        """Read blanks like :meth:`_hold`; whether there is more."""
        self._hold(end_of(BLANKS, self._text, self._at))
        return self._at < len(self._text)

    def _skip_blanks(self) -> bool:
        """Read blanks that belong to a call; whether there is more."""
        self._at = end_of(BLANKS, self._text, self._at)
        return self._at < len(self._text)

    def _begin(self, call: CallText) -> None:
        self._call, self._state = call, self._in_call

    def _fall_back(self) -> None:
        """What was held is text after all."""
        self._say(self._held)
        self._held, self._list, self._state = "", False, self._in_text
