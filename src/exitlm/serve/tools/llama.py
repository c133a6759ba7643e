"""Calls as Llama 3.1 to 3.3 write them: ``{"name": ..., "parameters": {...}}``, several with ``;`` between.

The tag ``<|python_tag|>`` may come first. Without it, an answer that is JSON looks like a call; only one of a tool that
the request offers counts.
"""

from __future__ import annotations

from collections.abc import Callable

from exitlm.serve.tools.call_text import CallObject
from exitlm.serve.tools.json_value import BLANKS, end_of
from exitlm.serve.tools.parser import Parser


class LlamaParser(Parser):
    """Reads calls at the start of an answer, behind a tag, and behind other calls."""

    opener = "<|python_tag|>"
    markers = (opener,)

    def _first_state(self) -> Callable[[], bool]:
        return self._start

    def _layout_states(self) -> tuple[Callable[[], bool], ...]:
        return (*super()._layout_states(), self._separated)

    def _opened(self) -> bool:
        return self._object_next()

    def _start(self) -> bool:
        """At the start of the answer."""
        begin = end_of(BLANKS, self._text, self._at)
        if begin == len(self._text):
            return False
        self._state = self._untagged if self._text[begin] == "{" else self._in_text
        return True

    def _untagged(self) -> bool:
        """Where a call may come without a tag."""
        if not self._hold_blanks():
            return False
        if self._text[self._at] == "{":
            self._begin(CallObject(self._names))
        else:
            self._fall_back()
        return True

    def _separated(self) -> bool:
        """Behind a semicolon that follows a call."""
        return self._untagged()

    def _after(self) -> bool:
        if not self._skip_blanks():
            return False
        if self._text[self._at] == ";" and self._may_call:
            self._hold(self._at + 1)
            self._state = self._separated
        elif self._text[self._at] == "{" and self._may_call:
            self._state = self._untagged
        else:
            self._state = self._in_text
        return True
