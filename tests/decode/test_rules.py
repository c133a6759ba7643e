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
    ExitTest,
    check_threshold,
    decayed,
    entropy,
    fires,
    margin,
    probability,
)
from exitlm.errors import UserError

LOGITS = st.integers(1, 12).flatmap(
    lambda size: st.lists(st.lists(st.floats(-30, 30), min_size=size, max_size=size), min_size=1, max_size=4)
)


def softmax(row: list[float]) -> list[float]:
    """In plain numbers, descending."""
    top = max(row)
    weights = sorted((math.exp(x - top) for x in row), reverse=True)
    return [w / sum(weights) for w in weights]


@settings(deadline=None, derandomize=True, database=None)
@given(LOGITS)
def test_scores_are_what_they_say(rows: list[list[float]]) -> None:
    logits_TK = torch.tensor(rows, dtype=torch.float64)
    for i, row in enumerate(rows):
        p = softmax(row)
        assert float(probability(logits_TK)[i]) == pytest.approx(p[0], abs=1e-12)
        assert float(margin(logits_TK)[i]) == pytest.approx(p[0] - p[1] if len(p) > 1 else 1.0, abs=1e-12)
        information = -sum(x * math.log(x) for x in p if x > 0)
        expected = 1.0 if len(p) == 1 else 1.0 - information / math.log(len(p))
        assert float(entropy(logits_TK)[i]) == pytest.approx(expected, abs=1e-9)
    assert all(0.0 <= float(score) <= 1.0 for rule in SCORES.values() for score in rule(logits_TK))


@settings(deadline=None, derandomize=True, database=None)
@given(LOGITS, st.data())
def test_the_score_of_a_row_depends_on_no_other_row(rows: list[list[float]], data: st.DataObject) -> None:
    """Not even on one that is not finite."""
    logits_TK = torch.tensor(rows, dtype=torch.float64)
    spoilt_TK = logits_TK.clone()
    bad = data.draw(st.integers(0, len(rows) - 1))
    spoilt_TK[bad] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    for rule in SCORES.values():
        scores, spoilt = rule(logits_TK).tolist(), rule(spoilt_TK).tolist()
        alone = [float(rule(row_K[None])) for row_K in logits_TK]
        assert scores == pytest.approx(alone, abs=1e-12)
        assert math.isnan(spoilt.pop(bad))
        scores.pop(bad)
        assert spoilt == pytest.approx(scores, abs=1e-12)


def test_scores_of_logits_that_are_minus_infinity() -> None:
    logits = torch.tensor([[2.0, -torch.inf, 1.0]])
    assert probability(logits).tolist() == pytest.approx([1 / (1 + math.exp(-1))])
    assert margin(logits).tolist() == pytest.approx([(1 - math.exp(-1)) / (1 + math.exp(-1))])
    assert 0.0 < float(entropy(logits)) < 1.0


