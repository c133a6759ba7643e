"""Calls as Hermes and Qwen write them: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, one after another.

A list of objects within the markers (SmolLM2's) is read as well.
"""

from __future__ import annotations

from exitlm.serve.tools.call_text import CallObject
from exitlm.serve.tools.parser import Parser


class HermesParser(Parser):
    """Reads calls between ``<tool_call>`` and ``</tool_call>``."""

    opener = "<tool_call>"
    closer = "</tool_call>"
    markers = (opener, closer)

    def _opened(self) -> bool:
        if not self._hold_blanks():
            return False
        if self._text[self._at] == "[":
            self._list = True
            self._hold(self._at + 1)
            self._state = self._object_next
        elif self._text[self._at] == "{":
            self._begin(CallObject())
        else:
            self._fall_back()
        return True
