"""Requests from start to end: loops over an engine's steps, for one prompt and for many.

Requests are read as there is room for them. Whoever stops reading aborts what is left. A request that can't be met ends
by itself, and the others go on.
"""

from __future__ import annotations

import collections.abc
import contextlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from exitlm.decode.generation import Generation, GenerationConfig, Piece, failed
from exitlm.errors import UserError

Request = tuple[collections.abc.Sequence[int] | UserError, GenerationConfig]
"""Token ids of a prompt, or what is wrong with it, and settings."""


@dataclass(frozen=True)
class Event:
    """What a step brought to one text: tokens that are certain, and with the last one the whole ``generation``, or the
    error that ended it."""

    key: int
    piece: Piece | None = None
    generation: Generation | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows for this text."""
        return self.generation is not None or self.error is not None


class Steps(Protocol):
    """What these loops need of an engine."""

    @property
    def most(self) -> int:
        """Texts that are decoded together."""

    def add_choices(
        self, prompt: collections.abc.Sequence[int], config: GenerationConfig, sink: deque[Event]
    ) -> list[int]:
        """Add all texts of a request, or none of them, whose events go to ``sink``; their keys."""

    @property
    def lock(self) -> contextlib.AbstractContextManager[object]:
        """Held by who advances the engine."""

    def advance(self) -> None:
        """One pass, under the lock."""

    def abort(self, key: int) -> None:
        """Drop a text that is not finished."""


def events(engine: Steps, requests: Iterable[Request]) -> Generator[tuple[int, int, Event], None, None]:
    """Decode some texts together: (index, choice, event) as they come, until all have ended."""
    sink: deque[Event] = deque()
    running: dict[int, tuple[int, int]] = {}
    coming = enumerate(requests)
    try:
        while True:
            while len(running) < 2 * engine.most and (request := next(coming, None)) is not None:
                index, (prompt, config) = request
                try:
                    if isinstance(prompt, UserError):
                        raise prompt
                    for choice, key in enumerate(engine.add_choices(prompt, config, sink)):
                        running[key] = index, choice
                except UserError as error:
                    yield index, 0, Event(-1, error=error)
            if not running:
                return
            while not sink:
                with engine.lock:
                    if not sink:  # else another thread's pass has put something there
                        engine.advance()
            while sink:
                event = sink.popleft()
                yield *running[event.key], event
                if event.last:
                    del running[event.key]
    finally:
        for key in running:
            engine.abort(key)


def pieces(engine: Steps, requests: Iterable[Request]) -> Iterator[Piece]:
    """Decode some prompts together; pieces carry the index of their prompt, and the error of one that failed."""
    for index, choice, event in events(engine, requests):
        if event.error is not None and not isinstance(event.error, UserError):
            raise event.error
        piece = event.piece or Piece(text="", tokens=[], error=event.error)
        piece.index, piece.choice = index, choice
        yield piece


def pieces_of_one(engine: Steps, request: Request) -> Iterator[Piece]:
    """Decode one prompt; raises what ends it."""
    for piece in pieces(engine, [request]):
        if piece.error is not None:
            raise piece.error
        yield piece


def finished(engine: Steps, requests: Iterable[Request]) -> Generator[tuple[int, Generation], None, None]:
    """Decode some prompts together: (index, generation) as they finish. One that failed has an ``error``."""
    configs: list[GenerationConfig] = []
    texts: dict[int, dict[int, Generation]] = {}
    broken: set[int] = set()

    def read() -> Iterator[Request]:
        for request in requests:
            configs.append(request[1])
            yield request

    with contextlib.closing(events(engine, read())) as found:
        for index, choice, event in found:
            if event.error is not None:
                if not isinstance(event.error, UserError):
                    raise event.error
                if index not in broken:  # one of its choices is enough
                    broken.add(index)
                    yield index, failed(event.error, configs[index].mode)
            elif event.generation is not None:
                choices = texts.setdefault(index, {})
                choices[choice] = event.generation
                if len(choices) == configs[index].n and index not in broken:
                    first = choices[0]
                    first.choices = [choices[i] for i in range(len(choices))] if len(choices) > 1 else []
                    del texts[index]
                    yield index, first
