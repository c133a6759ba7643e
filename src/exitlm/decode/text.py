"""From token ids to text as they arrive: whole characters only, and stop strings that may span tokens.

A token can end inside of a UTF-8 character; its bytes are held back until the character is complete. A stop string can
begin in one token and end in another; text that may still become one is held back too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

_NEIGHBOURS = 4


class Tokenizer(Protocol):
    """What decoding needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Text of token ids."""

    def __call__(self, text: str, **options: Any) -> Any:
        """A mapping with the text's token ids as ``input_ids``."""


class TextStream:
    """Turns ids into text pieces. ``finished`` is set when a stop string was found; nothing follows it."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        """``prompt`` is what comes before: tokenizers whose words carry their space drop it at the start of a text."""
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.finished = False
        self._ids = list(prompt[-_NEIGHBOURS:])
        if self.tokenizer is not None and self._decode(self._ids).endswith("\ufffd"):
            self._ids = []  # it ends within a character: what follows has to be shown as it is
        self._begin, self._read = 0, len(self._ids)
        self._held = ""

    def _decode(self, ids: Sequence[int]) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _fresh(self, final: bool) -> str:
        """Characters that are complete now and were not handed out: the text of a window that begins one piece earlier,
        minus the text of that piece, so that tokenizers which look at their neighbours decode right."""
        before = self._decode(self._ids[self._begin : self._read])
        whole = self._decode(self._ids[self._begin :])
        if len(whole) <= len(before) or (whole.endswith("\ufffd") and not final):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return whole[len(before) :]

    def push(self, token: int) -> str:
        """Add a token; the text that is certain now (possibly empty)."""
        if self.tokenizer is None or self.finished:
            return ""
        self._ids.append(token)
        return self._release(self._fresh(final=False), final=False)

    def flush(self) -> str:
        """The rest of the text, at the end of the generation."""
        if self.tokenizer is None or self.finished:
            return ""
        return self._release(self._fresh(final=True), final=True)

    def _release(self, fresh: str, final: bool) -> str:
        text = self._held + fresh
        ends = [(text.find(word) + len(word), text.find(word)) for word in self.stop if word in text]
        if ends:  # the stop string that is complete first counts, however the text was cut into tokens
            self.finished, self._held = True, ""
            return text[: min(ends)[1]]
        keep = 0
        if not final:
            for word in self.stop:
                for n in range(min(len(word) - 1, len(text)), keep, -1):
                    if text.endswith(word[:n]):
                        keep = n
                        break
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
