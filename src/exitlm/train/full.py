"""``exitlm train``: a run over any number of processes, from its file to its last checkpoint.

All parameters, or exits on a frozen model. Every process runs this; the first one (rank 0) speaks and keeps the run's
directory. What one step does is ``trainer.py``, what is kept is ``sharded.py``.
"""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from exitlm.errors import UserError
from exitlm.model import ExitRecord
from exitlm.parallel.mesh import Launch, Mesh, group
from exitlm.parallel.pipeline.schedule import fill_room, simulate
from exitlm.parallel.roll import Roll, meet
from exitlm.progress import progress
from exitlm.train import checkpoint as run_files
from exitlm.train import sharded
from exitlm.train.corpus import rows_of_files
from exitlm.train.initial import InitialValues
from exitlm.train.loop import Clock, Interrupted, StopSignal, stop_signal
from exitlm.train.metrics import Tracker, memory_gib, open_trackers, peak_flops
from exitlm.train.objective import candidate_vocabulary
from exitlm.train.run import TRAINING, RunConfig
from exitlm.train.setup import Setup, resolve
from exitlm.train.trained import model_of_run, recorded, versions
from exitlm.train.trainer import Job, Report, Trainer, head_name
from exitlm.values import path_of, words
from exitlm.weights.adapter import check_place, save_adapter
from exitlm.weights.store import cache_directory

# How long a process waits for others that may have found the same mistake.
REFUSAL_SECONDS = 10.0


def train(config: RunConfig | str | os.PathLike[str], *, overrides: Sequence[str] = ()) -> Path:
    """Train as ``config`` says, a tree or a run file, changed by ``overrides`` (``"train.steps=100"``), and return the
    run's directory. Called by every process that torchrun started, or by one alone; a run that was interrupted goes on.

    Raises:
        UserError: anything the user can put right.
        Interrupted: SIGTERM, SIGUSR1 or Ctrl-C; everything is saved, and the same call goes on.
    """
    launch = Launch.from_environment()
    setup: Setup | UserError
    with stop_signal() as stop, _only_first_warns(launch):
        try:
            if not isinstance(config, RunConfig):
                config = RunConfig.from_toml(path_of(config, "config", "a run file or a RunConfig"), TRAINING)
            setup = resolve(config.typed().with_overrides(words(overrides, "overrides")), launch)
        except UserError as error:
            setup = error
        with _met(setup, launch) as roll:
            try:
                if isinstance(setup, UserError):
                    raise setup
                roll.agree("settings", setup.fit.config.to_toml(), _other_settings)
                _Run(setup, roll, stop).run()
            except Exception as problem:
                named = setup.fit.layout.named if isinstance(setup, Setup) else "rank {}".format
                found = roll.failed(_sentence(problem, named(launch.rank)), named)
                if found is problem:
                    raise
                raise found from problem
    return setup.out


def _sentence(error: Exception, rank: str) -> Exception:
    """The same error; where memory was not enough on a ``rank``, what may help."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        asked = re.search(r"allocate ([\d.]+ \w+)", text)
        return UserError(
            f"{rank} has too little memory{f' (it asked for {asked[1]})' if asked else ''}; a smaller model, "
            "train.microbatch or data.seq_len, train.recompute = 'layers' or more ranks need less: 'exitlm train FILE "
            "--dry-run' says how much"
        )
    return error


@contextmanager
def _only_first_warns(launch: Launch) -> Iterator[None]:
    """What all processes find is said once; that FSDP fears for views which nothing changes in place, never."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        if launch.rank > 0:
            warnings.simplefilter("ignore", UserWarning)
        yield


@contextmanager
def _met(setup: Setup | UserError, launch: Launch) -> Iterator[Roll]:
    """The other processes; one with a mistake to tell waits for them no longer than they need to start."""
    timeout = REFUSAL_SECONDS if isinstance(setup, UserError) else setup.fit.config.parallel.timeout
    with ExitStack() as stack:
        try:
            roll = stack.enter_context(meet(launch.rank, launch.world, timeout))
        except UserError as error:
            raise (setup if isinstance(setup, UserError) else error) from error
        yield roll


def _other_settings(mine: str, first: str) -> str:
    """The first setting in which two run files differ, in words."""
    here, there = RunConfig.from_text(mine).flat(), RunConfig.from_text(first).flat()
    key = next(key for key, value in here.items() if there[key] != value)
    return (
        f"was started with other settings than rank 0 ({key} is {here[key]!r} there and {there[key]!r} on rank 0); "
        "start all processes with the same run file"
    )


def _other_files(mine: str, first: str) -> str:
    """Which of the digests differ, in words."""
    here, there = json.loads(mine), json.loads(first)
    names = " and ".join(name.removesuffix("_digest") for name in here if here[name] != there.get(name))
    return f"reads another {names} than rank 0 under the same name; give all machines the same files"


