"""The sampler: filters, penalties and bans against ten-line references and transformers' own, the race against its
definition and by chi-square, and drafts that run the same race."""

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exitlm.decode.sampling import sampler as sampler_module
from exitlm.decode.sampling.noise import noise
from exitlm.decode.sampling.sampler import Draw, Sampler, TokenCounts, finite_rows
from exitlm.errors import UserError
from tests.decode.chance import chi_square, rejected

V = 23
PENALTIES: dict[str, Any] = {
    "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 4.0]),
    "presence_penalty": st.sampled_from([-2.0, 0.0, 0.3]),
    "frequency_penalty": st.sampled_from([-0.4, 0.0, 1.5]),
}
FILTERS: dict[str, Any] = {
    "temperature": st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    "top_k": st.sampled_from([0, 1, 3, 5, 100]),
    "top_p": st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    "min_p": st.sampled_from([0.0, 0.05, 0.4, 1.0]),
}
IDS = st.integers(0, V - 1)
RESTRICTIONS: dict[str, Any] = {
    "logit_bias": st.dictionaries(IDS, st.floats(-100, 100), max_size=3),
    "bad_words": st.lists(st.lists(IDS, min_size=1, max_size=2), max_size=6),
}
SAMPLERS = st.builds(Sampler, **FILTERS, **PENALTIES, **RESTRICTIONS)
TEXTS = st.lists(IDS, max_size=6)
few = settings(deadline=None, derandomize=True, database=None, max_examples=150)


