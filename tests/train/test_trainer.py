"""Optimizer steps over processes: those of a plain model and a plain AdamW, the same losses in every layout."""

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exitlm.train.trainer as trainer_module
from exitlm.parallel.mesh import Layout, Mesh
from exitlm.parallel.shards import part_of
from exitlm.train.data import ByteTokenizer, load_blocks
from exitlm.train.stream import Stream
from exitlm.train.trainer import Trainer
from tests.parallel.cases import Case, Meshes, exits_of, llama, run_cases, trainer_of, truth
from tests.parallel.launch import launch
from tests.parallel.reference import Reference, Table, Values, random_table

EXITS = exits_of("1 norm shared", "2 lens exits", "3 mlp own", "4 block exits")
TIED = llama(4, vocab_size=49, tie_word_embeddings=True)
LARGE_SCALE = 2.0**24
ADAM = (
    "train.steps=3",
    "train.lr=0.01",
    "train.warmup=0",
    "train.schedule=constant",
    "train.weight_decay=0.1",
    "train.eps=1e-4",
    "train.clip=0.5",
)


# ---- against a plain optimizer


class Plain:
    """The reference with ``torch.optim.AdamW`` and ``clip_grad_norm_``: every tensor once, and no layout."""

    def __init__(self, case: Case) -> None:
        self.case, self.dtype = case, torch.float64
        gradients = truth(case).gradients
        self.parameters = {
            name: nn.Parameter(Values(case.seed).tensor(name, grad.shape)) for name, grad in gradients.items()
        }
        t, all_of_them = case.config.train, self.parameters.values()
        groups = [
            {"params": [p for p in all_of_them if p.dim() > 1], "weight_decay": t.weight_decay},
            {"params": [p for p in all_of_them if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=t.lr, betas=t.betas, eps=t.eps, foreach=False)

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """The value of a tensor now; those of a frozen model stay."""
        return self.parameters[name].detach() if name in self.parameters else Values(self.case.seed).tensor(name, shape)

    def steps(self, count: int) -> list[tuple[dict[str, Tensor], float, float]]:
        """Values, norm and the final head's mean loss of each step."""
        out = []
        for step in range(count):
            found = truth(self.case, step, self)
            for name, parameter in self.parameters.items():
                parameter.grad = found.gradients[name].clone()
            norms = [torch.nn.utils.clip_grad_norm_(group, self.case.config.train.clip) for group in self.clipped()]
            self.optimizer.step()
            values = {name: p.detach().clone() for name, p in self.parameters.items()}
            sums = found.found.sums[min(found.found.sums)]
            out.append((values, math.hypot(*map(float, norms)), sums.loss / sums.tokens))
        return out

    def clipped(self) -> list[list[nn.Parameter]]:
        """What is clipped together: all, or each exit of a frozen model."""
        if not self.case.frozen:
            return [list(self.parameters.values())]
        return [
            [p for name, p in self.parameters.items() if name.startswith(f"exits.{e.layer}.")] for e in self.case.exits
        ]


def against_plain(case: Case, count: int, expected: list[tuple[dict[str, Tensor], float, float]]) -> list[str]:
    """What differs after each step, with a validation between them."""
    logging.disable(logging.CRITICAL)
    table = case.table(count * case.job().geometry.rows)
    trainer = trainer_of(case, Meshes().of(case.layout), table)
    wrong = []
    for step, (values, norm, loss) in enumerate(expected):
        report = trainer.step()
        trainer.validate(table, 3)
        for name, whole, local in zip(trainer.shards.names, trainer.shards.whole, trainer.shards.local, strict=True):
            error = float((local - part_of(values[name], whole)).abs().max()) if local.numel() else 0.0
            if error > 1e-10:
                wrong.append(f"step {step}: {name} {error:.1e}")
        found = report.means[min(report.means)]["loss"]
        if abs(report.grad_norm - norm) > 1e-9 or abs(found - loss) > 1e-9:
            wrong.append(f"step {step}: norm {report.grad_norm} and {norm}, loss {found} and {loss}")
    return wrong


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(pipeline=4),
        Layout(pipeline=2, data=2, schedule="zbv", stages_per_rank=2),
        Layout(pipeline=4, schedule="filled"),
        Layout(tensor=2, data=2),
        Layout(data=2, shard=False),
    ],
    ids=str,
)
def test_three_steps_are_those_of_adamw_on_one_process(layout: Layout) -> None:
    """With clipping, a validation after each, and, in one of the layouts, layers that are skipped now and then."""
    more = ("objective.layer_dropout=0.8",) if layout.schedule == "zbv" else ()
    many = max(2, layout.pipeline) if layout.tensor == 1 else 1
    case = Case(layout=layout, exits=EXITS, model=TIED, size=1, microbatches=many, settings=(*ADAM, *more))
    expected = Plain(case).steps(3)
    assert min(norm for _, norm, _ in expected) > 0.5, "nothing is clipped"
    wrong = {what for rank in launch(layout.world, against_plain, case, 3, expected) for what in rank}
    assert not wrong, "\n".join(sorted(wrong)[:20])


