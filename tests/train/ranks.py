"""``exitlm`` in several forked processes, as torchrun would start them: how each ended and what it printed. Not a test.

A fork after torch is imported takes no time where a new process takes seconds. A ``hook`` runs first in each process,
to put a fault there.
"""

import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader

from exitlm import cli
from exitlm.parallel import roll
from exitlm.train import full, sharded
from exitlm.train.trainer import Trainer
from tests.parallel.launch import free_port

Hook = Callable[[int], None]
HUNG = 999
_NAMELESS = re.compile(r"^\[W.*The hostname of the client socket cannot be retrieved.*\n", re.MULTILINE)
"""What torch says on a machine whose name server is slow."""
RUN = """
[model]
family = "llama"
hidden_size = 16
num_hidden_layers = 4
num_attention_heads = 2
intermediate_size = 24
tie_word_embeddings = true
[exits]
layers = [1, 2]
[objective]
weight = [0.25, 0.5]
warmup_steps = 4
layer_dropout = 0.4
rotate_exits = 2
[data]
seq_len = 24
validation_sequences = 4
[train]
steps = 6
global_batch = 8
microbatch = 2
lr = 1e-2
warmup = 2
validate_every = 3
[checkpoint]
every = 2
keep = 9
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus a signal's number, or ``HUNG``), and what it printed."""

    code: int
    out: str
    err: str


def run_file(directory: Path, text: Path) -> Path:
    """A small run over ``text`` in ``directory / "run"``."""
    path = directory / "run.toml"
    added = f'[data]\nfiles = ["{text}"]', f'[checkpoint]\ndir = "{directory / "run"}"'
    path.write_text(RUN.replace("[data]", added[0]).replace("[checkpoint]", added[1]))
    return path


def train(world: int, file: Path, *overrides: str, **options: Any) -> list[Ended]:
    """``exitlm train FILE --set ...`` in ``world`` processes: pipeline ranks, which take the least time here."""
    return ranks(world, ["train", str(file), "--set", f"parallel.pipeline={world}", *overrides], **options)


def ranks(
    world: int,
    arguments: Sequence[str],
    *,
    hook: Hook | None = None,
    each: Sequence[Sequence[str]] = (),
    port: int = 0,
    timeout: float = 60.0,
) -> list[Ended]:
    """Run a command line in ``world`` processes, with the arguments of ``each`` rank added. One that has not ended
    after ``timeout`` seconds is killed, and its code ``HUNG``."""
    with tempfile.TemporaryDirectory() as home:
        children = {child: rank for rank, child in enumerate(_fork(world, arguments, Path(home), hook, each, port))}
        codes, deadline = {}, time.monotonic() + timeout
        while children and time.monotonic() < deadline:
            for child in list(children):
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        for child, rank in children.items():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            codes[rank] = HUNG
        printed = [[(Path(home) / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(world)]
    return [Ended(codes[rank], out, _NAMELESS.sub("", err)) for rank, (out, err) in enumerate(printed)]


@contextmanager
def forked(world: int, arguments: Sequence[str], hook: Hook) -> Iterator[list[int]]:
    """The process ids of :func:`ranks`; at the end of the block it waits for them."""
    with tempfile.TemporaryDirectory() as home:
        children = _fork(world, arguments, Path(home), hook)
        yield children
        for child in children:
            os.waitpid(child, 0)


def _fork(
    world: int,
    arguments: Sequence[str],
    home: Path,
    hook: Hook | None = None,
    each: Sequence[Sequence[str]] = (),
    port: int = 0,
) -> list[int]:
    port = port or free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _run(rank, world, port, home, [*arguments, *(each[rank] if each else ())], hook)
        children.append(child)
    return children


def _run(rank: int, world: int, port: int, home: Path, arguments: list[str], hook: Hook | None) -> None:
    code: Any = 1
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(home / f"{rank}.{name}", os.O_CREAT | os.O_WRONLY), descriptor)
        # the streams of pytest would keep what is written
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        torch.set_num_threads(1)
        if hook is not None:
            hook(rank)
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


# ---- faults


def before_step(step: int, action: Callable[[Trainer], None]) -> None:
    """``action(trainer)`` just before a step (from 0)."""
    original = Trainer.step

    def patched(self: Trainer) -> Any:
        if self.progress.done == step:
            action(self)
        return original(self)

    Trainer.step = patched


def signalled(number: int, step: int, only: int | None = None, times: int = 1) -> Hook:
    """A signal to every process, or to ``only`` one, before a step."""

    def hook(rank: int) -> None:
        if only in (None, rank):
            before_step(step, lambda _: [signal.raise_signal(number) for _ in range(times)])

    return hook


def impatient() -> None:
    """Wait less long for the dead."""
    roll.ALIVE, roll.SIGNED, roll.GRACE, roll.WATCH = 1.5, 1.5, 1.5, 0.1
    full.REFUSAL_SECONDS = 3.0


# ---- what a run left


def metrics(run: Path, *, timed: bool = False) -> list[dict[str, Any]]:
    """The lines of a run; ``timed``: with what differs from one life to the next."""
    varies = ("tokens_per_second", "tflops", "memory_gib", "mfu")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if timed or not k.startswith(varies)} for line in lines]


def losses(run: Path) -> list[float]:
    """All losses of a run, one line after the other."""
    return [value for line in metrics(run) for name, value in line.items() if "loss" in name]


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    with suppress(FileNotFoundError):
        return sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*"))
    return []


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    place = run / "checkpoints" / f"step-{step:08d}"
    described: Any = FileSystemReader(place).read_metadata().state_dict_metadata
    found = {name: torch.empty(d.size, dtype=d.properties.dtype) for name, d in described.items()}
    sharded.load(place, found, alone=True)
    return found


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether two states are the same bits."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