def logits_of(seed: int, size: int = V) -> Tensor:
    """A row of distinct logits."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def shaped(sampler: Sampler, logits_V: Tensor, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
    """What a caller without grammar and exit rule does before a token is chosen."""
    return sampler.shape(sampler.restrict(logits_V, [*prompt, *generated]), TokenCounts(prompt, generated))


def reference(sampler: Sampler, logits: list[float], prompt: list[int], generated: list[int]) -> list[float]:
    """Probabilities in plain numbers."""
    text = prompt + generated
    x = [value + sampler.logit_bias.get(i, 0.0) for i, value in enumerate(logits)]
    for *before, last in sampler.bad_words:
        if text[len(text) - len(before) :] == before:
            x[last] = -math.inf
    r = sampler.repetition_penalty
    x = [(value / r if value > 0 else value * r) if i in text else value for i, value in enumerate(x)]
    for i in set(generated):
        x[i] -= sampler.frequency_penalty * generated.count(i) + sampler.presence_penalty
    kept = sorted((i for i in range(len(x)) if x[i] > -math.inf), key=lambda i: -x[i])
    if sampler.top_k:
        kept = kept[: sampler.top_k]
    p = {i: math.exp((x[i] - max(x)) / sampler.temperature) for i in kept}
    total = sum(p.values())
    mass, nucleus = 0.0, []
    for i in kept:
        if mass < sampler.top_p:
            nucleus.append(i)
        mass += p[i] / total
    nucleus = [i for i in nucleus if p[i] >= sampler.min_p * p[kept[0]]]
    total = sum(p[i] for i in nucleus)
    return [p[i] / total if i in nucleus else 0.0 for i in range(len(x))]


# ---- the distribution


@settings(few, max_examples=300)
@given(sampler=SAMPLERS, seed=st.integers(0, 10**6), prompt=TEXTS, generated=TEXTS)
def test_probabilities_against_a_reference(
    sampler: Sampler, seed: int, prompt: list[int], generated: list[int]
) -> None:
    logits = logits_of(seed)
    found = sampler.distribution(shaped(sampler, logits, prompt, generated))
    assert found.tolist() == pytest.approx(reference(sampler, logits.tolist(), prompt, generated), abs=1e-12)
    assert logits.equal(logits_of(seed))  # the caller's logits stay as they are


@few
@given(
    sampler=st.builds(Sampler, **FILTERS, repetition_penalty=PENALTIES["repetition_penalty"]),
    seed=st.integers(0, 10**6),
    text=st.lists(IDS, min_size=1, max_size=6),
)
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
    assert torch.allclose(sampler.distribution(shaped(sampler, logits, text, [])), expected, rtol=0, atol=1e-12)


@few
@given(
    words=st.lists(st.lists(IDS, min_size=1, max_size=3), min_size=1, max_size=8), text=TEXTS, seed=st.integers(0, 99)
)
def test_bad_words_against_transformers(words: list[list[int]], text: list[int], seed: int) -> None:
    logits, ids = logits_of(seed), torch.tensor([[0, *text]])
    expected = transformers.NoBadWordsLogitsProcessor(words, eos_token_id=-1)(ids, logits[None].clone())[0]
    assert Sampler(bad_words=words).restrict(logits, [0, *text]).equal(expected)


def full_sort(weights: np.ndarray, top_p: float) -> list[int]:
    """The nucleus by sorting all weights; equals stand in the order of their indices."""
    order = np.argsort(-weights, kind="stable")
    mass = weights[order].cumsum(dtype=np.float64)
    before = np.concatenate([[0.0], mass[:-1]])
    return sorted(order[before < top_p * weights.sum(dtype=np.float64)].tolist())


LARGE = st.builds(
    lambda seed, size, spread, step, dtype: (
        (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread / step).round().mul(step).to(dtype)
    ),
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1, 2, 63, 64, 65, 700, 5001]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 4.0]),
    step=st.sampled_from([1e-6, 0.25, 2.0]),  # coarse ones make ties
    dtype=st.sampled_from([torch.float32, torch.float64]),
)


@few
@given(logits=LARGE, top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 1e-7, 1 - 1e-12]))
def test_top_p_keeps_what_a_full_sort_keeps(logits: Tensor, top_p: float) -> None:
    kept = Sampler(temperature=0.7, top_p=top_p).distribution(logits).nonzero()[:, 0].tolist()
    weights = np.exp((logits - logits.max()).div(0.7).numpy())
    assert kept == [i for i in full_sort(weights, top_p) if weights[i] > 0]


@few
@given(logits=LARGE, k=st.sampled_from([1, 2, 5, 16, 40, 600, 4000]), masked=st.sampled_from([0, 3, 60]))
def test_top_k_keeps_the_k_largest_and_their_equals(logits: Tensor, k: int, masked: int) -> None:
    logits = logits.masked_fill(torch.arange(len(logits)) < min(masked, len(logits) - 1), -torch.inf)
    kept = Sampler(temperature=9.0, top_k=k).distribution(logits).nonzero()[:, 0].tolist()
    floor = logits.sort(descending=True).values[min(k, len(logits)) - 1]
    assert kept == [i for i, x in enumerate(logits.tolist()) if x >= float(floor) and x > -math.inf]


def test_greedy_is_the_argmax_after_the_penalties() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    draw = Draw(seed=0, position=0)
    assert Sampler().distribution(logits).tolist() == [0, 1, 0, 0]
    for sampler, token in (
        (Sampler(), 1), (Sampler(repetition_penalty=1.2), 2), (Sampler(presence_penalty=0.2), 2),
        (Sampler(frequency_penalty=0.04), 1), (Sampler(frequency_penalty=0.06), 2), (Sampler(logit_bias={3: 4.5}), 3),
        (Sampler(bad_words=[[1]]), 2), (Sampler(bad_words=[[1, 1], [1, 2]]), 0), (Sampler(bad_words=[[0, 1]]), 1),
    ):  # fmt: skip
        assert sampler.choose(shaped(sampler, logits, [0], [1, 1]), draw) == token, sampler
    assert Sampler().choose(torch.tensor([1.0, 5.0, 5.0]), draw) == 1  # the lowest of equals
    assert Sampler().choose(torch.tensor([1.0, 5.0, 5.0], dtype=torch.bfloat16), draw) == 1


def test_repetition_counts_the_prompt_and_the_others_do_not() -> None:
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    found = Sampler(repetition_penalty=2.0).shape(logits, TokenCounts([3, 3, 1]))
    assert found.tolist() == [1.0, 1.5, pytest.approx(2.9), -2.0]
    found = Sampler(presence_penalty=1.0, frequency_penalty=0.5).shape(logits, TokenCounts([3, 3, 1], [1, 0, 1]))
    assert found.tolist() == [pytest.approx(x) for x in (-0.5, 1.0, 2.9, -1.0)]


def test_what_greedy_plain_and_restricts_mean() -> None:
    assert Sampler().plain
    for chosen in (
        {"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"logit_bias": {0: 1}},
        {"bad_words": [[1, 2]]}, {"processor": lambda ids, logits: logits},
    ):  # fmt: skip
        sampler = Sampler(**chosen)  # type: ignore[arg-type]
        assert sampler.greedy
        assert not sampler.plain
        assert sampler.restricts == bool({"logit_bias", "bad_words"} & chosen.keys())
    assert not Sampler(temperature=0.1).greedy
    assert not Sampler(temperature=0.1).plain


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tiny_temperature_is_greedy(temperature: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([40.0, 41.0, -3.0, -torch.inf], dtype=dtype)
    for sampler in (Sampler(temperature=temperature), Sampler(temperature=temperature, top_k=2, top_p=0.9)):
        assert sampler.distribution(logits).tolist() == [0, 1, 0, 0]
        assert {sampler.choose(logits, Draw(seed=seed, position=0)) for seed in range(50)} == {1}


@pytest.mark.parametrize("penalty", [1e-300, 1e-35, 1e35, 1e300])
def test_an_extreme_penalty_makes_no_nan(penalty: float) -> None:
    sampler = Sampler(temperature=1.0, repetition_penalty=penalty)
    logits = torch.tensor([1.0, -1.0, 0.0, -torch.inf, 2.0])
    found = sampler.distribution(sampler.shape(logits, TokenCounts([0, 1, 2, 3])))
    assert found.tolist() == pytest.approx([1, 0, 0, 0, 0] if penalty < 1 else [math.exp(-2), 0, math.exp(-2), 0, 1] /
                                           np.float64(1 + 2 * math.exp(-2)))  # fmt: skip


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = torch.full((9,), -torch.inf).index_fill_(0, torch.tensor([2, 5]), 1.0)
    for sampler in (
        Sampler(temperature=1.0), Sampler(temperature=1.0, top_k=4), Sampler(temperature=2.0, top_p=0.99),
        Sampler(temperature=1.0, repetition_penalty=0.5), Sampler(temperature=1.0, top_k=1),
    ):  # fmt: skip
        found = sampler.shape(logits, TokenCounts([0, 1]))
        assert sampler.distribution(found)[[2, 5]].tolist() == [0.5, 0.5]
        assert {sampler.choose(found, Draw(seed=seed, position=0)) for seed in range(40)} == {2, 5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(dtype: torch.dtype) -> None:
    logits = (logits_of(0, 300) * 2).to(dtype)
    sampler = Sampler(
        temperature=0.8, top_p=0.9, presence_penalty=0.01, repetition_penalty=1.01, logit_bias={1: 0.003},
        processor=lambda ids, logits: logits * 1.001,
    )  # fmt: skip
    found, expected = (shaped(sampler, given, [4, 5], [5, 6]) for given in (logits, logits.float()))
    assert found.dtype == torch.float32
    assert found.equal(expected)
    assert sampler.distribution(logits).equal(sampler.distribution(logits.float()))
    for seed in range(20):
        draw = Draw(seed=seed, position=0)
        assert sampler.choose(logits, draw) == sampler.choose(logits.float(), draw)


# ---- the race

DRAWS = st.builds(Draw, seed=st.integers(-(2**63), 2**64 - 1), choice=st.integers(0, 9), position=st.integers(0, 9999))


@few
@given(sampler=SAMPLERS, seed=st.integers(0, 10**6), draw=DRAWS, size=st.sampled_from([V, 64, 301]))
def test_the_token_is_the_winner_of_the_race(sampler: Sampler, seed: int, draw: Draw, size: int) -> None:
    logits = logits_of(seed, size)
    p = reference(sampler, logits.tolist(), [1, 2], [3])
    e = noise(draw.seed, draw.choice, draw.position, vocab_size=size).tolist()
    expected = max(range(size), key=lambda v: p[v] / e[v])
    assert sampler.choose(shaped(sampler, logits, [1, 2], [3]), draw) == expected


def test_the_race_on_an_accelerator_has_the_same_winner() -> None:
    for seed in range(200):
        logits, draw = logits_of(seed, 300).float(), Draw(seed=seed, position=seed)
        noise_V = noise(seed, 0, seed, vocab_size=300)
        assert sampler_module._winner(logits, 0.7, noise_V) == Sampler(temperature=0.7).choose(logits, draw)


def test_tokens_depend_on_seed_choice_and_position_alone() -> None:
    """Not on the rows beside, on the address of the row, or on what was drawn before."""
    generator = torch.Generator().manual_seed(1)
    cases = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = (torch.randn(12, 1003, generator=generator) * 3).to(dtype)  # odd: rows begin at any address
        for chosen in ({}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.02}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}):
            sampler = Sampler(temperature=1.1, **chosen)  # type: ignore[arg-type]
            for r, row in enumerate(rows):
                cases.append((sampler, row, Draw(seed=5, choice=r % 2, position=r)))
    together = [sampler.choose(row, draw) for sampler, row, draw in cases]
    masses = [sampler.distribution(row) for sampler, row, _ in cases]
    alone = list(enumerate(cases))
    random.Random(0).shuffle(alone)
    for i, (sampler, row, draw) in alone:
        assert sampler.choose(row.clone(), draw) == together[i]
        assert sampler.distribution(row.clone()).equal(masses[i])
    assert len(set(together)) > 30


def forgets_the_logarithm(logits: Tensor, sampler: Sampler, draw: Draw) -> int:
    """Wrong: noise that is uniform."""
    e = noise(draw.seed, draw.choice, draw.position, vocab_size=len(logits))
    return int((sampler.distribution(logits) / (1 - (-e).exp())).argmax())


def forgets_the_temperature(logits: Tensor, sampler: Sampler, draw: Draw) -> int:
    """Wrong: the filters' tokens by their probabilities at temperature 1."""
    return dataclasses.replace(sampler, temperature=1.0).choose(logits, draw)


