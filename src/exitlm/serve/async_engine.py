"""The engine for asyncio: one thread steps it, and coroutines wait for what the steps bring.

```
event loop:      submit ──────────────┐             ┌──> events of a submission, in batches
                                orders│             │one call_soon_threadsafe for all events of a step
engine's thread:                      └──> advance ─┘
```
The event loop never waits for a pass. A coroutine that is cancelled aborts its texts, and their blocks are free after
the pass that runs. A pass that breaks ends all texts by an error; the thread goes on for those to come. Knows nothing
of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Protocol, Unpack

from exitlm.decode.engine import Engine
from exitlm.decode.generation import Generation, GenerationConfig, Piece
from exitlm.decode.prompts import Prompt
from exitlm.decode.requests import configs_of
from exitlm.decode.settings import GenerationSettings
from exitlm.decode.streams import Event
from exitlm.errors import UserError
from exitlm.values import whole

MAX_BROKEN_STEPS = 3  # in a row: then the engine is taken for broken
_TEND = 1.0  # seconds from one look after an idle engine to the next
_LONG_TEXT = 4096  # characters: a prompt from here on is encoded in another thread

Request = tuple[Sequence[int], GenerationConfig]
"""Token ids of a prompt, and settings."""
Happened = tuple[int, int, Event]
"""The prompt's index within its submission, the choice, and what a step brought to it."""

log = logging.getLogger("exitlm.engine")


class Full(UserError):
    """Too many texts wait already. ``retry_after``: seconds after which there should be room."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Expired(UserError):
    """A submission was not done by its deadline."""


class Broken(RuntimeError):
    """A pass of the engine broke off, or the engine was closed, while the text was decoded."""


class Source(Protocol):
    """What holds a model and its engine: an :class:`exitlm.LLM`."""

    @property
    def engine(self) -> Engine:
        """The decoding engine."""

    def encode(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """The token ids of a prompt."""


@dataclass(slots=True)
class Text:
    """One text of a submission, as the engine's thread sees it; times are of ``time.monotonic``. ``first`` and ``last``
    are those of its tokens, 0 before there are any."""

    submission: Submission
    index: int
    choice: int
    arrived: float
    first: float = 0.0
    last: float = 0.0


class Observer(Protocol):
    """Who is told what steps bring. All but :meth:`refused` is called in the engine's thread, and must be quick."""

    def piece(self, text: Text, piece: Piece, now: float) -> None:
        """Tokens of a text are there; ``text.last`` is still the time of those before."""

    def ended(self, text: Text, generation: Generation | None, now: float) -> None:
        """A text has ended, by an error or an abort where there is no generation."""

    def refused(self, texts: int) -> None:
        """Texts were not let in because too many wait."""


class Submission:
    """Some texts that were submitted together, and the events that have come for them. It belongs to one event loop."""

    def __init__(self, engine: AsyncEngine, requests: Sequence[Request], streams: bool, expires: float | None) -> None:
        """``streams``: events come with every step, and not only when a text has ended. ``expires``: the seconds left,
        by an event loop's clock."""
        self.requests, self.streams = requests, streams
        self.left = self.texts = sum(config.n for _, config in requests)
        self.arrived = time.monotonic()
        self.keys: list[int] = []  # the engine thread's
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._events: list[Happened] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._taker: Callable[[list[Happened]], bool] | None = None
        self._timer = None if expires is None else self._loop.call_later(expires, self._expire, expires)

    async def batches(self) -> AsyncGenerator[list[Happened], None]:
        """What has come since the last time, at least one event each time, until all texts have ended. The error of one
        text is raised, and ends the others; so does the end of this iterator.

        Raises:
            UserError: a prompt or settings that can't be met, or a text that can't go on; :class:`Expired`.
            Broken: a pass broke off.
            PipelineDown: a stage was lost and can't be replaced.
        """
        try:
            while self.left:
                if not self._events and self._error is None:
                    self._waiter = self._loop.create_future()
                    await self._waiter
                if self._events:
                    found, self._events = self._events, []
                    self.left -= sum(event.last for _, _, event in found)
                    yield found
                if self._error is not None:
                    raise self._error
        finally:
            self.close()

    def take_at_once(self, taker: Callable[[list[Happened]], bool] | None) -> None:
        """Offer events to ``taker`` as they come, in the event loop's own turn, before they wait for :meth:`batches`:
        that saves the turn of a task. It says whether it took them."""
        self._taker = taker

    def close(self) -> None:
        """Drop what has not ended."""
        self._taker = None
        if self._timer is not None:
            self._timer.cancel()
        if self.left:
            self.left = 0
            self._engine._order(self._engine._drop, self)

    def fail(self, error: Exception) -> None:
        """End all texts by an error."""
        self._note(error)
        self._tell()

    def _note(self, happened: Happened | Exception) -> None:
        """Something has come, or what ends all texts."""
        if isinstance(happened, Exception):
            self._error = self._error or happened
        elif happened[2].error is not None:
            self._error = self._error or happened[2].error
        else:
            self._events.append(happened)

    def _tell(self) -> None:
        """Hand out what has come."""
        if self._taker is not None and self._events and self._error is None:
            try:
                if self._taker(self._events):
                    self.left -= sum(event.last for _, _, event in self._events)
                    self._events = []
                    if self.left:
                        return
            except Exception as error:
                self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _expire(self, seconds: float) -> None:
        self.fail(Expired(f"the answer was not ready after {seconds:g} seconds; ask for fewer tokens, or try later"))


