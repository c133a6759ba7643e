"""What a layout holds: counts equal those of the parts that ranks really have, and times those of bytes and tables."""

import dataclasses
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist

from exitlm.decode.kernels.fused import FusedModel
from exitlm.decode.kernels.ranks import Ranks
from exitlm.decode.kernels.tensor_model import local_part
from exitlm.decode.layout import Layout, WeightBytes, describe, make_layout
from exitlm.decode.pricing.costs import Costs
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel, ModelConfig
from exitlm.model.exits import ExitConfig, ExitHead
from exitlm.parallel.tensor import check_tensor
from tests.decode.tensor_cases import KINDS, OUTPUTS, cuttable
from tests.model.families import tiny_hf_config
from tests.parallel.launch import launch

EQUAL = WeightBytes(layers=8, exits=8, heads=8, embedding=8)
LLAMA = ModelConfig.from_hf(
    {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 500, "max_position_embeddings": 4096,
    }
)  # fmt: skip
LAYER = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 96 + 2 * 64


def drawn(seed: int) -> tuple[ModelConfig, list[ExitConfig]]:
    """A model of sizes that two ranks can share, and exits of any kind."""
    rng = random.Random(f"layout {seed}")
    over: dict[str, Any] = {"vocab_size": 96, "tie_word_embeddings": rng.random() < 0.5}
    family = cuttable()[seed % len(cuttable())]
    if family in ("llama", "smollm3", "qwen3"):
        over["attention_bias"] = rng.random() < 0.5
    if family in ("llama", "smollm3"):
        over["mlp_bias"] = rng.random() < 0.5
    candidates = rng.choice((0, 18))
    exits = [
        ExitConfig(
            layer=layer,
            kind=rng.choice(KINDS),
            output=(output := rng.choice(OUTPUTS)),
            rank=5,
            candidates=candidates if output == "exits" else rng.choice((0, 18)),
            gate=rng.random() < 0.5,
        )
        for layer in sorted(rng.sample(range(1, 5), rng.randint(1, 4)))
    ]
    return ModelConfig.from_hf(tiny_hf_config(family, **over).to_dict()), exits


def stage(config: ModelConfig, exits: list[ExitConfig], layers: range) -> EarlyExitModel:
    """The layers of a stage with their exits."""
    model = EarlyExitModel(config, layers)
    mine = [e for e in exits if layers.start < e.layer <= layers.stop]
    for e in mine:
        head = ExitHead(e, config)
        model._share_output(head, [*model.exit_heads().values()])
        model.exits[str(e.layer)] = head
    return model


def counted(cases: list[tuple[ModelConfig, list[ExitConfig], tuple[int, ...]]]) -> list[list[int]]:
    """Parameters that this rank has of the stages of each case, each once."""
    group, out = dist.group.WORLD, []
    assert group is not None
    for config, exits, bounds in cases:
        sizes = []
        for first, last in pairwise(bounds):
            model = stage(config, exits, range(first, last))
            part = local_part(model, range(first, last), Ranks(group), torch.device("cpu"))
            mine = [head.config for head in model.exit_heads().values()]
            if first:
                del part.model.embed_tokens
            if last < config.num_hidden_layers:
                del part.model.norm
                if all(e.candidates or e.output != "shared" for e in mine):
                    del part.lm_head
            sizes.append(sum(p.numel() for p in part.parameters()))
        out.append(sizes)
    return out


@pytest.mark.parametrize("tensor", [1, 2])
def test_parameters_are_those_of_real_parts(tensor: int) -> None:
    """All families that can be cut, all kinds of exits, one to three stages; tied matrices once on each."""
    cases, expected = [], []
    for seed in range(24):
        config, exits = drawn(seed)
        bounds = [(0, 4), (0, 1, 4), (0, 2, 3, 4)][seed % 3]
        found = make_layout(
            config, [exits], pipeline=len(bounds) - 1, tensor=tensor, weights=EQUAL, bounds=bounds, context=64
        )
        cases.append((config, exits, bounds))
        expected.append([each.parameters for each in found.stages])
        assert [each.weight_bytes for each in found.stages] == [8 * each.parameters for each in found.stages]
        if len(bounds) == 2 and tensor == 1:
            assert found.parameters == found.stages[0].parameters
    assert launch(tensor, counted, cases)[0] == expected


