"""An event loop whose clock jumps to the next timer, and a server behind no network whose delays are those that a test
names: minutes of load in no time, and latencies that are exact. Not a test."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

Result = TypeVar("Result")


class _Selector(selectors.DefaultSelector):
    """Waits for nothing: the time that it would wait passes at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found:
            assert timeout is not None, "nothing will ever happen"
            self.now += timeout
        return found


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine on a clock of its own, which begins at 0."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)


@dataclass(frozen=True)
class Script:
    """What a server does with a request: waits until the first text, and before each further one; the counts it gives;
    its status, and the seconds until that."""

    waits: Sequence[float] = (0.5, 0.1, 0.1)
    usage: dict[str, Any] | None = None
    status: int = 200
    header: float = 0.0
    finish_reason: str | None = "stop"
    error: str | None = None


def transport(
    script: Callable[[dict[str, Any]], Script], seen: list[dict[str, Any]] | None = None
) -> httpx2.MockTransport:
    """A server that follows ``script``, which is given each request's body; ``seen`` collects them."""

    async def handle(request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/models"):
            return httpx2.Response(200, json={"data": [{"id": "first"}, {"id": "second"}]})
        if request.url.path.endswith("/exits"):
            return httpx2.Response(404)
        body = json.loads(request.content)
        if seen is not None:
            seen.append(body)
        plan = script(body)
        await asyncio.sleep(plan.header)
        if plan.status != 200:
            return httpx2.Response(plan.status, json={"error": {"message": plan.error or "no"}})
        if not body.get("stream"):
            await asyncio.sleep(sum(plan.waits))
            choice = {"message": {"content": "x"}, "finish_reason": plan.finish_reason}
            return httpx2.Response(200, json={"choices": [choice], **({"usage": plan.usage} if plan.usage else {})})
        return httpx2.Response(200, content=_events(plan))

    return httpx2.MockTransport(handle)


async def _events(plan: Script) -> AsyncIterator[bytes]:
    def event(found: dict[str, Any]) -> bytes:
        return f"data: {json.dumps(found)}\n\n".encode()

    yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    for wait in plan.waits:
        await asyncio.sleep(wait)
        yield event({"choices": [{"delta": {"content": "x"}}]})
    if plan.error is not None:
        yield event({"error": {"message": plan.error}})
        return
    if plan.finish_reason is not None:
        yield event({"choices": [{"delta": {}, "finish_reason": plan.finish_reason}]})
    if plan.usage is not None:
        yield event({"choices": [], "usage": plan.usage})
    if plan.finish_reason is not None:
        yield b"data: [DONE]\n\n"
