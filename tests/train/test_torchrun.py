"""Real programs under torchrun, with real signals: restarts by itself, stops in order, and says things once."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.ranks import forked, impatient, losses, metrics, run_file, same, steps, tensors, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STEPS = ["train.steps=200", "checkpoint.every=50", "train.validate_every=0"]
DYING = """
import os, signal, sys
from exitlm.cli import main
from exitlm.train.trainer import Trainer
original = Trainer.step
def step(self):
    if self.progress.done == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self)
Trainer.step = step
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.fixture
def file(tmp_path: Path, text: Path) -> Path:
    return run_file(tmp_path, text)


def torchrun(file: Path, *overrides: str, program: str = "", options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Two processes of ``exitlm train``; their output comes together."""
    what = [program] if program else ["-m", "exitlm"]
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options, *what]
    call += ["train", str(file), "--set", "parallel.pipeline=2", *overrides]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=180)
    return process.returncode, out


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers(process: subprocess.Popen[str]) -> Iterator[int]:
    for path in Path(f"/proc/{process.pid}/task").iterdir():
        yield from map(int, (path / "children").read_text().split())


def test_a_run_whose_process_dies_is_started_again_and_goes_on(file: Path) -> None:
    program = file.parent / "dying.py"
    program.write_text(DYING)
    code, out = ended(torchrun(file, program=str(program), options=("--max-restarts", "2")))
    assert code == 0, out
    assert out.count("error: rank 1 (pipeline 1, data 0, tensor 0) died") <= 1  # torchrun may end the other one first
    assert "going on from step" in out or steps(file.parent / "run")[0] == 0
    whole = file.parent / "whole"
    train(2, file, f"checkpoint.dir={whole}")
    assert metrics(file.parent / "run") == metrics(whole)
    assert same(tensors(file.parent / "run", 6), tensors(whole, 6))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_torchrun_saves(file: Path, number: signal.Signals) -> None:
    run = file.parent / "run"
    process = torchrun(file, *STEPS, options=("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"))
    wait_for(run / "checkpoints" / "step-00000050", process)
    process.send_signal(number)
    code, out = ended(process)
    assert code == 1  # torchrun's way to say that it was stopped
    assert out.count(f"stopped by {number.name}: step") == 1, out
    last = steps(run)[-1]
    assert f"step {last} of 200 is saved; start the same command again to go on" in out
    code, out = ended(torchrun(file, *STEPS))
    assert (code, f"going on from step {last} of 200" in out) == (0, True), out
    assert [line["step"] for line in metrics(run)] == list(range(1, 201))


def test_a_signal_to_one_process_ends_all_with_0(file: Path) -> None:
    run = file.parent / "run"
    process = torchrun(file, *STEPS)
    wait_for(run / "checkpoints" / "step-00000050", process)
    os.kill(max(workers(process)), signal.SIGUSR1)
    code, out = ended(process)
    assert code == 0, out
    assert out.count("stopped by SIGUSR1") == 1
    assert "rror" not in out


def test_a_mistake_is_told_once(file: Path) -> None:
    code, out = ended(torchrun(file, "train.stepps=3"))
    assert code == 1
    assert out.count("error: unknown key 'train.stepps' in the run's settings; did you mean 'steps'?") == 1
    assert "exitlm/" not in out  # no traceback of ours in torchrun's report
    code, out = ended(torchrun(file, "train.steps=2", "checkpoint.every=1"))
    lines = [line for line in out.splitlines() if line and not line.startswith(("training:", "W1", "[W", "*"))]
    assert code == 0
    assert [line for line in lines if "OMP_NUM_THREADS" not in line] == [
        f"{file.parent / 'run'} holds the run; 'exitlm export {file.parent / 'run'} DIR' writes the model and its exits"
    ]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_kills_at_any_instant_lose_nothing(file: Path, asynchronous: str) -> None:
    run, whole, rng = file.parent / "run", file.parent / "whole", random.Random(3)
    settings = ["train.steps=30", "checkpoint.every=3", "checkpoint.keep=2", f"checkpoint.async={asynchronous}"]
    settings += ["parallel.timeout=10"]
    started = time.monotonic()
    train(2, file, *settings, f"checkpoint.dir={whole}")
    longest, call = time.monotonic() - started, ["train", str(file), "--set", "parallel.pipeline=2", *settings]
    for _ in range(10):
        with forked(2, call, lambda _: impatient()) as children:
            time.sleep(rng.uniform(0.0, longest))
            victims = [child for child in children if rng.random() < 0.7]
            for child in victims or children[:1]:
                os.kill(child, signal.SIGKILL)
    assert [end.code for end in train(2, file, *settings)] == [0, 0]
    assert losses(run) == losses(whole)
    assert same(tensors(run, 30), tensors(whole, 30))
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
