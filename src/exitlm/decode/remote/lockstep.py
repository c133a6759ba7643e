"""How the first of a stage's tensor ranks hands its requests on to the others, so that all run the same passes.

A request is a frame of raw bytes: its length goes first, then the bytes; nothing is pickled. What the bytes say is not
known here, nor what the ranks do with them. Use a group of gloo, also beside NCCL: between requests the others wait in
:meth:`Lockstep.receive`, which would keep a GPU busy.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from exitlm.decode.kernels.ranks import RankLost, noticing

MAX_FRAME = 1 << 30
"""Bytes of a frame at most: a length beyond is not one."""


class Lockstep:
    """Frames from the first rank of ``group`` to all others, each to every one, in order.

    Whoever waits for a frame longer than the group's timeout takes the first rank for lost, so that one with nothing to
    send calls :meth:`beat` more often than that.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._first = dist.get_global_rank(group, 0)
        on_gpu = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def send(self, frame: bytes | bytearray | memoryview) -> None:
        """Hand a frame of 1 to ``MAX_FRAME`` bytes on, on the first rank.

        Raises:
            RankLost: another rank died, or did not take the frame within the group's timeout.
        """
        assert self.rank == 0
        assert 0 < len(frame) <= MAX_FRAME
        self._broadcast(torch.tensor([len(frame)], device=self._device))
        self._broadcast(torch.frombuffer(bytearray(frame), dtype=torch.uint8).to(self._device))

    def beat(self) -> None:
        """Say that this rank, the first, is there; the others go on waiting. Raises as :meth:`send`."""
        assert self.rank == 0
        self._broadcast(torch.tensor([0], device=self._device))

    def receive(self) -> bytes:
        """Wait for the next frame, on any rank but the first.

        Raises:
            RankLost: the first rank died, sent nothing within the group's timeout, or sent what is not a frame.
        """
        assert self.rank > 0
        length = 0
        while length == 0:
            length = int(self._broadcast(torch.zeros(1, dtype=torch.long, device=self._device)))
        if not 0 < length <= MAX_FRAME:
            raise RankLost(f"the first rank announced a frame of {length} bytes, but one has at most {MAX_FRAME}")
        frame = self._broadcast(torch.empty(length, dtype=torch.uint8, device=self._device))
        return frame.cpu().numpy().tobytes()

    def _broadcast(self, x: Tensor) -> Tensor:
        if self.size > 1:
            with noticing(self.group):
                dist.broadcast(x, self._first, group=self.group)
        return x
