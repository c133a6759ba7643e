"""One optimizer step after the other over a mesh of processes: stages, their parameters, the optimizer, the losses.

What happens in step ``s`` is a function of the settings, the data and the state after step ``s - 1``, in any layout of
processes up to the rounding of sums. A step whose gradient is not finite, or far larger than usual, is skipped on all
processes alike. Not here: files, signals and what is printed (``full.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from exitlm.model.config import ModelConfig
from exitlm.model.exits import ExitConfig
from exitlm.parallel.fsdp import shard, sum_in
from exitlm.parallel.mesh import Mesh
from exitlm.parallel.pipeline.runner import (
    SPLIT,
    Hidden,
    Rows,
    Runner,
    Step,
    TorchRunner,
    Transfer,
    receive,
    send,
    wait_for,
)
from exitlm.parallel.pipeline.split import Split
from exitlm.parallel.pipeline.stage import FINAL, Stage, StepPlan
from exitlm.parallel.shards import Shards, part_of
from exitlm.parallel.tensor import cut
from exitlm.parallel.tied import canonical
from exitlm.train.head_loss import COUNTED, HeadLosses
from exitlm.train.initial import InitialValues
from exitlm.train.loop import learning_rate, loss_settings
from exitlm.train.plan import Geometry, plan_step
from exitlm.train.run import RunConfig
from exitlm.train.stream import Stream

SCALE_STEPS = 1000
FIRST_SCALE = 65536.0
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that defines the training of a run, resolved; the same on every process. ``teacher``: exits learn from the
    final head. ``master`` is the dtype of parameters and optimizer, ``compute`` that of the work."""

    config: RunConfig
    model: ModelConfig
    exits: Sequence[ExitConfig]
    split: Split
    geometry: Geometry
    compute: torch.dtype
    master: torch.dtype
    frozen: bool = False
    teacher: bool = False
    candidate_ids: Tensor | None = None

    @property
    def heads(self) -> tuple[int, ...]:
        """The exits by layer, and ``FINAL`` where the final head is trained or measured."""
        return (*(e.layer for e in self.exits), *((FINAL,) if self.split.final else ()))


@dataclass(frozen=True, kw_only=True)
class Report:
    """A step in numbers: by head the means over its tokens, and the rest."""

    means: Mapping[int, Mapping[str, float]]
    weights: Mapping[int, float]
    lr: float
    grad_norm: float
    tokens: int
    skipped: bool

    def values(self) -> dict[str, float]:
        """Flat names for the trackers; the final head's is ``final``."""
        out: dict[str, float] = {"lr": self.lr, "grad_norm": self.grad_norm, "tokens": self.tokens}
        for head, means in self.means.items():
            out.update({f"{name}/{head_name(head)}": value for name, value in means.items()})
        out.update({f"weight/{head_name(head)}": weight for head, weight in self.weights.items()})
        return out


def head_name(head: int) -> str:
    """An exit's layer, or ``final``."""
    return "final" if head == FINAL else str(head)


@dataclass
class Progress:
    """What a step leaves behind besides parameters and moments."""

    done: int = 0
    skipped: int = 0
    in_a_row: int = 0
    idle: int = 0
    """Steps in a row without an update: skipped ones, and those of a loss scale that was too large."""
    usual_norm: float = 0.0
    scale: float = 1.0
    since_scaled: int = 0

    def numbers(self) -> dict[str, float]:
        """For a checkpoint."""
        return dict(vars(self))


