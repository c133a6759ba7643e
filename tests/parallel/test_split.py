"""The split over pipeline stages: the best of all, owners by the rules, counts equal to those of real modules."""

import re
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.errors import UserError
from exitlm.model.config import ModelConfig
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import ExitConfig
from exitlm.parallel.pipeline.split import Split, StageCost, make_split, stage_costs
from tests.model.families import FAMILIES, tiny_hf_config

KINDS = ("embed", "norm", "mlp", "block", "lens")
OUTPUTS = ("shared", "own", "exits", "low_rank")
WHOLE = re.compile(r"norm\.|lens|gate\.|output_down|(o|down)_proj\.bias")  # what exitlm.parallel.tensor does not cut


def shape(**over: Any) -> ModelConfig:
    """A small Llama, or one of any size."""
    values = {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "tie_word_embeddings": False,
    }
    return ModelConfig.from_hf({**values, **over})


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    layers = draw(st.integers(1, 8))
    depth = draw(st.none() | st.integers(1, layers))
    run = depth or layers
    window = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    model = shape(
        num_hidden_layers=layers,
        vocab_size=draw(st.sampled_from([5, 97, 400])),
        tie_word_embeddings=draw(st.booleans()),
        num_key_value_heads=draw(st.sampled_from([1, 2])),
        **(window if draw(st.booleans()) else {}),
    )
    places = draw(st.sets(st.integers(1, run), max_size=4))
    exits = [
        ExitConfig(
            layer=layer,
            kind=draw(st.sampled_from(KINDS)),
            output=draw(st.sampled_from(OUTPUTS)),
            rank=3,
            gate=draw(st.booleans()),
        )
        for layer in sorted(places)
    ]
    return {
        "model": model,
        "exits": exits,
        "stages": draw(st.integers(1, run)),
        "place": draw(st.sampled_from(["next", "end"])),
        "depth": depth,
        "seq_len": draw(st.sampled_from([0, 16])),
        "frozen": draw(st.booleans()),
        "recompute": draw(st.booleans()),
        "teacher": draw(st.booleans()),
    }


def quality(costs: list[StageCost]) -> tuple[int, int, int]:
    times = [cost.forward_flops + cost.backward_flops for cost in costs]
    return max(times), max(cost.parameters for cost in costs), sum(time**2 for time in times)


@pytest.mark.filterwarnings("ignore:the mlp exit")
@settings(deadline=None)
@given(cases())
def test_balanced_is_the_best_of_all(case: dict[str, Any]) -> None:
    counted = {name: case[name] for name in ("seq_len", "frozen", "recompute", "teacher")}
    layers = case["depth"] or case["model"].num_hidden_layers

    def found(**over: Any) -> tuple[int, int, int]:
        split = make_split(**{**case, **over})
        return quality(stage_costs(case["model"], case["exits"], split, **counted))

    every = []
    for cuts in combinations(range(1, layers), case["stages"] - 1):
        counts = [b - a for a, b in pairwise((0, *cuts, layers))]
        every.append(found(layers_per_stage=counts))
    assert found() == min(every)


def test_a_split_that_takes_minutes_is_left_to_the_user() -> None:
    deep = shape(num_hidden_layers=1000)
    assert make_split(deep, [], 1).bounds == (0, 1000)
    for stages, exits in ((100, []), (4, [ExitConfig(layer=layer) for layer in range(1, 101)])):
        with pytest.raises(UserError, match=r"takes minutes to find; give parallel.layers_per_stage as a list of"):
            make_split(deep, exits, stages)
    assert make_split(deep, [], 100, layers_per_stage=[10] * 100).stages == 100
    assert make_split(shape(num_hidden_layers=128), [], 64).bounds == tuple(range(0, 129, 2))


@pytest.mark.filterwarnings("ignore:the mlp exit")
@settings(deadline=None)
@given(cases())
def test_every_exit_has_the_owner_the_rules_say(case: dict[str, Any]) -> None:
    split = make_split(**case)
    layers = case["depth"] or case["model"].num_hidden_layers
    assert [i for stage in range(split.stages) for i in split.layers(stage)] == list(range(layers))
    assert sorted(layer for stage in range(split.stages) for layer in split.exits(stage)) == [
        e.layer for e in case["exits"]
    ]
    for e in case["exits"]:
        of_layer = next(stage for stage in range(split.stages) if e.layer - 1 in split.layers(stage))
        behind = e.layer in split.bounds[1:-1] and case["place"] == "next" and e.kind != "mlp"
        assert split.owners[e.layer] == of_layer + behind


def test_an_exit_at_a_boundary() -> None:
    def owner(kind: str, place: str) -> int:
        split = make_split(shape(), [ExitConfig(layer=4, kind=kind)], 2, place=place, layers_per_stage=[4, 4])
        return split.owners[4]

    assert (owner("norm", "next"), owner("norm", "end"), owner("mlp", "end")) == (1, 0, 0)
    with pytest.warns(UserWarning, match="the mlp exit 4 at the end of a stage stays there"):
        assert owner("mlp", "next") == 0


