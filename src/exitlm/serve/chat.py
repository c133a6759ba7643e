"""``POST /v1/chat/completions``: a conversation, and its next message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from starlette.requests import Request as HttpRequest

from exitlm.decode.generation import Generation, GenerationConfig, Piece
from exitlm.serve.async_engine import Happened
from exitlm.serve.conversation import Conversation, Reader, conversation
from exitlm.serve.errors import ApiError
from exitlm.serve.protocol.chat import ChatBody
from exitlm.serve.replies import FINGERPRINT, Head, Reply
from exitlm.serve.service import Service
from exitlm.serve.stream import DONE, EventStream, broken_off
from exitlm.serve.tokens_json import chat_logprobs, trace_of
from exitlm.serve.tools.deltas import Delta, Text, ToolStart, collect
from exitlm.serve.tools.offer import read_offer


async def answer(service: Service, http: HttpRequest, body: ChatBody) -> EventStream | dict[str, Any]:
    """The answer to a conversation: a stream, or an object."""
    reply, talk, config = await prepare(service, http, body)
    head = Head.of("chatcmpl", reply.model)
    submission = await reply.submit([(talk.ids, config)], streams=bool(body.stream))
    if body.stream:
        return reply.streamed(submission, ChatWriter(reply, head, body, talk), config)
    ((*choices,),) = await reply.whole(submission)
    return {
        "id": head.id, "object": "chat.completion", "created": head.created, "model": head.model,
        "choices": [_choice(reply, body, talk, index, choice) for index, choice in enumerate(choices)],
        "usage": reply.usage(), "service_tier": "default", "system_fingerprint": FINGERPRINT,
    }  # fmt: skip


async def prepare(service: Service, http: HttpRequest, body: ChatBody) -> tuple[Reply, Conversation, GenerationConfig]:
    """All that the engine needs for the next message of a conversation. ``responses.py`` uses it, too."""
    reply = Reply(service, http, body, service.models.find(body.model))
    offer = read_offer(body.tools, body.tool_choice, body.parallel_tool_calls)
    talk = await conversation(service, body.messages, offer)
    config = reply.config(talk.ids, _own_settings(body, talk), new_tokens=_new_tokens(body), default=None)
    return reply, talk, config


def _new_tokens(body: ChatBody) -> int | None:
    """How many tokens the answer may have; None as many as fit."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    found = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if found == 0:
        raise ApiError(400, "max_tokens is 0, but an answer has at least 1 token", param="max_tokens")
    return found


def _own_settings(body: ChatBody, talk: Conversation) -> dict[str, Any]:
    """Settings of a generation that only conversations have."""
    found: dict[str, Any] = {}
    if body.logprobs:
        found["logprobs"] = max(1, body.top_logprobs or 0)
    elif body.top_logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.response_format is not None:
        found["response_format"] = body.response_format
    if talk.offer.forced:
        if body.response_format not in (None, {"type": "text"}):
            raise ApiError(
                400, "tool_choice forces a call, so response_format has no effect; leave one of them out",
                param="response_format",
            )  # fmt: skip
        found["response_format"] = talk.format.grammar(talk.offer.tools, talk.offer.name, talk.offer.parallel)
    if body.prediction is not None:
        found["prediction"] = body.prediction.text
    return found


def finish_reason(found: Generation, calls: bool) -> str:
    """Why a message ended."""
    return "tool_calls" if calls and found.finish_reason == "stop" else found.finish_reason


def _choice(reply: Reply, body: ChatBody, talk: Conversation, index: int, found: Generation) -> dict[str, Any]:
    reader = talk.reader()
    said = collect([*reader.read(found.trace), *reader.rest()])
    message: dict[str, Any] = {
        "role": "assistant", "content": None if said.calls and not said.text else said.text, "refusal": None,
        "annotations": [],
    }  # fmt: skip
    if said.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in said.calls
        ]
    logprobs = None
    if body.logprobs:
        entries = chat_logprobs(found.trace, body.top_logprobs or 0, reply.service.words)
        logprobs = {"content": entries, "refusal": None}
    choice: dict[str, Any] = {
        "index": index, "message": message, "logprobs": logprobs,
        "finish_reason": finish_reason(found, reader.calls),
    }  # fmt: skip
    if body.trace:
        choice["exitlm"] = trace_of(found.trace, reply.service.words)
    return choice


