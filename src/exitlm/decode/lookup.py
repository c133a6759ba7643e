"""Drafts without a head: what followed the last n tokens when they stood in the text before (prompt lookup).

The index is a dictionary from n-grams to the position after their last occurrence, updated per token, so a look-up
costs the same at any length of text. It is a pure function of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class NgramIndex:
    """n-grams of a growing token list, longest first. Only verified tokens are added."""

    def __init__(self, sizes: Sequence[int] = (4, 3, 2)) -> None:
        self.sizes = tuple(sizes)
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Add verified tokens. An n-gram is entered when the token after it arrives, so it never finds itself."""
        for token in tokens:
            end = len(self.tokens)
            for n in self.sizes:
                if end >= n:
                    self.after[tuple(self.tokens[end - n : end])] = end
            self.tokens.append(token)

    def draft(self, unverified: Sequence[int], count: int) -> tuple[list[int], int]:
        """Up to ``count`` tokens that followed the longest known n-gram at the end of the text (the verified tokens and
        then ``unverified``), and the n that matched (0: none)."""
        if count < 1:
            return [], 0
        longest = self.sizes[0]
        tail = (self.tokens[-longest:] + list(unverified))[-longest:]
        for n in self.sizes:
            if len(tail) >= n:
                at = self.after.get(tuple(tail[-n:]))
                if at is not None:
                    return self._copy(at, unverified, count), n
        return [], 0

    def _copy(self, at: int, unverified: Sequence[int], count: int) -> list[int]:
        """``count`` tokens from position ``at`` on; the copy may overlap what it writes, so that a loop goes on."""
        period = len(self.tokens) - at + len(unverified)
        text = [*self.tokens[at : at + count], *unverified][: min(count, period)]
        while len(text) < count:
            text.append(text[len(text) - period])
        return text[:count]
