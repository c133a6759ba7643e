"""Exit heads: what they compute, how they begin, what they refuse, and the closed form of the lens."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from exitlm.errors import UserError
from exitlm.model import EarlyExitModel, Past
from exitlm.model.exits import ExitConfig, ExitHead, RidgeStatistics, check_candidates, check_layers, top_directions
from tests.model.families import FAMILIES, tiny_model

IDS = torch.tensor([[5, 9, 77, 31, 8, 60, 12], [4, 4, 90, 3, 11, 15, 2]])
KINDS = ("embed", "norm", "mlp", "block", "lens")


def with_exits(model: EarlyExitModel, *configs: ExitConfig, **options: Any) -> EarlyExitModel:
    model.remove_exits(list(model.exit_heads()))
    model.add_exits(configs, **options)
    return model


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


# ---- first values


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_copied_head_reads_its_layer_as_the_model_reads_its_last(family: str) -> None:
    """The norm and the output matrix are the model's, an MLP is its layer's, so that the head adds nothing yet."""
    model = tiny_model(family)
    for layer in (1, 2, 4):
        expected = model.lm_head(model.final_features(model.taps(IDS, [layer])[layer].hidden))
        for kind, output in itertools.product(("norm", "mlp", "lens"), ("shared", "own", "exits")):
            with_exits(model, ExitConfig(layer=layer, kind=kind, output=output))
            assert same(model.exit_logits(IDS)[layer], expected), (kind, output)
        if layer == 4:
            assert same(expected, model.logits(IDS))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "olmo2", "phi3"])
@torch.no_grad()
def test_a_copied_block_in_front_of_the_last_layer_is_the_last_layer(family: str) -> None:
    model = with_exits(tiny_model(family, num_hidden_layers=6), ExitConfig(layer=6, kind="block"))
    last = model.model.layers["5"]
    tap = model.taps(IDS, [6])[6]
    context = model.context_for(*IDS.shape)
    expected = model.final_features(last(tap.hidden, context))
    assert same(model.exits["6"].features(tap, context), expected)


@torch.no_grad()
def test_a_block_has_a_cache_of_its_own() -> None:
    model = with_exits(tiny_model("mistral"), ExitConfig(layer=2, kind="block"))
    head, past, found = model.exits["2"], Past(), []
    for start, end in ((0, 3), (3, 4), (4, 7)):
        context = model.context_for(2, end - start, past=past)
        tap = model.taps(IDS[:, start:end], [2], past=past, context=context)[2]
        found.append(head.project(head.features(tap, context, past), model.lm_head.weight))
        past.advance(end - start)
    assert head.block_key in past._stored
    assert same(torch.cat(found, 1), model.exit_logits(IDS)[2])


@torch.no_grad()
def test_a_branch_begins_as_nothing() -> None:
    model = tiny_model("llama")
    plain = with_exits(model, ExitConfig(layer=2)).exit_logits(IDS)[2]
    branched = with_exits(model, ExitConfig(layer=2, branch=True)).exit_logits(IDS)[2]
    assert same(branched, plain)
    head = model.exits["2"]
    head.mlp.down_proj.weight.fill_(0.1)
    assert not same(model.exit_logits(IDS)[2], plain, 1e-3)


@torch.no_grad()
def test_a_gate_begins_undecided_and_changes_no_logits() -> None:
    model = tiny_model("llama")
    plain = with_exits(model, ExitConfig(layer=2)).exit_logits(IDS)[2]
    gated = with_exits(model, ExitConfig(layer=2, gate=True))
    assert torch.equal(gated.exit_logits(IDS)[2], plain)
    head, hidden = model.exits["2"], torch.randn(3, 4, 32, dtype=torch.float64)
    assert torch.equal(head.gate_logit(hidden), torch.zeros(3, 4, dtype=torch.float64))
    head.gate.weight.fill_(1.0)
    head.gate.bias.fill_(0.5)
    rms = (hidden.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    assert same(head.gate_logit(hidden), (hidden / rms).sum(-1) + 0.5)


@pytest.mark.parametrize(("kind", "output"), list(itertools.product(KINDS, ("shared", "own", "exits", "low_rank"))))
def test_random_values_depend_on_the_seed_and_the_layer_alone(kind: str, output: str) -> None:
    def state(seed: int, *layers: int) -> dict[str, Tensor]:
        model = tiny_model("gemma3_text")
        configs = [
            ExitConfig(layer=layer, kind=kind, output="own" if output == "exits" and layer != 2 else output,
                       init="random", gate=True, rank=3)
            for layer in layers
        ]  # fmt: skip
        with_exits(model, *configs, seed=seed)
        return {name: value for name, value in model.state_dict().items() if name.startswith("exits.2.")}

    first, alone, other = state(0, 1, 2, 3), state(0, 2), state(1, 2)
    assert first.keys() == alone.keys()
    assert all(torch.equal(value, alone[name]) for name, value in first.items())
    matrices = [name for name, value in first.items() if value.dim() == 2 and "gate" not in name]
    assert all(not torch.equal(first[name], other[name]) for name in matrices)
    for name, value in first.items():
        if "norm" in name:
            assert not value.any()  # Gemma's norms are 1 + w
        elif name in matrices:
            assert 0.5 < float(value.std()) / 0.02 < 1.5


@torch.no_grad()
def test_a_layer_given_often_is_named_at_once() -> None:
    with pytest.raises(UserError, match="exit layer 2 is given more than once"):
        check_layers([*range(1, 200_000), *[2] * 200_000], 200_000)


def test_a_low_rank_matrix_is_the_best_of_its_rank() -> None:
    model = tiny_model("llama")
    weight = model.lm_head.weight
    with_exits(model, ExitConfig(layer=2, output="low_rank", rank=6))
    head = model.exits["2"]
    left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
    assert same(head.output_weight(weight), left[:, :6] * sizes[:6] @ right[:6], 1e-9)
    features = torch.randn(2, 3, 32, dtype=torch.float64)
    assert same(head.project(features, weight), features @ head.output_weight(weight).T)
    full = with_exits(model, ExitConfig(layer=2, output="low_rank", rank=32)).exit_logits(IDS)[2]
    assert same(full, with_exits(model, ExitConfig(layer=2)).exit_logits(IDS)[2], 1e-9)
    with pytest.raises(UserError, match="rank 33 exceeds the hidden size 32"):
        model.add_exits([ExitConfig(layer=3, output="low_rank", rank=33)])
    with pytest.raises(UserError, match="exit 3: rank 1000000000000000 exceeds the hidden size 32"):
        model.add_exits([ExitConfig(layer=3, output="low_rank", rank=10**15)])  # refused before it is allocated
    assert "3" not in model.exits
    assert top_directions(torch.zeros(2, 5), 3).shape == (3, 5)  # fewer rows than directions


def test_exits_share_one_matrix() -> None:
    model = tiny_model("llama")
    with_exits(model, *(ExitConfig(layer=layer, output="exits") for layer in (1, 3)), ExitConfig(layer=2, output="own"))
    heads = model.exit_heads()
    assert heads[1].output.weight is heads[3].output.weight
    assert heads[2].output.weight is not heads[1].output.weight
    assert sum(parameter is heads[1].output.weight for parameter in model.exit_parameters()) == 1
    model.add_exits([ExitConfig(layer=4, output="exits")])
    assert model.exits["4"].output.weight is heads[1].output.weight


# ---- candidates


@pytest.mark.parametrize("output", ["shared", "own", "exits", "low_rank"])
@torch.no_grad()
def test_candidates_are_rows_of_the_matrix(output: str) -> None:
    model, ids = tiny_model("llama"), torch.tensor([90, 3, 41, 17, 5, 60])
    full = with_exits(model, ExitConfig(layer=2, kind="norm")).exit_logits(IDS)[2]
    config = ExitConfig(layer=2, kind="norm", output=output, rank=32, candidates=4)
    found = with_exits(model, config, candidate_ids=ids).exit_logits(IDS)[2]
    kept = [3, 17, 41, 90]
    assert model.exits["2"].candidate_ids.tolist() == kept
    assert same(found[..., kept], full[..., kept], 1e-9)
    others = [i for i in range(97) if i not in kept]
    assert bool(found[..., others].isneginf().all())
    assert model.exits["2"].output_weight(model.lm_head.weight).shape == (4, 32)


def test_candidates_default_to_the_first_ids() -> None:
    model = with_exits(tiny_model("llama"), ExitConfig(layer=2, candidates=5))
    assert model.exits["2"].candidate_ids.tolist() == [0, 1, 2, 3, 4]
    assert "exits.2.candidate_ids" in model.state_dict()
    assert with_exits(model, ExitConfig(layer=2)).exits["2"].candidate_ids is None


@pytest.mark.parametrize(
    ("ids", "says"),
    [([1, 2], "only 2 ids"), ([1, 2, 2], "more than once"), ([1, 2, 97], r"0\.\.96"), ([-1, 1, 2], r"0\.\.96")],
)
def test_candidates_that_cannot_be(ids: list[int], says: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=says):
        model.add_exits([ExitConfig(layer=2, candidates=3)], candidate_ids=torch.tensor(ids))
    with pytest.raises(UserError, match="98 candidates, but the vocabulary has 97"):
        model.add_exits([ExitConfig(layer=2, candidates=98)])
    assert not model.exits


def test_heads_can_be_built_without_memory() -> None:
    check_candidates(torch.zeros(3, device="meta"), 1, 97)
    with torch.device("meta"):
        for kind in KINDS:
            config = ExitConfig(layer=2, kind=kind, gate=True, candidates=7)
            head = ExitHead(config, tiny_model("llama").config)
            assert all(parameter.device.type == "meta" for parameter in head.parameters())


# ---- refusals


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "lense"}, "did you mean 'lens'"),
        ({"output": "share"}, "did you mean 'shared'"),
        ({"init": "closed-form"}, "did you mean 'closed_form'"),
        ({"kind": "norm", "branch": True}, "branch belongs to kind 'lens'"),
        ({"kind": "mlp", "init": "closed_form"}, "closed_form' belongs to kind 'lens'"),
        ({"rank": 0}, "rank"),
        ({"candidates": -1}, "candidates"),
    ],
)
def test_configurations_that_cannot_be(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as found:
        ExitConfig(layer=8, **values)
    assert "exit 8" in str(found.value)


def test_layers_that_cannot_be() -> None:
    check_layers([3, 1, 4], 4)
    for layers, says in (([0], "layer 0"), ([1, 5], "layers 1 to 4"), ([2, 3, 2], "layer 2 is given more than once")):
        with pytest.raises(UserError, match=says):
            check_layers(layers, 4)


# ---- the closed form


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64) + 0.7
    z = x @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + 2.0
    return x, z + 0.1 * torch.randn(count, 6, generator=generator, dtype=torch.float64)


def fitted(x: Tensor, z: Tensor, ridge: float, pieces: int = 1) -> tuple[Tensor, Tensor]:
    statistics = RidgeStatistics(x.shape[1])
    for part_x, part_z in zip(x.chunk(pieces), z.chunk(pieces), strict=True):
        statistics.add(part_x, part_z)
    assert statistics.count == len(x)
    return statistics.solve(ridge)


def test_the_closed_form_is_least_squares_with_an_offset() -> None:
    x, z = rows(200)
    slope, offset = fitted(x, z, 0.0)
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(200, 1, dtype=torch.float64)], 1), z).solution
    assert same(slope, expected[:6].T, 1e-8)
    assert same(offset, expected[6], 1e-8)


def test_the_ridge_is_relative_to_the_spread_of_the_inputs() -> None:
    """Against the definition, and unchanged when the inputs are scaled; a large one forgets the slope, not the mean."""
    x, z = rows(200)
    centred, target = x - x.mean(0), z - z.mean(0)
    gram = centred.T @ centred
    penalty = 0.3 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    slope, offset = fitted(x, z, 0.3)
    assert same(slope, torch.linalg.solve(gram + penalty, centred.T @ target).T, 1e-9)
    assert same(x.mean(0) @ slope.T + offset, z.mean(0), 1e-9)
    scaled, _ = fitted(100 * x, z, 0.3)
    assert same(100 * scaled, slope, 1e-9)
    flat, mean = fitted(x, z, 1e12)
    assert float(flat.abs().max()) < 1e-9
    assert same(mean, z.mean(0), 1e-6)


def test_the_closed_form_does_not_depend_on_how_rows_are_cut() -> None:
    x, z = rows(120)
    whole, cut = fitted(x, z, 1e-3), fitted(x, z, 1e-3, pieces=7)
    assert same(cut[0], whole[0], 1e-10)
    assert same(cut[1], whole[1], 1e-10)


def test_short_floats_are_summed_in_float64() -> None:
    x, z = rows(50)
    statistics = RidgeStatistics(6)
    statistics.add(x.bfloat16(), z.bfloat16())
    assert torch.equal(statistics.gram, x.bfloat16().double().T @ x.bfloat16().double())
    assert statistics.solve()[0].dtype == torch.float64


def test_inputs_that_do_not_span_the_space_have_a_solution() -> None:
    x = torch.zeros(9, 6, dtype=torch.float64)
    x[:, 0] = torch.arange(9)
    slope, offset = fitted(x, 2 * x + 1, 1e-6)
    assert bool(slope.isfinite().all())
    assert same(x @ slope.T + offset, 2 * x + 1, 1e-4)


def test_too_little_data_is_refused() -> None:
    statistics = RidgeStatistics(4)
    statistics.add(torch.ones(1, 4), torch.ones(1, 4))
    with pytest.raises(UserError, match="at least 2 tokens"):
        statistics.solve()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_fitted_lens_agrees_with_the_model_more_than_the_identity(family: str) -> None:
    model = with_exits(tiny_model(family), ExitConfig(layer=3, init="closed_form"))
    generator = torch.Generator().manual_seed(0)
    text, other = (torch.randint(3, 97, (24, 32), generator=generator) for _ in range(2))
    head, taps = model.exits["3"], model.taps(text, [3, 4])
    statistics = RidgeStatistics(32)
    statistics.add(head.unit(taps[3].hidden).flatten(0, 1), model.final_features(taps[4].hidden).flatten(0, 1))

    def agreement() -> float:
        return float((model.exit_logits(other)[3].argmax(-1) == model.logits(other).argmax(-1)).double().mean())

    before = agreement()
    slope, offset = statistics.solve()
    head.lens.weight.copy_(slope)
    head.lens.bias.copy_(offset)
    assert agreement() > before + 0.05
