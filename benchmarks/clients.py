"""Clients of an HTTP server, all at once, in a process of their own: they take as little of the processor as they can.

A run is a line of JSON on standard input, its answer a line on standard output. Connections are open before the time
begins. What comes is kept as it came and read when the last answer is complete; that of a stream is counted by event.
"""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAIT = 600.0  # seconds without any byte


@dataclass(frozen=True, kw_only=True)
class Answer:
    """``first`` and ``end``: seconds from the first request of all to this answer's first byte and to its last.
    ``tokens`` that the server counted, and the ``events`` of a stream."""

    first: float
    end: float
    tokens: int
    events: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """The answers of all clients, the ``seconds`` of all of them, and of the clients' own processor time."""

    answers: list[Answer]
    seconds: float
    cpu: float

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(answer.tokens for answer in self.answers)


class Clients:
    """The process of the clients, which sleeps between runs."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "import clients; clients.main()"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
        )

    def run(self, port: int, path: str, bodies: Sequence[dict[str, Any]]) -> Run:
        """Send each body as one client, all at the same time, and wait for all answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([port, path, list(bodies)]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the clients failed")
        found = json.loads(line)
        return Run(answers=[Answer(**each) for each in found.pop("answers")], **found)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def main() -> None:
    """Runs, until standard input ends."""
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)


def run(port: int, path: str, bodies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One run, as the fields of :class:`Run`."""
    with selectors.DefaultSelector() as selector:
        sockets = []
        for number in range(len(bodies)):
            sockets.append(socket.create_connection(("127.0.0.1", port)))
            sockets[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(sockets[-1], selectors.EVENT_READ, number)
        time.sleep(0.05)  # the server has accepted all of them
        sent = [_request(port, path, body) for body in bodies]
        parts: list[list[bytes]] = [[] for _ in bodies]
        first, end, left = [0.0] * len(bodies), [0.0] * len(bodies), len(bodies)
        begin, cpu = time.perf_counter(), time.process_time()
        for connection, request in zip(sockets, sent, strict=True):
            connection.sendall(request)
        while left:
            ready = selector.select(WAIT)
            if not ready:
                raise SystemExit(f"no byte for {WAIT:g} seconds")
            now = time.perf_counter() - begin
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                found = key.fileobj.recv(1 << 16)
                if not found:
                    selector.unregister(key.fileobj)
                    end[key.data], left = now, left - 1
                elif not parts[key.data]:
                    first[key.data] = now
                parts[key.data].append(found)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        for connection in sockets:
            connection.close()
    answers = [{"first": f, "end": e, **_read(b"".join(each))} for f, e, each in zip(first, end, parts, strict=True)]
    return {"answers": answers, "seconds": seconds, "cpu": cpu}


def _request(port: int, path: str, body: dict[str, Any]) -> bytes:
    """A whole request; the server closes the connection after its answer."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def _read(answer: bytes) -> dict[str, int]:
    """Tokens and events of a whole answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise SystemExit(f"the server refused a request: {answer[:500].decode(errors='replace')}")
    if b"chunked" in head.lower():
        body = _joined(body)
    if b"text/event-stream" not in head.lower():
        return {"tokens": json.loads(body)["usage"]["completion_tokens"], "events": 0}
    tokens = events = 0
    for event in body.split(b"\n\n"):
        if event.startswith(b"data: {"):
            found = json.loads(event[6:])
            events += bool(found["choices"]) and bool(found["choices"][0]["delta"].get("content"))
            tokens = (found.get("usage") or {}).get("completion_tokens", tokens)
    return {"tokens": tokens, "events": events}


def _joined(body: bytes) -> bytes:
    """A body that came in chunks."""
    parts: list[bytes] = []
    while True:
        size, _, rest = body.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        if not length:
            return b"".join(parts)
        parts.append(rest[:length])
        body = rest[length + 2 :]
