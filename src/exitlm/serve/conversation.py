"""From a conversation to token ids, in the model's chat template; and from what was written to text and tool calls."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from exitlm.decode.generation import TokenTrace
from exitlm.serve.errors import ApiError
from exitlm.serve.protocol.chat import Message
from exitlm.serve.service import Service
from exitlm.serve.tools.deltas import Delta, Text
from exitlm.serve.tools.formats import DESCRIBED, Format, detect, marker_ids
from exitlm.serve.tools.offer import Offer
from exitlm.serve.tools.parser import Parser
from exitlm.serve.tools.rendering import render, template_of
from exitlm.weights.checkpoint import chat_text

_LONG = 8192  # characters of all messages: from here on they are encoded in another thread


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation up to where the answer begins, as token ids, and what the answer may call. ``spelled``: the texts
    of special tokens that are markers of calls, by id."""

    ids: list[int]
    offer: Offer
    format: Format = DESCRIBED
    spelled: dict[int, str] = field(default_factory=dict)

    def reader(self) -> Reader:
        """What reads one answer."""
        if not self.offer.tools:
            return Reader(None, {})
        names = [tool.name for tool in self.offer.tools]
        return Reader(self.format.parser(names=names, parallel=self.offer.parallel), self.spelled)


class Reader:
    """Reads one answer, which may hold calls where tools are offered, as it comes."""

    def __init__(self, parser: Parser | None, spelled: dict[int, str]) -> None:
        self._parser, self._spelled = parser, spelled
        self.calls = False  # whether there was one

    def read(self, tokens: Iterable[TokenTrace]) -> list[Delta]:
        """What is certain with these tokens."""
        if self._parser is None:
            text = "".join(token.text for token in tokens)
            return [Text(text)] if text else []
        return self._seen(self._parser.feed("".join(token.text + self._spelled.get(token.id, "") for token in tokens)))

    def rest(self) -> list[Delta]:
        """What is left at the end."""
        return [] if self._parser is None else self._seen(self._parser.finish())

    def _seen(self, deltas: list[Delta]) -> list[Delta]:
        self.calls = self.calls or any(not isinstance(delta, Text) for delta in deltas)
        return deltas


async def conversation(service: Service, messages: Sequence[Message], offer: Offer | None = None) -> Conversation:
    """A conversation, and what its answer may call.

    Raises:
        ApiError, UserError: no chat template, messages that it refuses, or content that is no text.
    """
    for number, message in enumerate(messages):
        for part in message.content if isinstance(message.content, list) else ():
            if part.type not in ("text", "refusal"):
                name = f"messages.{number}.content"
                raise ApiError(400, f"{name} has a part of type '{part.type}', but text alone is read", param=name)
    given = [message.model_dump(exclude_none=True) for message in messages]
    if sum(len(str(message.get("content"))) for message in given) < _LONG:
        return _encoded(service, given, offer or Offer())
    return await asyncio.to_thread(_encoded, service, given, offer or Offer())


def _encoded(service: Service, messages: list[dict[str, Any]], offer: Offer) -> Conversation:
    tokenizer = service.tokenizer
    template = template_of(tokenizer)
    if not template:
        raise ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
    format = detect(template)
    shown = render(format, messages, offer.tools)
    text = chat_text(
        tokenizer, shown.messages, answer=True, tools=shown.tools,
        remedy="give messages that it takes, or use /v1/completions",
    )  # fmt: skip
    return Conversation(
        ids=list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), offer=offer, format=format,
        spelled=marker_ids(format, tokenizer) if offer.tools else {},
    )  # fmt: skip


def checked(text: str, name: str) -> str:
    """A text that UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{name} is not valid UTF-8 text; leave out lone surrogates", param=name) from None
    return text
