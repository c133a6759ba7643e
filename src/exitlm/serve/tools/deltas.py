"""What an answer with tool calls consists of, in the order in which it arrives, and the whole of it."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A piece of the answer's text, outside of calls. Never empty."""

    text: str


@dataclass(frozen=True)
class ToolStart:
    """A call begins: the ``index``-th of the answer, from 0, of the tool ``name``."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolArguments:
    """A piece of the arguments of the call ``index``, which has started. Never empty.

    All pieces of a call together are the JSON object that the model wrote, character by character. They are incomplete
    where the answer ends early, and are not JSON where the model wrote none.
    """

    index: int
    fragment: str


Delta = Text | ToolStart | ToolArguments


@dataclass(frozen=True)
class Call:
    """One whole call; ``arguments`` is the text of a JSON object, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """A whole answer: its text outside of calls (possibly empty), and its calls."""

    text: str
    calls: tuple[Call, ...]


def collect(deltas: Iterable[Delta]) -> Answer:
    """The answer that ``deltas`` bring, for a response that is not streamed."""
    texts: list[str] = []
    starts: list[ToolStart] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        if isinstance(delta, Text):
            texts.append(delta.text)
        elif isinstance(delta, ToolStart):
            assert delta.index == len(starts)
            starts.append(delta)
            arguments.append([])
        else:
            arguments[delta.index].append(delta.fragment)
    calls = (Call(start.id, start.name, "".join(parts)) for start, parts in zip(starts, arguments, strict=True))
    return Answer("".join(texts), tuple(calls))


def merge(deltas: Iterable[Delta]) -> list[Delta]:
    """The same deltas, with neighbours of one kind and call joined."""
    merged: list[Delta] = []
    for delta in deltas:
        last = merged[-1] if merged else None
        if isinstance(delta, Text) and isinstance(last, Text):
            merged[-1] = Text(last.text + delta.text)
        elif isinstance(delta, ToolArguments) and isinstance(last, ToolArguments) and last.index == delta.index:
            merged[-1] = ToolArguments(delta.index, last.fragment + delta.fragment)
        else:
            merged.append(delta)
    return merged


def random_call_id() -> str:
    """An id as OpenAI's: ``call_`` and 24 hexadecimal digits."""
    return f"call_{secrets.token_hex(12)}"
