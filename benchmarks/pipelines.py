"""Pipelines with exits: simulated, with sleeping stages, and with stages that compute.

Sleeping: every rank is a process, its messages and the code of its schedule are those of training, but instead of
computing a stage sleeps for as long as its part was measured to take alone. So a pipeline of four can be timed on a
machine with two cores.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from calibration import calibrate
from measure import at_most, interleave, ratios, seconds, spread, table, within
from runs import CPU, Shape, exits_at, make_trainer, model_of, over_processes, run_config
from torch import Tensor, nn

from exitlm.model.exits import ExitConfig
from exitlm.parallel.mesh import Launch, Layout, Mesh, processes
from exitlm.parallel.pipeline.runner import Hidden, Rows, Runner, Step, TorchRunner
from exitlm.parallel.pipeline.schedule import Schedule, filled, make, simulate
from exitlm.parallel.pipeline.split import make_split, stage_costs
from exitlm.parallel.pipeline.stage import StepPlan

RANKS = 4
FILLED = {"1f1b": (0, 0, 0.727), "2 top": (2, 0, 0.795), "2 bottom": (0, 2, 0.833), "2 top, 2 bottom": (2, 2, 0.902)}
"""Extra microbatches, and the utilisation of P = 4, n = 8, f = 1, b = 2 by the theory of bubble filling."""
PUBLISHED = {
    "7B": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 10880, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}  # fmt: skip


# ---- stages that sleep


class Sleeper(nn.Module):
    """What a runner asks of a stage; sleeps for ``forward`` and ``backward`` seconds."""

    carries = frozen = False

    def __init__(self, index: int, stages: int, times: tuple[float, float], hidden: Hidden) -> None:
        super().__init__()
        self.index, self.first, self.last = index, index == 0, index == stages - 1
        self.times, self.shape = times, (1,) if self.last else hidden.shape
        self.slept = 0.0
        self.weight = nn.Parameter(torch.zeros(1))

    def sleep(self, way: int) -> None:
        """Sleep for a forward (0) or a backward (1)."""
        time.sleep(self.times[way])
        self.slept += self.times[way]

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        out: Tensor = _Sleep.apply(self, x, self.weight)  # type: ignore[no-untyped-call]
        return out


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stage: Sleeper, x: Tensor, weight: Tensor) -> Tensor:
        ctx.stage, ctx.like = stage, x
        stage.sleep(0)
        return torch.zeros(stage.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.stage.sleep(1)
        return None, torch.zeros_like(ctx.like) if ctx.like.is_floating_point() else None, torch.zeros(1)


@dataclass(frozen=True)
class Case:
    """A schedule with the times of its stages. ``torch``: run it by torch.distributed.pipelining."""

    schedule: Schedule
    forward: Sequence[float]
    backward: Sequence[float]
    torch: bool = False

    @property
    def simulated(self) -> float:
        """Seconds of a step, without messages."""
        return simulate(self.schedule, self.forward, self.backward).makespan

    @property
    def utilisation(self) -> float:
        """The share of work, simulated."""
        return simulate(self.schedule, self.forward, self.backward).utilisation


def asleep(cases: Mapping[str, Case], shape: tuple[int, int, int], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and utilisation of a step of each case, round by round."""
    found = over_processes(RANKS, _sleeping_rank, cases, shape, rounds)
    out = {}
    for name in cases:
        every = [rank[name] for rank in found]
        out[name] = []
        for turn in range(1, rounds + 1):
            took = max(rank[turn][1] for rank in every) - min(rank[turn][0] for rank in every)
            out[name].append((took, sum(rank[turn][2] for rank in every) / (took * RANKS)))
    return out


