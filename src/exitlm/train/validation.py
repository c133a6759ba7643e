"""How well tuned exits do on held-out text, and what decoding should know about it: the record of each exit.

The calibration here is descriptive: precision and coverage of a threshold on this text. It states no risk with a
confidence.

Shapes: N tokens, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exitlm.model.record import Calibration, ExitRecord
from exitlm.train.heads import Heads
from exitlm.train.hidden import HiddenStates
from exitlm.train.objective import LossSettings, linear_losses
from exitlm.train.tested import Reads, choose_tested

PRECISION = 0.95
GRID = tuple(i / 50 for i in range(51))
LEAST_FIRED = 10


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One exit on held-out tokens. ``correct_N``: its best id is the final head's (the next token of the text where the
    final head was not run); ``score_N``: the gate where there is one, else the largest probability."""

    loss: float
    correct_N: Tensor
    score_N: Tensor
    rule: str
    against_final: bool

    @property
    def agreement(self) -> float:
        """The share of tokens that are right."""
        return float(self.correct_N.double().mean())


@torch.no_grad()
def evaluate(
    heads: Heads, hidden: HiddenStates, settings: LossSettings, report: Callable[[int, int], None] = lambda *_: None
) -> dict[int, Scores]:
    """Losses and scores of every exit over all of ``hidden``, in the dtype of the parameters. ``report`` is told how
    many rows of how many are done."""
    tokens = hidden.blocks.total_targets()
    losses = dict.fromkeys(heads.layers, 0.0)
    correct: dict[int, list[Tensor]] = {layer: [] for layer in heads.layers}
    scores: dict[int, list[Tensor]] = {layer: [] for layer in heads.layers}
    against_final = hidden.wanted.final
    for index in range(len(hidden)):
        report(index, len(hidden))
        batch = heads.batch([hidden.row(index)], heads.master)
        weight_N = batch.weights(1.0 / tokens, heads.master)
        result = linear_losses(
            batch.inputs, weight_N, labels_N=batch.labels_N, teacher=batch.teacher, settings=settings
        )
        for e, layer in enumerate(heads.layers):
            gate = batch.gates[e]
            losses[layer] += float(result.loss_E[e])
            correct[layer].append(result.correct_EN[e].cpu())
            scores[layer].append((result.confidence_EN[e] if gate is None else torch.sigmoid(gate)).double().cpu())
    return {
        layer: Scores(
            loss=losses[layer],
            correct_N=torch.cat(correct[layer]),
            score_N=torch.cat(scores[layer]),
            rule="gate" if heads.by_layer[layer].config.gate else "probability",
            against_final=against_final,
        )
        for layer in heads.layers
    }


def precision_threshold(score_N: Tensor, correct_N: Tensor, precision: float = PRECISION) -> float:
    """The smallest score such that the tokens at or above it are right with at least ``precision``; 1.0 (never) where
    no score does so for at least ``LEAST_FIRED`` tokens."""
    if not len(score_N):
        return 1.0
    score, order = score_N.sort(descending=True)
    right = correct_N[order].double().cumsum(0)
    count = torch.arange(1, len(score) + 1)
    last_of_value = torch.cat([score[1:] < score[:-1], torch.tensor([True])])
    good = (right >= precision * count) & last_of_value & (count >= LEAST_FIRED)
    return float(score[good.nonzero()[-1, 0]]) if good.any() else 1.0


def calibration(score_N: Tensor, correct_N: Tensor) -> Calibration:
    """Coverage and precision of the thresholds 0, 0.02 ... 1; precision is 1 where nothing fires."""
    coverage, precision = [], []
    for threshold in GRID:
        fired = score_N >= threshold
        count = int(fired.sum())
        coverage.append(round(count / max(1, len(score_N)), 6))
        precision.append(round(int(correct_N[fired].sum()) / count, 6) if count else 1.0)
    return Calibration(scores=GRID, coverage=tuple(coverage), precision=tuple(precision))


def fired(score_N: Tensor, threshold: float) -> Tensor:
    """For which tokens an exit fires, ``[N]`` bool: a threshold of 1 never does."""
    return (score_N >= threshold) & (threshold < 1.0)


def record(scores: Scores) -> ExitRecord:
    """What one exit measures by itself. Without the final head there is nothing to agree with: then it holds the
    accuracy on the text, and no threshold."""
    tokens = len(scores.correct_N)
    if not scores.against_final:
        return ExitRecord(accuracy=round(scores.agreement, 6), loss=scores.loss, tokens=tokens)
    threshold = precision_threshold(scores.score_N, scores.correct_N)
    fired_N = fired(scores.score_N, threshold)
    count = int(fired_N.sum())
    return ExitRecord(
        agreement=round(scores.agreement, 6),
        loss=scores.loss,
        tokens=tokens,
        rule=scores.rule,
        threshold=threshold,
        coverage=round(count / max(1, tokens), 6),
        precision=round(int(scores.correct_N[fired_N].sum()) / count, 6) if count else 1.0,
        calibration=calibration(scores.score_N, scores.correct_N),
    )


def records(scores: Mapping[int, Scores], reads: Reads) -> dict[int, ExitRecord]:
    """The records that go into the adapter, by layer: each exit's own, and which of them mode ``threshold`` tests by
    default (:func:`exitlm.train.tested.choose_tested`). Exits without a threshold leave that open."""
    found = {layer: record(one) for layer, one in scores.items()}
    fires_EN = {e: fired(scores[e].score_N, r.threshold) for e, r in found.items() if r.threshold is not None}
    chosen = choose_tested(reads, fires_EN)
    return {e: replace(r, tested=e in chosen) if e in fires_EN else r for e, r in found.items()}
