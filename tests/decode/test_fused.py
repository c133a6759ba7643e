"""The fused decoder against the plain model: the final head and every sort of exit, for all families, in float64."""

import dataclasses
import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from exitlm.decode.engine import expand
from exitlm.decode.kernels.fused import FusedModel
from exitlm.decode.kernels.native_model import NativeModel
from exitlm.model import EarlyExitModel, ModelConfig
from exitlm.model.exits import ExitConfig
from tests.decode.driver import Driver, advance_many, logits_of, make_runner
from tests.decode.models import attach, generate, greedy_reference, make_engine, random_ids, worst
from tests.model.families import FAMILIES, convert, tiny_hf_model, tiny_model
from tests.model.test_parity import random_config

TOLERANCE = 1e-12
OUTPUTS = ("shared", "own", "exits", "low_rank")
Make = Callable[[EarlyExitModel], FusedModel | NativeModel]


def plain(model: EarlyExitModel) -> FusedModel:
    """The fused model in the model's own dtype."""
    return FusedModel(model, "none")


def passes(model: EarlyExitModel, ids: list[int], make: Make = plain) -> list[Tensor]:
    """Final logits ``[T, V]`` of the model as ``make`` packs it: row by row, and in passes of several rows."""
    runner, found = make_runner(make(model), 4 * len(ids) + 64), []
    for cuts in ([1] * len(ids), [len(ids)], [3, 1, 2, len(ids) - 6]):
        driver, rows, at = Driver(runner, total=len(ids)), [], 0
        for size in cuts:
            rows.append(logits_of(runner, driver.advance(ids[at : at + size])))
            at += size
        found.append(torch.cat(rows))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_final_logits(family: str) -> None:
    model, ids = tiny_model(family), random_ids(24)
    for found in passes(model, ids):
        assert worst(found, model.logits(ids)[0]) <= TOLERANCE


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_final_logits_on_random_configurations(family: str, seed: int) -> None:
    """Grouped heads, windows, partial rotary, scaled RoPE, biases, tied or not, as the parity tests draw them."""
    rng = random.Random(f"fused {family} {seed}")
    config = random_config(family, rng, 14)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = convert(tiny_hf_model(family, seed, **config), torch.float64)
    ids = random_ids(14, seed)
    for found in passes(model, ids):
        assert worst(found, model.logits(ids)[0]) <= TOLERANCE, config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_lower_precision_has_its_dtype_everywhere(family: str, dtype: torch.dtype) -> None:
    """On a CPU the stream is float32 whatever the weights are, biases and all: the result is that of the rounded
    weights, computed precisely (Gemma's embedding scale is among what is rounded)."""
    over: dict[str, Any] = {} if family in ("mistral", "qwen2", "phi3") else {"attention_bias": True}
    model = tiny_model(family, dtype, **over)
    attach(model, [ExitConfig(layer=1, kind="mlp"), ExitConfig(layer=2, kind="block"), ExitConfig(layer=3, gate=True)])
    ids = random_ids(12)
    found = passes(model, ids)
    scale = float(torch.tensor(model.config.embedding_scale, dtype=dtype))
    model.double().config = dataclasses.replace(model.config, embedding_scale=scale)
    for logits in found:
        assert logits.dtype == torch.float32
        assert worst(logits.double(), model.logits(ids)[0]) <= 1e-5


def longrope(**over: Any) -> EarlyExitModel:
    """A model whose rotations change when a text passes 12 tokens."""
    settings = {
        "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 6,
        "long_factor": [2.0, 3.0, 3.0, 4.0, 5.0, 6.0],        "original_max_position_embeddings": 12, "factor": 4.0,
    }  # fmt: skip
    return tiny_model("llama", rope_parameters=settings, **over)


@pytest.mark.parametrize("mode", ["full", "threshold", "lossless"])
@pytest.mark.parametrize("prompt_length", [4, 11, 12, 13])
def test_longrope_rotates_anew_where_the_text_passes_the_original_length(mode: str, prompt_length: int) -> None:
    """Token for token what full passes over the whole text give, before and behind the crossing."""
    model = attach(longrope(), [ExitConfig(layer=2)])
    prompt, never = random_ids(prompt_length, 3), {"threshold": 1.0 if mode == "threshold" else 0.0}
    expected = greedy_reference(model, prompt, 14)
    found = generate(make_engine(model), prompt, mode=mode, max_new_tokens=14, ignore_eos=True, adaptive=False, **never)
    assert found.token_ids == expected
    if mode == "lossless":
        assert found.stats.drafted > 3


