"""How a text ends, and what has come of it so far: stop ids, stop strings, the length, characters cut between tokens.

Knows nothing of layers, passes or sequences.
"""

from __future__ import annotations

from exitlm.decode.generation import Piece, TokenTrace
from exitlm.decode.text import TextStream


class Output:
    """The tokens of one text. ``finish_reason`` is set with the last one; nothing may follow it."""

    def __init__(self, text: TextStream, stop_ids: frozenset[int], max_new_tokens: int) -> None:
        self.text, self.stop_ids, self.max_new_tokens = text, stop_ids, max_new_tokens
        self.trace: list[TokenTrace] = []
        self.prompt_logprobs: list[tuple[float, dict[int, float]]] = []
        self.finish_reason: str | None = "length" if max_new_tokens == 0 else None
        self._taken, self._told_prompt = 0, False

    def push(self, token: TokenTrace) -> None:
        """Add a verified token, with the text that is certain now."""
        assert self.finish_reason is None
        token.text = self.text.push(token.id)
        self.trace.append(token)
        if self.text.finished or token.id in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.trace) >= self.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            token.text += self.text.flush()
            if self.text.finished:
                self.finish_reason = "stop"

    def take(self) -> Piece:
        """What has come since the last call."""
        tokens, self._taken = self.trace[self._taken :], len(self.trace)
        scores, self._told_prompt = [] if self._told_prompt else self.prompt_logprobs, True
        return Piece(text="".join(token.text for token in tokens), tokens=tokens, prompt_logprobs=scores)
