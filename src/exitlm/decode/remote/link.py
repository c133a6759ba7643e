"""A link: frames over a connected socket, plain or encrypted, that one end reads without ever waiting.

A link never trusts what comes: a frame that is none, or too large, closes it (:class:`~frames.BadFrame`), and the end
of the connection is :class:`Closed`. Nobody reads a link from two threads.
"""

from __future__ import annotations

import json
import math
import select
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from exitlm.decode.remote.frames import HEADER, MAX_FRAME, BadFrame, Frame, Kind, Size, decode, encode, read_header

SAID = 1 << 20  # bytes that are taken of a peer that has not proven who it is
_JOINED = 1 << 16  # a frame of fewer bytes is sent in one piece


class Closed(Exception):
    """The other end is gone."""


class Late(Closed):
    """The other end did not read or write in time."""


class Link:
    """Frames to and from ``peer``, which is its name in words. At first it takes small ones; see :meth:`trust`."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        connection.setblocking(False)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self.peer, self._limit = connection, peer, SAID
        self._inbox, self._got = bytearray(_JOINED), 0  # bytes that belong to no frame yet
        self._size: Size | None = None  # of the frame that comes, and what has come of it
        self._payload, self._have = bytearray(), 0

    def fileno(self) -> int:
        """For ``select``."""
        return self._socket.fileno()

    def trust(self, limit: int = MAX_FRAME) -> None:
        """Take frames of so many bytes from now on."""
        self._limit = min(limit, MAX_FRAME)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    # ---- out

    def send(self, frame: Frame, timeout: float = 60.0) -> None:
        """Send a frame.

        Raises:
            Closed: the other end is gone, or did not read in time.
        """
        pieces, until = encode(frame), time.monotonic() + timeout
        if sum(len(piece) for piece in pieces) < _JOINED:
            pieces = [b"".join(pieces)]
        try:
            for piece in pieces:
                left = memoryview(piece)
                while left:
                    left = left[self._send_some(left, until) :]
        except (OSError, ValueError) as error:  # ValueError: closed by us
            raise Closed(f"the link to {self.peer} broke ({_reason(error)})") from error

    def _send_some(self, data: memoryview, until: float) -> int:
        while True:
            try:
                return self._socket.send(data)
            except ssl.SSLWantReadError:
                self._wait([self._socket], [], until)
            except (BlockingIOError, ssl.SSLWantWriteError):
                self._wait([], [self._socket], until)

    def say(self, **words: Any) -> None:
        """Send a JSON object."""
        data = np.frombuffer(json.dumps(words).encode(), np.uint8).copy()
        self.send(Frame(Kind.TEXT, tensors=[torch.from_numpy(data)]))

    # ---- in

    def poll(self) -> Frame | None:
        """The next frame if it is there whole; None else.

        Raises:
            Closed: the other end is gone.
            BadFrame: what came is no frame.
        """
        try:
            while True:
                if self._size is None and self._got >= HEADER.size:
                    self._begin()
                if self._size is not None and self._have == self._size.payload:
                    frame, self._size = decode(self._size, self._payload), None
                    return frame
                if self._size is None:
                    self._got += self._some(memoryview(self._inbox)[self._got :])
                else:
                    self._have += self._some(memoryview(self._payload)[self._have :])
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except (OSError, ValueError) as error:
            raise Closed(f"the link to {self.peer} broke ({_reason(error)})") from error

    def _begin(self) -> None:
        """A header is there: what follows it in the inbox belongs to the frame, as far as that goes."""
        self._size = read_header(memoryview(self._inbox)[: HEADER.size], self._limit)
        self._payload = bytearray(self._size.payload)
        self._have = min(self._got - HEADER.size, self._size.payload)
        end = HEADER.size + self._have
        self._payload[: self._have] = self._inbox[HEADER.size : end]
        left = self._got - end
        if left:
            self._inbox[:left] = self._inbox[end : self._got]
        self._got = left

    def _some(self, place: memoryview) -> int:
        count = self._socket.recv_into(place)
        if not count:
            raise Closed(f"{self.peer} ended")
        return count

    def receive(self, timeout: float | None = None) -> Frame:
        """Wait for the next frame.

        Raises:
            Closed: the other end is gone, or nothing came in ``timeout`` seconds (None: for ever).
            BadFrame: what came is no frame.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while (frame := self.poll()) is None:
            self._wait([self._socket], [], until)
        return frame

    def hear(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for a JSON object. Raises as :meth:`receive` does."""
        return words_of(self.receive(timeout))

    def _wait(self, reads: list[socket.socket], writes: list[socket.socket], until: float | None) -> None:
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            raise Late(f"{self.peer} did not answer in time")
        if not ready([each.fileno() for each in reads], [each.fileno() for each in writes], left):
            raise Late(f"{self.peer} did not answer in time")


def ready(reads: Sequence[int], writes: Sequence[int], timeout: float | None) -> list[int]:
    """Which of these file descriptors can be read from or written to, within ``timeout`` seconds (None: for ever);
    however high their numbers are, where the system has ``poll``."""
    if not hasattr(select, "poll"):
        found = select.select(reads, writes, [], timeout)
        return [*found[0], *found[1]]
    poll = select.poll()
    for number in reads:
        poll.register(number, select.POLLIN)
    for number in writes:
        poll.register(number, select.POLLOUT)
    return [number for number, _ in poll.poll(None if timeout is None else math.ceil(timeout * 1000))]


def words_of(frame: Frame) -> dict[str, Any]:
    """The JSON object in a frame. Raises :class:`BadFrame` where there is none."""
    if frame.kind not in (Kind.TEXT, Kind.FAILED) or len(frame.tensors) != 1:
        raise BadFrame("something else came than was to be said")
    try:
        found = json.loads(bytes(frame.tensors[0].numpy()))
    except (ValueError, RecursionError, TypeError) as error:
        raise BadFrame("what came is no JSON object") from error
    if not isinstance(found, dict):
        raise BadFrame("what came is no JSON object")
    return found


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
