"""The text and the bytes of single tokens, as log-probabilities name them.

A token may be part of a character: its bytes are exact, its text then shows the replacement character.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table: printable ones are their own)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Vocabulary:
    """The tokens of one tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
        self._spelled_in_bytes = _is_byte_level(tokenizer)
        self.spelling = functools.lru_cache(maxsize=65536)(self._spelling)

    def name(self, token: int) -> str:
        """The text of a token, or where that is part of a character its bytes, as OpenAI's completions name it."""
        text, spelled = self.spelling(token)
        return text if "\ufffd" not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _spelling(self, token: int) -> tuple[str, bytes]:
        """The text and the bytes of a token; both are empty for an id that has none."""
        if token in self._added:
            text = self._added[token]
            return text, text.encode()
        word = self.tokenizer.convert_ids_to_tokens(token)
        if word is None:
            return "", b""
        found = self._bytes(word)
        return found.decode(errors="replace"), found

    def _bytes(self, word: str) -> bytes:
        if self._spelled_in_bytes:
            table = _byte_of_letter()
            if all(letter in table for letter in word):
                return bytes(table[letter] for letter in word)
            return word.encode()
        if (byte := _BYTE.fullmatch(word)) is not None:
            return bytes([int(byte[1], 16)])
        return word.replace("\u2581", " ").encode()


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the words of the vocabulary are spelled in letters that stand for bytes."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    try:
        return decoder is not None and "ByteLevel" in json.dumps(json.loads(decoder.__getstate__()))
    except (AttributeError, TypeError, ValueError):
        return False