def filters_late(logits: Tensor, sampler: Sampler, draw: Draw) -> int:
    """Wrong: the most likely token stands in for one that the filters drop."""
    left = sampler.distribution(logits) > 0
    token = Sampler(temperature=1.0).choose(logits, draw)
    return token if left[token] else int(logits.argmax())


CASES: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature .7": {"temperature": 0.7},
    "top-k": {"temperature": 1.5, "top_k": 5},
    "top-p": {"top_p": 0.8},
    "min-p": {"temperature": 2.0, "min_p": 0.1},
    "all filters": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
    "repetition penalty": {"repetition_penalty": 1.5},
    "presence and frequency penalty": {"presence_penalty": 1.0, "frequency_penalty": -0.3},
    "bias": {"logit_bias": {2: 1.5, 3: -2.0}},
    "bad words and a filter": {"bad_words": [[3], [2, 5]], "top_k": 7},
}
POSITIONS = (0, 1234)
PROMPT, GENERATED = [1, 7, 7, 9], [4, 4, 7, 2]


def counts(name: str, position: int, runs: int, choose: Any = None) -> float:
    """The p-value of the tokens that ``runs`` seeds draw at a position."""
    sampler = Sampler(**{"temperature": 1.0, **CASES[name]})
    logits = logits_of(position, 16)
    final = shaped(sampler, logits, PROMPT, GENERATED)
    draws = (Draw(seed=seed, choice=1, position=position) for seed in range(runs))
    found = Counter(choose(final, sampler, draw) if choose else sampler.choose(final, draw) for draw in draws)
    return chi_square([found[v] for v in range(16)], reference(sampler, logits.tolist(), PROMPT, GENERATED))


