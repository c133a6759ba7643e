"""A server whose model runs in several processes: its clients notice nothing of it, nor of stages that are killed."""

import contextlib
import json
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import exitlm
from tests.decode.remote.processes import PATIENCE, children_of_process, is_gone, wait_for
from tests.decode.remote.test_lost import Ends
from tests.decode.remote.threads import pipelined
from tests.serve.conftest import Served, serving
from tests.serve.robust.clients import CHAT, TEXT
from tests.serve.robust.process import Process, process

pytestmark = pytest.mark.usefixtures("cache")
CLIENTS = 8
MODES: list[dict[str, Any]] = [
    {"mode": "full"}, {"mode": "threshold", "threshold": 0.02}, {"mode": "lossless", "threshold": 0.02}
]  # fmt: skip
ASKED: list[dict[str, Any]] = [
    {
        "model": "tiny:exits", "prompt": f"Once upon a time {number}", "max_tokens": 20 + 5 * (number % 4),
        "ignore_eos": True, "temperature": 0.9 * (number % 2), "seed": number, "exitlm": MODES[number % 3],
    }
    for number in range(12)
]  # fmt: skip
FLOAT64: dict[str, Any] = {"dtype": "float64", "quant": "none"}


@pytest.fixture(scope="module")
def directory(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with exits beside its weights."""
    found = exitlm.load(tiny)
    found.add_exits([1, 3], kind="norm")
    return found.export(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[str]:
    """What a server of one process answers."""
    with serving(exitlm.load(directory, **FLOAT64)) as served, served.http() as http:
        return [ask(http, asked, stream=False) for asked in ASKED]


def ask(http: httpx.Client, asked: dict[str, Any], stream: bool) -> str:
    """The text of an answer, which has to end once, as it should."""
    response = http.post(TEXT, json={**asked, "stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        body = response.json()
        assert body["usage"]["completion_tokens"] == asked["max_tokens"]
        return str(body["choices"][0]["text"])
    frames = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert frames.pop() == "[DONE]"
    chunks = [json.loads(frame) for frame in frames]
    assert not any("error" in chunk for chunk in chunks), chunks[-1]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    return "".join(choice["text"] for choice in choices)


def figure(http: httpx.Client, name: str) -> float:
    """A figure of the server."""
    found = re.search(rf"^exitlm:{re.escape(name)} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


@contextlib.contextmanager
def pipeline(directory: Path) -> Iterator[tuple[Process, httpx.Client]]:
    """A server of two processes."""
    settings = ("model.dtype=float64", "model.quant=none")
    with (
        process(directory, *settings, flags=["--pipeline", "2"]) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE) as http,
    ):
        yield server, http


def crowd(http: httpx.Client, done: threading.Event, number: int) -> list[tuple[int, str]]:
    """One of several clients, who asks again and again: what was asked, and its answer."""
    found: list[tuple[int, str]] = []
    while not done.is_set():
        at = (number + len(found)) % len(ASKED)
        found.append((at, ask(http, ASKED[at], stream=(number + len(found)) % 2 == 0)))
    return found


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_clients_get_the_texts_of_one_process_while_stages_are_killed(
    directory: Path, expected: list[str], times: int
) -> None:
    """Each answer once, streamed or not; and no process is left when the server was told to end."""
    with pipeline(directory) as (server, http), ThreadPoolExecutor(CLIENTS) as pool:
        for at in range(3):
            assert [ask(http, ASKED[at], stream) for stream in (False, True)] == [expected[at]] * 2
        done, pids = threading.Event(), list[int]()
        asking = [pool.submit(crowd, http, done, number) for number in range(CLIENTS)]
        try:
            for _ in range(times):
                pids.append(_kill_under_load(server, http))
                assert http.get("/health").json() == {"status": "ok"}
        finally:
            done.set()
        answers = [answer for client in asking for answer in client.result(PATIENCE)]
        assert len(answers) >= CLIENTS
        for at, text in answers:
            assert text == expected[at]
        assert figure(http, "stages_lost_total") == times
        assert all(figure(http, f'stage_busy_seconds_total{{stage="{stage}"}}') > 0 for stage in (1, 2))
        assert figure(http, "num_requests_running") == figure(http, "num_requests_waiting") == 0
        assert figure(http, "kv_cache_usage_perc") == 0
        lost = [json.loads(line) for line in server.log if "was lost" in line]
        assert [line["event"] for line in lost] == ["warning"] * times
        pids += children_of_process(server.process.pid)
        _drain(server, http, expected[0])
        assert len(set(pids)) == times + 1
        assert all(map(is_gone, pids))


def _kill_under_load(server: Process, http: httpx.Client) -> int:
    """End the process of the second stage while several texts are decoded, and wait until that is noticed."""
    tokens, lost = (figure(http, name) for name in ("generation_tokens_total", "stages_lost_total"))
    wait_for(lambda: figure(http, "generation_tokens_total") > tokens + 50, "texts are decoded")
    wait_for(lambda: figure(http, "num_requests_running") > 1, "texts are decoded together")
    (pid,) = children_of_process(server.process.pid)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: figure(http, "stages_lost_total") == lost + 1, "the loss is noticed")
    return pid


def _drain(server: Process, http: httpx.Client, text: str) -> None:
    """What was begun before SIGTERM is answered to its end, and the process ends well."""
    long = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 300, "ignore_eos": True, "stream": True}
    with http.stream("POST", CHAT, json=long) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.process.wait(PATIENCE) == 0


def test_a_stage_that_cant_be_replaced_has_status_503_until_it_can(directory: Path) -> None:
    model = exitlm.load(directory, **FLOAT64)
    launcher = Ends(model.model)
    model._engine = pipelined(model.model, [2, 2], launcher=launcher, tokenizer=model.tokenizer)
    sentence = "stage 2 of 2 ended and can't be replaced: there is no other machine"

    def refused(served: Served, http: httpx.Client) -> None:
        launcher.over = True
        for stream in (False, True, False):
            response = http.post(TEXT, json={**ASKED[0], "stream": stream})
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0
            assert response.json() == {
                "error": {
                    "message": sentence, "type": "service_unavailable_error", "param": None, "code": "stage_lost"
                }
            }  # fmt: skip
        assert (http.get("/health").status_code, http.get("/health").json()) == (503, {"status": "broken"})
        launcher.over = False
        assert http.post(TEXT, json=ASKED[0]).status_code == 200
        assert http.get("/health").json() == {"status": "ok"}
        assert served.used_blocks == 0

    with serving(model) as served, served.http() as http, warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        launcher.kill(1)
        refused(served, http)


def test_a_stream_whose_stage_cant_be_replaced_ends_with_the_sentence(directory: Path) -> None:
    model = exitlm.load(directory, **FLOAT64)
    launcher = Ends(model.model)
    model._engine = pipelined(model.model, [2, 2], launcher=launcher, tokenizer=model.tokenizer)
    long = {**ASKED[0], "max_tokens": 1900, "stream": True}
    with serving(model) as served, served.http() as http, warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        with http.stream("POST", TEXT, json=long) as response:
            lines = response.iter_lines()
            next(lines)
            launcher.over = True
            launcher.kill(1)
            *_, last, end = (line for line in lines if line)
    assert response.status_code == 200
    assert end == "data: [DONE]"
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("service_unavailable_error", "stage_lost")
    assert "stage 2 of 2 ended and can't be replaced" in error["message"]