@pytest.mark.parametrize("family", cuttable())
def test_keys_and_values_are_those_of_all_entries(family: str) -> None:
    """Of layers and of block exits, whole texts or windows, cut by heads; each on the stage whose rows fill it."""
    config = ModelConfig.from_hf(tiny_hf_config(family).to_dict())
    exits = [ExitConfig(layer=1, kind="block"), ExitConfig(layer=2), ExitConfig(layer=3, kind="block")]
    model = EarlyExitModel(config)
    model.add_exits(exits)
    entries = FusedModel(model, "none").entries()
    sizes = [2 * 2 * 12 * 4 * min(40, entry.window or 40) for entry in entries]
    layers, (first, third) = sizes[:4], sizes[4:]
    for tensor in (1, 2):
        known: dict[str, Any] = dict(
            pipeline=2, tensor=tensor, weights=EQUAL, kv_itemsize=4, sequences=3, context=40, bounds=(0, 1, 4)
        )
        found = make_layout(config, [exits], **known)
        assert [each.kv_bytes * tensor for each in found.stages] == [
            3 * (layers[0] + first),
            3 * (sum(layers[1:]) + third),
        ]


def llama(**over: Any) -> Layout:
    """The small Llama with an exit at a quarter and one at a half of its depth."""
    known: dict[str, Any] = dict(
        adapters=[[ExitConfig(layer=2, kind="norm"), ExitConfig(layer=4, kind="embed", output="own", gate=True)]],
        pipeline=2,
        bounds=(0, 4, 8),
        weights=WeightBytes(layers=1, exits=2, heads=4, embedding=8),
    )
    return make_layout(LLAMA, **{**known, **over})


def test_bytes_follow_from_formats() -> None:
    """The final head's matrix is also where an exit reads it; an exit between two stages is on the first."""
    found = llama(context=1000, sequences=2)
    first, second = found.stages
    matrix, own = 500 * 64, 500 * 64 + 65
    assert (first.exits, second.exits, first.layers, second.layers) == ((2, 4), (), range(4), range(4, 8))
    assert first.parameters == 4 * LAYER + 3 * matrix + 65 + 64
    assert first.weight_bytes == 4 * LAYER + 2 * (64 + own) + 4 * matrix + 8 * matrix
    assert second.weight_bytes == 4 * LAYER + 4 * matrix + 8 * 64
    assert (first.matrices, second.matrices) == (2, 1)
    text = 4 * 2 * 2 * 16 * 2 * 1000
    assert [each.kv_bytes for each in found.stages] == [2 * text] * 2
    assert first.read_bytes == 4 * LAYER + text
    assert second.read_bytes == 4 * LAYER + 4 * matrix + text
    assert (first.test_bytes, second.test_bytes) == (2 * 64 + 4 * matrix + 2 * own, 0)
    assert found.parameters == 8 * LAYER + 3 * matrix + 65 + 64 + 64


def test_a_tied_matrix_is_there_twice_where_it_has_two_formats() -> None:
    tied = dataclasses.replace(LLAMA, tie_word_embeddings=True)
    (one,) = make_layout(tied, [], weights=EQUAL).stages
    (two,) = make_layout(tied, [], weights=WeightBytes.of("fp16", 4)).stages
    assert one.parameters == two.parameters == 8 * LAYER + 500 * 64 + 64
    assert one.weight_bytes == 8 * one.parameters
    assert two.weight_bytes == 2 * 8 * LAYER + (2 + 4) * 500 * 64 + 4 * 64


def test_every_adapter_has_its_exits() -> None:
    """Two at one layer; candidates are a copy of the final head's rows, which need no whole one."""
    one, other = [ExitConfig(layer=2, kind="norm", candidates=50)], [ExitConfig(layer=2, kind="norm", output="own")]
    plain, both = llama(adapters=[]), llama(adapters=[one, other])
    assert both.stages[0].exits == (2,)
    assert both.stages[0].matrices == 2
    assert both.stages[0].parameters - plain.stages[0].parameters == 64 + 50 * 64 + 64 + 500 * 64
    assert both.stages[1] == plain.stages[1]


