"""What comes over a socket before it is a request: heads too large, too slow or none; and clients that read nothing."""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest

import exitlm
from tests.serve.conftest import Served, serving


@pytest.fixture(scope="module")
def model(make_model: Callable[..., exitlm.LLM]) -> exitlm.LLM:
    return make_model("float32", quant="none")


@pytest.fixture(scope="module")
def hasty(model: exitlm.LLM) -> Iterator[Served]:
    """A server that waits for nobody."""
    with serving(model, limits={"read_timeout": 0.3, "write_timeout": 0.5}) as served:
        yield served


def connect(served: Served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def answer(connection: socket.socket) -> tuple[int, str]:
    """Status and sentence of a refusal that ends the connection."""
    found = b""
    while part := connection.recv(65536):
        found += part
    head, _, body = found.partition(b"\r\n\r\n")
    assert b"application/json" in head
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.mark.parametrize("content", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"GET /\xff HTTP/1.1\r\n\r\n",
                                     b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"\x00" * 100])  # fmt: skip
def test_what_is_no_request(served: Served, content: bytes) -> None:
    with connect(served) as connection:
        connection.sendall(content)
        status, said = answer(connection)
    assert (status, "HTTP/1.1" in said) == (400, True)


@pytest.mark.parametrize("flood", ["many", "long", "url"])
def test_a_flood_of_headers(served: Served, flood: str) -> None:
    with connect(served) as connection:
        connection.sendall(b"GET /" if flood == "url" else b"GET /health HTTP/1.1\r\nx: ")
        with contextlib.suppress(OSError):  # it may be cut off meanwhile
            for i in range(20_000):
                connection.sendall(b"x%d: %s\r\n" % (i, b"y" * 20) if flood == "many" else b"y" * 64)
            assert answer(connection)[0] == 431
    with served.http() as http:
        assert http.get("/health").status_code == 200


def test_a_large_head_is_refused(served: Served) -> None:
    with connect(served) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx: " + b"y" * 70_000)
        status, said = answer(connection)
    assert (status, "larger than" in said) == (431, True)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nhost"])
def test_a_head_that_does_not_come(hasty: Served, sent: bytes) -> None:
    with connect(hasty) as connection:
        connection.sendall(sent)
        assert answer(connection)[0] == 408


def test_a_body_that_does_not_come(hasty: Served) -> None:
    with connect(hasty) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
        )
        status, said = answer(connection)
    assert (status, "did not arrive" in said) == (408, True)


def test_a_client_that_reads_nothing_is_given_up(hasty: Served) -> None:
    """Its text ends, and its blocks are free."""
    engine = hasty.server.state.service.engine  # type: ignore[union-attr]
    body = json.dumps(
        {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True, "n": 16, "logprobs": 20}
    ).encode()
    with connect(hasty) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            + f"content-length: {len(body)}\r\n\r\n".encode() + body
        )  # fmt: skip
        while not engine.live:
            time.sleep(0.005)
        while engine.live:
            time.sleep(0.005)
        assert hasty.used_blocks == 0
        assert hasty.server.state.metrics.finished["abort"] > 0
    with hasty.http() as http:
        assert http.get("/health").status_code == 200
