"""Reading configurations: real ones as published, both spellings, and refusals by name."""

import json
import re
import warnings
from typing import Any

import pytest
import transformers

from exitlm.errors import UserError
from exitlm.model import ModelConfig, RopeConfig
from exitlm.model.config import MAX_SIZES
from exitlm.model.families import FAMILIES as TABLE
from tests.model.families import FAMILIES, tiny_hf_config

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

# The keys of published files that differ from family to family, with sizes made small.
PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "pretraining_tp": 1,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "llama 3.2": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "max_position_embeddings": 131072,
        "eos_token_id": [128001, 128008],
        "bos_token_id": 5,
        "unsloth_fixed": True,
    },
    "mistral 0.3": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6, "attention_dropout": 0.0},
    "qwen2.5": {
        "model_type": "qwen2",
        "max_window_layers": 21,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "use_mrope": False,
        "tie_word_embeddings": True,
    },
    "phi-4-mini": {
        "model_type": "phi3",
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"long_factor": [2.0] * 6, "short_factor": [1.0] * 6, "type": "longrope"},
        "sliding_window": 262144,
        "pad_token_id": 7,
    },
    "smollm3": {
        "model_type": "smollm3",
        "layer_types": ["full_attention"] * 4,
        "max_window_layers": 28,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "pretraining_tp": 2,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "use_sliding_window": False,
    },
    "gemma 3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 2,
        "_sliding_window_pattern": 2,
        "use_bidirectional_attention": False,
    },
}


def llama(**over: Any) -> dict[str, Any]:
    return {"model_type": "llama", **SIZES, **over}


@pytest.mark.filterwarnings("ignore:.*outside of the vocabulary")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_read_without_complaint(name: str) -> None:
    config = {**SIZES, **PUBLISHED[name]}
    read = ModelConfig.from_hf(json.loads(json.dumps(config)))
    assert read.num_hidden_layers == len(read.layer_types) == len(read.use_rope) == 4
    assert read.hf == config


def test_values_of_published_configurations() -> None:
    read = {name: ModelConfig.from_hf({**SIZES, **PUBLISHED[name]}) for name in ("smollm3", "phi-4-mini", "gemma 3")}
    assert read["smollm3"].use_rope == (True, True, True, False)
    assert read["smollm3"].tie_word_embeddings
    assert read["phi-4-mini"].rope.dim == 12
    assert read["phi-4-mini"].rope.attention_factor == pytest.approx(1.19, abs=0.001)  # as Microsoft publishes it
    assert read["gemma 3"].layer_types == ("sliding_attention", "full_attention") * 2
    assert read["gemma 3"].rope_local == RopeConfig(theta=10000.0, dim=256, base_dim=256)
    assert read["gemma 3"].embedding_scale == 8.0
    assert read["gemma 3"].attention_scale == 256**-0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    reference = type(tiny_hf_config(family))()
    for key, value in TABLE[family].defaults.items():
        if not (key == "hidden_act" and family == "gemma3_text") and hasattr(reference, key):
            off = key == "sliding_window" and getattr(reference, "use_sliding_window", True) is False
            assert off or getattr(reference, key) == value, key


def test_a_wrapped_text_configuration_is_read_and_vision_is_refused() -> None:
    text = {**SIZES, **PUBLISHED["gemma 3"]}
    wrapped = {"model_type": "gemma3", "text_config": text, "boi_token_index": 299, "vision_config": None}
    assert ModelConfig.from_hf(wrapped) == ModelConfig.from_hf(text)
    with pytest.raises(UserError, match="vision_config"):
        ModelConfig.from_hf({**wrapped, "vision_config": {"hidden_size": 8}})
    with pytest.raises(UserError, match="quantization_config"):
        ModelConfig.from_hf({**wrapped, "quantization_config": {"bits": 4}})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mixtral"}, "mistral"),
        ({"model_type": None}, "without model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"residual_multiplier": 0}, "residual_multiplier"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"attention_sink": True}, "attention_sink"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"num_experts": 8}, "num_experts"),
        ({"is_causal": False}, "is_causal"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"architectures": 3}, "architectures"),
        ({"model_type": "qwen2", "layer_types": 3}, "layer_types"),
        ({"model_type": "smollm3", "no_rope_layers": 3}, "no_rope_layers"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_type"),
        ({"eos_token_id": "a"}, "eos_token_id"),
        (
            {"model_type": "gemma3_text", "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5.0}},
            "rope_theta",
        ),
        ({"some_new_key": [1]}, "some_new_key"),
        ({"hidden_act": "relu2"}, "relu2"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "300"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_scaling": {"factor": 4.0}}, "factor"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}}, "high"),
        ({"rope_scaling": 2.0}, "rope_scaling"),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 5.0}}, "nested"),
        ({"model_type": "gemma3_text", "sliding_window": None}, "sliding_window"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
        ({"model_type": "gemma3", "text_config": [1]}, "text_config"),
        ({"rope_parameters": {"full_attention": [1]}}, "full_attention"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "all"}, "max_window_layers"),
    ],
)
def test_what_would_change_the_maths_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        ModelConfig.from_hf(llama(**change))


# The largest sizes that are known: DeepNet, Megatron-Turing NLG, XLM-V, LTM-2-mini and others.
LARGEST = {
    "num_hidden_layers": 1000,
    "hidden_size": 20_480,
    "intermediate_size": 81_920,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "head_dim": 512,
    "vocab_size": 901_629,
    "max_position_embeddings": 100_000_000,
}


