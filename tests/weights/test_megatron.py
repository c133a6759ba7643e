"""Import of EE-LLM's checkpoints: bit for bit in any layout, exits that compute what theirs do, and no code run."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import exitlm
from exitlm.cli import main
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel, ExitConfig
from exitlm.weights.megatron import import_megatron
from exitlm.weights.megatron_file import is_megatron
from tests.model.families import VOCAB, tiny_model
from tests.weights.megatron_files import SHARD, Writer, settings_of

IDS = [[5, 17, 3, 88, 41, 9, 60, 2, 2, 71, 30, 11]]


def model_with(kind: str = "norm", *, layers: tuple[int, ...] = (1, 3), untied: bool = False, **over: Any) -> Any:
    """A random float64 Llama with exits of one kind, whose norms are not trivial either."""
    model = tiny_model("llama", **{"tie_word_embeddings": not untied, **over})
    output = "own" if untied else "shared"
    model.add_exits([ExitConfig(layer=n, kind=kind, output=output, init="random") for n in layers])  # type: ignore
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.exit_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def written(
    place: Path, model: EarlyExitModel, *, tp: int = 1, pp: int = 1, spread: list[int] | None = None, **over: Any
) -> Path:
    """``model`` as a Megatron checkpoint at ``place``; the vocabulary's true size is among the settings."""
    return Writer(model, settings_of(model, tp=tp, pp=pp, **{"vocab_size": VOCAB, **over}), spread).write(place)


def imported(source: Path) -> exitlm.LLM:
    out = source.with_name("out")
    import_megatron(source, out)
    return exitlm.load(out)


def assert_same(found: EarlyExitModel, model: EarlyExitModel) -> None:
    """Every tensor bit for bit, so every logit too, and exits of the same shape."""
    theirs, ours = model.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert ours[name].dtype == tensor.dtype
    assert torch.equal(found.logits(IDS), model.logits(IDS))
    mine, yours = found.exit_logits(IDS), model.exit_logits(IDS)
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[layer], yours[layer]) for layer in yours)
    heads = model.exit_heads()
    assert [(layer, head.config.kind, head.config.output) for layer, head in found.exit_heads().items()] == [
        (layer, head.config.kind, head.config.output) for layer, head in heads.items()
    ]


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_layout_gives_back_the_same_bits(tmp_path: Path, tp: int, pp: int, groups: int) -> None:
    if groups % tp:
        groups, heads = 4, 8  # a rank has whole query groups
    else:
        heads = 4
    model = model_with("mlp", untied=pp == 2, num_key_value_heads=groups, num_attention_heads=heads)
    source = written(tmp_path / "in", model, tp=tp, pp=pp)
    assert is_megatron(source)
    assert_same(imported(source).model, model)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(
    ("kind", "pre_exit"),  # not mlp with pre_exit, which EE-LLM refuses
    [
        ("embed", False),
        ("norm", False),
        ("mlp", False),
        ("block", False),
        ("embed", True),
        ("norm", True),
        ("block", True),
    ],
)
def test_every_kind_of_exit(tmp_path: Path, kind: str, pre_exit: bool, untied: bool) -> None:
    # Behind the last layer there is an exit, too, as in EE-Tuning's scripts; before a layer there can be none.
    model = model_with(kind, untied=untied, layers=(1, 2, 3) if pre_exit else (1, 2, 4))
    source = written(tmp_path / "in", model, tp=2, pp=2, pre_exit=pre_exit)
    assert_same(imported(source).model, model)


def test_own_exit_matrices_beside_a_tied_head_go_by_the_order_of_the_settings(tmp_path: Path) -> None:
    model = model_with("norm", untied=True, tie_word_embeddings=True, layers=(1, 2, 3))
    source = written(tmp_path / "in", model, pp=2, exit_layer_nums=[3, 2, 1])
    assert_same(imported(source).model, model)


def test_a_stage_without_layers_and_one_iteration_by_its_directory(tmp_path: Path) -> None:
    # --standalone-embedding-stage, which EE-LLM allows without exits only (megatron/arguments.py).
    model = tiny_model("llama", tie_word_embeddings=True)
    source = written(tmp_path / "in", model, pp=3, spread=[0, 2, 2])
    assert_same(imported(source / "iter_0000007").model, model)
    (source / "iter_0000007").rename(source / "release")
    (source / "latest_checkpointed_iteration.txt").write_text("release\n")
    import_megatron(source, tmp_path / "release")
    assert exitlm.load(tmp_path / "release").exit_layers == []


