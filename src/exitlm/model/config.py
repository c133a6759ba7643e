"""The configuration of a decoder: what its maths needs, read from a Hugging Face ``config.json``.

:meth:`ModelConfig.from_hf` follows transformers' reading of each supported family, key by key. Nothing is silently
dropped: a key either is read, or is known not to touch the maths, or has a neutral value, or is refused by its name.
Not here: files (``exitlm.weights``) and exits (``exits.py``).
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard, cast

from exitlm.errors import UserError, nearest, short
from exitlm.model.families import FAMILIES, Family, check_keys
from exitlm.model.rope import RopeConfig, RopeKind

FULL = "full_attention"
SLIDING = "sliding_attention"
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}
"""Names in HF configurations, and the one that stands for each function here."""

MAX_SIZES: Mapping[str, int] = {
    "num_hidden_layers": 1 << 10,  # 126 in Llama 3.1 405B; 1,000 in DeepNet (arXiv 2203.00555)
    "hidden_size": 1 << 18,  # 16,384 in Llama 3.1 405B; 20,480 in Megatron-Turing NLG 530B (arXiv 2201.11990)
    "intermediate_size": 1 << 20,  # 53,248 in Llama 3.1 405B; 81,920 in Megatron-Turing NLG
    "num_attention_heads": 1 << 12,  # 128 in both
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,  # 256 in Gemma 3
    "vocab_size": 1 << 24,  # 262,208 in Gemma 3; 901,629 in XLM-V (arXiv 2301.10472)
}
"""What is larger than any model: a configuration with more is damaged, and would take minutes or all memory."""
_MAX_POSITIONS = (1 << 31) - 1  # of contexts, windows and periods, which take no memory; 10,485,760 in Llama 4 Scout
_MIN_NUMBER, _MAX_NUMBER = 1e-30, 1e30  # of the range of float32, so that no settings have it overflow at once
_MAX_SPECIAL_IDS = 1000


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family, by its maths.

    ``norm_offset``: the weight of a norm is offset + w (Gemma stores w - 1). ``norm_in_float32``: half-precision norms
    multiply by the weight before they round. ``rope_in_float32``: half-precision models keep float32 rotary tables.
    ``layer_types[i]`` is "full_attention" or "sliding_attention"; sliding layers see the last ``sliding_window``
    positions, their own included, and use ``rope_local`` where it is given. ``hf`` is the config.json it came from.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    rope_local: RopeConfig | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    norm_offset: float = 0.0
    norm_in_float32: bool = False
    rope_in_float32: bool = False
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    fused_projections: bool = False
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    use_rope: tuple[bool, ...] = ()
    initializer_range: float = 0.02
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    hf: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        # The neutral values of per-layer fields depend on other fields; a frozen dataclass sets them this way.
        if not self.layer_types:
            object.__setattr__(self, "layer_types", (FULL,) * self.num_hidden_layers)
        if not self.use_rope:
            object.__setattr__(self, "use_rope", (True,) * self.num_hidden_layers)
        if not self.attention_scale:
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a Hugging Face configuration (transformers 4 or 5 spelling).

        Raises:
            UserError: an unsupported architecture, a key that would change the maths in a way exitlm does not
                implement, or sizes that contradict each other; the message names the key.
        """
        outer, config = config, _text_part(config)
        model_type = config.get("model_type")
        family = FAMILIES.get(str(model_type))
        if family is None:
            found = "a config without model_type" if model_type is None else f"model_type '{model_type}'"
            raise UserError(
                f"{found} is not supported (supported: {', '.join(FAMILIES)}), choose a model of one of these "
                f"architectures{nearest(str(model_type), FAMILIES)}"
            )
        check_keys(config, family)
        values = {**family.defaults, **config}
        layers = _size(values, "num_hidden_layers")
        hidden, heads = _size(values, "hidden_size"), _size(values, "num_attention_heads")
        kv_heads = _size(values, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise UserError(
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads}) in the config"
            )
        head_dim = _size(values, "head_dim", default=hidden // heads)
        window, layer_types = _attention_pattern(values, family, layers)
        rope, rope_local = _read_ropes(values, family, head_dim)
        vocab = _size(values, "vocab_size")
        scalar = _number(values, "query_pre_attn_scalar") if "query_pre_attn_scalar" in family.reads else head_dim
        attention_bias = bool(values.get("attention_bias")) and "attention_bias" in family.reads
        return cls(
            model_type=family.name,
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=_size(values, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_size(values, "max_position_embeddings"),
            rms_norm_eps=_number(values, "rms_norm_eps"),
            rope=rope,
            rope_local=rope_local,
            hidden_act=_activation(values, family),
            tie_word_embeddings=bool(values["tie_word_embeddings"]),
            qkv_bias=attention_bias or family.qkv_bias,
            o_bias=attention_bias,
            mlp_bias=bool(values.get("mlp_bias")) and "mlp_bias" in family.reads,
            qk_norm=family.qk_norm,
            norm_placement=family.norm_placement,
            norm_offset=family.norm_offset,
            norm_in_float32=family.norm_in_float32,
            rope_in_float32=family.rope_in_float32,
            embedding_scale=hidden**0.5 if family.scaled_embedding else 1.0,
            attention_scale=scalar**-0.5,
            fused_projections=family.fused_projections,
            layer_types=layer_types,
            sliding_window=window,
            use_rope=_rope_layers(values, family, layers),
            initializer_range=_number(values, "initializer_range"),
            eos_token_ids=token_ids(config, "eos_token_id", vocab, family.defaults),
            bos_token_id=next(iter(token_ids(config, "bos_token_id", vocab, family.defaults)), None),
            pad_token_id=next(iter(token_ids(config, "pad_token_id", vocab, family.defaults)), None),
            hf=dict(outer),
        )


def is_positive(value: Any) -> TypeGuard[float]:
    """Whether a value is a positive number that arithmetic in float32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and _MIN_NUMBER <= value <= _MAX_NUMBER


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a Gemma 3 wrapper without vision as the text configuration it wraps; any other one unchanged."""
    if config.get("model_type") != "gemma3":
        return config
    if config.get("vision_config"):
        raise UserError(
            "this config has a vision_config, and exitlm reads text models only: choose the text-only checkpoint "
            "(model_type gemma3_text)"
        )
    outer = {key: value for key, value in config.items() if key not in ("text_config", "vision_config")}
    return {**outer, **_table(config, "text_config"), "model_type": "gemma3_text"}


def _table(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"'{key}' must be an object in the model's config, not {short(found)}")
    return found


def _size(values: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    most = MAX_SIZES.get(key, _MAX_POSITIONS)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        found = "is missing from" if value is None else f"is {short(value)} in"
        raise UserError(f"'{key}' {found} the model's config, it must be a positive integer of at most {most}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key)
    value = default if value is None else value
    if not is_positive(value):
        found = "is missing from" if value is None else f"is {short(value)} in"
        raise UserError(
            f"'{key}' {found} the model's config, it must be a positive number ({_MIN_NUMBER:g} to {_MAX_NUMBER:g})"
        )
    return float(value)


def _attention_pattern(values: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, tuple[str, ...]]:
    """Return the sliding window (None if no layer slides) and the type of each layer."""
    window = values.get("sliding_window") if "sliding_window" in family.reads else None
    if "use_sliding_window" in family.reads and not values.get("use_sliding_window"):
        window = None
    given = values.get("layer_types") if "layer_types" in family.reads else None
    if given is not None:
        if not isinstance(given, list | tuple):
            raise UserError(
                f"'layer_types' is {short(given)} in the model's config, it must be a list with one per layer"
            )
        unknown = sorted({str(kind) for kind in given} - {FULL, SLIDING})
        if unknown:
            raise UserError(f"layer_types holds '{unknown[0]}', supported are '{FULL}' and '{SLIDING}'")
        if len(given) < layers:
            raise UserError(f"layer_types has {len(given)} entries for {layers} layers, it needs one per layer")
        types = tuple(given[:layers])
    elif family.sliding == "all":
        types = (FULL if window is None else SLIDING,) * layers
    elif family.sliding == "after":
        first = values["max_window_layers"] if window is not None else layers
        if isinstance(first, bool) or not isinstance(first, int):
            raise UserError(f"'max_window_layers' is {short(first)} in the model's config, it must be a whole number")
        types = tuple(SLIDING if index >= first else FULL for index in range(layers))
    elif family.sliding == "pattern":
        period = _size(values, "sliding_window_pattern")
        types = tuple(SLIDING if (index + 1) % period else FULL for index in range(layers))
    elif family.sliding == "nope":
        rope = _rope_layers(values, family, layers)
        types = tuple(FULL if window is None or used else SLIDING for used in rope)
    else:
        types = (FULL,) * layers
    if SLIDING not in types:
        return None, types
    if window is None:
        raise UserError("layer_types asks for sliding_attention, but no sliding_window is in force in the config")
    return _size({"sliding_window": window}, "sliding_window"), types


def _rope_layers(values: Mapping[str, Any], family: Family, layers: int) -> tuple[bool, ...]:
    """Return for each layer whether it rotates queries and keys (False: a NoPE layer)."""
    if "no_rope_layers" not in family.reads:
        return (True,) * layers
    given = values.get("no_rope_layers")
    if given is None:
        interval = _size(values, "no_rope_layer_interval")
        return tuple(bool((index + 1) % interval) for index in range(layers))
    if not isinstance(given, list | tuple) or len(given) < layers:
        given = given if isinstance(given, list | tuple) else []
        raise UserError(f"no_rope_layers has {len(given)} entries for {layers} layers, it needs one per layer")
    return tuple(bool(used) for used in given[:layers])


def _activation(values: Mapping[str, Any], family: Family) -> str:
    name = str(values[family.activation_key])
    if name not in ACTIVATIONS:
        raise UserError(
            f"{family.activation_key} '{name}' is not supported (supported: {', '.join(ACTIVATIONS)})"
            f"{nearest(name, ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


_ROPE_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "longrope": frozenset({"factor", "short_factor", "long_factor", "attention_factor"}),
}


def _read_ropes(values: Mapping[str, Any], family: Family, head_dim: int) -> tuple[RopeConfig, RopeConfig | None]:
    """Return the RoPE of the model, and that of its sliding layers where it is another.

    Transformers 4 writes ``rope_theta`` and ``rope_scaling`` (and Gemma ``rope_local_base_freq``), transformers 5
    ``rope_parameters``, flat or one per layer type. Where both are present, the older spelling wins, as there.
    """
    scaling, parameters = _table(values, "rope_scaling"), _table(values, "rope_parameters")
    if family.local_theta is not None and "rope_theta" in scaling:
        raise UserError("rope_scaling holds a rope_theta, which this family reads from the top level; move it there")
    nested = FULL in parameters or SLIDING in parameters
    theta = _number(values, "rope_theta", family.theta)
    if family.local_theta is None and not nested:
        return _read_rope(scaling or parameters, values, family, head_dim, theta), None
    if parameters and not nested:
        raise UserError(
            f"'rope_parameters' of a {family.name} model must be nested: one object for '{FULL}', one for '{SLIDING}'"
        )
    if nested and (stray := sorted(set(parameters) - {FULL, SLIDING})):
        raise UserError(f"rope_parameters holds '{stray[0]}' beside layer types, remove it or move it into one of them")
    values = {key: value for key, value in values.items() if key != "original_max_position_embeddings"}
    full = {**_table(parameters, FULL), **scaling}
    local_theta = _number(values, "rope_local_base_freq", family.local_theta or theta)
    rope = _read_rope(full, values, family, head_dim, theta)
    if family.local_theta is None and SLIDING not in parameters:
        return rope, None
    local = _read_rope(_table(parameters, SLIDING), values, family, head_dim, local_theta)
    return rope, local


def _read_rope(
    settings: Mapping[str, Any], values: Mapping[str, Any], family: Family, head_dim: int, theta: float
) -> RopeConfig:
    """Read one RoPE from its flat ``settings``; ``values`` is the whole configuration."""
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if family.name == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # what early Phi-3 files called it
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise UserError(
            f"rope_type '{kind}' is not supported (supported: {', '.join(_ROPE_KEYS)}), choose a checkpoint with "
            f"one of these{nearest(str(kind), _ROPE_KEYS)}"
        )
    known = _ROPE_KEYS[kind] | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    known |= {"original_max_position_embeddings"}  # a note where the kind does not use it
    for key, value in settings.items():
        if key not in known and value is not None and (key != "factor" or value != 1):
            raise UserError(f"the RoPE setting '{key}' ({short(value)}) is not implemented for rope_type '{kind}'")
    partial = _number(settings, "partial_rotary_factor", _number(values, "partial_rotary_factor", 1.0))
    if partial != 1.0 and kind == "default" and not family.partial_rotary:
        warnings.warn(
            f"'partial_rotary_factor' has no effect in a model of type {family.name} with unscaled RoPE "
            "(as in transformers)",
            stacklevel=5,
        )
        partial = 1.0
    base = int(head_dim * partial)  # may be odd: then one more dimension rotates, with the odd number in the exponent
    dim = base + base % 2
    if not 2 <= dim <= head_dim:
        raise UserError(f"a head of {head_dim} dimensions cannot rotate {base}: head_dim must be even or partly rotary")
    theta = _number(settings, "rope_theta", theta)
    if kind == "default":
        return RopeConfig(theta=theta, dim=dim, base_dim=base)
    return _read_scaling(settings, values, RopeConfig(theta=theta, dim=dim, base_dim=base, kind=cast(RopeKind, kind)))


def _read_scaling(settings: Mapping[str, Any], values: Mapping[str, Any], plain: RopeConfig) -> RopeConfig:
    """Add what the kind of ``plain`` needs."""
    if plain.kind == "linear":
        return replace(plain, factor=_number(settings, "factor"))
    longest = _size(values, "max_position_embeddings")
    original = values.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
    original = _size({"original_max_position_embeddings": original or longest}, "original_max_position_embeddings")
    if plain.kind == "llama3":
        low, high = _number(settings, "low_freq_factor"), _number(settings, "high_freq_factor")
        if low >= high:
            raise UserError(
                f"high_freq_factor ({high}) must be greater than low_freq_factor ({low}) in the RoPE settings"
            )
        return replace(
            plain,
            factor=_number(settings, "factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position_embeddings=original,
        )
    if original < 2:
        raise UserError("'original_max_position_embeddings' is 1 in the model's config, longrope needs at least 2")
    factor = _number(settings, "factor", longest / original)
    derived = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return replace(
        plain,
        factor=factor,
        attention_factor=_number(settings, "attention_factor", derived),
        original_max_position_embeddings=original,
        short_factor=_stretches(settings, "short_factor", plain.dim // 2),
        long_factor=_stretches(settings, "long_factor", plain.dim // 2),
    )


def _stretches(settings: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    given = settings.get(key)
    if not isinstance(given, list | tuple) or len(given) != count:
        found = len(given) if isinstance(given, list | tuple) else "no"
        raise UserError(f"longrope needs {count} numbers as '{key}', the config has {found}")
    if not all(map(is_positive, given)):
        raise UserError(f"'{key}' of longrope holds something that is no positive number; download the config again")
    return tuple(float(value) for value in given)


def token_ids(
    config: Mapping[str, Any], key: str, vocab: int, defaults: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Return the special ids within the vocabulary; warn about those a config names beyond it."""
    value = config[key] if key in config else (defaults or {}).get(key)
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(ids) > _MAX_SPECIAL_IDS or any(isinstance(index, bool) or not isinstance(index, int) for index in ids):
        raise UserError(
            f"'{key}' is {short(value)} in the model's config, it must be a token id or a list of at most "
            f"{_MAX_SPECIAL_IDS}"
        )
    beyond = [index for index in ids if not 0 <= index < vocab]
    if beyond and key in config:
        warnings.warn(
            f"{key} {', '.join(map(short, beyond))} is outside of the vocabulary of {vocab} tokens and is not used",
            stacklevel=4,
        )
    return tuple(index for index in ids if 0 <= index < vocab)
