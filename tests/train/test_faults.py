"""What may go wrong in a run over several processes: each ends in one sentence, none hangs, no checkpoint is lost."""

import errno
import hashlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exitlm.errors import UserError
from exitlm.parallel.shards import Shards
from exitlm.train import checkpoint, tune
from exitlm.train.metrics import JsonLines
from exitlm.train.sharded import Writer
from exitlm.train.trainer import Trainer
from tests.train.ranks import (
    HUNG,
    Ended,
    before_step,
    impatient,
    metrics,
    ranks,
    run_file,
    signalled,
    steps,
    train,
)


@pytest.fixture
def file(tmp_path: Path, text: Path) -> Path:
    return run_file(tmp_path, text)


def quiet(rank: int) -> None:
    impatient()


def told_once(ends: list[Ended], *words: str) -> None:
    """All ended with exit code 2, and one of them with a sentence."""
    said = [line for end in ends for line in end.err.splitlines() if not line.startswith("training:")]
    assert [end.code for end in ends] == [2] * len(ends), ends
    assert len(said) == 1, said
    assert said[0].startswith("error: ")
    assert all(word in said[0] for word in words), said


# ---- gradients that can't be used


def spoiled(factor: float, first: int, last: int) -> Callable[[int], None]:
    """The gradient of the last rank is multiplied by ``factor`` in some steps; every step prints whether it changed
    parameters and moments."""

    def hook(rank: int) -> None:
        original, collect = Trainer.step, Shards.collect
        now = [0]

        def step(self: Trainer) -> Any:
            now[0] = self.progress.done
            before = digest(self)
            report = original(self)
            print(f"step {now[0]}: {'changed' if digest(self) != before else 'as it was'}")
            return report

        def spoil(self: Shards, *arguments: Any) -> None:
            collect(self, *arguments)
            if rank == 1 and first <= now[0] <= last:
                for local in self.local:
                    assert local.grad is not None
                    local.grad *= factor

        Trainer.step, Shards.collect = step, spoil

    return hook


def digest(trainer: Trainer) -> str:
    state = {
        name: tensor.to_local() if hasattr(tensor, "to_local") else tensor for name, tensor in trainer.state().items()
    }
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()


REPLICAS = ["parallel.pipeline=1", "parallel.data=2", "parallel.shard=false"]


@pytest.mark.parametrize(("factor", "overrides"), [(float("nan"), []), (1e3, ["train.spike=10", *REPLICAS])])
def test_an_unusable_gradient_is_skipped_by_all(file: Path, factor: float, overrides: list[str]) -> None:
    ends = train(2, file, "train.patience=3", *overrides, hook=spoiled(factor, 2, 3))
    assert [end.code for end in ends] == [0, 0], ends
    for end in ends:
        lines = [line.split(": ")[1] for line in end.out.splitlines() if line.startswith("step ")]
        assert lines == ["changed"] * 2 + ["as it was"] * 2 + ["changed"] * 2
    assert "warning: step 3: the gradient's norm is" in ends[0].err
    assert "warning" not in ends[1].err
    assert [line["skipped"] for line in metrics(file.parent / "run")] == [0, 0, 1, 2, 2, 2]


def test_a_run_stops_after_too_many_skipped_steps_in_a_row(file: Path) -> None:
    run = file.parent / "run"
    ends = train(2, file, "train.patience=3", hook=spoiled(float("inf"), 2, 99))
    for end in ends:
        assert end.out.count("as it was") == 3
    warned = "warning: step 3: the gradient's norm is nan, the step is skipped\n"
    shown = [Ended(end.code, "", end.err.replace(warned, "")) for end in ends]
    told_once(shown, "3 steps in a row, up to step 5,", "the checkpoints in", "are intact", "train.lr")
    assert steps(run) == [0, 2]  # and not 4, with what may have spoiled the gradients in its parameters
    assert train(2, file)[0].code == 0  # what spoiled them is gone


