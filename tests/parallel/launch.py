"""Several processes in one test: forked after torch is imported, which takes 3 s where new ones take 20."""

import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from exitlm.parallel.mesh import Launch, processes

TIMEOUT = 20.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(world: int, work: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Run ``work(*args)`` in ``world`` forked processes of one process group; what each returned, by rank. The first
    exception of any of them is raised here with its traceback; one that tells of a lost connection only where there is
    no other."""
    context = mp.get_context("fork")
    queue = context.SimpleQueue()
    port = free_port()
    children = [context.Process(target=_child, args=(rank, world, port, work, args, timeout, queue)) for rank in range(world)]
    for child in children:
        child.start()
    out: dict[int, Any] = {}
    failures: list[str] = []
    for _ in children:
        rank, good, value = queue.get()
        if good:
            out[rank] = value
        else:
            failures.append(f"rank {rank}: {value}")
    for child in children:
        child.join()
    if failures:
        raise AssertionError(min(failures, key=lambda text: "gloo" in text))
    return [out[rank] for rank in range(world)]


def _child(rank: int, world: int, port: int, work: Callable[..., Any], args: Any, timeout: float, queue: Any) -> None:
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    try:
        with processes(Launch(rank=rank, local_rank=rank, world=world), torch.device("cpu"), timeout):
            value = work(*args)
            dist.barrier()
        queue.put((rank, True, value))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
        os._exit(1)  # not the destruction of a group that others still wait in
