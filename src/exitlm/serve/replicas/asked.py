"""A request as one value that can be sent to another process, and its answer by an ASGI application there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from exitlm.serve.guard import Application, Message, Scope


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of HTTP. ``session`` is the key by which it is routed, None where any replica will do."""

    method: str = "GET"
    path: str = "/"
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    client: tuple[str, int] | None = None
    session: str | None = None

    def scope(self) -> Scope:
        """The request as ASGI describes it."""
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": self.method, "scheme": "http", "path": self.path, "raw_path": self.path.encode(),
            "query_string": self.query, "root_path": "", "headers": list(self.headers), "client": self.client,
            "server": None,
        }  # fmt: skip


async def answer(app: Application, asked: Asked) -> AsyncGenerator[list[Message], None]:
    """The messages by which ``app`` answers, at least one each time: all that have come since the last time.

    The application is cancelled when the iterator is closed, as it is when its client leaves. What it raises is raised.
    """
    messages: list[Message] = []
    news = asyncio.Event()
    body: list[Message] = [{"type": "http.request", "body": asked.body, "more_body": False}]

    async def receive() -> Message:
        if not body:
            await asyncio.Event().wait()  # a client that leaves is told by cancelling
        return body.pop()

    async def send(message: Message) -> None:
        messages.append(message)
        news.set()

    async def work() -> None:
        try:
            await app(asked.scope(), receive, send)
        finally:
            news.set()

    task = asyncio.create_task(work())
    try:
        while not task.done() or messages:
            await news.wait()
            news.clear()
            if messages:
                found, messages[:] = list(messages), []
                yield found
            if task.done():
                news.set()
        await task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
