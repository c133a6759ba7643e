"""Sampled text: of a seed `lossless` writes what `full` writes, whatever is drafted and dropped, in float64 and by the
native kernels; and the text is a fair draw from the model's distribution, through the whole engine."""

import dataclasses
import functools
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from exitlm.decode import engine as engine_module
from exitlm.decode.engine import Engine
from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.options import EngineConfig
from exitlm.decode.rules import SCORES
from exitlm.decode.sampling.sampler import TokenCounts
from exitlm.decode.sequence import Sequence as Text
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.arithmetic import FLOAT64, Arithmetic, params, slow_params
from tests.decode.chance import chi_square, rejected
from tests.decode.company import Letters, company_model, draw_config, shy
from tests.decode.models import attach, drafting_model, fade, fit_lenses, make_engine, random_ids, some_costs
from tests.model.families import FAMILIES, tiny_model

FAST, SLOW = 13, 130  # pairs of texts for each of 8 families
FAST_NATIVE = 8
LETTERS = 16


# ---- lossless text is full text, for a seed


def odd_only(ids: list[int], logits: Tensor) -> Tensor:
    """Half of the vocabulary may come, depending on the text before: an exit's candidates may all be forbidden."""
    numbers = torch.arange(len(logits))
    return logits.masked_fill((numbers + len(ids) + ids[-1]) % 2 == 0, -torch.inf)


def draw_sampled(rng: random.Random, model: EarlyExitModel) -> GenerationConfig:
    """Lossless settings that sample."""
    config = draw_config(rng, model)
    while config.mode != "lossless":
        config = draw_config(rng, model)
    return dataclasses.replace(
        config, temperature=rng.choice([0.4, 0.7, 1.0, 1.6]), top_k=rng.choice([0, 0, 1, 8]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.5]), min_p=rng.choice([0.0, 0.0, 0.05]), seed=rng.randrange(2**63),
        n=rng.choice([1, 1, 1, 3]), logits_processor=rng.choice([None, None, shy, odd_only]),
    )  # fmt: skip


def check_same(found: Generation, expected: Generation, tolerance: float) -> None:
    """Tokens, text, reason, and scores within ``tolerance``."""
    assert found.error is None
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    for mine, its in zip(found.trace, expected.trace, strict=True):
        assert mine.logprob == (None if its.logprob is None else pytest.approx(its.logprob, abs=tolerance))
        assert mine.top_logprobs == pytest.approx(its.top_logprobs, abs=tolerance)
    assert len(found.choices) == len(expected.choices)
    for mine_too, its_too in zip(found.choices[1:], expected.choices[1:], strict=True):
        check_same(mine_too, its_too, tolerance)


def compare(family: str, count: int, arithmetic: Arithmetic = FLOAT64) -> Counter[str]:
    """Pairs of texts, all of one mode decoded together; what happened in them."""
    rng, seen = random.Random(f"sampled {family}"), Counter[str]()
    left = count
    while left > 0:
        model = rng.choice([company_model(family, rng.randrange(3), arithmetic), arithmetic.drafting_model(family)])
        requests = [
            (random_ids(rng.randint(1, 6), rng.randrange(10**6)) * rng.choice([1, 3]), draw_sampled(rng, model))
            for _ in range(min(left, 13))
        ]
        left -= len(requests)
        full = arithmetic.engine(model, tokenizer=Letters(), options=arithmetic.options(prefix_sharing=False))
        drafted = arithmetic.engine(
            model, tokenizer=Letters(), costs=some_costs(model, row=rng.choice([0.0, 0.1, 0.7])),
            options=arithmetic.options(max_sequences=rng.choice([1, 3, 64]), block_size=rng.choice([2, 32])),
        )  # fmt: skip
        expected = full.generate_all([(ids, dataclasses.replace(config, mode="full")) for ids, config in requests])
        found = drafted.generate_all(requests)
        for request, mine, its in zip(requests, found, expected, strict=True):
            try:
                check_same(mine, its, arithmetic.tolerance)
            except AssertionError as error:
                raise AssertionError(f"{family}: {request}") from error
            for one in mine.choices or [mine]:
                seen["cases"] += 1
                seen["accepted"] += one.stats.accepted
                seen["refused"] += one.stats.drafted - one.stats.accepted
                seen["stopped"] += one.finish_reason == "stop"
    return seen


@pytest.mark.parametrize(("arithmetic", "family", "count"), params(FAST, FAST_NATIVE))
def test_lossless_writes_the_sampled_text_of_full(arithmetic: Arithmetic, family: str, count: int) -> None:
    assert compare(family, count, arithmetic)["cases"] >= count


