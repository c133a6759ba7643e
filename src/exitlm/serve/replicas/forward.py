"""The application in front of the replicas: it hands each request to one of them, and its answer to the client.

Every request is answered exactly once, whatever dies:

```
nothing of the answer has been sent    -> the request goes to another replica, up to TRIES in all
a stream has begun                     -> it ends by an event with an error, as any stream that breaks off
all of it has been sent                -> done
```
The head of an answer waits for the first bytes of its body, so that an answer in one piece is sent whole or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from exitlm.serve.errors import ApiError, ClientLeft, refusal_of
from exitlm.serve.guard import Application, Message, Receive, Scope, Send
from exitlm.serve.metrics import CONTENT_TYPE
from exitlm.serve.replicas.asked import Asked
from exitlm.serve.replicas.figures import joined
from exitlm.serve.replicas.session import session_of
from exitlm.serve.stream import broken_off

TRIES = 3  # replicas that a request is given to; one that kills them may not take all
POLL_TIMEOUT = 5.0  # seconds for /health and /metrics, which are asked by machines that can't wait
_PAUSE = 0.05  # seconds before a request is sent again; twice as long each time

Ask = Callable[[Asked], AsyncGenerator[list[Message], None]]
"""Sends a request to a replica; the messages of its answer."""

log = logging.getLogger("exitlm.serve")


class Forward:
    """An ASGI application. It expects the whole body in one message, as the guard before it sees to."""

    def __init__(
        self, ask: Ask, figures: Callable[[], Awaitable[Mapping[str, str]]], number: Callable[[], Awaitable[int]], *,
        deadline: float,
        lost: tuple[type[Exception], ...], full: tuple[type[Exception], ...],
    ) -> None:  # fmt: skip
        """``figures`` asks each replica for its ``/metrics``, ``number`` how many replicas run. ``deadline``: seconds
        to the first byte of an answer. ``lost``: what ``ask`` raises where the replica has died or can't be reached;
        ``full``: where too many requests wait."""
        self.ask, self.figures, self.number = ask, figures, number
        self.deadline, self.lost, self.full = deadline, lost, full
        self._untold: tuple[type[Exception], ...] = (TimeoutError, *lost)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close"})
        elif scope["path"] == "/health":  # not asked of a replica, where it would wait behind requests
            await self._health(send)
        elif scope["path"] == "/metrics":
            await self._metrics(send)
        else:
            await self._unless_left(receive, self._answer(await _asked(scope, receive), send))

    async def _unless_left(self, receive: Receive, answering: Any) -> None:
        """Answer, or stop answering when the client leaves."""
        tasks = [asyncio.create_task(answering), asyncio.create_task(_left(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ClientLeft("the client left")
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, asked: Asked, send: Send) -> None:
        try:
            async with asyncio.timeout(self.deadline) as limit:
                answer = Answer(send, asked.path, lambda: limit.reschedule(None))
                for attempt in range(TRIES):
                    if await self._is_answered(asked, answer):
                        return
                    await asyncio.sleep(_PAUSE * 2**attempt)
        except TimeoutError:
            said = f"no replica began to answer within {self.deadline:g} seconds; ask for fewer tokens, or try later"
            raise ApiError(504, said, code="deadline_exceeded") from None
        raise ApiError(
            503, f"{TRIES} replicas that had this request died one after the other; try again later",
            code="replica_lost", headers={"retry-after": "1"},
        )  # fmt: skip

    async def _is_answered(self, asked: Asked, answer: Answer) -> bool:
        """Try one replica; whether the client has its answer."""
        refusal = ApiError(503, "the replica that wrote this answer died; ask again", code="replica_lost")
        try:
            async with contextlib.aclosing(self.ask(asked)) as batches:
                async for batch in batches:
                    for message in batch:
                        await answer.take(message)
        except self.full:
            said = "too many requests wait for a replica; try again later"
            raise ApiError(429, said, code="queue_full", headers={"retry-after": "1"}) from None
        except self.lost as error:
            log.warning(json.dumps({"event": "replica lost", "begun": answer.begun, "error": str(error)[:200]}))
        except Exception as error:
            if not answer.begun:
                raise
            log.exception("an answer broke off")
            refusal = refusal_of(error)
        if answer.begun and not answer.ended:
            await answer.break_off(refusal)
        return answer.begun

    async def _health(self, send: Send) -> None:
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                runs = await self.number() > 0
        except self._untold:  # of who keeps count; replicas answer all the same
            runs = True
        said = {"status": "ok" if runs else "no replica"}
        await _whole(send, 200 if runs else 503, "application/json", json.dumps(said).encode())

    async def _metrics(self, send: Send) -> None:
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                texts = await self.figures()
        except self._untold:
            raise ApiError(503, "not every replica told its figures in time; ask again") from None
        await _whole(send, 200, CONTENT_TYPE, joined(texts).encode())


def mounted(app: Application) -> Application:
    """``app`` behind a proxy that tells a request's id by itself, and that may have put it below a path."""

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        if scope.get("root_path") and scope["path"].startswith(scope["root_path"]):
            scope = {**scope, "path": scope["path"].removeprefix(scope["root_path"]) or "/", "root_path": ""}
        await app(scope, receive, answer)

    return inner


