"""One client's connection: uvicorn's, with deadlines for a client that falls silent or reads nothing, and with refusals
in OpenAI's shape for what is not HTTP.

Such a client would hold its socket, its buffers and what an answer needs for as long as it likes.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from exitlm.serve.config import LimitsConfig
from exitlm.serve.errors import ApiError

LINGER = 2.0  # seconds for a refused client to end what it sends; its answer would be lost if the socket closed at once


class Connection(H11Protocol):
    """A request's head, and a body that nobody wants any more, have ``read_timeout`` to arrive. What waits to be
    written has twice ``write_timeout``, so that an answer which gives up by itself says so first."""

    def __init__(self, *given: Any, limits: LimitsConfig, **more: Any) -> None:
        super().__init__(*given, **more)
        self._limits, self._refused, self._begun = limits, False, False
        self._silent: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The head of the first request is awaited."""
        super().connection_made(transport)
        self._watch_silence()

    def connection_lost(self, exc: Exception | None) -> None:
        """No deadline is left."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for timer in (self._silent, self._unread):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; those of a client that was refused are dropped."""
        if self._refused:
            return
        self._begun = True
        super().data_received(data)
        self._watch_silence()

    def _watch_silence(self) -> None:
        """Begin or end the deadline of what the client has to send. The body of a request that is being answered has
        one of its own, in ``guard.py``; between two requests there is that of a connection that is kept."""
        theirs = self.conn.their_state
        awaited = theirs is h11.IDLE or (theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE)
        if not awaited or self.timeout_keep_alive_task is not None:
            if self._silent is not None:
                self._silent.cancel()
                self._silent = None
        elif self._silent is None:
            self._silent = self.loop.call_later(self._limits.read_timeout, self._fell_silent)

    def _fell_silent(self) -> None:
        if self.conn.their_state is h11.IDLE and self._begun:
            said = f"the request did not arrive within {self._limits.read_timeout:g} seconds; send it again"
            self._refuse(ApiError(408, said))
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        """The client is slow: it has a deadline to read what waits for it."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(2 * self._limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def on_response_complete(self) -> None:
        """A connection that closes does so even if its last answer is not read."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # of a request that was refused before all of it was there
            self._unset_keepalive_if_required()
            self._watch_silence()
        if self.transport.is_closing():
            self.loop.call_later(2 * self._limits.write_timeout, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection without requests, even if its last answer is not read."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, called where h11 has found that."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        said = "the request is not valid HTTP/1.1; send it again with a client that speaks it"
        if status == 431:
            said = "the request's headers are too large; send fewer"
        self._refuse(ApiError(status if 400 <= status < 500 else 400, said))

    def _refuse(self, error: ApiError) -> None:
        """Answer without an application, and close when the client had time to read that."""
        self._refused = True
        self.flow.resume_reading()
        if self.cycle is not None and not self.cycle.response_complete:  # for its application the client has left
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is being written
            self.transport.close()
            return
        body = error.body()
        headers = [
            (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]  # fmt: skip
        response = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(min(LINGER, self._limits.read_timeout), self.transport.abort)
