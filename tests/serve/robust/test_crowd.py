"""Far more clients than there is room for: all get an answer or are told to come again, and nothing is left of them."""

import asyncio
import time
from collections import Counter
from typing import Any

import httpx
import pytest

import exitlm
from tests.serve.conftest import Served, run, serving
from tests.serve.robust.clients import CHAT, HI, answers, engine_of, objects, resident, wait_for, wait_until_idle

QUEUE = 32
ROOM = QUEUE + 8  # texts that wait, and those that the model decodes at once
CROWDS = [50, pytest.param(500, marks=pytest.mark.slow)]
GROWTH = 1.05
RECOVERY = 2.0  # seconds of processor time until the next client has its answer


async def _crowd(served: Served, clients: int, body: dict[str, Any], tries: int = 1) -> Counter[int]:
    """The statuses of so many clients that ask at the same moment; each asks ``tries`` times, with its answer read."""
    found: Counter[int] = Counter()
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=served.url, timeout=300, limits=limits) as http:

        async def one(number: int) -> None:
            for _ in range(tries):
                stream = number % 2 == 0
                response = await http.post(CHAT, json={**body, "stream": stream, "seed": number})
                found[response.status_code] += 1
                if response.status_code == 429:
                    assert int(response.headers["retry-after"]) >= 1
                    error = response.json()["error"]
                    assert error["type"] == "rate_limit_error"
                    assert error["code"] == "queue_full"
                elif stream:
                    assert response.text.endswith("data: [DONE]\n\n")
                    assert '"error"' not in response.text
                else:
                    assert response.json()["choices"][0]["finish_reason"] == "length"

        await asyncio.gather(*(one(number) for number in range(clients)))
    return found


@pytest.mark.parametrize("clients", CROWDS)
def test_those_beyond_the_queue_are_told_to_come_again(model: exitlm.LLM, clients: int) -> None:
    """With an engine that stands still until all have asked, exactly as many as fit are answered."""
    body = {"messages": HI, "max_tokens": 8, "ignore_eos": True}

    async def ask(served: Served) -> Counter[int]:
        counts = served.server.state.metrics.counts
        with model.engine.lock:  # the engine's thread waits for it before each pass
            crowd = asyncio.create_task(_crowd(served, clients, body))
            while counts["requests_refused"] + ROOM < clients and not crowd.done():
                await asyncio.sleep(0.01)
        return await crowd

    with serving(model, limits={"queue": QUEUE}) as served:
        assert run(ask(served)) == {200: ROOM, 429: clients - ROOM}
        wait_until_idle(served)
        answers(served)


@pytest.mark.parametrize("clients", CROWDS)
def test_a_crowd_leaves_no_memory_behind(model: exitlm.LLM, clients: int) -> None:
    """Clients that ask again and again: only 200 and 429, and what the process holds before and after is the same."""
    body = {"messages": HI, "max_tokens": 12, "ignore_eos": True}
    with serving(model, limits={"queue": QUEUE}) as served:
        run(_crowd(served, 50, body))  # what is built at the first use
        wait_until_idle(served)
        before, held = objects(), resident()
        found = run(_crowd(served, clients, body, tries=2))
        assert set(found) <= {200, 429}
        assert found[200] >= ROOM
        assert found.total() == 2 * clients
        begun = time.process_time()  # of all threads: what others do on this machine does not count
        wait_for(lambda: engine_of(served).live == 0, "the queue is empty")
        answers(served)  # let in at once, by the first request
        assert time.process_time() - begun < RECOVERY
        wait_until_idle(served)
        assert objects() < GROWTH * before
        assert resident() < GROWTH * held
