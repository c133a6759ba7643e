"""Exit rules against ten-line references, and the one comparison they share."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exitlm.decode.rules import (
    PATIENCE_REACHED,
    RULES,
    SCORES,
    ExitRule,
    check_threshold,
    decayed,
    entropy,
    fires,
    margin,
    probability,
)
from exitlm.decode.step import RuleTest
from exitlm.errors import UserError

LOGITS = st.lists(st.floats(-30, 30), min_size=1, max_size=12).map(lambda row: torch.tensor(row, dtype=torch.float64))


def softmax(row: list[float]) -> list[float]:
    """In plain numbers, descending."""
    top = max(row)
    weights = sorted((math.exp(x - top) for x in row), reverse=True)
    return [w / sum(weights) for w in weights]


@settings(deadline=None, derandomize=True, database=None)
@given(LOGITS)
def test_scores_are_what_they_say(logits: Tensor) -> None:
    p = softmax(logits.tolist())
    assert probability(logits) == pytest.approx(p[0], abs=1e-12)
    assert margin(logits) == pytest.approx(p[0] - p[1] if len(p) > 1 else 1.0, abs=1e-12)
    information = -sum(x * math.log(x) for x in p if x > 0)
    expected = 1.0 if len(p) == 1 else 1.0 - information / math.log(len(p))
    assert entropy(logits) == pytest.approx(expected, abs=1e-9)
    assert all(0.0 <= score(logits) <= 1.0 for score in SCORES.values())


def test_scores_of_logits_that_are_minus_infinity() -> None:
    logits = torch.tensor([2.0, -torch.inf, 1.0])
    assert probability(logits) == pytest.approx(1 / (1 + math.exp(-1)))
    assert margin(logits) == pytest.approx((1 - math.exp(-1)) / (1 + math.exp(-1)))
    assert 0.0 < entropy(logits) < 1.0


@pytest.mark.parametrize("name", ["probability", "margin", "entropy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_short_floats_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    logits = (torch.randn(2000, generator=torch.Generator().manual_seed(0)) + 24.0).to(dtype)
    assert SCORES[name](logits) == pytest.approx(SCORES[name](logits.double()), rel=1e-3)


@pytest.mark.parametrize("score", [0.0, 0.3, 1.0])
def test_threshold_one_never_fires_and_zero_always_does(score: float) -> None:
    assert not fires(score, 1.0)
    assert fires(score, 0.0)


def test_a_score_at_the_threshold_fires() -> None:
    assert fires(0.5, 0.5)
    assert not fires(math.nextafter(0.5, 0), 0.5)
    assert not fires(math.nan, 0.5)


def test_a_saturated_softmax_does_not_fire_at_one() -> None:
    logits = torch.tensor([1000.0, 0.0, 0.0])
    for name in ("probability", "margin", "entropy"):
        assert SCORES[name](logits) == 1.0
        assert not fires(SCORES[name](logits), 1.0)


def test_the_decaying_threshold() -> None:
    assert decayed(0.8, 0, 100) == pytest.approx(0.9 * 0.8 + 0.1)
    assert decayed(0.8, 100, 100) == pytest.approx(0.9 * 0.8 + 0.1 * math.exp(-4))
    assert [decayed(t, p, 7) for t in (0.0, 1.0) for p in (0, 3, 7)] == [0.0] * 3 + [1.0] * 3
    falling = [decayed(0.5, p, 20) for p in range(20)]
    assert falling == sorted(falling, reverse=True)
    assert decayed(1 - 1e-9, 0, 10) < 1.0
    assert decayed(0.5, 0, 0) == pytest.approx(0.55)


class Head:
    """A stand-in for a head: logits and a gate score that are given."""

    def __init__(self, layer: int, logits: Tensor, gate: float = 0.0) -> None:
        self.layer, self.row, self.score = layer, logits, gate
        self.reads = 0

    def logits(self, *_: Any) -> Tensor:
        """The given row, counted."""
        self.reads += 1
        return self.row[None]

    def gate(self, _: Tensor) -> float:
        """The given score."""
        return self.score

    def token(self, index: int) -> int:
        """Ids are shifted by 10, as for candidates."""
        return index + 10


ROW = torch.zeros(1, 4)


def run(rule: ExitRule, heads: list[Head], **options: Any) -> tuple[int | None, RuleTest]:
    """The layer that fires, and the test as it is left."""
    test = RuleTest(rule, **options)
    for head in heads:
        if test(head, ROW, ROW, None) is not None:
            return head.layer, test
    return None, test


def peaked(token: int, height: float) -> Tensor:
    """Logits with one peak."""
    return torch.zeros(8).index_fill_(0, torch.tensor(token), height)


@pytest.mark.parametrize("name", ["probability", "margin", "entropy"])
def test_the_first_exit_that_is_sure_enough_fires(name: str) -> None:
    heads = [Head(layer, peaked(1, height)) for layer, height in ((1, 1.0), (2, 3.0), (3, 6.0))]
    scores = [SCORES[name](head.row) for head in heads]
    assert scores == sorted(scores)
    for threshold, expected in ((0.0, 1), (scores[1], 2), (scores[1] + 1e-6, 3), (scores[2] + 1e-6, None), (1.0, None)):
        layer, test = run(ExitRule(name=name, thresholds=dict.fromkeys((1, 2, 3), threshold)), heads)
        assert layer == expected
        tried = scores[: 3 if expected is None else expected]
        assert list(test.confidence.values()) == tried


def test_each_exit_has_its_own_threshold_and_inactive_ones_are_not_read() -> None:
    heads = [Head(layer, peaked(1, 3.0)) for layer in (1, 2, 3)]
    layer, test = run(ExitRule(name="probability", thresholds={1: 1.0, 3: 0.2}), heads)
    assert layer == 3
    assert set(test.confidence) == {1, 3}
    assert [head.reads for head in heads] == [1, 0, 1]


def test_skipped_exits_are_not_tried() -> None:
    heads = [Head(layer, peaked(1, 3.0)) for layer in (1, 2)]
    layer, _ = run(ExitRule(name="probability", thresholds={1: 0.0, 2: 0.0}), heads, skip=frozenset({1}))
    assert layer == 2
    assert heads[0].reads == 0


def test_a_gate_reads_no_matrix_until_it_fires() -> None:
    heads = [Head(1, peaked(1, 9.0), 0.4), Head(2, peaked(2, 1.0), 0.7), Head(3, peaked(3, 1.0), 0.9)]
    layer, test = run(ExitRule(name="gate", thresholds=dict.fromkeys((1, 2, 3), 0.6)), heads)
    assert layer == 2
    assert [head.reads for head in heads] == [0, 1, 0]
    assert test.confidence == {1: 0.4, 2: 0.7}


@pytest.mark.parametrize(
    ("tokens", "patience", "expected"),
    [
        ((5, 5, 5, 5), 1, 1),
        ((5, 5, 5, 5), 2, 2),
        ((5, 4, 4, 4), 2, 3),
        ((5, 4, 4, 4), 3, 4),
        ((5, 4, 5, 4), 2, None),
        ((4, 4, 5, 5), 3, None),
    ],
)
def test_patience_counts_successive_exits_that_agree(
    tokens: tuple[int, ...], patience: int, expected: int | None
) -> None:
    heads = [Head(layer, peaked(token, 1.0)) for layer, token in enumerate(tokens, 1)]
    thresholds = dict.fromkeys(range(1, 5), PATIENCE_REACHED)
    layer, test = run(ExitRule(name="patience", thresholds=thresholds, patience=patience), heads)
    assert layer == expected
    assert test.confidence[1] == 1 / patience


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_what_zero_and_one_mean(name: str) -> None:
    heads = [Head(layer, peaked(layer, 1e4), 1.0) for layer in (1, 2)]
    for threshold, expected in ((0.0, 1), (1.0, None)):
        rule = ExitRule(name=name, thresholds=dict.fromkeys((1, 2), threshold), patience=2)
        assert run(rule, heads)[0] == expected


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize(
    "bad", [[math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0], [-math.inf] * 3, [math.nan], [math.nan] * 3]
)
def test_logits_that_are_not_finite_never_fire(name: str, threshold: float, bad: list[float]) -> None:
    rule = ExitRule(name=name, thresholds={1: threshold}, patience=1)
    layer, test = run(rule, [Head(1, torch.tensor(bad), 1.0)])
    assert layer is None
    assert math.isnan(test.confidence[1])


def test_an_exit_without_a_number_ends_a_streak() -> None:
    rows = [peaked(0, 3.0), torch.full((8,), math.nan), peaked(0, 3.0), peaked(0, 3.0)]
    heads = [Head(layer, row) for layer, row in enumerate(rows, 1)]
    rule = ExitRule(name="patience", thresholds=dict.fromkeys(range(1, 5), PATIENCE_REACHED), patience=2)
    assert run(rule, heads)[0] == 4


def test_only_rules_on_logits_cost_a_projection_for_an_exit_that_does_not_fire() -> None:
    heads = {name: Head(1, peaked(1, 1.0), 0.1) for name in RULES if name != "fixed"}
    for name, head in heads.items():
        assert run(ExitRule(name=name, thresholds={1: 0.9}, patience=3), [head])[0] is None
    assert {name for name, head in heads.items() if head.reads} == {*heads} - {"gate"}


def test_decay_uses_the_position() -> None:
    heads = [Head(1, peaked(1, 3.0))]
    score = probability(heads[0].row)
    threshold = (score - 0.05) / 0.9
    rule = ExitRule(name="decay", thresholds={1: threshold})
    assert run(rule, heads, position=0, length=50)[0] is None
    assert run(rule, heads, position=49, length=50)[0] == 1


@pytest.mark.parametrize("threshold", [math.nan, -0.1, 1.1, math.inf, "0.5", None])
def test_a_threshold_outside_of_its_range_is_refused(threshold: Any) -> None:
    with pytest.raises(UserError, match="between 0"):
        check_threshold(threshold)
    with pytest.raises(UserError, match="exit 3"):
        ExitRule(name="probability", thresholds={3: threshold})


def test_numbers_of_numpy_are_thresholds() -> None:
    import numpy as np

    check_threshold(np.float32(0.5))


def test_unknown_rules_and_no_patience_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'entropy'"):
        ExitRule(name="entropi", thresholds={})
    with pytest.raises(UserError, match="patience is 0"):
        ExitRule(name="patience", thresholds={}, patience=0)
