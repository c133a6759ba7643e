"""A stage over several processes of one machine: its tensor ranks, of which the first has the link to the head.

The first rank starts the others, gives each the job that it was given, and from then on hands every frame on as it is
(``lockstep.py``), so that all run the same passes on their parts of each matrix. Where one of them is lost the stage
ends, and the head replaces it as a whole.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore, ProcessGroup  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from exitlm.decode.remote.frames import HEADER, Frame, decode, encode, read_header
from exitlm.decode.remote.hello import heard
from exitlm.decode.remote.launch import Children
from exitlm.decode.remote.link import Closed, Late, Link
from exitlm.decode.remote.lockstep import MAX_FRAME, Lockstep

LOAD = 600.0  # seconds that a stage may take to load its layers
TIMEOUT = 60.0  # seconds after which a rank that does nothing is taken for lost
_BEAT = 15.0


class Followers:
    """The other ranks of a stage, seen from the first one."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Start ``size - 1`` processes, and form a group with them."""
        self._children = Children()
        self._place = tempfile.TemporaryDirectory(prefix="exitlm-")  # of this user alone: a store has no key
        path = str(Path(self._place.name) / "store")
        store = FileStore(path, size)
        try:
            self.links = [self._children.start(rank) for rank in range(1, size)]
            for rank, link in enumerate(self.links, 1):
                link.peer = f"tensor rank {rank}"
                link.trust()
                link.say(follow={"rank": rank, "size": size, "path": path, "device": device.type})
            self.group = form(store, 0, size, device)
        except BaseException:
            self._children.close()
            raise
        self.lockstep = Lockstep(self.group)

    def say(self, words: dict[str, Any]) -> None:
        """Give all of them the job."""
        for link in self.links:
            link.say(**words)
            heard(link, LOAD)

    def tell(self, frame: Frame) -> None:
        """Let all of them know a part of an exit."""
        for link in self.links:
            link.send(frame)

    def await_ready(self) -> None:
        """Wait until all have their parts of the layers."""
        for link in self.links:
            heard(link, LOAD)
        for link in self.links:  # who waits for a frame waits no longer than a beat
            link.say(go=True)

    def hand_on(self, frame: Frame) -> None:
        """Let all of them do what a frame asks for. Raises ``RankLost``."""
        self.lockstep.send(b"".join(bytes(piece) for piece in encode(frame)))

    def receive(self, link: Link) -> Frame:
        """The next frame of the head; the others are kept awake meanwhile."""
        while True:
            try:
                return link.receive(_BEAT)
            except Late:
                self.lockstep.beat()

    def close(self) -> None:
        """End them."""
        self._children.close()
        self._place.cleanup()


@contextmanager
def forming(found: dict[str, Any]) -> Iterator[ProcessGroup]:
    """The group that the first rank asks this process to join."""
    store = FileStore(str(found["path"]), int(found["size"]))
    try:
        yield form(store, int(found["rank"]), int(found["size"]), torch.device(str(found["device"])))
    finally:
        dist.destroy_process_group()


def form(store: Store, rank: int, size: int, device: torch.device) -> ProcessGroup:
    """Join the group of a stage's ranks: gloo among CPUs, and both where there are GPUs."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # all of them are on this machine
        os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def follow(group: ProcessGroup, link: Link, do: Callable[[Frame], Any]) -> None:
    """Do what the first rank hands on, until it ends.

    Raises:
        RankLost: it ended, or another one did.
        BadFrame: it handed on what is no frame.
    """
    lockstep = Lockstep(group)
    watch(link)
    while True:
        data = lockstep.receive()
        do(decode(read_header(data[: HEADER.size], MAX_FRAME), bytearray(data[HEADER.size :])))


def watch(link: Link) -> None:
    """End this process with the first rank, also while it waits in a collective."""

    def run() -> None:
        try:
            link.receive()
        except Closed:
            os._exit(0)

    threading.Thread(target=run, name="exitlm-watch", daemon=True).start()
