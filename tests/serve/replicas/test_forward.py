"""Every request is answered exactly once, whatever replicas do."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest

from exitlm.serve.errors import ApiError, ClientLeft
from exitlm.serve.guard import Message
from exitlm.serve.replicas import forward
from exitlm.serve.replicas.asked import Asked
from exitlm.serve.replicas.forward import TRIES, Forward, mounted
from tests.serve.conftest import run

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
Script = Sequence[Any]  # messages; what is raised; seconds to wait; what is called


class Lost(Exception):
    """A replica died."""


class TooMany(Exception):
    """Too many wait."""


def head(status: int = 200, headers: Any = ((b"content-type", b"application/json"),)) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(text: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_PAUSE", 0.0)


class Client:
    """One request to an application in front of replicas, each of which follows a script."""

    def __init__(self, *scripts: Script, **options: Any) -> None:
        self.scripts, self.left, self.closed = list(scripts), asyncio.Event(), 0
        given = {"deadline": 60.0, "lost": (Lost,), "full": (TooMany,), **options}
        self.number: int | Exception = 2
        self.forward = Forward(self._ask, self._figures, self._number, **given)
        self.asked: list[Asked] = []
        self.sent: list[Message] = []

    async def _figures(self) -> dict[str, str]:
        return {"a": "x 1\n", "b": "x 2\n"}

    async def _number(self) -> int:
        if isinstance(self.number, Exception):
            raise self.number
        return self.number

    async def _ask(self, asked: Asked) -> AsyncGenerator[list[Message], None]:
        self.asked.append(asked)
        try:
            for step in self.scripts[len(self.asked) - 1]:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif not isinstance(step, dict):
                    step()
                    await asyncio.sleep(0.01)  # timers that are due now have run
                else:
                    yield [dict(step)]
        finally:
            self.closed += 1

    def ask(self, path: str = "/v1/completions", method: str = "POST", on_send: Callable[[], object] = int) -> None:
        """Send the request and wait for its end."""
        received: list[Message] = [{"type": "http.request", "body": b'{"prompt": "Hi"}', "more_body": False}]

        async def receive() -> Message:
            if received:
                return received.pop()
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.sent.append(message)
            on_send()

        scope = {
            "type": "http", "method": method, "path": path, "headers": [(b"x-request-id", b"given"), (b"a", b"b")],
            "query_string": b"", "client": ("1.2.3.4", 5), "state": {"request_id": "name"},
        }  # fmt: skip
        run(self.forward(scope, receive, send))

    @property
    def text(self) -> bytes:
        """The bodies that were sent."""
        return b"".join(message.get("body", b"") for message in self.sent)

    def check_once(self) -> None:
        """The client has one head, and one end of the body."""
        kinds = [message["type"] for message in self.sent]
        assert kinds == ["http.response.start", *["http.response.body"] * (len(kinds) - 1)]
        assert [bool(message.get("more_body")) for message in self.sent[1:]] == [True] * (len(kinds) - 2) + [False]


def test_an_answer_passes_through() -> None:
    client = Client([head(400, [(b"x-request-id", b"name"), (b"a", b"b")]), body(b'{"error": 1}')])
    client.ask()
    assert client.sent == [head(400, [(b"a", b"b")]), body(b'{"error": 1}')]
    (asked,) = client.asked
    assert (asked.method, asked.path, asked.body, asked.client) == (
        "POST", "/v1/completions", b'{"prompt": "Hi"}', ("1.2.3.4", 5),
    )  # fmt: skip
    assert asked.headers == ((b"a", b"b"), (b"x-request-id", b"name"))
    assert asked.session is not None


@pytest.mark.parametrize(
    "died",
    [
        [Lost()],
        [head(), Lost()],  # the head alone has not been sent
        [head(headers=EVENTS), body(b"", True), Lost()],
        [],  # it ended without a word
        [head()],
    ],
)
def test_a_replica_that_dies_before_the_first_byte_is_replaced(died: Script) -> None:
    client = Client(died, [head(201), body(b"whole")])
    client.ask()
    assert client.sent == [head(201), body(b"whole")]
    assert len(client.asked) == client.closed == 2
    assert client.asked[0] == client.asked[1]


def test_a_replica_that_dies_after_the_last_byte_is_no_matter() -> None:
    client = Client([head(), body(b"whole"), Lost()])
    client.ask()
    assert client.text == b"whole"
    client.check_once()
    assert len(client.asked) == 1


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_that_breaks_off_says_so(path: str) -> None:
    for end in ([Lost()], []):
        client = Client([head(headers=EVENTS), body(b"data: 1\n\n", True), *end])
        client.ask(path)
        client.check_once()
        first, error, done, rest = client.text.split(b"\n\n")
        assert (first, done, rest) == (b"data: 1", b"data: [DONE]", b"")
        assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "replica_lost"
        assert len(client.asked) == 1  # what a client has begun to read is not begun again


def test_a_stream_of_responses_ends_by_the_next_event() -> None:
    client = Client([head(headers=EVENTS), body(b"event: a\ndata: 0\n\nevent: b\ndata: 1\n\n", True), Lost()])
    client.ask("/v1/responses")
    client.check_once()
    event = client.text.split(b"\n\n")[2]
    assert event.startswith(b"event: error\ndata: ")
    said = json.loads(event.split(b"data: ")[1])
    assert (said["type"], said["code"], said["sequence_number"]) == ("error", "replica_lost", 2)


def test_a_defect_in_mid_stream_is_told_as_one() -> None:
    client = Client([head(headers=EVENTS), body(b"data: 1\n\n", True), KeyError("secret")])
    client.ask()
    client.check_once()
    assert b"internal_error" in client.text
    assert b"secret" not in client.text


def test_a_defect_before_the_first_byte_is_raised_and_not_tried_again() -> None:
    client = Client([head(), KeyError("x")])
    with pytest.raises(KeyError):
        client.ask()
    assert not client.sent
    assert len(client.asked) == 1


def test_an_answer_in_pieces_that_is_no_stream_of_events_is_cut() -> None:
    client = Client([head(), body(b"a", True), Lost()])
    with pytest.raises(ApiError, match="died"):
        client.ask()
    assert client.sent == [head(), body(b"a", True)]  # the server closes the connection short of its end


def test_a_request_that_kills_replicas_is_given_up() -> None:
    client = Client(*[[Lost()]] * (TRIES + 1))
    with pytest.raises(ApiError) as caught:
        client.ask()
    assert (caught.value.status, caught.value.code) == (503, "replica_lost")
    assert not client.sent
    assert len(client.asked) == client.closed == TRIES


def test_too_many_requests() -> None:
    client = Client([TooMany()])
    with pytest.raises(ApiError) as caught:
        client.ask()
    assert (caught.value.status, caught.value.code, caught.value.headers) == (429, "queue_full", {"retry-after": "1"})


def test_no_replica_begins_in_time() -> None:
    client = Client([3600.0], deadline=0.01)
    with pytest.raises(ApiError) as caught:
        client.ask()
    assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
    assert client.closed == 1


def test_an_answer_that_has_begun_may_take_longer() -> None:
    def pass_time() -> None:
        loop = asyncio.get_running_loop()
        time = loop.time
        loop.time = lambda: time() + 1000.0  # type: ignore[method-assign]

    client = Client([head(headers=EVENTS), body(b"a", True), pass_time, body(b"b")])
    client.ask()
    assert client.text == b"ab"
    late = Client([head(headers=EVENTS), pass_time, body(b"b")])
    with pytest.raises(ApiError, match="60 seconds"):
        late.ask()


@pytest.mark.parametrize(
    ("number", "status", "says"),
    [(2, 200, "ok"), (0, 503, "no replica"), (Lost(), 200, "ok"), (TimeoutError(), 200, "ok")],
)
def test_health(number: int | Exception, status: int, says: str) -> None:
    client = Client()
    client.number = number
    client.ask("/health", "GET")
    client.check_once()
    assert (client.sent[0]["status"], json.loads(client.text)) == (status, {"status": says})
    assert not client.asked


def test_a_client_that_leaves_ends_its_request() -> None:
    client = Client([head(headers=EVENTS), body(b"a", True), 3600.0])

    def leave() -> None:
        if client.text:
            client.left.set()

    with pytest.raises(ClientLeft):
        client.ask(on_send=leave)
    assert client.closed == 1
    assert len(client.asked) == 1


def test_figures_of_all_replicas() -> None:
    client = Client()
    client.ask("/metrics", "GET")
    client.check_once()
    assert client.text == b'x{replica="a"} 1\nx{replica="b"} 2\n'
    assert not client.asked


def test_it_starts_ends_and_speaks_http_only() -> None:
    client = Client()
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        sent.append(message)

    run(client.forward({"type": "lifespan"}, receive, send))
    run(client.forward({"type": "websocket", "path": "/"}, receive, send))
    assert [one["type"] for one in sent] == [
        "lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close",
    ]  # fmt: skip


def test_below_a_path_of_a_proxy() -> None:
    seen: list[Any] = []
    sent: list[Message] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope.get("path"), scope.get("root_path")))
        if scope["type"] == "http":
            await send(head(headers=[(b"X-Request-Id", b"a"), (b"b", b"c")]))

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    for path, root in (("/llm/v1/models", "/llm"), ("/llm", "/llm"), ("/v1/models", ""), ("/v1/models", "/llm")):
        run(mounted(app)({"type": "http", "path": path, "root_path": root}, receive, send))
    run(mounted(app)({"type": "lifespan"}, receive, send))
    assert seen == [("/v1/models", ""), ("/", ""), ("/v1/models", ""), ("/v1/models", "/llm"), (None, None)]
    assert sent == [head(headers=[(b"b", b"c")])] * 4
