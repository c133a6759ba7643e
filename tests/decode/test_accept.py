"""The acceptance rule, on paper and as the engine uses it: draws are from exactly the full model's distribution."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from exitlm.decode import request
from exitlm.decode.accept import accept, residual
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.sample import draw, sampler_of
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.models import attach, generate, make_engine
from tests.model.families import tiny_model

P = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)


def test_the_residual_is_the_normalised_excess_of_p() -> None:
    assert residual(P, Q).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert residual(Q, P).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert residual(P, P).equal(P)
    certain = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert residual(P, certain).tolist() == pytest.approx([5 / 7, 0, 0, 2 / 7])


def test_accepting_and_replacing_gives_p_on_paper() -> None:
    """sum_x q(x) [accept x -> x, else residual] = p, for random p and q with zeros."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        p, q = torch.rand(2, 7, generator=generator, dtype=torch.float64)
        p[torch.rand(7, generator=generator) < 0.3] = 0
        q[torch.rand(7, generator=generator) < 0.3] = 0
        p, q = p / p.sum(), q / q.sum()
        kept = torch.minimum(p, q)
        found = kept + (q - kept).sum() * residual(p, q)
        assert torch.allclose(found, p, rtol=0, atol=1e-12)


@pytest.mark.parametrize("q", [None, Q])
def test_accept_draws_from_p(q: Tensor | None) -> None:
    generator, count, found = torch.Generator().manual_seed(3), 4000, Counter[int]()
    for _ in range(count):
        token = 2 if q is None else draw(q, generator)
        found[accept(P, q, token, generator)] += 1
    assert found[1] == 0
    assert chi_square({(i,): float(p) for i, p in enumerate(P)}, Counter({(i,): n for i, n in found.items()})) > 1e-3


def test_a_draft_of_equal_distributions_is_always_accepted() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        token = draw(P, generator)
        assert accept(P, P, token, generator) == token


def test_a_draft_that_the_model_rules_out_is_never_accepted() -> None:
    generator = torch.Generator().manual_seed(0)
    assert all(accept(P, q, 1, generator) != 1 for q in (Q, None) for _ in range(100))


# ---- the joint distribution of what the engine generates

V = 16
# written by the model, so that looking it up is right now and then
PROMPT = [
    7,
    7,
    7,
    15,
    10,
    15,
    10,
    14,
    9,
    14,
    12,
    14,
    12,
    7,
    0,
    10,
    14,
    12,
    14,
    12,
    15,
    10,
    14,
    12,
    14,
    9,
    14,
    12,
    14,
    12,
]


