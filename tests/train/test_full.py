"""Long runs go on bit-identically after kills and signals, and in any layout of processes with the same losses."""

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import exitlm
from exitlm import cli
from exitlm.train import full, sharded
from exitlm.train.trainer import Trainer
from tests.checkpoints import write_checkpoint
from tests.train.ranks import before_step, losses, metrics, run_file, same, signalled, steps, tensors, train

IDS = [[5, 17, 3, 88, 41, 9, 60, 2, 2, 71, 30, 11]]
DATA = ["parallel.pipeline=1", "parallel.data=2"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "data": (2, DATA),
    "replicas, saved at once": (2, [*DATA, "parallel.shard=false", "checkpoint.async=false"]),
    "tensor": (2, ["parallel.pipeline=1", "parallel.tensor=2"]),
    "pipeline": (2, []),
    "zbv": (2, ["parallel.schedule=zbv"]),
}


@pytest.fixture
def file(tmp_path: Path, text: Path) -> Path:
    return run_file(tmp_path, text)


def killed(step: int) -> Any:
    return lambda rank: before_step(step, lambda _: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("layout", ["one process", "data", "zbv"])
def test_a_killed_run_goes_on_bit_identically(file: Path, layout: str) -> None:
    world, overrides = LAYOUTS[layout]
    run = file.parent / "run"
    whole = file.parent / "whole"
    assert [end.code for end in train(world, file, *overrides, f"checkpoint.dir={whole}")] == [0] * world
    assert [end.code for end in train(world, file, *overrides, hook=killed(5))] == [-9] * world
    ends = train(world, file, *overrides)
    assert [end.code for end in ends] == [0] * world
    assert re.match(r"going on from step [24] of 6", ends[0].out)  # 4 may not be whole yet
    assert same(tensors(run, 6), tensors(whole, 6))
    assert metrics(run) == metrics(whole)
    assert steps(run) == [0, 2, 4, 6]


def stopped_and_noted(home: Path, step: int) -> Any:
    """SIGTERM before a step; every saved state is written down, too, whole and by torch alone."""

    def hook(rank: int) -> None:
        signalled(signal.SIGTERM, step)(rank)
        original = Trainer.state

        def state(self: Trainer) -> dict[str, torch.Tensor]:
            found, done = original(self), self.progress.done
            whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}
            torch.save(whole, home / f"{done}.{rank}.pt")
            if self.mesh.layout.world == 1:
                with torch.no_grad():
                    torch.save(self.stages[0].model.logits(IDS), home / f"{done}.logits.pt")
            return found

        Trainer.state = state

    return hook


@pytest.mark.parametrize(
    ("overrides", "layouts", "tolerance"),
    [
        (["train.dtype=float64", "objective.layer_dropout=0"], list(LAYOUTS), 1e-12),
        (["objective.layer_dropout=0"], ["data", "zbv"], 1e-6),
        (["train.dtype=float64"], ["one process", "pipeline"], 1e-12),
    ],
)
def test_another_layout_goes_on_with_the_same_losses_and_exports_the_same(
    file: Path, overrides: list[str], layouts: list[str], tolerance: float, capsys: pytest.CaptureFixture[str]
) -> None:
    home, run, whole = file.parent, file.parent / "run", file.parent / "whole"
    last = 2 * len(layouts) + 1
    shared = [*overrides, f"train.steps={last}", "train.validate_every=2", "exits.kind=mlp,norm", "exits.output=own"]
    shared += ["train.eps=1e-4"]  # at 1e-8 a gradient that is zero but for rounding would make a step of its own
    assert train(1, file, *shared, f"checkpoint.dir={whole}")[0].code == 0
    for segment, layout in enumerate(layouts):
        world, over = LAYOUTS[layout]
        ends = train(world, file, *shared, *over, hook=stopped_and_noted(home, 2 * segment + 1))
        assert [end.code for end in ends] == [0] * world, ends
    assert train(1, file, *shared)[0].code == 0
    assert losses(run) == pytest.approx(losses(whole), rel=tolerance)
    one, two = tensors(run, last), tensors(whole, last)
    assert all(torch.allclose(one[name], two[name], rtol=1e4 * tolerance, atol=10 * tolerance) for name in two)
    for step in range(2, last, 2):
        noted = {name: tensor for path in home.glob(f"{step}.?.pt") for name, tensor in torch.load(path).items()}
        assert same(tensors(run, step), noted)
        out = home / f"exported-{step}"
        assert cli.main(["export", str(run / "checkpoints" / f"step-{step:08d}"), str(out)]) == 0
        written = {**load_file(out / "model.safetensors"), **load_file(out / "exits.safetensors")}
        assert same(written, {k.removeprefix("model."): v for k, v in noted.items() if k.startswith("model.")})
        if (home / f"{step}.logits.pt").exists():
            assert torch.equal(exitlm.load(out).model.logits(IDS), torch.load(home / f"{step}.logits.pt"))
            assert exitlm.load(out).generate("Line", max_new_tokens=4, mode="threshold", threshold=0.0).exit_layers
    assert capsys.readouterr().err == ""


