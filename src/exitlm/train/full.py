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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from exitlm.errors import UserError
from exitlm.model.config import ModelConfig
from exitlm.model.exits import check_layers
from exitlm.parallel.mesh import Launch, Layout, Mesh, Roll, processes, stages_per_rank
from exitlm.parallel.pipeline.schedule import simulate
from exitlm.parallel.pipeline.split import Split, make_split, stage_costs
from exitlm.parallel.tensor import check_tensor
from exitlm.train import checkpoint as run_files
from exitlm.train import sharded
from exitlm.train.corpus import check_context, self_tokens
from exitlm.train.data import ByteTokenizer, TextTokenizer, Tokens, expand, hold_out, load_blocks, tokenise_all
from exitlm.train.initial import InitialValues, has_shape, model_config
from exitlm.train.loop import Clock, StopSignal, stop_signal
from exitlm.train.metrics import Tracker, check_trackers, open_trackers, progress
from exitlm.train.objective import candidate_vocabulary
from exitlm.train.plan import Geometry, geometry
from exitlm.train.run import TRAINING, RunConfig
from exitlm.train.stream import Stream
from exitlm.train.trainer import Job, Report, Trainer, head_name
from exitlm.train.tune import Interrupted, default_layers, exit_configs, needs_final
from exitlm.weights.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from exitlm.weights.load import device_of
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
    plan = resolve(config, launch)
    timeout = config.parallel.timeout
    with stop_signal() as stop, processes(launch, plan.device, timeout) as roll:
        _agree(plan.config)
        with run_files.exclusive(plan.out) if launch.rank == 0 else nullcontext():
            try:
                _Run(plan, launch, stop).run()
            except (RuntimeError, dist.DistError) as error:
                raise _lost(error, roll, plan.layout) from error
    return plan.out


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run whose settings fit together, before anything is loaded. ``opened`` is the base, None for a new model."""

    config: RunConfig
    opened: Checkpoint | None
    tokens: Tokens
    model: ModelConfig
    layout: Layout
    split: Split
    geometry: Geometry
    device: torch.device
    compute: torch.dtype
    master: torch.dtype

    @property
    def out(self) -> Path:
        """The run's directory."""
        return Path(self.config.checkpoint.dir)

    @property
    def frozen(self) -> bool:
        """Whether only exits are trained."""
        return self.config.train.parameters == "exits"


def resolve(config: RunConfig, launch: Launch) -> Plan:
    """Check a run's settings against each other, and against the number of processes.

    Raises:
        UserError: the first thing that can't work, and what would.
    """
    config.check()
    p, t, o = config.parallel, config.train, config.objective
    if not config.checkpoint.dir:
        raise UserError("checkpoint.dir is not set: name a directory for the run")
    if self_tokens(config) is not None:
        raise UserError("text that the model writes itself is for exitlm tune on one process; name files in data.files")
    world = p.data * p.tensor * p.pipeline
    if world != launch.world:
        raise UserError(
            f"parallel.data x tensor x pipeline is {p.data} x {p.tensor} x {p.pipeline} = {world}, but there "
            f"{'is 1 process' if launch.world == 1 else f'are {launch.world} processes'}; start "
            f"{world} (torchrun --nproc-per-node {world} -m exitlm train ...), or change [parallel]"
        )
    opened, tokens = _opened(config)
    model = opened.model_config if opened is not None else model_config(config, tokens.size)
    check_context(config.data.seq_len, model)
    config = _with_exits(config, model)
    exits, frozen, teacher = exit_configs(config), t.parameters == "exits", needs_final(config)
    if frozen and not exits:
        raise UserError("train.parameters is 'exits', but exits.layers is empty; name at least one layer")
    if teacher and o.exit_forward != "deferred":
        raise UserError(
            f"objective.exit_forward is '{o.exit_forward}', but exits that learn from the final head (distill, gate) "
            "need 'deferred', where its features come back with the gradient"
        )
    for e in exits:
        if e.candidates and e.output != "shared" and p.tensor > 1:
            raise UserError(
                f"exit {e.layer}: candidates with an output matrix of its own need parallel.tensor = 1; use output "
                "'shared', or candidates = 0"
            )
    check_tensor(model, exits, p.tensor, p.sequence, config.data.seq_len)
    layout = Layout(
        data=p.data,
        tensor=p.tensor,
        pipeline=p.pipeline,
        sequence=p.sequence and p.tensor > 1,
        shard=p.shard,
        schedule="1f1b" if frozen or p.pipeline == 1 else p.schedule,
        stages_per_rank=1 if frozen else stages_per_rank(p.schedule, p.pipeline, p.stages_per_rank),
    )
    split = make_split(
        model,
        exits,
        layout.stages,
        place=config.exits.place,
        layers_per_stage=p.layers_per_stage,
        depth=max(e.layer for e in exits) if frozen and not teacher else None,
        seq_len=config.data.seq_len,
        frozen=frozen,
        recompute=t.recompute == "layers",
        teacher=teacher,
    )
    if t.warmup > t.steps:
        warnings.warn(f"train.warmup is cut to the {t.steps} steps of the run", stacklevel=2)
    check_trackers(config.logging)
    compute = getattr(torch, t.dtype)
    return Plan(
        config=config,
        opened=opened,
        tokens=tokens,
        model=model,
        layout=layout,
        split=split,
        geometry=geometry(config, layout, frozen=frozen, teacher=teacher),
        device=_device(config.model.device, launch),
        compute=compute,
        master=torch.promote_types(compute, torch.float32),
    )