class AsyncEngine:
    """Decodes for coroutines. ``async with`` starts and stops its thread.

    >>> async with exitlm.AsyncEngine(model) as engine:
    ...     found = await engine.generate("Once upon", max_new_tokens=64)
    ...     async for piece in engine.stream("Once upon"):
    ...         print(piece.text, end="")

    Any number of coroutines of one event loop may ask at once: their texts are decoded together, each as it would be
    alone. While it runs, the model may be used by other threads, too; its exits can't be changed.
    """

    def __init__(self, model: Source, *, max_waiting: int = 1024, observer: Observer | None = None) -> None:
        """``max_waiting``: texts that may wait beside those that are decoded together; more are refused by
        :class:`Full`."""
        self.model, self.engine, self.observer = model, model.engine, observer
        self.max_waiting = whole(max_waiting, "max_waiting", least=0)
        self.live = 0  # texts that were let in and have not ended
        self.broken_steps = 0  # in a row, the newest ones
        self._orders: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self._texts: dict[int, Text] = {}
        self._sink: deque[Event] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stops = False
        self._seconds = 1.0  # that a text takes, roughly

    # ---- in the event loop

    async def __aenter__(self) -> AsyncEngine:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def start(self) -> None:
        """Start the engine's thread. The event loop that runs is the one that is told of events."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name="exitlm-engine", daemon=True)
            self._thread.start()

    async def close(self) -> None:
        """End all texts by an error, and the thread after the pass that runs."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stops = True
            self._orders.put((None,))
            await asyncio.to_thread(thread.join)

    @property
    def is_broken(self) -> bool:
        """Whether the last passes all broke off, or a stage was lost that could not be replaced."""
        return self.broken_steps >= MAX_BROKEN_STEPS or self.engine.is_down

    def submit(self, requests: Sequence[Request], *, streams: bool, deadline: float | None = None) -> Submission:
        """Let texts be decoded; read :meth:`Submission.batches` to the end or :meth:`Submission.close` it.

        ``deadline``: seconds after which what is not done is dropped. Raises :class:`Full` where too many wait.
        """
        if self._thread is None:
            raise Broken("the engine does not run; use: async with exitlm.AsyncEngine(model) as engine")
        texts = sum(config.n for _, config in requests)
        if self.live + texts > self.engine.most + self.max_waiting:
            if self.observer is not None:
                self.observer.refused(texts)
            seconds = self._seconds * (1 + self.live / self.engine.most)
            raise Full(
                f"{self.live} texts are decoded or wait, and {texts} more would be too many "
                f"(at most {self.engine.most + self.max_waiting}); try again later",
                retry_after=max(1, min(60, round(seconds))),
            )
        submission = Submission(self, requests, streams, deadline)
        self.live += texts
        self._order(self._add, submission)
        return submission

    async def generate(
        self,
        prompt: Prompt,
        *,
        chat: bool = False,
        config: GenerationConfig | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> Generation:
        """Continue one prompt, as :meth:`exitlm.LLM.generate` does; use ``asyncio.gather`` for several."""
        request = await self._request(prompt, chat, config, settings)
        found: dict[int, Generation] = {}
        async for batch in self.submit([request], streams=False).batches():
            for _, choice, event in batch:
                assert event.generation is not None
                found[choice] = event.generation
        first = found[0]
        first.choices = [found[i] for i in range(len(found))] if len(found) > 1 else []
        return first

    async def stream(
        self,
        prompt: Prompt,
        *,
        chat: bool = False,
        config: GenerationConfig | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> AsyncIterator[Piece]:
        """As :meth:`generate`, in pieces as they become certain."""
        request = await self._request(prompt, chat, config, settings)
        submission = self.submit([request], streams=True)
        try:
            async for batch in submission.batches():
                for _, choice, event in batch:
                    if event.piece is not None:
                        event.piece.choice = choice
                        yield event.piece
        finally:
            submission.close()

    async def _request(self, prompt: Prompt, chat: bool, config: Any, settings: Any) -> Request:
        (chosen,) = configs_of(config, settings, None)
        ids = await self.encode(prompt, chat=chat)
        await self.prepare([chosen])
        return ids, chosen

    async def encode(self, prompt: Prompt, *, chat: bool = False) -> list[int]:
        """The token ids of a prompt; a long one does not keep the event loop."""
        if isinstance(prompt, str) and len(prompt) < _LONG_TEXT:
            return self.model.encode(prompt, chat=chat)
        return await asyncio.to_thread(self.model.encode, prompt, chat=chat)

    async def prepare(self, configs: Sequence[GenerationConfig]) -> None:
        """Compile the grammars of requests, which may take long, before they are submitted. Raises :class:`UserError`
        for one that can't be used."""
        for config in configs:
            if config.response_format is not None:
                await asyncio.to_thread(self.engine.intake.prepare, config)

    def _order(self, *order: Any) -> None:
        """Something for the engine's thread to do between two passes."""
        self._orders.put(order)

    def _deliver(self, batch: list[tuple[Submission, Happened | Exception]], gone: int) -> None:
        """Hand out what a step has brought; ``gone`` texts have left."""
        self.live -= gone
        told: dict[int, Submission] = {}
        for submission, happened in batch:
            submission._note(happened)
            told[id(submission)] = submission
        for submission in told.values():
            submission._tell()

    # ---- in the engine's thread

    def _run(self) -> None:
        """Orders, a pass, events; and again. Sleeps while there is nothing to decode."""
        while not self._stops:
            self._take_orders()
            if not self._texts:
                continue
            try:
                with self.engine.lock:
                    if not self._sink:  # else a pass of another thread has put something there
                        self.engine.advance()
                self.broken_steps = 0
            except BaseException as error:
                self.broken_steps += 1
                log.exception("a pass of the engine broke off; all texts end")
                self._end_all(Broken(f"the engine failed ({type(error).__name__}); the server's log says more"))
            if self._sink:
                self._hand_out()
        self._end_all(Broken("the engine was closed"))

    def _take_orders(self) -> None:
        try:
            order = self._orders.get(block=not self._texts, timeout=_TEND)
            while True:
                if order[0] is not None:
                    order[0](*order[1:])
                order = self._orders.get_nowait()
        except Empty:
            if not self._texts:
                self.engine.tend()

    def _add(self, submission: Submission) -> None:
        """Add all texts of a submission, or none of them."""
        texts: dict[int, Text] = {}
        try:
            with self.engine.lock:
                for index, (prompt, config) in enumerate(submission.requests):
                    for choice, key in enumerate(self.engine.add_choices(prompt, config, self._sink)):
                        texts[key] = Text(submission, index, choice, submission.arrived)
        except Exception as error:
            for key in texts:
                self.engine.abort(key)
            if not isinstance(error, UserError):
                log.exception("a request could not be added")
                error = Broken(f"the engine failed ({type(error).__name__}); the server's log says more")
            self._tell([(submission, error)], submission.texts)
            return
        submission.keys = list(texts)
        self._texts |= texts

    def _drop(self, submission: Submission) -> None:
        """Abort what is left of a submission."""
        gone = [key for key in submission.keys if key in self._texts]
        self._forget(gone)
        self._tell([], len(gone))

    def _forget(self, keys: Sequence[int]) -> None:
        now = time.monotonic()
        for key in keys:
            self.engine.abort(key)
            text = self._texts.pop(key)
            if self.observer is not None:
                self.observer.ended(text, None, now)
        if keys:  # what they brought in this step is for nobody
            dropped = set(keys)
            kept = [event for event in self._sink if event.key not in dropped]
            self._sink.clear()
            self._sink.extend(kept)

    def _end_all(self, error: Exception) -> None:
        submissions = {id(text.submission): text.submission for text in self._texts.values()}
        gone = list(self._texts)
        self._forget(gone)
        self._tell([(submission, error) for submission in submissions.values()], len(gone))

    def _hand_out(self) -> None:
        """Send the events of a step to the event loop, in one call."""
        now, observer = time.monotonic(), self.observer
        batch: list[tuple[Submission, Happened | Exception]] = []
        gone = 0
        while self._sink:
            event = self._sink.popleft()
            text = self._texts.get(event.key)
            if text is None:
                continue
            if event.piece is not None and event.piece.tokens:
                if observer is not None:
                    observer.piece(text, event.piece, now)
                text.first, text.last = text.first or now, now
            if event.last:
                gone += 1
                del self._texts[event.key]
                if event.generation is not None:
                    self._seconds += 0.1 * (now - text.arrived - self._seconds)
                if observer is not None:
                    observer.ended(text, event.generation, now)
            if event.last or text.submission.streams:
                batch.append((text.submission, (text.index, text.choice, event)))
        if batch:
            self._tell(batch, gone)

    def _tell(self, batch: list[tuple[Submission, Happened | Exception]], gone: int) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._deliver, batch, gone)
        except RuntimeError:  # the event loop is closed, and nobody is left to be told
            self._stops = True
