"""Answers while they are written: server-sent events, and clients that leave before the end.

What has come for a client since its last write is written at once, so that a client who reads slowly gets more with
each write, and costs less. The JSON around a token's text is built once for an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Protocol

from starlette.responses import Response

from exitlm.serve.async_engine import Happened, Submission
from exitlm.serve.connection import CONNECTION, Connection
from exitlm.serve.errors import ClientLeft, refusal_of
from exitlm.serve.guard import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"

log = logging.getLogger("exitlm.serve")


class Writer(Protocol):
    """Turns events into the bytes of a stream."""

    def frames(self, batch: Sequence[Happened]) -> bytes:
        """The bytes for some events; none where there is nothing to tell yet."""

    def end(self) -> bytes:
        """What follows when all texts have ended."""


@contextlib.asynccontextmanager
async def watched(submission: Submission, receive: Callable[[], Awaitable[Any]]) -> AsyncIterator[None]:
    """Abort a submission when its client leaves, which ``receive`` tells; and in any case at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        submission.fail(ClientLeft("the client left"))

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        submission.close()


class EventStream(Response):
    """A streamed answer, as an ASGI application. The status is sent with the first event, so that what can't be met is
    refused as any other request is."""

    def __init__(
        self, submission: Submission, writer: Writer, *, write_timeout: float, headers: Sequence[tuple[bytes, bytes]],
        facts: dict[str, Any], finish: Callable[[], None],
    ) -> None:  # fmt: skip
        """``finish`` is called when all texts have ended."""
        self.submission, self.writer, self.write_timeout = submission, writer, write_timeout
        self._own_headers, self.facts, self.finish = headers, facts, finish
        self.background, self._writes_since = None, 0.0
        self._connection: Connection | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the events as they come."""
        self._connection = scope.get("extensions", {}).get(CONNECTION)
        try:
            async with asyncio.timeout(None) as limit:
                with self._giving_up(limit):
                    await self._stream(receive, send)
        except TimeoutError:
            self.facts["ended"] = "the client reads nothing"
            if self._connection is not None:
                self._connection.transport.abort()
        except ClientLeft as error:
            self.facts["ended"] = str(error)

    async def _stream(self, receive: Receive, send: Send) -> None:
        begun = False
        try:
            async with watched(self.submission, receive), contextlib.aclosing(self.submission.batches()) as batches:
                async for batch in batches:
                    if not begun:
                        begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": self._all_headers()})
                        if self._connection is not None:
                            self.submission.take_at_once(functools.partial(self._write_at_once, send))
                    frames = self.writer.frames(batch)
                    if frames:
                        await self._write(send, frames)
            self.finish()
            await self._write(send, self.writer.end() + DONE, more=False)
        except ClientLeft:
            raise
        except Exception as error:
            if not begun:
                raise
            refusal = refusal_of(error)
            if refusal.code == "internal_error":
                log.exception("a stream broke off")
            self.facts["error"] = refusal.message
            await self._write(send, b"data: " + refusal.body() + b"\n\n" + DONE, more=False)

    def _write_at_once(self, send: Send, batch: list[Happened]) -> bool:
        """Write events in the turn that brings them. False where that would have to wait for the client."""
        assert self._connection is not None
        if self._writes_since or self._connection.flow.write_paused:
            return False
        frames = self.writer.frames(batch)
        if not frames:
            return True
        writing = send({"type": "http.response.body", "body": frames, "more_body": True}).__await__()
        try:
            next(writing)
        except StopIteration:  # uvicorn's send waits for nothing but the client
            return True
        raise RuntimeError("a write waits, though the client reads")

    def _all_headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"), *self._own_headers,
        ]  # fmt: skip

    async def _write(self, send: Send, body: bytes, more: bool = True) -> None:
        self._writes_since = time.monotonic()
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self._writes_since = 0.0

    @contextlib.contextmanager
    def _giving_up(self, limit: asyncio.Timeout) -> Iterator[None]:
        """Let ``limit`` pass when a write has waited too long. It looks now and then, so that a write costs nothing."""
        loop, timer = asyncio.get_running_loop(), None

        def look() -> None:
            nonlocal timer
            if self._writes_since and time.monotonic() - self._writes_since >= self.write_timeout:
                limit.reschedule(loop.time())
            else:
                timer = loop.call_later(self.write_timeout / 2, look)

        look()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