@pytest.mark.parametrize(("layers", "hidden", "ffn"), [(24, 2048, 5440), (32, 4096, 10880), (60, 6656, 17728)])
def test_exits_at_a_quarter_and_a_half_balance_the_load(layers: int, hidden: int, ffn: int) -> None:
    """EE-LLM's shapes: each stage but the first has one matrix V x D, and the first has the embedding."""
    model = shape(
        vocab_size=50432, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=32
    )
    exits = [ExitConfig(layer=layers * k // 4, kind="norm", output="own") for k in (1, 2)]
    split = make_split(model, exits, 4, seq_len=2048)
    assert split == Split(bounds=tuple(layers * i // 4 for i in range(5)), owners={layers // 4: 1, layers // 2: 2})
    costs = stage_costs(model, exits, split, 2048)
    assert [cost.head_matrices for cost in costs] == [0, 1, 1, 1]
    assert [cost.has_embedding for cost in costs] == [True, False, False, False]
    assert [cost.has_final_head for cost in costs] == [False, False, False, True]
    assert max(cost.parameters for cost in costs) - min(cost.parameters for cost in costs) <= hidden
    assert costs[1].forward_flops == costs[2].forward_flops == costs[3].forward_flops
    at_end = make_split(model, exits, 4, place="end", layers_per_stage=[layers // 4] * 4)
    assert [cost.head_matrices for cost in stage_costs(model, exits, at_end)] == [1, 1, 0, 1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_counts_are_those_of_the_modules(family: str, tied: bool) -> None:
    biased = {"qwen2": {}, "llama": {"attention_bias": True, "mlp_bias": True}}.get(family, {})
    hf = tiny_hf_config(family, num_hidden_layers=len(KINDS), tie_word_embeddings=tied, **biased)
    model = ModelConfig.from_hf(hf.to_dict())
    for output in OUTPUTS:
        exits = [
            ExitConfig(
                layer=i + 1, kind=kind, output=output, rank=3, gate=kind == "norm", branch=kind == "lens", candidates=11
            )
            for i, kind in enumerate(KINDS)
        ]
        real = EarlyExitModel(model)
        real.add_exits(exits)
        (cost,) = stage_costs(model, exits, make_split(model, exits, 1))
        assert cost.parameters == cost.trained == sum(p.numel() for p in real.parameters())
        whole = [name for name, _ in real.named_parameters() if WHOLE.search(name)]
        assert cost.whole == sum(real.get_parameter(name).numel() for name in whole)
        (frozen,) = stage_costs(model, exits, make_split(model, exits, 1), frozen=True)
        assert frozen.trained == sum(p.numel() for p in real.exit_parameters())
        assert frozen.trained_whole == sum(real.get_parameter(n).numel() for n in whole if n.startswith("exits."))


def test_the_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    T = 16
    model = shape(num_key_value_heads=1)
    exits = [
        ExitConfig(layer=layer, kind=kind, output=output, rank=3, branch=kind == "lens")
        for layer, (kind, output) in enumerate(zip(KINDS, (*OUTPUTS, "shared"), strict=True), 1)
    ]
    real = EarlyExitModel(model)
    real.add_exits(exits)
    ids = torch.zeros(1, T, dtype=torch.long)
    costs = stage_costs(model, exits, make_split(model, exits, 1), 0)
    with FlopCounterMode(display=False) as counter:
        context = real.context_for(1, T)
        taps = real.taps(ids, [*range(1, 9)], context=context)
        real.lm_head(real.final_features(taps[8].hidden))
        for e, head in real.exit_heads().items():
            head.project(head.features(taps[e], context), real.lm_head.weight)
    by_op = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in by_op.items() if "attention" not in str(op))
    assert costs[0].forward_flops * T == products
    attention = stage_costs(model, exits, make_split(model, exits, 1), T)[0].forward_flops - costs[0].forward_flops
    assert attention == (8 + 1) * 4 * 16 * (T + 1) / 2  # causal: a token sees (T + 1) / 2 positions on average


def test_what_a_backward_takes() -> None:
    model, exits = shape(), [ExitConfig(layer=2, kind="norm"), ExitConfig(layer=8, kind="norm")]
    split = make_split(model, exits, 2)
    plain, again, frozen = (
        stage_costs(model, exits, split, 16, **how) for how in ({}, {"recompute": True}, {"frozen": True})
    )
    for a, b, c in zip(plain, again, frozen, strict=True):
        assert a.forward_flops == b.forward_flops == a.layer_flops + a.head_flops
        assert c.forward_flops == c.layer_flops + c.head_flops
        assert a.backward_flops == 2 * a.forward_flops
        assert b.backward_flops == a.backward_flops + a.layer_flops
    head = 2 * 16 * 97
    assert [cost.head_flops for cost in plain] == [head, 2 * head]
    assert [cost.head_flops for cost in frozen] == [head, head]
    assert [cost.backward_flops for cost in frozen] == [2 * head, 2 * head]


def test_only_the_layers_that_are_needed() -> None:
    """Tuning without distillation: no layer above the deepest exit, and no final head."""
    model, exits = shape(), [ExitConfig(layer=2, kind="norm", output="own"), ExitConfig(layer=4, kind="norm")]
    split = make_split(model, exits, 2, depth=4, frozen=True, layers_per_stage=[2, 2])
    assert (split.bounds[-1], split.owners[4], split.final) == (4, 1, False)
    last = stage_costs(model, exits, split, frozen=True)[-1]
    assert not last.has_final_head
    assert last.head_matrices == 2  # the final head's, for the exit that shares it, and the other one's own


@pytest.mark.parametrize(
    ("stages", "counts", "says"),
    [
        (9, "balanced", "use 1 to 8 stages"),
        (0, "balanced", "use 1 to 8 stages"),
        (2, [4, 5], "give 2 positive numbers with the sum 8"),
        (2, [4, 2, 2], "give 2 positive numbers"),
        (2, [8, 0], "or 'balanced'"),
    ],
)
def test_what_cannot_be_is_refused(stages: int, counts: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_split(shape(), [], stages, layers_per_stage=counts)


def test_an_exit_above_the_layers_that_run_is_refused() -> None:
    with pytest.raises(UserError, match="exit layer 5 does not exist"):
        make_split(shape(), [ExitConfig(layer=5)], 2, depth=4)