def test_longrope_does_not_depend_on_how_long_the_text_may_become() -> None:
    model, prompt = longrope(), random_ids(5)
    short = generate(make_engine(model), prompt, mode="full", max_new_tokens=5, ignore_eos=True)
    long = generate(make_engine(model), prompt, mode="full", max_new_tokens=40, ignore_eos=True)
    assert long.token_ids[:5] == short.token_ids


def every_head() -> list[list[ExitConfig]]:
    """All kinds x outputs x candidates x initial values x gate, three to a model. Heads with output "exits" share one
    matrix, so exits with and without candidates are never in one model."""
    groups = []
    for candidates, output in itertools.product((0, 17), OUTPUTS):
        made: list[dict[str, Any]] = []
        for kind, init, gate, branch in itertools.product(
            ("embed", "norm", "mlp", "block", "lens"),
            ("copy", "random", "identity", "closed_form"),
            (False, True),
            (False, True),
        ):
            if kind == "lens" or not (branch or init == "closed_form"):
                made.append(dict(kind=kind, init=init, gate=gate, branch=branch))
        random.Random(f"{candidates} {output}").shuffle(made)
        for at in range(0, len(made), 3):
            groups.append(
                [
                    ExitConfig(layer=layer, output=output, candidates=candidates, rank=5, **values)
                    for layer, values in enumerate(made[at : at + 3], 1)
                ]
            )
    return groups


def compare_heads(
    model: EarlyExitModel,
    ids: list[int],
    make: Make = plain,
    tolerance: float = TOLERANCE,
    reference: EarlyExitModel | None = None,
) -> None:
    """At every exit, reached in passes of one and of several rows, after a prefill: the logits of all rows, against
    those of ``reference`` (None: the model itself)."""
    reference = model if reference is None else reference
    heads = reference.exit_heads()
    expected, taps = reference.exit_logits(ids), reference.taps(torch.tensor([ids]), heads)
    runner = make_runner(make(model), 64)
    driver = Driver(runner)
    driver.prefill(ids[:3])
    for size in (1, 1, 4, 1):
        at = driver.length
        driver.enter(ids[at : at + size])
        for boundary, layer in enumerate(heads, 1):
            arrived, head = driver.advance([], boundary), runner.head(boundary)
            assert head.config.layer == layer
            scores = runner.exit_scores(boundary, arrived, range(size))
            wanted_TV, finite = expected[layer][0, at : at + size], [True] * size
            assert scores.finite == finite
            for i, (logits_K, wanted_V) in enumerate(zip(scores.logits_MK, wanted_TV, strict=True)):
                logits_V = expand(logits_K, head.candidate_ids, model.config.vocab_size)
                assert worst(logits_V, wanted_V) <= tolerance, heads[layer].config
                assert scores.best[i] == int(logits_K.argmax())
                margin = 2 * tolerance * wanted_V[wanted_V.isfinite()].abs().max()
                assert wanted_V[head.token(scores.best[i])] >= wanted_V.max() - margin
                if scores.probability is not None:
                    assert scores.probability[i] == pytest.approx(float(torch.softmax(logits_K, -1).max()), rel=2e-6)
            newest = runner.exit_logits(boundary, arrived, [size - 1])
            assert worst(newest[0], scores.logits_MK[-1]) <= min(tolerance, TOLERANCE)
            if head.has_gate:
                gates = torch.sigmoid(heads[layer].gate_logit(taps[layer].hidden[0, at : at + size])).tolist()
                assert runner.gates(boundary, arrived, range(size)) == pytest.approx(gates, abs=tolerance)
                assert runner.gates(boundary, arrived, [size - 1]) == pytest.approx(gates[-1:], abs=tolerance)
        driver.advance([])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_head(family: str) -> None:
    model, ids = tiny_model(family), random_ids(10)
    for number, configs in enumerate(every_head()):
        compare_heads(attach(model, configs, seed=number), ids)


@torch.no_grad()
def test_heads_that_share_a_matrix_are_packed_once() -> None:
    model = attach(tiny_model("llama"), [ExitConfig(layer=layer, output="exits") for layer in (1, 2)])
    model.add_exits([ExitConfig(layer=3, output="own")])
    heads = {layer: head for (_, layer), head in FusedModel(model, "none").heads.items()}
    assert heads[1].projections[0] is heads[2].projections[0]
    assert heads[3].projections[0] is not heads[1].projections[0]


