"""A connection as uvicorn has it, with limits on the head of a request: its size, and how long it may take.

httptools parses; h11, which uvicorn takes without it, needs several times as long for each piece of a stream. Bodies
are the guard's business.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from exitlm.serve.errors import ApiError

HEAD_BYTES = 64 * 1024
CONNECTION = "exitlm.connection"  # the extension of an ASGI scope under which a connection is found


class Connection(HttpToolsProtocol):
    """One client. A head that is too large, too slow or no HTTP is refused in OpenAI's shape, and ends the
    connection."""

    head_timeout = 30.0  # seconds

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._head_bytes, self._in_head = 0, False
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client that asks nothing is not kept either."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes, of which those before a body are counted."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self._refuse(ApiError(431, f"the head of the request is larger than {HEAD_BYTES} bytes; send less"))

    def on_message_begin(self) -> None:
        """A request begins."""
        if not self._in_head:
            self._begin_head()
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        """Its head is there."""
        self._end_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP."""
        self._refuse(ApiError(400, "what was sent is not an HTTP/1.1 request; check the client, and use http://"))

    def _refuse(self, refusal: ApiError) -> None:
        body = refusal.body()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[refusal.status] + head + body)
        self.transport.close()

    def _begin_head(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._head_timer = self.loop.call_later(self.head_timeout, self._head_is_late)

    def _end_head(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if not self.transport.is_closing():
            self._refuse(
                ApiError(408, f"the head of the request took over {self.head_timeout:g} seconds; send it again")
            )


def connections(head_timeout: float) -> type[Connection]:
    """Connections with this limit in seconds, as uvicorn makes them."""
    return type("Connection", (Connection,), {"head_timeout": head_timeout})
