"""The supported families, and which keys of a Hugging Face ``config.json`` each of them reads.

A table, with the one rule that guards it: a key that is neither read by the family nor known to leave the maths alone
is refused by its name unless its value is neutral. Defaults are those of transformers' configuration classes. The
arithmetic behind the fields is in ``layers.py``.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from exitlm.errors import UserError, short

_COMMON = """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim max_position_embeddings rms_norm_eps tie_word_embeddings initializer_range eos_token_id bos_token_id
    pad_token_id rope_theta rope_scaling rope_parameters original_max_position_embeddings partial_rotary_factor
"""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family differs from the plain Llama decoder. ``architectures`` are the class names it may claim.

    ``extra`` are the keys it reads beyond the common ones; ``sliding`` says which layers slide when the configuration
    gives no ``layer_types``: none, all, those after ``max_window_layers``, all but every n-th, or the NoPE layers.
    ``partial_rotary``: its unscaled RoPE obeys ``partial_rotary_factor`` (scaled ones do in every family).
    """

    name: str
    architectures: tuple[str, ...]
    extra: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activation_key: str = "hidden_act"
    sliding: Literal["none", "all", "after", "pattern", "nope"] = "none"
    qkv_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    norm_offset: float = 0.0
    norm_in_float32: bool = False
    rope_in_float32: bool = False
    scaled_embedding: bool = False
    fused_projections: bool = False
    partial_rotary: bool = False
    theta: float = 10_000.0
    local_theta: float | None = None

    @property
    def reads(self) -> frozenset[str]:
        """Every key that this family's maths depends on."""
        return frozenset((*_COMMON.split(), *self.extra.split(), self.activation_key))


def _defaults(**values: Any) -> dict[str, Any]:
    base = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "initializer_range": 0.02}
    return {**base, **values}


