"""The processes of a run: how many, laid out how, and which groups of them talk to each other.

``data * tensor * pipeline`` processes form a mesh of the dimensions (pipeline, replicate, shard, tensor); tensor ranks
are neighbours. ``replicate`` and ``shard`` are the data ranks: one of the two has size 1, as parameters are either
sharded over the data ranks (FSDP2) or whole on each. A single process is a mesh of one. Not here: what is done with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from exitlm.errors import UserError
from exitlm.parallel.roll import Roll, meet

DIMENSIONS = ("pipeline", "replicate", "shard", "tensor")
LOOPED = ("interleaved", "zero_bubble")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks there are of each kind, and how the pipeline runs."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = True
    shard: bool = True
    schedule: str = "1f1b"
    stages_per_rank: int = 1

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.data * self.tensor * self.pipeline

    @property
    def stages(self) -> int:
        """The number of pipeline stages."""
        return self.pipeline * self.stages_per_rank

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages on a pipeline rank: every P-th one, or for ``zbv`` the rank's own and its mirror image."""
        if self.schedule == "zbv" and self.stages_per_rank == 2:
            return rank, self.stages - 1 - rank
        return tuple(range(rank, self.stages, self.pipeline))

    def named(self, rank: int) -> str:
        """A process in words."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return f"rank {rank} (pipeline {pipeline}, data {data}, tensor {tensor})"

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that has a stage."""
        return next(rank for rank in range(self.pipeline) if stage in self.stages_of(rank))


def stages_per_rank(schedule: str, pipeline: int, asked: int) -> int:
    """How many stages each pipeline rank has; ``asked`` 0 is what the schedule needs.

    Raises:
        UserError: a number that the schedule does not know.
    """
    natural = 2 if schedule in (*LOOPED, "zbv") and pipeline > 1 else 1
    chosen = asked or natural
    if schedule in LOOPED and pipeline > 1:
        if chosen < 2:
            raise UserError(f"schedule '{schedule}' needs at least 2 stages per rank; set parallel.stages_per_rank = 2")
    elif chosen != natural:
        raise UserError(
            f"schedule '{schedule}' on {pipeline} pipeline ranks has {natural} stages per rank, not {chosen}; leave "
            "parallel.stages_per_rank at 0, or use schedule 'interleaved' for more"
        )
    return chosen


class Mesh:
    """The process groups of a layout, and this process's place in it. ``timeout`` in seconds, for each of them: torch
    gives a group its own default, whatever was set for all processes."""

    def __init__(self, layout: Layout, device: torch.device, timeout: float = 600.0) -> None:
        self.layout, self.device, self.timeout = layout, device, timedelta(seconds=timeout)
        replicate, shard = (1, layout.data) if layout.shard else (layout.data, 1)
        ranks = torch.arange(layout.world).reshape(layout.pipeline, replicate, shard, layout.tensor)
        groups = [self._group(ranks, dimension) for dimension in range(len(DIMENSIONS))]
        self.all = DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=DIMENSIONS)
        self.pipeline_rank = self.all.get_local_rank("pipeline")
        self.data_rank = self.all.get_local_rank("replicate") + self.all.get_local_rank("shard")
        self.tensor_rank = self.all.get_local_rank("tensor")
        self.pipeline = self.all.get_group("pipeline")
        # A group of its own for messages to earlier stages: on a GPU sends and receives of one group wait for each
        # other, and two neighbours that send to each other at once would never end.
        self.upstream = self._group(ranks, 0) if layout.pipeline > 1 else None
        self.tensor = self.all.get_group("tensor")

    @property
    def stages(self) -> tuple[int, ...]:
        """The pipeline stages of this process."""
        return self.layout.stages_of(self.pipeline_rank)

    @property
    def tensor_mesh(self) -> DeviceMesh:
        """The tensor ranks that share this process's layers."""
        return self.all["tensor"]

    @property
    def data_mesh(self) -> DeviceMesh:
        """The data ranks: sharded ones, or replicas around groups of one."""
        return self.all["shard"] if self.layout.shard else self.all["replicate", "shard"]

    def _group(self, ranks: Tensor, dimension: int) -> dist.ProcessGroup:
        """A new group of the ranks along a dimension, for every place in the others; this process's."""
        lines = ranks.movedim(dimension, -1).reshape(-1, ranks.shape[dimension]).tolist()
        groups: list[dist.ProcessGroup] = [dist.new_group(line, timeout=self.timeout) for line in lines]
        return next(group for line, group in zip(lines, groups, strict=True) if dist.get_rank() in line)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher says of this process; one alone where there is none."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Launch:
        """What torchrun put into the environment.

        Raises:
            UserError: what is there are no numbers of processes.
        """
        found: dict[str, int] = {}
        for name, key in _VARIABLES.items():
            text = os.environ.get(key)
            if text is not None and not text.isdecimal():
                raise UserError(f"{key} is '{text}' in the environment, but must be a number; start with torchrun")
            if text is not None:
                found[name] = int(text)
        launch = cls(**found)
        if not launch.rank < launch.world:
            raise UserError(f"RANK is {launch.rank}, but WORLD_SIZE makes {launch.world} process(es); use torchrun")
        return launch


_VARIABLES = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world": "WORLD_SIZE"}


@contextmanager
def processes(launch: Launch, device: torch.device, timeout: float) -> Iterator[Roll]:
    """Join the other processes while the block runs. ``timeout`` in seconds: the longest wait for another rank.

    Raises:
        UserError: they can't find each other (a port in use, a host that does not answer).
    """
    with meet(launch.rank, launch.world, timeout) as roll, group(roll, device):
        yield roll


@contextmanager
def group(roll: Roll, device: torch.device) -> Iterator[None]:
    """Form the group of all processes that met, for the length of the block."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(seconds=roll.timeout)
    dist.init_process_group(backend, store=roll.store, rank=roll.rank, world_size=roll.world, timeout=wait)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
