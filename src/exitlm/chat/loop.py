"""The loop of a chat: read an entry, do the command or write the reply, until the user leaves.

Ctrl-C ends the reply and not the program: what was said until then stays in the conversation.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Protocol

from exitlm.chat.commands import Leave, State, run
from exitlm.chat.entries import Command, Said
from exitlm.chat.partner import Part, Partner, Taken, mean_of, speed
from exitlm.chat.screen import Screen
from exitlm.errors import UserError


class Reader(Protocol):
    """Where entries come from."""

    def read(self) -> Said | Command | None:
        """The next entry, or None for an empty one; EOFError at the end."""


def converse(state: State, reader: Reader, screen: Screen, *, forgiving: bool) -> None:
    """Talk until there is no more to read. A mistake is told and ``forgiving`` goes on; else it ends the chat.

    Raises:
        UserError: a mistake, where nobody is there to try again.
    """
    notes = _News(state.partner)
    notes.tell(screen)
    while True:
        try:
            entry = reader.read()
            if isinstance(entry, Command):
                answer = run(state, entry)
                if answer is not None:
                    screen.say(answer)
                notes.tell(screen)
            elif isinstance(entry, Said):
                reply(state, entry.text, screen)
                notes.tell(screen)
                screen.gap()
        except (EOFError, Leave):
            return
        except KeyboardInterrupt:  # meant for a reply that has just ended
            if not forgiving:
                raise
        except UserError as error:
            if not forgiving:
                raise
            screen.complain(str(error))


def reply(state: State, text: str, screen: Screen) -> None:
    """Have a text answered, and keep both in the conversation. A text that was not answered leaves nothing behind.

    Raises:
        UserError: it can't be answered.
    """
    partner, told, layers = state.partner, list[str](), list[int]()
    taken: Taken | None = None
    times: list[float] = []
    parts = partner.reply(state.conversation.ask(text))
    with contextlib.suppress(KeyboardInterrupt), stopping(partner.stop), _closing(parts):
        for part in parts:
            if isinstance(part, Taken):
                taken = part
                continue
            times.append(time.perf_counter())
            told.append(part.text)
            layers += [layer for _, layer in part.tokens]
            screen.part(part)
    if taken is None:
        taken = _stopped(partner, layers, times)
    answer = "".join(told)
    if answer or taken.ended != "stopped":
        state.conversation.keep(text, answer)
    state.totals.add(taken, layers)
    screen.end(taken, partner.facts)


def _stopped(partner: Partner, layers: Sequence[int], times: Sequence[float]) -> Taken:
    """What a reply took that the user has ended, by what was seen of it."""
    seconds = times[-1] - times[0] if times else 0.0
    mode = partner.settings.get("mode", partner.facts.mode)
    return Taken(
        ended="stopped", tokens=len(layers) or None, tokens_per_second=speed(len(layers), seconds),
        mean_layers=mean_of(layers), mode=mode, exact=partner.facts.exact,
    )  # fmt: skip


@contextlib.contextmanager
def _closing(parts: Iterator[Part | Taken]) -> Iterator[None]:
    """Close a generator behind the block."""
    try:
        yield
    finally:
        if (close := getattr(parts, "close", None)) is not None:
            close()


@contextlib.contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Within the block, Ctrl-C calls ``stop``; the second time it interrupts as ever."""
    if threading.current_thread() is not threading.main_thread():  # only that one is told of signals
        yield
        return
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        stop()

    former = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


class _News:
    """Notes of a partner that were not told yet; one that only has other figures now is not new."""

    def __init__(self, partner: Partner) -> None:
        self._partner, self._told = partner, set[str]()

    def tell(self, screen: Screen) -> None:
        for note in self._partner.notes():
            words = re.sub(r"[\d.]+", "", note)
            if words not in self._told:
                self._told.add(words)
                screen.aside(f"note: {note}")
