"""Full training on a GPU: how much of its peak a model of 1.3 billion parameters with two exits uses, and what decides
it; and pipelines of real processes on the machine's CPU, which has more cores than most.

Model FLOPs utilisation counts the products of one forward and backward of layers, exits and final head, and causal
attention once; recomputing adds nothing. What ``gpu.py`` runs as a part of its section ``training``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from measure import interleave, seconds, spread
from runs import exits_at, flops_per_token, make_trainer, model_of, run_config

from exitlm.parallel.mesh import Launch, Layout, Mesh, processes

if TYPE_CHECKING:
    from gpu import Section

SHAPE: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5440, "num_hidden_layers": 24,
    "num_attention_heads": 16, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2,
    "tie_word_embeddings": True,
}  # fmt: skip
PEAK, GOAL = 989e12, 0.45
"""Dense bfloat16 FLOP/s of an H200 by its data sheet, and the share of it that is to be reached."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the rows of a step are worked off. ``chunk`` tokens of logits at a time; 0 is automatic."""

    rows: int
    recompute: str = "none"
    chunk: int = 0
    compile: bool = False

    def __str__(self) -> str:
        chunk = f"{self.chunk} tokens a chunk" if self.chunk else "chunks automatic"
        return f"{self.rows} rows a microbatch, recompute {self.recompute}, {chunk}{', compiled' * self.compile}"


WAYS = (
    Way(rows=4),
    Way(rows=8),
    Way(rows=8, chunk=2048),
    Way(rows=8, chunk=8192),
    Way(rows=16, chunk=4096),
    Way(rows=16, chunk=4096, recompute="layers"),
    Way(rows=8, chunk=4096, compile=True),
)


def full(section: Section) -> None:
    """Every way, then the pipelines."""
    best = [0.0]
    for way in WAYS:
        if way.compile and section.quick:  # it needs a C compiler, which a CPU machine may lack
            continue
        section.part(
            str(way), lambda found, way=way: best.append(measured(section, way, found)), 40 * way.compile or 12
        )
    section.row(f"the best of these, goal {GOAL}", max(best), "of the peak of an H200")
    section.part("pipelines of processes on the CPU", lambda found: pipelines(section, found), 30)


def measured(section: Section, way: Way, found: dict[str, Any]) -> float:
    """The share of the peak that steps of 16 rows reach."""
    quick = section.quick
    length, rounds, total = (16, 1, 16) if quick else (2048, 4, 16)
    model = model_of(TINY if quick else SHAPE, length)
    exits = exits_at((model.num_hidden_layers // 4, model.num_hidden_layers // 2), "embed", "shared")
    layout = Layout()
    dtype = "bfloat16" if section.device.type == "cuda" else "float32"
    config = run_config(layout, rows=way.rows, count=total // way.rows, length=length, dtype=dtype)
    config = replace(config, train=replace(config.train, recompute=way.recompute, compile=way.compile))
    with processes(Launch(), section.device, 60.0):
        trainer = make_trainer(config, model, exits, Mesh(layout, section.device))
        trainer.losses.chunk = way.chunk

        def step() -> float:
            def run() -> None:
                trainer.step()
                section.synchronize()

            return seconds(run)

        step()
        took = interleave({"step": step}, rounds)["step"]
    tokens = total * length
    flops = flops_per_token(model, exits, None, length)
    found["flops_per_token"] = flops
    found["tokens_per_second"] = spread([tokens / t for t in took])
    found["mfu"] = spread([tokens / t * flops / PEAK for t in took])
    section.row(f"1.3B with 2 exits, {way}", found["mfu"], "of the peak")
    section.row(f"1.3B with 2 exits, {way}", found["tokens_per_second"], "tokens/s")
    if section.device.type == "cuda":
        section.row(f"1.3B with 2 exits, {way}", torch.cuda.max_memory_allocated() / 2**30, "GiB at most")
    return float(found["mfu"].median)


def pipelines(section: Section, found: dict[str, Any]) -> None:
    """``training.py --section processes``, in a process that sees no GPU."""
    program = str(Path(__file__).parent / "training.py")
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "OUT": home, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, program, "--section", "processes", "--rounds", "3", *["--quick"] * section.quick]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-2000:])
        data = json.loads((Path(home) / "training-processes.json").read_text())
    found |= data
    where = f"{data['processes']} processes of {data['threads each']} threads"
    for row in data["rows"]:
        section.row(f"a pipeline of {where}, {row['stages']}", row["step, ms"], "ms/step")
