"""What the processes of a run tell each other beside their work: who is there, who failed and why, who died.

It goes over the store at which they meet, so that it works before they form groups and after groups have broken. Of all
processes that fail for one reason, the first one tells the user; the others end silently (:class:`AlreadyTold`). A
thread of each process answers for it while its main thread works or waits, and ends a process that hangs in a broken
group. Not here: the groups (``mesh.py``).
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from exitlm.errors import AlreadyTold, UserError

TICK, WATCH = 0.1, 0.5
ALIVE = 4.0
"""Seconds in which a process that lives answers."""
SIGNED = 10.0
"""Seconds in which all that wait for the same rank give up."""
LINGER = 10.0
"""Seconds that the process with the store waits for others to leave."""
GRACE = 10.0
"""Seconds that a process has to see for itself that another one failed."""
_SIGNS = ("timed out", "timeout", "connection", "gloo", "nccl")
Answer = TypeVar("Answer")
_SAFE = "the last checkpoint is intact, start the run again to go on from it"


class Roll:
    """The processes of a run, as one of them sees them. ``timeout`` in seconds: the longest wait for another one.
    ``keeps``: this process has the store, so that it leaves last."""

    def __init__(self, rank: int, world: int, store: Store, timeout: float, keeps: bool = False) -> None:
        self.rank, self.world, self.store, self.timeout, self.keeps = rank, world, store, timeout, keeps
        self.told = ""
        self._tells = self._down = False
        self._dead: list[int] = []
        self._asking = threading.RLock()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._answer, daemon=True)
        if world > 1:
            self._thread.start()

    # ---- before the work

    def agree(self, mark: str, mine: str, differ: Callable[[str, str], str]) -> None:
        """Refuse to go on where processes have something else than rank 0; ``differ`` says, of what this one and rank 0
        have, in what. ``mark`` is the name of the place in the program.

        Raises:
            UserError: they differ, or rank 0 did not come.
            AlreadyTold: another process failed.
        """
        if self.world == 1:
            return
        if self.rank == 0:
            self._ask(lambda store: store.set(mark, mine))
        self._until(lambda store: [] if store.check([mark]) else [0], time.monotonic() + self.timeout)
        first = self._ask(lambda store: store.get(mark)).decode()
        if mine != first:
            raise UserError(f"rank {self.rank} {differ(mine, first)}")

    def gather(self, mark: str) -> None:
        """Wait until all processes have come to this place in the program.

        Raises:
            UserError: one did not come.
            AlreadyTold: one failed.
        """
        if self.world > 1:
            self._ask(lambda store: store.set(f"{mark}/{self.rank}", "1"))
            self._until(lambda _: self._without(mark), time.monotonic() + self.timeout)

    def _ask(self, question: Callable[[Store], Answer]) -> Answer:
        """What the store answers. Never after this process was told why to leave: the one that keeps the store does
        not stay for it any longer.

        Raises:
            AlreadyTold: it was told.
        """
        with self._asking:
            if self.told:
                raise AlreadyTold(self.told)
            return question(self.store)

    def _until(self, missing: Callable[[Store], list[int]], deadline: float) -> None:
        while left := self._ask(missing):
            if time.monotonic() > deadline:
                names = " and ".join(f"rank {rank}" for rank in left)
                raise UserError(f"{names} did not come within {self.timeout:g} seconds (parallel.timeout)")
            time.sleep(TICK / 2)

    def _without(self, mark: str) -> list[int]:
        """The ranks that did not set a mark."""
        if self.store.check([f"{mark}/{rank}" for rank in range(self.world)]):
            return []
        return [rank for rank in range(self.world) if not self.store.check([f"{mark}/{rank}"])]

    # ---- after a failure

    def failed(self, error: Exception, named: Callable[[int], str]) -> Exception:
        """What this process has to raise for ``error``: the error; where others do not answer any more, who they are
        (``named`` gives a rank in words); or :class:`AlreadyTold`, where another process tells the user."""
        if self.world == 1 or isinstance(error, AlreadyTold):
            return error
        lost = None if isinstance(error, UserError) else _broken(error)
        if not self.told and not self._down:
            try:
                return self._tell(UserError(self._lost(lost, named)) if lost else error, named)
            except AlreadyTold as told:
                return told
            except RuntimeError:
                self._down = True
        if self.told:
            return AlreadyTold(self.told)
        return UserError(f"{named(0)} died; {_SAFE}") if lost else error

    def _tell(self, error: Exception, named: Callable[[int], str]) -> Exception:
        """Be the one that tells, unless another is."""
        self._alarm()
        if self._ask(lambda store: store.add("tellers", 1)) > 1:
            return AlreadyTold("another process failed first")
        self._tells = True
        reason = str(error) if isinstance(error, UserError) else f"{named(self.rank)} failed: {error!r}"
        self._ask(lambda store: store.set("told", reason))
        return error

    def _alarm(self) -> None:
        self._ask(lambda store: store.set(f"signed/{self.rank}", "1"))
        self._ask(lambda store: store.set("alarm", "1"))

    def _lost(self, error: BaseException, named: Callable[[int], str]) -> str:
        """The sentence for a message that did not get through."""
        self._alarm()
        if dead := self._missing("alive", min(ALIVE, self.timeout)):
            self._dead = dead
            return f"{' and '.join(map(named, dead))} died or can't be reached; {_SAFE}"
        if slow := self._missing("signed", min(SIGNED, self.timeout / 2)):
            names = " and ".join(map(named, slow))
            return f"{names} did not answer within {self.timeout:g} seconds (parallel.timeout); {_SAFE}"
        return f"the processes lost each other ({first_line(error)}); {_SAFE}"

    def _missing(self, mark: str, patience: float) -> list[int]:
        """The ranks without a mark after so many seconds, but for those that left in order."""
        deadline = time.monotonic() + patience
        while (left := self._ask(lambda _: self._without(mark))) and time.monotonic() < deadline:
            time.sleep(TICK)
        return self._ask(lambda _: self._present(left))

    def _present(self, ranks: list[int]) -> list[int]:
        """Those that have not left in order."""
        return [rank for rank in ranks if not self.store.check([f"left/{rank}"])]

    # ---- beside the work

    def _answer(self) -> None:
        """Sign for this process when another one raises the alarm, and hear what is told; then its main thread has a
        while to find out by itself."""
        try:
            store: Any = self.store
            store = store.clone()  # a connection of its own
            if not self._wait_for(store, "alarm"):
                return
            store.set(f"alive/{self.rank}", "1")
            if not self._wait_for(store, "told"):
                return
            told = store.get("told").decode()
            with self._asking:
                self.told = told
            store.set(f"heard/{self.rank}", "1")
        except RuntimeError:  # the process that kept the store died
            self._down = True
            return
        if not self._left.wait(GRACE):  # it hangs: on a GPU nothing else ends a wait for a process that is gone
            if self._tells:
                print(f"error: {self.told}", file=sys.stderr, flush=True)
            os._exit(2)

    def _wait_for(self, store: Store, key: str) -> bool:
        while not store.check([key]):
            if self._left.wait(WATCH):
                return store.check([key])
        return True

    def leave(self) -> None:
        """End the thread. The process that keeps the store stays until the others have heard why it leaves, or left."""
        if self.world == 1:
            return
        self._left.set()
        self._thread.join(ALIVE)
        with suppress(RuntimeError, AlreadyTold):
            if not self._down:
                self._ask(lambda store: store.set(f"left/{self.rank}", "1"))  # the last that it asks of the store
        with suppress(RuntimeError):
            deadline = time.monotonic() + LINGER
            while self.keeps and self._deaf() and time.monotonic() < deadline:
                time.sleep(TICK / 2)

    def _deaf(self) -> list[int]:
        """The ranks that may still ask the store for something."""
        return [rank for rank in self._present(self._without("heard")) if rank not in self._dead]


def _broken(error: BaseException | None) -> BaseException | None:
    """The error of a connection, if one is the cause of an error."""
    while error is not None and not any(sign in str(error).lower() for sign in _SIGNS):
        error = error.__cause__ or error.__context__
    return error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without what a library's authors add."""
    return str(error).strip().split("\n")[0].partition(". This is typically")[0].rstrip(".")


