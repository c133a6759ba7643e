"""Clients that are slow, silent, broken or hostile: refusals in OpenAI's shape, bounded memory, others unaffected."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

import exitlm
from exitlm.serve.config import ServeConfig
from exitlm.serve.guard import depth
from exitlm.serve.server import listening
from tests.serve.conftest import Served, serving
from tests.serve.robust.clients import (
    CHAT,
    HI,
    TEXT,
    answers,
    ask,
    connect,
    connections,
    engine_of,
    read_answer,
    request,
    resident,
    wait_for,
    wait_until_idle,
)

MANY = [5, pytest.param(50, marks=pytest.mark.slow)]
MB = 2**20


@pytest.fixture(scope="module")
def server(model: exitlm.LLM) -> Iterator[Served]:
    """A server with the usual limits."""
    with serving(model) as served:
        yield served


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        served = request.getfixturevalue("server")
        answers(served)
        wait_until_idle(served)


# ---- slow and silent ones


@contextlib.contextmanager
def _listening(config: ServeConfig) -> Iterator[socket.socket]:
    """A socket whose connections hold little, so that a client who reads nothing is noticed soon."""
    with listening(config) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield listener


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("clients", MANY)
def test_clients_that_read_nothing(
    model: exitlm.LLM, clients: int, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for a long answer and takes nothing of it. Others are answered meanwhile; and after the write timeout
    nothing of them is left, though they still hold their sockets."""
    monkeypatch.setattr("tests.serve.conftest.listening", _listening)
    big = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "logprobs": 20, "stream": stream}
    with serving(model, limits={"write_timeout": 1.0}) as served, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(served, receives=4096)) for _ in range(clients)]
        for connection in slow:
            connection.sendall(request(TEXT, big))
        wait_for(lambda: engine_of(served).live > 0 or served.server.state.metrics.finished)
        answers(served)
        wait_for(lambda: served.used_blocks == 0 and not served.server.server_state.tasks, "the texts end")
        wait_for(lambda: connections(served) == 0, "the server lets go of clients that read nothing")
        answers(served)
        wait_until_idle(served)


