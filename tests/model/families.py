"""Tiny random models of every family: the transformers configuration, and the same model of ours.

Not a test: other test modules import it. Sizes are small but never degenerate: more heads than key/value heads, a head
width that is not hidden_size / heads, windows shorter than the sequences.
"""

import copy
from typing import Any

import torch
import transformers

from exitlm.model import EarlyExitModel, ModelConfig

VOCAB = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"sliding_window": 5, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 4},
    ),
    "olmo2": ("Olmo2Config", {}),
    "phi3": ("Phi3Config", {"head_dim": 8, "sliding_window": 7}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 3}),
}
FAMILIES = tuple(_FAMILIES)


def native_sizes(family: str) -> dict[str, Any]:
    """Sizes that the native kernels take, for ``over``; Phi-3 has no head width of its own."""
    return {"hidden_size": 128 if family == "phi3" else 64, "intermediate_size": 96, "head_dim": 32}


def tiny_hf_config(family: str, **over: Any) -> transformers.PreTrainedConfig:
    """A small transformers configuration of ``family``; ``over`` replaces any of its keys."""
    name, own = _FAMILIES[family]
    values = {**_SIZES, **own, **over}
    if values.get("layer_types") is not None:
        values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    return getattr(transformers, name)(**copy.deepcopy(values))


def tiny_hf_model(family: str, seed: int = 0, **over: Any) -> transformers.PreTrainedModel:
    """A random float32 transformers model in which no bias or norm weight is trivial."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_hf_config(family, **over)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            small = "norm" in name or name.endswith("bias")
            parameter.copy_(parameter + 0.2 * noise if small else noise * parameter.shape[-1] ** -0.5)
    return model


def convert(
    reference: transformers.PreTrainedModel, dtype: torch.dtype = torch.float32, config: dict[str, Any] | None = None
) -> EarlyExitModel:
    """Our model with the weights of a transformers model, read from ``config`` (default: as transformers saves it)."""
    model = EarlyExitModel(ModelConfig.from_hf(config or reference.config.to_dict())).to(dtype).eval()
    model.load_state_dict(reference.state_dict())
    return model


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **over: Any) -> EarlyExitModel:
    """Our random model of ``family``; its logits are far from uniform, so that argmax decisions are stable."""
    return convert(tiny_hf_model(family, seed, **over), dtype)