@pytest.mark.parametrize("runs", [400, pytest.param(4_000, marks=pytest.mark.slow)])
def test_draws_follow_the_distribution(runs: int) -> None:
    tests = {f"{name} at {position}": counts(name, position, runs) for name in CASES for position in POSITIONS}
    assert len(tests) == 20
    assert rejected(tests) == []


@pytest.mark.parametrize("wrong", [forgets_the_logarithm, forgets_the_temperature, filters_late])
def test_the_test_of_draws_notices_a_wrong_race(wrong: Any) -> None:
    tests = {name: counts(name, 0, 400, wrong) for name in ("temperature .7", "top-k", "all filters")}
    assert rejected(tests)


# ---- drafts


def agreement(p: list[float], q: list[float]) -> float:
    """The chance that two races with the same noise have one winner v: that E_v is below E_u times
    max(p_u / p_v, q_u / q_v) for all others u, which for independent exponential E is one over the sum of these."""
    found = 0.0
    for v in range(len(p)):
        if p[v] > 0 and q[v] > 0:
            found += 1 / sum(max(p[u] / p[v], q[u] / q[v]) for u in range(len(p)))
    return found


def agreements(runs: int, draft_seed: int) -> dict[str, float]:
    """P-values of how often a draft is the final token, for filters and distances of the drafter; each case has noise
    of its own. ``draft_seed`` is what the drafter's seed is off by."""
    found: dict[str, float] = {}
    for name in ("temperature .7", "top-k", "top-p"):
        sampler = Sampler(**{"temperature": 1.0, **CASES[name]})
        for distance in (0.3, 1.0, 3.0):
            final, exit_ = logits_of(1, 16), logits_of(1, 16) + distance * logits_of(2, 16)
            p, q = (sampler.distribution(logits).tolist() for logits in (final, exit_))
            agreed = 0
            for seed in range(runs):
                draft = sampler.choose(exit_, Draw(seed=seed + draft_seed, position=len(found)))
                agreed += draft == sampler.choose(final, Draw(seed=seed, position=len(found)))
            expected = agreement(p, q)
            found[f"{name}, distance {distance}"] = chi_square([agreed, runs - agreed], [expected, 1 - expected])
            overlap = sum(map(min, p, q))  # what rejection sampling reaches
            assert overlap / (2 - overlap) <= expected <= overlap
            assert expected > sum(a * b for a, b in zip(p, q, strict=True))  # what independent draws reach
    return found