def test_a_signal_saves_and_the_same_command_goes_on(file: Path) -> None:
    """Whoever gets it, and however often, all processes save the same step and end with 0."""
    for step, (number, only, times) in enumerate(
        [(signal.SIGTERM, None, 1), (signal.SIGUSR1, 1, 1), (signal.SIGTERM, 0, 3)]
    ):
        ends = train(2, file, "checkpoint.every=0", hook=signalled(number, step, only, times))
        assert [(end.code, end.out) for end in ends[1:]] == [(0, "")]
        name, done = signal.Signals(number).name, step + 1
        said = f"stopped by {name}: step {done} of 6 is saved; start the same command again to go on"
        assert (ends[0].code, ends[0].out.splitlines()[-1]) == (0, said)
    assert steps(file.parent / "run") == [0, 1, 2, 3]
    ends = train(2, file)
    assert "going on from step 3 of 6" in ends[0].out
    assert [line["step"] for line in metrics(file.parent / "run")] == list(range(1, 7))


def test_a_signal_before_the_first_step_and_one_in_a_save(file: Path) -> None:
    def while_starting(rank: int) -> None:
        original = full.rows_of_files
        full.rows_of_files = lambda *args: (signal.raise_signal(signal.SIGTERM), original(*args))[1]

    def while_saving(rank: int) -> None:
        original = sharded.Writer.save

        def save(self: Any, *arguments: Any, **options: Any) -> None:
            signal.raise_signal(signal.SIGUSR1)
            original(self, *arguments, **options)
            signal.raise_signal(signal.SIGUSR1)

        sharded.Writer.save = save

    (end,) = train(1, file, hook=while_starting)
    assert end.code == 0
    assert "stopped by SIGTERM: step 0 of 6 is saved" in end.out
    (end,) = train(1, file, hook=while_saving)
    assert end.code == 0
    assert "stopped by SIGUSR1: step 3 of 6 is saved" in end.out
    assert steps(file.parent / "run") == [0, 2, 3]


