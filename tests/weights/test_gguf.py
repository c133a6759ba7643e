"""GGUF files written from random transformers models: the tensors come back exactly, and so do the logits."""

import contextlib
import json
import math
import multiprocessing
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from exitlm.errors import UserError
from exitlm.model.rope import inverse_frequencies
from exitlm.weights import describe, load_model, open_checkpoint
from exitlm.weights.gguf import converted
from exitlm.weights.gguf_config import ARCHITECTURES, hf_name, rope_scaling
from exitlm.weights.gguf_file import TYPES, GGUFFile, shortest
from tests.model.families import tiny_hf_model
from tests.weights.gguf_files import write_gguf

EPSILON, PATTERN = "llama.attention.layer_norm_rms_epsilon", "attention.sliding_window_pattern"
IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 2, 2, 71, 30, 11]])
GEMMA = {
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "num_hidden_layers": 6,
    "query_pre_attn_scalar": 12,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def reference(family: str, **over: Any) -> transformers.PreTrainedModel:
    model = tiny_hf_model(family, **over)
    with torch.no_grad():  # so that Gemma's 1 + w is exact
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_((parameter * 1024).round() / 1024)
    return model


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def check(path: Path, model: transformers.PreTrainedModel, expected: dict[str, torch.Tensor]) -> None:
    """The loaded model has exactly the expected tensors, and computes what transformers does with them."""
    loaded = load_model(path, dtype="float32")
    state = loaded.state_dict()
    tied = model.config.tie_word_embeddings
    assert set(state) - set(expected) <= ({"lm_head.weight"} if tied else set())
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    model.load_state_dict(expected, strict=False)
    model.tie_weights()
    theirs = model(IDS).logits
    assert_same_logits(loaded.logits(IDS), theirs)
    # The conversion is a directory that transformers loads as it is.
    again = transformers.AutoModelForCausalLM.from_pretrained(converted(path), dtype=torch.float32).eval()
    assert_same_logits(again(IDS).logits, theirs)


@pytest.mark.parametrize(
    ("family", "over"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 8}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        ("mistral", {}),
        ("qwen2", {"use_sliding_window": False, "head_dim": 8}),
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("gemma3_text", GEMMA),
    ],
)
def test_float32_is_exact(tmp_path: Path, family: str, over: dict[str, Any]) -> None:
    model = reference(family, **over)
    path = tmp_path / "model.gguf"
    expected = write_gguf(path, model)
    for name, tensor in expected.items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    check(path, model, expected)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"])
def test_every_type_is_what_it_stands_for(tmp_path: Path, kind: str) -> None:
    model = reference("llama", hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=2)
    path = tmp_path / "model.gguf"
    check(path, model, write_gguf(path, model, kind=kind))
    half = {"F16": torch.float16, "BF16": torch.bfloat16}
    assert open_checkpoint(path).dtype == half.get(kind, torch.float32)
    assert describe(path)["tensors"][kind] > 0


def test_quantised_gemma(tmp_path: Path) -> None:
    model = reference("gemma3_text", hidden_size=64, intermediate_size=64, **GEMMA)
    check(tmp_path / "m.gguf", model, write_gguf(tmp_path / "m.gguf", model, kind="Q8_0"))


def test_a_projection_bias_without_an_output_bias(tmp_path: Path) -> None:
    model = reference("llama", attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("o_proj.bias"):
                parameter.zero_()
    absent = tuple(name for name in model.state_dict() if name.endswith("o_proj.bias"))
    expected = write_gguf(tmp_path / "m.gguf", model, leave_out=absent)
    check(tmp_path / "m.gguf", model, {**expected, **{name: model.state_dict()[name] for name in absent}})


def llama3_factors(head_dim: int, settings: dict[str, Any]) -> np.ndarray:
    """As llama.cpp's converter writes them."""
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * settings["rope_theta"] ** (i / head_dim)
        context, low, high = (
            settings["original_max_position_embeddings"],
            settings["low_freq_factor"],
            settings["high_freq_factor"],
        )
        if wave < context / high:
            factors.append(1.0)
        elif wave > context / low:
            factors.append(settings["factor"])
        else:
            smooth = (context / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / settings["factor"] + smooth))
    return np.array(factors, np.float32)