class _Run:
    """The part of one process in a run."""

    def __init__(self, setup: Setup, roll: Roll, stop: StopSignal) -> None:
        self.setup, self.config, self.out, self.roll, self.stop = setup, setup.fit.config, setup.out, roll, stop
        self.speaks = roll.rank == 0
        self.exits = setup.fit.exits
        self.started = time.perf_counter()
        self.measured: Mapping[int, Mapping[str, float]] = {}
        self.lacking, self.overdue, self.stopped = False, False, ""

    def run(self) -> None:
        """From the lock on the directory to the last checkpoint."""
        if self.speaks and self.setup.fit.frozen and self.setup.opened is not None:
            check_place(self.out, self.setup.opened.digest)
        with run_files.exclusive(self.out) if self.speaks else nullcontext():
            self._begin()
            with group(self.roll, self.setup.device):
                self._train()

    def _begin(self) -> None:
        """What can be refused before the processes form a group. A run that can't begin leaves nothing behind."""
        fresh = self.speaks and not (self.out / "run.toml").exists()
        try:
            if self.speaks and not fresh:
                run_files.claim(self.out, self.config, sharded.META)
            self.text = rows_of_files(
                self.config, self.setup.tokens, self.setup.fit.model.vocab_size, cache_directory()
            )
            self.same = {
                "base_digest": self.setup.opened.digest() if self.setup.opened is not None else "none",
                "data_digest": self.text.train.digest,
                "rows_of_a_step": str(self.setup.fit.geometry.rows),
            }
            self.roll.agree("files", json.dumps(self.same), _other_files)
            self.roll.gather("data")
        except BaseException:
            if fresh:
                run_files.leave_nothing(self.out)
            raise
        if self.speaks:
            run_files.claim(self.out, self.config, sharded.META)
            run_files.clean(self.out)
        self.roll.gather("claimed")

    def _train(self) -> None:
        setup, config = self.setup, self.config
        self.mesh = Mesh(setup.fit.layout, setup.device, setup.fit.config.parallel.timeout)
        found = sharded.newest(self.out)
        if found is None and (self.out / "exits.json").exists():
            raise UserError(f"{self.out} holds an exit adapter, but no checkpoint of its run; choose another directory")
        if found is not None:
            run_files.check_same(self.out, found[1], self.same)
            run_files.check_same_model(self.out, found[1]["model"], setup.fit.model.hf)
        self.trainer = self._trainer(values=found is None)
        c, saved = config.checkpoint, None if found is None else int(found[1]["step"])
        self.writer = sharded.Writer(self.out, c.keep, c.async_, config.parallel.timeout, saved)
        self.before = 0.0
        if found is not None:
            self._restore(*found)
        if self.trainer.progress.done < config.train.steps:
            self._loop()
            self._say(f"{self.out} holds the run; 'exitlm export {self.out} DIR' writes the model and its exits")
        elif setup.fit.frozen and self._largest(self.speaks and not (self.out / "exits.json").exists()):
            self.measured = self.trainer.validate(*self.text.held)  # it ended before its adapter was written
            self._publish()
            self._say(f"{self.out} holds the exits now")
        else:
            self._say(f"{self.out} is a finished run already; nothing to do")

    def _trainer(self, *, values: bool) -> Trainer:
        setup, config = self.setup, self.config
        largest = max((e.candidates for e in self.exits), default=0)
        ids = None
        if largest:
            sources = self.text.train.sources
            counts = torch.stack([blocks.counts(setup.fit.model.vocab_size) for blocks in sources]).sum(0)
            ids = candidate_vocabulary(counts, setup.fit.model.eos_token_ids, largest)
        job = Job(
            config=config,
            model=setup.fit.model,
            exits=self.exits,
            split=setup.fit.split,
            geometry=setup.fit.geometry,
            compute=setup.compute,
            master=setup.master,
            frozen=setup.fit.frozen,
            teacher=setup.fit.teacher,
            candidate_ids=ids,
        )
        first = InitialValues(
            setup.fit.model,
            self.exits,
            seed=config.train.seed,
            dtype=setup.master,
            checkpoint=setup.opened,
            depth_scaled=config.model.depth_scaled_init,
            candidate_ids=ids,
        )
        return Trainer(job, self.mesh, self.text.train, first if values or setup.fit.frozen else None)

    def _restore(self, place: Path, meta: Mapping[str, Any]) -> None:
        sharded.load(place, self.trainer.state())
        self.trainer.restore(meta["progress"], int(meta["updates"]))
        self.before = float(meta["seconds"])
        done, steps = self.trainer.progress.done, self.config.train.steps
        if 0 < done < steps:
            self._say(f"going on from step {done} of {steps} in {self.out}")

    # ---- the loop

    def _loop(self) -> None:
        config, t = self.config, self.config.train
        self._tell_layout()
        if not self.trainer.progress.done:
            self._save()
        trackers = open_trackers(self.out, config, self.trainer.progress.done) if self.speaks else []
        bar = progress("training", t.steps) if self.speaks else nullcontext()
        try:
            with bar as shown:
                self._steps(trackers, shown)
        except Interrupted:
            done = self.trainer.progress.done
            kept = "is saved" if self.writer.saved == done else "is not saved"
            self._say(
                f"stopped by {self.stopped}: step {done} of {t.steps} {kept}; start the same command again to "
                f"{self._from()}"
            )
            raise
        finally:
            for tracker in trackers:
                self._without_space(tracker.close)
        if self.setup.fit.frozen:
            self._publish()

    def _publish(self) -> None:
        """Rank 0 writes the adapter of a frozen model's exits."""
        if not self.speaks:
            return
        model = model_of_run(self.out)
        for layer, head in model.exit_heads().items():
            measured = self.measured.get(layer, {})
            head.record = ExitRecord(accuracy=measured.get("accuracy"), loss=measured.get("loss"))
        opened = self.setup.opened
        assert opened is not None
        training = {
            "config": recorded(self.config, opened.name),
            "steps": self.config.train.steps,
            "seconds": round(self.before + time.perf_counter() - self.started, 1),
            **self.same,
            "versions": versions(),
        }
        save_adapter(self.out, model, training=training)

    def _steps(self, trackers: list[Tracker], bar: Any) -> None:
        config, t, trainer = self.config, self.config.train, self.trainer
        clock, constant = Clock(), self._constants()
        self._stop_or_save(due=False)
        while trainer.progress.done < t.steps:
            report = trainer.step()
            done = trainer.progress.done
            rate = clock.tick(report.tokens)
            values = {**report.values(), "loss": total_loss(report), "skipped": float(trainer.progress.skipped)}
            validates = done == t.steps or (t.validate_every > 0 and done % t.validate_every == 0)
            if validates:
                self.measured = trainer.validate(*self.text.held)
                for head, means in self.measured.items():
                    values.update({f"validation/{name}/{head_name(head)}": value for name, value in means.items()})
                clock.last = time.perf_counter()
            values.update(self._speed(rate, report, constant))
            if self.speaks:
                bar.update(done, step_note(report, rate))
                for tracker in trackers if validates or done % config.logging.every == 0 else []:
                    self._without_space(tracker.log, done, values)
            self._check_patience(report)
            self._stop_or_save(
                due=done == t.steps or (config.checkpoint.every > 0 and done % config.checkpoint.every == 0)
            )
        self.writer.finish()
        if trainer.progress.skipped and self.speaks:
            warnings.warn(f"{trainer.progress.skipped} of {t.steps} steps were skipped", stacklevel=2)
        if self.writer.saved != t.steps:
            if self._largest(not trainer.finite()):
                raise UserError(
                    f"the parameters hold NaN or infinity, and are not saved; the checkpoints in {self.out} are "
                    "intact: start another run with a lower train.lr, or look at the data"
                )
            raise UserError(
                f"the last step could not be saved; put that right and start the same command again to {self._from()}"
            )

    def _without_space(self, write: Callable[..., None], *arguments: Any) -> None:
        """Write numbers, or say that there is no place for them: the run does not end for that."""
        try:
            write(*arguments)
        except OSError as error:
            if not self.lacking:
                warnings.warn(f"metrics can't be written ({error.strerror}); the run goes on without", stacklevel=2)
            self.lacking = True

    def _stop_or_save(self, *, due: bool) -> None:
        """Save what is ``due``, or what a signal asks for. While steps make no update, only what can't wait, and beside
        the checkpoints from before: what made gradients useless may be in the parameters."""
        stopped, written = self._vote()
        if written:
            self.writer.finish()
        progress = self.trainer.progress
        self.overdue |= due
        now = bool(stopped) or progress.done == self.config.train.steps
        if now or (self.overdue and not progress.idle):
            self._save()
            self.overdue = False
        if stopped:
            self.writer.finish()
            self.stopped = stopped
            raise Interrupted

    def _from(self) -> str:
        saved, done = self.writer.saved, self.trainer.progress.done
        return "begin anew" if saved is None else "go on" if saved == done else f"go on from step {saved}"

    def _vote(self) -> tuple[str, bool]:
        """Whether any process was told to stop, and whether all have written what is pending: one answer for all."""
        names = ("", "SIGTERM", "SIGUSR1", "SIGINT")
        votes = torch.tensor([names.index(self.stop.name), int(not self.writer.done)], device=self.setup.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        stop, waiting = votes.tolist()
        return names[stop], not waiting

    def _largest(self, number: int) -> int:
        """The largest number that any process has."""
        found = torch.tensor(number, device=self.setup.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def _check_patience(self, report: Report) -> None:
        p, t = self.trainer.progress, self.config.train
        if report.skipped and p.in_a_row == 1 and self.speaks:
            warnings.warn(
                f"step {p.done}: the gradient's norm is {report.grad_norm:g}, the step is skipped", stacklevel=2
            )
        if p.in_a_row >= t.patience:
            self.writer.finish()
            raise UserError(
                f"{t.patience} steps in a row, up to step {p.done}, gave a gradient that can't be used (norm "
                f"{report.grad_norm:g}) and were skipped; the checkpoints in {self.out} are intact: start another run "
                "with a lower train.lr, or look at the data there"
            )

    def _save(self) -> None:
        trainer = self.trainer
        if self.writer.saved == trainer.progress.done:
            return
        if self._largest(not trainer.finite()):
            if self.speaks:
                warnings.warn(
                    f"step {trainer.progress.done} is not saved: its parameters hold NaN or infinity", stacklevel=2
                )
            return
        meta = {
            **self.same,
            "model": dict(self.setup.fit.model.hf),
            "candidate_ids": [] if self.trainer.job.candidate_ids is None else self.trainer.job.candidate_ids.tolist(),
            "step": trainer.progress.done,
            "progress": trainer.progress.numbers(),
            "updates": self._largest(trainer.updates),  # a stage without trained parameters counts none
            "seconds": round(self.before + time.perf_counter() - self.started, 3),
        }
        self.writer.save(trainer.state(), meta, beside=trainer.progress.idle > 0)

    # ---- words and numbers

    def _say(self, sentence: str) -> None:
        if self.speaks:
            print(sentence, flush=True)

    def _tell_layout(self) -> None:
        geometry = self.setup.fit.geometry
        p, made = self.config.parallel, geometry.schedule
        extra = made.filled_warmup + made.filled_cooldown
        room = fill_room(p.pipeline, p.backward_forward_ratio) if made.name == "filled" else 0
        if made.name == "filled" and not room:
            self._say("no partial microbatch fits into the bubbles of so few ranks: the schedule is 1f1b")
        if left := (room if p.fill_warmup == "auto" else p.fill_warmup) - made.filled_warmup if room else 0:
            first = min(self.setup.fit.split.owners.values(), default=None)
            where = "the model has none" if first is None else f"the first is on stage {first}"
            self._say(f"{left} microbatches of the warm-up are left out, which would not reach an exit ({where})")
        if extra:
            full = geometry.microbatches - extra
            self._say(
                f"bubble filling adds {extra} partial microbatches to {full}: a step reads {geometry.rows} sequences "
                f"instead of {full * geometry.size * geometry.data}"
            )

    def _constants(self) -> dict[str, float]:
        """What is the same in every step: its FLOPs, and the pipeline's share of waiting as simulated."""
        fit = self.setup.fit
        line = simulate(fit.geometry.schedule, *fit.times(fit.costs()))
        useful = simulate(fit.geometry.schedule, *fit.times(fit.costs(recompute=False), useful=True))
        work = sum(event.end - event.start for events in useful.ranks for event in events)
        tokens = self.config.data.seq_len * fit.geometry.size * fit.geometry.data
        return {"flops": work * tokens, "bubble": 1.0 - line.utilisation}

    def _speed(self, rate: float, report: Report, constant: Mapping[str, float]) -> dict[str, float]:
        """Tokens and FLOPs per second, and the memory of every process."""
        flops = constant["flops"] * rate / max(1, report.tokens) / self.setup.fit.layout.world
        values = {"tokens_per_second": rate, "tflops": flops / 1e12, "bubble": constant["bubble"]}
        if peak := peak_flops(self.setup.device):
            values["mfu"] = flops / peak
        used: list[Any] = [None] * self.setup.fit.layout.world
        mine = torch.tensor([memory_gib(self.setup.device)], dtype=torch.float64, device=self.setup.device)
        every = [torch.zeros_like(mine) for _ in used]
        dist.all_gather(every, mine)
        values.update({f"memory_gib/{rank}": float(value) for rank, value in enumerate(every)})
        return values


def total_loss(report: Report) -> float:
    """The objective: the heads' losses by their weights."""
    return sum(report.weights[head] * means["loss"] for head, means in report.means.items())


def step_note(report: Report, rate: float) -> str:
    """The loss of each head, and the speed, for the bar."""
    losses = "  ".join(f"{head_name(head)}: {means['loss']:.3f}" for head, means in report.means.items())
    return f"loss  {losses}  {rate:,.0f} tok/s"
