"""How a format writes calls: the fixed texts around names and arguments. One record serves for writing calls and for
the grammar that forces them, so both are the same language."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exitlm.decode.sampling.grammar import TAGGED, ResponseFormat
from exitlm.serve.tools.offer import Tool

MAX_CALLS = 32  # forced in one answer: a small model may call for ever


@dataclass(frozen=True, kw_only=True)
class Layout:
    """An answer that is nothing but calls: ``opening``, the calls with ``separator`` between them, ``closing``.

    A call is ``before_name``, the name (as a JSON string where ``quoted``), ``before_arguments``, the arguments as
    ``json.dumps`` lays them out, and ``after``.
    """

    opening: str = ""
    before_name: str
    quoted: bool = True
    before_arguments: str
    after: str = ""
    separator: str
    closing: str = ""

    def write(self, calls: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
        """The text of ``calls``, each a name and its arguments."""
        written = (
            self._begin(name) + json.dumps(arguments, ensure_ascii=False) + self.after for name, arguments in calls
        )
        return self.opening + self.separator.join(written) + self.closing

    def _begin(self, name: str) -> str:
        """A call up to its arguments."""
        said = json.dumps(name, ensure_ascii=False) if self.quoted else name
        return f"{self.before_name}{said}{self.before_arguments}"

    def grammar(self, tools: Sequence[Tool], *, parallel: bool, special: tuple[str, ...]) -> ResponseFormat:
        """What accepts calls of ``tools`` and nothing else: exactly one, or up to :data:`MAX_CALLS` if ``parallel``.

        Arguments are of the schema of their tool, without properties that it doesn't list. ``special``: the markers
        that may come as special tokens.
        """
        assert tools
        call = _either(
            [_sequence([_fixed(self._begin(tool.name)), _arguments(tool), _fixed(self.after)]) for tool in tools]
        )
        calls = [call]
        if parallel:
            more = _sequence([_fixed(self.separator), call])
            calls.append({"type": "repeat", "min": 0, "max": MAX_CALLS - 1, "content": more})
        wanted = _sequence([_fixed(self.opening), *calls, _fixed(self.closing)])
        return ResponseFormat(kind=TAGGED, source=json.dumps(wanted), any_whitespace=False, special=special)


def _fixed(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}


def _arguments(tool: Tool) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": tool.parameters}


def _sequence(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts one after the other, without empty texts."""
    return {"type": "sequence", "elements": [part for part in parts if part.get("value") != ""]}


def _either(forms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return forms[0] if len(forms) == 1 else {"type": "or", "elements": list(forms)}
