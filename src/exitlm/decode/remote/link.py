"""A link: frames over a connected socket, plain or encrypted, that one end reads without ever waiting.

A link never trusts what comes: a frame that is none, or too large, closes it (:class:`~frames.BadFrame`), and the end
of the connection is :class:`Closed`. Nobody reads a link from two threads.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import time
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
        self._buffer, self._have, self._size = bytearray(HEADER.size), 0, None

    _size: Size | None

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
                if self._have < len(self._buffer):
                    got = self._socket.recv_into(memoryview(self._buffer)[self._have :])
                    if not got:
                        raise Closed(f"{self.peer} ended")
                    self._have += got
                    if self._have < len(self._buffer):
                        continue
                if self._size is None:
                    self._size, self._have = read_header(self._buffer, self._limit), 0
                    self._buffer = bytearray(self._size.payload)
                    continue
                frame = decode(self._size, self._buffer)
                self._buffer, self._have, self._size = bytearray(HEADER.size), 0, None
                return frame
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except (OSError, ValueError) as error:
            raise Closed(f"the link to {self.peer} broke ({_reason(error)})") from error

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
        if left is not None and (left <= 0 or not any(select.select(reads, writes, [], left)[:2])):
            raise Late(f"{self.peer} did not answer in time")
        if left is None:
            select.select(reads, writes, [])


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
