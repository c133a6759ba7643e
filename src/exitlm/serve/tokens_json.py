"""What an answer tells of its tokens: log-probabilities in the two shapes that OpenAI has, and the trace of exits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from exitlm.decode.generation import TokenTrace
from exitlm.serve.vocabulary import Vocabulary

LEAST = -9999.0  # what stands for a log-probability of minus infinity, which JSON lacks


def trace_of(tokens: Sequence[TokenTrace], words: Vocabulary) -> dict[str, Any]:
    """Where each token left, how sure that exit was, what it was a draft of, its text, all exits tried, and the draft
    that was refused in its place."""
    return {
        "exit_layers": [token.exit_layer for token in tokens],
        "confidences": [_number(token.confidence.get(token.exit_layer)) for token in tokens],
        "sources": [token.source for token in tokens],
        "tokens": [token.text for token in tokens],
        "tested": [
            [{"layer": layer, "confidence": _number(score)} for layer, score in token.confidence.items()]
            for token in tokens
        ],
        "refused": [
            None
            if token.refused is None
            else {
                "token": words.spelling(token.refused.id)[0],
                "layer": token.refused.layer,
                "source": token.refused.source,
            }
            for token in tokens
        ],
    }


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 6)


def _finite(value: float | None) -> float:
    return LEAST if value is None or value == -math.inf else value


def chat_logprobs(tokens: Iterable[TokenTrace], top: int, words: Vocabulary) -> list[dict[str, Any]]:
    """Entries of a chat completion's ``logprobs.content``, each with the ``top`` most likely tokens."""
    found = []
    for token in tokens:
        best = list(token.top_logprobs.items())[:top]
        found.append(
            {**_entry(token.id, token.logprob, words), "top_logprobs": [_entry(i, value, words) for i, value in best]}
        )
    return found


def _entry(token: int, logprob: float | None, words: Vocabulary) -> dict[str, Any]:
    text, spelled = words.spelling(token)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(spelled)}


class CompletionLogprobs:
    """The ``logprobs`` of a completion, whose offsets run on over the pieces of a stream."""

    def __init__(self, top: int, words: Vocabulary) -> None:
        self.top, self.words, self.offset = top, words, 0

    def prompt(self, ids: Sequence[int], scores: Sequence[tuple[float, Mapping[int, float]]]) -> dict[str, Any]:
        """Of the prompt's own tokens; the first one has none."""
        known: list[tuple[float | None, Mapping[int, float]]] = [(None, {}), *scores]
        return self._of([(token, *score) for token, score in zip(ids, known, strict=False)])

    def answer(self, tokens: Sequence[TokenTrace]) -> dict[str, Any]:
        """Of tokens that were written."""
        return self._of([(token.id, token.logprob, token.top_logprobs) for token in tokens])

    def _of(self, entries: Sequence[tuple[int, float | None, Mapping[int, float]]]) -> dict[str, Any]:
        texts, offsets = [], []
        for token, _, _ in entries:
            texts.append(self.words.name(token))
            offsets.append(self.offset)
            self.offset += len(self.words.spelling(token)[0])
        best = [
            {self.words.name(i): _finite(value) for i, value in list(tops.items())[: self.top]} or None
            for _, _, tops in entries
        ]
        return {
            "tokens": texts,
            "token_logprobs": [None if value is None else _finite(value) for _, value, _ in entries],
            "top_logprobs": best if self.top else None,
            "text_offset": offsets,
        }


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The log-probabilities of two parts of a text, one after the other."""
    return {key: None if first[key] is None else [*first[key], *second[key]] for key in first}
