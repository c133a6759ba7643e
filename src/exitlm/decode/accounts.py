"""The accounts: what passes took, what they gave, and who is told.

The scheduler learns from each pass, a sequence how long it waited, and the user where a mode was slower than another.
No token depends on any of it.
"""

from __future__ import annotations

import collections.abc
import time
from dataclasses import dataclass, field

from exitlm.decode.agenda import Chosen
from exitlm.decode.arrival import Runs
from exitlm.decode.generation import Stats
from exitlm.decode.pricing.drafting import MOST_DRAFTS
from exitlm.decode.pricing.pass_times import PassTimes
from exitlm.decode.pricing.pricing import Pricing
from exitlm.decode.sequence import Draft, Sequence


@dataclass(frozen=True, slots=True)
class Before:
    """What was known of a pass before it ran: the sequences that decode and the tokens that they had; rows of those
    sequences, and of all; rows of final logits, the positions of a sequence on average, and the tokens that drafts may
    bring."""

    decoding: list[Sequence]
    generated: int
    rows: tuple[int, int]
    heads: int
    context: float
    worth: float


@dataclass
class DraftCounts:
    """Drafts of all texts so far: ``rounds`` in which some were verified, how many were ``drafted`` (verified, or
    dropped behind one that was refused), and how many were accepted at each position of a round."""

    rounds: int = 0
    drafted: int = 0
    accepted_at: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)


class Accounts:
    """Of one engine. ``times`` are those of passes of a single row, ``drafts`` the counts of all that was verified."""

    def __init__(self, runner: Runs, pricing: Pricing) -> None:
        self.runner, self.pricing = runner, pricing
        self.times, self.drafts = PassTimes(), DraftCounts()
        self.in_kernels = 0.0  # seconds of this step
        self._busy, self._begun = 0.0, 0.0

    # ---- the engine's own clock

    def begin_step(self) -> None:
        """From here on time counts."""
        self._begun = time.perf_counter()
        self.in_kernels = 0.0

    def end_step(self) -> None:
        """From here on it does not."""
        self._busy = self.now()

    def now(self) -> float:
        """Seconds spent in steps, within one."""
        return self._busy + time.perf_counter() - self._begun

    # ---- a pass

    def before(self, chosen: Chosen, running: collections.abc.Sequence[Sequence]) -> Before | None:
        """Look at a pass that is about to run; None where nobody asked for prices so far."""
        if self.pricing.origin is None:
            return None
        decoding = [sequence for sequence in running if not sequence.prefilling]
        at_end, worth, heads, rows = chosen.last == self.runner.segments, 0.0, 0, 0
        for sequence, count in chosen.members:
            if not sequence.prefilling:
                rows += count
                if at_end and sequence.is_priced:
                    heads += count
                    worth += sum(sequence.worths()[:count])
                elif at_end and sequence.filled[chosen.first] + count >= len(sequence.ids):
                    heads += 1
        return Before(
            decoding, generated=sum(sequence.generated for sequence in decoding),
            rows=(rows, sum(count for _, count in chosen.members)), heads=heads,
            context=sum(sequence.filled[0] for sequence in running) / len(running), worth=worth,
        )  # fmt: skip

    def after(self, chosen: Chosen, before: Before, running: collections.abc.Sequence[Sequence]) -> None:
        """Tell the scheduler what a pass took and gave, and those that ``running`` leaves waiting how long."""
        seconds = time.perf_counter() - self._begun
        keys = {sequence.key for sequence, _ in chosen.members}
        for sequence in running:
            if sequence.key not in keys and sequence.pending:
                sequence.waited += seconds
        emitted = sum(sequence.generated for sequence in before.decoding) - before.generated
        self.pricing.observe(
            chosen.first, chosen.last, before.rows, sequences=len(before.decoding), heads=before.heads,
            tests=len(chosen.tested), context=before.context, seconds=seconds,
            own=seconds - self.in_kernels, emitted=emitted, worth=before.worth or emitted,
        )  # fmt: skip

    # ---- a text

    def verified(
        self, sequence: Sequence, accepted: collections.abc.Sequence[Draft], dropped: collections.abc.Sequence[Draft]
    ) -> None:
        """Drafts of a text were accepted, and the ones behind them dropped."""
        self.drafts.rounds += 1
        self.drafts.drafted += len(accepted) + len(dropped)
        for at in range(len(accepted)):
            self.drafts.accepted_at[at] += 1
        if sequence.prediction is not None:
            right = sum(draft.source == "prediction" for draft in accepted)
            sequence.tally.predicted_accepted += right
            sequence.tally.predicted += right + sum(draft.source == "prediction" for draft in dropped)

    def ended(self, sequence: Sequence, stats: Stats) -> None:
        """A text has ended. One that ran alone on a CPU, where passes are not submitted ahead, is compared with full
        decoding."""
        if sequence.alone and self.runner.fused.device.type == "cpu":
            self.times.judge(stats, self.runner.bounds)
