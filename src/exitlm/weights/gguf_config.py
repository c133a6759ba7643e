"""From the metadata of a GGUF file to a Hugging Face ``config.json``, and from its tensor names to HF names.

The keys are llama.cpp's (``{architecture}.attention.head_count`` ...). Like a key of a config.json, one that would
change the maths and is not understood is refused by its name. RoPE settings are written in transformers 4's spelling,
which both transformers 4 and 5 read. Not here: the tokenizer (``gguf_tokenizer.py``) and values (``gguf.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitlm.errors import UserError, nearest, short
from exitlm.model.config import is_positive

_COMMON_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Factors that divide the rotary frequencies (Llama 3's scaling): part of the configuration, not a weight.
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What sets one GGUF architecture apart. ``layer_tensors``: name within a block -> HF name within a layer."""

    model_type: str
    hf_class: str
    layer_tensors: Mapping[str, str]
    permuted: bool = False
    """Rows of q and k are stored in pairs (x0, y0, x1, y1 ...), as Meta's own code rotates them."""
    norm_offset: float = 0.0
    """What was added to every norm weight when the file was written."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        model_type="llama",
        hf_class="LlamaForCausalLM",
        layer_tensors={**_COMMON_TENSORS, "ffn_norm": "post_attention_layernorm"},
        permuted=True,
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        hf_class="Qwen2ForCausalLM",
        layer_tensors={**_COMMON_TENSORS, "ffn_norm": "post_attention_layernorm"},
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        hf_class="Qwen3ForCausalLM",
        layer_tensors={**_COMMON_TENSORS, **_QK_NORM, "ffn_norm": "post_attention_layernorm"},
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        hf_class="Gemma3ForCausalLM",
        layer_tensors={
            **_COMMON_TENSORS,
            **_QK_NORM,
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_offset=1.0,
    ),
}

# Read below, or without a part in the maths of a decoder.
_KNOWN_KEYS = frozenset(
    [
        "vocab_size",
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "tensor_data_layout",
    ]
)
_NEUTRAL_KEYS: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
}
_GEMMA_27B_LAYERS = 62
_GEMMA_PERIOD = 6
_GEMMA_LOCAL_THETA = 10_000.0


def architecture_of(metadata: Mapping[str, Any], where: str) -> Architecture:
    """The architecture that a file says it has; another one is refused by its name."""
    name = str(metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise UserError(
            f"{where}: GGUF architecture '{name}' is not supported (supported: {', '.join(ARCHITECTURES)})"
            f"{nearest(name, ARCHITECTURES)}"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError(f"{where} is one part of a split GGUF; join the parts first: llama-gguf-split --merge")
    return ARCHITECTURES[name]


def hf_name(name: str, architecture: Architecture) -> str | None:
    """The HF name of a tensor, or None for one that the architecture does not have."""
    if name in TOP_TENSORS:
        return TOP_TENSORS[name]
    block, _, rest = name.partition(".")
    index, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    if (
        block != "blk"
        or not re.fullmatch("[0-9]{1,9}", index)
        or kind not in ("weight", "bias")
        or part not in architecture.layer_tensors
    ):
        return None
    return f"model.layers.{int(index)}.{architecture.layer_tensors[part]}.{kind}"


@dataclass(frozen=True)
class _Settings:
    """The ``values`` of an architecture by key without ``prefix``; ``where`` names the file in messages."""

    values: Mapping[str, Any]
    prefix: str
    where: str

    def size(self, key: str, default: int | None = None) -> int:
        value = self._given(key, default)
        if isinstance(value, list):  # one value per layer
            if len(set(value)) != 1:
                raise UserError(f"{self.where}: '{self.prefix}{key}' differs between layers, which is not implemented")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.where}: '{self.prefix}{key}' is {short(value)}, it must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._given(key, default)
        if not is_positive(value):
            raise UserError(f"{self.where}: '{self.prefix}{key}' is {short(value)}, it must be a positive number")
        return float(value)

    def _given(self, key: str, default: float | None) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.where} lacks '{self.prefix}{key}'; it is incomplete, choose another file")
        return value


def hf_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    rope_factors: NDArray[np.float32] | None,
    where: str,
) -> dict[str, Any]:
    """The Hugging Face configuration of a file with this metadata and these tensors.

    ``rope_factors`` [F] divide the rotary frequencies. ``where`` names the file in messages.

    Raises:
        UserError: a key is missing, contradicts another, or changes the maths in a way exitlm does not implement.
    """
    architecture, prefix = architecture_of(metadata, where), f"{metadata['general.architecture']}."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    for key, value in values.items():
        neutral = value in _NEUTRAL_KEYS[key] if key in _NEUTRAL_KEYS else not value
        if key not in _KNOWN_KEYS and not neutral:
            raise UserError(
                f"{where}: '{prefix}{key}' ({short(value)}) is not implemented and may change what the model computes"
            )

    given = _Settings(values, prefix, where)
    hidden, heads = given.size("embedding_length"), given.size("attention.head_count")
    layers = given.size("block_count")
    if layers > len(shapes):
        raise UserError(f"{where} has {len(shapes)} tensors for {layers} layers; it is damaged, choose another file")
    head_dim = given.size("attention.key_length", max(1, hidden // heads))
    if given.size("attention.value_length", head_dim) != head_dim:
        raise UserError(f"{where}: keys and values of different width are not implemented")
    if "token_embd.weight" not in shapes:
        raise UserError(f"{where} lacks the tensor 'token_embd.weight'; it is incomplete, choose another file")
    config: dict[str, Any] = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": given.size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": given.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": given.size("context_length"),
        "rms_norm_eps": given.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        **_rope(given, architecture, head_dim, rope_factors),
        **_special_ids(metadata, where),
    }
    biased = {part for part in ("attn_q", "attn_output", "ffn_down") if f"blk.0.{part}.bias" in shapes}
    if architecture.model_type in ("llama", "qwen3", "gemma3_text"):
        config["attention_bias"] = bool(biased & {"attn_q", "attn_output"})
    if architecture.model_type == "llama":
        config["mlp_bias"] = "ffn_down" in biased
    if architecture.model_type == "gemma3_text":
        config |= _gemma(given, layers, hidden, heads, head_dim)
    elif values.get("attention.sliding_window"):
        _slide(config, given.size("attention.sliding_window"), where)
    return config


def _slide(config: dict[str, Any], window: int, where: str) -> None:
    """A window over all layers: what Mistral's first models have in files of architecture llama."""
    if config["model_type"] != "llama" or config["attention_bias"] or config["mlp_bias"]:
        raise UserError(f"{where}: a sliding window in a {config['model_type']} model is not implemented")
    del config["attention_bias"], config["mlp_bias"]
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}


