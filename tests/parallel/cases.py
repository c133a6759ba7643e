"""Models with exits in layouts of processes: drawn at random, trained for a step, and compared with the reference.

Not a test. :func:`compare` is what the processes of a launch run; each computes the references of some cases, so that
their time is shared as well.
"""

import copy
import functools
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from exitlm.model.config import ModelConfig
from exitlm.model.exits import ExitConfig
from exitlm.parallel.mesh import Layout, Mesh
from exitlm.parallel.pipeline.split import make_split
from exitlm.parallel.shards import part_of
from exitlm.train.plan import dropped_layers, geometry
from exitlm.train.run import TRAINING, RunConfig
from exitlm.train.trainer import Job, Progress, Report, Trainer
from tests.parallel.launch import TIMEOUT, launch
from tests.parallel.reference import Found, Objective, Reference, Table, Values, random_table

WAYS = ("eager", "checkpoint", "deferred")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "filled")
TOLERANCE = 1e-12


def llama(layers: int = 8, **over: Any) -> ModelConfig:
    """A tiny Llama with grouped heads."""
    hf = {
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": 48, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    }  # fmt: skip
    return ModelConfig.from_hf(hf | over)


def exits_of(*written: str, **options: Any) -> tuple[ExitConfig, ...]:
    """``"4 mlp own"`` for each exit: its layer, kind and output."""
    out = []
    for text in written:
        layer, kind, output = text.split()
        known: Any = {"kind": kind, "output": output}
        out.append(ExitConfig(layer=int(layer), **known, rank=5, **options))
    return tuple(out)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with exits and how it is trained: one optimizer step in float64, without an update. ``settings`` are
    overrides of the run file. Weights, and other things that the rows' number has no part in, stand there."""

    layout: Layout
    exits: tuple[ExitConfig, ...]
    model: ModelConfig = field(default_factory=llama)
    settings: tuple[str, ...] = ()
    microbatches: int = 4
    size: int = 2
    length: int = 8
    frozen: bool = False
    seed: int = 0
    packed: bool = True
    candidate_ids: tuple[int, ...] | None = None
    alike: bool = False
    """Every microbatch holds the same rows."""
    step: int = 0
    """Which of the run's steps it is."""

    def __str__(self) -> str:
        lay, m = self.layout, self.model
        heads = ", ".join(
            f"{e.layer} {e.kind} {e.output}{' gate' * e.gate}{f' of {e.candidates}' * bool(e.candidates)}"
            for e in self.exits
        )
        return (
            f"seed {self.seed}: data {lay.data} tensor {lay.tensor} pipeline {lay.pipeline} {lay.schedule}"
            f"{'' if lay.shard else ' whole'}{'' if lay.sequence else ' no sequence'}{' frozen' * self.frozen}, "
            f"{m.model_type} {m.num_hidden_layers} layers, vocabulary {m.vocab_size}"
            f"{' tied' * m.tie_word_embeddings}, exits [{heads}], {self.microbatches} x {self.size}, "
            f"{' '.join(self.settings)}"
        )

    @functools.cached_property
    def config(self) -> RunConfig:
        """The settings of the run."""
        lay = self.layout
        return TRAINING.with_overrides(
            [
                f"exits.layers={[e.layer for e in self.exits]}",
                f"objective.weight={[round(0.3 + 0.1 * e.layer, 3) for e in self.exits]}",
                f"objective.weight_init={[round(0.3 + 0.1 * e.layer, 3) for e in self.exits]}",
                f"data.seq_len={self.length}",
                "data.files=table",
                "train.dtype=float64",
                "train.clip=0",
                f"train.parameters={'exits' if self.frozen else 'all'}",
                f"train.microbatch={self.size}",
                f"train.global_batch={self.microbatches * self.size * lay.data}",
                f"parallel.data={lay.data}",
                f"parallel.tensor={lay.tensor}",
                f"parallel.pipeline={lay.pipeline}",
                f"parallel.schedule={lay.schedule}",
                *self.settings,
            ]
        )

    def dropped(self, step: int, microbatch: int) -> frozenset[int]:
        """The layers that a microbatch skips, as the plan draws them: the one thing of it that has no other source."""
        if self.config.objective.layer_dropout == 0.0:
            return frozenset()
        job = self.job()
        return dropped_layers(self.config, self.exits, job.split, step, microbatch + 1)[microbatch]

    @property
    def teacher(self) -> bool:
        """Whether exits learn from the final head."""
        o = self.config.objective
        return o.distill > 0 or (o.gate > 0 and any(e.gate for e in self.exits))

    def job(self) -> Job:
        """What a run would resolve these settings to."""
        config, dtype = self.config, getattr(torch, self.config.train.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of mlp exits at boundaries
            split = make_split(
                self.model,
                self.exits,
                self.layout.stages,
                place=config.exits.place,
                layers_per_stage=config.parallel.layers_per_stage,
                depth=max(e.layer for e in self.exits) if self.frozen and not self.teacher else None,
                frozen=self.frozen,
                teacher=self.teacher,
            )
        return Job(
            config=config,
            model=self.model,
            exits=self.exits,
            split=split,
            geometry=geometry(config, self.layout, split, frozen=self.frozen, teacher=self.teacher),
            compute=dtype,
            master=torch.promote_types(dtype, torch.float32),
            frozen=self.frozen,
            teacher=self.teacher,
            candidate_ids=None if self.candidate_ids is None else torch.tensor(self.candidate_ids),
        )

    def objective(self, step: int) -> Objective:
        """The loss of a step in the words of the reference."""
        o = self.config.objective
        first, last = (w if isinstance(w, tuple) else (w,) * len(self.exits) for w in (o.weight_init, o.weight))
        done = min(1.0, step / o.warmup_steps) if o.warmup_steps else 1.0
        by_layer = {
            e.layer: a + (b - a) * done
            for i, (e, a, b) in enumerate(zip(self.exits, first, last, strict=True))
            if o.rotate_exits < 2 or i % o.rotate_exits == step % o.rotate_exits
        }
        return Objective(
            weights=by_layer if self.frozen else by_layer | {0: o.final},
            distill=o.distill,
            temperature=o.distill_temperature,
            weighted=o.confidence_weighted,
            confidence_temperature=o.temperature,
            gate=o.gate if self.teacher else 0.0,
        )

    def table(self, rows: int) -> Table:
        """The text of a step."""
        each = self.size * self.layout.data
        table = random_table(
            each if self.alike else rows, self.length, self.model.vocab_size, self.seed, packed=self.packed
        )
        if self.alike:
            many = rows // each
            table = Table(
                ids=table.ids.repeat(many, 1),
                labels=table.labels.repeat(many, 1),
                documents=table.documents.repeat(many, 1),
            )
        return table


@dataclass(frozen=True)
class Truth:
    """What a step must give: gradients by name, sums by head."""

    gradients: Mapping[str, torch.Tensor]
    found: Found


def truth(case: Case, step: int | None = None, values: Any = None) -> Truth:
    """The reference's answer for a step, from the values that tensors have before it (None: the first).

    Bubble filling, by its definition (training.md, section 4): with N tokens in full microbatches, an exit counts ``w /
    (N + tokens of top microbatches that reach its stage)`` per token of full and top ones and ``w / N`` of bottom ones,
    there only on the stages from ``lo`` on; the gradient of stage s is divided by ``1 + tokens of bottom ones with lo
    <= s, over N``. Without bubbles that is the mean over all tokens.
    """
    step = case.step if step is None else step
    job = case.job()
    split, shape, objective = job.split, job.geometry, case.objective(step)
    table, last = case.table((step + 1) * shape.rows), split.stages - 1
    reference = Reference(
        case.model,
        case.exits,
        values or Values(case.seed),
        bounds=(*split.bounds[:-1], 1 << 30),
        owners=split.owners,
        candidate_ids=job.candidate_ids,
        frozen=case.frozen,
    )
    reference.across = case.config.data.across_documents
    each = case.size * case.layout.data
    begin = step * shape.rows
    rows = {m: range(begin + m * each, begin + (m + 1) * each) for m in range(shape.microbatches)}
    tokens = {m: table.valid(r) for m, r in rows.items()}
    filling = case.layout.schedule == "filled" and case.layout.pipeline > 1 and not case.frozen
    spans = {m: shape.schedule.spans[m] if filling else (0, last) for m in rows}
    full = sum(tokens[m] for m, span in spans.items() if span == (0, last))
    stage_of = {layer: last if layer == 0 else split.owners[layer] for layer in objective.weights}
    found = Found()
    dropped = {m: case.dropped(step, m) for m in rows}
    for (lo, hi), gone in sorted({(spans[m], dropped[m]) for m in rows}, key=str):
        shares = {}
        for layer, stage in stage_of.items():
            if lo <= stage <= hi:
                tops = sum(tokens[k] for k, (_, top) in spans.items() if stage <= top < last)
                shares[layer] = 1.0 / full if lo > 0 else 1.0 / (full + tops)
        mine = [row for m in rows if (spans[m], dropped[m]) == ((lo, hi), gone) for row in rows[m]]
        found.add(reference.find(table, mine, objective, shares, gone), lo)
    bottoms = {m: lo for m, (lo, _) in spans.items() if lo > 0}
    divisors = {s: 1.0 + sum(tokens[m] for m, lo in bottoms.items() if lo <= s) / full for s in range(last + 1)}
    return Truth(found.gradients(divisors), found)


class Meshes:
    """The process groups of this launch, one set for each number of ranks of each kind."""

    def __init__(self, timeout: float = TIMEOUT) -> None:
        self.made: dict[tuple[int, int, int, bool], Mesh] = {}
        self.timeout = timeout

    def of(self, layout: Layout) -> Mesh:
        """A mesh of this layout; groups are those of one made before where they can be."""
        key = (layout.data, layout.tensor, layout.pipeline, layout.shard)
        if key not in self.made:
            self.made[key] = Mesh(layout, torch.device("cpu"), self.timeout)
        mesh = copy.copy(self.made[key])
        mesh.layout = layout
        return mesh


def trainer_of(case: Case, mesh: Mesh, table: Table | None = None) -> Trainer:
    """The trainer of this process."""
    job = case.job()
    stream: Any = case.table((case.step + 1) * job.geometry.rows) if table is None else table
    values: Any = Values(case.seed, job.master)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(job, mesh, stream, values, Progress(done=case.step))


def compare(cases: Sequence[Case], timeout: float) -> list[str]:
    """What differs from the reference in any case, in words; run by every process."""
    import logging

    logging.disable(logging.CRITICAL)  # torch prints a whole schedule when one case fails
    warnings.simplefilter("ignore")
    rank, world = dist.get_rank(), dist.get_world_size()
    shared: list[Any] = [None] * world
    dist.all_gather_object(shared, [truth(case) for case in cases[rank::world]])
    meshes = Meshes(timeout)
    wrong = []
    for number, case in enumerate(cases):
        try:
            trainer = trainer_of(case, meshes.of(case.layout))
            report = trainer.step()
            wrong += [
                f"{case}\n  rank {rank}: {what}"
                for what in differences(trainer, report, shared[number % world][number // world])
            ]
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
    return wrong


def differences(trainer: Trainer, report: Report, truth: Truth) -> list[str]:
    """Gradients, their norm and the losses of a step that are not the reference's."""
    shards, wrong = trainer.shards, []
    for name, whole, local in zip(shards.names, shards.whole, shards.local, strict=True):
        assert local.grad is not None
        expected = part_of(truth.gradients[name], whole)
        if local.grad.shape != expected.shape:
            wrong.append(f"{name} has shape {tuple(local.grad.shape)}, not {tuple(expected.shape)}")
        elif local.numel() and (error := float((local.grad - expected).abs().max())) > TOLERANCE:
            wrong.append(f"gradient of {name}: {error:.1e}")
    if not trainer.job.frozen:
        norm = float(torch.stack([g.pow(2).sum() for g in truth.gradients.values()]).sum().sqrt())
        if abs(report.grad_norm - norm) > 1e-12 * max(1.0, norm):
            wrong.append(f"norm {report.grad_norm} and not {norm}")
    for head, sums in truth.found.sums.items():
        means = report.means.get(head, {})
        for name, value in means.items():
            if abs(value - getattr(sums, name) / sums.tokens) > TOLERANCE * 10:
                wrong.append(f"{name} of {head}: {value} and not {getattr(sums, name) / sums.tokens}")
        if not means and sums.tokens:
            wrong.append(f"nothing said about {head}")
    return wrong


def run_cases(cases: Sequence[Case], timeout: float = TIMEOUT) -> None:
    """Compare all cases (of one number of processes) in one launch.

    Raises:
        AssertionError: what differs, and in which case.
    """
    (world,) = {case.layout.world for case in cases}
    for case in cases:
        _ = case.config  # once, and not in every process
    wrong = sorted({what for out in launch(world, compare, cases, timeout, timeout=timeout) for what in out})
    assert not wrong, "\n".join(wrong[:40])


# ---- drawn cases


def stages_per_rank(schedule: str, draw: random.Random) -> int:
    """How many stages a rank has in a drawn case."""
    return {"interleaved": draw.choice((2, 2, 3)), "zero_bubble": 2, "zbv": 2}.get(schedule, 1)


def drawn(seed: int, schedule: str, way: str, *, tied: bool, layout: Layout, rounds: int = 1) -> Case:
    """A random case with this schedule and layout; ``tied``: the input embedding and most heads are one matrix."""
    draw = random.Random(f"{seed} {schedule} {way} {tied} {layout}")
    layout = replace(layout, schedule=schedule, stages_per_rank=stages_per_rank(schedule, draw))
    layers = layout.stages + draw.randrange(0, 4)
    cuts = sorted(draw.sample(range(1, layers), layout.stages - 1))
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, layers], strict=True)]
    boundary = draw.choice([*cuts, layers])
    chosen = {boundary, *draw.sample(range(1, layers + 1), draw.randrange(0, min(4, layers)))}
    vocab = draw.choice((48, 49, 31, 50))
    exits = []
    for layer in sorted(chosen):
        outputs = ("shared", "shared", "exits") if tied else ("own", "low_rank", "exits", "own", "shared")
        output = draw.choice(outputs)
        exits.append(
            ExitConfig(
                layer=layer,
                kind=draw.choice(("embed", "norm", "mlp", "block", "lens")),
                output=output,
                rank=draw.randrange(1, 12),
                candidates=draw.choice((0, 0, 7, 20)) if output == "shared" else 0,
                branch=False,
            )
        )
    weights = [round(draw.uniform(0.0, 1.5), 3) for _ in exits]
    settings = [
        f"objective.exit_forward={way}",
        f"objective.weight={weights}",
        f"objective.weight_init={weights}",
        f"objective.final={draw.choice((1.0, 1.0, 0.4))}",
        f"objective.confidence_weighted={str(draw.random() < 0.3).lower()}",
        f"exits.place={draw.choice(('next', 'end'))}",
        f"train.recompute={draw.choice(('none', 'none', 'layers'))}",
        f"parallel.layers_per_stage={counts if draw.random() < 0.7 else 'balanced'}",
    ]
    if way == "deferred" and schedule != "filled" and draw.random() < 0.4:
        exits = [replace(e, gate=draw.random() < 0.5) for e in exits]
        settings += [f"objective.distill={draw.choice((0.0, 0.5, 1.0))}", f"objective.gate={draw.choice((0.0, 0.7))}"]
        settings += [f"objective.distill_temperature={draw.choice((1.0, 2.5))}"]
    drops = draw.random() < 0.2
    if drops:
        settings += ["objective.layer_dropout=0.7", "train.steps=2"]
    least = 2 * layout.pipeline if schedule in ("zbv", "zero_bubble") and draw.random() < 0.5 else layout.pipeline
    return Case(
        layout=layout,
        exits=tuple(exits),
        model=llama(layers, vocab_size=vocab, tie_word_embeddings=tied or draw.random() < 0.3),
        settings=tuple(settings),
        microbatches=least * draw.randrange(1, rounds + 1) if schedule != "gpipe" else draw.randrange(1, 6),
        size=draw.choice((1, 2)),
        length=draw.choice((4, 6, 8)) if layout.tensor > 1 else draw.choice((3, 5, 8)),
        seed=seed,
        packed=draw.random() < 0.7,
        candidate_ids=tuple(draw.sample(range(vocab), 20)),
        step=int(drops),
    )
