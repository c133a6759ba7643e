"""Clients that know no manners: raw sockets, what they send, and what is left of them on the server. Not a test."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.serve.conftest import Served

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI: Any = [{"role": "user", "content": "hi"}]
PATIENCE = 60.0  # seconds after which a test is sure that something does not come any more


def wait_for(true: Callable[[], Any], what: str = "", patience: float = PATIENCE) -> None:
    """Wait until something is true, and fail where it does not become so."""
    until = time.monotonic() + patience
    while not true():
        assert time.monotonic() < until, f"still not after {patience:g} seconds: {what or true}"
        time.sleep(0.01)


def request(path: str, body: Any = None, *, method: str = "POST", headers: str = "") -> bytes:
    """The bytes of a request; ``body`` is JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def connect(served: Served, *, receives: int | None = None) -> socket.socket:
    """A connection. ``receives``: bytes that the kernel takes for a client who does not read."""
    host, port = served.url.removeprefix("http://").split(":")
    found = socket.socket()
    if receives is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
    found.settimeout(PATIENCE)
    found.connect((host, int(port)))
    return found


def reset(connection: socket.socket) -> None:
    """Close a connection as a program that dies does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@dataclass
class Answer:
    """A response. ``status`` is 0 where the server closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    def refusal(self) -> dict[str, Any]:
        """The error object, which must have OpenAI's shape."""
        assert self.headers["content-type"] == "application/json", self
        error: dict[str, Any] = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert isinstance(error["type"], str)
        assert "\n" not in error["message"]
        return error


def read_answer(connection: socket.socket) -> Answer:
    """The next response on a connection."""
    response = http.client.HTTPResponse(connection)
    try:
        response.begin()
    except (http.client.BadStatusLine, ConnectionError):
        return Answer(0, {}, b"")
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def ask(served: Served, content: bytes) -> Answer:
    """Send bytes on a connection of their own, and read what comes."""
    with connect(served) as connection:
        with contextlib.suppress(ConnectionError):  # it may be refused before all of it is sent
            connection.sendall(content)
        return read_answer(connection)


def answers(served: Served, tokens: int = 4) -> None:
    """A client with manners is answered."""
    found = ask(served, request(TEXT, {"prompt": "x", "max_tokens": tokens, "ignore_eos": True}))
    assert found.status == 200, found
    assert json.loads(found.body)["usage"]["completion_tokens"] == tokens


def engine_of(served: Served) -> Any:
    """The engine for asyncio."""
    assert served.server.state.service is not None
    return served.server.state.service.engine


def connections(served: Served) -> int:
    """How many connections the server holds."""
    return len(served.server.server_state.connections)


def is_idle(served: Served) -> bool:
    """Whether no request has left anything behind: no text, block, slot, event, task or connection."""
    engine = engine_of(served).engine
    return not (
        engine_of(served).live or engine.roster.running or engine.roster.waiting or engine._sinks
        or engine_of(served)._texts or served.used_blocks or served.server.server_state.tasks or connections(served)
    )  # fmt: skip


def wait_until_idle(served: Served) -> None:
    """Wait for what clients have left behind to be cleared."""
    wait_for(lambda: is_idle(served), "requests leave nothing behind")


def resident(pid: int | str = "self") -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def objects() -> int:
    """How many objects Python holds."""
    gc.collect()
    return len(gc.get_objects())
