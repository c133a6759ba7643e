"""Peak memory of pipeline ranks with and without exits, by the allocator's own events, and how often heads run forward.

Four processes, an exit behind every second of 8 layers, 4096 tokens of vocabulary, 128 tokens a microbatch, 8
microbatches. Only schedule, forwards and backwards are within the measured stretch; gradients begin as None there, so
that they count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from measure import at_most, table
from runs import CPU, exits_at, make_trainer, model_of, over_processes, run_config
from torch.profiler import ProfilerActivity, profile

from exitlm.model.exits import ExitConfig
from exitlm.parallel.mesh import Layout, Mesh
from exitlm.parallel.pipeline.runner import Rows
from exitlm.train.head_loss import HeadJob
from exitlm.train.plan import plan_step
from exitlm.train.trainer import Trainer

RANKS, LENGTH, ROWS, COUNT, CHUNK = 4, 64, 2, 8, 32
SHAPE = {
    "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4,
}  # fmt: skip
WAYS = ("no exits", "eager", "checkpoint", "deferred")
MIB = 2**20


def peaks(vocabulary: int = SHAPE["vocab_size"]) -> dict[str, Any]:
    """The table, and by how much deferred exits raise the peak of each rank."""
    shape = {**SHAPE, "vocab_size": vocabulary}
    rows, claims = [], []
    matrix = vocabulary * shape["hidden_size"] * 4
    chunk = CHUNK * vocabulary * 4
    features = 2 * ROWS * LENGTH * shape["hidden_size"] * 4  # what the matrix reads, and its gradient
    for schedule in ("1f1b", "zbv"):
        found = over_processes(RANKS, _rank, shape, schedule)
        for way in WAYS:
            rows.append({
                "schedule": schedule, "heads": way,
                **{f"rank {rank}, MiB": f"{found[rank][way][0] / MIB:.2f}" for rank in range(RANKS)},
                "head forwards": sum(rank[way][1] for rank in found),
            })  # fmt: skip
        for rank in range(RANKS):
            more, heads = found[rank]["deferred"][0] - found[rank]["no exits"][0], found[rank]["deferred"][2]
            # Between the halves of its backward each waiting microbatch keeps a gradient of its weights.
            allowed = heads * (chunk + features + matrix + (COUNT * matrix if schedule == "zbv" else 0))
            what = f"{schedule}, rank {rank} ({heads} exit{'s' * (heads != 1)}): deferred over no exits, MiB"
            claims.append(at_most(what, more / MIB, allowed / MIB))
    least = (RANKS * COUNT, COUNT)
    print(table(rows))
    return {
        "tokens a microbatch": ROWS * LENGTH, "microbatches": COUNT, "tokens a chunk": CHUNK,
        "logits of a microbatch, MiB": ROWS * LENGTH * vocabulary * 4 / MIB, "of a chunk, MiB": chunk / MIB,
        "one output matrix or its gradient, MiB": matrix / MIB,
        "goal": "one chunk of logits, the gradient of the exit's matrix, its features; under zbv besides one gradient "
        "of the matrix for each microbatch between the halves of its backward",
        "least head forwards": f"{least[0]} with exits, {least[1]} without", "rows": rows, "claims": claims,
    }  # fmt: skip


def _rank(shape: dict[str, int], schedule: str) -> dict[str, tuple[int, int, int]]:
    """Peak in bytes, forwards of heads, and the number of exits of this rank, by way."""
    double = schedule == "zbv"
    layout = Layout(pipeline=RANKS, schedule=schedule, stages_per_rank=1 + double)
    mesh, model, found = Mesh(layout, CPU), model_of(shape, LENGTH), {}
    exits = exits_at((2, 4, 6), "norm", "own")
    for way in WAYS:
        heads: Sequence[ExitConfig] = () if way == "no exits" else exits
        config = run_config(
            layout, rows=ROWS, count=COUNT, length=LENGTH, exit_forward="deferred" if way == "no exits" else way
        )
        even = [model.num_hidden_layers // layout.stages] * layout.stages
        trainer = make_trainer(config, model, heads, mesh, layers_per_stage=even, place="end")
        trainer.losses.chunk = CHUNK
        found[way] = (*_measure(trainer), sum(len(stage.model.exits) for stage in trainer.stages))
    return found


def _measure(trainer: Trainer) -> tuple[int, int]:
    """Peak and head forwards of the second step."""
    job, count, features = trainer.job, [0], HeadJob.features
    todo = plan_step(job.config, job.exits, job.split, job.geometry, trainer.stream, 0)
    batch = trainer.stream.batch(job.geometry.mine(0, 0))
    rows = Rows(ids=batch.ids_BT, labels=batch.labels_BT, documents=batch.documents_BT)

    def counted(self: HeadJob, tap: Any) -> Any:
        count[0] += 1
        return features(self, tap)

    trainer.runner(rows, todo.plan)
    trainer.shards.clear()
    dist.barrier()
    with patch.object(HeadJob, "features", counted), profile(
        activities=[ProfilerActivity.CPU], profile_memory=True
    ) as seen:  # fmt: skip
        trainer.runner(rows, todo.plan)
    trainer.shards.clear()
    trainer.losses.take()
    now = most = 0
    recorded = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in recorded if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, count[0]
