"""What every request passes before its endpoint: an id, the key, the limits of its body; and the line in the log.

A plain ASGI application around another one, so that nothing is added to the way of a streamed token but one call.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from itertools import accumulate
from typing import Any

from exitlm.serve.errors import ApiError, ClientLeft, refusal_of
from exitlm.serve.keys import Keys

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

GUARDED = ("/v1", "/api", "/tokenize", "/detokenize")
POLLED = ("/health", "/metrics")  # asked every few seconds: no line in the log unless they break
LONGEST_ID = 128
MAX_DEPTH = 100  # of objects and lists within each other; the time to compile a schema grows faster than its depth
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)
_STEPS = bytes(2 if byte in b"[{" else 0 if byte in b"]}" else 1 for byte in range(256))
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")

log = logging.getLogger("exitlm.serve")


class Guard:
    """``closed`` gives the refusal for guarded paths while the server loads or ends, else None."""

    def __init__(
        self, app: Application, *, keys: Keys, body_bytes: int, read_timeout: float, all_requests: bool,
        closed: Callable[[], ApiError | None],
    ) -> None:  # fmt: skip
        """``all_requests``: log those that went well, too."""
        self.app, self.keys, self.closed = app, keys, closed
        self.body_bytes, self.read_timeout, self.all_requests = body_bytes, read_timeout, all_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0
        headers: dict[bytes, bytes] = dict(scope["headers"])
        name = _request_id(headers.get(b"x-request-id"))
        facts: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=name, facts=facts)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        failure: BaseException | None = None
        try:
            await self.app(scope, await self._let_in(scope, headers, receive), answer)
        except asyncio.CancelledError:
            raise
        except ClientLeft as error:
            facts["ended"] = str(error)
        except Exception as error:
            failure = error
            if not isinstance(error, ApiError):
                log.exception("request %s failed", name)
            if not status:
                await _refuse(refusal_of(error), answer)
        finally:
            if failure is not None or (scope["path"] not in POLLED and (self.all_requests or status >= 500)):
                _log(scope, name, status, begun, facts)

    async def _let_in(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """The request's body, read whole; raises :class:`ApiError` for what is not let in."""
        path: str = scope["path"]
        if any(path == prefix or path.startswith(f"{prefix}/") for prefix in GUARDED):
            if not self.keys.opens(headers.get(b"authorization")):
                raise ApiError(
                    401, "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                    code="invalid_api_key", headers={"www-authenticate": "Bearer"},
                )  # fmt: skip
            if (refusal := self.closed()) is not None:
                raise refusal
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self.read_timeout):
                body = await self._body(receive)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self.read_timeout:g} seconds; send it again",
                headers={"connection": "close"},
            ) from None  # fmt: skip
        if depth(body) > MAX_DEPTH:
            said = f"the body has more than {MAX_DEPTH} objects or lists within each other; send a flatter one"
            raise ApiError(400, said, code="body_too_deep")
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return again

    async def _body(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft("the client left before its request was there")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.body_bytes:
                raise self._too_large()
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.body_bytes} bytes; send less", code="body_too_large")


def depth(body: bytes) -> int:
    """How many objects and lists of a JSON text lie within each other at most."""
    brackets = _STRING.sub(b"", body).translate(_STEPS, _NO_BRACKETS)
    return max(accumulate((step - 1 for step in brackets), initial=0))


async def _refuse(refusal: ApiError, send: Send) -> None:
    body = refusal.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(key.encode(), value.encode()) for key, value in refusal.headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _request_id(given: bytes | None) -> str:
    """The id that a client gave, if it is a word, else a new one."""
    if given and len(given) <= LONGEST_ID and all(33 <= byte < 127 for byte in given):
        return given.decode()
    return f"req_{secrets.token_hex(12)}"


def _log(scope: Scope, name: str, status: int, begun: float, facts: dict[str, Any]) -> None:
    """A line for a request. A client may ask for none (``quiet``), but not where the server failed."""
    if facts.pop("quiet", False) and status < 500:
        return
    client = scope.get("client")
    line = {
        "event": "request", "id": name, "method": scope["method"], "path": scope["path"], "status": status,
        "seconds": round(time.monotonic() - begun, 4), "client": client[0] if client else None, **facts,
    }  # fmt: skip
    level = logging.ERROR if status >= 500 and status != 503 else logging.INFO  # 503: it loads or ends, as it should
    log.log(level, json.dumps(line))
