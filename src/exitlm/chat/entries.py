"""What the user has typed, from lines: something to say, or a command. Pure; who reads the lines is ``keyboard.py``.

A line that ends in a backslash goes on in the next one. A text between two lines of three quotes may hold anything.
``/name argument`` is a command; ``//`` at the start stands for a slash that is to be said.
"""

from collections.abc import Callable
from dataclasses import dataclass

QUOTES = '"""'


@dataclass(frozen=True)
class Said:
    """A text for the model."""

    text: str


@dataclass(frozen=True)
class Command:
    """A command by its ``name`` (without the slash), and what follows it; empty if nothing does."""

    name: str
    argument: str


def read_entry(read: Callable[[bool], str]) -> Said | Command | None:
    """The next entry; None for one without a text. ``read`` gives a line; it is told whether an entry has begun.

    Raises:
        EOFError: from ``read``; what had begun is lost.
    """
    line = _continued(read(False), read)
    before, opened, rest = line.partition(QUOTES)
    if opened and (not before.strip() or _is_command(before.strip())):
        text = _quoted(rest, read)
        return Said(text) if not before.strip() else Command(before.strip()[1:], text)
    line = line.strip()
    if not line:
        return None
    if line.startswith("//"):
        return Said(line[1:])
    if line.startswith("/"):
        name, _, argument = line[1:].partition(" ")
        return Command(name, argument.strip())
    return Said(line)


def _is_command(text: str) -> bool:
    return text.startswith("/") and not text.startswith("//") and len(text.split()) == 1


def _continued(line: str, read: Callable[[bool], str]) -> str:
    """A line with those that its backslashes ask for."""
    while line.endswith("\\"):
        line = f"{line[:-1]}\n{read(True)}"
    return line.replace("\\\n", "\n")  # of an entry that comes back whole, from the history


def _quoted(text: str, read: Callable[[bool], str]) -> str:
    """The text up to the closing quotes."""
    while QUOTES not in text:
        text = f"{text}\n{read(True)}"
    return text.partition(QUOTES)[0].strip("\n")
