"""From a request to an answer: the steps that every kind of generation shares.

```
configuration -> grammars compiled -> submitted -> a stream that is written, or generations that are all awaited
```
What an answer looks like is the business of ``chat.py``, ``completions.py`` and ``reference.py``.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest

from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.serve.async_engine import Happened, Submission
from exitlm.serve.async_engine import Request as Job
from exitlm.serve.errors import ApiError
from exitlm.serve.models import ServedModel, config_of
from exitlm.serve.service import Service
from exitlm.serve.stream import EventStream, Writer, watched
from exitlm.serve.usage import usage

FINGERPRINT = "exitlm"


@dataclass(frozen=True, kw_only=True)
class Head:
    """What all parts of an answer repeat."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, prefix: str, model: ServedModel) -> Head:
        """A fresh one."""
        return cls(id=f"{prefix}-{secrets.token_hex(12)}", model=model.name)


class Asked(Protocol):
    """What every request for text tells of it."""

    def sampling(self) -> dict[str, Any]:
        """Settings of a generation: how tokens are chosen."""

    def exit_settings(self) -> dict[str, Any]:
        """Settings of a generation: how deep they go."""


class Collected:
    """The generations that have come so far, of each prompt and choice."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Generation] = {}

    def add(self, batch: Sequence[Happened]) -> None:
        """What some events bring."""
        for index, choice, event in batch:
            if event.generation is not None:
                self.found[index, choice] = event.generation

    @property
    def answers(self) -> list[list[Generation]]:
        """The choices of each prompt, in order."""
        found: dict[int, list[Generation]] = {}
        for (index, _), generation in sorted(self.found.items(), key=lambda item: item[0]):
            found.setdefault(index, []).append(generation)
        return [found[index] for index in sorted(found)]


class Reply:
    """One request on its way: what it asks for, and how it is answered."""

    def __init__(self, service: Service, http: HttpRequest, body: Asked, model: ServedModel) -> None:
        self.service, self.http, self.body, self.model = service, http, body, model
        self.facts: dict[str, Any] = http.state.facts
        self.facts["model"] = model.name
        self.collected = Collected()

    def config(
        self, ids: Sequence[int], *given: dict[str, Any], new_tokens: int | None, default: int | None
    ) -> GenerationConfig:
        """The configuration for a prompt. ``new_tokens``: what the request asks for, else ``default``, else as many as
        fit."""
        limits, engine = self.service.config.limits, self.service.engine.engine
        context = engine.config.max_position_embeddings
        if len(ids) + (new_tokens != 0) > context:
            raise ApiError(
                400, f"the prompt has {len(ids)} tokens, but the model's context is {context}; shorten the prompt",
                code="context_length_exceeded",
            )  # fmt: skip
        most, sampling = limits.new_tokens, self.body.sampling()
        choices = sampling.get("n", 1)
        if new_tokens is not None and most is not None and new_tokens > most:
            raise ApiError(
                400, f"max_tokens is {new_tokens}, but this server writes at most {most}; ask for fewer",
                param="max_tokens",
            )  # fmt: skip
        if choices > limits.choices:
            raise ApiError(400, f"n is {choices}, but at most {limits.choices} choices are written", param="n")
        if new_tokens is None:
            room = max(1, min(context, engine.memory.pool.capacity) - len(ids))
            new_tokens = min(n for n in (room, most, default) if n is not None)
        defaults = {k: v for k, v in self.service.config.defaults.items() if k != "max_new_tokens"}
        return config_of(
            self.model, defaults, sampling, self.body.exit_settings(), *given,
            {"max_new_tokens": new_tokens}, free={"temperature": 1.0},
        )  # fmt: skip

    async def submit(self, jobs: Sequence[Job], streams: bool) -> Submission:
        """Let the engine begin."""
        engine, first = self.service.engine, jobs[0][1]
        await engine.prepare([config for _, config in jobs[:1]])
        if self.service.config.http.log_prompts and self.service.vocabulary is not None:
            self.facts["prompts"] = [self.service.tokenizer.decode(ids) for ids, _ in jobs]
        self.facts |= {"mode": first.mode, "prompt_tokens": sum(len(ids) for ids, _ in jobs), "stream": streams}
        return engine.submit(jobs, streams=streams, deadline=self.service.config.limits.deadline)

    async def whole(self, submission: Submission) -> list[list[Generation]]:
        """The choices of each prompt when all are done."""
        async with watched(submission, self.http.receive):
            async for batch in submission.batches():
                self.collected.add(batch)
        self.done()
        return self.collected.answers

    def streamed(self, submission: Submission, writer: Writer, config: GenerationConfig) -> EventStream:
        """The answer as a stream."""
        exact = self.service.engine.engine.fused.exact
        headers = [(b"exitlm-mode", config.mode.encode()), (b"exitlm-exact", b"true" if exact else b"false")]
        return EventStream(
            submission, writer, write_timeout=self.service.config.limits.write_timeout, headers=headers,
            facts=self.facts, finish=self.done,
        )  # fmt: skip

    def usage(self) -> dict[str, Any]:
        """What the answer took."""
        return usage(self.collected.answers, self.service.engine.engine.config.num_hidden_layers)

    def done(self) -> None:
        """Note for the log what the answer was."""
        found = self.usage()
        self.facts |= {
            "completion_tokens": found["completion_tokens"], "mean_layers": found["exitlm"]["mean_layers"],
            "cached_tokens": found["prompt_tokens_details"]["cached_tokens"],
        }  # fmt: skip
        if self.service.config.http.log_prompts:
            self.facts["answers"] = [text.text for choices in self.collected.answers for text in choices]
