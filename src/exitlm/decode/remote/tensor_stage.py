"""A stage of several tensor ranks: the first one has the link to the head, the others hear from it what the head says.

```
head ──link──> first rank ──lockstep──> other ranks      all: the same job, the same passes; the first one answers
```
Every rank runs :func:`~exitlm.decode.remote.stage.serve_link`: the first on :class:`Leading`, which hands each frame on
before it is looked at, the others on :class:`Following`, whose answers go nowhere. The first stage of a pipeline has no
link: there, or where one stage is all, :class:`LeadingWorker` hands passes on. What breaks off on one rank ends them
all, since no rank knows how far the others came.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from exitlm.decode.kernels.ranks import RankLost
from exitlm.decode.kernels.runner import Runner
from exitlm.decode.remote.frames import HEADER, MAX_FRAME, BadFrame, Frame, Kind, decode, encode, read_header
from exitlm.decode.remote.job import Job
from exitlm.decode.remote.link import Closed, Late, Link, frame_of
from exitlm.decode.remote.lockstep import Lockstep
from exitlm.decode.remote.messages import of_work
from exitlm.decode.remote.worker import Worker
from exitlm.decode.work import Brought, Work

_END = b"end"  # no frame is as short
_BEAT = 5.0  # seconds; the group's timeout must be longer


class Leading:
    """The link of a stage's first rank. Raises what :class:`Link` and :class:`Lockstep` do."""

    def __init__(self, link: Link, lockstep: Lockstep, beat: float = _BEAT) -> None:
        """``beat``: seconds without a frame after which the other ranks hear that this one is there."""
        self._link, self._lockstep, self._beat = link, lockstep, beat

    def trust(self) -> None:
        """See :class:`Link`."""
        self._link.trust()

    def receive(self, timeout: float | None = None) -> Frame:
        """The next frame, which all ranks get."""
        until = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            try:
                frame = self._link.receive(max(0.0, min(self._beat, until - time.monotonic())))
            except Late:
                if time.monotonic() < until:
                    self._lockstep.beat()
                    continue
                end(self._lockstep)
                raise
            except (Closed, BadFrame):
                end(self._lockstep)
                raise
            hand_on(self._lockstep, frame)
            return frame

    def send(self, frame: Frame) -> None:
        """See :class:`Link`."""
        self._link.send(frame)

    def say(self, **words: Any) -> None:
        """See :class:`Link`."""
        self._link.say(**words)


class Following:
    """The link of another rank: it hears what the first one hears, and what it says is not sent."""

    def __init__(self, lockstep: Lockstep) -> None:
        self._lockstep = lockstep

    def trust(self) -> None:
        """The first rank is trusted."""

    def receive(self, timeout: float | None = None) -> Frame:
        """The next frame; the first rank sees to the ``timeout``.

        Raises:
            Closed: the first rank was left by its head.
            RankLost: the first rank is gone.
            BadFrame: what came is no frame.
        """
        data = self._lockstep.receive()
        if data == _END:
            raise Closed("the first rank has no head any more")
        if len(data) < HEADER.size:
            raise BadFrame("what came is no frame of exitlm")
        size, payload = read_header(data[: HEADER.size], MAX_FRAME), bytearray(data[HEADER.size :])
        if len(payload) != size.payload:
            raise BadFrame("a frame came that ends too early")
        return decode(size, payload)

    def send(self, frame: Frame) -> None:
        """The first rank answers."""

    def say(self, **words: Any) -> None:
        """The first rank answers."""


class LeadingWorker(Worker):
    """The worker of a first rank without a link: it hands on what it is asked. ``adapters`` as in the ranks' job."""

    def __init__(self, runner: Runner, lockstep: Lockstep, adapters: Sequence[str]) -> None:
        super().__init__(runner)
        self._lockstep, self._adapters = lockstep, adapters

    def perform(self, work: Work) -> Brought:
        """See :class:`Worker`."""
        hand_on(self._lockstep, of_work(work, self._adapters))
        return super().perform(work)

    def clear(self, group: int, blocks: Sequence[int]) -> None:
        """See :class:`Worker`."""
        hand_on(self._lockstep, Frame(Kind.CLEAR, [group, *blocks]))
        super().clear(group, blocks)


def hand_on(lockstep: Lockstep, frame: Frame) -> None:
    """Give a frame to the other ranks."""
    lockstep.send(b"".join(encode(frame)))


def hand_on_job(lockstep: Lockstep, job: Job, exits: Iterable[Frame]) -> None:
    """Tell the other ranks what to be, where no link says it; ``exits`` are the tensors of the job's exits."""
    hand_on(lockstep, frame_of({"job": job.to_json()}))
    for piece in exits:
        hand_on(lockstep, piece)


def end(lockstep: Lockstep) -> None:
    """Tell the other ranks that nothing more comes; those that are gone need not be told."""
    with suppress(RankLost):
        lockstep.send(_END)
