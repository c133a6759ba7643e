"""How long passes of a single row take, by the passes themselves, and what full decoding would take by that.

``threshold`` mode needs no table of costs. These times only serve to tell the user where it is slower than ``full``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from exitlm.decode.generation import Stats

_MEMORY = 0.9
_MIN_TOKENS, _SLOWER = 32, 0.95  # of a text that is told to have been slower than full


class PassTimes:
    """Running means of seconds, of passes of one row between two boundaries and of its final logits. ``note`` says
    where the newest text in ``threshold`` mode that could be judged was slower than ``full``; it is empty elsewhere."""

    def __init__(self) -> None:
        self.note = ""
        self._spans: dict[tuple[int, int], float] = {}
        self._head = math.nan

    def add(self, first: int, last: int, seconds: float) -> None:
        """A pass of one row from boundary ``first`` to boundary ``last``."""
        before = self._spans.get((first, last), seconds)
        self._spans[first, last] = _MEMORY * before + (1.0 - _MEMORY) * seconds

    def add_head(self, seconds: float) -> None:
        """The final logits of one row."""
        self._head = seconds if math.isnan(self._head) else _MEMORY * self._head + (1.0 - _MEMORY) * seconds

    def full(self, end: int) -> float:
        """Seconds of a token that goes from boundary 0 to ``end`` and through the final head, by the quickest chain of
        passes that were seen; NaN where there is none."""
        best = {0: 0.0}
        for boundary in range(1, end + 1):
            ways = [best[a] + seconds for (a, b), seconds in self._spans.items() if b == boundary and a in best]
            if ways:
                best[boundary] = min(ways)
        return best.get(end, math.nan) + self._head

    def judge(self, stats: Stats, bounds: Sequence[int]) -> None:
        """Renew :attr:`note` by a text that ran alone; ``bounds`` are the layers below each boundary. Between the speed
        of full and a little less, the note stays what it is."""
        if stats.mode != "threshold" or stats.tokens < _MIN_TOKENS:
            return
        ratio = self.full(len(bounds) - 1) * stats.tokens_per_second
        if ratio < _SLOWER:
            early = f"left at {stats.mean_layers:.1f} of {bounds[-1]} layers on average"
            self.note = (
                f"mode threshold ran at {ratio:.2f} times the speed of full, by the times of passes; tokens {early}"
            )
        elif ratio >= 1.0:
            self.note = ""
