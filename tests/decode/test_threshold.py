"""Threshold mode: what 0 and 1 mean, that deeper is surer, and that no cap on pending tokens changes a token."""

import random
from typing import Any

import pytest
import torch

from exitlm.decode.rules import RULES
from exitlm.model.exits import ExitConfig
from tests.decode.models import attach, drafting_model, generate, make_engine, random_ids
from tests.model.families import FAMILIES, tiny_model

FREE: dict[str, Any] = {"mode": "threshold", "max_new_tokens": 24, "ignore_eos": True}
SAMPLING: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 4, "repetition_penalty": 1.2}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", [{}, SAMPLING])
def test_threshold_one_is_the_full_model(rule: str, sampling: dict[str, Any]) -> None:
    """Not nearly: the same tokens and the same log-probabilities."""
    for family in ("llama", "gemma3_text"):
        engine = make_engine(drafting_model(family))
        full = generate(engine, random_ids(5), logprobs=3, **{**FREE, **sampling, "mode": "full"})
        found = generate(engine, random_ids(5), rule=rule, threshold=1.0, logprobs=3, **FREE, **sampling)
        assert found.token_ids == full.token_ids
        assert set(found.exit_layers) == {4}
        for ours, theirs in zip(found.trace, full.trace, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_threshold_zero_is_always_the_first_active_exit(rule: str, family: str) -> None:
    """Every token but the first, which the prefill gives; and the tokens are what the exit says of the text so far."""
    model = drafting_model(family)
    engine = make_engine(model)
    for exits in ((1, 2, 3), (2, 3), (3,)):
        out = generate(engine, random_ids(5), rule=rule, threshold=0.0, exits=exits, **FREE)
        first = exits[-1] if rule == "fixed" else exits[0]
        assert out.exit_layers == [4] + [first] * 23
        if rule == "probability":
            text = [*random_ids(5), *out.token_ids]
            expected = model.exit_logits(text)[first][0].argmax(-1).tolist()
            assert out.token_ids[1:] == expected[5:-1]


@pytest.mark.parametrize("rule", ["probability", "margin", "entropy", "gate", "decay"])
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_the_mean_depth_never_falls_as_the_threshold_rises(rule: str, family: str) -> None:
    """On given tokens, so that texts can't drift apart: a processor writes them whatever the heads say."""
    model, tokens = drafting_model(family), random_ids(60, 7)
    engine = make_engine(model)

    def dictated(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).index_fill_(0, torch.tensor(tokens[len(ids)]), 0.0)

    depths = []
    for threshold in (0.0, 0.01, 0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.4, 0.7, 0.95, 1.0):
        settings = {**FREE, "max_new_tokens": 57, "logits_processor": dictated}
        out = generate(engine, tokens[:3], rule=rule, threshold=threshold, exits=(1, 2, 3), **settings)
        assert out.token_ids == tokens[3:]
        depths.append(sum(out.exit_layers[1:]) / 56)
    assert depths == sorted(depths)
    assert depths[0] == 1
    assert depths[-1] == 4
    assert len(set(depths)) >= 4


@pytest.mark.parametrize("family", FAMILIES)
def test_no_cap_on_pending_tokens_changes_a_token(family: str) -> None:
    rng = random.Random(family)
    model = attach(tiny_model(family), [ExitConfig(layer=1, kind="block"), ExitConfig(layer=2), ExitConfig(layer=3)])
    engine = make_engine(model)
    reached = []
    for _ in range(6):
        settings = {
            "rule": rng.choice(["probability", "margin", "patience"]),
            "threshold": {layer: rng.choice([0.02, 0.05, 0.1, 0.6]) for layer in (1, 2, 3)},
            **rng.choice([{}, SAMPLING]),
        }
        prompt = random_ids(5, rng.randrange(99))
        free = generate(engine, prompt, **FREE, **settings)
        reached.append(free.stats.max_pending)
        for cap in (0, 1, 2, 7):
            capped = generate(engine, prompt, max_pending=cap, **FREE, **settings)
            assert capped.token_ids == free.token_ids
            assert capped.exit_layers == free.exit_layers
            assert capped.stats.max_pending <= cap
    assert max(reached) > 2


@pytest.mark.parametrize("mode", ["threshold", "lossless"])
@pytest.mark.parametrize("least", [0, 1, 2, 5, 30])
def test_no_exit_before_min_exit_tokens(mode: str, least: int) -> None:
    engine = make_engine(drafting_model("llama"))
    settings = {**FREE, "mode": mode, "draft": "exits", "adaptive": False, "exits": [2], "threshold": 0.0}
    out = generate(engine, random_ids(5), min_exit_tokens=least, **settings)
    tried = [at for at, token in enumerate(out.trace) if token.confidence]
    first = max(1, least)
    if mode == "threshold":
        assert out.exit_layers == [4 if at < first else 2 for at in range(24)]
    assert min(tried, default=24) == min(first, 24)


def test_a_threshold_for_each_exit() -> None:
    engine = make_engine(drafting_model("llama"))
    by_layer = generate(engine, random_ids(5), threshold={1: 1.0, 3: 0.0}, exits=[1, 3], **FREE)
    assert by_layer.exit_layers == [4] + [3] * 23
    assert by_layer.stats.thresholds == {1: 1.0, 3: 0.0}


def test_an_exit_with_candidates_gives_only_those() -> None:
    model = attach(tiny_model("llama"), [ExitConfig(layer=2, candidates=9)])
    ids = model.exits["2"].candidate_ids
    assert ids is not None
    engine = make_engine(model)
    for settings in ({}, {"temperature": 2.0, "seed": 1}, {"repetition_penalty": 3.0}, {"logprobs": 20}):
        out = generate(engine, random_ids(5), threshold=0.0, **FREE, **settings)
        assert set(out.token_ids[1:]) <= set(ids.tolist())
    assert all(set(token.top_logprobs) <= set(ids.tolist()) for token in out.trace[1:])
    assert len(out.trace[0].top_logprobs) == 20
    assert all(len(token.top_logprobs) == 9 for token in out.trace[1:])


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    engine = make_engine(drafting_model("llama"))
    settings = {**FREE, "temperature": 1.5, "threshold": 0.1}
    texts = [tuple(generate(engine, [5, 6], seed=seed, **settings).token_ids) for seed in (1, 1, 2, -1, 2**63)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 4
    unseeded = {tuple(generate(engine, [5, 6], **settings).token_ids) for _ in range(3)}
    assert len(unseeded) > 1


def test_generation_under_the_users_own_grad_modes() -> None:
    engine = make_engine(drafting_model("llama"))
    texts = []
    for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with mode:
            texts.append(generate(engine, [5, 6, 7], threshold=0.05, **FREE).token_ids)
    assert texts[0] == texts[1] == texts[2]