def test_a_finished_run_says_so_and_changes_nothing(file: Path) -> None:
    run = file.parent / "run"
    first = train(2, file, "train.steps=2", "train.warmup=5")
    assert [end.err.count("warning: train.warmup is cut to the 2 steps of the run") for end in first] == [1, 0]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    ends = train(2, file, "train.steps=2", "train.warmup=5")
    assert [end.code for end in ends] == [0, 0]
    assert ends[0].out == f"{run} is a finished run already; nothing to do\n"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_one_process_writes_what_is_worth_watching(file: Path) -> None:
    run = file.parent / "run"
    overrides = ["logging.tensorboard=true", "logging.every=2"]
    ends = train(2, file, *overrides, hook=signalled(signal.SIGTERM, 3))
    assert ends[0].err.splitlines()[-1].startswith("training: 1/6 loss")
    lines = metrics(run, timed=True)
    assert [line["step"] for line in lines] == [2, 3, 4]
    assert {"loss", "loss/final", "accuracy/final", "confidence/final", "weight/final", "weight/1", "grad_norm", "lr",
            "tokens", "tokens_per_second", "tflops", "bubble", "memory_gib/0", "memory_gib/1", "skipped"} <= {
        name for line in lines for name in line
    }  # fmt: skip
    assert {"validation/loss/1", "validation/loss/2", "validation/loss/final"} <= set(lines[1])
    assert 0 < lines[0]["bubble"] < 1
    (run / "metrics.jsonl").open("a").write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # of a step that is not saved
    assert train(2, file, *overrides)[0].code == 0
    assert [line["step"] for line in metrics(run)] == [2, 3, 4, 6]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/final")] == [2, 3, 4, 6]


def test_hosted_trackers_and_the_share_of_a_known_peak(file: Path, tmp_path: Path) -> None:
    """Stand-ins for the hosts' packages, which have the same calls."""
    for name in ("wandb", "trackio"):
        (tmp_path / f"{name}.py").write_text(
            "import json\n"
            "class Run:\n"
            "    def log(self, values, step):\n"
            f"        open({str(tmp_path / name)!r}, 'a').write(json.dumps([step, sorted(values)]) + '\\n')\n"
            "    def finish(self):\n"
            f"        open({str(tmp_path / name)!r}, 'a').write('\"finished\"\\n')\n"
            "def init(project, config):\n"
            "    assert project == 'mine' and config['train.steps'] == 4\n"
            "    return Run()\n"
        )

    def hook(rank: int) -> None:
        sys.path.insert(0, str(tmp_path))
        full.peak_flops = lambda device: 1e12

    ends = train(2, file, "logging.wandb=mine", "logging.trackio=mine", "train.steps=4", "logging.every=2", hook=hook)
    assert [end.code for end in ends] == [0, 0], ends
    lines = metrics(file.parent / "run", timed=True)
    assert all(line["mfu"] == pytest.approx(line["tflops"]) for line in lines)
    for name in ("wandb", "trackio"):
        *sent, last = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [step for step, _ in sent] == [line["step"] for line in lines]
        assert {"loss/final", "grad_norm", "mfu"} <= set(sent[0][1])
        assert last == "finished"


def test_a_frozen_run_leaves_the_directory_of_another_model_alone(file: Path, base: Path) -> None:
    other = write_checkpoint(file.parent / "other", seed=1)
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    overrides = [f"model.base={base}", "train.parameters=exits", "exits.layers=2,3", f"checkpoint.dir={other}"]
    (end,) = train(1, file, *overrides)
    assert end.code == 2
    assert "holds a model (config.json) that is not the base of these exits" in end.err
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before


def test_the_adapter_of_a_frozen_model_over_two_processes(file: Path, base: Path) -> None:
    """Also where the run was killed between its last checkpoint and its adapter."""
    run = file.parent / "run"
    overrides = [f"model.base={base}", "train.parameters=exits", "exits.layers=2,3"]
    overrides += ["objective.rotate_exits=0", "train.validate_every=0"]
    ends = train(2, file, *overrides)
    assert [end.code for end in ends] == [0, 0], ends
    written = (run / "exits.safetensors").read_bytes()
    assert json.loads((run / "exits.json").read_text())["training"]["steps"] == 6
    assert "validation/loss/3" in metrics(run)[-1]
    (run / "exits.json").unlink()
    (run / "exits.safetensors").unlink()
    ends = train(2, file, *overrides)
    assert [end.code for end in ends] == [0, 0], ends
    assert (run / "exits.safetensors").read_bytes() == written
    assert "nothing to do" in train(2, file, *overrides)[0].out