_FAMILIES = (
    Family(
        name="llama",
        architectures=("LlamaForCausalLM", "LlamaModel"),
        extra="attention_bias mlp_bias",
        defaults=_defaults(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
    ),
    Family(
        name="mistral",
        architectures=("MistralForCausalLM", "MistralModel"),
        extra="sliding_window",
        sliding="all",
        defaults=_defaults(
            max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096, bos_token_id=1, eos_token_id=2
        ),
    ),
    Family(
        name="qwen2",
        architectures=("Qwen2ForCausalLM", "Qwen2Model"),
        extra="use_sliding_window sliding_window max_window_layers layer_types",
        sliding="after",
        qkv_bias=True,
        defaults=_defaults(max_position_embeddings=32768, sliding_window=4096, max_window_layers=28),
    ),
    Family(
        name="qwen3",
        architectures=("Qwen3ForCausalLM", "Qwen3Model"),
        extra="attention_bias use_sliding_window sliding_window max_window_layers layer_types",
        sliding="after",
        qk_norm="head",
        defaults=_defaults(max_position_embeddings=32768, head_dim=128, sliding_window=4096, max_window_layers=28),
    ),
    Family(
        name="gemma3_text",
        architectures=("Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3ForConditionalGeneration"),
        extra="attention_bias sliding_window sliding_window_pattern layer_types query_pre_attn_scalar "
        "rope_local_base_freq",
        activation_key="hidden_activation",
        sliding="pattern",
        qk_norm="head",
        norm_placement="sandwich",
        norm_offset=1.0,
        norm_in_float32=True,
        scaled_embedding=True,
        theta=1_000_000.0,
        local_theta=10_000.0,
        defaults=_defaults(
            vocab_size=262_208,
            hidden_size=2304,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            max_position_embeddings=131_072,
            hidden_activation="gelu_pytorch_tanh",
            query_pre_attn_scalar=256,
            sliding_window=4096,
            sliding_window_pattern=6,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        ),
    ),
    Family(
        name="olmo2",
        architectures=("Olmo2ForCausalLM", "Olmo2Model"),
        extra="attention_bias",
        qk_norm="full",
        norm_placement="post",
        norm_in_float32=True,
        rope_in_float32=True,
        defaults=_defaults(max_position_embeddings=2048, rms_norm_eps=1e-5, pad_token_id=1, eos_token_id=50279),
    ),
    Family(
        name="phi3",
        architectures=("Phi3ForCausalLM", "Phi3Model"),
        extra="sliding_window",
        sliding="all",
        fused_projections=True,
        partial_rotary=True,
        defaults=_defaults(
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=32000,
            pad_token_id=32000,
        ),
    ),
    Family(
        name="smollm3",
        architectures=("SmolLM3ForCausalLM", "SmolLM3Model"),
        extra="attention_bias mlp_bias use_sliding_window sliding_window layer_types no_rope_layers "
        "no_rope_layer_interval",
        sliding="nope",
        theta=2_000_000.0,
        defaults=_defaults(
            max_position_embeddings=32768,
            num_key_value_heads=4,
            no_rope_layer_interval=4,
            tie_word_embeddings=True,
            pad_token_id=128004,
            bos_token_id=128000,
            eos_token_id=128001,
        ),
    ),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _FAMILIES}

# Where the file came from, and how a program is to hold or run it.
_ORIGIN = """
    architectures transformers_version torch_dtype dtype use_cache name_or_path auto_map task_specific_params
    tokenizer_class prefix problem_type finetuning_task transformers.js_config transformers_weights unsloth_version
    unsloth_fixed is_llama_config model_max_length max_sequence_length cache_implementation use_flash_attn
    flash_attn_2_enabled attn_implementation attn_implementation_internal attn_implementation_autoset
    experts_implementation pretraining_tp tp_degree gradient_checkpointing output_attentions output_hidden_states
    return_dict return_dict_in_generate output_scores torchscript use_bfloat16 chunk_size_feed_forward id2label label2id
    num_labels classifier_dropout summary_type neftune_noise_alpha _sliding_window_pattern
"""
# Exits are tuned on a frozen backbone without dropout.
_DROPOUT = """
    attention_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout dropout resid_dropout embed_dropout
"""
# Generation settings that older files keep here (decoding has its own), and ids of tokens with a special part.
_GENERATION = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens decoder_start_token_id sep_token_id cls_token_id unk_token_id mask_token_id
    mm_tokens_per_image boi_token_index eoi_token_index image_token_index
"""
BOOKKEEPING = frozenset((_ORIGIN + _DROPOUT + _GENERATION).split())
"""Keys that leave the maths alone, without a leading underscore that some files have."""

# What some family reads, and transformers gives no effect in the others: exitlm says so and follows.
_NO_EFFECT = frozenset(key for family in _FAMILIES for key in family.extra.split())

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "is_decoder": (True,),
    "hidden_act": ("gelu_pytorch_tanh",),
    "max_window_layers": (28,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "tie_encoder_decoder": (True,),
}


def check_keys(config: Mapping[str, Any], family: Family) -> None:
    """Refuse what would change the maths unnoticed; warn about a known key that has no effect in this family.

    Raises:
        UserError: the architecture is another task's, or a key is unknown and its value not neutral.
    """
    claimed = config.get("architectures") or ()
    if not isinstance(claimed, list | tuple):
        raise UserError(f"'architectures' is {short(claimed)} in the model's config, it must be a list of names")
    for name in claimed:
        if name not in family.architectures:
            raise UserError(
                f"architecture '{name}' is not supported for model_type '{config['model_type']}', "
                f"expected {family.architectures[0]}"
            )
    for key, value in config.items():
        plain = key.lstrip("_")
        if key in family.reads or key in BOOKKEEPING or plain in BOOKKEEPING or _is_neutral(key, value):
            continue
        if key in _NO_EFFECT:
            warnings.warn(f"'{key}' has no effect in a model of type {family.name} (as in transformers)", stacklevel=4)
            continue
        raise UserError(
            f"the config's '{key}' ({short(value)}) is not implemented for model_type '{family.name}' and may change "
            "what the model computes; choose another checkpoint, or remove the key if it has no effect"
        )


def _is_neutral(key: str, value: Any) -> bool:
    """None, False, zero, emptiness, and a factor of one change nothing."""
    if key in _NEUTRAL and value in _NEUTRAL[key]:
        return True
    if key == "is_causal":
        return value is None or value is True
    if key == "layer_types":
        return not value or (isinstance(value, list | tuple) and all(kind == "full_attention" for kind in value))
    if key.endswith(("_multiplier", "_scale", "_scaling", "_factor", "_ratio")):
        return value is None or (not isinstance(value, bool | dict | list) and value == 1)
    return not value
