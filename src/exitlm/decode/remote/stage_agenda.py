"""What each stage does next: the rows that wait at its boundaries, as the policy of idle stages sees them.

The policy is :mod:`exitlm.decode.pricing.stages`, a pure function; here sequences become plain data, and its choice
rows of sequences. Nothing is computed.
"""

from __future__ import annotations

import math

from exitlm.decode.agenda import Agenda, Chosen
from exitlm.decode.options import EngineConfig
from exitlm.decode.pricing.scheduler import Limits
from exitlm.decode.pricing.stages import StageView, Waiting, next_stage_pass
from exitlm.decode.remote.pipeline import Pipeline
from exitlm.decode.sequence import Sequence

_MOST_NOTED = 4096
_DEPTH_WEIGHT = 0.02


class StageAgenda:
    """What the stages of one pipeline do next."""

    def __init__(self, agenda: Agenda, pipeline: Pipeline, options: EngineConfig) -> None:
        self._agenda, self._pipeline, self._roster, self._bounds = agenda, pipeline, agenda.roster, pipeline.bounds
        self._limits = Limits(max_rows=options.max_rows, prefill_chunk=options.prefill_chunk, max_wait=options.max_wait)
        self._turn, self._depth = 0, float(pipeline.stages)
        self._since: dict[tuple[int, int], tuple[int, int]] = {}

    def next_pass(self, number: int) -> Chosen | None:
        """The next pass of a stage; None if it had better wait."""
        share, bounds = self._pipeline.shares[number], self._bounds
        if number == 0:
            for sequence in list(self._roster.running):
                if not sequence.prefilling and sequence.sent[0] >= sequence.prefill_end and not sequence.prepared:
                    self._agenda.prepare(sequence)
        self._turn += 1
        waiting = []
        for sequence in self._roster.running:
            sent, filled = sequence.sent, sequence.filled
            for boundary in range(share.first, share.last):
                entered = filled[boundary - 1] if boundary else max(sequence.length, sequence.prefill_end)
                if entered > sent[boundary]:
                    found = self._waiting(sequence, boundary)
                    if found is not None:
                        waiting.append(found)
        if not waiting:
            return None
        view = StageView(
            first=bounds[share.first], last=bounds[share.last], waiting=tuple(waiting),
            seconds=self._pipeline.seconds[number], coming=self._coming(number), stages=self._pipeline.stages,
            sequences=sum(not sequence.prefilling for sequence in self._roster.running),
            row=self._pipeline.row_seconds[number], depth=self._depth,
        )  # fmt: skip
        chosen = next_stage_pass(view, self._limits)
        if chosen is None:
            return None
        by_key = {sequence.key: sequence for sequence in self._roster.running}
        members = [(by_key[member.key], member.rows) for member in chosen.members]
        if chosen.first == 0:
            members = [(sequence, rows) for sequence, rows in members if self._roster.reserve(sequence, rows)]
        members = [(sequence, rows) for sequence, rows in members if sequence.tables]  # some gave way for others
        tested = {member.key for member in chosen.members if member.tested}
        first, last = bounds.index(chosen.first), bounds.index(chosen.last)
        return Chosen(first, last, members, tested) if members else self.next_pass(number)

    def passed(self, stages: int) -> None:
        """A row has passed so many stages when the next one of its sequence could start."""
        self._depth += _DEPTH_WEIGHT * (stages - self._depth)

    def _coming(self, number: int) -> float:
        """Seconds until rows may come to a stage."""
        pipeline = self._pipeline
        before = range(1, pipeline.stages) if number == 0 else (number - 1,)
        return min((pipeline.left(one) for one in before if one not in pipeline.free), default=math.inf)

    def _waiting(self, sequence: Sequence, boundary: int) -> Waiting | None:
        """The rows of a sequence that wait at a boundary."""
        sent, filled = sequence.sent[boundary], sequence.filled
        if boundary:
            rows = filled[boundary - 1] - sent
        elif sequence.prefilling:
            rows = max(0, sequence.prefill_end - sent)
        else:
            rows = sequence.length - sent
        if rows <= 0:
            return None
        end, lossless = sent + rows, sequence.config.mode == "lossless"
        worths, verified = sequence.worths() if lossless and not sequence.prefilling else [1.0], len(sequence.ids) - 1
        worth = worths[min(max(0, sent - verified), len(worths) - 1)]
        if sequence.prefilling:
            kind = "prompt"
        elif boundary == 0:
            kind = "start"
        elif lossless:
            kind = "must" if sent <= verified else "draft"
        else:
            kind = "must" if end <= sequence.deep_end else "fill"
        exits: tuple[int, ...] = ()
        if sequence.test is not None and end == sequence.length:
            layer = self._bounds[boundary]
            exits = tuple(e for e in sequence.plan.exits if e > layer and sequence.test.tries(e))
        return Waiting(
            key=sequence.key, layer=self._bounds[boundary], rows=rows, kind=kind, exits=exits, worth=worth,
            pressed=kind == "fill" and sequence.deep_end > sent, since=self._came(sequence, boundary, sent),
        )  # fmt: skip

    def _came(self, sequence: Sequence, boundary: int, sent: int) -> int:
        """Since which turn the rows wait."""
        at, since = self._since.get((sequence.key, boundary), (-1, 0))
        if at != sent:
            since = self._turn
            self._since[sequence.key, boundary] = sent, since
            if len(self._since) > _MOST_NOTED:
                running = {sequence.key for sequence in self._roster.running}
                self._since = {place: noted for place, noted in self._since.items() if place[0] in running}
        return since
