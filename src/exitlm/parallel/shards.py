"""This process's part of every trained parameter, as plain tensors: what an optimizer works on, whatever the layout.

After a step's last backward :meth:`Shards.collect` makes the gradients of the layout one gradient: missing ones are
zeros, tied copies are summed, and the norm counts every number once, however many ranks hold it (torch's own clip
counts per mesh). Not here: the optimizer and the schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from exitlm.model.config import ModelConfig
from exitlm.model.exits import ExitConfig
from exitlm.parallel.mesh import Mesh
from exitlm.parallel.pipeline.stage import Stage
from exitlm.parallel.tied import TiedCopies, canonical


class Shards:
    """The trained parameters of the stages of a process. ``local[i]`` shares its memory with ``whole[i]``, ``names[i]``
    is the canonical name (twice where two stages have a copy)."""

    def __init__(self, stages: Sequence[Stage], mesh: Mesh, config: ModelConfig, exits: Sequence[ExitConfig]) -> None:
        self.mesh = mesh
        found = [(name, p, stage.index) for stage in stages for name, p in stage.tensors() if p.requires_grad]
        self.names = [canonical(name, config, exits) for name, _, _ in found]
        self.whole = [p for _, p, _ in found]
        self.stage = [index for _, _, index in found]
        self.local = [nn.Parameter(_local(p.detach())) for p in self.whole]
        self.tied = TiedCopies(self.names, mesh)

    def clear(self) -> None:
        """Forget the gradients."""
        for whole, local in zip(self.whole, self.local, strict=True):
            whole.grad = local.grad = None

    @torch.no_grad()
    def collect(self, divisors: Mapping[int, float], scale: float = 1.0) -> None:
        """Give every local part its part of the gradient, divided by the divisor of its stage (1 where there is none)
        and by ``scale``."""
        by_name: dict[str, list[Tensor]] = {}
        for i, (whole, local) in enumerate(zip(self.whole, self.local, strict=True)):
            grad = whole.grad
            if grad is None:
                local.grad = torch.zeros_like(local)
            else:
                if isinstance(grad, DTensor) and isinstance(whole, DTensor) and grad.placements != whole.placements:
                    grad = grad.redistribute(placements=whole.placements)
                local.grad = _local(grad).to(local.dtype)
            divisor = divisors.get(self.stage[i], 1.0) * scale
            if divisor != 1.0:
                local.grad /= divisor
            by_name.setdefault(self.names[i], []).append(local.grad)
        self.tied.sum(by_name)

    @torch.no_grad()
    def norms(self, groups: Sequence[int], group_of: Callable[[str], int]) -> dict[int, float]:
        """The norm of the whole gradient of each of ``groups``, the same on all processes; ``group_of`` maps a
        parameter's name to its group."""
        place = {group: i for i, group in enumerate(groups)}
        total = torch.zeros(len(groups), dtype=torch.float64, device=self.mesh.device)
        seen: set[str] = set()
        for name, whole, local in zip(self.names, self.whole, self.local, strict=True):
            if name in seen or name not in self.tied.leads:
                continue
            seen.add(name)
            assert local.grad is not None
            wide = torch.promote_types(local.dtype, torch.float32)
            square = torch.linalg.vector_norm(local.grad, dtype=wide).double() ** 2
            total[place[group_of(name)]] += square / copies(whole, self.mesh)
        if self.mesh.layout.world > 1:
            dist.all_reduce(total)
        return dict(zip(groups, total.sqrt().tolist(), strict=True))

    @torch.no_grad()
    def multiply(self, factors: Mapping[int, float], group_of: Callable[[str], int]) -> None:
        """Multiply every gradient by the factor of its group."""
        for name, local in zip(self.names, self.local, strict=True):
            factor = factors[group_of(name)]
            if local.grad is not None and factor != 1.0:
                local.grad *= factor


def copies(parameter: Tensor, mesh: Mesh) -> int:
    """On how many data and tensor ranks each number of a parameter is."""
    count = mesh.layout.data * mesh.layout.tensor
    if isinstance(parameter, DTensor):
        sizes = parameter.device_mesh.shape
        cut = [sizes[i] for i, placement in enumerate(parameter.placements) if not placement.is_replicate()]
        count //= math.prod(cut)
    return count


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(full: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a parameter whose whole value is ``full``, without communication."""
    if not isinstance(parameter, DTensor):
        return full
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    part = full
    for i in reversed(range(mesh.ndim)):  # tensor ranks are the last dimension, and cut first
        dimension = getattr(parameter.placements[i], "dim", None)
        if dimension is None:
            continue
        pieces = part.chunk(mesh.size(i), dimension)
        empty = part.narrow(dimension, 0, 0)
        part = pieces[coordinate[i]] if coordinate[i] < len(pieces) else empty
    return part