@pytest.mark.parametrize("runs", [400, pytest.param(4_000, marks=pytest.mark.slow)])
def test_drafts_are_accepted_as_often_as_coupled_races_agree(runs: int) -> None:
    assert rejected(agreements(runs, 0)) == []


def test_the_test_of_drafts_notices_noise_that_is_not_shared() -> None:
    assert len(rejected(agreements(200, 10**6))) >= 5


def test_a_drafter_that_is_right_is_always_accepted() -> None:
    for seed in range(100):
        logits, draw = logits_of(seed, 200), Draw(seed=seed, position=0)
        for chosen in CASES.values():
            sampler = Sampler(**{"temperature": 1.0, **chosen})
            assert sampler.choose(logits.clone(), draw) == sampler.choose(logits + 0.5, draw)  # one distribution


# ---- the counts of tokens


@few
@given(prompt=st.lists(st.integers(0, 200), max_size=120), steps=st.lists(st.integers(-5, 200), max_size=150))
def test_counts_after_any_pushes_and_pops_are_those_of_the_text(prompt: list[int], steps: list[int]) -> None:
    counts_, generated = TokenCounts(prompt), list[int]()
    for step in steps:
        if step >= 0:
            generated.append(step)
            counts_.push(step)
        else:
            dropped = min(-step, len(generated))
            del generated[len(generated) - dropped :]
            counts_.pop(dropped)
    ids, times = (tensor.tolist() for tensor in counts_.tensors(torch.device("cpu")))
    assert counts_.ids == prompt + generated
    assert dict(zip(ids, times, strict=True)) == {i: generated.count(i) for i in prompt + generated}
    assert len(ids) == len(set(ids))
    sampler, logits = Sampler(repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=-1.0), logits_of(0, 201)
    assert sampler.shape(logits, counts_).equal(sampler.shape(logits, TokenCounts(prompt, generated)))


# ---- processors


def test_a_processor_sees_the_text_and_the_penalised_logits() -> None:
    seen: list[tuple[list[int], list[float]]] = []

    def bans_the_last(ids: list[int], logits: Tensor) -> Tensor:
        seen.append((ids, logits.tolist()))
        logits[ids[-1]] = -torch.inf
        ids.clear()
        return logits

    for penalty in (0.0, 1.0):
        sampler = Sampler(processor=bans_the_last, presence_penalty=penalty)
        logits, text = torch.tensor([1.0, 3.0, 2.5]), TokenCounts([0], [2, 1])
        found = sampler.shape(logits, text)
        assert found.tolist() == [1.0, -math.inf, 2.5 - penalty]
        assert logits.tolist() == [1.0, 3.0, 2.5]  # whatever it writes to, these and the text stay
        assert text.ids == [0, 2, 1]
    assert [given for _, given in seen] == [[1.0, 3.0, 2.5], [1.0, 2.0, 1.5]]


