"""What full decoding takes by the times of single passes."""

import math

import pytest

from exitlm.decode.pricing.pass_times import PassTimes


def test_the_quickest_chain_of_passes_counts() -> None:
    times = PassTimes()
    assert math.isnan(times.full(3))
    for first, last, seconds in ((0, 1, 2.0), (1, 3, 5.0), (2, 3, 1.0)):
        times.add(first, last, seconds)
    assert math.isnan(times.full(3))
    times.add_head(0.5)
    assert times.full(3) == 7.5
    times.add(1, 2, 1.0)
    assert times.full(3) == 4.5
    assert math.isnan(times.full(4))


def test_times_follow_the_machine() -> None:
    times = PassTimes()
    for seconds in [1.0] * 50 + [2.0] * 50:
        times.add(0, 1, seconds)
        times.add_head(seconds)
    assert times.full(1) == pytest.approx(4.0, rel=0.02)
