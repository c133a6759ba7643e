"""Writing GGUF files the way llama.cpp's converter does, with the ``gguf`` package, from transformers models.

Not a test: other test modules import it. ``write_gguf`` returns the tensors that a faithful reader must give back.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
_BLOCKS = {"Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q4_K": 256, "Q6_K": 256}


def gguf_name(name: str, gemma: bool) -> str:
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, index, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{({**_LAYER, **_GEMMA} if gemma else _LAYER)[part]}.{kind}"


def pair_order(rows: int, heads: int) -> list[int]:
    """Where each stored row of q or k comes from: row 2i of a head is its i-th, row 2i + 1 the one half a head on."""
    width = rows // heads
    return [head * width + (i // 2) + (i % 2) * (width // 2) for head in range(heads) for i in range(width)]


def encode(values: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``(what is written, the values it stands for)``."""
    if kind == "F32":
        return values, values
    if kind == "F16":
        return values.astype(np.float16), values.astype(np.float16).astype(np.float32)
    type_ = gguf.GGMLQuantizationType[kind]
    # The package can read two types but not make them: random blocks with sane scales.
    raw = _random_blocks(values, kind, seed) if kind in ("Q4_K", "Q6_K") else gguf.quantize(values, type_)
    return raw, gguf.dequantize(raw, type_).reshape(values.shape)


def _random_blocks(values: np.ndarray, kind: str, seed: int) -> np.ndarray:
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = np.random.default_rng(seed).integers(0, 256, (values.size // 256, size), dtype=np.uint8)
    scale = np.full(len(blocks), 1e-4, np.float16).view(np.uint8).reshape(-1, 2)
    if kind == "Q4_K":
        blocks[:, 0:2], blocks[:, 2:4] = scale, scale
    else:
        blocks[:, -2:] = scale
    return blocks.reshape(*values.shape[:-1], -1)


def write_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    *,
    kind: str = "F32",
    metadata: dict[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    rope_factors: np.ndarray | None = None,
) -> dict[str, torch.Tensor]:
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture == "gemma3" or config.model_type == "mistral":
        writer.add_sliding_window(config.sliding_window)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    expected: dict[str, torch.Tensor] = {}
    tied = config.tie_word_embeddings
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        if (tied and name == "lm_head.weight") or name in leave_out:
            continue
        values = tensor.detach().float().numpy()
        order = None
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if architecture == "llama" and part in name:
                order = pair_order(len(values), heads)
        stored = values if order is None else values[order]
        if architecture == "gemma3" and name.endswith("norm.weight"):
            stored = stored + np.float32(1)
        chosen = kind if stored.ndim > 1 and stored.shape[-1] % _BLOCKS.get(kind, 1) == 0 else "F32"
        raw, meant = encode(np.ascontiguousarray(stored), chosen, seed)
        writer.add_tensor(gguf_name(name, architecture == "gemma3"), raw, raw_dtype=_raw_dtype(chosen))
        if architecture == "gemma3" and name.endswith("norm.weight"):
            meant = meant - np.float32(1)
        if order is not None:
            back = np.empty_like(meant)
            back[order] = meant
            meant = back
        expected[name] = torch.from_numpy(np.array(meant))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _raw_dtype(kind: str) -> gguf.GGMLQuantizationType | None:
    return None if kind in ("F32", "F16") else gguf.GGMLQuantizationType[kind]


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
