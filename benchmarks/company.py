"""Texts that are decoded together, timed while all of them are being decoded.

The time begins when the last text has its first token and ends when the first one is complete: before and after, fewer
texts share the passes. What is decoded then is the engine's speed at that number of texts, prefill apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import exitlm
from exitlm.decode.engine import Engine
from exitlm.decode.generation import Generation, GenerationConfig


@dataclass(frozen=True, kw_only=True)
class Window:
    """``tokens`` that all texts got in ``seconds`` while none had ended, by how much a meter rose, and the whole
    texts."""

    tokens: int
    seconds: float
    metered: float
    generations: list[Generation]

    @property
    def rate(self) -> float:
        """Tokens per second, of all texts together."""
        return self.tokens / self.seconds


def decode(
    engine: Engine, prompts: Sequence[Sequence[int]], config: GenerationConfig, meter: Callable[[], float] = float
) -> Window:
    """Decode all prompts together, to their ends."""
    keys = [engine.add(prompt, config) for prompt in prompts]
    begun: set[int] = set()
    done: dict[int, Generation] = {}
    tokens, start, end = 0, (0.0, 0.0), (0.0, 0.0)
    while len(done) < len(keys):
        counted = len(begun) == len(keys) and not done
        events = engine.step()
        now = time.perf_counter(), meter()
        for event in events:
            if event.error is not None:
                raise event.error
            if event.piece is not None and event.piece.tokens:
                tokens += counted * len(event.piece.tokens)
                if event.key not in begun:
                    begun.add(event.key)
                    start = now
            if event.generation is not None:
                done[event.key] = event.generation
        if counted:
            end = now
    assert tokens, "a text ended before the last one began; give more tokens"
    seconds, metered = end[0] - start[0], end[1] - start[1]
    return Window(tokens=tokens, seconds=seconds, metered=metered, generations=[done[key] for key in keys])


def passages(llm: exitlm.LLM, texts: Sequence[str], count: int, length: int) -> list[list[int]]:
    """``count`` prompts of ``length`` tokens each: the texts one after the other, each prompt from another place on."""
    ids = llm.encode("\n\n".join(texts))
    ids *= 2 + length // len(ids)
    step = max(1, (len(ids) - length) // count)
    return [ids[i * step : i * step + length] for i in range(count)]
