"""SIGTERM under load: answers that were asked for are written to their end, new ones get 503, the process ends well."""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.conftest import run
from tests.serve.robust.clients import CHAT, HI
from tests.serve.robust.process import Process, process

TOKENS = 120
PATIENCE = 120  # seconds; the drain itself may take 25


async def _begun(served: Process, clients: int) -> list[tuple[int, str]]:
    """Let so many clients ask, send SIGTERM when some have their first words and others wait, and give all answers."""
    counts: list[tuple[int, str]] = []
    async with httpx.AsyncClient(
        base_url=served.url, timeout=PATIENCE, limits=httpx.Limits(max_connections=None)
    ) as http:
        streaming = asyncio.Event()

        async def one(number: int) -> tuple[int, str]:
            body: dict[str, Any] = {"messages": HI, "max_tokens": TOKENS, "ignore_eos": True, "stream": number % 2 == 0}
            async with http.stream("POST", CHAT, json=body) as response:
                text = ""
                async for part in response.aiter_text():
                    text += part
                    if number % 2 == 0:
                        streaming.set()
            return response.status_code, text

        asked = [asyncio.create_task(one(number)) for number in range(clients)]
        await streaming.wait()
        while (await _live(http)) < clients and not any(task.done() for task in asked):
            await asyncio.sleep(0.01)
        served.process.send_signal(signal.SIGTERM)
        while True:  # new ones, until the server is gone
            try:
                late = await http.post(CHAT, json={"messages": HI, "max_tokens": 1})
            except httpx.TransportError:
                break
            if late.status_code == 503:
                assert late.json()["error"]["type"] == "service_unavailable_error"
                assert int(late.headers["retry-after"]) >= 1
                counts.append((503, ""))
                assert (await http.get("/health")).status_code == 503
                break
            assert late.status_code == 200  # the signal has not arrived yet
        assert counts, "the server ended before it refused anybody"
        return list(await asyncio.gather(*asked))


async def _live(http: httpx.AsyncClient) -> float:
    """Texts that are decoded or wait."""
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(
        float(line.split()[1])
        for line in lines
        if line.startswith(("exitlm:num_requests_running ", "exitlm:num_requests_waiting "))
    )


@pytest.mark.parametrize("clients", [12, pytest.param(120, marks=pytest.mark.slow)])
def test_sigterm_under_load(tiny: Path, clients: int) -> None:
    with process(tiny, "engine.max_sequences=4", "limits.drain=100") as served:
        found = run(_begun(served, clients))
        assert served.process.wait(PATIENCE) == 0
    for number, (status, text) in enumerate(found):
        assert status == 200
        if number % 2 == 0:
            assert text.endswith("data: [DONE]\n\n")
            assert '"error"' not in text
            assert '"finish_reason": "length"' in text
        else:
            assert json.loads(text)["usage"]["completion_tokens"] == TOKENS
    events = [json.loads(line) for line in served.log if line.startswith("{")]
    assert not [event for event in events if event["level"] == "error" and event.get("status") != 503]
    assert "drain" in [event.get("event") for event in events]
    assert "cut off" not in [event.get("event") for event in events]
    assert not any("Traceback" in line for line in served.log)


def test_answers_that_take_too_long_are_cut_off(tiny: Path) -> None:
    """The drain ends when its time is over: with an error in the stream, and exit code 0."""

    async def ask(served: Process) -> str:
        async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE) as http:
            body = {"messages": HI, "max_tokens": 2000, "ignore_eos": True, "stream": True, "n": 16, "logprobs": True}
            async with http.stream("POST", CHAT, json=body) as response:
                text = ""
                async for part in response.aiter_text():
                    if not text:
                        served.process.send_signal(signal.SIGTERM)
                    text += part
                return text

    with process(tiny, "limits.drain=0.2") as served:
        text = run(ask(served))
        assert served.process.wait(30) == 0
    assert '"error"' in text
    assert text.endswith("data: [DONE]\n\n")
    assert any('"cut off"' in line for line in served.log)
