"""Models on disk for stages that are processes of their own, and what is known of these. Not a test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import exitlm
from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.remote.engine import PipelinedEngine
from exitlm.decode.remote.launch import Children
from exitlm.model.exits import ExitConfig
from exitlm.weights.export import export
from tests.decode.arithmetic import STORED
from tests.decode.models import attach, fade, fit_lenses

PATIENCE = 60.0  # seconds after which a test is sure that something does not come any more
LENSES = (ExitConfig(layer=1, gate=True), ExitConfig(layer=3, gate=True))
KINDS = (
    ExitConfig(layer=1, kind="lens", gate=True), ExitConfig(layer=2, kind="block", candidates=40),
    ExitConfig(layer=3, kind="mlp", output="low_rank", rank=5),
)  # fmt: skip


def write_model(
    directory: Path, family: str = "llama", seed: int = 0, exits: Sequence[ExitConfig] = KINDS, **over: object
) -> Path:
    """A random float32 model of four layers, of a size that the native kernels take, whose exits are often right."""
    model = fade(STORED.tiny_model(family, seed, **over), 3, 0.5)
    export(fit_lenses(attach(model, exits, seed), seed).float(), directory)
    return directory


def engine_of(model: exitlm.LLM) -> PipelinedEngine:
    """The engine, which has other processes."""
    assert isinstance(model.engine, PipelinedEngine)
    return model.engine


def children_of(engine: PipelinedEngine) -> dict[int, int]:
    """The processes of stages that were started here, by their places."""
    launcher = engine.pipeline._launcher
    assert isinstance(launcher, Children)
    return {number: process.pid for number, process in launcher.processes.items()}


def kill(engine: PipelinedEngine, number: int) -> None:
    """End a stage's process, and wait until it is gone with all its threads."""
    launcher = engine.pipeline._launcher
    assert isinstance(launcher, Children)
    launcher.processes[number].kill()
    launcher.processes[number].wait()


def is_gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith(("Z", "X"))
    except (FileNotFoundError, ProcessLookupError):
        return True


def kill_process(pid: int) -> None:
    """End any process at once."""
    os.kill(pid, signal.SIGKILL)


def children_of_process(pid: int) -> list[int]:
    """The processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def wait_for(true: Callable[[], object], what: str) -> None:
    """Wait until something is true, and fail where it does not become so."""
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until, f"still not after {PATIENCE:g} seconds: {what}"
        time.sleep(0.02)


def exitlm_process(*arguments: object) -> subprocess.Popen[str]:
    """A command line in a process of its own."""
    command = [sys.executable, "-m", "exitlm", *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def texts(model: exitlm.LLM, some: Sequence[tuple[list[int], GenerationConfig]]) -> list[list[int]]:
    """The tokens of each."""
    found: list[Generation] = model.engine.generate_all(some)
    assert not any(one.error for one in found), [one.error for one in found]
    return [one.token_ids for one in found]
