"""What a load run sends and what it sees of each answer: plain data. Times are seconds since the run began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request: its number, and the JSON object that is sent."""

    index: int
    body: Mapping[str, Any]


@dataclass(kw_only=True)
class Record:
    """What became of one request.

    ``due``: when it had to be sent, by the plan of arrivals, or as soon as its client was free. ``sent``: when it was.
    ``texts``: when each piece of text arrived; an event may hold several tokens, or a read several events. ``end``: the
    moment when the answer was complete, or had failed. ``status``: that of HTTP, or ``timeout``, ``connection``,
    ``broken`` (the answer ended too soon) or ``error`` (told within a stream); ``message`` says more where it failed.
    Tokens are those that the server counted; None where it did not say.
    """

    index: int
    due: float
    sent: float
    texts: list[float] = field(default_factory=list)
    end: float = 0.0
    status: str = "200"
    message: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it was answered."""
        return self.message is None

    @property
    def first_text(self) -> float | None:
        """Seconds from when it was due to its first text (TTFT); None without a text."""
        return self.texts[0] - self.due if self.texts else None

    @property
    def whole_text(self) -> float:
        """Seconds from when it was due to its end."""
        return self.end - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between its texts (ITL)."""
        return [later - earlier for earlier, later in zip(self.texts, self.texts[1:], strict=False)]

    @property
    def per_token(self) -> float | None:
        """Seconds of each token after the first (TPOT), None where there is no second one, or no count."""
        tokens = self.completion_tokens
        if tokens is None or tokens < 2 or len(self.texts) < 2:
            return None
        return (self.texts[-1] - self.texts[0]) / (tokens - 1)