def test_what_is_saved_among_skipped_steps_pushes_out_nothing(file: Path) -> None:
    """Only what a signal asks for, and the last step."""

    def stopped(rank: int) -> None:
        spoiled(float("nan"), 3, 99)(rank)
        before_step(5, lambda _: os.kill(os.getpid(), signal.SIGTERM))

    run, options = file.parent / "run", ["checkpoint.every=1", "checkpoint.keep=2", "train.steps=8"]
    ends = train(2, file, *options, hook=stopped)
    assert [end.code for end in ends] == [0, 0]
    assert "stopped by SIGTERM: step 6 of 8 is saved; start the same command again to go on" in ends[0].out
    assert steps(run) == [2, 3, 6]
    ends = train(2, file, *options, "train.patience=9", hook=spoiled(float("nan"), 3, 99))
    assert [end.code for end in ends] == [0, 0]
    assert "warning: 5 of 8 steps were skipped" in ends[0].err
    assert [line["grad_norm"] for line in metrics(run)][3:] == [None] * 5
    assert steps(run) == [3, 6, 8]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parameters_that_are_no_numbers_are_not_saved(file: Path, dtype: str) -> None:
    """Neither when they are due, nor at the end, nor while a loss scale falls."""

    def hook(rank: int) -> None:
        original = Trainer.step

        def step(self: Trainer) -> Any:
            report = original(self)
            if rank == 1 and self.progress.done == 5:
                self.shards.local[0].data.fill_(float("nan"))
            return report

        Trainer.step = step

    options = ["checkpoint.every=1", "checkpoint.keep=1", "checkpoint.async=false", "train.steps=8"]
    ends = train(2, file, *options, f"train.dtype={dtype}", hook=hook)
    said = [line for end in ends for line in end.err.splitlines() if line.startswith("error")]
    assert [end.code for end in ends] == [2, 2]
    assert len(said) == 1
    assert "the parameters hold NaN or infinity, and are not saved; the checkpoints in" in said[0]
    assert "warning: step 5 is not saved: its parameters hold NaN or infinity" in ends[0].err
    assert steps(file.parent / "run") == [4]


# ---- processes that die, sleep or fail


def at_step_3(number: int, act: Callable[[], Any]) -> Callable[[int], None]:
    """Rank ``number`` does something before that step."""

    def hook(rank: int) -> None:
        impatient()
        if rank == number:
            before_step(3, lambda _: act())

    return hook


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_dies_is_named(file: Path) -> None:
    ends = train(3, file, hook=at_step_3(1, die))
    assert ends.pop(1).code == -signal.SIGKILL
    told_once(ends, "rank 1 (pipeline 1, data 0, tensor 0) died or can't be reached; the last checkpoint is intact")
    assert train(1, file)[0].code == 0


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named_at_the_timeout(file: Path) -> None:
    started = time.monotonic()
    ends = train(3, file, "parallel.timeout=8", "checkpoint.async=false", hook=at_step_3(2, lambda: time.sleep(60)))
    told_once(ends, "rank 2 (pipeline 2, data 0, tensor 0) did not answer within 8 seconds (parallel.timeout);")
    assert time.monotonic() - started < 30
    assert 2 in steps(file.parent / "run")


def test_without_rank_0_the_others_end_too(file: Path) -> None:
    ends = train(2, file, hook=at_step_3(0, die))
    assert (ends[0].code, ends[1].code) == (-signal.SIGKILL, 2)
    assert "error: rank 0 (pipeline 0, data 0, tensor 0) died" in ends[1].err


def test_a_defect_keeps_its_traceback_and_is_told_once(file: Path) -> None:
    def hook(rank: int) -> None:
        def fail(_: Trainer) -> None:
            raise ZeroDivisionError("a defect")

        before_step(3, fail)

    ends = train(2, file, hook=hook)
    assert sorted(end.code for end in ends) == [1, 2]
    assert sum(end.err.count("ZeroDivisionError: a defect") for end in ends) == 1


# ---- data and disks