def _special_ids(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")}
    for name, index in ids.items():
        if not isinstance(index, int | None):
            raise UserError(f"{where}: 'tokenizer.ggml.{name}_token_id' is {short(index)}, it must be a token id")
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None))
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
    }


def _gemma(given: _Settings, layers: int, hidden: int, heads: int, head_dim: int) -> dict[str, Any]:
    """What llama.cpp knows of Gemma 3 without the file saying it: the pattern of windows, and the 27B's scale."""
    key = "attention.sliding_window_pattern"
    pattern = given.values.get(key)
    if not isinstance(pattern, list):
        period = given.size(key, _GEMMA_PERIOD)
        pattern = [bool((i + 1) % period) for i in range(layers)]
    window = given.values.get("attention.sliding_window")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if layers == _GEMMA_27B_LAYERS else head_dim,
        "rope_local_base_freq": given.number("rope.freq_base_swa", _GEMMA_LOCAL_THETA),
        "sliding_window": window,
        "layer_types": ["sliding_attention" if window and slide else "full_attention" for slide in pattern],
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    }


def _rope(
    given: _Settings,
    architecture: Architecture,
    head_dim: int,
    factors: NDArray[np.float32] | None,
) -> dict[str, Any]:
    values, where = given.values, given.where
    theta = given.number("rope.freq_base", 1_000_000.0 if architecture.model_type == "gemma3_text" else 10_000.0)
    rotary = values.get("rope.dimension_count", head_dim)
    settings: dict[str, Any] = {"rope_theta": theta, "rope_scaling": None}
    if rotary != head_dim:
        raise UserError(f"{where}: it rotates {rotary} of {head_dim} dimensions per head, which is not implemented")
    kind = values.get("rope.scaling.type", "none")
    if factors is not None:
        if kind not in ("none", "linear") or values.get("rope.scaling.factor", 1.0) not in (0.0, 1.0):
            raise UserError(f"{where} has both the tensor '{ROPE_FACTORS}' and RoPE scaling '{kind}'")
        settings["rope_scaling"] = rope_scaling(factors, theta, given.size("context_length"), where)
    elif kind == "linear":
        settings["rope_scaling"] = {"rope_type": "linear", "factor": given.number("rope.scaling.factor", 1.0)}
    elif kind != "none":
        raise UserError(
            f"{where}: RoPE scaling '{kind}' is not supported in GGUF files (supported: none, linear, llama3)"
        )
    return settings


