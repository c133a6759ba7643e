"""The one exception that speaks to users, and the helper that names the nearest known word.

Every mistake a user can make raises :class:`UserError`; the command line turns it into one sentence and exit code 2.
Any other exception is a defect of exitlm and keeps its traceback.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A mistake in the input: the message is one sentence that says what is wrong and what to do."""


class AlreadyTold(UserError):
    """A mistake that another process of the same run tells the user: this one ends alike, and silently."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of the ``known`` words, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


def short(value: Any) -> str:
    """A value as a message shows it: the first 60 characters of what Python prints, on one line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python prints no number of more than 4,300 digits, alone or within something else
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
