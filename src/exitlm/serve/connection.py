"""A connection as uvicorn has it, with limits for a client that sends too much, falls silent or reads nothing.

httptools parses; h11, which uvicorn takes without it, needs several times as long for each piece of a stream. Bodies
are the guard's business, up to the answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from exitlm.serve.errors import ApiError

HEAD_BYTES = 64 * 1024
HEADERS = 256  # each takes some hundred bytes, however short it is
LINGER = 2.0  # seconds that a refused client has to read why; a socket that closes at once loses what it has written
CONNECTION = "exitlm.connection"  # the extension of an ASGI scope under which a connection is found


class Connection(HttpToolsProtocol):
    """One client. A head that is too large, too slow or no HTTP is refused in OpenAI's shape, and ends the connection.

    What waits to be written has twice ``write_timeout``, so that a stream which gives up by itself says so first.
    """

    read_timeout = 30.0  # seconds for a head, or for the rest of a body that was refused
    write_timeout = 60.0

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._head_bytes, self._headers, self._in_head, self._in_body, self._is_refused = 0, 0, True, False, False
        self._silence: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client that asks nothing is not kept either."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._heard()
        self._read()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    # ---- what the client sends

    def data_received(self, data: bytes) -> None:
        """Some bytes, of which those before a body are counted."""
        if self._is_refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and not self._is_refused:
            self._check_head()
        self._watch()

    def _check_head(self) -> bool:
        """Refuse a head that is too large; whether it is not."""
        if self._headers > HEADERS:
            self._refuse(ApiError(431, f"the request has more than {HEADERS} headers; send fewer"))
        elif self._head_bytes > HEAD_BYTES:
            self._refuse(ApiError(431, f"the head of the request is larger than {HEAD_BYTES} bytes; send less"))
        return not self._is_refused

    def on_message_begin(self) -> None:
        """A request begins."""
        if not self._in_head:
            self._in_head, self._head_bytes = True, 0
        self._headers = 0
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its headers; those beyond the limit are only counted."""
        self._headers += 1
        if self._headers <= HEADERS:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Its head is there."""
        if self._headers > HEADERS and not self._is_refused:
            self._check_head()
        if self._is_refused:
            return
        self._in_head, self._in_body = False, True
        self._heard()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """All of it is there."""
        if self._is_refused:
            return
        self._in_body = False
        self._heard()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request was answered, perhaps before all of it was there."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._await_reading()
        elif self._in_body and self.cycle.response_complete:
            self._unset_keepalive_if_required()
            self._watch()

    def _watch(self) -> None:
        """Begin the deadline of what the client has to send, unless it runs. While a request is answered there is none
        (its body has one in ``guard.py``), and between requests it is uvicorn's."""
        answered = self.cycle is None or self.cycle.response_complete
        if self._silence is None and (self._in_head or (answered and self.timeout_keep_alive_task is None)):
            self._silence = self.loop.call_later(self.read_timeout, self._is_late)

    def _heard(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None

    def _is_late(self) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            said = f"the head of the request took over {self.read_timeout:g} seconds; send it again"
            self._refuse(ApiError(408, said))
        else:
            self.transport.abort()

    # ---- what the client reads

    def pause_writing(self) -> None:
        """The client is slow."""
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._read()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection without requests, even if its last answer is not read."""
        super().timeout_keep_alive_handler()
        self._await_reading()

    def _await_reading(self) -> None:
        if self._unread is None:
            self._unread = self.loop.call_later(2 * self.write_timeout, self.transport.abort)

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    # ---- refusals

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP."""
        self._refuse(ApiError(400, "what was sent is not an HTTP/1.1 request; check the client, and use http://"))

    def _refuse(self, refusal: ApiError) -> None:
        """Say why, unless an answer is being written; drop what else comes, and close."""
        self._is_refused = True
        self.flow.resume_reading()
        self.pipeline.clear()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:  # for its application, the client has left
            cycle.disconnected = True
            cycle.message_event.set()
        if cycle is None or cycle.response_complete or not cycle.response_started:
            body = refusal.body()
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(STATUS_LINE[refusal.status] + head + body)
        self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.abort)


def connections(read_timeout: float, write_timeout: float) -> type[Connection]:
    """Connections with these limits in seconds, as uvicorn makes them."""
    return type("Connection", (Connection,), {"read_timeout": read_timeout, "write_timeout": write_timeout})