def rope_scaling(factors: NDArray[np.float32], theta: float, context: int, where: str) -> dict[str, Any] | None:
    """The RoPE settings that divide the frequency of rotary pair i by ``factors[i]``.

    Llama 3's rule (arXiv 2407.21783) is recovered where it gives these very factors: long waves are divided by
    ``factor``, short ones kept, and 1/factor_i is linear in the frequency between. The line fixes the band up to a
    common scale of ``low_freq_factor``, ``high_freq_factor`` and the original context; the first is 1 in every released
    model. Any other factors become ``longrope`` with one list for short and long texts and no attention factor, which
    is division by the factors and nothing else.
    """
    wide = factors.astype(np.float64).reshape(-1)
    if not np.isfinite(wide).all() or (wide <= 0).any():
        raise UserError(f"{where}: its tensor '{ROPE_FACTORS}' holds values that are not positive; choose another file")
    if (wide == 1.0).all():
        return None
    frequency = theta ** -(np.arange(len(wide)) / len(wide))
    found = _llama3(wide, frequency)
    if found is not None:
        return found
    exact = [float(str(value)) for value in factors.reshape(-1)]
    return {
        "rope_type": "longrope",
        "short_factor": exact,
        "long_factor": exact,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _llama3(wide: NDArray[np.float64], frequency: NDArray[np.float64]) -> dict[str, Any] | None:
    factor = float(wide.max())
    band = (wide > 1.0 + 1e-5) & (wide < factor * (1 - 1e-5))
    # Without a band, or with one point in it, the values of Llama 3.1 and 3.2 are the only guess that can be checked.
    guesses = [(1.0, 4.0, 8192)]
    if band.sum() >= 2:
        blend = (1 / wide[band] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(frequency[band], blend, 1)
        if -1e6 < offset < -1e-6 and 0 < slope < 1e12:  # other lines are those of no band
            high = round(1 - 1 / float(offset), 3)
            original = round(2 * math.pi * float(slope) * (high - 1))
            guesses.insert(0, (1.0, high, original))
    for low, high, original in guesses:
        if high > low and np.allclose(_llama3_factors(frequency, factor, low, high, original), wide, rtol=2e-6, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None


def _llama3_factors(
    frequency: NDArray[np.float64], factor: float, low: float, high: float, original: int
) -> NDArray[np.float64]:
    turns = original * frequency / (2 * math.pi)  # within the original context
    blend = (turns - low) / (high - low)
    between = 1 / ((1 - blend) / factor + blend)
    divided: NDArray[np.float64] = np.where(turns < low, factor, np.where(turns > high, 1.0, between))
    return divided
