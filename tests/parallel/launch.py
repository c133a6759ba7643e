"""Several processes in one test: forked after torch is imported, which takes 3 s where new ones take 20."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from exitlm.parallel.mesh import Launch, processes

TIMEOUT = 20.0


def free_port() -> int:
    """A port for a store. Not one that the system hands out, since it would give it to a connection of another test
    before the store is there."""
    for port in _PORTS:
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port
    raise AssertionError("never without a port")


_FIRST, _COUNT = 20_000, 12_000
_PORTS = (_FIRST + (997 * os.getpid() + i) % _COUNT for i in count())


def launch(world: int, work: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Run ``work(*args)`` in ``world`` forked processes of one process group; what each returned, by rank. The first
    exception of any of them is raised here with its traceback; one that tells of a lost connection only where there is
    no other. None of them outlives the call."""
    context = multiprocessing.get_context("fork")
    port, children, ends = free_port(), [], {}
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        children.append(context.Process(target=_child, args=(rank, world, port, work, args, timeout, sender)))
        children[-1].start()
        sender.close()
        ends[receiver] = rank
    out: dict[int, Any] = {}
    failures: list[str] = []
    try:
        while ends:
            for end in wait(list(ends)):
                assert isinstance(end, Connection)
                rank = ends.pop(end)
                try:
                    good, value = pickle.loads(end.recv_bytes())
                except EOFError:
                    good, value = False, "died"
                if good:
                    out[rank] = value
                else:
                    failures.append(f"rank {rank}: {value}")
    finally:
        for child in children:
            child.join(timeout if not ends else 0)
            if child.is_alive():
                child.kill()
    if failures:
        raise AssertionError(min(failures, key=lambda text: "gloo" in text))
    return [out[rank] for rank in range(world)]


def _child(
    rank: int, world: int, port: int, work: Callable[..., Any], args: Any, timeout: float, sender: Connection
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    try:
        with processes(Launch(rank=rank, local_rank=rank, world=world), torch.device("cpu"), timeout):
            value = work(*args)
            dist.barrier()
        sender.send_bytes(pickle.dumps((True, value)))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        os._exit(1)  # not the destruction of a group that others still wait in
