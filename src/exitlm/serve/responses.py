"""``POST /v1/responses``: the conversation of a chat completion in OpenAI's newer shape. Nothing is kept: a client
sends the whole conversation each time.

It is decoded as a chat completion is; what the answer looks like is all that differs. A stream ends with
``response.completed``, ``response.incomplete`` or ``response.failed``, each with the whole response.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from starlette.requests import Request as HttpRequest

from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.errors import UserError
from exitlm.serve import chat
from exitlm.serve.async_engine import Happened
from exitlm.serve.conversation import Conversation
from exitlm.serve.errors import ApiError, refusal_of
from exitlm.serve.protocol.response import ResponseBody
from exitlm.serve.replies import Head, Reply
from exitlm.serve.response_input import STATELESS, chat_body
from exitlm.serve.response_output import Event, Output
from exitlm.serve.service import Service
from exitlm.serve.stream import EventStream
from exitlm.serve.tokens_json import trace_of

_CHAT_NAMES = re.compile(r"\b(max_tokens|response_format(\.json_schema)?)\b")
_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


async def answer(service: Service, http: HttpRequest, body: ResponseBody) -> EventStream | dict[str, Any]:
    """The response to a conversation: a stream, or an object."""
    with _own_names():
        reply, talk, config = await chat.prepare(service, http, chat_body(body))
        response = ResponseState(reply, body, talk, config)
        submission = await reply.submit([(talk.ids, config)], streams=bool(body.stream))
    if body.stream:
        return reply.streamed(submission, ResponseWriter(response), config)
    ((found,),) = await reply.whole(submission)
    response.output.read(found.trace)
    response.end(found)
    return response.to_json()


def not_kept() -> ApiError:
    """The refusal for whoever asks for an earlier response."""
    return ApiError(400, f"{STATELESS}, whatever the request's store is; read the answer to POST /v1/responses")


@contextlib.contextmanager
def _own_names() -> Iterator[None]:
    """Name the fields of this request, where refusals name those of a chat completion."""
    try:
        yield
    except (ApiError, UserError) as error:
        found = refusal_of(error)
        param = None if found.param is None else _renamed(found.param)
        raise ApiError(
            found.status, _renamed(found.message), param=param, code=found.code, headers=found.headers
        ) from error


def _renamed(text: str) -> str:
    return _CHAT_NAMES.sub(lambda m: "max_output_tokens" if m[1] == "max_tokens" else "text.format", text)


class ResponseState:
    """One response in the making."""

    def __init__(self, reply: Reply, body: ResponseBody, talk: Conversation, config: GenerationConfig) -> None:
        self.reply, self.body = reply, body
        top = (body.top_logprobs or 0) if body.logprobs else None
        self.output = Output(talk.reader(), reply.service.words, top_logprobs=top, trace=body.trace)
        # Whether nothing is told of a piece of text but the text.
        self.plain = top is None and not body.trace and not talk.offer.tools
        self.generation: Generation | None = None
        head = Head(id=f"resp_{secrets.token_hex(24)}", model=reply.model.name)
        shape = (body.text.format if body.text is not None else None) or {"type": "text"}
        self._fixed: dict[str, Any] = {
            "id": head.id, "object": "response", "created_at": head.created, "model": head.model, "background": False,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "max_tool_calls": None,
            "metadata": body.metadata or {}, "parallel_tool_calls": talk.offer.parallel, "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key, "reasoning": {"effort": None, "summary": None},
            "safety_identifier": body.safety_identifier, "service_tier": "default", "store": False,
            "temperature": config.temperature, "text": {"format": shape, "verbosity": "medium"},
            "tool_choice": body.tool_choice or "auto", "tools": [_tool(tool) for tool in body.functions],
            "top_logprobs": body.top_logprobs or 0, "top_p": config.top_p, "truncation": "disabled", "user": body.user,
        }  # fmt: skip
        try:
            json.dumps(self._fixed, allow_nan=False)
        except (ValueError, RecursionError):
            said = "text, tools and tool_choice are repeated in the response; leave out NaN and infinity, and nest less"
            raise ApiError(400, said) from None

    def end(self, found: Generation) -> list[Event]:
        """Note that the text has ended."""
        self.generation = found
        return self.output.finish("completed" if self._is_complete else "incomplete")

    @property
    def _is_complete(self) -> bool:
        return self.generation is not None and self.generation.finish_reason != "length"

    @property
    def status(self) -> str:
        """``in_progress``, ``completed`` or ``incomplete``."""
        if self.generation is None:
            return "in_progress"
        return "completed" if self._is_complete else "incomplete"

    def to_json(self, failure: ApiError | None = None) -> dict[str, Any]:
        """OpenAI's object, of the response as it stands."""
        status = self.status if failure is None else "failed"
        found = {
            **self._fixed, "status": status, "completed_at": int(time.time()) if status == "completed" else None,
            "error": None, "incomplete_details": None, "usage": None,
            "output": [item for item in self.output.items if item["status"] != "in_progress"],
        }  # fmt: skip
        if failure is not None:
            found["error"] = {"code": _CODES.get(failure.status, "server_error"), "message": failure.message}
        elif self.generation is not None:
            found["usage"] = _usage(self.reply.usage())
            if status == "incomplete":
                found["incomplete_details"] = {"reason": "max_output_tokens"}
            if self.body.trace:
                found["exitlm"] = trace_of(self.generation.trace, self.reply.service.words)
        return found


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A function as responses tell it."""
    function = tool.get("function", tool)
    return {"type": "function", **{k: function.get(k) for k in ("name", "description", "parameters", "strict")}}


def _usage(found: dict[str, Any]) -> dict[str, Any]:
    """What the answer took, under the names of responses."""
    cached = found["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": found["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": found["total_tokens"], "exitlm": found["exitlm"],
    }  # fmt: skip


class ResponseWriter:
    """Writes the events of a streamed response. The JSON around a piece of text is built once."""

    def __init__(self, response: ResponseState) -> None:
        self.response = response
        self._number = 0  # of the next event
        self._before = ""  # what comes before the text of a piece, once a message is open

    def frames(self, batch: Sequence[Happened]) -> bytes:
        """Events for what has come."""
        out: list[str] = []
        response, output = self.response, self.response.output
        if not self._number:
            begun = response.to_json()
            self._write(out, [{"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")])
        for _, _, event in batch:
            piece = event.piece
            if piece is not None and piece.tokens:
                if response.plain and self._before:
                    if piece.text:
                        output.add_text(piece.text)
                        out.append(f'{self._before}{quoted(piece.text)}, "sequence_number": {self._number}}}\n\n')
                        self._number += 1
                else:
                    self._write(out, output.read(piece.tokens))
                    if response.plain and output.in_text:
                        self._before = self._opening()
            if event.generation is not None:
                self._write(out, response.end(event.generation))
        response.reply.collected.add(batch)
        return "".join(out).encode()

    def _opening(self) -> str:
        """The most usual event up to its text."""
        kind, place = "response.output_text.delta", self.response.output.place()
        event = {"type": kind, **place, "content_index": 0, "logprobs": []}
        return f'event: {kind}\ndata: {json.dumps(event)[:-1]}, "delta": '

    def _write(self, out: list[str], events: Iterable[Event]) -> None:
        for event in events:
            out.append(f"event: {event['type']}\ndata: {json.dumps({**event, 'sequence_number': self._number})}\n\n")
            self._number += 1

    def end(self) -> bytes:
        """The whole response."""
        out: list[str] = []
        self._write(out, [{"type": f"response.{self.response.status}", "response": self.response.to_json()}])
        return "".join(out).encode()

    def failed(self, refusal: ApiError) -> bytes:
        """Why it broke off."""
        out: list[str] = []
        self._write(out, [{"type": "response.failed", "response": self.response.to_json(refusal)}])
        return "".join(out).encode()