def test_a_client_that_reads_slowly_gets_all(server: Served) -> None:
    """Whatever is written together, nothing is lost or out of order."""
    body = {"prompt": "Once", "max_tokens": 600, "ignore_eos": True, "logprobs": 5, "seed": 1}
    whole = json.loads(ask(server, request(TEXT, body)).body)["choices"][0]
    with connect(server, receives=4096) as connection:
        connection.sendall(request(TEXT, {**body, "stream": True}))
        time.sleep(0.5)  # what comes meanwhile piles up
        answer = read_answer(connection)
    chunks = [json.loads(line[6:]) for line in answer.body.decode().split("\n\n") if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    tokens = [token for chunk in chunks for token in (chunk["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]


@pytest.mark.parametrize(
    "begin",
    [b"", b"POST", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n", request(TEXT, {"prompt": "x" * 99})[:-20],
     request(TEXT, {"prompt": "x", "max_tokens": 1})[:-1]],
    ids=["nothing", "a word", "half a head", "half a body", "all but a byte"],
)  # fmt: skip
@pytest.mark.parametrize("clients", MANY)
def test_half_open_sockets(model: exitlm.LLM, clients: int, begin: bytes) -> None:
    """They hold nothing up, and are closed after the read timeout, with the reason."""
    with serving(model, limits={"read_timeout": 1.0}) as served, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(served)) for _ in range(clients)]
        for connection in silent:
            connection.sendall(begin)
        wait_for(lambda: connections(served) == clients or not begin)
        answers(served)
        for connection in silent:
            answer = read_answer(connection)
            assert answer.status == 408
            assert "send it again" in answer.refusal()["message"]
        wait_for(lambda: connections(served) == 0, "the server closes half-open connections")
        wait_until_idle(served)


def test_a_head_that_drips_has_the_same_deadline(model: exitlm.LLM) -> None:
    """Bytes that keep coming do not put it off; between requests, too."""
    with serving(model, limits={"read_timeout": 0.5}) as served:
        for begin in (b"", request(TEXT, {"prompt": "x", "max_tokens": 1})):
            with connect(served) as connection:
                if begin:
                    connection.sendall(begin)
                    assert read_answer(connection).status == 200
                connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n")
                with contextlib.suppress(ConnectionError):
                    for _ in range(1000):
                        connection.sendall(b"a: b\r\n")
                        if connections(served) == 0:
                            break
                        time.sleep(0.01)
                assert read_answer(connection).status == 408
            wait_until_idle(served)


def test_a_refused_body_may_not_go_on_for_ever(model: exitlm.LLM) -> None:
    """After a 413 the rest of the body is dropped as it comes, but not longer than a body may take."""
    with serving(model, limits={"read_timeout": 0.5, "body_bytes": 1024}) as served, connect(served) as connection:
        connection.sendall(request(TEXT, b" " * 4096).replace(b"content-length: 4096", b"content-length: 999999"))
        assert read_answer(connection).status == 413
        wait_for(lambda: connections(served) == 0, "the server closes a connection whose body does not end")
        wait_until_idle(served)


# ---- large and deep ones


@pytest.mark.parametrize("clients", MANY)
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_of_ten_megabytes(model: exitlm.LLM, clients: int, chunked: bool) -> None:
    """They are refused when they pass the limit, and never held whole."""
    body = b'{"prompt": "' + b"x" * (10 * MB) + b'"}'
    content = request(TEXT, body)
    if chunked:
        head = request(TEXT, b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
        content = head + b"".join(b"40000\r\n" + b"x" * 0x40000 + b"\r\n" for _ in range(40)) + b"0\r\n\r\n"
    with serving(model, limits={"body_bytes": 64 * 1024}) as served:
        answers(served)
        before, most = resident(), 0
        for _ in range(clients):
            found = ask(served, content)
            assert found.status == 413
            assert "larger than 65536 bytes" in found.refusal()["message"]
            most = max(most, resident())
        with contextlib.ExitStack() as stack:  # all at once, each held up in the middle
            many = [stack.enter_context(connect(served)) for _ in range(clients)]
            for connection in many:
                connection.sendall(content[: 2 * MB])
            for connection in many:
                assert read_answer(connection).status == 413
                most = max(most, resident())
        answers(served)
        wait_until_idle(served)
    assert most - before < 32 * MB


NESTED = {"list": ("[", "]"), "object": ('{"a":', "}"), "schema": ('{"type":"array","items":', "}")}
TOOL: Any = {"type": "function", "function": {"name": "f"}}


def _call(arguments: str) -> Any:
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize("kind", NESTED)
def test_deep_json(server: Served, kind: str) -> None:
    """Wherever a request takes any JSON, a deep one is read or refused; nothing breaks, and nothing takes long."""
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": "DEEP"}}
    function: Any = {"type": "function", "function": {"name": "f", "parameters": "DEEP"}}
    begin, end = NESTED[kind]
    for levels in (80, 150, 900, 5000):
        text = begin * levels + "{}" + end * levels
        for path, body in (
            (CHAT, {"messages": HI, "metadata": {"k": "DEEP"}}),
            (CHAT, {"messages": HI, "response_format": schema}),
            (CHAT, {"messages": HI, "response_format": "DEEP"}),
            (CHAT, {"messages": HI, "tools": [function]}),
            (CHAT, {"messages": HI, "tools": [function], "tool_choice": "required"}),
            (CHAT, {"messages": HI, "tools": ["DEEP"]}),
            (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": "DEEP"}),
            (CHAT, {"messages": [*HI, _call(text), *HI], "tools": [TOOL]}),
            (CHAT, {"messages": [{"role": "user", "content": "hi", "extra": "DEEP"}]}),
            (TEXT, {"prompt": "DEEP"}),
            (TEXT, {"prompt": "x", "logit_bias": "DEEP"}),
            (TEXT, {"prompt": "x", "unknown": "DEEP"}),
            (TEXT, {"prompt": "x", "exitlm": {"threshold": "DEEP"}}),
            ("/tokenize", {"prompt": "DEEP"}),
            ("/detokenize", {"tokens": "DEEP"}),
            ("/api", {"prompts": "DEEP"}),
            ("/api", {"prompts": "x", "max_len": "DEEP"}),
        ):  # fmt: skip
            limit = {"max_tokens": 2} if path in (CHAT, TEXT) else {}
            content = json.dumps({**body, **limit}).replace('"DEEP"', text).encode()
            found = ask(server, request(path, content, method="PUT" if path == "/api" else "POST"))
            assert found.status in (200, 400), (path, body, found)
            if found.status == 400:
                refused = found.refusal()
                assert len(refused["message"]) < 1000
                assert levels < 100 or refused["code"] == "body_too_deep" or "tool_calls" in str(body)


def test_the_depth_of_a_body() -> None:
    """Brackets in texts are none; what is no JSON has some depth, too, found in one pass."""
    for body, found in (
        (b"", 0), (b"1", 0), (b"[]", 1), (b'{"a": [1, {"b": 2}], "c": []}', 3), (b'["[[[", "\\"[[["]', 1),
        (b'["\\\\", [1]]', 2), (b"]]][", 0), (b'"[[[', 0), (b'"\\"' * 200_000 + b"[", 0), (b"[" * 10**6, 10**6),
    ):  # fmt: skip
        assert depth(body) == found, body[:40]


# ---- broken ones

NOT_HTTP = {
    "noise": bytes(range(256)) * 4 + b"\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 512,
    "bad method": b"G@T /health HTTP/1.1\r\nhost: x\r\n\r\n",
    "bad length": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: two\r\n\r\n",
    "negative length": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    "two lengths": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx",
    "unknown coding": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n",
    "bad chunk": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    "control in a header": b"GET /health HTTP/1.1\r\nhost: x\r\na: b\x00c\r\n\r\n",
    "space in a name": b"GET /health HTTP/1.1\r\nhost: x\r\na b: c\r\n\r\n",
    "a long header": b"GET /health HTTP/1.1\r\nhost: x\r\na: " + b"b" * (2 * MB) + b"\r\n\r\n",
    "a long path": b"GET /" + b"b" * (2 * MB) + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 400_000 + b"\r\n",
    "headers without end": b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 400_000,
}


@pytest.mark.parametrize("kind", NOT_HTTP)
def test_what_is_not_http(server: Served, kind: str) -> None:
    found = ask(server, NOT_HTTP[kind])
    assert found.status in (400, 431), found
    said = found.refusal()
    assert said["type"] == "invalid_request_error"
    assert (found.status == 431) == (kind in ("a long header", "a long path", "many headers", "headers without end"))


def test_another_protocol_is_not_switched_to(server: Served) -> None:
    """An offer to go on with HTTP/2 or a web socket is passed over."""
    for name in ("h2c", "websocket"):
        headers = f"connection: upgrade, HTTP2-Settings\r\nupgrade: {name}\r\n"
        assert ask(server, request("/health", method="GET", headers=headers)).status == 200


def test_noise_after_a_request(server: Served) -> None:
    """An answer that is being written is not mixed with a refusal."""
    with connect(server) as connection:
        connection.sendall(request(TEXT, {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}))
        assert connection.recv(10) == b"HTTP/1.1 2"
        connection.sendall(b"\x00\x01 noise\r\n\r\n")
        rest = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                rest += part
    assert b"\r\n\r\nHTTP/1.1 400" not in rest.partition(b"[DONE]")[0]


@pytest.mark.parametrize("count", [10, pytest.param(300, marks=pytest.mark.slow)])
def test_header_floods_are_not_kept(server: Served, count: int) -> None:
    """Heads as large as may be, on many connections at once."""
    head = b"GET /health HTTP/1.1\r\nhost: x\r\n" + (b"a: " + b"b" * 240 + b"\r\n") * 255
    before = resident()
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(connect(server)) for _ in range(count)]
        for connection in many:
            connection.sendall(head)
        answers(server)
        most = resident()
        for connection in many:
            connection.sendall(b"\r\n")
            assert read_answer(connection).status == 200
    assert most - before < 16 * MB + count * MB // 4


@pytest.mark.parametrize("end", [b"", b"\r\n"])
def test_many_headers_are_refused_before_they_are_kept(server: Served, end: bytes) -> None:
    """Short ones: 70 KB as bytes, megabytes as objects."""
    few, many = (b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * count + end for count in (255, 257))
    if end:
        assert ask(server, few).status == 200
    found = ask(server, many)
    assert found.status == 431
    assert "more than 256 headers" in found.refusal()["message"]


@pytest.mark.parametrize(
    "bad", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"caf\xe9", b"\xe2\x82", b"\x80\x80"]
)
def test_bad_utf8(server: Served, bad: bytes) -> None:
    """In a body it is refused; in a path, a query or a header it is just an unknown name."""
    for path, name in ((TEXT, b"prompt"), ("/tokenize", b"prompt"), ("/v1/completions", b"model")):
        found = ask(server, request(path, b'{"' + name + b'": "' + bad + b'"}'))
        assert found.status == 400
        found.refusal()
    quoted = "".join(f"%{byte:02x}" for byte in bad)
    for path in (f"/v1/models/{quoted}", f"/{quoted}"):
        found = ask(server, request(path, method="GET"))
        assert found.status == 404, path
        found.refusal()
    assert ask(server, request(f"/health?{quoted}={quoted}", method="GET")).status == 200
    for header in (b"x-request-id", b"authorization", b"content-type", b"accept", b"origin", b"cookie"):
        content = request("/v1/models", method="GET").replace(b"host: x", b"host: x\r\n" + header + b": " + bad)
        assert ask(server, content).status in (200, 400), header
    content = request(TEXT, {"prompt": "x", "max_tokens": 1}).replace(
        b"application/json", b"application/json; charset=" + bad
    )
    assert ask(server, content).status in (200, 400)


def test_texts_that_utf8_lacks(server: Served) -> None:
    """Lone surrogates, which JSON can spell, are refused or escaped wherever a text may stand."""
    bad = "\ud800"

    def schema(wanted: Any, name: str = "x") -> Any:
        return {"type": "json_schema", "json_schema": {"name": name, "schema": wanted}}

    for path, body in (
        (CHAT, {"messages": [{"role": "user", "content": bad}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": bad}]}]}),
        (CHAT, {"messages": HI, "stop": bad}),
        (CHAT, {"messages": HI, "model": bad}),
        (CHAT, {"messages": HI, "bad_words": [bad]}),
        (CHAT, {"messages": HI, "user": bad}),
        (CHAT, {"messages": HI, "metadata": {bad: bad}}),
        (CHAT, {"messages": HI, bad: 1}),
        (CHAT, {"messages": HI, "logit_bias": {bad: 1}}),
        (CHAT, {"messages": HI, "prediction": {"type": "content", "content": bad}}),
        (CHAT, {"messages": HI, "exitlm": {"rule": bad}}),
        (CHAT, {"messages": HI, "exitlm": {"threshold": {bad: 0.5}}}),
        (CHAT, {"messages": HI, "exitlm": {"draft": [bad]}}),
        (CHAT, {"messages": HI, "tools": [{"type": "function", "function": {"name": bad}}]}),
        (CHAT, {"messages": HI, "tools": [{"type": "function", "function": {"name": "f", "description": bad}}]}),
        (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": bad}),
        (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": bad}}}),
        (CHAT, {"messages": HI, "response_format": {"type": bad}}),
        (CHAT, {"messages": HI, "response_format": schema({"type": "string"}, bad)}),
        (CHAT, {"messages": HI, "response_format": schema({"enum": [bad]})}),
        (CHAT, {"messages": HI, "response_format": schema({"type": "string", "pattern": bad})}),
        (TEXT, {"prompt": [bad]}),
        (TEXT, {"prompt": "x", "stop": [bad]}),
        ("/tokenize", {"prompt": bad}),
        ("/tokenize", {"prompt": "x", "model": bad}),
    ):  # fmt: skip
        limit = {"max_tokens": 2} if path in (CHAT, TEXT) else {}
        for stream in ({}, {"stream": True}) if limit else ({},):
            found = ask(server, request(path, {**body, **limit, **stream}))
            assert found.status in (200, 400, 404), (body, found)
            assert b"engine_error" not in found.body, (body, found)
            assert b"internal_error" not in found.body, (body, found)
            if found.status != 200:
                found.refusal()
