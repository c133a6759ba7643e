"""A pass under way: whose rows it takes, and where they stand in its batch. Plain data; no tensors.

A sequence may be taken back (a draft was refused, it was dropped, or gave its memory) while its rows are on their way
in another process. Its epoch tells: what a pass of an older one brings is not for it any more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from exitlm.decode.batch import Batch
from exitlm.decode.sequence import Sequence as Text


@dataclass(frozen=True, slots=True)
class Member:
    """The rows of one sequence in a pass: positions from ``start`` on, rows of the batch from ``row`` on."""

    sequence: Text
    start: int
    count: int
    row: int
    epoch: int

    @property
    def end(self) -> int:
        """One past the newest position."""
        return self.start + self.count

    @property
    def newest(self) -> int:
        """The batch's row of the newest position."""
        return self.row + self.count - 1

    def final_rows(self) -> list[int]:
        """Rows of the batch that the final head decides, where the pass goes to the end: from the newest verified
        token on."""
        sequence = self.sequence
        if self.end < len(sequence.ids) or sequence.output.finish_reason is not None:
            return []
        skipped = max(0, len(sequence.ids) - 1 - self.start)
        return list(range(self.row + skipped, self.row + self.count))


@dataclass(frozen=True, slots=True)
class Departed:
    """A pass from boundary ``first`` to ``last``: its rows by ``tokens`` (from boundary 0) or hidden ``slots``, and the
    keys of the sequences whose newest row is ``tested`` at ``last``."""

    first: int
    last: int
    batch: Batch
    members: Sequence[Member]
    tested: Collection[int]
    tokens: Sequence[int]
    slots: Sequence[int]


def by_adapter(members: Sequence[Member], tested: Collection[int], layer: int) -> dict[str, list[Member]]:
    """The members whose newest rows are tested behind ``layer``, by the adapter whose exit tests them."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        if member.sequence.key in tested:
            groups.setdefault(member.sequence.plan.adapters[layer], []).append(member)
    return groups


def prompt_positions(member: Member) -> range:
    """The positions of a member's rows whose next token is one of the prompt's, as far as that has no score yet."""
    sequence = member.sequence
    known = len(sequence.output.prompt_logprobs)  # kept when it was preempted
    return range(max(member.start, known), min(member.end, sequence.prompt_length - 1))