def test_a_copy_that_differs_from_the_embedding_stays_what_it_is(tmp_path: Path) -> None:
    model = model_with("norm", layers=(1, 2, 4))  # in stages 0, 1 and 3 of 4
    source = written(tmp_path / "in", model, pp=4)
    path = source / "iter_0000007" / "mp_rank_00_001" / SHARD
    other = Writer(model, settings_of(model, tp=1, pp=4, vocab_size=VOCAB)).shard(1, 0)
    other["model"]["word_embeddings_for_head"]["weight"] += 1.0
    torch.save(other, path)
    found = imported(source).model
    assert [head.config.output for head in found.exit_heads().values()] == ["shared", "own", "shared"]
    assert torch.equal(found.exits["2"].output.weight, model.lm_head.weight + 1.0)
    assert found.config.tie_word_embeddings


# --- the maths --------------------------------------------------------------------------------------------------------


def reference(shard: dict[str, Any]) -> tuple[Tensor, dict[int, Tensor]]:
    """EE-LLM's forward pass over one unsplit shard in its own layout: final logits, and exits by their number.

    After model/transformer.py, core/models/common/embeddings/rotary_pos_embedding.py and model/rms_norm.py.
    """
    args, language = shard["args"], shard["model"]["language_model"]
    encoder, words = language["encoder"], language["embedding"]["word_embeddings"]["weight"]
    size, length = args.kv_channels, len(IDS[0])
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    angles = torch.outer(torch.arange(length).double(), 1.0 / 10000 ** (torch.arange(0, size, 2).double() / size))
    angles = torch.cat([angles, angles], -1)[:, None, :]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + args.norm_epsilon) * encoder[name]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def attention(x: Tensor, name: str) -> Tensor:
        mixed = (x @ encoder[f"{name}.query_key_value.weight"].T).view(length, groups, -1)
        query, key, value = mixed.split([mixed.shape[-1] - 2 * size, size, size], dim=-1)
        query = query.reshape(length, -1, size)
        key, value = (part.repeat_interleave(query.shape[1] // groups, 1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", rotated(query), rotated(key)) / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", scores, value).reshape(length, -1) @ encoder[f"{name}.dense.weight"].T

    def mlp(x: Tensor, name: str) -> Tensor:
        gate, up = (x @ encoder[f"{name}.dense_h_to_4h.weight"].T).chunk(2, -1)
        return (F.silu(gate) * up) @ encoder[f"{name}.dense_4h_to_h.weight"].T

    def block(x: Tensor, name: str) -> Tensor:
        x = x + attention(norm(x, f"{name}.input_norm.weight"), f"{name}.self_attention")
        return x + mlp(norm(x, f"{name}.post_attention_norm.weight"), f"{name}.mlp")

    def exit_of(x: Tensor, number: int) -> Tensor:
        name, place = f"layers.{number - 1}", args.exit_layer_nums.index(number)
        x = block(x, f"{name}.exit_block") if args.use_exit_block else x
        x = norm(x, f"{name}.exit_norm.weight") if args.use_exit_norm else x
        own = args.untie_exit_output_weights
        return x @ (language["exit_output_layer"][f"{place}.weight"] if own else words).T

    hidden, exits = words[torch.tensor(IDS[0])], {}
    for number in range(1, args.num_layers + 1):
        name, is_exit = f"layers.{number - 1}", number in args.exit_layer_nums
        if is_exit and args.pre_exit:
            exits[number] = exit_of(hidden, number)
        residual = hidden + attention(norm(hidden, f"{name}.input_norm.weight"), f"{name}.self_attention")
        normed = norm(residual, f"{name}.post_attention_norm.weight")
        branched = is_exit and args.use_exit_mlp
        hidden = residual + mlp(normed, f"{name}.mlp.trunk" if branched else f"{name}.mlp")
        if is_exit and not args.pre_exit:
            exits[number] = exit_of(residual + mlp(normed, f"{name}.mlp.branch") if branched else hidden, number)
    head = language["output_layer"]["weight"] if args.untie_embeddings_and_output_weights else words
    return norm(hidden, "final_norm.weight") @ head.T, exits


@pytest.mark.parametrize("kind", ["embed", "norm", "mlp", "block"])
@pytest.mark.parametrize("untied", [False, True])
def test_it_computes_what_ee_llm_does(tmp_path: Path, kind: str, untied: bool) -> None:
    model, before = model_with(kind, untied=untied), kind in ("norm", "block")
    args = settings_of(model, tp=1, pp=1, pre_exit=before)
    writer = Writer(model, args)
    logits, exits = reference(writer.shard(0, 0))
    found = imported(writer.write(tmp_path / "in"))
    assert found.model.config.vocab_size == args.padded_vocab_size > VOCAB  # the tokenizer alone knows the true size
    torch.testing.assert_close(found.logits(IDS)[0], logits, rtol=1e-9, atol=1e-9)
    for number, expected in exits.items():
        torch.testing.assert_close(found.exit_logits(IDS)[number - before][0], expected, rtol=1e-9, atol=1e-9)


def test_transformers_loads_it_and_it_decodes_with_exits(tmp_path: Path) -> None:
    model = model_with("norm", untied=True).float()
    source = written(tmp_path / "in", model, tp=2, pp=2, tokenizer_type="Llama2Tokenizer")
    assert main(["export", str(source), str(tmp_path / "out")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(theirs(torch.tensor(IDS)).logits, model.logits(IDS), rtol=1e-4, atol=1e-4)
    found = exitlm.load(tmp_path / "out", quant="none")
    assert found.model.config.eos_token_ids == (2,)
    out = found.generate(IDS[0], mode="threshold", threshold=0.0, max_new_tokens=5, exits=[1, 3])
    assert set(out.exit_layers[1:]) == {1}
    assert out.text is None


def test_linear_interpolation_and_another_dtype(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    model = tiny_model("llama", tie_word_embeddings=True, rope_scaling=scaling)
    source = written(tmp_path / "in", model, rotary_seq_len_interpolation_factor=4)
    assert_same(imported(source).model, model)
    import_megatron(source, tmp_path / "half", dtype="bfloat16")
    assert exitlm.load(tmp_path / "half").model.dtype == torch.bfloat16


def test_the_null_tokenizer_has_one_id_more(tmp_path: Path) -> None:
    source = written(tmp_path / "in", model_with(), vocab_size=VOCAB - 1, tokenizer_type="NullTokenizer")
    assert imported(source).model.config.vocab_size == VOCAB


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(source: Path) -> str:
    """The one sentence with which ``source`` is refused; nothing is left behind."""
    with pytest.raises(UserError) as caught:
        import_megatron(source, source.with_name("out"))
    message = str(caught.value)
    assert "\n" not in message
    assert not source.with_name("out").exists()
    return message


@pytest.mark.parametrize(
    ("over", "names"),
    [
        ({"normalization": "LayerNorm"}, "normalization"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type"),
        ({"add_bias_linear": True}, "add_bias_linear"),
        ({"swiglu": False}, "swiglu"),
        ({"num_experts": 4}, "num_experts"),
        ({"rotary_percent": 0.5}, "rotary_percent"),
        ({"transformer_impl": "transformer_engine"}, "transformer_impl"),
        ({"use_exit_mlp": True, "use_exit_norm": False}, "use_exit_mlp"),
        ({"use_exit_mlp": True, "use_exit_block": True}, "use_exit_mlp, use_exit_block, use_exit_norm"),
        ({"use_exit_mlp": True, "pre_exit": True}, "pre_exit"),
        ({"exit_layer_nums": [1, 2], "pre_exit": True}, "embeddings"),
        ({"exit_layer_nums": [1, 1]}, "more than once"),
        ({"exit_layer_nums": [1, 5]}, "exit layer 5"),
        ({"exit_layer_nums": "1 3"}, "exit_layer_nums"),
        ({"untie_embeddings_and_output_weights": True}, "untie_exit_output_weights"),
        ({"hidden_size": None}, "hidden_size"),
        ({"kv_channels": 2.5}, "kv_channels"),
        ({"vocab_size": 500}, "vocab_size"),
        ({"padded_vocab_size": 99}, "padded_vocab_size"),
        ({"tensor_model_parallel_size": "two"}, "tensor_model_parallel_size"),
        ({"tensor_model_parallel_size": 4}, "mp_rank_02"),
        ({"tensor_model_parallel_size": 1}, "holds 2 shards"),
        ({"hidden_size": 16}, "shape"),
        ({"ffn_hidden_size": 24}, "shape"),
        ({"num_layers": 5}, "4 layers"),
        (
            {"num_layers": 20_000},
            "'num_hidden_layers' is 20000 in the model's config, it must be a positive integer of",
        ),
        ({"hidden_size": 10**18}, "'hidden_size' is 1000000000000000000"),
        ({"padded_vocab_size": 10**18, "vocab_size": None}, "'vocab_size' is 1000000000000000000"),
        ({"padded_vocab_size": 10**18}, "shape"),
        ({"norm_epsilon": float("inf")}, "norm_epsilon is inf, it must be a positive number"),
        ({"rotary_base": float("nan")}, "rotary_base is nan, it must be a positive number"),
        ({"rotary_base": 10**400}, "rotary_base is 1000000"),
        ({"rotary_seq_len_interpolation_factor": float("inf")}, "rotary_seq_len_interpolation_factor is inf"),
        ({"tensor_model_parallel_size": 10**30}, "mp_rank_02"),
        ({"exit_layer_nums": [1] * 100_000}, "exit layer 1 is given more than once"),
        ({"use_exit_norm": False}, "exit_norm"),
        ({"untie_exit_output_weights": True}, "exit_output_layer.0.weight"),
    ],
)
def test_settings_that_no_llama_has_or_that_contradict_the_tensors(
    tmp_path: Path, over: dict[str, Any], names: str
) -> None:
    model = model_with()
    told = settings_of(model, tp=2, pp=1, **{"vocab_size": VOCAB, **over})
    writer = Writer(model, settings_of(model, tp=2, pp=1), told=told)
    assert names in refusal(writer.write(tmp_path / "in"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "in", model_with(), tp=1, pp=2)


def shards(source: Path) -> Path:
    return source / "iter_0000007"


def test_a_shard_is_missing(source: Path) -> None:
    shutil.rmtree(shards(source) / "mp_rank_00_001")
    assert "mp_rank_00_001" in refusal(source)
    shutil.rmtree(shards(source) / "mp_rank_00_000")
    assert "no first shard" in refusal(source)


def test_only_an_optimizer(source: Path) -> None:
    (shards(source) / "mp_rank_00_000" / SHARD).rename(shards(source) / "mp_rank_00_000" / "distrib_optim.pt")
    assert "only an optimizer's state" in refusal(source)
    torch.save({"optimizer": {}, "iteration": 7}, shards(source) / "mp_rank_00_000" / SHARD)
    assert "has no 'model'" in refusal(source)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_file(source: Path, keep: float) -> None:
    path = shards(source) / "mp_rank_00_001" / SHARD
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    assert "damaged" in refusal(source)


def test_shards_of_two_iterations(source: Path) -> None:
    model = model_with()
    shard = Writer(model, settings_of(model, tp=1, pp=2)).shard(1, 0)
    torch.save({**shard, "iteration": 8}, shards(source) / "mp_rank_00_001" / SHARD)
    assert "of iteration 8" in refusal(source)


@pytest.mark.parametrize("text", ["", "none", "-3", "0", "8", "release", "7" * 40, "\xff\n7"])
def test_the_tracker_says_something_else(source: Path, text: str) -> None:
    (source / "latest_checkpointed_iteration.txt").write_text(text, encoding="latin-1")
    assert "latest_checkpointed_iteration.txt" in refusal(source)


class Evil:
    """Unpickled by pickle, it would make a directory."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"mkdir {self.place}",)


class Stranger:
    pass


def test_nothing_in_a_pickle_runs(source: Path, tmp_path: Path) -> None:
    path = shards(source) / "mp_rank_00_001" / SHARD
    torch.save({"args": Evil(tmp_path / "run"), "model": {}}, path)
    assert "posix.system" in refusal(source)
    assert not (tmp_path / "run").exists()
    torch.save({"args": Stranger(), "model": {}}, path)
    assert "Stranger" in refusal(source)


def test_what_is_no_weight(source: Path) -> None:
    model = model_with()
    writer = Writer(model, settings_of(model, tp=1, pp=2, vocab_size=VOCAB))
    path, shard = shards(source) / "mp_rank_00_001" / SHARD, writer.shard(1, 0)
    for value, word in ((torch.zeros(3, dtype=torch.int8), "int8"), ("text", "str"), (None, "NoneType")):
        shard["model"]["language_model"]["encoder"]["final_norm.weight"] = value
        torch.save(shard, path)
        assert word in refusal(source)
    shard["model"]["language_model"]["encoder"]["final_norm.weight"] = torch.zeros(32, dtype=torch.float16)
    torch.save(shard, path)
    assert "mixes weights" in refusal(source)
    for change, word in (({"args": {}}, "has no 'args'"), ({"checkpoint_version": 1.0}, "checkpoint_version")):
        torch.save({**writer.shard(1, 0), **change}, path)
        assert word in refusal(source)
    del shard["model"]["language_model"]["encoder"]["final_norm.weight"]
    torch.save(shard, path)
    assert "lacks the tensor 'encoder.final_norm.weight'" in refusal(source)
    shard = writer.shard(1, 0)
    shard["model"]["language_model"]["encoder"]["layers.0.input_norm.bias"] = torch.zeros(32)
    torch.save(shard, path)
    assert "input_norm.bias" in refusal(source)


def test_the_destination_is_taken_and_other_exits_are_asked_for(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        import_megatron(source, tmp_path / "taken")
    assert main(["export", str(source), str(tmp_path / "out"), "--adapter", str(tmp_path)]) == 2
    assert "--adapter" in capsys.readouterr().err
    assert main(["export", str(source), str(tmp_path / "out"), "--dtype", "float16"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