def test_data_that_changes_in_mid_run(tmp_path: Path, text: Path, cache: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text(text.read_text())
    file = run_file(tmp_path, mine)

    def cut(_: Trainer) -> None:
        for shard in cache.glob("tokens/*/tokens.bin"):
            os.truncate(shard, 100)

    assert train(1, file, hook=lambda rank: before_step(3, lambda _: mine.unlink()))[0].code == 0
    mine.write_text(text.read_text())
    other = [f"checkpoint.dir={tmp_path / 'other'}", "checkpoint.async=false"]
    ends = train(2, file, *other, hook=lambda rank: before_step(3, cut))
    told_once(ends, "the token cache", "changed while the run was reading it; start again")
    assert 2 in steps(tmp_path / "other")


@pytest.mark.parametrize(("rank", "asynchronous"), [(1, "true"), (0, "false")])
def test_a_full_disk_of_one_rank_costs_one_checkpoint(file: Path, asynchronous: str, rank: int) -> None:
    """The disk of one process is full from step 1 to 3: files end after 5 kB, a limit of the operating system."""
    run = file.parent / "run"

    def limited(size: int) -> Callable[[Trainer], None]:
        return lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def hook(mine: int) -> None:
        if mine == rank:
            before_step(1, limited(5000))
            before_step(3, limited(resource.RLIM_INFINITY))

    ends = train(2, file, f"checkpoint.async={asynchronous}", hook=hook)
    assert [end.code for end in ends] == [0, 0], ends
    warned = [line for line in ends[0].err.splitlines() if "was not saved" in line]
    assert len(warned) == 1
    assert "step-00000002 was not saved (File too large); the run goes on" in warned[0]
    assert "warning" not in ends[1].err
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []
    assert steps(run) == [0, 4, 6]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_cannot_save_its_first_checkpoint_ends_early(file: Path, world: int, asynchronous: str) -> None:
    run = file.parent / "run"

    def hook(rank: int) -> None:
        save = Writer.save

        def limited(*args: Any, **options: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
            save(*args, **options)

        if rank == world - 1:
            Writer.save = limited

    ends = train(world, file, f"checkpoint.async={asynchronous}", "train.steps=1000000", hook=hook)
    told_once(ends, "step-00000000 could not be saved (File too large), and the run has no other checkpoint")
    assert steps(run) == []
    assert [path.name for path in (run / "checkpoints").iterdir()] == []
    ends = train(world, file)
    assert [end.code for end in ends] == [0] * world, ends


def test_a_disk_that_stays_full(file: Path) -> None:
    """Neither metrics nor checkpoints can be written: the run is told so at its end, and is not finished."""
    run = file.parent / "run"
    train(1, file, hook=signalled(signal.SIGTERM, 1))

    def hook(rank: int) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        JsonLines.log = full
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))

    ends = train(2, file, hook=hook)
    assert [end.code for end in ends] == [2, 2]
    said = ends[0].err + ends[1].err
    assert said.count("warning: metrics can't be written (No space left on device); the run goes on without") == 1
    assert said.count("error: the last step could not be saved; put that right and start the same command again") == 1
    assert "to go on from step 2\n" in said
    assert steps(run) == [0, 2]
    assert train(2, file)[0].code == 0
    assert steps(run) == [0, 2, 4, 6]


