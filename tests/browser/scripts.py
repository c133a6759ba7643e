"""What the mock server writes: tokens with the traces of a model of twelve layers that never ran.

Each answer is a list of chunks, each a list of tokens; a prompt's first word chooses the answer.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from typing import Any

LAYERS = 12
THRESHOLDS = {3: 0.8, 6: 0.85, 9: 0.9}  # of each exit
ESSAY = (
    "An early exit is a small head in the middle of a model. After a few layers it already guesses the next word, and "
    "says how sure it is. Easy words, the end of a name or the second half of a common phrase, leave there. Hard ones "
    "go on to the last layer.\n\nIn lossless mode a guess is only a draft: the full model checks many drafts at once, "
    "keeps those that are right, and writes its own word where one is wrong. The text is the same, and most of the "
    "work is saved where the text was easy to begin with."
)
MARKUP = 'Look: <img src="x" onerror="window.owned = 1"><script>window.owned = 2</script> & <b>bold</b> &amp; "done".'
CHARACTERS = ["Naïve", " ", "🙂", "\n\n", "日", "本", " end"]


@dataclass(frozen=True)
class Token:
    """One token: its text, where it left, what made it, and the confidence at each exit that was tested, and
    the draft of the exit at layer 9 that was refused in its place."""

    text: str
    layer: int = LAYERS
    source: str = "final"
    tested: dict[int, float] = field(default_factory=dict)
    refused: str | None = None

    @property
    def confidence(self) -> float | None:
        return self.tested.get(self.layer)


def words(text: str) -> list[str]:
    """Pieces of a text, about as a tokenizer cuts it."""
    return re.findall(r"\n+| ?\w{1,7}| ?[^\w\s]+|\s", text)


def token(word: str, place: int, mode: str) -> Token:
    """A token of a text, as deep as its spelling and place say; the same each time."""
    if mode == "full":
        return Token(word)
    draw = zlib.crc32(f"{word}{place}".encode()) / 2**32
    draw = draw * (0.55 if len(word) < 4 else 1.0)
    layer = 3 if draw < 0.3 else 6 if draw < 0.52 else 9 if draw < 0.7 else LAYERS
    tested = {}
    for exit_layer, threshold in THRESHOLDS.items():
        share = zlib.crc32(f"{exit_layer}{word}{place}".encode()) / 2**32
        fires = exit_layer == layer
        tested[exit_layer] = round(
            threshold + (1 - threshold) * share if fires else threshold * (0.25 + 0.7 * share), 4
        )
        if fires:
            return Token(word, layer, "exit", tested)
    if mode == "lossless" and draw > 0.93:  # the deepest exit drafted, and the full model refused
        return Token(word, LAYERS, "final", {**tested, 9: 1.0}, refused=" wrong")
    if mode == "lossless" and draw > 0.88:
        return Token(word, LAYERS, "lookup")
    return Token(word, LAYERS, "final", tested)


def answer(prompt: str, mode: str) -> list[list[Token]]:
    """The chunks of an answer: one token each in mode full, else up to three."""
    topic = prompt.split()[0].lower() if prompt.split() else ""
    if topic == "characters":  # a token that is only part of a character has no text, and an end has none either
        pieces = [*CHARACTERS[:2], "", *CHARACTERS[2:], ""]
    else:
        pieces = words({"markup": MARKUP, "short": "Yes, that is so."}.get(topic, ESSAY))
    if topic == "differ" and mode != "full":
        pieces[7] = " tiny"
    if topic == "shorter" and mode != "full":
        pieces = pieces[:20]
    tokens = [token(word, i, mode) for i, word in enumerate(pieces)]
    size = 1 if mode == "full" else 3
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def trace(tokens: list[Token]) -> dict[str, Any]:
    """What the field ``exitlm`` of a choice says of a chunk's tokens."""
    return {
        "exit_layers": [token.layer for token in tokens],
        "confidences": [token.confidence for token in tokens],
        "sources": [token.source for token in tokens],
        "tokens": [token.text for token in tokens],
        "tested": [[{"layer": layer, "confidence": c} for layer, c in token.tested.items()] for token in tokens],
        "refused": [token.refused and {"token": token.refused, "layer": 9, "source": "exit"} for token in tokens],
    }


def usage(tokens: list[Token], mode: str) -> dict[str, Any]:
    """What the last chunk says of the whole answer."""
    drafts = sum(token.source != "final" or token.refused is not None for token in tokens)
    accepted = sum(token.source != "final" for token in tokens)
    lossless = mode == "lossless"
    return {
        "prompt_tokens": 5,
        "completion_tokens": len(tokens),
        "total_tokens": 5 + len(tokens),
        "exitlm": {
            "mode": mode,
            "exact": mode != "threshold",
            "mean_layers": sum(token.layer for token in tokens) / len(tokens),
            "layers": LAYERS,
            "drafts": drafts if lossless else 0,
            "accepted": accepted if lossless else 0,
            "acceptance": accepted / drafts if lossless and drafts else None,
            "tokens_per_second": {"full": 61.3, "lossless": 104.2, "threshold": 117.9}[mode],
        },
    }