@dataclass
class Trainer:
    """The stages of this process and their optimizer; :meth:`step` does one optimizer step on all processes."""

    job: Job
    mesh: Mesh
    stream: Stream
    values: InitialValues | None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        job, layout = self.job, self.mesh.layout
        t, o = job.config.train, job.config.objective
        self.losses = HeadLosses(
            settings=loss_settings(o),
            gate_weight=o.gate if any(e.gate for e in job.exits) else 0.0,
            how=o.exit_forward,
            group=self.mesh.tensor if layout.tensor > 1 else None,
            sequence=layout.sequence,
            splits=layout.schedule in SPLIT and layout.pipeline > 1,
            autocast=job.compute if job.frozen and job.compute != job.master else None,
        )
        self.stages = [self._stage(index) for index in self.mesh.stages]
        self.shards = Shards(self.stages, self.mesh, job.model, job.exits)
        wide = [local for local, whole in zip(self.shards.local, self.shards.whole, strict=True) if whole.dim() >= 2]
        narrow = [local for local, whole in zip(self.shards.local, self.shards.whole, strict=True) if whole.dim() < 2]
        groups = [{"params": wide, "weight_decay": t.weight_decay}, {"params": narrow, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]] or [{"params": [nn.Parameter(torch.zeros(0))]}],
            lr=t.lr,
            betas=t.betas,
            eps=t.eps,
            fused=True,
        )
        if job.compute == torch.float16 and not self.progress.done:
            self.progress.scale = FIRST_SCALE
        self.runner = self._runner()

    def _stage(self, index: int) -> Stage:
        job, layout = self.job, self.mesh.layout
        with torch.device("meta"):
            stage = Stage(
                job.model,
                job.exits,
                job.split,
                index,
                self.losses,
                carries=job.teacher,
                frozen=job.frozen,
                recompute=job.config.train.recompute == "layers",
                across_documents=job.config.data.across_documents,
                dtype=job.compute,
                candidate_ids=job.candidate_ids,
            )
        stage.to(job.compute if job.frozen else job.master)
        stage.model.exits.to(job.master)
        if layout.tensor > 1:
            cut(stage.model, self.mesh.tensor_mesh, sequence=layout.sequence)
            stage.tie()
        if job.frozen:
            exits = {id(p) for p in stage.model.exit_parameters()}
            for p in stage.parameters():
                p.requires_grad_(id(p) in exits)
        shard(stage, self.mesh, compute=job.compute, master=job.master)
        stage.to_empty(device=self.mesh.device)
        stage.tie()
        if self.values is not None:
            self._fill(stage, self.values)
        if job.compute != job.master:
            sum_in(stage, job.master)
        for head in stage.model.exit_heads().values():
            if head.config.candidates:
                ids = torch.arange(head.config.candidates) if job.candidate_ids is None else job.candidate_ids
                head.candidate_ids = ids[: head.config.candidates].sort().values.to(self.mesh.device)
        if job.config.train.compile:
            for layer in stage.model.model.layers.values():
                layer.compile()
        return stage.train()

    @torch.no_grad()
    def _fill(self, stage: Stage, values: InitialValues) -> None:
        for name, parameter in stage.tensors():
            full = values.tensor(canonical(name, self.job.model, self.job.exits), parameter.shape)
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.copy_(part_of(full, parameter))

    def _runner(self) -> Step:
        job, layout, device = self.job, self.mesh.layout, self.mesh.device
        size, length = job.geometry.size, job.config.data.seq_len
        part = length // layout.tensor if layout.sequence else length
        hidden = Hidden(shape=(size, part, job.model.hidden_size), dtype=job.compute, device=device)
        if layout.pipeline == 1 or job.frozen or layout.schedule == "filled":
            return Runner(job.geometry.schedule, self.stages[0], self.mesh, hidden)
        ids = torch.zeros(size, length, dtype=torch.long, device=device)
        return TorchRunner(layout.schedule, self.stages, self.mesh, hidden, job.geometry.microbatches, ids)

    # ---- one step

    def step(self) -> Report:
        """One optimizer step, or one that is skipped because its gradient can't be used."""
        job, p = self.job, self.progress
        todo = plan_step(
            job.config, job.exits, job.split, job.geometry, self.stream, p.done, frozen=job.frozen, scale=p.scale
        )
        batch = self.stream.batch(job.geometry.mine(p.done, self.mesh.data_rank))
        device = self.mesh.device
        rows = Rows(ids=batch.ids_BT.to(device), labels=batch.labels_BT.to(device), documents=batch.documents_BT)
        self.shards.clear()
        self.runner(rows, todo.plan)
        self.shards.collect(todo.divisors, p.scale)
        t = job.config.train
        norms = self.shards.norms(self._groups(), self._group)
        norm = math.hypot(*norms.values())
        rate = learning_rate(p.done, t)
        skip = not math.isfinite(norm) or (t.spike > 0 and p.usual_norm > 0 and norm > t.spike * p.usual_norm)
        if not skip:
            if t.clip > 0:
                factors = {group: min(1.0, t.clip / (value + 1e-6)) for group, value in norms.items()}
                self.shards.multiply(factors, self._group)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            p.usual_norm = norm if p.usual_norm == 0.0 else 0.98 * p.usual_norm + 0.02 * norm
        self._count(skip, norm)
        return Report(
            means=self._means(self.losses.take(), todo.plan),
            weights=todo.plan.weights,
            lr=rate,
            grad_norm=norm,
            tokens=todo.tokens,
            skipped=skip,
        )

    def _groups(self) -> list[int]:
        """What is clipped by itself: the whole, or each exit of a frozen model, alone or together."""
        return [e.layer for e in self.job.exits] if self.job.frozen else [FINAL]

    def _group(self, name: str) -> int:
        return int(name.split(".")[1]) if self.job.frozen else FINAL

    def _count(self, skip: bool, norm: float) -> None:
        p = self.progress
        p.done += 1
        p.idle = p.idle + 1 if skip else 0
        overflow = self.job.compute == torch.float16 and not math.isfinite(norm)
        if overflow and p.scale > 1.0:  # not a fault of the run: the loss scale was too large
            p.scale, p.since_scaled = p.scale / 2.0, 0
        elif skip:
            p.skipped += 1
            p.in_a_row += 1
        else:
            p.in_a_row = 0
            p.since_scaled += 1
            if self.job.compute == torch.float16 and p.since_scaled >= SCALE_STEPS:
                p.scale, p.since_scaled = p.scale * 2.0, 0

    def _means(self, sums: Mapping[int, Tensor], plan: StepPlan) -> dict[int, dict[str, float]]:
        """Means by head over all processes; tensor ranks counted the same."""
        table = torch.zeros(len(self.job.heads), len(COUNTED), dtype=torch.float64, device=self.mesh.device)
        for i, head in enumerate(self.job.heads):
            if head in sums and self.mesh.tensor_rank == 0:
                table[i] = sums[head]
        if self.mesh.layout.world > 1:
            dist.all_reduce(table)
        out: dict[int, dict[str, float]] = {}
        for head, row in zip(self.job.heads, table.tolist(), strict=True):
            if head in plan.weights and row[0] > 0:
                values = dict(zip(COUNTED, row, strict=True))
                learns = head != FINAL and not plan.measure
                if not (learns and self.losses.gate_weight):
                    del values["gate_loss"]
                if not (learns and self.losses.settings.confidence_weighted):
                    del values["confidence_weight"]
                tokens = values.pop("tokens")
                out[head] = {name: value / tokens for name, value in values.items()}
        return out

    # ---- validation

    @torch.no_grad()
    def validate(self, stream: Stream, rows: int) -> dict[int, dict[str, float]]:
        """Cross-entropy, accuracy and confidence of every head on the first ``rows`` rows (rounded up to whole
        microbatches of all data ranks, each row once)."""
        job, layout, size = self.job, self.mesh.layout, self.job.geometry.size
        plan = StepPlan(weights=dict.fromkeys(job.heads, 0.0), shares=dict.fromkeys(job.heads, 1.0), measure=True)
        slabs = range(0, rows, size * layout.data)
        arriving: dict[int, Tensor] = {}
        sent: list[Transfer] = []
        for stage in self.stages:
            for number, first in enumerate(slabs):
                mine = range(first + self.mesh.data_rank * size, first + (self.mesh.data_rank + 1) * size)
                batch = stream.batch([row % len(stream) for row in mine])
                labels = batch.labels_BT.to(self.mesh.device)
                labels[[row >= rows for row in mine]] = -100
                x = batch.ids_BT.to(self.mesh.device) if stage.first else self._take(stage, number, arriving)
                out = stage(x, labels=labels, documents=batch.documents_BT, microbatch=number, plan=plan)
                if not stage.last:
                    sent += self._give(stage, number, out, arriving)
        wait_for(sent)
        return self._means(self.losses.take(), plan)

    def _take(self, stage: Stage, number: int, arriving: dict[int, Tensor]) -> Tensor:
        rank = self.mesh.layout.rank_of(stage.index - 1)
        if rank == self.mesh.pipeline_rank:
            return arriving.pop(number)
        x = self.runner.hidden.empty()
        wait_for([receive(x, self.mesh.pipeline, rank)])
        return x

    def _give(self, stage: Stage, number: int, out: Tensor, arriving: dict[int, Tensor]) -> list[Transfer]:
        rank = self.mesh.layout.rank_of(stage.index + 1)
        if rank == self.mesh.pipeline_rank:
            arriving[number] = out
            return []
        out = out.contiguous()
        return [send(out, self.mesh.pipeline, rank)]

    # ---- state

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments by name, as this process has them: every trained tensor, in place."""
        out: dict[str, Tensor] = {}
        for name, whole, local in zip(self.shards.names, self.shards.whole, self.shards.local, strict=True):
            moments = self.optimizer.state[local]
            if not moments:
                moments["step"] = torch.zeros((), dtype=torch.float32)
                moments.update({key: torch.zeros_like(local) for key in MOMENTS})
            out[f"model.{name}"] = whole.detach()
            out.update({f"optimizer.{key}.{name}": _like(moments[key], whole) for key in MOMENTS})
        return out

    def restore(self, numbers: Mapping[str, float], updates: int) -> None:
        """Go on from a checkpoint whose tensors were loaded into those of :meth:`state`."""
        loaded = dict(zip(self.shards.names, self.shards.local, strict=True))
        for name, local in zip(self.shards.names, self.shards.local, strict=True):
            if local is not loaded[name]:  # a tied matrix that two stages of this process have is in the state once
                local.data.copy_(loaded[name].data)
                for key in MOMENTS:
                    self.optimizer.state[local][key].copy_(self.optimizer.state[loaded[name]][key])
        self.progress = Progress(**{key: type(getattr(self.progress, key))(value) for key, value in numbers.items()})
        for local in self.shards.local:
            self.optimizer.state[local]["step"].fill_(updates)

    def finite(self) -> bool:
        """Whether all parameters of this process are numbers."""
        return all(bool(local.isfinite().all()) for local in self.shards.local)

    @property
    def updates(self) -> int:
        """How often the optimizer stepped."""
        steps = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        return max(steps, default=0)


def _like(local: Tensor, whole: Tensor) -> Tensor:
    """A local tensor laid out as the parameter ``whole``."""
    if not isinstance(whole, DTensor):
        return local
    return DTensor.from_local(
        local, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
