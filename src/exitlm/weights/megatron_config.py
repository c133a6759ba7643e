"""What the settings of an EE-LLM checkpoint describe: a Llama, its exits, and which output matrices are stored.

A setting that changes the maths in a way that no Llama has is refused by its name. Tensors are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exitlm.errors import UserError, short
from exitlm.model import ExitConfig, ModelConfig
from exitlm.model.config import is_positive
from exitlm.model.exits import ExitKind, check_layers
from exitlm.weights.megatron_file import MegatronCheckpoint

# Settings that change the maths: what an absent one means, and what a Llama has. The last four are younger than EE-LLM.
_LLAMA: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "normalization": ("LayerNorm", ("RMSNorm",)),
    "position_embedding_type": ("learned_absolute", ("rope",)),
    "add_bias_linear": (True, (False,)),
    "swiglu": (False, (True,)),
    "openai_gelu": (False, (False,)),
    "onnx_safe": (None, (None, False)),
    "apply_layernorm_1p": (False, (False,)),
    "apply_residual_connection_post_layernorm": (False, (False,)),
    "rotary_percent": (1.0, (1.0,)),
    "num_experts": (None, (None,)),
    "retro_add_retriever": (False, (False,)),
    "transformer_impl": ("local", ("local",)),
    "virtual_pipeline_model_parallel_size": (None, (None,)),
    "rotary_interleaved": (False, (False,)),
    "use_rope_scaling": (False, (False,)),
    "window_size": (None, (None,)),
    "qk_layernorm": (False, (False,)),
}
_EXIT_SETTINGS = ("use_exit_mlp", "use_exit_block", "use_exit_norm")
_EXIT_KINDS: Mapping[tuple[bool, ...], ExitKind] = {
    (False, False, False): "embed",
    (False, False, True): "norm",
    (True, False, True): "mlp",
    (False, True, True): "block",
}


@dataclass(frozen=True)
class MegatronConfig:
    """What the settings of a checkpoint say.

    ``exits`` are ours, by the 1-based number of the layer that holds theirs, in the order of ``exit_layer_nums``.
    ``untied``: the head has a matrix of its own; ``untied_exits``: each exit has.
    """

    config: ModelConfig
    padded_vocab: int
    exits: Mapping[int, ExitConfig]
    untied: bool
    untied_exits: bool

    @classmethod
    def of(cls, checkpoint: MegatronCheckpoint) -> MegatronConfig:
        settings, ranks = checkpoint.settings, checkpoint.tensor_ranks
        config = ModelConfig.from_hf(_hf_config(settings))
        exits = _exits(settings)
        padded = _natural(settings, "padded_vocab_size")
        for key, size in (
            ("num_attention_heads", config.num_attention_heads),
            ("num_query_groups", config.num_key_value_heads),
            ("ffn_hidden_size", config.intermediate_size),
            ("padded_vocab_size", padded),
        ):
            if size % ranks:
                raise UserError(
                    f"{checkpoint.directory}: {key} is {size}, which {ranks} tensor-parallel ranks can't share; its "
                    "settings contradict each other, choose another checkpoint"
                )
        untied = bool(settings.get("untie_embeddings_and_output_weights"))
        untied_exits = bool(settings.get("untie_exit_output_weights"))
        if exits and untied and not untied_exits:
            raise UserError(
                "the checkpoint has untie_embeddings_and_output_weights without untie_exit_output_weights, for which "
                "EE-LLM has no meaning either; choose another checkpoint"
            )
        return cls(config, padded, exits, untied, untied_exits)


def _hf_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the Llama that the settings describe; a UserError names the setting that no Llama has."""
    rotary = {"position_embedding_type": "rope"} if settings.get("use_rotary_position_embeddings") else {}
    for key, (absent, allowed) in _LLAMA.items():
        value = {**settings, **rotary}.get(key, absent)
        if value not in allowed:
            raise UserError(
                f"the checkpoint's setting {key} is {short(value)}, but exitlm imports models where it is "
                f"{allowed[0]!r} only; choose another checkpoint"
            )
    heads = _natural(settings, "num_attention_heads")
    groups = _natural(settings, "num_query_groups") if settings.get("group_query_attention") else heads
    config = {
        "model_type": "llama",
        "vocab_size": _vocab_size(settings),
        "hidden_size": _natural(settings, "hidden_size"),
        "intermediate_size": _natural(settings, "ffn_hidden_size"),
        "num_hidden_layers": _natural(settings, "num_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": _natural(settings, "kv_channels"),
        "max_position_embeddings": _natural(settings, "max_position_embeddings"),
        "rms_norm_eps": _positive(settings, "norm_epsilon"),
        "rope_theta": float(_positive({"rotary_base": 10_000.0, **settings}, "rotary_base")),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if settings.get("tokenizer_type") == "Llama2Tokenizer":
        config |= {"bos_token_id": 1, "eos_token_id": 2}
    if settings.get("rotary_seq_len_interpolation_factor") is not None:
        factor = float(_positive(settings, "rotary_seq_len_interpolation_factor"))
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return config


def _vocab_size(settings: Mapping[str, Any]) -> int:
    """The true size of the vocabulary if the command line told it (the null tokenizer adds one id), else the padded."""
    padded = _natural(settings, "padded_vocab_size")
    if settings.get("vocab_size") is None:
        return padded
    size = _natural(settings, "vocab_size") + (settings.get("tokenizer_type") == "NullTokenizer")
    if size > padded:
        raise UserError(
            f"the checkpoint's vocab_size ({size}) exceeds its padded_vocab_size ({padded}); choose another checkpoint"
        )
    return size


def _exits(settings: Mapping[str, Any]) -> dict[int, ExitConfig]:
    """Our exits by the 1-based number of the layer that theirs belong to."""
    numbers = settings.get("exit_layer_nums") or []
    if not isinstance(numbers, list) or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise UserError(f"the checkpoint's exit_layer_nums is {short(numbers)}, it must be a list of layers")
    flags = tuple(bool(settings.get(key)) for key in _EXIT_SETTINGS)
    kind, before = _EXIT_KINDS.get(flags), bool(settings.get("pre_exit"))
    if numbers and kind is None:
        used = ", ".join(key for key, flag in zip(_EXIT_SETTINGS, flags, strict=True) if flag)
        raise UserError(
            f"the checkpoint's exits have {used} and nothing else, which no exit of exitlm computes (use_exit_mlp or "
            "use_exit_block, not both, come with use_exit_norm); choose another checkpoint"
        )
    if numbers and before and kind == "mlp":
        raise UserError(
            "the checkpoint has use_exit_mlp with pre_exit, which EE-LLM itself refuses; choose another one"
        )
    if numbers and before and min(numbers) == 1:
        raise UserError(
            "the checkpoint has pre_exit with an exit at layer 1, which reads the embeddings: exitlm has no such exit; "
            "choose another checkpoint"
        )
    check_layers(numbers, _natural(settings, "num_layers"))
    return {number: ExitConfig(layer=number - before, kind=kind) for number in numbers if kind is not None}


def _positive(settings: Mapping[str, Any], key: str) -> float:
    value = settings.get(key)
    if not is_positive(value):
        raise UserError(f"the checkpoint's setting {key} is {short(value)}, it must be a positive number")
    return value


def _natural(settings: Mapping[str, Any], key: str) -> int:
    value = _positive(settings, key)
    if not isinstance(value, int):
        raise UserError(f"the checkpoint's setting {key} is {short(value)}, it must be a whole number")
    return value
