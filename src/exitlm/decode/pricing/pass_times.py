"""How long passes of a single row take, by the passes themselves, and what full decoding would take by that.

``threshold`` mode needs no table of costs. These times only serve to tell the user where it is slower than ``full``.
"""

from __future__ import annotations

import math

_MEMORY = 0.9


class PassTimes:
    """Running means of seconds, of passes of one row between two boundaries and of its final logits."""

    def __init__(self) -> None:
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
