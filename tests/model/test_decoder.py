"""The stack around the layers: caches, taps, parts of a model, weights, and the bookkeeping of exits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from exitlm.errors import UserError
from exitlm.model import EarlyExitModel, ExitConfig, ModelConfig, Past
from exitlm.model.decoder import attention_mask
from exitlm.model.layers import attend, attend_folded
from tests.model.families import FAMILIES, VOCAB, tiny_hf_config, tiny_model


@pytest.fixture
def model() -> EarlyExitModel:
    return tiny_model("llama")


def some_ids(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, count), generator=torch.Generator().manual_seed(seed))


def close(one: Tensor, other: Tensor) -> bool:
    return bool(torch.allclose(one, other, rtol=0, atol=1e-12))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("stored", [0, 4])
@pytest.mark.parametrize("count", [1, 5])
def test_masks_say_who_sees_whom(count: int, stored: int, window: int | None) -> None:
    valid = torch.ones(2, stored + count, dtype=torch.long)
    valid[1, :2] = 0
    plain, padded = (attention_mask(count, stored, window=window, valid_BS=v) for v in (None, valid))
    for query in range(stored, stored + count):
        for key in range(stored + count):
            near = key <= query and (window is None or key > query - window)
            if plain is not None:
                assert bool(plain[0, 0, query - stored, key]) == near
            assert padded is not None
            assert bool(padded[1, 0, query - stored, key]) == ((near and key >= 2) or key == query)
    everything = window is None or stored + count <= window
    assert (plain is None) == (everything and (count == 1 or stored == 0))


@pytest.mark.parametrize("rows", [1, 3])
def test_folding_groups_into_queries_changes_nothing(rows: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, n, 8, dtype=torch.float64) for heads, n in ((6, 4), (2, 9), (2, 9)))
    mask = (torch.rand(rows, 1, 4, 9) < 0.5) | (torch.arange(9) == 0)
    assert close(attend_folded(query, key, value, mask, 0.3), attend(query, key, value, mask, 0.3))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_in_many_pieces_changes_nothing(family: str) -> None:
    model, ids = tiny_model(family), some_ids(2, 13)
    expected, past, found = model(ids), Past(), []
    for start, end in ((0, 3), (3, 4), (4, 9), (9, 10), (10, 13)):
        found.append(model(ids[:, start:end], past=past))
    assert close(torch.cat(found, 1), expected)
    past.length = 4  # roll back
    assert close(model(ids[:, 4:], past=past), expected[:, 4:])


@torch.no_grad()
def test_padding_does_not_reach_the_row(model: EarlyExitModel) -> None:
    ids = some_ids(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    found = model(padded, mask)
    assert found.isfinite().all()
    assert close(found[:, 3:], model(ids))
    with pytest.raises(UserError, match="attention mask"):
        model(padded, mask[:, 1:])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_taps_are_layer_outputs_and_stop_at_the_highest(family: str) -> None:
    model, ids = tiny_model(family), some_ids(2, 8)
    model.add_exits([ExitConfig(layer=2, kind="mlp", output="own", init="random")])
    taps = model.taps(ids, range(1, 5))
    assert close(model.lm_head(model.final_features(taps[4].hidden)), model(ids))
    two, layer = taps[2], model.model.layers["1"]
    assert two.residual is not None
    assert two.normed is not None
    assert close(two.normed, layer.mlp_input(two.residual))
    assert close(two.hidden, two.residual + layer.mlp_output(layer.mlp(two.normed)))
    assert taps[1].residual is None
    del model.model.layers["3"]  # nothing above the highest tap is needed
    assert close(model.taps(ids, [1, 3])[3].hidden, taps[3].hidden)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_part_of_the_stack_continues_from_hidden_states(family: str) -> None:
    model, ids = tiny_model(family), some_ids(2, 8)
    upper = EarlyExitModel(model.config, layers=[2, 3]).double()
    upper.load_state_dict(model.state_dict(), strict=False)
    taps = model.taps(ids, [2, 4])
    found = upper.taps(None, [2, 4], start_hidden=taps[2].hidden)
    assert close(found[4].hidden, taps[4].hidden)
    assert found[2].hidden is taps[2].hidden
    with pytest.raises(UserError, match="start_hidden"):
        upper.taps(None, [4])


def test_ids_may_be_a_list_a_row_or_rows(model: EarlyExitModel) -> None:
    expected = model.logits([[5, 6, 7]])
    assert expected.shape == (1, 3, VOCAB)
    assert not expected.requires_grad
    assert torch.equal(model.logits([5, 6, 7]), expected)
    assert torch.equal(model.logits(torch.tensor([5, 6, 7], dtype=torch.int32)), expected)


@pytest.mark.parametrize("ids", [[], [[]], [-1], [VOCAB], [0.5], [[1], [2, 3]], ["a"], 5, [True], [[[1]]]])
def test_bad_ids_are_refused(model: EarlyExitModel, ids: Any) -> None:
    with pytest.raises(UserError, match="token ids"):
        model.logits(ids)


def test_random_weights_depend_on_the_seed_alone() -> None:
    config = ModelConfig.from_hf(tiny_hf_config("gemma3_text", attention_bias=True).to_dict())
    one, two, other = (EarlyExitModel(config) for _ in range(3))
    one.initialise(3)
    two.initialise(3)
    other.initialise(4)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
        trivial = "norm" in name or name.endswith("bias")
        assert torch.equal(value, other.state_dict()[name]) == trivial, name
    assert one.model.norm.scale().eq(1).all()
    assert float(one.model.embed_tokens.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("tie", [True, False])
def test_tied_weights_are_one_parameter(tie: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tie)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    names = dict(model.named_parameters())
    assert ("lm_head.weight" in names) != tie
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(model.state_dict())


KINDS = [
    ExitConfig(layer=1, kind="embed"),
    ExitConfig(layer=2, kind="norm", output="own", candidates=10),
    ExitConfig(layer=3, kind="lens", output="low_rank", rank=4),
    ExitConfig(layer=4, kind="mlp", output="exits"),
]


def test_exit_logits_are_keyed_by_layer(model: EarlyExitModel) -> None:
    model.add_exits(KINDS)
    ids = some_ids(2, 5)
    logits = model.exit_logits(ids)
    assert list(logits) == [1, 2, 3, 4]
    assert all(value.shape == (2, 5, VOCAB) and not value.requires_grad for value in logits.values())
    assert int(logits[2].isfinite()[0, 0].sum()) == 10
    # A copy of the final head's parts on the last layer is the final head.
    assert close(model.exit_logits(ids[:1])[4], model.logits(ids[:1]))


def test_an_exit_does_not_depend_on_the_exits_beside_it() -> None:
    together, alone = tiny_model("llama"), tiny_model("llama")
    configs = [ExitConfig(layer=n, kind="mlp", init="random", output="own") for n in (3, 1)]
    together.add_exits(configs, seed=5)
    alone.add_exits(configs[1:], seed=5)
    alone.add_exits(configs[:1], seed=5)
    assert sorted(together.exits) == sorted(alone.exits) == ["1", "3"]
    for name, value in together.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name
    alone.remove_exits([1, 3])
    alone.add_exits(configs, seed=6)
    assert not torch.equal(together.exits["1"].output.weight, alone.exits["1"].output.weight)


def add(*layers: int) -> Callable[[EarlyExitModel], object]:
    return lambda model: model.add_exits([ExitConfig(layer=layer) for layer in layers])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add(5), "5"),
        (add(0), "0"),
        (add(1, 1), "1"),
        (add(1, 2), "layer 2 has an exit already"),
        (lambda model: model.remove_exits([3]), "layer 3 has no exit"),
        (lambda model: model.own_outputs([3]), "exits are: 2"),
        (
            lambda model: model.add_exits(
                [ExitConfig(layer=layer, output="exits", candidates=layer) for layer in (1, 3)]
            ),
            "candidates",
        ),
    ],
)
def test_impossible_exits_are_refused_and_nothing_changes(
    model: EarlyExitModel, change: Callable[[EarlyExitModel], object], said: str
) -> None:
    model.add_exits([ExitConfig(layer=2)])
    before = list(model.state_dict())
    with pytest.raises(UserError, match=said):
        change(model)
    assert list(model.state_dict()) == before


def test_shared_outputs_become_own_copies(model: EarlyExitModel) -> None:
    model.add_exits(
        [
            ExitConfig(layer=1, kind="norm"),
            ExitConfig(layer=2, kind="norm", candidates=10),
            ExitConfig(layer=3, kind="norm", output="exits"),
            ExitConfig(layer=4, kind="norm", output="exits"),
        ],
        candidate_ids=torch.arange(20, 40),
    )
    assert model.exits["3"].output.weight is model.exits["4"].output.weight
    before = model.exit_logits([5, 6])
    model.own_outputs([3])
    assert model.exits["3"].output.weight is not model.exits["4"].output.weight
    model.own_outputs()
    after = model.exit_logits([5, 6])
    assert all(torch.equal(before[layer], after[layer]) for layer in before)
    assert [head.config.output for head in model.exit_heads().values()] == ["own"] * 4
    assert model.exits["2"].output.weight.shape == (10, 32)
    with torch.no_grad():
        model.exits["1"].output.weight.zero_()
    assert model.logits([5, 6]).abs().max() > 0


def test_parameters_are_parted_into_backbone_and_exits(model: EarlyExitModel) -> None:
    backbone = {id(parameter) for parameter in model.parameters()}
    model.add_exits(KINDS)
    assert {id(parameter) for parameter in model.backbone_parameters()} == backbone
    exits = {id(parameter) for parameter in model.exit_parameters()}
    assert exits
    assert not exits & backbone
