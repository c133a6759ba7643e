"""Where lines come from: a terminal, with its history and its keys, or a pipe. What lines mean is ``entries.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from exitlm.chat.entries import Command, Said, read_entry
from exitlm.chat.history import append_history, read_history
from exitlm.errors import UserError

PROMPT, MORE = "> ", ". "


class Terminal:
    """Entries of a user at a terminal, edited by readline where Python has it. ``history`` is the file that keeps them
    (None: nothing is kept); ``words`` are what the tab key completes at the start of a line."""

    def __init__(self, history: Path | None, words: Sequence[str], show: Callable[[str], None]) -> None:
        self._history, self._show = history, show
        self._lines: list[str] = []
        self._readline = _readline(words, [] if history is None else read_history(history))

    def read(self) -> Said | Command | None:
        """The next entry; None where there is nothing in it, or where Ctrl-C dropped it.

        Raises:
            EOFError: the user leaves, by Ctrl-D or by Ctrl-C twice.
        """
        for is_last in (False, True):
            self._lines = []
            try:
                entry = read_entry(self._line)
            except KeyboardInterrupt:
                if self._lines:
                    self._show("")
                    return None
                self._show("" if is_last else "\n(Ctrl-C again leaves, and so does Ctrl-D)")
                continue
            except EOFError:
                self._show("")
                raise
            if entry is not None:
                self._keep("\n".join(self._lines))
            return entry
        raise EOFError

    def _line(self, begun: bool) -> str:
        line = input(MORE if begun else PROMPT)
        self._lines.append(line)
        return line

    def _keep(self, entry: str) -> None:
        if self._readline is not None:
            self._readline.add_history(entry)
        if self._history is not None:
            append_history(self._history, entry)


class Pipe:
    """Entries of a file or another program."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._begun = file, False

    def read(self) -> Said | Command | None:
        """The next entry.

        Raises:
            EOFError: there is no more.
            UserError: it is no UTF-8 text, or ends within an entry.
        """
        return read_entry(self._line)

    def _line(self, begun: bool) -> str:
        try:
            line = self._file.readline().decode()
        except UnicodeDecodeError:
            raise UserError("standard input is not valid UTF-8 text; give it in that encoding") from None
        if not line:
            if begun:
                raise UserError("standard input ends within an entry; close its quotes, or drop its last backslash")
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")


def _readline(words: Sequence[str], entries: Sequence[str]) -> ModuleType | None:
    """Python's readline, if there is one, with these entries to go back to."""
    try:
        import readline
    except ImportError:
        return None

    def complete(text: str, state: int) -> str | None:
        found = [word for word in words if word.startswith(text)] if readline.get_begidx() == 0 else []
        return f"{found[state]} " if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I rl_complete")
    else:
        readline.parse_and_bind("tab: complete")
        readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted text of several lines is one entry
    readline.set_auto_history(False)  # an entry may be several lines
    readline.clear_history()
    for entry in entries:
        readline.add_history(entry)
    return readline