@pytest.mark.parametrize(("arithmetic", "family", "count"), slow_params(SLOW))
def test_lossless_writes_the_sampled_text_of_full_in_many_cases(
    arithmetic: Arithmetic, family: str, count: int
) -> None:
    seen = compare(family, count, arithmetic)
    assert seen["cases"] >= count >= 1000 / len(FAMILIES)
    assert min(seen["accepted"], seen["refused"]) > count / 4
    assert seen["stopped"] > 2


@pytest.mark.parametrize("mode", ["threshold", "lossless"])
def test_a_processor_that_forbids_all_candidates_of_an_exit_leaves_the_token_to_deeper_heads(mode: str) -> None:
    model = attach(tiny_model("llama"), [ExitConfig(layer=1, candidates=9), ExitConfig(layer=3)])
    candidates = model.exits["1"].candidate_ids
    assert candidates is not None

    def others(ids: list[int], logits: Tensor) -> Tensor:
        return logits.index_fill(0, candidates, -torch.inf)

    settings: dict[str, Any] = {"logits_processor": others, "max_new_tokens": 12, "ignore_eos": True, "seed": 1}
    for temperature in (0.0, 1.0):
        engine = make_engine(model)
        full = engine.generate([5, 6], GenerationConfig(mode="full", temperature=temperature, **settings))
        chosen = GenerationConfig(mode=mode, threshold=0.0, temperature=temperature, adaptive=False, **settings)
        out = engine.generate([5, 6], chosen)
        assert not set(out.token_ids) & set(candidates.tolist())
        if mode == "threshold":
            assert out.exit_layers == [4] + [3] * 11
        else:
            assert out.token_ids == full.token_ids


