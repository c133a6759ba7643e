"""Full training for the benchmark programs: trainers on random text, without files and without a run's directory.

Shapes are keys of Hugging Face configurations. Weights are random, as speed and memory do not depend on them.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from exitlm.model.config import ModelConfig
from exitlm.model.exits import ExitConfig
from exitlm.parallel.mesh import Launch, Layout, Mesh, processes
from exitlm.parallel.pipeline.split import Split, make_split, stage_costs
from exitlm.train.data import Blocks
from exitlm.train.plan import geometry
from exitlm.train.run import TRAINING, RunConfig
from exitlm.train.stream import Stream
from exitlm.train.trainer import Job, Trainer

CPU = torch.device("cpu")
Shape = Mapping[str, Any]


def model_of(shape: Shape, length: int) -> ModelConfig:
    """A Llama of this shape."""
    heads = shape["num_attention_heads"]
    return ModelConfig.from_hf({
        "model_type": "llama", "head_dim": shape["hidden_size"] // heads, "num_key_value_heads": heads,
        "max_position_embeddings": length, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "initializer_range": 0.02,
        **shape,
    })  # fmt: skip


def exits_at(layers: Sequence[int], kind: str, output: str) -> list[ExitConfig]:
    """Exits after these layers."""
    return [ExitConfig(layer=layer, kind=kind, output=output) for layer in layers]  # type: ignore[arg-type]


def run_config(
    layout: Layout, *, rows: int, count: int, length: int, dtype: str = "float32", **objective: Any
) -> RunConfig:
    """Settings of a run whose steps have ``count`` microbatches of ``rows`` rows of ``length`` tokens."""
    t = replace(
        TRAINING.train, steps=10_000, global_batch=rows * count * layout.data, microbatch=rows, dtype=dtype, warmup=0
    )
    p = replace(
        TRAINING.parallel, pipeline=layout.pipeline, data=layout.data, tensor=layout.tensor, schedule=layout.schedule
    )
    return replace(
        TRAINING,
        train=t,
        parallel=p,
        data=replace(TRAINING.data, files=("random",), seq_len=length),
        objective=replace(TRAINING.objective, **objective),
    )


def random_text(rows: int, length: int, vocab_size: int, seed: int = 0) -> Blocks:
    """Rows of random tokens, each one piece of text."""
    ids = np.random.Generator(np.random.PCG64(seed)).integers(0, vocab_size, rows * (length + 1)).astype(np.int64)
    starts = np.arange(rows) * (length + 1)
    segments = np.stack([starts * 0, starts, starts + length + 1, starts * 0], 1)
    return Blocks([ids], segments, np.arange(rows + 1), "random")


def make_trainer(
    config: RunConfig,
    model: ModelConfig,
    exits: Sequence[ExitConfig],
    mesh: Mesh,
    *,
    layers_per_stage: Sequence[int] | None = None,
    place: Any = "next",
) -> Trainer:
    """A trainer with random weights; the process group must be there."""
    layout, length = mesh.layout, config.data.seq_len
    split = make_split(
        model, exits, layout.stages, place=place, layers_per_stage=layers_per_stage or "balanced", seq_len=length
    )
    compute = getattr(torch, config.train.dtype)
    job = Job(
        config=config,
        model=model,
        exits=exits,
        split=split,
        geometry=geometry(config, layout, split, frozen=False, teacher=False),
        compute=compute,
        master=torch.promote_types(compute, torch.float32),
    )
    text = random_text(job.geometry.rows, length, model.vocab_size)
    trainer = Trainer(job, mesh, Stream([text], seq_len=length, seed=0), None)
    fill(trainer)
    return trainer


@torch.no_grad()
def fill(trainer: Trainer) -> None:
    """Random weights, made where they are."""
    torch.manual_seed(0)
    for name, local in zip(trainer.shards.names, trainer.shards.local, strict=True):
        if "norm" in name:
            local.fill_(1.0)
        else:
            local.normal_(0.0, 0.02)


def flops_per_token(model: ModelConfig, exits: Sequence[ExitConfig], split: Split | None, length: int) -> int:
    """Of a forward and backward, nothing counted twice (``exitlm.parallel.pipeline.split``)."""
    costs = stage_costs(model, exits, split or make_split(model, exits, 1), length)
    return sum(cost.forward_flops + cost.backward_flops for cost in costs)


# ---- several processes


def over_processes(world: int, work: Callable[..., Any], *args: Any, threads: int = 1) -> list[Any]:
    """What ``work(*args)`` returns in each of ``world`` forked processes of one group, by rank. The caller must not
    have computed anything with several threads, nor on a GPU: neither survives a fork."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = multiprocessing.get_context("fork").SimpleQueue()
    start_processes(_one_of_them, (world, port, threads, queue, work, args), nprocs=world, start_method="fork")
    found = dict(queue.get() for _ in range(world))
    return [found[rank] for rank in range(world)]


def _one_of_them(
    rank: int, world: int, port: int, threads: int, queue: Any, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(threads)
    with processes(Launch(rank=rank, local_rank=rank, world=world), CPU, 120.0):
        queue.put((rank, work(*args)))
        dist.barrier()
