"""Full training on a CPU: what exits cost in time and memory, pipelines with exits, and the same model elsewhere.

    python benchmarks/training.py [--section overhead pipeline filling memory peer] [--rounds 5] [--quick]

``overhead``: a step with two exits against one without, beside the share of FLOPs that the heads are. ``pipeline``: a
pipeline of four processes with and without exits, simulated, and with stages that sleep for their calibrated times.
``filling``: the use of four equal stages whose bubbles are filled, likewise. ``memory``: the peak of each rank of real
pipelines. ``peer``: tokens per second and peak memory against transformers. ``processes`` (not by default): pipelines
whose stages compute, for machines with many cores.

Every section runs in a process of its own. ``--quick`` tries the program itself on tiny models, and writes nothing
unless ``$OUT`` is set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure import at_most, interleave, ratios, save, seconds, spread, table

SHAPE: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 6, "tie_word_embeddings": True,
}  # fmt: skip
TINY: dict[str, Any] = {
    **SHAPE,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
}
SECTIONS = ("overhead", "pipeline", "filling", "memory", "peer", "processes")
EXITS = (("embed", "shared"), ("embed", "own"), ("norm", "shared"), ("norm", "own"))


def overhead(rounds: int, quick: bool) -> dict[str, Any]:
    """Step time with exits at a quarter and a half of the depth against none, in one process."""
    from calibration import calibrate
    from runs import CPU, exits_at, flops_per_token, make_trainer, model_of, run_config

    from exitlm.parallel.mesh import Launch, Layout, Mesh, processes

    length, size, count = (32, 2, 2) if quick else (512, 2, 2)
    model = model_of(TINY if quick else SHAPE, length)
    layers = (model.num_hidden_layers // 4, model.num_hidden_layers // 2)
    variants = {"no exits": []} | {f"2 exits, {k}, {o}": exits_at(layers, k, o) for k, o in EXITS}
    layout = Layout()
    config = run_config(layout, rows=size, count=count, length=length)
    with processes(Launch(), CPU, 600.0):
        mesh = Mesh(layout, CPU)
        trainers = {name: make_trainer(config, model, exits, mesh) for name, exits in variants.items()}
        _, parts = calibrate(trainers[f"2 exits, {EXITS[-1][0]}, {EXITS[-1][1]}"], rounds * 2)
        found = interleave({name: lambda t=t: seconds(t.step) for name, t in trainers.items()}, rounds)
    base, work = found["no exits"], flops_per_token(model, (), None, length)
    rows, claims = [], []
    for name, values in found.items():
        share = flops_per_token(model, variants[name], None, length) / work - 1.0
        row: dict[str, Any] = {
            "model": name, "step, ms": spread([v * 1e3 for v in values]), "against no exits": ratios(values, base),
            "by FLOPs": f"{1 + share:.3f}", "overhead over FLOP share": "-",
        }  # fmt: skip
        if share:
            over = spread([(v / b - 1.0) / share for v, b in zip(values, base, strict=True)])
            row["overhead over FLOP share"] = over
            claims.append(at_most(f"{name}: overhead over FLOP share", over, 1.1))
        rows.append(row)
    print(table(rows))
    return {
        "model": ", ".join(f"{key} {value}" for key, value in (TINY if quick else SHAPE).items()),
        "a step": f"{count} x {size} x {length} tokens",
        "exits after": list(layers),
        "one microbatch (f forward, b backward; deferred heads work in the backward), ms": "; ".join(
            f"{name} {value}" for name, value in parts.items()
        ),
        "rows": rows,
        "claims": claims,
    }


def pipeline(rounds: int, quick: bool) -> dict[str, Any]:
    """See ``pipelines.py``."""
    from pipelines import with_exits

    return with_exits(TINY if quick else SHAPE, 16 if quick else 256, (4,) if quick else (16, 32), min(rounds, 3))


def filling(rounds: int, quick: bool) -> dict[str, Any]:
    """See ``pipelines.py``."""
    from pipelines import filling as measured

    return measured(0.005 if quick else 0.1, (1, 256, 384), min(rounds, 3))


def memory(rounds: int, quick: bool) -> dict[str, Any]:
    """See ``peaks.py``."""
    from peaks import peaks

    return peaks()


def peer(rounds: int, quick: bool, python: str) -> dict[str, Any]:
    """See ``peer.py``; in bfloat16 too where the processor multiplies it natively."""
    from peer import Task, compare

    from exitlm.decode.kernels.formats import has_amx_bf16

    shape = TINY if quick else {**SHAPE, "vocab_size": 49152}
    length, size, count = (16, 2, 2) if quick else (512, 4, 2)
    dtypes = ["float32", *(["bfloat16"] if has_amx_bf16() else [])]
    tasks = [Task(shape=shape, length=length, rows=size, count=count, dtype=dtype) for dtype in dtypes]
    return compare(tasks, rounds, python)


def several(rounds: int, quick: bool) -> dict[str, Any]:
    """Pipelines whose stages compute."""
    from pipelines import computed

    world = min(4, os.cpu_count() or 2)
    if quick:
        return computed(TINY, 16, 1, 4, rounds, 2, "float32")
    return computed(SHAPE, 256, 1, 16, rounds, world, "float32")


def main() -> None:
    """Run the sections that were asked for and write ``results/training-SECTION.json`` for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS[:-1]))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter for transformers' side")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    rounds = 1 if given.quick else given.rounds
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "overhead": lambda: overhead(rounds, given.quick),
        "pipeline": lambda: pipeline(rounds, given.quick),
        "filling": lambda: filling(rounds, given.quick),
        "memory": lambda: memory(rounds, given.quick),
        "peer": lambda: peer(rounds, given.quick, given.peer_python),
        "processes": lambda: several(rounds, given.quick),
    }
    if given.child:
        found = runs[given.section[0]]()
        print(table(found["claims"]))
        Path(given.child).write_text(json.dumps(found, default=asdict))
        return
    for section in given.section:
        print(f"\n## {section}", flush=True)
        with tempfile.TemporaryDirectory() as home:
            path = Path(home) / "found.json"
            rest = ["--rounds", str(given.rounds), "--peer-python", given.peer_python, *["--quick"] * given.quick]
            command = [sys.executable, __file__, "--section", section, "--child", str(path), *rest]
            subprocess.run(command, check=True)
            found = json.loads(path.read_text())
        if not given.quick or "OUT" in os.environ:
            print(save(f"training-{section}", found))


if __name__ == "__main__":
    main()
