"""The sampler's filters against ten-line references and transformers' warpers; draws against the distribution."""

import math
import random
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exitlm.decode.sample import Sampler, draw
from exitlm.errors import UserError

SAMPLERS = st.builds(
    Sampler,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 5, 100]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3, 4.0]),
)


def logits_of(seed: int, size: int = 23) -> Tensor:
    """A row of distinct logits."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def reference(sampler: Sampler, logits: list[float], text: list[int]) -> list[float]:
    """The filters in plain numbers."""
    r = sampler.repetition_penalty
    logits = [(x / r if x > 0 else x * r) if i in text else x for i, x in enumerate(logits)]
    kept = sorted(range(len(logits)), key=lambda i: -logits[i])
    if sampler.top_k:
        kept = kept[: sampler.top_k]
    p = {i: math.exp((logits[i] - max(logits)) / sampler.temperature) for i in kept}
    total = sum(p.values())
    mass, nucleus = 0.0, []
    for i in kept:
        if mass < sampler.top_p:
            nucleus.append(i)
        mass += p[i] / total
    nucleus = [i for i in nucleus if p[i] >= sampler.min_p * p[kept[0]]]
    total = sum(p[i] for i in nucleus)
    return [p[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(sampler=SAMPLERS, seed=st.integers(0, 10**6), text=st.lists(st.integers(0, 22), max_size=6))
def test_filters_against_a_reference(sampler: Sampler, seed: int, text: list[int]) -> None:
    logits = logits_of(seed)
    found = sampler.distribution(logits, text)
    assert found.tolist() == pytest.approx(reference(sampler, logits.tolist(), text), abs=1e-12)
    assert logits.equal(logits_of(seed))  # the caller's logits stay as they are


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(sampler=SAMPLERS, seed=st.integers(0, 10**6), text=st.lists(st.integers(0, 22), min_size=1, max_size=6))
def test_filters_against_transformers(sampler: Sampler, seed: int, text: list[int]) -> None:
    logits, ids = logits_of(seed), torch.tensor([text])
    scores = transformers.RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty)(ids, logits[None].clone())
    scores = transformers.TemperatureLogitsWarper(sampler.temperature)(ids, scores)
    if sampler.top_k:
        scores = transformers.TopKLogitsWarper(sampler.top_k)(ids, scores)
    scores = transformers.TopPLogitsWarper(sampler.top_p)(ids, scores)
    if sampler.min_p:
        scores = transformers.MinPLogitsWarper(sampler.min_p)(ids, scores)
    expected = torch.softmax(scores[0], -1)
    assert torch.allclose(sampler.distribution(logits, text), expected, rtol=0, atol=1e-12)


def test_greedy_is_the_argmax_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    assert Sampler().distribution(logits, [1]).tolist() == [0, 1, 0, 0]
    assert Sampler(repetition_penalty=1.2).distribution(logits, [1]).tolist() == [0, 0, 1, 0]
    assert Sampler(repetition_penalty=2.0).penalise(logits, [3, 3, 1]).tolist() == [1.0, 1.5, pytest.approx(2.9), -2.0]


def test_what_plain_and_greedy_mean() -> None:
    assert Sampler().plain
    assert Sampler(repetition_penalty=1.1).greedy
    assert not Sampler(repetition_penalty=1.1).plain
    assert not Sampler(temperature=0.1).greedy


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tiny_temperature_is_greedy(temperature: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([40.0, 41.0, -3.0, -torch.inf], dtype=dtype)
    assert Sampler(temperature=temperature).distribution(logits, []).tolist() == [0, 1, 0, 0]


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = torch.full((9,), -torch.inf).index_fill_(0, torch.tensor([2, 5]), 1.0)
    for sampler in (
        Sampler(temperature=1.0), Sampler(temperature=1.0, top_k=4), Sampler(temperature=2.0, top_p=0.99),
        Sampler(temperature=1.0, repetition_penalty=0.5),
    ):  # fmt: skip
        found = sampler.distribution(logits, [0, 1])
        assert found[[2, 5]].tolist() == [0.5, 0.5]
        assert float(found.sum()) == 1.0


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    generator = torch.Generator().manual_seed(1)
    count = torch.bincount(torch.tensor([draw(p, generator) for _ in range(4000)]), minlength=6) / 4000
    assert count[p == 0].sum() == 0
    assert torch.allclose(count, p, atol=0.03)


class Fixed:
    """Stands for ``torch.rand`` and gives one number."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(value, dtype=torch.float64)

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        return self.value


@pytest.mark.parametrize("u", [0.0, 1e-300, 0.5, math.nextafter(1.0, 0.0), 1.0])
def test_a_draw_has_a_probability_above_zero(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", Fixed(u))
    rng = random.Random(0)
    for _ in range(50):
        p = torch.tensor([rng.choice([0.0, 0.0, rng.random()]) for _ in range(9)] + [0.25, 0.0])
        assert p[draw(p / p.sum(), torch.Generator())] > 0


def test_the_same_seed_draws_the_same() -> None:
    p = torch.softmax(logits_of(0), -1)
    first, second = (torch.Generator().manual_seed(7) for _ in range(2))
    assert [draw(p, first) for _ in range(20)] == [draw(p, second) for _ in range(20)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 0.0), ("top_p", 1.2),
        ("top_k", -1), ("top_k", 1.5), ("min_p", 2.0), ("repetition_penalty", 0.0), ("repetition_penalty", -1.0),
        ("temperature", "warm"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        Sampler(**{name: value})