@pytest.mark.parametrize(
    ("quant", "layers", "exits"), [("none", 2, 2), ("int4", 0.625, 1), ("int8", 1, 1), ("q8_0", 1.0625, 1.0625)]
)
def test_bytes_of_formats(quant: str, layers: float, exits: float) -> None:
    found = WeightBytes.of(quant, 2)
    assert (found.layers, found.exits) == (layers, exits)


def test_seconds_are_bytes_by_bandwidth_or_those_of_a_table() -> None:
    found = llama(context=100, tensor=2)
    read = found.read_seconds(1e6)
    assert [each.layers for each in read] == pytest.approx([each.read_bytes / 1e6 for each in found.stages])
    assert [each.tests for each in read] == pytest.approx([each.test_bytes / 1e6 for each in found.stages])
    table = Costs(
        rows=(1, 2), layer=((3.0, 4.0), (5.0, 6.0)), head=(7.0, 8.0), test={2: 1.0, 4: 2.0}, draft={2: 10.0, 4: 20.0},
        num_hidden_layers=8, contexts=(50, 150), step=0.5,
    )  # fmt: skip
    slow = dataclasses.replace(table, speed=10.0)
    first, second = found.table_seconds([table, slow])
    assert (first.layers, first.tests) == pytest.approx((4 * 4.0 / 2 + 0.5, 30.0 / 2))
    assert (second.layers, second.tests) == pytest.approx((10 * ((4 * 4.0 + 7.0) / 2 + 0.5), 0.0))


def test_an_exit_at_the_last_layer_is_held_and_never_tested() -> None:
    known: dict[str, Any] = dict(adapters=[[ExitConfig(layer=8, kind="block", output="own")]])
    last, plain = llama(**known).stages[1], llama(adapters=[]).stages[1]
    assert last.weight_bytes > plain.weight_bytes
    assert last.kv_bytes == plain.kv_bytes // 4 * 5
    assert last.test_bytes == 0


def test_what_is_printed() -> None:
    found = llama(context=1000, sequences=2, tensor=2)
    text = describe(found)
    assert "343 k parameters; exits after 2, 4" in text
    assert "4 = pipeline 2 x tensor 2, with the keys and values of 2 texts of 1000 tokens" in text
    assert "ms" not in text
    rows = {line.split()[0]: line.split() for line in text.splitlines()}
    assert rows["0-1"][1:9] == ["1-4", "2", "4", "in", "+", "2", "out", "110"]
    assert rows["2-3"][1:6] == ["5-8", "-", "1", "out", "78"]
    timed = describe(found, bandwidth=1e9)
    deep = sum(each.read_bytes for each in found.stages) / 1e6
    assert f"{deep:.3g} ms a token of one text" in timed
    assert "at 1 GB/s a process" in timed
    slowest = (found.stages[0].read_bytes + found.stages[0].test_bytes) / 1e6
    assert f"{slowest:.3g} ms from pass to pass where all stages are busy" in timed
    alone = make_layout(LLAMA, [], weights=EQUAL)
    assert "exits after no layer" in describe(alone)
    assert "1 text of 2048 tokens" in describe(alone)
    assert "pass to pass" not in describe(alone, bandwidth=1e9)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"pipeline": 9, "bounds": None}, "9 pipeline stages can't share 8 layers"),
        ({"pipeline": 0, "bounds": None}, "pipeline is 0, but must be"),
        ({"tensor": 4}, "must divide num_key_value_heads = 2; use 1 or 2"),
        ({"bounds": (0, 4, 7)}, "does not share 8 layers among 2 stages"),
        ({"context": 5000}, "the context is 5000 tokens, but the model takes 4096"),
        ({"sequences": 0}, "the number of texts is 0"),
        ({"adapters": [[ExitConfig(layer=9)]]}, "exit layer 9 does not exist"),
    ],
)
def test_what_cannot_be_is_refused(over: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        llama(**over)


def test_what_training_refuses_is_refused_in_the_same_words() -> None:
    config = ModelConfig.from_hf(tiny_hf_config("phi3").to_dict())
    with pytest.raises(UserError) as caught:
        check_tensor(config, [], 2, True, 8)
    with pytest.raises(UserError) as again:
        make_layout(config, [], tensor=2, weights=EQUAL)
    assert str(again.value) == str(caught.value)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bandwidth_must_be_one(bandwidth: float) -> None:
    with pytest.raises(UserError, match="must be a positive number"):
        describe(llama(), bandwidth=bandwidth)
