"""The items of a response as they are written, and the events that tell of them.

```
output_item.added ─ content_part.added ─ output_text.delta ... output_text.done ─ content_part.done ─ output_item.done
output_item.added ─ function_call_arguments.delta ... function_call_arguments.done ─ output_item.done
```
A whole response is made in the same way, and its events are dropped. Knows nothing of the events of the response
itself, and of how events are written.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from exitlm.decode.generation import TokenTrace
from exitlm.serve.conversation import Reader
from exitlm.serve.tokens_json import chat_logprobs, trace_of
from exitlm.serve.tools.deltas import Delta, Text, ToolArguments, ToolStart
from exitlm.serve.vocabulary import Vocabulary

Event = dict[str, Any]
"""An event without its number; ``type`` says which."""


class Output:
    """The items so far. Text and each call is an item of its own, in the order in which they are written."""

    def __init__(self, reader: Reader, words: Vocabulary, *, top_logprobs: int | None, trace: bool) -> None:
        """``top_logprobs``: tell the log-probabilities of the text's tokens, and of so many others; None: tell none.
        ``trace``: tell with each piece where its tokens left."""
        self.items: list[dict[str, Any]] = []
        self._reader, self._words, self._top, self._trace = reader, words, top_logprobs, trace
        self._open = False  # the last item
        self._parts: list[str] = []  # its text, or its arguments
        self._logprobs: list[dict[str, Any]] = []
        self._waiting: list[TokenTrace] = []  # tokens that no event has told of

    @property
    def in_text(self) -> bool:
        """Whether a message is open."""
        return self._open and self.items[-1]["type"] == "message"

    def read(self, tokens: Iterable[TokenTrace]) -> list[Event]:
        """What is certain with these tokens."""
        if self._top is None and not self._trace:
            return self._told(self._reader.read(tokens))
        events: list[Event] = []
        for token in tokens:  # each by itself, so that it is told of with the text that it brings
            self._waiting.append(token)
            events += self._told(self._reader.read([token]))
        return events

    def add_text(self, text: str) -> None:
        """Add text to the message that is open; who calls this has written the event."""
        self._parts.append(text)

    def finish(self, status: str) -> list[Event]:
        """What is left at the end. ``status``: that of the last item, ``completed`` or ``incomplete``. An answer
        without a token is a message without text."""
        events = self._told(self._reader.rest())
        if not self.items:
            events += self._begin_message()
        if self._waiting and self.in_text:
            events.append(self._text_delta(""))
        elif self._waiting and self._trace:
            events.append(self._arguments_delta(""))
        return [*events, *self._end(status)]

    def _told(self, deltas: Iterable[Delta]) -> list[Event]:
        events: list[Event] = []
        for delta in deltas:
            if isinstance(delta, Text):
                if not self.in_text:
                    events += [*self._end(), *self._begin_message()]
                events.append(self._text_delta(delta.text))
            elif isinstance(delta, ToolStart):
                events += [*self._end(), self._begin_call(delta)]
            else:
                assert isinstance(delta, ToolArguments)
                events.append(self._arguments_delta(delta.fragment))
        return events

    # ---- events

    def place(self) -> dict[str, Any]:
        """How events name the last item."""
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _begin(self, item: dict[str, Any]) -> Event:
        self.items.append(item)
        self._open, self._parts, self._logprobs = True, [], []
        return {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": item}

    def _begin_message(self) -> list[Event]:
        added = self._begin(
            {"id": _id("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        )
        part = {"type": "response.content_part.added", **self.place(), "content_index": 0, "part": self._part()}
        return [added, part]

    def _begin_call(self, start: ToolStart) -> Event:
        return self._begin({
            "id": _id("fc"), "type": "function_call", "status": "in_progress", "call_id": start.id, "name": start.name,
            "arguments": "",
        })  # fmt: skip

    def _part(self) -> dict[str, Any]:
        text = "".join(self._parts)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}

    def _text_delta(self, text: str) -> Event:
        self._parts.append(text)
        logprobs = [] if self._top is None else chat_logprobs(self._waiting, self._top, self._words)
        self._logprobs += logprobs
        event = {
            "type": "response.output_text.delta", **self.place(), "content_index": 0, "delta": text,
            "logprobs": logprobs,
        }  # fmt: skip
        return self._with_trace(event)

    def _arguments_delta(self, fragment: str) -> Event:
        self._parts.append(fragment)
        event = {"type": "response.function_call_arguments.delta", **self.place(), "delta": fragment}
        return self._with_trace(event)

    def _with_trace(self, event: Event) -> Event:
        if self._trace:
            event["exitlm"] = trace_of(self._waiting, self._words)
        self._waiting = []
        return event

    def _end(self, status: str = "completed") -> list[Event]:
        """The end of the item that is open, if one is."""
        if not self._open:
            return []
        item, place = self.items[-1], self.place()
        if item["type"] == "message":
            part = self._part()
            item = {**item, "status": status, "content": [part]}
            done = {key: part[key] for key in ("text", "logprobs")}
            events: list[Event] = [
                {"type": "response.output_text.done", **place, "content_index": 0, **done},
                {"type": "response.content_part.done", **place, "content_index": 0, "part": part},
            ]
        else:
            arguments = "".join(self._parts)
            item = {**item, "status": status, "arguments": arguments}
            done = {"name": item["name"], "arguments": arguments}
            events = [{"type": "response.function_call_arguments.done", **place, **done}]
        self.items[-1], self._open = item, False
        return [*events, {"type": "response.output_item.done", "output_index": place["output_index"], "item": item}]


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"