def _opened(config: RunConfig) -> tuple[Checkpoint | None, Tokens]:
    """The base and the tokenizer."""
    base, name = config.model.base, config.data.tokenizer
    if base and has_shape(config.model) and not Path(base).exists():
        warnings.warn("model.base is used, and the shape in [model] is not", stacklevel=2)
    if not base and not has_shape(config.model):
        raise UserError("there is no model: set model.base, or the shape of a new one (model.hidden_size, ...)")
    opened = open_checkpoint(base) if base else None
    if name == "bytes" or (not name and opened is None):
        return opened, ByteTokenizer()
    found = load_tokenizer(Path(name)) if name else opened.tokenizer() if opened is not None else None
    if found is None:
        raise UserError(
            f"{name or base} came without a tokenizer; give one with data.tokenizer (a directory, or 'bytes')"
        )
    return opened, TextTokenizer(found)


def _with_exits(config: RunConfig, model: ModelConfig) -> RunConfig:
    """The settings with what the model decides: the exits' places, and what ``auto`` means."""
    depth, t = model.num_hidden_layers, config.train
    layers = config.exits.layers
    if not layers and t.parameters == "exits":
        layers = default_layers(depth)
    check_layers(layers, depth)
    if list(layers) != sorted(layers):
        raise UserError(f"exits {list(layers)} are not in ascending order; write {sorted(layers)}")
    inits = config.exits.init if isinstance(config.exits.init, tuple) else (config.exits.init,)
    if "closed_form" in inits:
        raise UserError("exits.init 'closed_form' is for exitlm tune on one process; use 'identity' or 'copy'")
    chosen: Any = tuple("copy" if init == "auto" else init for init in inits)
    given = config.exits.candidates
    candidates: Any = tuple(0 if n == -1 else n for n in (given if isinstance(given, tuple) else (given,)))
    dtype = "float32" if t.dtype == "auto" else t.dtype
    resolved = replace(
        config,
        exits=replace(
            config.exits,
            layers=tuple(layers),
            init=chosen if isinstance(config.exits.init, tuple) else chosen[0],
            candidates=candidates if isinstance(given, tuple) else candidates[0],
        ),
        train=replace(t, dtype=dtype),
    )
    resolved.check()
    return resolved


