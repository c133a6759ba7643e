"""Percentiles, rates and counts of records that a test writes down."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitlm.serve.bench.figures import figures, percentile, running, spread
from exitlm.serve.bench.records import Record

SECONDS = st.floats(0, 1e6)


@given(st.lists(SECONDS, min_size=1), st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(
        float(np.percentile(values, percent)), rel=1e-9, abs=1e-9
    )


def test_a_spread() -> None:
    found = spread([3.0, None, 1.0, 2.0])
    assert found is not None
    assert (found.count, found.mean, found.p50, found.max) == (3, 2.0, 2.0, 3.0)
    assert spread([]) is spread([None]) is None


def record(index: int = 0, due: float = 0.0, end: float = 1.0, **over: Any) -> Record:
    return Record(
        **{"index": index, "due": due, "sent": due, "end": end, "prompt_tokens": 10, "completion_tokens": 4, **over}
    )


def test_rates_count_whole_answers_over_the_whole_time() -> None:
    records = [
        record(0, 0.0, 4.0, texts=[1.0, 2.0, 4.0]),
        record(1, 1.0, 5.0, sent=1.5, texts=[3.0, 3.5, 5.0], cached_tokens=6),
        record(2, 2.0, 10.0, status="429", message="full", prompt_tokens=None, completion_tokens=None),
    ]
    found = figures(records)
    assert (found.requests, found.whole, found.errors, found.seconds) == (3, 2, {"429": 1}, 10.0)
    assert (found.requests_per_second, found.output_tokens_per_second, found.total_tokens_per_second) == (0.2, 0.8, 2.8)
    assert (found.output_tokens, found.prompt_tokens, found.cached_tokens) == (8, 20, None)
    assert found.tokens_per_text == 8 / 6
    assert found.ttft is not None
    assert (found.ttft.count, found.ttft.max) == (2, 2.0)  # of the one that was sent late: from when it was due
    assert found.itl is not None
    assert sorted([found.itl.count, found.itl.max]) == [2.0, 4]
    assert found.tpot is not None
    assert found.tpot.max == 1.0
    assert found.end_to_end is not None
    assert found.end_to_end.p50 == 4.0
    assert found.late is not None
    assert (found.late.count, found.late.max) == (3, 0.5)
    assert json.loads(json.dumps(found.to_json()))["ttft"]["count"] == 2


def test_without_the_server_s_counts_there_are_no_token_rates() -> None:
    """One answer without a count is enough: a sum of the others would be too low."""
    found = figures([record(texts=[0.5, 1.0]), record(1, completion_tokens=None)])
    assert found.output_tokens is found.output_tokens_per_second is found.total_tokens_per_second is None
    assert found.tokens_per_text is None
    assert found.prompt_tokens == 20


def test_nothing_was_answered() -> None:
    found = figures([record(status="timeout", message="late")])
    assert (found.whole, found.errors, found.requests_per_second) == (0, {"timeout": 1}, 0.0)
    assert found.ttft is found.itl is found.end_to_end is None


def test_nothing_takes_no_time() -> None:
    assert figures([record(end=0.0)]).output_tokens_per_second is None


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=30))
def test_how_many_are_on_their_way(spans: list[tuple[float, float]]) -> None:
    records = [record(i, min(span), max(span)) for i, span in enumerate(spans)]
    found = running(records)
    assert [moment for moment, _ in found] == sorted({moment for span in spans for moment in span})
    for moment, count in found:
        assert count == sum(r.sent <= moment < r.end for r in records)
    assert found[-1][1] == 0


def test_a_rate_per_token_needs_two_of_them() -> None:
    assert record(texts=[1.0, 3.0], completion_tokens=3).per_token == 1.0
    assert record(texts=[1.0], completion_tokens=3).per_token is None
    assert record(texts=[1.0, 2.0], completion_tokens=1).per_token is None
    assert record(texts=[1.0, 2.0], completion_tokens=None).per_token is None
