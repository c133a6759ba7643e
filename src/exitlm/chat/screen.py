"""What a chat shows: replies on standard output, coloured by depth on a terminal, and all else dim below them.

Without a terminal, standard output has the replies and the answers to commands alone; what else there is to say goes to
standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from exitlm import show
from exitlm.chat.partner import Facts, Part, Taken
from exitlm.palette import palette

# What would move the cursor, colour the screen or worse is shown, not done: a text may hold anything.
_HARMLESS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}, 0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}  # fmt: skip


class Screen:
    """The output of a chat."""

    def __init__(self, facts: Facts) -> None:
        self._out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.is_terminal = self._out.is_terminal
        self._aside = self._out if self.is_terminal else Console(
            stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False
        )  # fmt: skip
        final = facts.num_layers
        self._colours = {} if final is None else palette(facts.exit_layers, final)
        self._at_start = True

    def part(self, part: Part) -> None:
        """A part of a reply."""
        if not self.is_terminal:
            sys.stdout.write(part.text)
            sys.stdout.flush()
        elif part.tokens and all(layer in self._colours for _, layer in part.tokens):
            tokens = [(text.translate(_HARMLESS), layer) for text, layer in part.tokens]
            self._out.print(show.depth_text(tokens, self._colours), end="")
        else:
            self._out.print(Text(part.text.translate(_HARMLESS)), end="")
        self._at_start = part.text.endswith("\n") if part.text else self._at_start

    def end(self, taken: Taken, facts: Facts) -> None:
        """The end of a reply, and what it took."""
        if not (self.is_terminal and self._at_start):
            print(flush=True)
        self._at_start = True
        self.aside(summary(taken, facts))

    def gap(self) -> None:
        """Some room before the next question, where a reader needs it."""
        if self.is_terminal:
            print(flush=True)

    def say(self, text: str) -> None:
        """The answer to a command."""
        self._out.print(Text(text))

    def aside(self, text: str) -> None:
        """What is said beside the conversation."""
        self._aside.print(Text(text), style="dim")

    def legend(self) -> None:
        """What the colours mean, where there are any."""
        if self.is_terminal and len(self._colours) > 1:
            self._out.print(show.legend(self._colours))

    def complain(self, message: str) -> None:
        """A mistake, in one sentence."""
        if not self._at_start:
            print(flush=True)
            self._at_start = True
        self._aside.print(Text(f"error: {' '.join(message.split())}"), style="red")


def summary(taken: Taken, facts: Facts) -> str:
    """What a reply took, in one line."""
    found = []
    if taken.tokens is not None:
        found.append(f"{taken.tokens} token{'s' * (taken.tokens != 1)}")
    if taken.tokens_per_second is not None:
        found.append(f"{taken.tokens_per_second:.1f} tokens/s")
    if taken.mean_layers is not None:
        found.append(f"{taken.mean_layers:.1f}{facts.of_layers} layers on average")
    found += how(taken)
    if taken.ended == "length":
        found.append("cut short (/set max_new_tokens=N)")
    elif taken.ended == "stopped":
        found.append("stopped")
    return ", ".join(found)


def how(taken: Taken) -> Sequence[str]:
    """The mode of a reply, and whether its path is exact."""
    exact = [] if taken.exact is None else ["exact" if taken.exact else "not exact"]
    return [*([] if taken.mode is None else [taken.mode]), *exact]
