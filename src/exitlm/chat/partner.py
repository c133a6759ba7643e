"""Who answers in a chat, as the loop sees it: a model in this process (``local.py``) or a server (``server.py``).

Plain data and a protocol; nothing is decoded here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from exitlm.chat.conversation import Message


@dataclass(frozen=True, kw_only=True)
class Part:
    """Text that has come, and the (text, exit layer) of its tokens where they are known."""

    text: str
    tokens: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a reply took; None is what nobody has said.

    ``ended``: stop, length, or stopped (by the user). ``reused``: prompt tokens whose keys and values were there from
    before. ``details``: further figures, each with its name, for ``/stats``.
    """

    ended: str
    tokens: int | None = None
    tokens_per_second: float | None = None
    mean_layers: float | None = None
    mode: str | None = None
    exact: bool | None = None
    prompt_tokens: int | None = None
    reused: int | None = None
    drafted: int = 0
    accepted: int = 0
    seed: int | None = None
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of who answers; None is what it does not say. ``exit_layers`` are without the final one,
    ``context`` is in tokens, ``mode`` is the one where none is set, and ``exact`` as in ``Stats``."""

    name: str
    num_layers: int | None = None
    exit_layers: Sequence[int] = ()
    context: int | None = None
    mode: str | None = None
    exact: bool | None = None

    @property
    def of_layers(self) -> str:
        """`` of 30``, where that is known."""
        return "" if self.num_layers is None else f" of {self.num_layers}"


class Partner(Protocol):
    """Who answers."""

    @property
    def facts(self) -> Facts:
        """Who this is."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What was set; all else is at its default."""

    def change(self, name: str, value: Any) -> None:
        """Set a setting, or give it back its default (None).

        Raises:
            UserError: it is unknown, or has not this value; nothing was changed then.
        """

    def reply(self, messages: Sequence[Message]) -> Iterator[Part | Taken]:
        """Answer: parts as they come, and at last what it took, unless it was stopped.

        Raises:
            UserError: it can't be answered.
        """

    def stop(self) -> None:
        """End the reply that is being written. Called by a signal handler: it may also raise KeyboardInterrupt."""

    def notes(self) -> Sequence[str]:
        """What the user should know of choices that were made."""


def speed(tokens: int, seconds: float) -> float | None:
    """Tokens per second, without the first one, which belongs to the prompt; None where that is nothing."""
    return (tokens - 1) / seconds if tokens > 1 and seconds > 0 else None


def mean_of(layers: Sequence[int]) -> float | None:
    """The mean of some layers; None of none."""
    return sum(layers) / len(layers) if layers else None


def figure(value: Any) -> float | None:
    """A finite number, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None
