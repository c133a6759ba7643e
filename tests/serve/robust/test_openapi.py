"""Random requests made from the OpenAPI document, good and bad ones: nothing breaks, and answers are as documented."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import exitlm
from tests.serve.conftest import Served, serving
from tests.serve.robust.clients import HI, answers, wait_until_idle

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [
    ("/v1/chat/completions", "POST"), ("/v1/completions", "POST"), ("/v1/models", "GET"), ("/v1/models/{name}", "GET"),
    ("/v1/exits", "GET"), ("/api", "PUT"), ("/tokenize", "POST"), ("/detokenize", "POST"), ("/health", "GET"),
    ("/metrics", "GET"), ("/v1/responses", "POST"),
]  # fmt: skip
MAX_TOKENS = 8  # of an answer
PLAIN: dict[str, Any] = {"messages": HI, "prompt": "x", "prompts": "x", "tokens": [40], "input": "x"}


@pytest.fixture(scope="module")
def server(model: exitlm.LLM) -> Iterator[Served]:
    """Answers are short, as requests ask for any number of tokens."""
    with serving(model, limits={"new_tokens": MAX_TOKENS, "choices": 4}) as served:
        yield served
        answers(served)
        wait_until_idle(served)


@pytest.fixture(scope="module")
def document(server: Served) -> Any:
    with server.http() as http:
        return http.get("/openapi.json").json()


def test_every_operation_is_tried(document: Any) -> None:
    found = [(path, method.upper()) for path, methods in document["paths"].items() for method in methods]
    assert sorted(found) == sorted(OPERATIONS)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cases", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_random_requests(server: Served, document: Any, path: str, method: str, cases: int) -> None:
    operation = schemathesis.openapi.from_dict(document)[path][method]
    modes = [schemathesis.GenerationMode.POSITIVE]
    if operation.body:  # else all that can be sent is a word in a path, or nothing
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    elif not operation.path_parameters:
        cases = 1
    statuses: Counter[int] = Counter()
    for mode in modes:
        _try(server, operation, mode, -(-cases // len(modes)), statuses)
    assert set(statuses) <= {200, 400, 404, 405}
    assert statuses[200] > 0 or path == "/v1/models/{name}"
    if operation.body:
        assert statuses[400] > 0


def _try(
    server: Served, operation: schemathesis.APIOperation, mode: Any, cases: int, statuses: Counter[int]
) -> None:  # fmt: skip
    """Send random requests of one kind, and count what they came to."""

    @hypothesis.settings(
        max_examples=cases, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), seed=st.integers(0, 2**32))
    def tries(case: schemathesis.Case, seed: int) -> None:
        if mode is schemathesis.GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = _likely(case.body, random.Random(seed))
        response = case.call(base_url=server.url, timeout=60)
        case.validate_response(response, checks=CHECKS)
        statuses[response.status_code] += 1
        if response.status_code >= 400:
            assert set(json.loads(response.content)["error"]) == {"message", "type", "param", "code"}

    tries()


def _likely(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A body that may well be answered: a model that exists, and few of the fields that depend on each other."""
    share = chance.choice([0.05, 0.3])  # of the fields that may be left out
    kept = {key: value for key, value in body.items() if key in PLAIN or chance.random() < share}
    if "model" in kept:
        kept["model"] = chance.choice(["tiny", "tiny:exits", kept["model"]])
    for name, plain in PLAIN.items():
        if name in kept and (share < 0.1 or chance.random() < 0.5):
            kept[name] = plain
    for name in ("max_tokens", "max_completion_tokens", "tokens_to_generate"):
        if kept.get(name):
            kept[name] %= MAX_TOKENS + 1
    return kept
