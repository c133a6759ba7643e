"""How far a long piece of work is, on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal."""


class Progress:
    """A bar with what is worth watching, by rich on a terminal; a line now and then elsewhere."""

    def __init__(self, title: str, total: int, stream: TextIO | None = None) -> None:
        self.title, self.total = title, total
        self.stream = stream or sys.stderr
        self.last = 0.0
        self.bar: Any = None
        self.task: Any = None
        if not self.stream.isatty():
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar
        except ImportError:
            return
        self.bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(file=self.stream),
        )
        self.task = self.bar.add_task(title, total=total, note="")
        self.bar.start()

    def update(self, done: int, note: str = "") -> None:
        """Show that ``done`` of the total are done."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=note)
        elif done >= self.total or time.monotonic() - self.last >= PLAIN_SECONDS:
            self.last = time.monotonic()
            print(f"{self.title}: {done}/{self.total} {note}".rstrip(), file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def progress(title: str, total: int) -> Iterator[Progress]:
    """A :class:`Progress` that is closed at the end."""
    shown = Progress(title, total)
    try:
        yield shown
    finally:
        shown.close()
