"""Our logits against transformers' on random tiny models of every family, in the settings each family can have."""

import random
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from exitlm.model import EarlyExitModel, ModelConfig, Past
from tests.model.families import FAMILIES, convert, tiny_hf_config, tiny_hf_model, tiny_model

TOLERANCE = 1e-5
SEEDS = range(6)


def worst(ours: Tensor, theirs: Tensor, where: Tensor | None = None) -> float:
    """The largest difference as a fraction of the largest |logit|, at the positions of ``where``."""
    if where is not None:
        ours, theirs = ours[where], theirs[where]
    return float((ours - theirs).abs().max() / theirs.abs().max())


def random_rope(rng: random.Random, rotary: int, total: int, old: bool) -> dict[str, Any]:
    """Random flat RoPE settings in the spelling of transformers 4 (``old``) or 5."""
    kind = rng.choice(["default", "linear", "llama3", "longrope"])
    settings: dict[str, Any] = {rng.choice(["type", "rope_type"]) if old else "rope_type": kind}
    if kind == "linear":
        settings["factor"] = rng.choice([2.0, 3.5])
    elif kind == "llama3":
        settings |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        settings["original_max_position_embeddings"] = rng.choice([16, 64])
    elif kind == "longrope":
        for key in ("short_factor", "long_factor"):
            settings[key] = [round(rng.uniform(1, 4), 3) for _ in range(rotary // 2)]
        settings["original_max_position_embeddings"] = rng.choice([total // 2, 64])
        settings |= rng.choice([{}, {"factor": 4.0}, {"attention_factor": 1.3}])
    theta = rng.choice([10_000.0, 500.0])
    if old:
        return {"rope_theta": theta, "rope_scaling": None if kind == "default" else settings}
    return {"rope_parameters": {**settings, "rope_theta": theta}}


@dataclass(frozen=True)
class Sizes:
    """Among which random settings choose: of the stream for each head, of a head, and between gate and down."""

    stream: tuple[int, ...] = (8, 12)
    head: tuple[int, ...] = (6, 8, 16)
    inner: tuple[int, ...] = (20, 40)
    phi3: int = 8


TINY = Sizes()


def random_config(family: str, rng: random.Random, total: int, sizes: Sizes = TINY) -> dict[str, Any]:
    """Random settings for ``tiny_hf_config``, as a configuration file of that family could hold them."""
    kv_heads = rng.choice([1, 2, 4])
    heads = kv_heads * rng.choice([1, 2]) if kv_heads < 4 else 4
    config: dict[str, Any] = {
        "hidden_size": heads * rng.choice(sizes.stream),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice(sizes.head),
        "intermediate_size": rng.choice(sizes.inner),
        "num_hidden_layers": rng.choice([1, 3, 4]),
        "tie_word_embeddings": rng.random() < 0.5,
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
    }
    layers, old = config["num_hidden_layers"], rng.random() < 0.5
    activation = "hidden_activation" if family == "gemma3_text" else "hidden_act"
    config[activation] = rng.choice(["silu", "gelu", "gelu_pytorch_tanh", "gelu_new"])
    if family in ("llama", "qwen3", "gemma3_text", "olmo2", "smollm3"):
        config["attention_bias"] = rng.random() < 0.5
    if family in ("llama", "smollm3"):
        config["mlp_bias"] = rng.random() < 0.5
    if family in ("mistral", "phi3"):
        config["sliding_window"] = rng.choice([None, 2, 6])
    if family in ("qwen2", "qwen3", "smollm3"):
        config |= {"use_sliding_window": rng.random() < 0.7, "sliding_window": 6}
        if config["use_sliding_window"] and rng.random() < 0.5:
            config["layer_types"] = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(layers)]
        if family != "smollm3":
            config["max_window_layers"] = rng.choice([0, 1, 2])
    if family == "smollm3":
        config |= rng.choice([{"no_rope_layer_interval": 2}, {"no_rope_layers": [rng.randint(0, 1) for _ in "abcd"]}])
    if family == "gemma3_text":
        config |= {"query_pre_attn_scalar": rng.choice([8, 50]), "layer_types": None, "sliding_window_pattern": 2}
        if old:
            scaling = rng.choice([None, {"rope_type": "linear", "factor": 8.0}])
            return config | {"rope_theta": 900.0, "rope_local_base_freq": 70.0, "rope_scaling": scaling}
        return config | {
            "rope_parameters": {
                "full_attention": random_rope(rng, config["head_dim"], total, False)["rope_parameters"],
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 60.0},
            }
        }
    if family == "phi3":
        partial = rng.choice([1.0, 0.5])
        config |= {"head_dim": sizes.phi3, "hidden_size": sizes.phi3 * heads}
        config["original_max_position_embeddings"] = rng.choice([9, 64])
        rope = random_rope(rng, int(sizes.phi3 * partial), total, old)
        settings = rope.get("rope_scaling") or rope.get("rope_parameters") or {}
        if settings.get("rope_type", settings.get("type")) in ("linear", "llama3"):  # transformers refuses these here
            rope = {"rope_theta": 300.0}
        rope.get("rope_parameters", config)["partial_rotary_factor"] = partial
        return config | rope
    return config | random_rope(rng, config["head_dim"], total, old)


def compare(theirs: transformers.PreTrainedModel, ours: EarlyExitModel, rng: random.Random, total: int) -> float:
    """The worst deviation in one pass, with left padding, and with a cache split at a random position."""
    ids = torch.randint(3, 97, (3, total), generator=torch.Generator().manual_seed(rng.randrange(10**6)))
    mask = torch.ones_like(ids)
    for row in (1, 2):
        mask[row, : rng.randrange(1, total - 1)] = 0
    cut = rng.randrange(1, total)
    found = [
        worst(ours(ids), theirs(ids).logits),
        worst(ours(ids, mask), theirs(ids, attention_mask=mask).logits, mask > 0),
    ]
    for padding in (None, mask):
        past, cache = Past(), transformers.DynamicCache(config=theirs.config)
        for start, end in ((0, cut), (cut, total)):
            part = None if padding is None else padding[:, :end]
            new = ids[:, start:end]
            # Padding is not counted, as in transformers' generate: it matters where longrope changes its factors.
            positions = None if part is None else (part.cumsum(-1) - 1).clamp(min=0)[:, start:]
            expected = theirs(
                new, attention_mask=part, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits
            where = None if part is None else part[:, start:] > 0
            if where is None or where.any():
                found.append(worst(ours(new, part, past), expected, where))
            else:
                ours(new, part, past)
        assert past.length == total
    return max(found)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(family: str) -> None:
    theirs = tiny_hf_model(family)
    assert compare(theirs, convert(theirs), random.Random(0), 17) <= TOLERANCE


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers_on_random_configurations(family: str, seed: int) -> None:
    rng, total = random.Random(f"{family} {seed}"), 14
    config = random_config(family, rng, total)
    theirs = tiny_hf_model(family, seed, **config)
    saved = theirs.config.to_dict()
    written = {**saved, **config, "model_type": family}
    if "rope_parameters" not in config:
        del written["rope_parameters"]
    if written.get("layer_types") is not None and config.get("layer_types") is None:
        del written["layer_types"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ModelConfig.from_hf(written) == ModelConfig.from_hf(saved)
        ours = convert(theirs, config=written)
    assert compare(theirs, ours, rng, total) <= TOLERANCE, config


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_transformers(family: str) -> None:
    theirs = tiny_hf_model(family)
    ours = convert(theirs)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    theirs(ids).logits.square().mean().backward()
    ours(ids).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert worst(parameter.grad, expected[name].grad) <= 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16_rounds_where_transformers_rounds(family: str) -> None:
    theirs = tiny_hf_model(family)
    frequencies = {name: buffer.clone() for name, buffer in theirs.named_buffers() if "inv_freq" in name}
    theirs.to(torch.bfloat16)
    for name, buffer in frequencies.items():  # a loaded model keeps them in float32, `to` does not
        module, _, leaf = name.rpartition(".")
        setattr(theirs.get_submodule(module), leaf, buffer)
    ours = convert(theirs, torch.bfloat16)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    assert worst(ours(ids).float(), theirs(ids).logits.float()) <= 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_float64_is_float32_made_precise(family: str) -> None:
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    wide = tiny_model(family)
    logits = wide(ids)
    assert logits.dtype == torch.float64
    assert worst(tiny_model(family, torch.float32)(ids).double(), logits) <= TOLERANCE
    past = Past()
    split = torch.cat([wide(ids[:, :4], past=past), wide(ids[:, 4:], past=past)], dim=1)
    assert worst(split, logits) <= 1e-13


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_device_gives_shapes(family: str) -> None:
    with torch.device("meta"):
        model = EarlyExitModel(ModelConfig.from_hf(tiny_hf_config(family).to_dict()))
    assert model.device.type == "meta"
    assert model(torch.zeros(2, 9, dtype=torch.long, device="meta")).shape == (2, 9, 97)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