@pytest.mark.parametrize("settings", [(), ("objective.distill=0.5",)], ids=["labels", "final head"])
def test_three_steps_of_a_frozen_model_are_those_of_adamw_on_one_process(settings: tuple[str, ...]) -> None:
    """Each exit is clipped by itself: exits are independent, alone or together."""
    layout, exits = Layout(pipeline=2, data=2), exits_of("1 norm own", "2 lens exits", "3 mlp own")
    case = Case(layout=layout, exits=exits, model=TIED, frozen=True, size=1, settings=(*ADAM, *settings))
    expected = Plain(case).steps(3)
    wrong = {what for rank in launch(4, against_plain, case, 3, expected) for what in rank}
    assert not wrong, "\n".join(sorted(wrong)[:20])


# ---- the same in every layout


def losses_of(layout: Layout, stream: Stream, rows: int, steps: int) -> list[float]:
    """The losses of all heads in every step."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    many = max(1, layout.pipeline)  # the steps read the same rows, however they are cut
    case = Case(
        layout=layout,
        exits=exits_of("1 norm shared", "2 lens exits", "4 norm exits"),
        model=llama(4, vocab_size=257, tie_word_embeddings=True),
        size=rows // layout.data // many,
        microbatches=many,
        settings=("train.lr=0.01", "train.warmup=5", f"train.steps={steps}", "train.clip=1.0"),
    )
    table: Any = stream
    trainer = trainer_of(case, Mesh(layout, torch.device("cpu")), table)
    return [means["loss"] for _ in range(steps) for means in trainer.step().means.values()]


def test_twenty_steps_have_the_same_losses_in_every_layout(text: Path, cache: Path) -> None:
    """To 1e-6 of each loss, in float64; on text, with a warm-up and clipping."""
    blocks = load_blocks([str(text)], ByteTokenizer(), vocab_size=257, seq_len=8, cache=cache)
    stream, steps = Stream([blocks], seq_len=8, seed=0), 20
    alone = launch(1, losses_of, Layout(), stream, 4, steps)[0]
    assert len(alone) == steps * 4
    assert sum(alone[-4:]) < 0.8 * sum(alone[:4])
    for layout in (
        Layout(data=2),
        Layout(tensor=2),
        Layout(pipeline=2),
        Layout(pipeline=4),
        Layout(data=2, tensor=2, pipeline=2),
    ):
        for losses in launch(layout.world, losses_of, layout, stream, 4, steps):
            assert losses == pytest.approx(alone, rel=1e-6), layout


# ---- what a step does besides


def test_skipped_layers_resting_exits_and_rising_weights_have_the_gradient_of_the_reference() -> None:
    exits = exits_of("1 norm shared", "2 lens own", "3 block shared", "4 mlp exits", "5 norm exits", "6 embed shared")
    dropping = ("objective.layer_dropout=1.0", "train.steps=2")
    six = llama(6, tie_word_embeddings=True)
    rising = ("objective.weight=1.0", "objective.weight_init=0.2", "objective.warmup_steps=5")
    run_cases(
        [
            Case(layout=layout, exits=exits, model=six, size=1, step=step, settings=settings)
            for layout in (Layout(pipeline=4), Layout(pipeline=2, data=2), Layout(pipeline=4, schedule="filled"))
            for step, settings in ((1, dropping), (2, ("objective.rotate_exits=3",)), (3, rising))
        ]
    )


def validated(case: Case, table: Any, rows: int) -> dict[int, dict[str, float]]:
    """The means of a validation."""
    return trainer_of(case, Meshes().of(case.layout)).validate(table, rows)


@pytest.mark.parametrize(
    ("layout", "frozen"),
    [
        (Layout(), False),
        (Layout(pipeline=2, schedule="zbv", stages_per_rank=2), False),
        (Layout(pipeline=2, schedule="interleaved", stages_per_rank=2), False),
        (Layout(data=2, tensor=2), False),
        (Layout(pipeline=2), True),
    ],
    ids=str,
)
def test_a_validation_reads_every_row_once(layout: Layout, frozen: bool) -> None:
    """Cross-entropy, accuracy and confidence over five rows, which do not divide among microbatches of all ranks."""
    exits = exits_of("1 norm own", "3 lens own") if frozen else EXITS
    case = Case(layout=layout, exits=exits, model=TIED, frozen=frozen, settings=("objective.distill=0.5",))
    table = random_table(5, 8, 49, 1)
    weights = {e.layer: 1.0 for e in exits} | {0: 1.0}
    plain = replace(case.objective(0), weights=weights, distill=0.0)
    expected = Reference(TIED, exits, Values()).find(table, range(5), plain, dict.fromkeys(weights, 1.0)).sums
    for found in launch(layout.world, validated, case, table, 5):
        assert set(found) == set(weights)
        for head, means in found.items():
            sums = expected[head]
            assert set(means) == {"loss", "accuracy", "confidence"}
            for name, mean in means.items():
                assert mean == pytest.approx(getattr(sums, name) / sums.tokens, rel=1e-12), (head, name)


def alone(case: Case, table: Table | None = None) -> Trainer:
    """The trainer of a process without others; within a launch of one."""
    return trainer_of(case, Mesh(Layout(), torch.device("cpu")), table)


def half_steps(case: Case, count: int) -> list[tuple[bool, float, int, bool]]:
    """Of each step: whether it was skipped, the scale after it, how many skips count, whether anything changed."""
    trainer_module.SCALE_STEPS, trainer_module.FIRST_SCALE = 3, LARGE_SCALE
    trainer, out = alone(case, case.table(count * case.job().geometry.rows)), []
    for _ in range(count):
        before = [local.detach().clone() for local in trainer.shards.local]
        report = trainer.step()
        changed = any(not torch.equal(a, b) for a, b in zip(before, trainer.shards.local, strict=True))
        out.append((report.skipped, trainer.progress.scale, trainer.progress.skipped, changed))
    return out


def test_the_scale_of_half_precision_finds_its_place() -> None:
    """Too large a scale is halved and the step skipped, which is no fault of the run; after a while it is doubled."""
    case = Case(layout=Layout(), exits=EXITS, model=TIED, settings=("train.dtype=float16", "train.lr=1e-4"))
    steps = launch(1, half_steps, case, 20)[0]
    first = next(i for i, (skipped, *_) in enumerate(steps) if not skipped)
    assert first > 0
    assert [scale for _, scale, _, _ in steps[:first]] == [LARGE_SCALE / 2 ** (i + 1) for i in range(first)]
    assert all(changed != skipped for skipped, _, _, changed in steps)
    assert [count for _, _, count, _ in steps] == [0] * 20
    assert steps[first + 2][1] == 2.0 * steps[first + 1][1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_as_float32_does(dtype: str, text: Path, cache: Path) -> None:
    """Fifteen steps on a pipeline: the last loss of each head within 3% of float32's; master weights are float32."""
    blocks = load_blocks([str(text)], ByteTokenizer(), vocab_size=257, seq_len=8, cache=cache)
    stream = Stream([blocks], seq_len=8, seed=0)
    wide, narrow = (launch(2, learned, kind, stream, 15) for kind in ("float32", dtype))
    for rank in range(2):
        assert narrow[rank] == pytest.approx(wide[rank], rel=0.03)


