"""The processes that hold one model together, each its part of every matrix: their sums and their joined columns.

All of them call the same methods in the same order; nothing of Python's is ever sent. Works on any backend of torch's
process groups: gloo on CPUs, NCCL on GPUs, where the calls can be recorded in a CUDA graph. Not here: what is cut and
how (``exitlm.parallel.tensor``).

Shapes: M rows, T ranks, c columns of each rank, K columns that count (the last ranks may have some that do not).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

# torch 2.13 has another name for it, and warns of the one that older releases have.
_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class RankLost(ConnectionError):
    """Another process of a group died, or did not answer within the group's timeout."""


@contextmanager
def noticing(group: dist.ProcessGroup) -> Iterator[None]:
    """Raise :class:`RankLost` where a collective of the group fails."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise RankLost(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} lost another one of its group ({reason})"
        ) from error


class Ranks:
    """This process's place among the T that hold a model, ``rank`` of ``size``.

    Where tensors are on a CPU, a rank that died or hangs is a :class:`RankLost` after the group's timeout at most. On a
    GPU calls return before they are done: torch's watchdog ends the process then.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place: the same bits on each of them."""
        if x.device.type == "cpu":
            with noticing(self.group):
                dist.all_reduce(x, group=self.group)
        else:  # an error here is that of recording a graph, which ``graphs.py`` knows to live with
            dist.all_reduce(x, group=self.group)
        return x

    def stack(self, x_Mc: Tensor) -> Tensor:
        """What every rank has, ``[T, M, c]``."""
        x_Mc = x_Mc.contiguous()
        out = x_Mc.new_empty(self.size * x_Mc.shape[0], x_Mc.shape[1])
        if x_Mc.device.type == "cpu":
            with noticing(self.group):
                _gather(out, x_Mc, group=self.group)
        else:
            _gather(out, x_Mc, group=self.group)
        return out.view(self.size, *x_Mc.shape)

    def join(self, x_Mc: Tensor, columns: int) -> Tensor:
        """The columns of all ranks side by side, the first K of them: ``[M, K]``."""
        M, c = x_Mc.shape
        return self.stack(x_Mc).transpose(0, 1).reshape(M, self.size * c)[:, :columns]