def test_llama3_scaling_is_recovered(tmp_path: Path) -> None:
    model = reference("llama", rope_parameters=LLAMA3, head_dim=32)
    factors = llama3_factors(32, LLAMA3)
    assert ((factors > 1) & (factors < 8)).any()
    expected = write_gguf(tmp_path / "m.gguf", model, rope_factors=factors)
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert {**config["rope_scaling"], "rope_theta": config["rope_theta"]} == LLAMA3
    check(tmp_path / "m.gguf", model, expected)


@pytest.mark.parametrize(("theta", "factor", "head_dim", "context"), [(5e5, 8.0, 128, 8192), (5e5, 32.0, 64, 8192)])
def test_the_scaling_of_released_llamas_is_recovered(theta: float, factor: float, head_dim: int, context: int) -> None:
    settings = LLAMA3 | {"rope_theta": theta, "factor": factor, "original_max_position_embeddings": context}
    found = rope_scaling(llama3_factors(head_dim, settings), theta, 131072, "file")
    assert found is not None
    assert {**found, "rope_theta": theta} == settings


def test_other_rope_factors_are_carried_as_they_are(tmp_path: Path) -> None:
    model = reference("llama")
    factors = np.array([1.0, 1.25, 1.0, 3.7, 2.2, 9.5], np.float32)
    expected = write_gguf(tmp_path / "m.gguf", model, rope_factors=factors)
    loaded = load_model(tmp_path / "m.gguf")
    plain = inverse_frequencies(load_model(_plain(tmp_path, model)).config.rope, torch.float64)
    scaled = inverse_frequencies(loaded.config.rope, torch.float64)
    assert np.allclose(np.array(plain) / np.array(scaled), factors, rtol=1e-7)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq / torch.from_numpy(factors)
    check(tmp_path / "m.gguf", model, expected)


def _plain(tmp_path: Path, model: transformers.PreTrainedModel) -> Path:
    write_gguf(tmp_path / "plain.gguf", model)
    return tmp_path / "plain.gguf"


def test_factors_of_one_are_no_scaling() -> None:
    assert rope_scaling(np.ones(8, np.float32), 1e4, 128, "file") is None
    with pytest.raises(UserError, match="not positive"):
        rope_scaling(np.array([1.0, -1.0], np.float32), 1e4, 128, "file")


# --- the cache ------------------------------------------------------------------------------------------------------


def test_converted_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, reference("llama", seed=0))
    first = open_checkpoint(path)
    before = (first.directory / "model.safetensors").stat().st_mtime_ns
    digest = first.digest()
    assert (open_checkpoint(path).directory / "model.safetensors").stat().st_mtime_ns == before
    write_gguf(path, reference("llama", seed=1))  # the same size
    assert open_checkpoint(path).digest() != digest


def test_a_damaged_conversion_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, reference("llama"))
    checkpoint = open_checkpoint(path)
    digest, weights = checkpoint.digest(), checkpoint.directory / "model.safetensors"
    os.truncate(weights, 1000)
    assert open_checkpoint(path).digest() == digest
    assert weights.stat().st_size > 1000


def test_the_digest_does_not_depend_on_where_it_was_computed(tmp_path: Path) -> None:
    """The one recorded while converting is the one of the files, and of the tensors in memory."""
    from exitlm.weights.adapter import digest_of_base

    write_gguf(tmp_path / "m.gguf", reference("llama"))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    recorded = checkpoint.digest()
    model = load_model(checkpoint)
    (checkpoint.directory / "conversion.json").unlink()
    assert checkpoint.digest() == recorded
    model.checkpoint = None
    assert digest_of_base(model) == recorded


