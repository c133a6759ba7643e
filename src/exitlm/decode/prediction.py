"""Drafts from a text that much of the output is expected to be: a file that is edited, an earlier version of an answer.

The output is followed through the prediction token by token. Where they part, the place is lost, and found again by the
last tokens of the output, from the lost place on. It is a pure function of the tokens; the full model verifies them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_SIZES = (4, 3, 2)  # tokens that have to be alike for a place to be found again, longest first


class Prediction:
    """An expected text and where the output is in it. Only verified tokens are added."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self._places: dict[tuple[int, ...], list[int]] = {}  # n-gram -> the places behind it, rising
        for n in _SIZES:
            for end in range(n, len(self.tokens)):
                self._places.setdefault(tuple(self.tokens[end - n : end]), []).append(end)
        self._tail: list[int] = []
        self._at: int | None = 0  # where the next token is expected; None when lost
        self._lost_at = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Add verified tokens."""
        for token in tokens:
            self._at, self._lost_at = self._after(token, self._tail, self._at, self._lost_at)
            self._tail = [*self._tail, token][-_SIZES[0] :]

    def draft(self, unverified: Sequence[int], count: int) -> list[int]:
        """Up to ``count`` tokens that are expected behind the verified tokens and ``unverified``; none when lost."""
        at, lost_at, tail = self._at, self._lost_at, self._tail
        for token in unverified:
            at, lost_at = self._after(token, tail, at, lost_at)
            tail = [*tail, token][-_SIZES[0] :]
        return [] if at is None else self.tokens[at : at + max(0, count)]

    def _after(self, token: int, tail: Sequence[int], at: int | None, lost_at: int) -> tuple[int | None, int]:
        """The place behind ``token``, which follows ``tail``, and where it was lost last."""
        if at is not None:
            if at < len(self.tokens) and self.tokens[at] == token:
                return at + 1, at + 1
            lost_at = at
        ending = [*tail, token]
        for n in _SIZES:
            places = self._places.get(tuple(ending[-n:])) if len(ending) >= n else None
            if places:
                return places[min(bisect_left(places, lost_at), len(places) - 1)], lost_at
        return None, lost_at
