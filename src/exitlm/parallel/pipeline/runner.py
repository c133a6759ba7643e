"""Running a schedule: a step of all microbatches through the stages of this process, leaving gradients behind.

Two runners with one call. :class:`TorchRunner` leaves gpipe, 1f1b, interleaved, zero_bubble and zbv to
torch.distributed.pipelining. :class:`Runner` executes what that can't express, schedules as data with partial
microbatches (``filled``) and the pipeline of a frozen model, and is the loop of a single stage. Neither scales nor
averages a gradient. Not here: what a stage computes, and what becomes of the gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules

from exitlm.parallel.mesh import Mesh
from exitlm.parallel.pipeline.schedule import Action, Message, Schedule
from exitlm.parallel.pipeline.stage import Stage, StepPlan

TORCH = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}
SPLIT = ("zero_bubble", "zbv")
"""Schedules that run the backward for inputs and for weights apart."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What this process's data rank reads in a step, ``[M * B, T]``: M microbatches of B rows one after the other.
    ``ids`` and ``labels`` on the device, ``documents`` on the CPU."""

    ids: Tensor
    labels: Tensor
    documents: Tensor

    def microbatch(self, number: int, size: int) -> Rows:
        """The rows of one microbatch."""
        rows = slice(number * size, (number + 1) * size)
        return Rows(ids=self.ids[rows], labels=self.labels[rows], documents=self.documents[rows])


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """The shape and dtype of the hidden states between stages."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        """A tensor to receive them in."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


Transfer = tuple[Any, Tensor]
"""A message under way, and the tensor that must live until it has ended."""


def send(tensor: Tensor, group: dist.ProcessGroup, peer: int) -> Transfer:
    """Begin to send to a rank of the group."""
    tensor = tensor.contiguous()
    return dist.isend(tensor, group=group, group_dst=peer), tensor


def receive(tensor: Tensor, group: dist.ProcessGroup, peer: int) -> Transfer:
    """Begin to receive into ``tensor`` from a rank of the group."""
    return dist.irecv(tensor, group=group, group_src=peer), tensor


def wait_for(transfers: Sequence[Transfer]) -> None:
    """Wait until all have ended."""
    for work, _ in transfers:
        work.wait()


class Step(Protocol):
    """A runner: back-propagates the losses of all ``rows`` as ``plan`` says."""

    hidden: Hidden

    def __call__(self, rows: Rows, plan: StepPlan) -> None: ...


class TorchRunner:
    """A schedule of torch.distributed.pipelining over the stages of this process."""

    def __init__(
        self, name: str, stages: Sequence[Stage], mesh: Mesh, hidden: Hidden, microbatches: int, ids: Tensor
    ) -> None:
        self.stages, self.hidden, self.size = stages, hidden, hidden.shape[0]
        count = mesh.layout.stages
        built = [_Neighbour(
            stage, stage.index, count, mesh.device, group=mesh.pipeline, **_shapes(stage, hidden, ids)
        ) for stage in stages]  # fmt: skip
        kind = getattr(schedules, TORCH[name])
        single = len(built) == 1
        self.schedule: Any = kind(
            built[0] if single else built, n_microbatches=microbatches, loss_fn=_end, scale_grads=False
        )
        self.quiet = {"return_outputs": False} if "return_outputs" in inspect.signature(kind.step).parameters else {}

    def __call__(self, rows: Rows, plan: StepPlan) -> None:
        """See :class:`Step`."""
        numbers = torch.arange(len(rows.ids)) // self.size
        inputs = (rows.ids,) if any(stage.first for stage in self.stages) else ()
        target = rows.labels if any(stage.last for stage in self.stages) else None
        for stage in self.stages:
            stage.plan = plan
        self.schedule.step(
            *inputs,
            target=target,
            labels=rows.labels,
            documents=rows.documents,
            microbatch=numbers,
            **self.quiet,
        )


class _Neighbour(PipelineStage):
    """A stage that may have the next one on its own process (zbv). Before the first step torch 2.11 and 2.12 send a
    number to every neighbour; to itself a process of gloo can't."""

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        others: list[Any] = super()._get_init_p2p_neighbors_ops()
        return [op for op in others if op.group_peer != self.group_rank]


def _end(output: Tensor, target: Tensor) -> Tensor:
    """The last stage's output has all losses behind it already."""
    return output.sum()


def _shapes(stage: Stage, hidden: Hidden, ids: Tensor) -> dict[str, Any]:
    """What goes in and out of a stage, told beforehand: to find it out torch would run a forward and backward."""
    between = tuple(hidden.empty().requires_grad_() for _ in range(1 + stage.carries))
    out = torch.empty(1, dtype=hidden.dtype, device=hidden.device, requires_grad=True)
    return {"input_args": (ids,) if stage.first else between, "output_args": (out,) if stage.last else between}


@dataclass
class _Held:
    """A microbatch between its forward and its backward."""

    inputs: tuple[Tensor, ...]
    outputs: Any


