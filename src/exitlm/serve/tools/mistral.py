"""Calls as Mistral's models write them, in two forms.

The newer one is ``[TOOL_CALLS]name[ARGS]{...}``, once for each call; an id may stand between (``[CALL_ID]``) and is
read over, and ``[ARGS]`` may be missing. The older one is ``[TOOL_CALLS]`` and a list of objects
``{"name": ..., "arguments": {...}}``.
"""

from __future__ import annotations

import re

from exitlm.serve.tools.call_text import BareArguments, CallObject
from exitlm.serve.tools.json_value import end_of
from exitlm.serve.tools.parser import Parser

_ID, _ARGUMENTS = "[CALL_ID]", "[ARGS]"
_WORD = re.compile(r"[^\s\[\]{}\"'<>,;]{0,256}")


class MistralParser(Parser):
    """Reads calls behind ``[TOOL_CALLS]``, in either form."""

    opener = "[TOOL_CALLS]"
    markers = (opener, _ID, _ARGUMENTS)

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
            self._state = self._named
        return True

    def _named(self) -> bool:
        """At a name, with what follows it up to the arguments."""
        end = end_of(_WORD, self._text, self._at)
        name, begun = self._text[self._at : end], self._expect(_ID, end)
        if begun:
            end = end_of(_WORD, self._text, end + len(_ID))
        there = self._expect(_ARGUMENTS, end)
        if name and (there or self._text.startswith("{", end)):
            self._hold(end + len(_ARGUMENTS) if there else end)
            self._begin(BareArguments(name))
        elif name and (there is None or begun is None):
            return False
        else:
            self._fall_back()
        return True
