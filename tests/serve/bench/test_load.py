"""When requests go out and what is seen of their answers, on a clock that only moves when all wait."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from exitlm.serve.bench.client import LoadClient, first_model, new_client
from exitlm.serve.bench.load import arrivals, closed_loop, open_loop
from exitlm.serve.bench.records import Ask, Record
from tests.serve.bench.virtual import Script, run, transport

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 2}}


def ask(index: int = 0, **body: Any) -> Ask:
    return Ask(index=index, body={"stream": True, **body})


def one(script: Script, *, timeout: float = 600.0, **body: Any) -> Record:
    """What is seen of one request, which is due at once."""

    async def work() -> Record:
        async with new_client("http://a/v1", {}, transport(lambda _: script)) as client:
            return await LoadClient(client, "http://a/v1/chat/completions", timeout).send(ask(**body), 0.0)

    return run(work())


def test_a_streamed_answer() -> None:
    record = one(Script(waits=(0.5, 0.25, 0.125), usage=USAGE, header=1.0))
    assert record.texts == [1.5, 1.75, 1.875]
    assert (record.end, record.status, record.message, record.finish_reason) == (1.875, "200", None, "stop")
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (7, 5, 2)
    assert (record.first_text, record.whole_text, record.gaps) == (1.5, 1.875, [0.25, 0.125])
    assert record.per_token == 0.375 / 4  # five tokens in three texts


def test_an_answer_in_one_piece() -> None:
    record = one(Script(waits=(0.5, 0.25), usage=USAGE), stream=False)
    assert (record.texts, record.end, record.first_text, record.per_token) == ([], 0.75, None, None)
    assert record.completion_tokens == 5


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        (Script(status=429, error="the queue is full"), "429", "the queue is full"),
        (Script(waits=(1.0, 1.0, 9.0)), "timeout", "no whole answer within 5 s"),
        (Script(header=9.0), "timeout", "no whole answer within 5 s"),
        (Script(finish_reason=None), "broken", "the stream ended within the answer"),
        (Script(error="out of memory"), "error", "out of memory"),
    ],
)
def test_what_goes_wrong_is_noted(script: Script, status: str, message: str) -> None:
    record = one(script, timeout=5.0)
    assert (record.status, record.is_whole) == (status, False)
    assert message in str(record.message)


def test_a_server_that_is_not_there_and_nonsense_are_noted() -> None:
    import httpx2

    async def refused(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("connection refused")

    def send(handler: Any, **body: Any) -> Record:
        async def work() -> Record:
            async with new_client("http://a/v1", {}, httpx2.MockTransport(handler)) as client:
                return await LoadClient(client, "http://a/v1/completions", 5.0).send(ask(**body), 0.0)

        return run(work())

    assert send(refused).status == "connection"
    for content in (b"", b"[]", b'{"choices": []}', b'{"choices": 3}', b"\xff"):
        assert send(lambda _, content=content: httpx2.Response(200, content=content), stream=False).status == "broken"
    for content in (b"data: 3\n\n", b"data: \xff\n\n", b"data: {\n\n"):
        assert send(lambda _, content=content: httpx2.Response(200, content=content)).status == "broken"
    for content in (b'data: {"choices": [3, {"delta": 4}], "usage": 5}\n\ndata: [DONE]\n\n',):
        assert send(lambda _, content=content: httpx2.Response(200, content=content)).is_whole


def test_text_of_either_endpoint_counts_and_a_role_does_not() -> None:
    import httpx2

    def texts(event: bytes) -> int:
        async def work() -> Record:
            answer = httpx2.Response(200, content=b"data: " + event + b"\n\ndata: [DONE]\n\n")
            async with new_client("http://a/v1", {}, httpx2.MockTransport(lambda _: answer)) as client:
                return await LoadClient(client, "http://a", 5.0).send(ask(), 0.0)

        return len(run(work()).texts)

    assert texts(b'{"choices": [{"text": "x"}]}') == 1
    assert texts(b'{"choices": [{"delta": {"content": "x"}}]}') == 1
    assert texts(b'{"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}') == 1
    assert texts(b'{"choices": [{"text": ""}]}') == 0
    assert texts(b'{"choices": [{"delta": {"role": "assistant", "content": ""}}]}') == 0
    assert texts(b'{"choices": [], "usage": {}}') == 0


def test_arrivals_are_a_poisson_process_of_their_seed() -> None:
    times = arrivals(4001, 8.0, 3)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times == arrivals(4001, 8.0, 3) != arrivals(4001, 8.0, 4)
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 8, rel=0.05)
    assert spread == pytest.approx(mean, rel=0.05)  # as of an exponential distribution, and not of a steady beat
    assert arrivals(1, 2.0, 0) == [0.0]


def load(way: Any, script: Script, count: int = 4) -> list[Record]:
    """The records of a run; ``way`` gets the requests and what sends them."""

    async def work() -> list[Record]:
        async with new_client("http://a/v1", {}, transport(lambda _: script)) as client:
            sender = LoadClient(client, "http://a/v1/chat/completions", 600.0)
            await asyncio.sleep(0)
            records: list[Record] = await way([ask(index) for index in range(count)], sender.send)
            return records

    return run(work())


def test_an_open_loop_does_not_wait_for_answers() -> None:
    """However slow they are, requests go out by the plan; a closed loop would have sent them later."""
    slow = Script(waits=(10.0,))
    records = load(lambda asks, send: open_loop(asks, [0.0, 1.0, 1.5, 7.0], send), slow)
    assert [(record.due, record.sent, record.end) for record in records] == [
        (0.0, 0.0, 10.0), (1.0, 1.0, 11.0), (1.5, 1.5, 11.5), (7.0, 7.0, 17.0),
    ]  # fmt: skip


def test_a_request_that_went_out_late_counts_from_when_it_was_due() -> None:
    """A client that hangs for three seconds, as in a pause of its machine, has not spared anybody the waiting."""

    async def hang(asks: Any, send: Any) -> list[Record]:
        async def pause(ask: Ask, due: float) -> Record:
            if ask.index == 1:
                await asyncio.sleep(3.0)
            found: Record = await send(ask, due)
            return found

        return await open_loop(asks, [0.0, 1.0], pause)

    late = load(hang, Script(waits=(0.5, 0.25)), 2)[1]
    assert (late.due, late.sent, late.first_text, late.whole_text) == (1.0, 4.0, 3.5, 3.75)


def test_clients_of_a_closed_loop_wait_for_their_answers() -> None:
    records = load(lambda asks, send: closed_loop(asks, 2, send), Script(waits=(1.0, 1.0)), 5)
    assert [record.index for record in records] == [0, 1, 2, 3, 4]
    assert [(record.due, record.sent, record.end) for record in records] == [
        (0.0, 0.0, 2.0), (0.0, 0.0, 2.0), (2.0, 2.0, 4.0), (2.0, 2.0, 4.0), (4.0, 4.0, 6.0),
    ]  # fmt: skip


def test_more_clients_than_requests() -> None:
    assert len(load(lambda asks, send: closed_loop(asks, 9, send), Script(), 2)) == 2


def test_no_limit_of_connections_holds_requests_back() -> None:
    """A server answers nobody before all are there, which httpx2 would never let happen with its usual 100."""
    count, there = 120, asyncio.Event()
    body = b'{"choices": [{"text": "x"}]}'
    waiting = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal waiting
        await reader.readuntil(b"\r\n\r\n")
        waiting += 1
        if waiting == count:
            there.set()
        await there.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()

    async def work() -> list[Record]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=count)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with server, new_client(url, {}) as client:
            asks = [ask(index, stream=False) for index in range(count)]
            return await open_loop(asks, [0.0] * count, LoadClient(client, url, 60.0).send)

    assert [record.message for record in asyncio.run(work())] == [None] * count


def test_the_first_model() -> None:
    async def work() -> str:
        async with new_client("http://a/v1", {}, transport(lambda _: Script())) as client:
            return await first_model(client, "http://a/v1")

    assert run(work()) == "first"
