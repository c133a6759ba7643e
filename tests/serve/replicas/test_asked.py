"""A request answered in another place than it came in."""

import asyncio
from typing import Any

import pytest

from exitlm.serve.guard import Message, Receive, Scope, Send
from exitlm.serve.replicas.asked import Asked, answer
from tests.serve.conftest import run

HEAD: Message = {"type": "http.response.start", "status": 200, "headers": []}


def body(text: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


def test_an_application_sees_the_request_and_its_messages_come_as_it_sends_them() -> None:
    seen: dict[str, Any] = {}
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update(scope, body=await receive())
        await send(HEAD)
        await send(body(b"a"))
        await gate.wait()
        await send(body(b"b", False))

    async def main() -> list[list[Message]]:
        asked = Asked(method="POST", path="/x", query=b"q=1", headers=((b"a", b"b"),), body=b"given")
        found = []
        async for batch in answer(app, asked):
            found.append(batch)
            gate.set()
        return found

    assert run(main()) == [[HEAD, body(b"a")], [body(b"b", False)]]
    assert (seen["method"], seen["path"], seen["query_string"], seen["headers"]) == (
        "POST",
        "/x",
        b"q=1",
        [(b"a", b"b")],
    )
    assert seen["body"] == {"type": "http.request", "body": b"given", "more_body": False}


def test_what_the_application_raises_is_raised_after_what_it_sent() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(HEAD)
        raise ValueError("broken")

    async def main() -> None:
        batches = answer(app, Asked())
        assert await anext(batches) == [HEAD]
        with pytest.raises(ValueError, match="broken"):
            await anext(batches)

    run(main())


def test_the_application_is_cancelled_when_its_client_leaves() -> None:
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(HEAD)
        try:
            await receive()
        finally:
            ended.append(True)

    async def main() -> None:
        batches = answer(app, Asked())
        await anext(batches)
        assert not ended
        await batches.aclose()

    run(main())
    assert ended