# ---- what is refused at the start, by any number of processes in one sentence


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.dat=3"], ["unknown key 'parallel.dat'", "did you mean 'data'"]),
        (["parallel.pipeline=2"], ["= 2, but there are 3 processes; start 2 (torchrun --nproc-per-node 2"]),
        (["data.files=nowhere.txt"], ["the data file nowhere.txt does not exist"]),
        (["data.files=empty.txt"], ["empty.txt is empty: it holds no text"]),
        (["data.tokenizer=bytes", "model.vocab_size=100"], ["vocab_size is 100, but the tokenizer has 257 tokens"]),
        (["checkpoint.dir=empty.txt/run"], ["the run cannot write to empty.txt/run: Not a directory"]),
        (["checkpoint.dir=/proc/run"], ["the run cannot write to /proc/run"]),
    ],
)
def test_what_all_find_is_told_once(
    file: Path, overrides: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    Path("empty.txt").touch()
    ends = train(3, file, *overrides, hook=quiet)
    told_once(ends, *words)
    assert sorted(os.listdir()) == ["empty.txt", "run.toml"]


@pytest.mark.parametrize(
    ("each", "words"),
    [
        ([[], ["train.lr=0.5"], []], ["rank 1 was started with other settings than rank 0 (train.lr is 0.5 there and"]),
        ([[], [], ["train.lr=-1"]], ["train.lr is -1.0, but must be"]),
        ([["exits.layers=[2, 9]"], [], []], ["exit layer 9 does not exist"]),
    ],
)
def test_what_one_of_them_finds_ends_all(file: Path, each: list[list[str]], words: list[str]) -> None:
    told_once(train(3, file, each=each, hook=quiet), *words)
    assert not (file.parent / "run").exists()


def test_machines_with_other_files_of_the_same_name(file: Path, tmp_path: Path, text: Path) -> None:
    for number, content in enumerate([text.read_text(), text.read_text()[1:]]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "text.txt").write_text(content)

    def hook(rank: int) -> None:
        quiet(rank)
        os.chdir(tmp_path / str(rank // 2))

    ends = train(3, file, "data.files=text.txt", hook=hook)
    told_once(ends, "rank 2 reads another data than rank 0 under the same name; give all machines the same files")
    assert not (tmp_path / "run").exists()


def test_a_directory_that_belongs_to_another(file: Path, text: Path, base: Path) -> None:
    run = file.parent / "run"
    with checkpoint.exclusive(run):
        started = time.monotonic()
        told_once(train(2, file, hook=quiet), f"another run is writing to {run}; wait for it")
        assert time.monotonic() - started < 20
    (run / "exits.json").write_text("{}")
    told_once(train(2, file, hook=quiet), "holds an exit adapter already")
    mine = ["exits.kind=norm", "exits.init=copy", "data.seq_len=24", "objective.candidate_loss=false"]
    tuned = file.parent / "tuned"
    tune(base, exits=[1], data=str(text), out=tuned, steps=2, overrides=[*mine, "train.microbatch=2"])
    left = {path: path.stat().st_mtime_ns for path in tuned.rglob("*.*")}
    again = ranks(2, ["tune", str(tuned / "run.toml"), "--set", "parallel.data=2", "train.warmup=2"], hook=quiet)
    told_once(again, "holds a run of exitlm tune in one process; choose another directory")
    assert {path: path.stat().st_mtime_ns for path in tuned.rglob("*.*")} == left
    (run / "exits.json").unlink()
    train(1, file, "train.steps=2")
    with pytest.raises(UserError, match="holds a run of exitlm train; choose another directory"):
        tune(base, exits=[1], data=str(text), out=run, overrides=["data.seq_len=24"])


def test_another_model_or_other_data(file: Path, tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    assert train(2, file, "train.steps=2")[0].code == 0
    told_once(train(2, file, "train.steps=2", "model.hidden_size=32"), "other settings (model.hidden_size: 16 -> 32)")
    data = tmp_path / "data.txt"
    data.write_text(text.read_text() + "more\n")
    settings = (run / "run.toml").read_text()
    (run / "run.toml").write_text(settings.replace(str(text), str(data)))
    told_once(
        train(2, file, "train.steps=2", f"data.files={data}"), "the data digest changed since the run in", "restore"
    )
    (run / "run.toml").write_text(settings.replace("rope_theta = 10000.0", "rope_theta = 500.0"))
    told_once(train(2, file, "train.steps=2", "model.rope_theta=500.0"), "the model is not the one", "rope_theta")
    (run / "run.toml").write_text(settings.replace("hidden_size = 16", "hidden_size = 32"))
    told_once(train(2, file, "train.steps=2", "model.hidden_size=32"), "the model is not the one", "hidden_size")


def test_a_port_that_another_program_has(file: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        ends = train(2, file, "parallel.timeout=1", port=port, timeout=30)
    for end in ends:  # they can't agree who tells it
        assert (end.code, end.err.count("\n")) == (2, 1)
        assert f"error: the processes can't meet (another program has port {port} of 127.0.0.1)" in end.err
    assert not (file.parent / "run").exists()


def test_processes_that_do_not_come(file: Path) -> None:
    def absent(who: int) -> Callable[[int], None]:
        def hook(rank: int) -> None:
            impatient()
            if rank == who:
                os._exit(0)

        return hook

    (first, second) = train(2, file, "parallel.timeout=1", hook=absent(1), timeout=30)
    assert (second.code, first.code) == (0, 2)
    assert "error: rank 1 did not come within 1 seconds (parallel.timeout)" in first.err
    (first, second) = train(2, file, "parallel.timeout=1", hook=absent(0), timeout=30)
    assert (first.code, second.code) == (0, 2)
    assert "error: the processes can't meet (nothing answers at port" in second.err
    assert HUNG not in (first.code, second.code)
    (end,) = train(1, file, "parallel.pipeline=2", hook=lambda _: os.environ.update(WORLD_SIZE="2", MASTER_ADDR=""))
    assert "MASTER_ADDR and MASTER_PORT do not say where they meet; start them with torchrun" in end.err
