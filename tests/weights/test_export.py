"""Export: transformers loads the base bit for bit, and exitlm finds the exits beside it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from exitlm.errors import UserError
from exitlm.model import EarlyExitModel, ExitConfig, ExitRecord
from exitlm.weights import attach, export, load_model, open_checkpoint, read_adapter, save_adapter
from tests.model.families import FAMILIES, tiny_hf_model, tiny_model
from tests.weights.gguf_files import write_gguf
from tests.weights.test_checkpoint import with_tokenizer

IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 2, 2, 71, 30, 11]])


def saved(directory: Path, family: str = "llama", **over: Any) -> Path:
    tiny_hf_model(family, **over).save_pretrained(directory)
    return directory


def with_exits(source: Path, *layers: int) -> EarlyExitModel:
    model = load_model(source)
    model.add_exits([ExitConfig(layer=layer, gate=True, init="random") for layer in layers])
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_same_bits(tmp_path: Path, family: str, tied: bool) -> None:
    base = saved(tmp_path / "base", family, tie_word_embeddings=tied)
    export(with_exits(base, 1, 3), tmp_path / "out")
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert ours[name].dtype == tensor.dtype
    before = transformers.AutoModelForCausalLM.from_pretrained(base)
    after, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(before) is type(after)
    assert torch.equal(before(IDS).logits, after(IDS).logits)
    assert open_checkpoint(tmp_path / "out").digest() == open_checkpoint(base).digest()


def test_exits_lie_beside_and_are_found(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    model = with_exits(base, 1, 3)
    model.exits["1"].record = ExitRecord(threshold=0.7, tested=False)
    export(model, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json",
        "exits.json",
        "exits.safetensors",
        "generation_config.json",
        "model.safetensors",
    ]
    again = load_model(tmp_path / "out")
    attach(again, [tmp_path / "out"])
    assert again.exits["1"].record == ExitRecord(threshold=0.7, tested=False)
    for layer, logits in model.exit_logits(IDS).items():
        assert torch.equal(logits, again.exit_logits(IDS)[layer])
    # From the path alone, and the exits fit the original base too: its weights are the same.
    export(tmp_path / "out", tmp_path / "twice")
    assert (tmp_path / "twice" / "exits.safetensors").read_bytes() == (
        tmp_path / "out" / "exits.safetensors"
    ).read_bytes()
    attach(load_model(base), [tmp_path / "twice"])


def test_another_dtype_is_asked_for_and_consistent(tmp_path: Path) -> None:
    model = with_exits(saved(tmp_path / "base"), 2)
    export(model, tmp_path / "half", dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    loaded = load_model(tmp_path / "half")
    attach(loaded, [tmp_path / "half"])  # the digest is that of the rounded weights
    assert loaded.dtype == torch.bfloat16
    assert read_adapter(tmp_path / "half").tensors["exits.2.lens.weight"].dtype == torch.bfloat16
    with pytest.raises(UserError, match="unknown dtype"):
        export(model, tmp_path / "x", dtype="int3")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "exits.2.lens.weight"])
def test_what_a_dtype_cannot_hold_is_not_exported(tmp_path: Path, name: str) -> None:
    model = with_exits(saved(tmp_path / "base"), 2)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = 1e5
    with pytest.raises(UserError, match=f"tensor '{name}' holds NaN or infinity in float16, and nothing was written"):
        export(model, tmp_path / "half", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    export(model, tmp_path / "half", dtype="bfloat16")


def test_float64_stays_float64(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.add_exits([ExitConfig(layer=2)])
    export(model, tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items() if name in state)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float64"
    attach(load_model(tmp_path / "out"), [tmp_path / "out"])


def test_several_files(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    export(load_model(base), tmp_path / "out", shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 25_000
    assert open_checkpoint(tmp_path / "out").digest() == open_checkpoint(base).digest()
    before = transformers.AutoModelForCausalLM.from_pretrained(base)
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(before(IDS).logits, after(IDS).logits)


def test_from_a_gguf_file(tmp_path: Path) -> None:
    reference = tiny_hf_model("llama")
    write_gguf(tmp_path / "m.gguf", reference)
    export(tmp_path / "m.gguf", tmp_path / "out")
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(reference(IDS).logits, after(IDS).logits)
    assert "conversion.json" not in os.listdir(tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").digest() == open_checkpoint(tmp_path / "m.gguf").digest()


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    with_tokenizer(tmp_path / "base", vocab_size=450)
    export(tmp_path / "base", tmp_path / "out")
    before, after = open_checkpoint(tmp_path / "base").tokenizer(), open_checkpoint(tmp_path / "out").tokenizer()
    assert before is not None
    assert after is not None
    assert before.encode("over and over") == after.encode("over and over")
    assert before.chat_template == after.chat_template
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.encode("over and over") == before.encode("over and over")


def test_a_text_model_within_a_larger_one_becomes_a_text_model(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "gemma3_text")
    config = json.loads((base / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config}
    before = transformers.AutoModelForCausalLM.from_pretrained(base)
    (base / "config.json").write_text(json.dumps(outer))
    export(base, tmp_path / "out")
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(after) is type(before)
    assert torch.equal(before(IDS).logits, after(IDS).logits)


def test_a_directory_in_use_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_exits(saved(tmp_path / "base"), 2)
    with pytest.raises(UserError, match="exists and is not empty"):
        export(model, tmp_path / "base")
    with pytest.raises(UserError, match="is a file"):
        export(model, tmp_path / "base" / "config.json")
    (tmp_path / "out").mkdir()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("exitlm.weights.adapter.write_tensors", full)
        with pytest.raises(UserError, match="No space left"):
            export(model, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]
    export(model, tmp_path / "out")
    save_adapter(tmp_path / "out", model)  # the exits beside a model can be replaced
    attach(load_model(tmp_path / "out"), [tmp_path / "out"])


def test_part_of_a_model_is_not_exported(tmp_path: Path) -> None:
    part = load_model(saved(tmp_path / "base"), layers=[1, 2])
    with pytest.raises(UserError, match="only some of its layers"):
        export(part, tmp_path / "out")
