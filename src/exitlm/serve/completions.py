"""``POST /v1/completions``: texts, and what follows them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from starlette.requests import Request as HttpRequest

from exitlm.decode.generation import Generation, Piece
from exitlm.serve.async_engine import Happened
from exitlm.serve.conversation import checked
from exitlm.serve.errors import ApiError
from exitlm.serve.protocol.completion import DEFAULT_MAX_TOKENS, CompletionBody
from exitlm.serve.replies import FINGERPRINT, Head, Reply
from exitlm.serve.service import Service
from exitlm.serve.stream import DONE, EventStream, broken_off
from exitlm.serve.tokens_json import CompletionLogprobs, joined, trace_of

_LONG = 8192  # characters of all prompts: from here on they are encoded in another thread


async def answer(service: Service, http: HttpRequest, body: CompletionBody) -> EventStream | dict[str, Any]:
    """The completion of each prompt: a stream, or an object."""
    model = service.models.find(body.model)
    reply = Reply(service, http, body, model)
    prompts = await _ids(service, body)
    given = _own_settings(body)
    configs = [reply.config(ids, given, new_tokens=body.max_tokens, default=DEFAULT_MAX_TOKENS) for ids in prompts]
    head = Head.of("cmpl", model)
    submission = await reply.submit(list(zip(prompts, configs, strict=True)), streams=bool(body.stream))
    if body.stream:
        return reply.streamed(submission, CompletionWriter(reply, head, body, prompts), configs[0])
    answers = await reply.whole(submission)
    choices = [
        _choice(reply, body, index, prompt, choice)
        for prompt, found in zip(prompts, answers, strict=True)
        for index, choice in enumerate(found)
    ]
    for index, choice in enumerate(choices):
        choice["index"] = index
    return {
        "id": head.id, "object": "text_completion", "created": head.created, "model": head.model,
        "choices": choices, "usage": reply.usage(), "system_fingerprint": FINGERPRINT,
    }  # fmt: skip


async def _ids(service: Service, body: CompletionBody) -> list[list[int]]:
    """The token ids of each prompt."""
    prompts = body.prompts
    most = service.config.limits.prompts
    if not prompts:
        raise ApiError(400, "prompt is an empty list; give at least one text or list of token ids", param="prompt")
    if len(prompts) > most:
        raise ApiError(
            400, f"prompt has {len(prompts)} texts, but at most {most} are completed at once", param="prompt"
        )
    texts = [checked(prompt, "prompt") for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return [list(prompt) for prompt in prompts]  # type: ignore[arg-type]
    if any(not text for text in texts):
        raise ApiError(400, "the prompt is empty; give at least one character", param="prompt")
    encode = service.model.encode
    if sum(len(text) for text in texts) < _LONG:
        return [encode(text) for text in texts]
    return await asyncio.to_thread(lambda: [encode(text) for text in texts])


def _own_settings(body: CompletionBody) -> dict[str, Any]:
    """Settings of a generation that only completions have."""
    if body.suffix:
        raise ApiError(400, "suffix is not supported: text is only continued; leave it out", param="suffix")
    if body.best_of not in (None, 1, body.n or 1):
        raise ApiError(400, "best_of is not supported beside n; leave it out, or give the same number", param="best_of")
    found: dict[str, Any] = {}
    if body.logprobs is not None:
        found["logprobs"] = max(1, body.logprobs)
        if body.echo:
            found["prompt_logprobs"] = body.logprobs
    elif body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens is 0, and without echo there is nothing to tell", param="max_tokens")
    if body.response_format is not None:
        found["response_format"] = body.response_format
    return found


def _prompt_text(service: Service, ids: Sequence[int]) -> str:
    """The text of a prompt, as ``echo`` shows it."""
    return str(service.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _choice(reply: Reply, body: CompletionBody, index: int, prompt: Sequence[int], found: Generation) -> dict[str, Any]:
    text, logprobs = found.text or "", None
    if body.logprobs is not None:
        scores = CompletionLogprobs(body.logprobs, reply.service.words)
        begin = scores.prompt(prompt, found.prompt_logprobs) if body.echo else None
        rest = scores.answer(found.trace)
        logprobs = rest if begin is None else joined(begin, rest)
    if body.echo:
        text = _prompt_text(reply.service, prompt) + text
    choice: dict[str, Any] = {
        "index": index, "text": text, "logprobs": logprobs, "finish_reason": found.finish_reason,
    }  # fmt: skip
    if body.trace:
        choice["exitlm"] = trace_of(found.trace, reply.service.words)
    return choice


class CompletionWriter:
    """Writes the chunks of streamed completions. The JSON around a piece of text is built once."""

    def __init__(self, reply: Reply, head: Head, body: CompletionBody, prompts: Sequence[Sequence[int]]) -> None:
        self.reply, self.body, self.prompts = reply, body, prompts
        self._plain = body.logprobs is None and not body.trace
        opening = {
            "id": head.id, "object": "text_completion", "created": head.created, "model": head.model,
            "system_fingerprint": FINGERPRINT,
        }  # fmt: skip
        self._opening = f"data: {json.dumps(opening)[:-1]}, "
        self._usage = ', "usage": null' if body.include_usage else ""
        self._choices = body.n or 1
        self._begun: dict[int, tuple[str, str]] = {}
        self._scores: dict[int, CompletionLogprobs] = {}

    def frames(self, batch: Sequence[Happened]) -> bytes:
        """Chunks for some events."""
        out: list[str] = []
        for at, choice, event in batch:
            index = at * self._choices + choice
            piece = event.piece
            if index not in self._begun:
                self._begin(index, at, piece, out)
            if piece is not None and piece.tokens:
                if self._plain:
                    if piece.text:
                        before, after = self._begun[index]
                        out.append(before + quoted(piece.text) + after)
                else:
                    self._chunk(out, index, piece.text, piece)
            if event.generation is not None:
                self._chunk(out, index, "", None, event.generation)
        self.reply.collected.add(batch)
        return "".join(out).encode()

    def _begin(self, index: int, at: int, piece: Piece | None, out: list[str]) -> None:
        before = f'{self._opening}"choices": [{{"index": {index}, "text": '
        self._begun[index] = before, f', "logprobs": null, "finish_reason": null}}]{self._usage}}}\n\n'
        if self.body.logprobs is not None:
            self._scores[index] = CompletionLogprobs(self.body.logprobs, self.reply.service.words)
        if self.body.echo:
            logprobs = None
            if index in self._scores and piece is not None:
                logprobs = self._scores[index].prompt(self.prompts[at], piece.prompt_logprobs)
            text = _prompt_text(self.reply.service, self.prompts[at])
            choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
            out.append(f'{self._opening}"choices": [{json.dumps(choice)}]{self._usage}}}\n\n')

    def _chunk(
        self, out: list[str], index: int, text: str, piece: Piece | None = None, ended: Generation | None = None
    ) -> None:
        """Any chunk but the most usual one."""
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
        more = ""
        if piece is not None and index in self._scores:
            choice["logprobs"] = self._scores[index].answer(piece.tokens)
        if piece is not None and self.body.trace:
            choice["exitlm"] = trace_of(piece.tokens, self.reply.service.words)
        if ended is not None:
            choice["finish_reason"] = ended.finish_reason
            more = f', "exitlm": {json.dumps({"mode": ended.stats.mode, "exact": ended.stats.exact})}'
        out.append(f'{self._opening}"choices": [{json.dumps(choice)}]{self._usage}{more}}}\n\n')

    def end(self) -> bytes:
        """What the answers took, if that was asked for."""
        if not self.body.include_usage:
            return DONE
        return f'{self._opening}"choices": [], "usage": {json.dumps(self.reply.usage())}}}\n\n'.encode() + DONE

    def failed(self, refusal: ApiError) -> bytes:
        """Why they broke off."""
        return broken_off(refusal)
