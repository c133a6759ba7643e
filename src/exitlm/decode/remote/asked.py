"""What the engine asks of rows before they set out, and reads of them when they have arrived.

The two have to agree: whatever :class:`~exitlm.decode.engine.Engine` looks at where rows arrive was wanted when the
pass was submitted, by the state that the sequences had then. No sequence wants more of a row later: one that goes on
meanwhile wants less, and one that is taken back nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exitlm.decode.departed import Departed, by_adapter, prompt_positions
from exitlm.decode.kernels.scores import Scores
from exitlm.decode.logits import is_given
from exitlm.decode.work import AtExit, Brought, Final, Follower, Scored, Wants


def wants(departed: Departed, bounds: Sequence[int]) -> Wants:
    """What the engine will ask of the rows of a pass when they arrive."""
    if departed.last < len(bounds) - 1:
        layer, tests = bounds[departed.last], []
        for adapter, members in by_adapter(departed.members, departed.tested, layer).items():
            texts = [member.sequence for member in members]
            gates = tuple(s.plan.threshold(layer) if s.plan.rule_name == "gate" else math.nan for s in texts)
            logits = tuple(not (s.plain and is_given(s)) or bool(s.config.logprobs) for s in texts)
            tests.append(AtExit(adapter, tuple(member.newest for member in members), gates, logits))
        return Wants(tests=tuple(tests))
    finals, followers = [], []
    for member in departed.members:
        sequence = member.sequence
        needs = not sequence.plain or bool(sequence.config.logprobs)
        finals += [Final(row, needs) for row in member.final_rows()]
        if sequence.wants_prompt_scores:
            most = sequence.config.prompt_logprobs or 0
            for position in prompt_positions(member):
                followers.append(Follower(member.row + position - member.start, sequence.ids[position + 1], most))
    return Wants(finals=tuple(finals), followers=tuple(followers))


@dataclass(frozen=True, slots=True)
class There:
    """What another process brought; see :class:`~exitlm.decode.arrival.Arrival`."""

    brought: Brought

    @property
    def hidden_MD(self) -> Tensor | None:
        """Hidden states ``[M, D]``, where they left their stage."""
        return self.brought.hidden_MD

    def gates(self, rows: Sequence[int], adapter: str) -> list[float]:
        """See :class:`~exitlm.decode.arrival.Arrival`."""
        return [self.brought.tests[adapter][row].gate for row in rows]

    def exit_scores(self, rows: Sequence[int], adapter: str) -> Scores:
        """See :class:`~exitlm.decode.arrival.Arrival`."""
        return joined([self.brought.tests[adapter][row] for row in rows])

    def final_scores(self, rows: Sequence[int]) -> Scores:
        """See :class:`~exitlm.decode.arrival.Arrival`."""
        return joined([self.brought.finals[row] for row in rows])

    def log_probabilities(
        self, rows: Sequence[int], tokens: Sequence[int], most: int
    ) -> list[tuple[float, dict[int, float]]]:
        """See :class:`~exitlm.decode.arrival.Arrival`."""
        return [self.brought.followers[row] for row in rows]


def joined(rows: Sequence[Scored]) -> Scores:
    """Scores of several rows; logits that nobody asked for are NaN."""
    known = [row.logits_K for row in rows if row.logits_K is not None]
    width, dtype = (known[0].shape[0], known[0].dtype) if known else (1, torch.float32)
    logits_MK = torch.full((len(rows), width), math.nan, dtype=dtype)
    for i, row in enumerate(rows):
        if row.logits_K is not None:
            logits_MK[i] = row.logits_K
    return Scores(
        logits_MK, [row.best for row in rows], [row.finite for row in rows], [row.probability for row in rows]
    )
