"""Who runs and who waits: sequences are let in in the order of their arrival, and give way where memory is short.

The newest gives its memory first, so that the oldest always goes on and everything ends.
"""

from __future__ import annotations

import time
from collections import deque

from exitlm.decode.cache.memory import Memory
from exitlm.decode.sequence import Sequence


class Roster:
    """The sequences of one engine: ``running`` in order of arrival, and ``waiting``."""

    def __init__(self, memory: Memory, most: int, segments: int, original: int | None) -> None:
        """``most`` run at once. ``original`` is the length beyond which a text has other rotations, if there is one."""
        self.memory, self.most, self._segments, self._original = memory, most, segments, original
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def admit(self, now: float) -> None:
        """Let waiting texts in, in order, as long as there is room for what they have to compute."""
        for sequence in list(self.waiting):
            if len(self.running) >= self.most or (self.running and not self.memory.fits(sequence)):
                return
            if self._begins_like_another(sequence):
                continue
            self.waiting.remove(sequence)
            original = self._original
            sequence.stretched = original is not None and len(sequence.ids) > original
            self.memory.open(sequence)
            if not sequence.tally.begun:
                sequence.tally.begun = now
                sequence.tally.queued = time.monotonic() - sequence.requested
            self.running.append(sequence)

    def _begins_like_another(self, sequence: Sequence) -> bool:
        """Whether another choice of its prompt is being computed, whose blocks it can share in a moment."""
        if not sequence.choice or not self.memory.options.prefix_sharing:
            return False
        same = [s for s in self.running if s.choice == 0 and s.filled[-1] < s.prefill_end]
        return any(s.ids[: s.prompt_length] == sequence.ids[: sequence.prompt_length] for s in same)

    def reserve(self, sequence: Sequence, rows: int) -> bool:
        """Blocks for the next ``rows`` positions; where none are left, the newest sequences give theirs. False if that
        is this one, or if there were drafts among the rows: they are dropped before anybody gives memory for them."""
        while not self.memory.ensure(sequence, rows):
            entered = max(0, sequence.sent[0] - len(sequence.ids))
            if entered < len(sequence.drafts):
                sequence.drop_drafts(entered)
                if sequence.length == sequence.sent[0]:  # nothing enters: what waits goes deep
                    sequence.test, sequence.deep_end = None, sequence.length
                return False
            newest = max(self.running, key=lambda other: other.key)
            self.preempt(newest)
            if newest is sequence:
                return False
        return bool(sequence.tables)

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's memory; it waits, and what it had computed is computed again."""
        self.memory.release(sequence)
        sequence.restart(self._segments)
        sequence.tally.preemptions += 1
        self.running.remove(sequence)
        at = next((i for i, other in enumerate(self.waiting) if other.key > sequence.key), len(self.waiting))
        self.waiting.insert(at, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, and take what it holds."""
        self.memory.release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
