"""An answer is the one that ``generate`` gives alone, token for token, whatever company it is decoded in."""

import concurrent.futures
import itertools
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

import exitlm
from tests.native.cases import needs_native
from tests.serve.conftest import Served, serving
from tests.serve.robust.clients import TEXT, ask, request, wait_for, wait_until_idle

COMPANY = 8
PROMPTS = ["Once upon a time", "The sky is", "Call me", "In the beginning was the word, and", "x"]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 1.0, "top_p": 0.8, "seed": 11, "repetition_penalty": 1.2},
    {"temperature": 0.7, "min_p": 0.05, "seed": 5, "n": 3},
    {"temperature": 0.0, "presence_penalty": 0.5, "exitlm": {"mode": "full"}},
    {"temperature": 0.8, "seed": 9, "exitlm": {"mode": "threshold", "threshold": 0.02}},
    {"temperature": 0.8, "seed": 13, "exitlm": {"mode": "lossless", "threshold": 0.02}},
]


def _token_ids(answer: dict[str, Any]) -> list[list[str]]:
    """The tokens of each choice, by their bytes' names."""
    return [choice["exitlm"]["tokens"] for choice in answer["choices"]]


def _depths(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["exitlm"]["exit_layers"] for choice in answer["choices"]]


def _ask(served: Served, prompt: Any, settings: dict[str, Any], tokens: int) -> dict[str, Any]:
    exits = {**settings.get("exitlm", {}), "trace": True}
    body = {"model": "tiny:exits", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **settings}
    found = ask(served, request(TEXT, {**body, "exitlm": exits}))
    assert found.status == 200, found
    answer: dict[str, Any] = json.loads(found.body)
    return answer


def _alone(model: exitlm.LLM, prompt: Any, settings: dict[str, Any], tokens: int) -> list[Any]:
    given = {name: value for name, value in settings.items() if name != "exitlm"} | settings.get("exitlm", {})
    found = model.generate(prompt, max_new_tokens=tokens, ignore_eos=True, **given)
    return found.choices or [found]


def _company(served: Served, number: int, ends: threading.Event) -> int:
    """A client that asks for one text after the other, of all lengths and settings, some of which it does not read."""
    for turn in itertools.count():
        if ends.is_set():
            return turn
        settings = SETTINGS[(number + turn) % len(SETTINGS)]
        prompt = PROMPTS[(number * 3 + turn) % len(PROMPTS)] * (1 + (turn * 7 + number) % 5)
        _ask(served, prompt, {**settings, "seed": 100 * number + turn}, 10 + (turn * 13 + number * 5) % 50)
    raise AssertionError


def _same_in_company(model: exitlm.LLM, rounds: int, *, depths: bool) -> None:
    tokens = 40
    expected = {
        (i, prompt): _alone(model, prompt, settings, tokens)
        for i, settings in enumerate(SETTINGS) for prompt in PROMPTS[:2]
    }  # fmt: skip
    ends = threading.Event()
    with serving(model) as served, concurrent.futures.ThreadPoolExecutor(COMPANY) as pool:
        company = [pool.submit(_company, served, number, ends) for number in range(COMPANY)]
        try:
            wait_for(lambda: served.server.state.metrics.counts["generation_tokens"] > 100)
            for _ in range(rounds):
                for (i, prompt), alone in expected.items():
                    answer = _ask(served, prompt, SETTINGS[i], tokens)
                    assert [choice["text"] for choice in answer["choices"]] == [one.text for one in alone]
                    assert _token_ids(answer) == [[token.text for token in one.trace] for one in alone]
                    if depths and SETTINGS[i].get("exitlm", {}).get("mode") in ("full", "threshold"):
                        assert _depths(answer) == [one.exit_layers for one in alone]
                    assert all(one.stats.exact for one in alone) == answer["usage"]["exitlm"]["exact"]
        finally:
            ends.set()
        assert sum(done.result() for done in company) >= COMPANY
        wait_until_idle(served)


ROUNDS = [1, pytest.param(10, marks=pytest.mark.slow)]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_in_float64(make_model: Callable[..., exitlm.LLM], rounds: int) -> None:
    _same_in_company(make_model("float64"), rounds, depths=True)


@needs_native
@pytest.mark.parametrize("rounds", ROUNDS)
def test_natively(make_model: Callable[..., exitlm.LLM], rounds: int) -> None:
    """The kernels give a row the same numbers in every batch, bit for bit."""
    model = make_model("float32", quant="q8_0")
    assert model.engine.fused.exact
    _same_in_company(model, rounds, depths=True)
