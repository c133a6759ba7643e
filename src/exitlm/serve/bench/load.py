"""When requests are sent: by a plan that does not look at the answers, or by clients that wait for theirs.

The only clock is that of the event loop, so that a loop with a clock of its own runs it all without waiting.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from exitlm.serve.bench.records import Ask, Record

Send = Callable[[Ask, float], Coroutine[Any, Any, Record]]
"""Sends a request that is due at a time of the loop, and reads its answer."""


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """When ``count`` requests arrive, in seconds from the first: a Poisson process of ``rate`` a second."""
    noise = random.Random(seed)
    found = [0.0]
    while len(found) < count:
        found.append(found[-1] + noise.expovariate(rate))
    return found


async def open_loop(asks: Sequence[Ask], times: Sequence[float], send: Send) -> list[Record]:
    """Send each request at its time, however many are still unanswered."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for ask, time in zip(asks, times, strict=True):
            await asyncio.sleep(begin + time - loop.time())
            tasks.append(group.create_task(send(ask, begin + time)))
    return [task.result() for task in tasks]


async def closed_loop(asks: Iterable[Ask], clients: int, send: Send) -> list[Record]:
    """Let ``clients`` send one request after the other, each as soon as its last one is answered."""
    loop = asyncio.get_running_loop()
    coming = iter(asks)
    records: list[Record] = []

    async def client() -> None:
        for ask in coming:
            records.append(await send(ask, loop.time()))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return sorted(records, key=lambda record: record.index)