@contextmanager
def meet(rank: int, world: int, timeout: float) -> Iterator[Roll]:
    """Meet the other processes where the launcher's environment says (``MASTER_ADDR``, ``MASTER_PORT``).

    Raises:
        UserError: it does not say, another program is there, or nobody.
    """
    timeout = min(timeout, 1e8)  # what a clock's type holds
    keeps = world > 1 and rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = HashStore() if world == 1 else _store(rank, world, timeout, keeps)
    roll = Roll(rank, world, store, timeout, keeps)
    try:
        yield roll
    finally:
        roll.leave()


def _store(rank: int, world: int, timeout: float, keeps: bool) -> Store:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError(
            f"this is one of {world} processes (WORLD_SIZE), but MASTER_ADDR and MASTER_PORT do not say where they "
            "meet; start them with torchrun"
        )
    if not keeps:
        _reach(host, int(port), timeout)
    found: list[Store] = []
    problems: list[RuntimeError] = []

    def join() -> None:
        try:
            store = TCPStore(
                host, int(port), world, keeps, timedelta(seconds=timeout), wait_for_workers=False, multi_tenant=True
            )
            life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            time_here = store.add(f"exitlm/{life}/{rank}", 1)  # a program may train twice
            found.append(PrefixStore(f"exitlm/{life}/{time_here}", store))
        except RuntimeError as error:
            problems.append(error)

    thread = threading.Thread(target=join, daemon=True)  # which waits for ever where another program listens
    thread.start()
    thread.join(timeout)
    if found:
        return found[0]
    taken = not problems or "EADDRINUSE" in str(problems[0])
    reason = f"another program has port {port} of {host}" if taken else first_line(problems[0])
    raise UserError(f"the processes can't meet ({reason}); choose a free port (torchrun --master-port)")


def _reach(host: str, port: int, timeout: float) -> None:
    """Wait until something listens there. (torch prints its stack where nothing does.)"""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"the processes can't meet (nothing answers at port {port} of {host}: {error.strerror or error}); "
                    "check that rank 0 runs there and that every node reaches it"
                ) from error
            time.sleep(TICK)