@pytest.mark.parametrize("key", LARGEST)
def test_a_size_beyond_any_model_is_refused_with_its_limit(key: str) -> None:
    same = {"num_attention_heads": {"num_key_value_heads": 128}, "num_key_value_heads": {"num_attention_heads": 128}}
    kept = ModelConfig.from_hf(llama(**{"head_dim": 16, **same.get(key, {}), key: LARGEST[key]}))
    assert getattr(kept, key) == LARGEST[key]
    limit = MAX_SIZES.get(key, 2**31 - 1)
    for absurd in (limit + 1, 10**18, 10**4000):
        shown = re.escape(str(absurd)[:50])
        with pytest.raises(UserError, match=f"'{key}' is {shown}.* must be a positive integer of at most {limit}$"):
            ModelConfig.from_hf(llama(**{key: absurd}))
    with pytest.raises(UserError, match=f"'{key}' is a number of thousands of digits in"):
        ModelConfig.from_hf(llama(**{key: 10**10_000}))


LINEAR = {"type": "linear", "factor": 2.0}
LLAMA3 = {"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
NUMBERS: dict[str, Any] = {
    "rms_norm_eps": lambda value: {"rms_norm_eps": value},
    "rope_theta": lambda value: {"rope_theta": value},
    "initializer_range": lambda value: {"initializer_range": value},
    "partial_rotary_factor": lambda value: {"model_type": "phi3", "partial_rotary_factor": value},
    "query_pre_attn_scalar": lambda value: {"model_type": "gemma3_text", "query_pre_attn_scalar": value},
    "rope_local_base_freq": lambda value: {"model_type": "gemma3_text", "rope_local_base_freq": value},
    "factor": lambda value: {"rope_scaling": {**LINEAR, "factor": value}},
    "low_freq_factor": lambda value: {"rope_scaling": {**LLAMA3, "low_freq_factor": value}},
    "high_freq_factor": lambda value: {"rope_scaling": {**LLAMA3, "high_freq_factor": value}},
    "attention_factor": lambda value: {"rope_scaling": {**LONG, "attention_factor": value}},
    "short_factor": lambda value: {"rope_scaling": {**LONG, "short_factor": [1.0] * 7 + [value]}},
    "long_factor": lambda value: {"rope_scaling": {**LONG, "long_factor": [1.0] * 7 + [value]}},
    "attention_multiplier": lambda value: {"attention_multiplier": value},
    "final_logit_softcapping": lambda value: {"model_type": "gemma3_text", "final_logit_softcapping": value},
}


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("text", ["Infinity", "-Infinity", "NaN", "-1.5", "1e-300", "1e300", "1" + "0" * 4000, '"1"'])
def test_a_number_that_no_model_has_is_refused_by_name(key: str, text: str) -> None:
    change = NUMBERS[key](json.loads(text))
    with pytest.raises(UserError, match=f"{key}' .*(must be a positive number|is not implemented|no positive number)"):
        ModelConfig.from_hf(llama(max_position_embeddings=64, **change))


def test_a_longrope_of_one_position_is_refused() -> None:
    with pytest.raises(UserError, match=r"'original_max_position_embeddings' is 1 .* longrope needs at least 2"):
        ModelConfig.from_hf(llama(original_max_position_embeddings=1, rope_scaling=LONG))


def test_a_list_of_special_tokens_has_an_end() -> None:
    with pytest.raises(UserError, match=r"'eos_token_id' is \[4, 4, .*a token id or a list of at most 1000"):
        ModelConfig.from_hf(llama(eos_token_id=[4] * 1001))


def test_neutral_values_of_unknown_keys_pass() -> None:
    neutral = {"residual_multiplier": 1.0, "logits_scaling": 1, "attention_sink": False, "num_experts": 0, "x": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ModelConfig.from_hf(llama(**neutral)) == ModelConfig.from_hf(llama())


def test_special_tokens_beyond_the_vocabulary_are_a_warning() -> None:
    with pytest.warns(UserWarning, match="eos_token_id 300 is outside"):
        config = ModelConfig.from_hf(llama(eos_token_id=[300, 4], bos_token_id=None))
    assert config.eos_token_ids == (4,)
    assert config.bos_token_id is None


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("mistral", "attention_bias", True),
        ("qwen2", "mlp_bias", True),
        ("llama", "sliding_window", 8),
        ("llama", "partial_rotary_factor", 0.5),
        ("olmo2", "layer_types", ["sliding_attention"] * 4),
    ],
)
def test_keys_of_other_families_have_no_effect_as_in_transformers(model_type: str, key: str, value: object) -> None:
    plain = {**SIZES, "model_type": model_type, "eos_token_id": None}
    with pytest.warns(UserWarning, match=f"'{key}' has no effect"):
        assert ModelConfig.from_hf({**plain, key: value}) == ModelConfig.from_hf(plain)
    transformers.AutoConfig.for_model(**plain, **{key: value})  # accepted there as well


def test_per_layer_rope_is_read_in_any_family() -> None:
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
    }
    config = ModelConfig.from_hf(
        {
            **SIZES,
            "model_type": "qwen3",
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "rope_parameters": nested,
        }
    )
    assert (config.rope.theta, config.rope.factor) == (100.0, 2.0)
    assert config.rope_local is not None
    assert config.rope_local.theta == 10.0