def test_a_processor_that_fails_behind_drafts_alone_ends_no_lossless_text() -> None:
    """A text never comes to where its refused drafts lead."""
    model = fade(tiny_model("llama"), 3, 1.0)
    attach(model, [ExitConfig(layer=1, candidates=1)])
    head = model.exits["1"]
    assert head.candidate_ids is not None
    only = int(head.candidate_ids[0])  # this exit drafts one token, again and again

    def stumbles(ids: list[int], logits: Tensor) -> Tensor:
        if only in ids:
            raise RuntimeError("such a text can't be")
        if len(ids) > 3:
            return logits
        return logits.index_fill(0, torch.tensor(only), -torch.inf)

    settings: dict[str, Any] = {"logits_processor": stumbles, "max_new_tokens": 12, "ignore_eos": True}
    engine = make_engine(model)
    full = engine.generate([5, 6], GenerationConfig(mode="full", **settings))
    assert only not in full.token_ids
    out = engine.generate([5, 6], GenerationConfig(threshold=0.0, adaptive=False, draft="exits", **settings))
    assert out.token_ids == full.token_ids
    assert out.stats.drafted > 3
    with pytest.raises(Exception, match="such a text can't be"):
        engine.generate([5, only], GenerationConfig(threshold=0.0, adaptive=False, draft="exits", **settings))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_drafts_that_are_dropped_by_their_successors_confidence_do_not_bias_the_text(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under rejection sampling they would: a draft is then kept or not by what was drawn for it."""
    dropped: list[int] = []
    plain = Engine._fired

    def fired(self: Engine, sequence: Text, layer: int, token: int, *logits: Any) -> None:
        test = sequence.test
        if sequence.config.mode != "lossless" or not sequence.drafts or test is None or test.confidence[layer] > 0.15:
            plain(self, sequence, layer, token, *logits)
            return
        drafts = sequence.take_drafts()
        sequence.extend_drafts(drafts[:-1])
        sequence.filled = [min(filled, sequence.length) for filled in sequence.filled]
        self.memory.hidden.give_back(sequence.slots[sequence.pending :])
        del sequence.slots[sequence.pending :]
        sequence.prepared, sequence.test, sequence.deep_end = True, None, sequence.length
        dropped.append(drafts[-1].token)

    monkeypatch.setattr(engine_module.Engine, "_fired", fired)
    engine = make_engine(drafting_model(family))
    settings: dict[str, Any] = {"temperature": 0.9, "max_new_tokens": 24, "ignore_eos": True}
    drafting: dict[str, Any] = {"rule": "probability", "threshold": 0.02, "draft": "exits", "adaptive": False}
    accepted = 0
    prompts = [(random_ids(4, seed), seed) for seed in range(40)]
    full = engine.generate_all([(p, GenerationConfig(mode="full", seed=seed, **settings)) for p, seed in prompts])
    found = engine.generate_all([(p, GenerationConfig(seed=seed, **drafting, **settings)) for p, seed in prompts])
    for mine, its in zip(found, full, strict=True):
        assert mine.token_ids == its.token_ids
        accepted += mine.stats.accepted
    assert len(dropped) > 100
    assert accepted > 30


# ---- the text is a fair draw


@functools.cache
def letters_model() -> EarlyExitModel:
    """A vocabulary of 16, and exits that know all of it, or ten."""
    model = fade(tiny_model("llama", seed=3, vocab_size=LETTERS), 3, 0.5)
    attach(model, [ExitConfig(layer=1), ExitConfig(layer=2, candidates=10), ExitConfig(layer=3)])
    return fit_lenses(model)


def lean(ids: list[int], logits: Tensor) -> Tensor:
    """A processor that looks at the text."""
    return logits.index_add(0, torch.tensor([ids[-1]]), torch.full((1,), 2.0, dtype=logits.dtype))


SAMPLERS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "hot and narrow": {"temperature": 1.6, "top_k": 6},
    "nucleus": {"temperature": 1.2, "top_p": 0.8, "min_p": 0.02},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "bans": {"temperature": 1.0, "logit_bias": {4: 1.5, 7: -2.0}, "bad_words": [[5], [6, 8]]},
    "processor": {"temperature": 0.8, "logits_processor": lean},
}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "lossless": {"mode": "lossless", "rule": "probability", "threshold": 0.1, "adaptive": False},
    "threshold": {"mode": "threshold", "rule": "probability", "threshold": {1: 0.35, 2: 0.3, 3: 0.25}},
    "exit 2": {"mode": "threshold", "rule": "fixed", "exits": [2]},
}
DRAWS = [  # sampler, mode, output position: 20 tests
    ("plain", "full", 0), ("plain", "lossless", 1), ("plain", "threshold", 1), ("plain", "exit 2", 2),
    ("hot and narrow", "full", 2), ("hot and narrow", "lossless", 2), ("hot and narrow", "threshold", 1),
    ("nucleus", "full", 1), ("nucleus", "lossless", 1), ("nucleus", "threshold", 2), ("nucleus", "exit 2", 1),
    ("penalties", "full", 1), ("penalties", "lossless", 2), ("penalties", "threshold", 2), ("penalties", "exit 2", 2),
    ("bans", "full", 2), ("bans", "lossless", 1), ("bans", "threshold", 1),
    ("processor", "lossless", 2), ("processor", "threshold", 1),
]  # fmt: skip
PROMPT = [9, 4, 11]


def distribution(model: EarlyExitModel, config: GenerationConfig, texts: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Probabilities ``[V]`` of the token behind each of some outputs of one length, from plain passes of the model."""
    ids = torch.tensor([[*PROMPT, *text] for text in texts])
    heads = {**model.exit_logits(ids), model.config.num_hidden_layers: model.logits(ids)}
    sampler, found = config.sampler([list(word) for word in config.bad_words]), []
    for row, text in enumerate(texts):
        counts = TokenCounts(PROMPT, text)
        for layer in sorted(heads):
            logits = sampler.restrict(heads[layer][row, -1], counts.ids)
            if layer == model.config.num_hidden_layers or (text and leaves(config, layer, logits)):
                found.append(sampler.distribution(sampler.shape(logits, counts)))
                break
    return found


def leaves(config: GenerationConfig, layer: int, logits: Tensor) -> bool:
    """Whether a token of `threshold` mode comes from this exit."""
    if config.mode != "threshold":
        return False
    if config.rule == "fixed":
        return layer in (config.exits or ())
    assert isinstance(config.threshold, dict)
    return float(SCORES["probability"](logits)) >= config.threshold[layer]


def p_value(sampler: str, way: str, position: int, draws: int, salt: int) -> float:
    """How likely such counts of the tokens at a position, and of the one before, are under the model's distribution."""
    model = letters_model()
    settings: dict[str, Any] = {**SAMPLERS[sampler], **WAYS[way], "ignore_eos": True, "max_new_tokens": position + 1}
    expected: Counter[tuple[int, ...]] = Counter({(): 1.0})  # type: ignore[dict-item]
    for _ in range(position + 1):
        texts = list(expected)
        rows = distribution(model, GenerationConfig(**settings), texts)
        step: Counter[tuple[int, ...]] = Counter()
        for text, row in zip(texts, rows, strict=True):
            for token, p in enumerate(row.tolist()):
                step[*text, token] += expected[text] * p  # type: ignore[assignment]
        expected = Counter({text: p for text, p in step.items() if p > 0})
    engine = make_engine(model, options=EngineConfig(max_sequences=128))
    found: Counter[tuple[int, ...]] = Counter()
    every = 4 if way == "full" else 1  # some of them as choices
    requests = [
        (PROMPT, GenerationConfig(seed=salt * draws + seed, n=every, **settings)) for seed in range(draws // every)
    ]
    for out in engine.generate_all(requests):
        for one in out.choices or [out]:
            found[tuple(one.token_ids)] += 1
    assert found.total() == draws
    cells: Counter[tuple[int, ...]] = Counter()
    counts: Counter[tuple[int, ...]] = Counter()
    for text, p in expected.items():
        cells[text[-2:]] += p  # type: ignore[assignment]
    for text, n in found.items():
        counts[text[-2:]] += n
    assert set(counts) <= set(cells)
    return chi_square([counts[cell] for cell in cells], [float(cells[cell]) for cell in cells])


def test_the_text_is_a_fair_draw() -> None:
    p_values = {str(draw): p_value(*draw, draws=400, salt=1) for draw in DRAWS[::4]}
    assert rejected(p_values) == []


@pytest.mark.slow
def test_the_text_is_a_fair_draw_for_many_seeds() -> None:
    p_values = {str(draw): p_value(*draw, draws=4000, salt=2) for draw in DRAWS}
    assert len(p_values) == 20
    assert rejected(p_values) == []


def test_the_test_of_fairness_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that is shared by two positions gives each token its right frequency, and pairs of tokens a wrong one."""
    choose = Text.choose

    def stuck(self: Text, logits: Tensor) -> int:
        position, self.prompt_length = self.prompt_length, len(self.ids) + len(self.drafts)
        try:
            return choose(self, logits)
        finally:
            self.prompt_length = position

    monkeypatch.setattr(Text, "choose", stuck)
    assert p_value("plain", "full", 1, draws=400, salt=3) < 1e-6


# ---- seeds and choices

SAMPLED: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True}


@pytest.mark.parametrize("mode", ["full", "threshold", "lossless"])
def test_choices(mode: str) -> None:
    engine = make_engine(drafting_model("qwen3"))
    settings: dict[str, Any] = {**SAMPLED, "mode": mode, "seed": 11, "threshold": 0.1}
    prompt = random_ids(40)
    one = engine.generate(prompt, GenerationConfig(**settings))
    assert one.choices == []
    for n in (2, 5):
        many = engine.generate(prompt, GenerationConfig(n=n, **settings))
        assert len(many.choices) == n
        assert many.choices[0] is many
        assert many.token_ids == one.token_ids
        assert len({tuple(choice.token_ids) for choice in many.choices}) == n
        assert {choice.stats.seed for choice in many.choices} == {11}
        assert all(choice.stats.shared_tokens == 32 for choice in many.choices[1:])
    again = engine.generate(prompt, GenerationConfig(n=5, **settings))
    assert [choice.token_ids for choice in again.choices] == [choice.token_ids for choice in many.choices]


def test_one_seed_gives_equal_prompts_equal_texts() -> None:
    engine = make_engine(drafting_model("llama"))
    prompts = [random_ids(5), random_ids(5), random_ids(6), random_ids(5)]
    config = GenerationConfig(seed=5, **SAMPLED)
    first, second, other, last = (out.token_ids for out in engine.generate_all([(p, config) for p in prompts]))
    assert first == second == last
    assert other != first


def test_a_seed_that_was_not_given_is_told_and_reproduces() -> None:
    engine = make_engine(drafting_model("llama"))
    config = GenerationConfig(n=2, **SAMPLED)
    outs = engine.generate_all([(random_ids(5), config)] * 4)
    seeds = [out.stats.seed for out in outs]
    assert len(set(seeds)) == 4
    for out, seed in zip(outs, seeds, strict=True):
        assert {choice.stats.seed for choice in out.choices} == {seed}
        again = engine.generate(random_ids(5), dataclasses.replace(config, seed=seed))
        assert [choice.token_ids for choice in again.choices] == [choice.token_ids for choice in out.choices]
    key = engine.add(random_ids(5), config)
    (end,) = [event for _ in range(200) for event in engine.step() if event.last]
    assert end.key == key
    assert end.generation is not None
    again = engine.generate(random_ids(5), dataclasses.replace(config, n=1, seed=end.generation.stats.seed))
    assert again.token_ids == end.generation.token_ids


def test_all_modes_share_the_noise_of_a_seed() -> None:
    """Where an exit says what the model says, threshold mode draws what full draws."""
    model = attach(fade(tiny_model("llama"), 3, 0.0), [ExitConfig(layer=2, kind="norm")])
    engine = make_engine(model)
    for seed, top_k in itertools.product(range(5), (0, 5)):
        settings: dict[str, Any] = {**SAMPLED, "seed": seed, "top_k": top_k}
        full = engine.generate([5, 6], GenerationConfig(mode="full", **settings))
        out = engine.generate([5, 6], GenerationConfig(mode="threshold", threshold=0.0, **settings))
        assert out.token_ids == full.token_ids
        assert set(out.exit_layers[1:]) == {2}
