"""``exitlm train``: a run over any number of processes, from its file to its last checkpoint.

All parameters, or exits on a frozen model. Every process runs this; the first one (rank 0) speaks and keeps the run's
directory. What one step does is ``trainer.py``, what is kept is ``sharded.py``.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from exitlm.errors import UserError
from exitlm.parallel.mesh import Launch, Layout, Mesh, Roll, processes
from exitlm.parallel.pipeline.schedule import simulate
from exitlm.parallel.pipeline.split import stage_costs
from exitlm.train import checkpoint as run_files
from exitlm.train import sharded
from exitlm.train.data import expand, hold_out, load_blocks, tokenise_all
from exitlm.train.exits import exit_configs, needs_final
from exitlm.train.initial import InitialValues
from exitlm.train.loop import Clock, Interrupted, StopSignal, stop_signal
from exitlm.train.metrics import Tracker, open_trackers, progress
from exitlm.train.objective import candidate_vocabulary
from exitlm.train.run import TRAINING, RunConfig
from exitlm.train.setup import Setup, resolve
from exitlm.train.stream import Stream
from exitlm.train.trained import model_of_run, recorded, versions
from exitlm.train.trainer import Job, Report, Trainer, head_name
from exitlm.weights.adapter import save_adapter
from exitlm.weights.store import cache_directory

# The largest rate of dense bfloat16 products, in FLOP/s, as the makers state it.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def train(config: RunConfig | str | os.PathLike[str], *, overrides: Sequence[str] = ()) -> Path:
    """Train as ``config`` says, a tree or a run file, changed by ``overrides`` (``"train.steps=100"``), and return the
    run's directory. Called by every process that torchrun started, or by one alone; a run that was interrupted goes on.

    Raises:
        UserError: anything the user can put right.
        Interrupted: SIGTERM, SIGUSR1 or Ctrl-C; everything is saved, and the same call goes on.
    """
    if not isinstance(config, RunConfig):
        config = RunConfig.from_toml(Path(config), TRAINING)
    config = config.with_overrides(overrides)
    config.check()
    launch = Launch.from_environment()
    setup = resolve(config, launch)
    timeout = config.parallel.timeout
    with stop_signal() as stop, processes(launch, setup.device, timeout) as roll:
        _agree(setup.config)
        with run_files.exclusive(setup.out) if launch.rank == 0 else nullcontext():
            try:
                _Run(setup, launch, stop).run()
            except (RuntimeError, dist.DistError) as error:
                raise _lost(error, roll, setup.layout) from error
    return setup.out


def _agree(config: RunConfig) -> None:
    """Refuse to start where processes were given different settings."""
    mine = hashlib.sha256(config.to_toml().encode()).hexdigest()
    all_of_them: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, (mine, config.flat()))
    for rank, (digest, flat) in enumerate(all_of_them):
        if digest != all_of_them[0][0]:
            first = all_of_them[0][1]
            key = next(key for key, value in flat.items() if first[key] != value)
            raise UserError(
                f"rank {rank} was started with other settings than rank 0 ({key} is {flat[key]!r} there and "
                f"{first[key]!r} here); start all processes with the same run file"
            )


def _lost(error: Exception, roll: Roll, layout: Layout) -> Exception:
    """A failure of communication in words, by the ranks that no longer answer; any other error as it is."""
    signs = ("timed out", "timeout", "connection", "gloo", "nccl")
    if layout.world == 1 or not any(sign in str(error).lower() for sign in signs):
        return error
    missing = roll.missing()
    if not missing:
        return error
    names = " and ".join(layout.named(rank) for rank in missing)
    return UserError(
        f"{names} did not answer (it died, or is slower than parallel.timeout allows); the last checkpoint is intact, "
        "start the run again to go on from it"
    )


class _Run:
    """The part of one process in a run."""

    def __init__(self, setup: Setup, launch: Launch, stop: StopSignal) -> None:
        self.setup, self.config, self.out, self.stop = setup, setup.config, setup.out, stop
        self.speaks = launch.rank == 0
        self.exits = exit_configs(setup.config)
        self.started = time.perf_counter()
        self.measured: Mapping[int, Mapping[str, float]] = {}

    def run(self) -> None:
        """From the data to the last checkpoint."""
        setup, config = self.setup, self.config
        self._claim()
        self.train_stream, self.held, self.held_rows = self._data()
        self.mesh = Mesh(setup.layout, setup.device)
        found = sharded.newest(self.out)
        self.same = {
            "base_digest": setup.opened.digest() if setup.opened is not None else "none",
            "data_digest": self.train_stream.digest,
            "rows": str(setup.geometry.rows),
        }
        if found is not None:
            run_files.check_same(self.out, found[1], self.same)
        self.trainer = self._trainer(values=found is None)
        self.writer = sharded.Writer(self.out, config.checkpoint.keep, config.checkpoint.async_, setup.device)
        self.before = 0.0
        if found is not None:
            self._restore(*found)
        if self.trainer.progress.done >= config.train.steps:
            self._say(f"{self.out} is a finished run already; nothing to do")
            return
        self._loop(fresh=found is None)

    def _claim(self) -> None:
        """Rank 0 compares the settings with those of the run that is there; all processes hear what it found."""
        refused = ""
        if self.speaks:
            try:
                run_files.claim(self.out, self.config)
                run_files.clean(self.out)
            except UserError as error:
                refused = str(error)
        self._hear(refused)

    def _hear(self, refused: str) -> None:
        words = [refused]
        dist.broadcast_object_list(words, src=0)
        if words[0]:
            raise UserError(words[0])

    def _data(self) -> tuple[Stream, Stream, int]:
        d, vocab, cache = self.config.data, self.setup.model.vocab_size, cache_directory()
        options: dict[str, Any] = {"vocab_size": vocab, "seq_len": d.seq_len, "cache": cache}
        groups = [[name] for name in d.files] if d.weights else [list(d.files)]
        tokenise_all(expand([*d.files, *d.validation_files]), self.setup.tokens, vocab_size=vocab, cache=cache)
        sources = [load_blocks(names, self.setup.tokens, **options) for names in groups]
        if d.validation_files:
            held = [load_blocks(d.validation_files, self.setup.tokens, **options)]
        else:
            share = -(-d.validation_sequences // len(sources))
            both = [hold_out(blocks, share, self.config.train.seed) for blocks in sources]
            sources, held = [train for train, _ in both], [validation for _, validation in both]
        self.text = sources
        seed = self.config.train.seed
        stream = Stream(sources, seq_len=d.seq_len, seed=seed, weights=d.weights)
        validation = Stream(held, seq_len=d.seq_len, seed=seed, shuffle=False)
        return stream, validation, min(len(validation), d.validation_sequences)

    def _trainer(self, *, values: bool) -> Trainer:
        setup, config = self.setup, self.config
        largest = max((e.candidates for e in self.exits), default=0)
        ids = None
        if largest:
            counts = torch.stack([blocks.counts(setup.model.vocab_size) for blocks in self.text]).sum(0)
            ids = candidate_vocabulary(counts, setup.model.eos_token_ids, largest)
        job = Job(
            config=config,
            model=setup.model,
            exits=self.exits,
            split=setup.split,
            geometry=setup.geometry,
            compute=setup.compute,
            master=setup.master,
            frozen=setup.frozen,
            teacher=needs_final(config),
            candidate_ids=ids,
        )
        first = InitialValues(
            setup.model,
            self.exits,
            seed=config.train.seed,
            dtype=setup.master,
            checkpoint=setup.opened,
            depth_scaled=config.model.depth_scaled_init,
            candidate_ids=ids,
        )
        return Trainer(job, self.mesh, self.train_stream, first if values or setup.frozen else None)

    def _restore(self, place: Path, meta: Mapping[str, Any]) -> None:
        sharded.load(place, self.trainer.state())
        self.trainer.restore(meta["progress"], int(meta["updates"]))
        self.before = float(meta["seconds"])
        done, steps = self.trainer.progress.done, self.config.train.steps
        if 0 < done < steps:
            self._say(f"going on from step {done} of {steps} in {self.out}")

    # ---- the loop

    def _loop(self, *, fresh: bool) -> None:
        config, t = self.config, self.config.train
        self._tell_layout()
        if fresh:
            self._save()
        trackers = open_trackers(self.out, config, self.trainer.progress.done) if self.speaks else []
        bar = progress("training", t.steps) if self.speaks else nullcontext()
        try:
            with bar as shown:
                self._steps(trackers, shown)
        finally:
            for tracker in trackers:
                tracker.close()
        if self.setup.frozen:
            self._publish()
        self._say(f"{self.out} holds the run; 'exitlm export {self.out} DIR' writes the model and its exits")

    def _publish(self) -> None:
        """Rank 0 writes the adapter of a frozen model's exits."""
        if not self.speaks:
            return
        model = model_of_run(self.out)
        for layer, head in model.exit_heads().items():
            measured = self.measured.get(layer, {})
            head.record = {name: measured[name] for name in ("accuracy", "loss") if name in measured}
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
        while trainer.progress.done < t.steps:
            report = trainer.step()
            done = trainer.progress.done
            rate = clock.tick(report.tokens)
            values = {**report.values(), "loss": total_loss(report), "skipped": float(trainer.progress.skipped)}
            if t.validate_every and (done % t.validate_every == 0 or done == t.steps):
                self.measured = trainer.validate(self.held, self.held_rows)
                for head, means in self.measured.items():
                    values.update({f"validation/{name}/{head_name(head)}": value for name, value in means.items()})
                clock.tick(0)
            values.update(self._speed(rate, report, constant))
            if self.speaks:
                bar.update(done, step_note(report, rate))
                logged = done % config.logging.every == 0 or done == t.steps or "validation/loss/final" in values
                for tracker in trackers if logged else []:
                    tracker.log(done, values)
            self._check_patience(report)
            stopped, written = self._vote()
            if written:
                self.writer.finish()
            if stopped or done == t.steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
                self._save()
            if stopped:
                self.writer.finish()
                if self.speaks:
                    bar.close()
                self._say(
                    f"stopped by {stopped}: step {done} of {t.steps} is saved; start the same command again to go on"
                )
                raise Interrupted
        self.writer.finish()

    def _vote(self) -> tuple[str, bool]:
        """Whether any process was told to stop, and whether all have written what is pending: one answer for all."""
        names = ("", "SIGTERM", "SIGUSR1", "SIGINT")
        votes = torch.tensor([names.index(self.stop.name), int(not self.writer.done)], device=self.setup.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(votes, dist.ReduceOp.MAX)
        stop, waiting = votes.tolist()
        return names[stop], not waiting

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
        meta = {
            **self.same,
            "model": dict(self.setup.model.hf),
            "candidate_ids": [] if self.trainer.job.candidate_ids is None else self.trainer.job.candidate_ids.tolist(),
            "step": trainer.progress.done,
            "progress": trainer.progress.numbers(),
            "updates": trainer.updates,
            "seconds": round(self.before + time.perf_counter() - self.started, 3),
        }
        self.writer.save(trainer.state(), meta)

    # ---- words and numbers

    def _say(self, sentence: str) -> None:
        if self.speaks:
            print(sentence, flush=True)

    def _tell_layout(self) -> None:
        g, layout = self.setup.geometry.schedule, self.setup.layout
        extra = g.filled_warmup + g.filled_cooldown
        if extra:
            full = len(g.spans) - extra
            self._say(
                f"bubble filling adds {extra} partial microbatches to {full}: a step reads {self.setup.geometry.rows} "
                f"sequences instead of {full * self.setup.geometry.size * layout.data}"
            )

    def _constants(self) -> dict[str, float]:
        """What is the same in every step: its FLOPs, and the pipeline's share of waiting as simulated."""
        setup, config = self.setup, self.config
        teacher, frozen, recompute = needs_final(config), setup.frozen, config.train.recompute == "layers"
        seq_len = config.data.seq_len
        costs = stage_costs(
            setup.model, self.exits, setup.split, seq_len, frozen=frozen, recompute=recompute, teacher=teacher
        )
        useful = stage_costs(setup.model, self.exits, setup.split, seq_len, frozen=frozen, teacher=teacher)
        schedule = setup.geometry.schedule
        line = simulate(schedule, [c.forward_flops for c in costs], [c.backward_flops for c in costs])
        per_token = sum(c.forward_flops + c.backward_flops for c in useful)
        return {"flops": per_token * setup.geometry.rows * seq_len, "bubble": 1.0 - line.utilisation}

    def _speed(self, rate: float, report: Report, constant: Mapping[str, float]) -> dict[str, float]:
        """Tokens and FLOPs per second, and the memory of every process."""
        flops = constant["flops"] * rate / max(1, report.tokens) / self.setup.layout.world
        values = {"tokens_per_second": rate, "tflops": flops / 1e12, "bubble": constant["bubble"]}
        name = torch.cuda.get_device_name(self.setup.device) if self.setup.device.type == "cuda" else ""
        peak = next((peak for part, peak in PEAKS.items() if part in name), None)
        if peak is not None:
            values["mfu"] = flops / peak
        used: list[Any] = [None] * self.setup.layout.world
        mine = torch.tensor([memory_gib(self.setup.device)], dtype=torch.float64, device=self.setup.device)
        every = [torch.zeros_like(mine) for _ in used]
        dist.all_gather(every, mine)
        values.update({f"memory_gib/{rank}": float(value) for rank, value in enumerate(every)})
        return values


def memory_gib(device: torch.device) -> float:
    """The most memory that this process has held: on its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def total_loss(report: Report) -> float:
    """The objective: the heads' losses by their weights."""
    return sum(report.weights[head] * means["loss"] for head, means in report.means.items())


def step_note(report: Report, rate: float) -> str:
    """The loss of each head, and the speed, for the bar."""
    losses = "  ".join(f"{head_name(head)}: {means['loss']:.3f}" for head, means in report.means.items())
    return f"loss  {losses}  {rate:,.0f} tok/s"