@pytest.mark.parametrize("name", ["probability", "margin", "entropy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_short_floats_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    logits_TK = (torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)) + 24.0).to(dtype)
    found, expected = SCORES[name](logits_TK), SCORES[name](logits_TK.double())
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3)


@pytest.mark.parametrize("score", [0.0, 0.3, 1.0])
def test_threshold_one_never_fires_and_zero_always_does(score: float) -> None:
    assert not fires(score, 1.0)
    assert fires(score, 0.0)


def test_a_score_at_the_threshold_fires() -> None:
    assert fires(0.5, 0.5)
    assert not fires(math.nextafter(0.5, 0), 0.5)
    assert not fires(math.nan, 0.5)


def test_a_saturated_softmax_does_not_fire_at_one() -> None:
    logits = torch.tensor([[1000.0, 0.0, 0.0]])
    for name in ("probability", "margin", "entropy"):
        assert SCORES[name](logits).tolist() == [1.0]
        assert not fires(float(SCORES[name](logits)), 1.0)


def test_the_decaying_threshold() -> None:
    assert decayed(0.8, 0, 100) == pytest.approx(0.9 * 0.8 + 0.1)
    assert decayed(0.8, 100, 100) == pytest.approx(0.9 * 0.8 + 0.1 * math.exp(-4))
    assert [decayed(t, p, 7) for t in (0.0, 1.0) for p in (0, 3, 7)] == [0.0] * 3 + [1.0] * 3
    falling = [decayed(0.5, p, 20) for p in range(20)]
    assert falling == sorted(falling, reverse=True)
    assert decayed(1 - 1e-9, 0, 10) < 1.0
    assert decayed(0.5, 0, 0) == pytest.approx(0.55)


Exit = tuple[int, Tensor]
"""The layer of an exit, and its logits ``[K]``."""


def run(
    rule: ExitRule, exits: list[Exit], gates: dict[int, float] | None = None, **options: Any
) -> tuple[int | None, ExitTest]:
    """The layer that fires, and the test as it is left. As an engine does, with the best row of the logits as token."""
    test = ExitTest(rule, **options)
    for layer, logits_K in exits:
        if not test.tries(layer):
            continue
        score = float(SCORES[rule.name](logits_K[None])) * (1.0 if gates is None else gates[layer])
        if test.fires(layer, score, int(logits_K.argmax())):
            return layer, test
    return None, test


def peaked(token: int, height: float) -> Tensor:
    """Logits with one peak."""
    return torch.zeros(8).index_fill_(0, torch.tensor(token), height)


@pytest.mark.parametrize("name", ["probability", "margin", "entropy"])
def test_the_first_exit_that_is_sure_enough_fires(name: str) -> None:
    exits = [(layer, peaked(1, height)) for layer, height in ((1, 1.0), (2, 3.0), (3, 6.0))]
    scores = [float(SCORES[name](logits_K[None])) for _, logits_K in exits]
    assert scores == sorted(scores)
    for threshold, expected in ((0.0, 1), (scores[1], 2), (scores[1] + 1e-6, 3), (scores[2] + 1e-6, None), (1.0, None)):
        layer, test = run(ExitRule(name=name, thresholds=dict.fromkeys((1, 2, 3), threshold)), exits)
        assert layer == expected
        tried = scores[: 3 if expected is None else expected]
        assert list(test.confidence.values()) == tried


def test_each_exit_has_its_own_threshold_and_inactive_ones_are_not_tried() -> None:
    exits = [(layer, peaked(1, 3.0)) for layer in (1, 2, 3)]
    layer, test = run(ExitRule(name="probability", thresholds={1: 1.0, 3: 0.2}), exits)
    assert layer == 3
    assert set(test.confidence) == {1, 3}


def test_skipped_exits_are_not_tried() -> None:
    exits = [(layer, peaked(1, 3.0)) for layer in (1, 2)]
    layer, test = run(ExitRule(name="probability", thresholds={1: 0.0, 2: 0.0}), exits, skip=frozenset({1}))
    assert layer == 2
    assert set(test.confidence) == {2}


def test_a_gate_has_its_own_score() -> None:
    """Whatever the logits say, as long as they are finite; its logits need not be there where it does not fire."""
    exits = [(1, peaked(1, 9.0)), (2, peaked(2, 1.0)), (3, peaked(3, 1.0))]
    rule = ExitRule(name="gate", thresholds=dict.fromkeys((1, 2, 3), 0.6))
    layer, test = run(rule, exits, {1: 0.4, 2: 0.7, 3: 0.9})
    assert layer == 2
    assert test.confidence == {1: 0.4, 2: 0.7}
    quiet = ExitTest(rule)
    assert not quiet.fires(1, 0.4)
    assert quiet.confidence == {1: 0.4}


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
    exits = [(layer, peaked(token, 1.0)) for layer, token in enumerate(tokens, 1)]
    thresholds = dict.fromkeys(range(1, 5), PATIENCE_REACHED)
    layer, test = run(ExitRule(name="patience", thresholds=thresholds, patience=patience), exits)
    assert layer == expected
    assert test.confidence[1] == 1 / patience


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_what_zero_and_one_mean(name: str) -> None:
    exits = [(layer, peaked(layer, 1e4)) for layer in (1, 2)]
    for threshold, expected in ((0.0, 1), (1.0, None)):
        rule = ExitRule(name=name, thresholds=dict.fromkeys((1, 2), threshold), patience=2)
        assert run(rule, exits)[0] == expected


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize(
    "bad", [[math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0], [-math.inf] * 3, [math.nan], [math.nan] * 3]
)
def test_logits_that_are_not_finite_never_fire(name: str, threshold: float, bad: list[float]) -> None:
    rule = ExitRule(name=name, thresholds={1: threshold}, patience=1)
    layer, test = run(rule, [(1, torch.tensor(bad))])
    assert layer is None
    assert math.isnan(test.confidence[1])


def test_an_exit_without_a_number_ends_a_streak() -> None:
    rows = [peaked(0, 3.0), torch.full((8,), math.nan), peaked(0, 3.0), peaked(0, 3.0)]
    rule = ExitRule(name="patience", thresholds=dict.fromkeys(range(1, 5), PATIENCE_REACHED), patience=2)
    assert run(rule, list(enumerate(rows, 1)))[0] == 4


def test_decay_uses_the_position() -> None:
    exits = [(1, peaked(1, 3.0))]
    score = float(probability(exits[0][1][None]))
    rule = ExitRule(name="decay", thresholds={1: (score - 0.05) / 0.9})
    assert run(rule, exits, position=0, length=50)[0] is None
    assert run(rule, exits, position=49, length=50)[0] == 1


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
