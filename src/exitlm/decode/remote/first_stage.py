"""The stage of the head's own process: passes run in a thread, so that the head can answer other stages meanwhile.

Where nothing else is under way a pass runs in the caller instead, which saves waking a thread twice.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Sequence

import torch

from exitlm.decode.remote.worker import Worker
from exitlm.decode.work import Brought, Work

_LAST_PASS = 10.0  # seconds that are waited for a pass whose result nobody wants any more


class FirstStage:
    """Runs the passes of a worker."""

    def __init__(self, worker: Worker, threads: int | None) -> None:
        self._worker, self._threads = worker, threads
        self._orders: queue.SimpleQueue[Work | tuple[int, Sequence[int]] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Brought | Exception] = queue.SimpleQueue()
        self._given = self._finished = 0
        self._next: Work | None = None
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="exitlm-stage-1", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """For ``select``: readable when something is done."""
        return self._bell.fileno()

    @property
    def idle(self) -> bool:
        """Whether the thread has nothing to do."""
        return self._given == self._finished

    def order(self, order: Work | tuple[int, Sequence[int]]) -> None:
        """A pass to run in the thread, or blocks to clear."""
        self._given += 1
        self._orders.put(order)

    def submit(self, work: Work) -> None:
        """A pass, which :meth:`start` lets run."""
        self._next = work

    def start(self, *, here: bool) -> Brought | None:
        """Run the pass that was submitted: in the thread, or, where nothing else is to be waited for, ``here``."""
        work, self._next = self._next, None
        if work is not None and here and self.idle:
            return self._worker.perform(work)
        if work is not None:
            self.order(work)
        return None

    def end(self) -> None:
        """End after the pass that runs. An interpreter that ends while a thread is within torch aborts."""
        self._orders.put(None)
        if threading.current_thread() is not self._thread:  # which may be the one that collects garbage
            self._thread.join(_LAST_PASS)

    def poll(self) -> Brought | Exception | None:
        """What was done, if something was."""
        try:
            return self._done.get_nowait()
        except queue.Empty:
            pass
        with contextlib.suppress(BlockingIOError):
            self._bell.recv(1024)
        try:  # what was done before the bell was silenced
            return self._done.get_nowait()
        except queue.Empty:
            return None

    @property
    def has_nothing(self) -> bool:
        """Whether there is neither a pass to run nor one that was done."""
        return self._next is None and self.idle and self._done.empty()

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while (order := self._orders.get()) is not None:
            try:
                if isinstance(order, tuple):
                    self._worker.clear(*order)
                    self._finished += 1
                    continue
                self._done.put(self._worker.perform(order))
            except Exception as error:
                self._done.put(error)
            self._finished += 1
            self._ringer.send(b"!")
        self._bell.close()
        self._ringer.close()
