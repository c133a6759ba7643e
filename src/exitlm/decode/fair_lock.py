"""A lock that a thread in a tight loop can't keep from the others. Knows nothing of decoding.

A thread that lets go of Python's own lock and takes it again at once mostly gets it, however long others have waited.
"""

from __future__ import annotations

import threading


class FairLock:
    """Re-entrant. Who waits for it is served before the thread that holds it gets it again.

    One thread at a time waits at ``_held``, and it keeps ``_next`` until it is served; all others queue for ``_next``.
    The end of a generator may enter it again at any point of :meth:`__enter__` and :meth:`__exit__`, by garbage
    collection: so both are re-entrant locks, and ``depth`` counts before the first is taken and after it is given back.
    """

    def __init__(self) -> None:
        self._next, self._held = threading.RLock(), threading.RLock()
        self._mine = _Mine()

    def __enter__(self) -> None:
        self._mine.depth += 1
        if self._mine.depth > 1:
            self._held.acquire()
            return
        with self._next:
            self._held.acquire()

    def __exit__(self, *error: object) -> None:
        self._held.release()
        self._mine.depth -= 1


class _Mine(threading.local):
    """How often this thread has entered."""

    depth: int = 0
