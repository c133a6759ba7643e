"""What was typed, kept from chat to chat: a file in the user's state directory that nobody else can read.

Each line of it is one entry as a JSON string, so that an entry may have several lines. It is appended to as entries are
made, by any number of chats at once, and cut when a chat begins.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from exitlm.atomic import replace_file
from exitlm.errors import UserError

MOST = 1000  # entries that are kept


def history_file() -> Path:
    """``$XDG_STATE_HOME/exitlm/chat_history``, by default below ``~/.local/state``."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "exitlm" / "chat_history"


def read_history(path: Path) -> list[str]:
    """The newest entries, the oldest first. A longer file is cut to them; lines that are no entries are left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    entries = [entry for line in lines if (entry := _entry(line)) is not None][-MOST:]
    if len(lines) > 2 * MOST:
        with contextlib.suppress(UserError, OSError):
            _write(path, entries)
    return entries


def append_history(path: Path, entry: str) -> None:
    """Keep an entry. A file that can't be written is no reason to end a chat: then nothing is kept."""
    with contextlib.suppress(UserError, OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            os.chmod(path, 0o600)  # of a file that was there
            file.write(_line(entry))


def _write(path: Path, entries: Sequence[str]) -> None:
    with replace_file(path) as place:
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT, 0o600)
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.writelines(map(_line, entries))


def _line(entry: str) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _entry(line: str) -> str | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, str) and found else None