class ChatWriter:
    """Writes the chunks of a streamed message. The JSON around a piece of text is built once."""

    def __init__(self, reply: Reply, head: Head, body: ChatBody, talk: Conversation) -> None:
        self.reply, self.body, self.talk = reply, body, talk
        self._plain = not body.logprobs and not body.trace and not talk.offer.tools
        opening = {
            "id": head.id, "object": "chat.completion.chunk", "created": head.created, "model": head.model,
            "service_tier": "default", "system_fingerprint": FINGERPRINT,
        }  # fmt: skip
        self._opening = f"data: {json.dumps(opening)[:-1]}, "
        self._usage = ', "usage": null' if body.include_usage else ""
        self._begun: dict[int, tuple[str, str]] = {}
        self._readers: dict[int, Reader] = {}

    def frames(self, batch: Sequence[Happened]) -> bytes:
        """Chunks for some events: the role first, then text and calls, at last why it ended."""
        out: list[str] = []
        for _, index, event in batch:
            if index not in self._begun:
                self._begin(index, out)
            piece = event.piece
            if piece is not None and piece.tokens:
                if self._plain:
                    if piece.text:
                        before, after = self._begun[index]
                        out.append(before + quoted(piece.text) + after)
                else:
                    self._piece(out, index, piece)
            if event.generation is not None:
                self._end(out, index, event.generation)
        self.reply.collected.add(batch)
        return "".join(out).encode()

    def _begin(self, index: int, out: list[str]) -> None:
        self._chunk(out, index, {"role": "assistant", "content": "", "refusal": None})
        before = f'{self._opening}"choices": [{{"index": {index}, "delta": {{"content": '
        self._begun[index] = before, f'}}, "logprobs": null, "finish_reason": null}}]{self._usage}}}\n\n'
        self._readers[index] = self.talk.reader()

    def _piece(self, out: list[str], index: int, piece: Piece) -> None:
        """Tokens of which more is told than their text, or that may be part of a call."""
        told: dict[str, Any] = {}
        if self.body.logprobs:
            entries = chat_logprobs(piece.tokens, self.body.top_logprobs or 0, self.reply.service.words)
            told["logprobs"] = {"content": entries, "refusal": None}
        if self.body.trace:
            told["exitlm"] = trace_of(piece.tokens, self.reply.service.words)
        deltas = [_delta(delta) for delta in self._readers[index].read(piece.tokens)]
        if told and not deltas:
            deltas = [{"content": ""}]
        for delta in deltas:
            self._chunk(out, index, delta, **told)
            told = {}

    def _end(self, out: list[str], index: int, found: Generation) -> None:
        reader = self._readers[index]
        for delta in reader.rest():
            self._chunk(out, index, _delta(delta))
        more = f', "exitlm": {json.dumps({"mode": found.stats.mode, "exact": found.stats.exact})}'
        self._chunk(out, index, {}, more, finish_reason=finish_reason(found, reader.calls))

    def _chunk(self, out: list[str], index: int, delta: dict[str, Any], more: str = "", **told: Any) -> None:
        """Any chunk but the most usual one."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **told}
        out.append(f'{self._opening}"choices": [{json.dumps(choice)}]{self._usage}{more}}}\n\n')

    def end(self) -> bytes:
        """What the answer took, if that was asked for."""
        if not self.body.include_usage:
            return DONE
        return f'{self._opening}"choices": [], "usage": {json.dumps(self.reply.usage())}}}\n\n'.encode() + DONE

    def failed(self, refusal: ApiError) -> bytes:
        """Why it broke off."""
        return broken_off(refusal)


def _delta(delta: Delta) -> dict[str, Any]:
    """A piece of a message as a stream tells it."""
    if isinstance(delta, Text):
        return {"content": delta.text}
    call: dict[str, Any] = {"index": delta.index}
    if isinstance(delta, ToolStart):
        call |= {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
    else:
        call["function"] = {"arguments": delta.fragment}
    return {"tool_calls": [call]}