def _device(name: str, launch: Launch) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = device_of(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", launch.local_rank)
        if launch.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this is process {launch.local_rank} of a node with {torch.cuda.device_count()} GPUs; start one "
                "process per GPU"
            )
        torch.cuda.set_device(device)
    return device


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

    def __init__(self, plan: Plan, launch: Launch, stop: StopSignal) -> None:
        self.plan, self.config, self.out, self.stop = plan, plan.config, plan.out, stop
        self.speaks = launch.rank == 0
        self.exits = exit_configs(plan.config)
        self.started = time.perf_counter()

    def run(self) -> None:
        """From the data to the last checkpoint."""
        plan, config = self.plan, self.config
        self._claim()
        self.train_stream, self.held, self.held_rows = self._data()
        self.mesh = Mesh(plan.layout, plan.device)
        found = sharded.newest(self.out)
        self.same = {
            "base_digest": plan.opened.digest() if plan.opened is not None else "none",
            "data_digest": self.train_stream.digest,
            "rows": str(plan.geometry.rows),
        }
        if found is not None:
            run_files.check_same(self.out, found[1], self.same)
        self.trainer = self._trainer(values=found is None)
        self.writer = sharded.Writer(self.out, config.checkpoint.keep, config.checkpoint.async_, plan.device)
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
        d, vocab, cache = self.config.data, self.plan.model.vocab_size, cache_directory()
        options: dict[str, Any] = {"vocab_size": vocab, "seq_len": d.seq_len, "cache": cache}
        groups = [[name] for name in d.files] if d.weights else [list(d.files)]
        tokenise_all(expand([*d.files, *d.validation_files]), self.plan.tokens, vocab_size=vocab, cache=cache)
        sources = [load_blocks(names, self.plan.tokens, **options) for names in groups]
        if d.validation_files:
            held = [load_blocks(d.validation_files, self.plan.tokens, **options)]
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
        plan, config = self.plan, self.config
        largest = max((e.candidates for e in self.exits), default=0)
        ids = None
        if largest:
            counts = torch.stack([blocks.counts(plan.model.vocab_size) for blocks in self.text]).sum(0)
            ids = candidate_vocabulary(counts, plan.model.eos_token_ids, largest)
        job = Job(
            config=config,
            model=plan.model,
            exits=self.exits,
            split=plan.split,
            geometry=plan.geometry,
            compute=plan.compute,
            master=plan.master,
            frozen=plan.frozen,
            teacher=needs_final(config),
            candidate_ids=ids,
        )
        first = InitialValues(
            plan.model,
            self.exits,
            seed=config.train.seed,
            dtype=plan.master,
            checkpoint=plan.opened,
            depth_scaled=config.model.depth_scaled_init,
            candidate_ids=ids,
        )
        return Trainer(job, self.mesh, self.train_stream, first if values or plan.frozen else None)

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
        self._say(f"{self.out} holds the run; 'exitlm export {self.out} DIR' writes the model and its exits")

    def _steps(self, trackers: list[Tracker], bar: Any) -> None:
        config, t, trainer = self.config, self.config.train, self.trainer
        clock, constant = Clock(), self._constants()
        while trainer.progress.done < t.steps:
            report = trainer.step()
            done = trainer.progress.done
            rate = clock.tick(report.tokens)
            values = {**report.values(), "loss": total_loss(report), "skipped": float(trainer.progress.skipped)}
            if t.validate_every and (done % t.validate_every == 0 or done == t.steps):
                for head, means in trainer.validate(self.held, self.held_rows).items():
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
        votes = torch.tensor([names.index(self.stop.name), int(not self.writer.done)], device=self.plan.device)
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
        g, layout = self.plan.geometry.schedule, self.plan.layout
        extra = g.filled_warmup + g.filled_cooldown
        if extra:
            full = len(g.spans) - extra
            self._say(
                f"bubble filling adds {extra} partial microbatches to {full}: a step reads {self.plan.geometry.rows} "
                f"sequences instead of {full * self.plan.geometry.size * layout.data}"
            )

    def _constants(self) -> dict[str, float]:
        """What is the same in every step: its FLOPs, and the pipeline's share of waiting as simulated."""
        plan, config = self.plan, self.config
        teacher, frozen, recompute = needs_final(config), plan.frozen, config.train.recompute == "layers"
        seq_len = config.data.seq_len
        costs = stage_costs(
            plan.model, self.exits, plan.split, seq_len, frozen=frozen, recompute=recompute, teacher=teacher
        )
        useful = stage_costs(plan.model, self.exits, plan.split, seq_len, frozen=frozen, teacher=teacher)
        schedule = plan.geometry.schedule
        line = simulate(schedule, [c.forward_flops for c in costs], [c.backward_flops for c in costs])
        per_token = sum(c.forward_flops + c.backward_flops for c in useful)
        return {"flops": per_token * plan.geometry.rows * seq_len, "bubble": 1.0 - line.utilisation}

    def _speed(self, rate: float, report: Report, constant: Mapping[str, float]) -> dict[str, float]:
        """Tokens and FLOPs per second, and the memory of every process."""
        flops = constant["flops"] * rate / max(1, report.tokens) / self.plan.layout.world
        values = {"tokens_per_second": rate, "tflops": flops / 1e12, "bubble": constant["bubble"]}
        name = torch.cuda.get_device_name(self.plan.device) if self.plan.device.type == "cuda" else ""
        peak = next((peak for part, peak in PEAKS.items() if part in name), None)
        if peak is not None:
            values["mfu"] = flops / peak
        used: list[Any] = [None] * self.plan.layout.world
        mine = torch.tensor([memory_gib(self.plan.device)], dtype=torch.float64, device=self.plan.device)
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
