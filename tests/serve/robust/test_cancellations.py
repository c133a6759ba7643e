"""Clients that leave in the middle of their answers: every block comes back, and those who stay notice nothing."""

import concurrent.futures
import json
import random
import socket

import pytest

import exitlm
from tests.serve.conftest import Served, serving
from tests.serve.robust.clients import (
    CHAT,
    HI,
    TEXT,
    answers,
    ask,
    connect,
    read_answer,
    request,
    reset,
    wait_for,
    wait_until_idle,
)

LEAVERS = 8  # at the same time


def _leave(served: Served, number: int) -> None:
    """Begin a long answer, read a part of it, and go: before its first byte, in the middle, politely or not, by a
    request that streams or waits for the whole."""
    chance = random.Random(number)
    body = {
        "messages": HI,
        "max_tokens": 1900,
        "ignore_eos": True,
        "stream": number % 4 != 3,
        "n": chance.choice([1, 3]),
    }
    exits = {"exitlm": {"mode": "threshold", "threshold": 0.02}} if number % 3 == 0 else {}
    connection = connect(served)
    connection.sendall(request(CHAT, {**body, **exits, "model": "tiny:exits"}))
    if body["stream"]:
        left = chance.choice([0, 1, 200, 4000, 20_000])
        while left > 0:
            got = connection.recv(min(left, 4096))
            assert got, "the server ended a stream"
            left -= len(got)
    elif number % 8 == 3:
        wait_for(lambda: served.used_blocks > 0)
    match chance.choice(["close", "reset", "half"]):
        case "close":
            connection.close()
        case "reset":
            reset(connection)
        case "half":  # says that it will send nothing more, and goes when it likes
            connection.shutdown(socket.SHUT_WR)
            connection.close()


@pytest.mark.parametrize("clients", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_all_blocks_come_back(model: exitlm.LLM, clients: int) -> None:
    prompt = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "temperature": 0.9, "seed": 3}
    with serving(model) as served, concurrent.futures.ThreadPoolExecutor(LEAVERS) as pool:
        alone = json.loads(ask(served, request(TEXT, prompt)).body)["choices"]
        with connect(served) as staying:
            staying.sendall(request(TEXT, prompt))
            for _ in pool.map(lambda number: _leave(served, number), range(clients)):
                pass
            stayed = read_answer(staying)
        assert json.loads(stayed.body)["choices"] == alone
        wait_until_idle(served)
        assert served.server.state.metrics.finished["abort"] >= clients  # none was written to its end
        answers(served)


def test_those_who_leave_while_they_wait_are_not_decoded(model: exitlm.LLM) -> None:
    """The queue holds nobody's place for a client who is gone."""
    with serving(model, limits={"queue": 2}) as served:
        long = request(TEXT, {"prompt": "x", "n": 8, "max_tokens": 1900, "ignore_eos": True})
        with connect(served) as running:
            running.sendall(long)
            wait_for(lambda: len(model.engine.roster.running) == 8)
            for _ in range(10):
                waiting = [connect(served) for _ in range(2)]
                for connection in waiting:
                    connection.sendall(request(TEXT, {"prompt": "y", "max_tokens": 1900, "ignore_eos": True}))
                wait_for(lambda: len(model.engine.roster.waiting) == 2)
                assert ask(served, request(TEXT, {"prompt": "z"})).status == 429
                for connection in waiting:
                    connection.close()
                wait_for(lambda: not model.engine.roster.waiting)
        wait_until_idle(served)