class Runner:
    """Executes a schedule with one stage per rank by sends and receives of its own."""

    def __init__(self, schedule: Schedule, stage: Stage, mesh: Mesh, hidden: Hidden) -> None:
        self.schedule, self.stage, self.mesh, self.hidden = schedule, stage, mesh, hidden
        self.program = schedule.messages()[stage.index]
        self.backwards = sum(isinstance(op, Action) and op.op == "B" for op in self.program)
        self.width = 1 + stage.carries if not stage.frozen else 1

    def __call__(self, rows: Rows, plan: StepPlan) -> None:
        """See :class:`Step`."""
        self.rows, self.plan, self.left = rows, plan, self.backwards
        self.arriving: dict[tuple[str, int], list[Transfer]] = {}
        self.leaving: dict[tuple[str, int], list[Tensor]] = {}
        self.sent: list[Transfer] = []
        self.held: dict[int, _Held] = {}
        self._synchronise(False)
        for op in self.program:
            if isinstance(op, Message):
                (self._send if op.kind == "send" else self._receive)(op)
            elif op.op == "F":
                self._forward(op.microbatch)
            else:
                self.left -= 1
                if self.left == 0:
                    self._synchronise(True)
                self._backward(op.microbatch)
        wait_for(self.sent)

    # ---- messages

    def _group(self, peer: int, sending: bool) -> tuple[dist.ProcessGroup, str]:
        """The group and the name of what passes between this stage and ``peer``."""
        down = (peer > self.stage.index) == sending
        group = self.mesh.pipeline if down else self.mesh.upstream
        assert group is not None
        return group, "hidden" if down else "gradient"

    def _send(self, message: Message) -> None:
        group, what = self._group(message.peer, True)
        self.sent += [send(tensor, group, message.peer) for tensor in self.leaving.pop((what, message.microbatch))]

    def _receive(self, message: Message) -> None:
        group, what = self._group(message.peer, False)
        empty = [self.hidden.empty() for _ in range(self.width)]
        self.arriving[what, message.microbatch] = [receive(tensor, group, message.peer) for tensor in empty]

    def _arrived(self, what: str, number: int) -> tuple[Tensor, ...]:
        arrived = self.arriving.pop((what, number))
        wait_for(arrived)
        return tuple(tensor for _, tensor in arrived)

    # ---- work

    def _arguments(self, number: int, live: bool = True) -> tuple[Tensor, dict[str, Any]]:
        rows = self.rows.microbatch(number, self.hidden.shape[0])
        plan = self.plan if live else replace(self.plan, weights={})
        options = {"labels": rows.labels, "documents": rows.documents, "microbatch": number, "plan": plan}
        return rows.ids, options

    def _forward(self, number: int) -> None:
        stage, (lo, hi) = self.stage, self.schedule.spans[number]
        live = stage.index >= lo
        ids, options = self._arguments(number, live)
        inputs = (ids,) if stage.first else self._arrived("hidden", number)
        if stage.frozen:
            out = stage(inputs[0], **options)
            self.leaving["hidden", number] = [out.hidden]
            self.held[number] = _Held((), out)
            return
        # A stage may skip all its layers; its last backward, which reduces the gradients, must be one all the same.
        if not stage.first and (stage.index > lo or self.plan.dropped.get(number)):
            for tensor in inputs:
                tensor.requires_grad_(live)
        with torch.set_grad_enabled(live):
            out = stage(*inputs, **options)
        outputs = out if isinstance(out, tuple) else (out,)
        if stage.index < hi:
            self.leaving["hidden", number] = [tensor.detach() for tensor in outputs]
        if live:
            self.held[number] = _Held(inputs, outputs)

    def _backward(self, number: int) -> None:
        if self.stage.frozen:
            self._exits(number)
            return
        held, (lo, hi) = self.held.pop(number), self.schedule.spans[number]
        if self.stage.index < hi:
            grads: tuple[Tensor, ...] = self._arrived("gradient", number)
        else:
            grads = tuple((torch.ones_like if self.stage.last else torch.zeros_like)(out) for out in held.outputs)
        torch.autograd.backward(held.outputs, grads)
        if self.stage.index > lo:
            self.leaving["gradient", number] = [_gradient(tensor) for tensor in held.inputs]

    def _exits(self, number: int) -> None:
        """Forward and backward of a frozen stage's exits; the final head's features go on to earlier stages."""
        stage, out = self.stage, self.held.pop(number).outputs
        features = out.features
        if stage.carries and not stage.last:
            (features,) = self._arrived("gradient", number)
        if stage.carries and not stage.first:
            self.leaving["gradient", number] = [features]
        _, options = self._arguments(number)
        end = stage(out.hidden if features is None else features, **options, taps=out.taps) if out.taps else None
        if end is not None:
            torch.autograd.backward(end, torch.ones_like(end))

    def _synchronise(self, last: bool) -> None:
        """Reduce gradients over data ranks with the last backward only. Several ranks without a pipeline reduce them
        with every one, so that no process holds them whole."""
        stage: Any = self.stage
        if isinstance(stage, FSDPModule) and (self.schedule.stages > 1 or self.mesh.layout.data == 1):
            stage.set_requires_gradient_sync(last)
            stage.set_is_last_backward(last)
            stage.set_reshard_after_backward(last)


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
