"""From records to figures: percentiles, throughput, errors. Pure; no clock is read here.

Latencies count from when a request was due, not from when it was sent. A client that falls behind its plan, because the
server or the machine is busy, would otherwise leave out the very waiting that its users would have felt (coordinated
omission); how late requests were sent is a figure of its own.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from exitlm.serve.bench.records import Record


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Some durations, in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a run gave.

    ``seconds`` are from when the first request was due to the end of the last one. Rates are of whole answers and over
    ``seconds``; token figures are None if the server has not counted those of each answer. ``errors`` counts what
    failed, by status. ``ttft``, ``itl`` and ``tpot`` are None where answers were not streamed. ``late``: how long after
    they were due requests were sent. ``tokens_per_text``: tokens of a streamed piece of text on average.
    """

    requests: int
    whole: int
    errors: dict[str, int]
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float | None
    total_tokens_per_second: float | None
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    tokens_per_text: float | None
    peak_running: int
    ttft: Spread | None
    itl: Spread | None
    tpot: Spread | None
    end_to_end: Spread | None
    late: Spread | None

    def to_json(self) -> dict[str, Any]:
        """All figures, as JSON has them."""
        return dataclasses.asdict(self)


def figures(records: Sequence[Record]) -> Figures:
    """The figures of a run; ``records`` are of all its requests, at least one."""
    good = [record for record in records if record.is_whole]
    seconds = max(record.end for record in records) - min(record.due for record in records)
    prompt, output = _sum(r.prompt_tokens for r in good), _sum(r.completion_tokens for r in good)
    texts = sum(len(record.texts) for record in good)

    def rate(count: int | None) -> float | None:
        return None if count is None or seconds <= 0 else count / seconds

    return Figures(
        requests=len(records), whole=len(good),
        errors=dict(sorted(Counter(r.status for r in records if not r.is_whole).items())),
        seconds=seconds, requests_per_second=rate(len(good)) or 0.0, output_tokens_per_second=rate(output),
        total_tokens_per_second=rate(None if prompt is None or output is None else prompt + output),
        prompt_tokens=prompt, output_tokens=output, cached_tokens=_sum(r.cached_tokens for r in good),
        tokens_per_text=output / texts if output and texts else None, peak_running=max(c for _, c in running(records)),
        ttft=spread(r.first_text for r in good), itl=spread(gap for r in good for gap in r.gaps),
        tpot=spread(r.per_token for r in good), end_to_end=spread(r.whole_text for r in good),
        late=spread(r.sent - r.due for r in records),
    )  # fmt: skip


def _sum(counts: Iterable[int | None]) -> int | None:
    """The sum, None where one is missing or there is nothing to add."""
    found = list(counts)
    known = [count for count in found if count is not None]
    return sum(known) if known and len(known) == len(found) else None


def spread(durations: Iterable[float | None]) -> Spread | None:
    """Of those that are there; None of none."""
    found = sorted(value for value in durations if value is not None)
    if not found:
        return None
    return Spread(
        count=len(found), mean=sum(found) / len(found), p50=percentile(found, 50), p90=percentile(found, 90),
        p99=percentile(found, 99), max=found[-1],
    )  # fmt: skip


def percentile(ascending: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest ranks, as numpy's default does."""
    place = (len(ascending) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (ascending[high] - ascending[low]) * (place - low)


def running(records: Iterable[Record]) -> list[tuple[float, int]]:
    """How many requests were on their way, from each moment on that this changes."""
    steps: Counter[float] = Counter()
    for record in records:
        steps[record.sent] += 1
        steps[record.end] -= 1
    found, count = [], 0
    for moment in sorted(steps):
        count += steps[moment]
        found.append((moment, count))
    return found