def _sleeping_rank(
    cases: Mapping[str, Case], shape: tuple[int, int, int], rounds: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Begin, end and seconds asleep, by case and round; the clock is the same for all processes of a machine."""
    mesh = Mesh(Layout(pipeline=RANKS), CPU)
    hidden = Hidden(shape=shape, dtype=torch.float32, device=CPU)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in cases}
    ready: dict[str, tuple[Step, Sleeper, Rows]] = {}
    for name, case in cases.items():
        rank, count = mesh.pipeline_rank, len(case.schedule.spans)
        stage = Sleeper(rank, RANKS, (case.forward[rank], case.backward[rank]), hidden)
        ids = torch.zeros(count * shape[0], shape[1], dtype=torch.long)
        rows = Rows(ids=ids, labels=ids, documents=ids)
        stand_in: Any = stage
        runner: Step = Runner(case.schedule, stand_in, mesh, hidden)
        if case.torch:
            runner = TorchRunner(case.schedule.name, [stand_in], mesh, hidden, count, ids[: shape[0]])
        ready[name] = runner, stage, rows
    plan = StepPlan(weights={}, shares={})
    for _ in range(rounds + 1):
        for name, (runner, stage, rows) in ready.items():
            stage.slept = 0.0
            dist.barrier()
            begin = time.monotonic()
            runner(rows, plan)
            found[name].append((begin, time.monotonic(), stage.slept))
    return found


# ---- with and without exits


def with_exits(shape: Shape, length: int, counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Step times of a pipeline of four with and without two exits, and of filled bubbles."""
    model = model_of(shape, length)
    depth = model.num_hidden_layers
    exits = exits_at((depth // 4, depth // 2), "norm", "own")
    with processes(Launch(), CPU, 600.0):
        layout = Layout()
        config = run_config(layout, rows=1, count=1, length=length)
        times, spreads = calibrate(make_trainer(config, model, exits, Mesh(layout, CPU)), rounds * 3)
    even = [depth // RANKS] * RANKS
    stages = {
        "no exits": times.stages(make_split(model, (), RANKS, layers_per_stage=even), ()),
        "2 exits": times.stages(make_split(model, exits, RANKS, layers_per_stage=even), exits),
    }
    cases: dict[str, Case] = {}
    for count in counts:
        plain = make("1f1b", RANKS, count)
        for name, both in stages.items():
            cases[f"{name}, 1f1b, M={count}"] = Case(plain, *both, torch=True)
        cases[f"2 exits, 1f1b by our runner, M={count}"] = Case(plain, *stages["2 exits"])
        cases[f"2 exits, filled, M={count}"] = Case(make("filled", RANKS, count), *stages["2 exits"])
    measured = asleep(cases, (1, length, model.hidden_size), rounds)
    rows, claims = [], []
    for name, case in cases.items():
        rows.append({
            "stages": name, "simulated, ms": f"{case.simulated * 1e3:.1f}",
            "with sleeping stages, ms": spread([t * 1e3 for t, _ in measured[name]]),
            "utilisation, simulated": f"{case.utilisation:.3f}",
            "utilisation, with sleeping stages": spread([u for _, u in measured[name]]),
        })  # fmt: skip
    for count in counts:
        names = [f"{kind}, M={count}" for kind in ("no exits, 1f1b", "2 exits, 1f1b", "2 exits, filled")]
        none, both, full = ([t for t, _ in measured[name]] for name in names)
        bound, over = cases[names[0]].simulated + 2 * times.head, f"M={count}: step with exits over its bound"
        claims += [
            at_most(f"{over}, simulated", cases[names[1]].simulated / bound, 1.05),
            at_most(f"{over}, with sleeping stages", ratios(both, [t + 2 * times.head for t in none]), 1.05),
            at_most(f"M={count}: filled over 1F1B, with exits, with sleeping stages", ratios(full, both), 1.05),
        ]
    published = by_flops(counts)
    claims += [at_most(f"{row['model']}: the same", float(row["over the bound"]), 1.05) for row in published]
    print(table(rows))
    print(table(published))
    return {
        "sleeping stages": "four processes over gloo, messages of the real size, the schedules' own code; every stage "
        "sleeps for its calibrated time instead of computing",
        "bound": "the step without exits plus k (f_E + b_E): each exit's head once, whatever M",
        "calibrated, ms": "; ".join(f"{name} {value}" for name, value in spreads.items()),
        "rows": rows, "published shapes, by FLOPs": published, "claims": claims,
    }  # fmt: skip


def by_flops(counts: Sequence[int]) -> list[dict[str, Any]]:
    """The bound for published shapes, with the FLOPs of their stages for times."""
    rows = []
    for name, shape in PUBLISHED.items():
        model = model_of({**shape, "num_key_value_heads": shape["num_attention_heads"]}, 2048)
        exits = exits_at((8, 16), "embed", "own")
        even = [model.num_hidden_layers // RANKS] * RANKS
        for count in counts:
            spans = []
            for heads in ((), exits):
                split = make_split(model, heads, RANKS, layers_per_stage=even)
                costs = stage_costs(model, heads, split, 2048)
                line = simulate(
                    make("1f1b", RANKS, count), [c.layer_flops for c in costs],
                    [c.backward_flops + c.head_flops for c in costs],
                )  # fmt: skip
                spans.append(line.makespan)
            head = 3 * 2 * model.vocab_size * model.hidden_size
            rows.append({
                "model": f"{name}, P={RANKS}, M={count}, by FLOPs", "exits cost": f"{spans[1] / spans[0] - 1:.2%}",
                "over the bound": f"{spans[1] / (spans[0] + 2 * head):.4f}",
            })  # fmt: skip
    return rows


def filling(unit: float, shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """Utilisation of four equal stages (n = 8, f = 1, b = 2) with and without microbatches that fill bubbles."""
    times = [unit] * RANKS, [2 * unit] * RANKS
    cases = {name: Case(filled(RANKS, 8, top, bottom), *times) for name, (top, bottom, _) in FILLED.items()}
    measured = asleep(cases, shape, rounds)
    rows, claims = [], []
    base = [t for t, _ in measured["1f1b"]]
    for name, (_, _, theory) in FILLED.items():
        case, took = cases[name], [t for t, _ in measured[name]]
        used = spread([u for _, u in measured[name]])
        rows.append({
            "filled with": name, "utilisation, theory": f"{theory:.3f}", "simulated": f"{case.utilisation:.4f}",
            "with sleeping stages": used, "makespan, simulated": f"{case.simulated / unit:.0f}",
            "measured": spread([t / unit for t in took]), "step over 1F1B": ratios(took, base),
        })  # fmt: skip
        if name != "1f1b":
            claims.append(within(f"{name}: utilisation, simulated", case.utilisation, theory, 0.01))
            claims.append(within(f"{name}: utilisation, with sleeping stages", used, theory, 0.01))
            claims.append(at_most(f"{name}: step over 1F1B, with sleeping stages", ratios(took, base), 1.05))
    print(table(rows))
    return {
        "P": RANKS,
        "n": 8,
        "sleeping stages": "as in the section pipeline",
        "f, ms": unit * 1e3,
        "b, ms": 2 * unit * 1e3,
        "rows": rows,
        "claims": claims,
    }


# ---- stages that compute


def computed(shape: Shape, length: int, rows: int, count: int, rounds: int, world: int, dtype: str) -> dict[str, Any]:
    """Step times of pipelines whose stages compute, the cores shared out among the processes."""
    threads = max(1, (os.cpu_count() or 1) // world)
    found = over_processes(world, _computing_rank, shape, length, rows, count, rounds, dtype, threads=threads)[0]
    base, base_with = found["no exits, 1f1b"], found["2 exits, 1f1b"]
    lines = [
        {
            "stages": name,
            "step, ms": spread([t * 1e3 for t in values]),
            "against no exits": ratios(values, base),
            "against 1f1b with exits": ratios(values, base_with),
        }
        for name, values in found.items()
    ]
    print(table(lines))
    return {
        "processes": world,
        "threads each": threads,
        "microbatches": count,
        "rows": lines,
        "claims": [at_most("filled over 1F1B, with exits", ratios(found["2 exits, filled"], base_with), 1.05)],
    }


def _computing_rank(
    shape: Shape, length: int, rows: int, count: int, rounds: int, dtype: str
) -> dict[str, list[float]]:
    world, model = dist.get_world_size(), model_of(shape, length)
    depth = model.num_hidden_layers
    exits = exits_at((depth // 4, depth // 2), "norm", "own")
    actions = {}
    variants: list[tuple[str, Sequence[ExitConfig], str]] = [
        ("no exits, 1f1b", (), "1f1b"), ("2 exits, 1f1b", exits, "1f1b"), ("2 exits, filled", exits, "filled"),
        ("2 exits, zbv", exits, "zbv"),
    ]  # fmt: skip
    for name, heads, schedule in variants:
        double = schedule == "zbv"
        layout = Layout(pipeline=world, schedule=schedule, stages_per_rank=1 + double)
        config = run_config(layout, rows=rows, count=count, length=length, dtype=dtype)
        even = [depth // layout.stages] * layout.stages
        trainer = make_trainer(config, model, heads, Mesh(layout, CPU), layers_per_stage=even)

        def step(trainer: Any = trainer) -> float:
            dist.barrier()
            return seconds(trainer.step)

        actions[name] = step
    return interleave(actions, rounds)
