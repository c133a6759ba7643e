"""A server that answers as `exitlm serve` does, from scripts: the page's tests need no model.

The prompt's first word chooses what happens (see :mod:`tests.browser.scripts`); ``hold`` waits in mid-stream until the
test says so, ``cut`` sends its bytes one by one with other line ends, events of many lines and comments, ``broken``
closes without an end, ``failing`` sends an error as an event, ``untraced`` no trace, ``busy`` and ``wrong`` are
refused.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from exitlm.serve.playground import page, page_headers
from tests.browser.scripts import LAYERS, THRESHOLDS, answer, trace, usage

RULES = ["probability", "margin", "entropy", "gate", "patience", "fixed", "decay"]
EXITS = {
    "tiny": {
        "layers": LAYERS, "exits": [], "default_mode": "lossless", "modes": ["full", "lossless"], "rules": [],
        "exact": True,
    },
    "tiny:early": {
        "layers": LAYERS, "default_mode": "lossless", "modes": ["full", "threshold", "lossless"], "rules": RULES,
        "exits": [
            {"layer": layer, "kind": "norm", "threshold": threshold, "tested": True}
            for layer, threshold in THRESHOLDS.items()
        ],
        "exact": True,
    },
    "tiny:quick": {  # tuning found the first exit not worth testing
        "layers": LAYERS, "default_mode": "lossless", "modes": ["full", "threshold", "lossless"], "rules": RULES,
        "exits": [
            {"layer": 3, "kind": "norm", "threshold": 1.0, "tested": False},
            {"layer": 6, "kind": "norm", "threshold": 0.87, "tested": True},
        ],
        "exact": False,
    },
}  # fmt: skip


@dataclass
class Seen:
    """A request that came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class Mock:
    """The server, on a port of its own of this machine. ``key``: the API key it wants, ``loading``: answer with 503."""

    def __init__(self) -> None:
        self.key: str | None = None
        self.loading = False
        self.seen: list[Seen] = []
        self.go_on, self.dropped = threading.Event(), threading.Event()
        self.made = 0
        mock = self

        class Handler(_Handler):
            server_mock = mock

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()

    def sent(self, path: str) -> list[dict[str, Any]]:
        """The bodies that came for a path."""
        return [request.body for request in self.seen if request.path == path]

    def metrics(self) -> str:
        """As Prometheus reads them; the counter grows each time it is read."""
        self.made += 118
        return (
            "# HELP exitlm:num_requests_running Requests in the batch.\n# TYPE exitlm:num_requests_running gauge\n"
            'exitlm:num_requests_running{model_name="tiny"} 2.0\nexitlm:num_requests_running{model_name="a}b"} 1.0\n'
            'exitlm:num_requests_waiting{model_name="tiny"} 4.0\nexitlm:kv_cache_usage_perc{model_name="tiny"} 0.25\n'
            f'exitlm:generation_tokens_total{{model_name="tiny"}} {self.made}.0\n'
            'exitlm:scheduler_rate_ratio{model_name="tiny"} 1.62\n'
        )


class _Handler(BaseHTTPRequestHandler):
    server_mock: Mock

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests look at what came."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(200, page(), page_headers())
        elif path == "/metrics":
            self._send(200, self.server_mock.metrics().encode(), {"Content-Type": "text/plain"})
        elif self._may():
            found = {"/v1/models": {"object": "list", "data": [{"id": name} for name in EXITS]}, "/v1/exits": EXITS}
            if path in found:
                self._json(200, found[path])
            else:
                self._refuse(404, f"there is nothing at {path}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server_mock.seen.append(Seen(self.path, dict(self.headers), body))
        if not self._may():
            return
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        topic = prompt.split()[0]
        if topic == "busy":
            self._refuse(429, "the queue of 32 requests is full", {"Retry-After": "3"})
        elif topic == "wrong":
            self._refuse(400, "max_tokens is 9999, but the context holds 512 tokens")
        else:
            self._stream(topic, prompt, body)

    # ---- answers

    def _may(self) -> bool:
        mock = self.server_mock
        if mock.loading:
            self._refuse(503, "the model is still loading")
        elif mock.key is not None and self.headers.get("Authorization") != f"Bearer {mock.key}":
            self._refuse(401, "the API key is missing or wrong")
        else:
            return True
        return False

    def _stream(self, topic: str, prompt: str, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for part in self._events(topic, prompt, body):
                if topic == "cut":
                    for i in range(len(part)):
                        self.wfile.write(part[i : i + 1])
                        self.wfile.flush()
                else:
                    self.wfile.write(part)
        except ConnectionError:
            self.server_mock.dropped.set()

    def _events(self, topic: str, prompt: str, body: dict[str, Any]) -> Iterator[bytes]:
        chat, mode = "messages" in body, body["exitlm"]["mode"]
        chunks = answer(prompt, mode)
        end = b"\r\n" if topic == "cut" else b"\n"

        def event(data: str) -> bytes:
            return b"".join(b"data: " + line.encode() + end for line in data.split("\n")) + end

        def chunk(text: str, **more: Any) -> bytes:
            choice = {"index": 0, "finish_reason": None, **more}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            how = {"ensure_ascii": False, "indent": 0} if topic == "cut" else {}
            return event(json.dumps({"id": "x", "choices": [choice]}, **how))

        if topic == "cut":
            yield b": a comment" + end + end + b"event: message" + end
        for i, tokens in enumerate(chunks):
            if topic == "hold" and i == 1:
                while not self.server_mock.go_on.wait(0.01):
                    yield b": still here\n\n"  # fails once the client has gone
            if i == 2 and topic == "broken":
                return
            if i == 2 and topic == "failing":
                yield event(json.dumps({"error": {"message": "the engine has failed", "type": "server_error"}}))
                return
            found = {} if topic == "untraced" else {"exitlm": trace(tokens)}
            yield chunk("".join(token.text for token in tokens), **found)
        tokens = [token for group in chunks for token in group]
        yield chunk("", finish_reason="length" if topic == "short" else "stop")
        yield event(json.dumps({"id": "x", "choices": [], "usage": usage(tokens, mode)}))
        yield event("[DONE]")

    def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self._json(status, {"error": error}, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
