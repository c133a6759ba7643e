"""Small models with exits for the decode tests, and what is asked of them again and again. Not a test."""

import functools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from exitlm.decode.engine import Engine
from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.pricing.costs import Costs
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig, RidgeStatistics
from tests.model.families import native_sizes, tiny_model


def random_ids(count: int, seed: int = 0, vocab_size: int = 97) -> list[int]:
    """Token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (count,), generator=generator).tolist()


@torch.no_grad()
def attach(model: EarlyExitModel, configs: Sequence[ExitConfig], seed: int = 0) -> EarlyExitModel:
    """Replace the model's exits; candidates are random ids, and gates (which start at zero) get random weights."""
    model.remove_exits(list(model.exit_heads()))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(model.config.vocab_size, generator=generator)
    model.add_exits(configs, seed=seed, candidate_ids=ids)
    for head in model.exit_heads().values():
        for name, parameter in head.named_parameters():
            if name.startswith("gate") or name.endswith("bias"):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(noise * (0.2 if name.startswith("gate") else 0.05))
    return model


@torch.no_grad()
def fade(model: EarlyExitModel, first: int, factor: float) -> EarlyExitModel:
    """Let the layers from ``first`` (1-based) on change the stream less, so that exits below agree with the model."""
    for number, layer in model.model.layers.by_number().items():
        if number + 1 < first:
            continue
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            if model.config.norm_placement != "pre":
                weight = getattr(layer, norm).weight
                weight.copy_((weight + model.config.norm_offset) * factor - model.config.norm_offset)
        if model.config.norm_placement == "pre":
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
    return model


@torch.no_grad()
def fit_lenses(model: EarlyExitModel, seed: int = 0) -> EarlyExitModel:
    """Solve every lens on random text."""
    ids = torch.tensor([random_ids(32, seed * 1000 + i, model.config.vocab_size) for i in range(24)])
    heads = {layer: head for layer, head in model.exit_heads().items() if head.config.kind == "lens"}
    depth = model.config.num_hidden_layers
    taps = model.taps(ids, [*heads, depth])
    target = model.final_features(taps[depth].hidden).flatten(0, 1)
    for layer, head in heads.items():
        statistics = RidgeStatistics(model.config.hidden_size)
        statistics.add(head.unit(taps[layer].hidden).flatten(0, 1), target)
        slope, offset = statistics.solve()
        head.lens.weight.copy_(slope)
        head.lens.bias.copy_(offset)
    return model


@functools.cache
def drafting_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float64, native: bool = False
) -> EarlyExitModel:
    """Four layers, fitted lenses with gates behind 1, 2 and 3: an exit is often right and often wrong. ``native``: of a
    size that the native kernels take. Shared by tests: do not change it."""
    model = fade(tiny_model(family, torch.float64, seed, **(native_sizes(family) if native else {})), 3, 0.5)
    attach(model, [ExitConfig(layer=layer, gate=True) for layer in (1, 2, 3)], seed)
    return fit_lenses(model, seed).to(dtype)


def some_costs(model: EarlyExitModel, layer: float = 1.0, head: float = 4.0, row: float = 0.05) -> Costs:
    """A costs table: a row more adds ``row`` of a layer's and the head's time; a test costs a fifth of a layer."""
    sizes = (1, 2, 4, 8, 16)
    exits = list(model.exit_heads())
    return Costs(
        rows=sizes,
        layer=(tuple(layer * (1 + row * (m - 1)) for m in sizes),),
        head=tuple(head * (1 + row * (m - 1)) for m in sizes),
        test=dict.fromkeys(exits, 0.2 * layer),
        draft=dict.fromkeys(exits, 0.2 * layer),
        num_hidden_layers=model.config.num_hidden_layers,
    )


def make_engine(model: EarlyExitModel, **options: object) -> Engine:
    """An engine that measures nothing."""
    return Engine(model, **{"costs": some_costs(model), "quant": "none", **options})


def generate(engine: Engine, prompt: Sequence[int], **settings: object) -> Generation:
    """``engine.generate`` with the settings as keywords."""
    return engine.generate(prompt, GenerationConfig.of(settings))


def greedy_reference(model: EarlyExitModel, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy text by full passes over everything, with no cache and nothing of ``exitlm.decode``."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model.logits(ids)[0, -1].argmax()))
    return ids[len(prompt) :]


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a fraction of the largest finite |expected|; infinities must be in the same places."""
    finite = expected.isfinite()
    assert torch.equal(finite, found.isfinite())
    return float((found - expected)[finite].abs().max() / expected[finite].abs().max())


def shuffled(items: Sequence[object], seed: int) -> list[object]:
    """A seeded shuffle."""
    found = list(items)
    random.Random(seed).shuffle(found)
    return found