def test_a_processor_that_fails_is_named() -> None:
    def divides_by_zero(ids: list[int], logits: Tensor) -> Tensor:
        return logits * (len(ids) // 0)

    with pytest.raises(UserError, match=r"logits_processor .*divides_by_zero raised ZeroDivisionError: ") as found:
        Sampler(processor=divides_by_zero).shape(torch.zeros(3), TokenCounts([1]))
    assert isinstance(found.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (None, r"returned None \(NoneType\)"),
        ([1.0, 2.0, 3.0], r"returned \[1.0, 2.0, 3.0\] \(list\)"),
        (torch.zeros(1, 3), r"returned shape \[1, 3\], torch.float32"),
        (torch.zeros(2), r"must return logits of shape \[3\], torch.float32 on cpu, but returned shape \[2\]"),
        (torch.zeros(3, dtype=torch.float64), "torch.float64 on cpu"),
        (torch.zeros(3, dtype=torch.int64), "torch.int64"),
        (torch.tensor([0.0, math.nan, 1.0]), "NaN or infinity"),
        (torch.tensor([0.0, math.inf, 1.0]), "NaN or infinity; use -inf"),
    ],
)
def test_a_processor_that_returns_something_else_is_named(returned: Any, says: str) -> None:
    class Returns:
        def __call__(self, ids: list[int], logits: Tensor) -> Any:
            return returned

    with pytest.raises(UserError, match=rf"logits_processor .*Returns .*{says}") as found:
        Sampler(processor=Returns()).shape(torch.zeros(3), TokenCounts([1]))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "chosen", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}, {"temperature": 1.0, "top_p": 0.5}]
)
def test_that_no_token_is_left_is_an_error(chosen: dict[str, Any]) -> None:
    sampler = Sampler(bad_words=[[0], [1], [2]], **chosen)
    with pytest.raises(UserError, match="no token is allowed"):
        sampler.choose(sampler.restrict(torch.zeros(3), []), Draw(seed=0, position=0))
    assert sampler.choose(sampler.restrict(torch.zeros(4), []), Draw(seed=0, position=0)) == 3


# ---- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 0.0), ("top_p", 1.2),
        ("top_k", -1), ("top_k", 1.5), ("min_p", 2.0), ("repetition_penalty", 0.0), ("repetition_penalty", -1.0),
        ("temperature", "warm"), ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("presence_penalty", math.nan),
        ("frequency_penalty", 3), ("frequency_penalty", "x"), ("logit_bias", None), ("logit_bias", [1]),
        ("logit_bias", {1: math.nan}), ("logit_bias", {1: 101}), ("logit_bias", {1: -math.inf}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {1.5: 1}), ("logit_bias", {"a": 1}), ("logit_bias", {True: 1}), ("logit_bias", {1: "1"}),
        ("logit_bias", {"1": 1, 1: 2}), ("logit_bias", {"9" * 5000: 1}), ("bad_words", None), ("bad_words", "ab"),
        ("bad_words", [[]]), ("bad_words", [5]), ("bad_words", ["ab"]), ("bad_words", [[-1]]), ("bad_words", [[1.5]]),
        ("processor", 5),
    ],
)  # fmt: skip
def test_chosenout_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name) as found:
        Sampler(**{name: value})
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 300


def test_any_mapping_and_any_sequence_will_do() -> None:
    sampler = Sampler(
        logit_bias=MappingProxyType({np.int64(3): np.float32(0.5), "4": 1, torch.tensor(5): torch.tensor(-2)}),  # type: ignore[dict-item]
        bad_words=[np.array([1, 2]), (3,), range(2)],  # type: ignore[list-item]
    )
    assert sampler.logit_bias == {3: 0.5, 4: 1.0, 5: -2.0}
    assert sampler.bad_words == ((1, 2), (3,), (0, 1))


def test_ids_that_the_vocabulary_lacks_are_refused() -> None:
    sampler = Sampler(logit_bias={7: 1.0}, bad_words=[[1, 8]])
    sampler.check_vocabulary(9)
    with pytest.raises(UserError, match=r"bad_words has token id 8, but the model has the ids 0 to 7"):
        sampler.check_vocabulary(8)
    with pytest.raises(UserError, match=r"logit_bias has token id 7"):
        sampler.check_vocabulary(7)


def test_rows_that_are_not_finite_are_found() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rows = torch.full((4, 3), 3e4, dtype=dtype)
        rows[1, 2], rows[3, 0] = math.nan, -math.inf
        assert finite_rows(rows) == [True, False, True, False]
