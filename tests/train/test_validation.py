"""What decoding is told about an exit, against the definitions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.model.exits import ExitConfig
from exitlm.train.backbone import TorchBackbone
from exitlm.train.data import Blocks
from exitlm.train.heads import Heads
from exitlm.train.hidden import HiddenStates, Wanted
from exitlm.train.objective import LossSettings
from exitlm.train.tested import ExitReads, Reads, reads_of
from exitlm.train.validation import (
    GRID,
    LEAST_FIRED,
    Scores,
    calibration,
    evaluate,
    precision_threshold,
    record,
    records,
)
from tests.model.families import tiny_model


@given(
    data=st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=60),
    precision=st.sampled_from([0.5, 0.8, 0.95]),
)
@settings(max_examples=200, deadline=None)
def test_threshold_is_the_smallest_precise_score(data: list[tuple[int, bool]], precision: float) -> None:
    score = torch.tensor([s / 8 for s, _ in data], dtype=torch.float64)
    correct = torch.tensor([c for _, c in data])
    good = [
        float(t)
        for t in score.unique()
        if (score >= t).sum() >= LEAST_FIRED and correct[score >= t].double().mean() >= precision
    ]
    assert precision_threshold(score, correct, precision) == min(good, default=1.0)


def test_calibration_on_the_grid() -> None:
    score, correct = torch.tensor([0.1, 0.5, 0.9, 0.97], dtype=torch.float64), torch.tensor([False, True, False, True])
    table = calibration(score, correct)
    assert table.scores == GRID
    assert len(GRID) == 51
    assert table.coverage[0] == 1.0
    assert table.precision[0] == 0.5
    at = GRID.index(0.9)
    assert (table.coverage[at], table.precision[at]) == (0.5, 0.5)
    assert (table.coverage[-1], table.precision[-1]) == (0.0, 1.0)


def test_record_of_an_exit_that_is_never_sure() -> None:
    score, correct = torch.rand(100).double(), torch.zeros(100, dtype=torch.bool)
    found = record(Scores(loss=1.0, correct_N=correct, score_N=score, rule="gate", against_final=True))
    assert found.threshold == 1.0
    assert found.coverage == 0.0
    assert found.precision == 1.0
    assert found.agreement == 0.0
    assert found.rule == "gate"


def test_choose_tested_fire_at_their_stored_thresholds() -> None:
    """Exit 1 is sure and right for half of the tokens, exit 2 for the same ones, exit 3 for none."""
    sure = torch.arange(100) < 50
    score = torch.where(sure, 0.9, 0.1).double()
    scores = {
        e: Scores(loss=1.0, correct_N=correct, score_N=score, rule="probability", against_final=True)
        for e, correct in {1: sure, 2: sure, 3: ~sure}.items()
    }
    test = ExitReads(rule="probability", test=1, emit=0)
    found = records(scores, Reads(layer=10, num_layers=4, head=0, exits=dict.fromkeys((1, 2, 3), test)))
    assert {e: (one.coverage, one.tested) for e, one in found.items()} == {
        1: (0.5, True),
        2: (0.5, False),
        3: (0.0, False),
    }
    for e, one in found.items():
        assert replace(one, tested=None) == record(scores[e])


@pytest.fixture
def blocks() -> Blocks:
    ids = np.random.Generator(np.random.PCG64(0)).integers(3, 97, 90).astype(np.uint16)
    segments = np.array([[0, 30 * i, 30 * i + 30, 0] for i in range(3)], dtype=np.int64)
    return Blocks([ids], segments, np.arange(4, dtype=np.int64), "d")


@pytest.mark.parametrize("final", [True, False])
def test_evaluate_against_plain_logits(blocks: Blocks, tmp_path: Path, final: bool) -> None:
    model = tiny_model("llama")
    model.add_exits([ExitConfig(layer=1, gate=True), ExitConfig(layer=2, kind="norm", candidates=40)])
    heads = Heads(model, torch.float64)
    wanted = Wanted(exits=(1, 2), final=final)
    hidden = HiddenStates(TorchBackbone(model), blocks, wanted, keep="memory", limit=1e9, home=tmp_path / "h")
    found = evaluate(heads, hidden, LossSettings(distill=1.0 if final else 0.0))
    ids = torch.stack([blocks[i][0].ids for i in range(3)])
    logits, exits = model.logits(ids[:, :-1]), model.exit_logits(ids[:, :-1])
    target = logits.argmax(-1) if final else ids[:, 1:]
    for layer in (1, 2):
        assert torch.equal(found[layer].correct_N, (exits[layer].argmax(-1) == target).flatten())
        assert found[layer].against_final == final
    if final:
        p = logits.softmax(-1)
        loss = (p * (p.log() - exits[1].log_softmax(-1))).sum(-1).mean()
        assert found[1].loss == pytest.approx(float(loss), abs=1e-12)
    else:
        assert record(found[1]).threshold is None
        assert record(found[1]).accuracy == found[1].agreement
        assert [one.tested for one in records(found, reads_of(model)).values()] == [None, None]
    torch.testing.assert_close(found[2].score_N, exits[2].softmax(-1).amax(-1).flatten(), rtol=0, atol=1e-12)
    assert (found[1].rule, found[2].rule) == ("gate", "probability")
    assert torch.equal(found[1].score_N, torch.full((87,), 0.5, dtype=torch.float64))