@functools.cache
def small_model(layers: int = 2, candidates: int = 0) -> EarlyExitModel:
    """16 tokens and an exit behind every layer but the last, which are not far off and not right."""
    model = tiny_model(
        "llama", vocab_size=V, num_hidden_layers=layers, hidden_size=16, intermediate_size=24, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    return attach(model, [ExitConfig(layer=layer, candidates=candidates) for layer in range(1, layers)])


def exact(model: EarlyExitModel, config: GenerationConfig, count: int) -> dict[tuple[int, ...], float]:
    """The joint distribution of the first ``count`` tokens, from full passes over every prefix."""
    sampler, found = sampler_of(config), {(): 1.0}
    for _ in range(count):
        longer = {}
        texts = [[*PROMPT, *prefix] for prefix in found]
        rows = torch.cat([model.logits(texts[at : at + 256])[:, -1] for at in range(0, len(texts), 256)])
        for (prefix, weight), row, text in zip(found.items(), rows, texts, strict=True):
            for token, p in enumerate(sampler.distribution(row, text).tolist()):
                if p > 0:
                    longer[*prefix, token] = weight * p
        found = longer
    return found


def chi_square(expected: dict[tuple[int, ...], float], found: Counter[tuple[int, ...]]) -> float:
    """The p-value of counts against probabilities; cells that expect fewer than 5 are thrown together."""
    total = found.total()
    if any(cell not in expected for cell in found):
        return 0.0  # something was drawn that has no probability
    large = {cell: total * p for cell, p in expected.items() if total * p >= 5}
    pairs = [(found[cell], mean) for cell, mean in large.items()]
    rest = total - sum(large.values())
    if rest >= 5:
        pairs.append((total - sum(n for n, _ in pairs), rest))
    statistic = sum((n - mean) ** 2 / mean for n, mean in pairs)
    freedom = torch.tensor((len(pairs) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


CASES: dict[str, dict[str, Any]] = {
    "every token drafted at an exit": dict(draft=("exits",), threshold=0.0, top_k=6),
    "drafts where the exit is sure": dict(draft=("exits",), threshold=0.35, rule="probability", top_p=0.7),
    "a deeper exit by patience": dict(draft=("exits",), rule="patience", layers=3, temperature=1.6, top_k=5),
    "an exit without most of the tokens": dict(draft=("exits",), threshold=0.0, candidates=6, min_p=0.1),
    "drafts from the text": dict(draft=("lookup",), temperature=1.3, top_k=7),
    "both, with a penalty": dict(threshold=0.3, layers=3, repetition_penalty=1.3, top_k=5, adaptive=True),
}


def sample(name: str, runs: int, count: int = 3) -> tuple[float, float]:
    """The p-value of ``runs`` generations, and the share of drafts that were accepted."""
    settings = {"temperature": 0.8, "adaptive": False, "ignore_eos": True, **CASES[name]}
    model = small_model(settings.pop("layers", 2), settings.pop("candidates", 0))
    engine = make_engine(model)
    found, drafted, accepted = Counter[tuple[int, ...]](), 0, 0
    for seed in range(runs):
        out = generate(engine, PROMPT, mode="lossless", max_new_tokens=count + 1, seed=seed, **settings)
        found[tuple(out.token_ids[:count])] += 1
        drafted += out.stats["drafted"]
        accepted += out.stats["accepted"]
    assert drafted > runs / 4
    p = chi_square(exact(model, GenerationConfig(mode="lossless", **settings), count), found)
    return p, accepted / drafted


@pytest.mark.parametrize("name", CASES)
def test_lossless_draws_from_the_full_models_distribution(name: str) -> None:
    p, acceptance = sample(name, 900)
    assert 0.05 < acceptance < 0.95
    assert p > 1e-3


def keeps_all(p: Tensor, q: Tensor | None, token: int, generator: torch.Generator) -> int:
    """Wrong: every draft is kept."""
    return token


def draws_again(p: Tensor, q: Tensor | None, token: int, generator: torch.Generator) -> int:
    """Wrong: a refused draft is replaced by a draw from p, not from what p has more than q."""
    found = accept(p, q, token, generator)
    return found if found == token else draw(p, generator)


def tosses_no_coin(p: Tensor, q: Tensor | None, token: int, generator: torch.Generator) -> int:
    """Wrong: kept wherever p is half of q at least."""
    q = torch.zeros_like(p).index_fill_(0, torch.tensor(token), 1.0) if q is None else q
    return token if p[token] >= q[token] / 2 else draw(residual(p, q), generator)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("every token drafted at an exit", keeps_all),
        ("every token drafted at an exit", draws_again),
        ("every token drafted at an exit", tosses_no_coin),
        ("drafts from the text", keeps_all),
        ("drafts from the text", tosses_no_coin),
    ],
)
def test_the_test_notices_a_wrong_rule(name: str, rule: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "accept", rule)
    p, _ = sample(name, 500)
    assert p < 1e-4


@pytest.mark.parametrize("mode", ["full", "lossless"])
def test_full_and_lossless_agree_on_how_likely_every_pair_is(mode: str) -> None:
    """The same statistic on plain sampling, so that a fault of the reference itself would show."""
    settings: dict[str, Any] = dict(temperature=0.7, top_k=4, ignore_eos=True, threshold=0.0, adaptive=False)
    model = small_model()
    engine = make_engine(model)
    found = Counter[tuple[int, ...]]()
    for seed in range(500):
        out = generate(engine, PROMPT, mode=mode, max_new_tokens=3, seed=seed, **settings)
        found[tuple(out.token_ids[:2])] += 1
    expected = exact(model, GenerationConfig(mode="full", **settings), 2)
    assert len(expected) == len(list(itertools.product(range(4), repeat=2)))
    assert chi_square(expected, found) > 1e-3
