"""``describe`` says what is there as plain data; ``show`` prints it."""

import json
from pathlib import Path

import pytest

from exitlm.errors import UserError
from exitlm.model import ExitConfig, ExitRecord
from exitlm.weights import describe, export, load_model, save_adapter
from exitlm.weights.inspect import show
from tests.model.families import tiny_hf_model
from tests.weights.gguf_files import write_gguf


def test_a_model_and_its_exits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = tiny_hf_model("qwen3")
    reference.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    found = describe(tmp_path / "base")
    assert json.dumps(found)
    assert (found["kind"], found["model_type"], found["layers"], found["supported"]) == ("model", "qwen3", 4, True)
    assert found["parameters"] == sum(parameter.numel() for parameter in reference.parameters())
    assert found["tensors"] == {"F32": len(reference.state_dict())}
    assert found["exits"] is None
    assert len(found["files"]) > 1
    model = load_model(tmp_path / "base")
    model.add_exits([ExitConfig(layer=2, gate=True)])
    model.exits["2"].record = ExitRecord(threshold=0.7, tested=True)
    export(model, tmp_path / "out")
    exits = describe(tmp_path / "out")["exits"]
    assert exits["exits"][0]["layer"] == 2
    assert exits["exits"][0]["record"] == {"threshold": 0.7, "tested": True}
    assert json.dumps(exits)
    show(tmp_path / "out")
    printed = capsys.readouterr().out
    assert "qwen3" in printed
    assert "threshold: 0.7, tested: yes" in " ".join(printed.replace("│", "").split())


def test_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_hf_model("llama").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    model.add_exits([ExitConfig(layer=1), ExitConfig(layer=3)])
    save_adapter(tmp_path / "a", model, training={"steps": 7})
    found = describe(tmp_path / "a")
    assert json.dumps(found)
    assert (found["kind"], found["version"], found["training"]) == ("adapter", 1, {"steps": 7})
    assert found["base"]["digest"] == model.checkpoint.digest()
    assert [exit_["layer"] for exit_ in found["exits"]] == [1, 3]
    assert found["parameters"] == sum(parameter.numel() for parameter in model.exit_parameters())
    show(tmp_path / "a")
    assert "steps" in capsys.readouterr().out


def test_a_gguf_is_not_converted(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = tiny_hf_model("llama")
    write_gguf(tmp_path / "m.gguf", reference, kind="F16", metadata={"tokenizer.chat_template": "x"})
    found = describe(tmp_path / "m.gguf")
    assert json.dumps(found)
    assert (found["kind"], found["name"], found["chat_template"], found["tokenizer"]) == ("gguf", "tiny", True, None)
    assert found["parameters"] == sum(parameter.numel() for parameter in reference.parameters())
    assert set(found["tensors"]) == {"F16", "F32"}
    assert not (cache / "gguf").exists()
    show(tmp_path / "m.gguf")
    assert "F16" in capsys.readouterr().out


def test_what_exitlm_cannot_load_is_described_all_the_same(tmp_path: Path) -> None:
    tiny_hf_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mamba"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = describe(tmp_path)
    assert "'mamba' is not supported" in found["supported"]
    assert found["parameters"] > 0


def test_nothing_to_describe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a model"):
        describe(tmp_path)
    with pytest.raises(UserError, match="there is no model"):
        describe(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="no GGUF"):
        describe(tmp_path / "text")