@torch.no_grad()
def test_an_exit_at_the_last_layer_is_no_exit_while_decoding() -> None:
    model = attach(tiny_model("llama"), [ExitConfig(layer=2), ExitConfig(layer=4, kind="block")])
    engine = make_engine(model)
    assert engine.runner.early == (2,)
    found = generate(engine, [5, 6, 7], mode="threshold", threshold=0.0, max_new_tokens=6, ignore_eos=True)
    assert found.exit_layers == [4, 2, 2, 2, 2, 2]
    assert set(found.trace[1].confidence) == {2}


def test_the_families_cover_what_the_fused_layers_branch_on() -> None:
    configs = [ModelConfig.from_hf(tiny_hf_model(family).config.to_dict()) for family in FAMILIES]
    assert {config.norm_placement for config in configs} == {"pre", "post", "sandwich"}
    assert {config.qk_norm for config in configs} == {None, "head", "full"}
    assert {config.fused_projections for config in configs} == {True, False}
    assert any(not all(config.use_rope) for config in configs)
    assert any(config.rope_local for config in configs)


# ---- rows of several sequences


def company(
    model: EarlyExitModel,
    scatter: int,
    leave_windows: bool,
    seed: int,
    starts: Sequence[int] = (1, 9, 30, 17),
    make: Make = plain,
) -> tuple[list[Tensor], list[Tensor]]:
    """Final and exit logits of sequences that share passes, and those of each alone in blocks that lie together."""
    runner = make_runner(make(model), 4 * sum(starts) + 1024)
    rng, together, alone = random.Random(seed), [], []
    texts = [random_ids(start + 40, seed * 10 + i) for i, start in enumerate(starts)]
    drivers = [Driver(runner, scatter=scatter, leave_windows=leave_windows) for _ in starts]
    singles = [Driver(runner) for _ in starts]
    for driver, single, text, start in zip(drivers, singles, texts, starts, strict=True):
        driver.prefill(text[:start])
        single.prefill(text[:start])
    for _ in range(8):
        members = rng.sample(range(len(starts)), rng.randint(2, len(starts)))
        sizes = {i: rng.choice((1, 1, 2, 5)) for i in members}
        boundary = rng.randint(1, runner.segments)
        moves = [(i, texts[i][drivers[i].length : drivers[i].length + sizes[i]]) for i in members]
        for each, arrived in zip(moves, advance_many([(drivers[i], t) for i, t in moves], boundary), strict=True):
            own = singles[each[0]].advance(each[1], boundary)
            for result, (held, run) in zip((together, alone), ((arrived, runner), (own, runner)), strict=True):
                rows = range(len(held.hidden_MD))
                last = boundary == runner.segments
                result.append(run.final_logits(held, rows) if last else run.exit_logits(boundary, held, rows))
    for driver, single in zip(drivers, singles, strict=True):
        for each in (driver, single):
            if each.pending:
                each.advance([])
        for entry in range(len(runner.pool.stores)):
            stored = driver.stored(entry)
            together.append(stored)
            alone.append(single.stored(entry)[:, :, -stored.shape[2] :])
    return together, alone


@pytest.mark.parametrize("leave_windows", [False, True], ids=["all blocks", "windows"])
@pytest.mark.parametrize("scatter", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_of_several_sequences_are_those_of_each_alone(family: str, scatter: int, leave_windows: bool) -> None:
    """Logits of every exit and of the end, and keys and values, whoever shares the passes and wherever blocks lie."""
    kinds = ("block", "lens", "mlp")
    model = attach(tiny_model(family), [ExitConfig(layer=e, kind=kind) for e, kind in enumerate(kinds, 1)])
    for seed in range(2):
        together, alone = company(model, scatter, leave_windows, seed)
        assert max(map(worst, together, alone)) <= TOLERANCE


@pytest.mark.parametrize("scatter", [1, 30, 60])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
@torch.no_grad()
def test_many_keys_in_scattered_blocks(family: str, scatter: int) -> None:
    """More keys than are copied together: in few runs, which are read where they lie, and in many."""
    model = attach(tiny_model(family, max_position_embeddings=1024), [ExitConfig(layer=2, kind="block")])
    together, alone = company(model, scatter, False, 0, starts=(540, 700))
    assert max(map(worst, together, alone)) <= TOLERANCE