def learned(dtype: str, stream: Any, steps: int) -> list[float]:
    """The losses of the heads in the last step, of small random weights."""
    logging.disable(logging.CRITICAL)
    layout = Layout(pipeline=2, schedule="zbv", stages_per_rank=2)
    settings = ("train.lr=0.01", "train.warmup=5", f"train.steps={steps}", f"train.dtype={dtype}")
    case = Case(layout=layout, exits=EXITS, model=llama(4, vocab_size=257), settings=settings)
    trainer = trainer_of(case, Meshes().of(layout), stream)
    trainer.progress.scale = 256.0 if dtype == "float16" else 1.0
    for _ in range(steps):
        report = trainer.step()
        assert not report.skipped
    assert {local.dtype for local in trainer.shards.local} == {torch.float32}
    assert {state["exp_avg"].dtype for state in trainer.optimizer.state.values()} == {torch.float32}
    return [means["loss"] for means in report.means.values()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(data=2, pipeline=2)], ids=str)
def test_compiled_layers_have_the_gradient_of_one_process(layout: Layout) -> None:
    settings = ("train.compile=true",)
    cases = [
        Case(layout=layout, exits=exits, model=TIED, size=1, settings=(*settings, *more))
        for exits, more in ((EXITS, ()), (EXITS[:1], ("train.recompute=layers",)))
    ]
    run_cases(cases, timeout=300.0)


def test_weight_decay_is_for_matrices() -> None:
    """And a gradient of zero, with the moments of none, leaves a norm as it is."""
    case = Case(layout=Layout(), exits=EXITS, model=TIED, settings=("train.weight_decay=0.5", "train.lr=0.1"))
    groups = launch(1, decays, case)[0]
    assert groups == {2: {0.5}, 1: {0.0}}


def decays(case: Case) -> dict[int, set[float]]:
    """The weight decay of parameters by their dimensions."""
    out: dict[int, set[float]] = {}
    for group in alone(case).optimizer.param_groups:
        for parameter in group["params"]:
            out.setdefault(parameter.dim(), set()).add(group["weight_decay"])
    return out