def test_nothing_is_left_when_the_conversion_fails(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    write_gguf(tmp_path / "m.gguf", reference("llama"))
    monkeypatch.setattr("exitlm.weights.gguf.write_tensors", full)
    with pytest.raises(UserError, match="No space left"):
        load_model(tmp_path / "m.gguf")
    assert list((cache / "gguf").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", reference("llama"))
    monkeypatch.setenv("EXITLM_CACHE", str(tmp_path / "m.gguf"))
    with pytest.raises(UserError, match="set EXITLM_CACHE to a directory that can be"):
        load_model(tmp_path / "m.gguf")


def _digest(path: Path, queue: Any) -> None:
    queue.put(open_checkpoint(path).digest())


def test_several_processes_convert_at_once(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", reference("llama"))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_digest, args=(tmp_path / "m.gguf", queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert len({queue.get(timeout=60) for _ in workers}) == 1
    for worker in workers:
        worker.join(10)


# --- bad files ------------------------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, reference("llama"))
    whole = path.read_bytes()
    for length in (5, 23, 24, 100, 600, 1500, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        assert "truncated or damaged" in refused(path), length
    path.write_bytes(b"")
    assert "no GGUF file" in refused(path)


def test_garbage_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "m.gguf"
    write_gguf(path, reference("llama"))
    whole = bytearray(path.read_bytes())
    for _ in range(50):  # any damage of the header is a sentence, never another exception
        broken = bytearray(whole)
        for at in rng.integers(8, 1200, 3):
            broken[at] = rng.integers(0, 256)
        path.write_bytes(broken)
        with contextlib.suppress(UserError):
            describe(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale"),
        ({"llama.rope.scaling.type": "yarn"}, "RoPE scaling 'yarn'"),
        ({"split.count": 3}, "one part of a split GGUF"),
        ({"llama.attention.causal": False}, "llama.attention.causal"),
        ({"split.count": "two"}, "one part of a split GGUF"),
        ({EPSILON: math.inf}, f"'{EPSILON}' is inf, it must be a positive number"),
        ({EPSILON: math.nan}, f"'{EPSILON}' is nan, it must be a positive number"),
        ({EPSILON: -1.0}, f"'{EPSILON}' is -1.0, it must be a positive number"),
        ({EPSILON: 0.0}, f"'{EPSILON}' is 0.0, it must be a positive number"),
        ({"llama.rope.freq_base": math.inf}, "'llama.rope.freq_base' is inf, it must be a positive number"),
        ({"llama.rope.freq_base": "x" * 100}, "'llama.rope.freq_base' is 'xxxxx"),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": math.inf},
            "'llama.rope.scaling.factor' is inf, it must be a positive number",
        ),
        ({"llama.attention.head_count": 10**9}, "'num_attention_heads' is 1000000000 in the model's config"),
        ({"llama.attention.head_count_kv": 0}, "'llama.attention.head_count_kv' is 0, it must be a positive integer"),
        ({"llama.feed_forward_length": 4 * 10**9}, "'intermediate_size' is 4000000000 in the model's config"),
        ({"llama.context_length": 4 * 10**9}, "'max_position_embeddings' is 4000000000 in the model's config"),
        ({"llama.block_count": 20_000}, "tensors for 20000 layers"),
        ({"llama.embedding_length": "large"}, "'llama.embedding_length' is 'large', it must be a positive integer"),
        ({"tokenizer.ggml.eos_token_id": [1, 2]}, "'tokenizer.ggml.eos_token_id' is [1, 2], it must be a token id"),
    ],
)
def test_what_would_change_the_maths_is_named(
    tmp_path: Path, cache: Path, metadata: dict[str, Any], message: str
) -> None:
    write_gguf(tmp_path / "m.gguf", reference("llama"), metadata=metadata)
    assert message in refused(tmp_path / "m.gguf")
    assert not any((cache / "gguf").glob("*"))
    assert message in str(describe(tmp_path / "m.gguf")["supported"])


def test_a_pattern_of_windows_that_is_none(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", reference("gemma3_text", **GEMMA), metadata={f"gemma3.{PATTERN}": 0})
    assert f"'gemma3.{PATTERN}' is 0, it must be a positive integer" in refused(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", reference("gemma3_text", **GEMMA), metadata={f"gemma3.{PATTERN}": [True]})
    assert "layer_types has 1 entries for 6 layers" in refused(tmp_path / "m.gguf")


def header(path: Path, *parts: bytes, keys: int, tensors: int = 0, size: int = 0) -> Path:
    """A file of ``size`` bytes, zeros in the end, that begins with a header of these parts."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(parts))
    os.truncate(path, max(size, path.stat().st_size))
    return path


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


@pytest.mark.parametrize(
    ("parts", "counts", "says"),
    [
        ([text(b"a") + struct.pack("<I", 8) + text(b"", 200_000_000)], {"keys": 1}, "header of more than 100000000 by"),
        ([text(b"a") + struct.pack("<IIQ", 9, 0, 200_000_000)], {"keys": 1}, "has a list of 200000000 items"),
        ([text(b"a") + struct.pack("<IIQ", 9, 8, 2**63)], {"keys": 1}, "has a list of 9223372036854775808 items"),
        ([text(b"a") + struct.pack("<IIQ", 9, 9, 5)], {"keys": 1}, "holds a list of type 9"),
        ([], {"keys": 2**64 - 1}, "has the key '' twice"),
        ([], {"keys": 0, "tensors": 2**64 - 1}, "has the tensor '' twice"),
        ([text(b"t") + struct.pack("<IQQIQ", 2, 10**18, 0, 0, 0)], {"keys": 0, "tensors": 1}, "'t' is malformed"),
    ],
)
def test_a_header_beyond_any_model_is_not_read(
    tmp_path: Path, parts: list[bytes], counts: dict[str, int], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        GGUFFile(header(tmp_path / "m.gguf", *parts, **counts, size=300_000_000))


def test_a_layer_whose_number_is_none() -> None:
    llama = ARCHITECTURES["llama"]
    assert hf_name("blk.12.attn_norm.weight", llama) == "model.layers.12.input_layernorm.weight"
    for number in ("x", "\u00b2", "9" * 5000):  # a digit to Python, but no number; and a number that it does not read
        assert hf_name(f"blk.{number}.attn_norm.weight", llama) is None


def test_other_architectures_and_missing_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, reference("llama"), leave_out=("model.layers.2.mlp.up_proj.weight",))
    assert "lacks the tensor 'blk.2.ffn_up.weight'" in refused(path)
    monkeypatch.setitem(__import__("tests.weights.gguf_files", fromlist=["x"]).ARCHITECTURES, "llama", "qwen2moe")
    write_gguf(path, reference("llama"))
    assert "architecture 'qwen2moe' is not supported" in refused(path)
    assert "not supported" in str(describe(path)["supported"])


def test_a_tensor_of_no_such_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", reference("qwen3"))
    raw = (tmp_path / "m.gguf").read_bytes().replace(b"qwen3", b"qwen2")
    (tmp_path / "m.gguf").write_bytes(raw)
    assert "attn_q_norm.weight' is not part of a qwen2 model" in refused(tmp_path / "m.gguf")


def test_the_sizes_of_types_are_those_of_the_package() -> None:
    for number, (name, block, size) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (block, size))


def test_an_unknown_tensor_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    raw = np.zeros((2, 66), np.uint8)
    writer.add_tensor("token_embd.weight", raw, raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "GGML type 16" in refused(tmp_path / "m.gguf")


def test_the_header_is_plain_data(tmp_path: Path) -> None:
    extra = {"x.text": "ä", "x.flag": True, "x.list": [1, 2, 3], "x.names": ["a", "b"], "x.real": 1e-5}
    write_gguf(tmp_path / "m.gguf", reference("llama"), metadata=extra)
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert {key: metadata[key] for key in extra} == extra
    assert json.dumps(metadata)
    assert shortest(np.float32(1e-6).item()) == 1e-6


def test_special_ids_and_eps(tmp_path: Path) -> None:
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 9}
    write_gguf(tmp_path / "m.gguf", reference("llama"), metadata=ids)
    config = open_checkpoint(tmp_path / "m.gguf").model_config
    assert (config.bos_token_id, config.eos_token_ids, config.rms_norm_eps) == (1, (2, 9), 1e-6)
