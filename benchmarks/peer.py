"""The same dense model, data and optimizer settings in transformers and here: tokens per second and peak memory.

Each side is a process of its own, told step by step what to do, so that steps take turns while memory is apart. Peak
memory is the high-water mark of resident pages less what was resident after the imports. transformers' side is its
Trainer where accelerate is installed, else a plain loop: its LlamaForCausalLM, its loss, torch's fused AdamW, clipping.

    python benchmarks/peer.py SIDE JSON     (what training.py starts)
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measure import at_least, at_most, interleave, ratios, seconds, spread, table

SIDES = ("transformers", "exitlm", "exitlm, 2 exits")
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all sides do: steps of ``count`` microbatches of ``rows`` rows of ``length`` tokens."""

    shape: Mapping[str, Any]
    length: int
    rows: int
    count: int
    dtype: str

    @property
    def tokens(self) -> int:
        """Those of a step."""
        return self.rows * self.count * self.length


# ---- the sides, each in its process


def resident(which: str) -> float:
    """VmRSS, RssAnon or VmHWM of this process in MiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(which))
    return int(line.split()[1]) / 1024


def serve(step: Callable[[], Any], before: float) -> None:
    """Do a step for each line that comes, and answer with its seconds and the peak so far."""
    for line in sys.stdin:
        if line.strip() == "end":
            break
        answer({"seconds": seconds(step), "peak": resident("VmHWM") - before})


def answer(found: dict[str, float]) -> None:
    """Send a line to the program that started this process."""
    print(json.dumps(found), flush=True)


def exitlm_side(task: Task, exits: bool) -> None:
    """Our trainer in one process."""
    from runs import CPU, exits_at, make_trainer, model_of, run_config

    from exitlm.parallel.mesh import Launch, Layout, Mesh, processes

    before = resident("VmRSS")
    model, layout = model_of(task.shape, task.length), Layout()
    depth = model.num_hidden_layers
    heads = exits_at((depth // 4, depth // 2), "norm", "shared") if exits else []
    config = run_config(layout, rows=task.rows, count=task.count, length=task.length, dtype=task.dtype)
    with processes(Launch(), CPU, 600.0):
        serve(make_trainer(config, model, heads, Mesh(layout, CPU)).step, before)


def reference_model(task: Task) -> Any:
    """transformers' Llama with random weights."""
    import transformers

    kv = task.shape["num_attention_heads"]
    config = transformers.LlamaConfig(
        **{"num_key_value_heads": kv, **task.shape}, max_position_embeddings=task.length, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def random_rows(task: Task) -> torch.Tensor:
    """Rows of tokens, one longer than what is predicted."""
    generator = torch.Generator().manual_seed(0)
    shape = (task.rows * task.count, task.length + 1)
    return torch.randint(task.shape["vocab_size"], shape, generator=generator)


def plain_side(task: Task) -> None:
    """transformers' model in a loop of our own."""
    from transformers import LlamaForCausalLM  # noqa: F401  (what an import takes counts as there before)

    before = resident("VmRSS")
    model = reference_model(task)
    wide = [p for p in model.parameters() if p.dim() >= 2]
    narrow = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
    data = random_rows(task)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for part in data.split(task.rows):
            ids, labels = part[:, :-1].contiguous(), part[:, 1:].contiguous()
            with torch.autocast("cpu", torch.bfloat16, enabled=task.dtype == "bfloat16"):
                out = model(
                    input_ids=ids, labels=labels, shift_labels=labels, num_items_in_batch=task.tokens, use_cache=False
                )
            out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    serve(step, before)


def trainer_side(task: Task) -> None:
    """transformers' Trainer; its steps wait for the lines."""
    import transformers
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401  (see above)

    before = resident("VmRSS")
    model, data = reference_model(task), random_rows(task)[:, :-1]

    class Wait(transformers.TrainerCallback):  # type: ignore[misc]
        begin = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if sys.stdin.readline().strip() in ("end", ""):
                control.should_training_stop = True
                raise KeyboardInterrupt
            self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            answer({"seconds": time.perf_counter() - self.begin, "peak": resident("VmHWM") - before})

    with tempfile.TemporaryDirectory() as home:
        options = transformers.TrainingArguments(
            output_dir=home, per_device_train_batch_size=task.rows, gradient_accumulation_steps=task.count,
            max_steps=100_000, learning_rate=3e-4, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95,
            lr_scheduler_type="cosine", max_grad_norm=1.0, bf16=task.dtype == "bfloat16", use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in data]
        trainer = transformers.Trainer(model=model, args=options, train_dataset=rows, callbacks=[Wait()])
        try:
            trainer.train()
        except KeyboardInterrupt:
            return


# ---- the comparison


class Other:
    """A side's process."""

    def __init__(self, python: str, side: str, task: Task) -> None:
        command = [python, __file__, side, json.dumps(asdict(task))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.peak = 0.0

    def step(self) -> float:
        """Seconds of a step."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the comparison ended with code {self.process.wait()}")
        found = json.loads(line)
        self.peak = found["peak"]
        return float(found["seconds"])

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin is not None
        self.process.stdin.write("end\n")
        self.process.stdin.close()
        self.process.wait(60)


def versions_of(python: str) -> str:
    """Those of the libraries that an interpreter has."""
    probe = """
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "transformers", "accelerate"):
    try: print(name, version(name))
    except PackageNotFoundError: pass
"""
    done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True)
    return ", ".join(done.stdout.splitlines())


def compare(tasks: list[Task], rounds: int, python: str) -> dict[str, Any]:
    """The table; one task after the other, sides in turn."""
    versions = versions_of(python)
    has = "accelerate" in versions
    name = "transformers' Trainer" if has else "transformers, a plain loop"
    rows, claims = [], []
    for task in tasks:
        others = {side: Other(python if side == "transformers" else sys.executable, side, task) for side in SIDES}
        try:
            found = interleave({side: other.step for side, other in others.items()}, rounds)
        finally:
            for other in others.values():
                other.end()
        base, most = found["transformers"], others["transformers"].peak
        for side, values in found.items():
            rows.append({
                "what": name if side == "transformers" else side, "dtype": task.dtype,
                "tokens/s": spread([task.tokens / s for s in values]), "speed": ratios(base, values),
                "peak memory, MiB": f"{others[side].peak:.0f}", "of transformers'": f"{others[side].peak / most:.2f}",
            })  # fmt: skip
        speed, share = ratios(base, found["exitlm"]), others["exitlm"].peak / most
        claims += [
            at_least(f"{task.dtype}: tokens/s against transformers", speed, 1.0),
            at_most(f"{task.dtype}: peak memory against transformers", share, 0.6),
        ]
    print(table(rows))
    shape = ", ".join(f"{key} {value}" for key, value in tasks[0].shape.items())
    task = tasks[0]
    return {
        "model": shape, "a step": f"{task.count} x {task.rows} x {task.length} tokens",
        "transformers' side": name + ("" if has else " (accelerate, which its Trainer needs, is not installed)"),
        "versions": versions,
        "rows": rows, "claims": claims,
    }  # fmt: skip


def main() -> None:
    """Be one side."""
    side, task = sys.argv[1], Task(**json.loads(sys.argv[2]))
    if side != "transformers":
        exitlm_side(task, side != "exitlm")
    elif importlib.util.find_spec("accelerate"):
        trainer_side(task)
    else:
        plain_side(task)


if __name__ == "__main__":
    main()
