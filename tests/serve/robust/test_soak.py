"""Minutes of mixed clients: the server's memory comes to rest, and every request is answered."""

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serve.robust.clients import CHAT, HI, TEXT, resident, wait_for
from tests.serve.robust.process import Process, process

CLIENTS = 8
SLOPE = 2**20  # bytes a minute
SCHEMAS = 100  # different ones; each is kept compiled, up to a limit that ten minutes of new ones do not reach
KV_BYTES = 16 * 2**20  # shared prefixes fill all of it in the first minute; a larger pool would go on filling
WARM = 0.3  # of the time: caches fill, and the allocator gets to know what it has to hold


def _client(served: Process, number: int, ends: threading.Event, found: list[int]) -> None:
    """Chats and completions of all kinds, some of which are left in the middle or refused."""
    chance = random.Random(number)
    with httpx.Client(base_url=served.url, timeout=300) as http:
        while not ends.is_set():
            body: dict[str, Any] = {
                "max_tokens": chance.randrange(1, 80),
                "temperature": 0.8,
                "seed": chance.randrange(9),
            }
            text = "".join(chance.choices("abcdefgh ", k=chance.randrange(1, 300)))
            match chance.randrange(8):
                case 0:
                    found.append(http.post(CHAT, json={**body, "messages": HI, "n": 2}).status_code)
                case 1:
                    found.append(
                        http.post(TEXT, json={**body, "prompt": text, "logprobs": 3, "echo": True}).status_code
                    )
                case 2:
                    with http.stream("POST", TEXT, json={**body, "prompt": text, "stream": True}) as response:
                        found.append(response.status_code)
                        next(response.iter_bytes())  # and leave
                case 3:
                    assert http.post(TEXT, json={**body, "prompt": text, "temperatur": 1}).status_code == 400
                case 4:
                    found.append(http.post("/tokenize", json={"prompt": text}).status_code)
                case 5:
                    name = f"field {chance.randrange(SCHEMAS)}"
                    schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
                    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
                    given = {**body, "messages": HI, "response_format": wanted}
                    found.append(http.post(CHAT, json=given).status_code)
                case _:
                    given = {**body, "messages": [{"role": "user", "content": text}], "stream": True}
                    response = http.post(CHAT, json=given)
                    found.append(response.status_code)
                    assert response.text.endswith("data: [DONE]\n\n")
                    assert '"error"' not in response.text


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("minutes", [10])
def test_memory_comes_to_rest(tiny: Path, minutes: float) -> None:
    """The slope of a line through what the process holds, after it is warm, is below a megabyte a minute."""
    ends, found, points = threading.Event(), list[int](), list[tuple[float, int]]()
    with process(tiny, "engine.max_sequences=8", f"engine.kv_bytes={KV_BYTES}", "http.log='errors'") as served:
        clients = [threading.Thread(target=_client, args=(served, i, ends, found)) for i in range(CLIENTS)]
        for client in clients:
            client.start()
        begun = time.monotonic()
        try:
            while (passed := time.monotonic() - begun) < 60 * minutes:
                points.append((passed / 60, resident(served.process.pid)))
                assert all(client.is_alive() for client in clients)
                time.sleep(min(1.0, minutes))
        finally:
            ends.set()
            for client in clients:
                client.join()
        with httpx.Client(base_url=served.url, timeout=60) as http:
            wait_for(lambda: "exitlm:kv_cache_usage_perc 0.0\n" in http.get("/metrics").text, "all blocks are free")
            wait_for(lambda: "exitlm:num_requests_running 0.0\n" in http.get("/metrics").text, "nothing runs")
    assert set(found) == {200}
    assert len(found) > 100 * minutes
    times, held = np.array([point for point in points if point[0] > WARM * minutes]).T
    slope = np.polyfit(times, held, 1)[0]
    print(json.dumps({"requests": len(found), "megabytes": held[-1] / 2**20, "slope of megabytes": slope / 2**20}))
    assert slope < SLOPE
