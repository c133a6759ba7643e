"""A small server with OpenAI's interface on a port of this machine, which answers what a test tells it. Not a test."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A request that came in; ``body`` is None for one without."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any] | None


@dataclass(frozen=True)
class Answer:
    """What goes back: one object, or ``chunks`` of bytes of a stream, each sent when the one before is out. A stream
    that is ``cut`` ends without saying so."""

    status: int = 200
    body: Any = None
    chunks: Iterable[bytes] | None = None
    cut: bool = False


@dataclass
class MockServer:
    """Its address, what it was asked, and how it answers."""

    url: str
    answer: Callable[[Asked], Answer]
    asked: list[Asked] = field(default_factory=list)

    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of the requests that had one."""
        return [asked.body for asked in self.asked if asked.body is not None]


def events(*objects: Any, done: bool = True) -> bytes:
    """Objects as server-sent events."""
    found = [f"data: {json.dumps(one)}\n\n" for one in objects]
    return "".join([*found, *(["data: [DONE]\n\n"] if done else [])]).encode()


def said(text: str, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    """A chunk of a chat's answer."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason, **more}]}


def usage(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    """The last chunk, which counts tokens."""
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion, **more}}


@contextmanager
def serving(answer: Callable[[Asked], Answer]) -> Iterator[MockServer]:
    """A server that runs within the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length)
            asked = Asked(self.path, dict(self.headers), json.loads(raw) if raw else None)
            server.asked.append(asked)
            found = server.answer(asked)
            self.send_response(found.status)
            if found.chunks is None:
                body = found.body if isinstance(found.body, bytes) else json.dumps(found.body).encode()
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for chunk in found.chunks:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
                self.wfile.flush()
            if found.cut:
                self.close_connection = True
                return
            self.wfile.write(b"0\r\n\r\n")

        do_GET = do_POST = _handle

        def log_message(self, format: str, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = MockServer(f"http://127.0.0.1:{httpd.server_address[1]}", answer)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
