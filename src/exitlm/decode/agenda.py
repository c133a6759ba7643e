"""The agenda: which rows the next pass takes, and how far.

Before a pass, the newest token of each text is prepared: drafts that the text itself offers come behind it, or it is
said which exits test it. Where drafts or the rows of several texts compete, ``pricing/scheduler.py`` chooses by the
price of time; else all that is ready starts together and goes to the end. Nothing is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass

from exitlm.decode.arrival import Runs
from exitlm.decode.options import EngineConfig
from exitlm.decode.pricing.pricing import Pricing
from exitlm.decode.roster import Roster
from exitlm.decode.rules import ExitTest
from exitlm.decode.sequence import Draft, Sequence


@dataclass(frozen=True, slots=True)
class Chosen:
    """A pass: from boundary ``first`` to ``last``, how many rows of which sequences, and the keys of those whose newest
    row is tested at ``last``."""

    first: int
    last: int
    members: list[tuple[Sequence, int]]
    tested: set[int]


class Agenda:
    """What the running texts of one engine do next."""

    def __init__(self, runner: Runs, roster: Roster, pricing: Pricing, options: EngineConfig) -> None:
        """``roster`` tells who runs, and gets the blocks that a pass writes."""
        self.runner, self.roster, self.pricing, self.options = runner, roster, pricing, options

    def next_pass(self) -> Chosen | None:
        """What to run next. Where nothing is to be weighed, all that is ready starts together and goes to the end."""
        for sequence in list(self.roster.running):
            if sequence.filled[0] >= sequence.prefill_end and not sequence.prepared and not sequence.moving:
                self.prepare(sequence)
        alone = len(self.roster.running) == 1
        if not alone:
            for sequence in self.roster.running:
                sequence.alone = False
        if any(s.is_priced or (not alone and s.plan.rule is not None) for s in self.roster.running):
            return self._priced_pass()
        moving = [sequence for sequence in self.roster.running if sequence.moving]
        if moving:
            first = min(sequence.front for sequence in moving)
            return self._as_far(first, [(s, s.rows_at(first)) for s in moving if s.front == first])
        decoding = sum(not sequence.prefilling for sequence in self.roster.running)
        room, ready = min(self.options.prefill_chunk, self.options.max_rows - decoding), []
        for sequence in list(self.roster.running):
            rows = sequence.rows_at(0)
            if sequence.filled[0] < sequence.prefill_end:
                rows = min(room, rows)
                room -= rows
            if rows and self.roster.reserve(sequence, rows):
                ready.append((sequence, rows))
        return self._as_far(0, [(s, rows) for s, rows in ready if s.tables])  # some may have given way for others

    def _as_far(self, first: int, members: list[tuple[Sequence, int]]) -> Chosen | None:
        """A pass of these rows to the next boundary where one is tested or others wait, or to the end."""
        if not members:
            return None
        fronts = (
            {sequence.front for sequence in self.roster.running if sequence.moving}
            if len(self.roster.running) > 1
            else ()
        )
        for boundary in range(first + 1, self.runner.segments):
            tested = {s.key for s, count in members if self._tries(s, boundary, s.filled[first] + count)}
            comes_along = any(s.filled[boundary] < s.filled[boundary - 1] for s, _ in members)
            if tested or comes_along or boundary in fronts:
                return Chosen(first, boundary, members, tested)
        return Chosen(first, self.runner.segments, members, set())

    def _priced_pass(self) -> Chosen | None:
        """What the scheduler chooses by the price of time."""
        found = self.pricing.choose(self.roster.running)
        if found is None:
            return None
        by_key, bounds = {sequence.key: sequence for sequence in self.roster.running}, self.runner.bounds
        members: list[tuple[Sequence, int]] = []
        for member in found.members:
            sequence = by_key[member.key]
            if found.first == 0:
                if not self.roster.reserve(sequence, member.rows):
                    continue
                if not sequence.prefilling:  # drafts that were not taken
                    sequence.drop_drafts(sequence.filled[0] + member.rows - len(sequence.ids))
            members.append((sequence, member.rows))
        members = [(sequence, rows) for sequence, rows in members if sequence.tables]
        tested = {member.key for member in found.members if member.tested}
        return Chosen(bounds.index(found.first), bounds.index(found.last), members, tested) if members else None

    def _tries(self, sequence: Sequence, boundary: int, end: int) -> bool:
        """Whether a pass that brings the rows below ``end`` to a boundary brings one that is tested there."""
        test = sequence.test
        return test is not None and end == sequence.length and test.tries(self.runner.bounds[boundary])

    def prepare(self, sequence: Sequence) -> bool:
        """Before the newest token enters: drafts that the text itself offers, or the exits that test it. False if the
        sequence has to be computed anew first."""
        original = self.runner.fused.original_context
        if original is not None and not sequence.stretched and len(sequence.ids) > original:
            self.roster.preempt(sequence)  # all its positions are rotated otherwise from here on
            return False
        sequence.prepared, sequence.test = True, None
        rule, config, position = sequence.plan.rule, sequence.config, sequence.length - sequence.prompt_length
        if config.mode != "lossless":
            if rule is not None and position >= config.min_exit_tokens:
                sequence.test = ExitTest(rule, position, sequence.output.max_new_tokens)
            return True
        drafting, known = sequence.drafting, len(sequence.drafts)
        assert drafting is not None
        room = sequence.output.max_new_tokens - sequence.generated - 1
        if original is not None and not sequence.stretched:  # drafts don't cross into other rotations
            room = min(room, original - len(sequence.ids))
        room -= known
        if room < 1:
            return True
        if self._draft_from_text(sequence, min(room, drafting.limit - known)):
            sequence.prepared = True
        elif rule is not None and known < drafting.exit_limit and position >= config.min_exit_tokens:
            sequence.test = ExitTest(rule, position, sequence.output.max_new_tokens)
        return True

    def _draft_from_text(self, sequence: Sequence, room: int) -> bool:
        """Draft what a grammar forces, what the request expects, or what followed the same tokens before; whether there
        was any."""
        final, drafting = self.runner.bounds[-1], sequence.drafting
        assert drafting is not None
        if sequence.grammar is not None and "grammar" in sequence.config.draft:
            forced = sequence.grammar.jump_forward()[:room]
            if sequence.extend_drafts([Draft(token, final, "grammar", "grammar", 0.95) for token in forced]):
                return True
        if sequence.prediction is not None:
            expected = sequence.prediction.draft([draft.token for draft in sequence.drafts], room)
            if sequence.extend_drafts([self._expected(sequence, token, i) for i, token in enumerate(expected)]):
                return True
        if sequence.index is None:
            return False
        found, n = sequence.index.draft([draft.token for draft in sequence.drafts], room)
        drafts = []
        for i, token in enumerate(found):
            _, right = drafting.odds(
                ("lookup", n), self.pricing.acceptance, sequence.generated, len(sequence.drafts) + i
            )
            drafts.append(Draft(token, final, "lookup", ("lookup", n), right))
        return sequence.extend_drafts(drafts)

    def _expected(self, sequence: Sequence, token: int, at: int) -> Draft:
        """A draft of what the request expects, behind ``at`` others of this round and those before."""
        assert sequence.drafting is not None
        behind = len(sequence.drafts) + at
        _, right = sequence.drafting.odds("prediction", self.pricing.acceptance, sequence.generated, behind)
        return Draft(token, self.runner.bounds[-1], "prediction", "prediction", right)