class Answer:
    """What a client has been sent of its answer: ``begun`` and ``ended``. An answer that has not begun forgets what a
    replica said of it when the next one starts."""

    def __init__(self, send: Send, path: str, begins: Callable[[], None]) -> None:
        """``begins`` is called before the first byte is sent."""
        self.begun = self.ended = False
        self._send, self._path, self._begins = send, path, begins
        self._head: Message = {}
        self._events = 0  # of a stream

    async def take(self, message: Message) -> None:
        """A message of a replica's application."""
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
            self._head = {**message, "headers": headers}  # the guard has named the request before
        elif message["type"] == "http.response.body":
            await self._body(message.get("body", b""), bool(message.get("more_body")))

    async def break_off(self, refusal: ApiError) -> None:
        """End a stream that has begun by an error. Raises it where the answer is none: its connection is cut then."""
        kinds = dict(self._head["headers"])
        if not kinds.get(b"content-type", b"").startswith(b"text/event-stream"):
            raise refusal
        await self._body(self._last_event(refusal), False)

    async def _body(self, body: bytes, more: bool) -> None:
        if not self.begun:
            if more and not body:
                return
            self.begun = True
            self._begins()
            await self._send(self._head)
        self._events += body.count(b"\n\n")
        self.ended = not more
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    def _last_event(self, refusal: ApiError) -> bytes:
        if self._path != "/v1/responses":
            return broken_off(refusal)
        said = {
            "type": "error", "code": refusal.code, "message": refusal.message, "param": None,
            "sequence_number": self._events,
        }  # fmt: skip
        return b"event: error\ndata: " + json.dumps(said).encode() + b"\n\n"


async def _asked(scope: Scope, receive: Receive) -> Asked:
    body = b"" if scope["method"] not in ("POST", "PUT", "PATCH") else (await receive()).get("body", b"")
    headers: list[tuple[bytes, bytes]] = [(n, v) for n, v in scope["headers"] if n.lower() != b"x-request-id"]
    name = scope.get("state", {}).get("request_id")
    if name is not None:
        headers.append((b"x-request-id", name.encode()))
    client = scope.get("client")
    return Asked(
        method=scope["method"], path=scope["path"], query=scope.get("query_string", b""), headers=tuple(headers),
        body=body, client=None if client is None else (client[0], client[1]), session=session_of(headers, body),
    )  # fmt: skip


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _whole(send: Send, status: int, kind: str, body: bytes) -> None:
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _live(receive: Receive, send: Send) -> None:
    """Start and end with the process; there is nothing to do for either."""
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})
