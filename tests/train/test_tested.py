"""Which exits are tested by default: against brute force over a decoder that counts what it reads, token by token."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exitlm.model.exits import ExitConfig
from exitlm.train.tested import MAX_COMPARED, ExitReads, Reads, choose_tested, elements_read, reads_of
from tests.model.families import FAMILIES, tiny_model

D, WIDTH, V = 32, 48, 97  # of the tiny models
LAYER = D * (4 + 2 * 2) * 12 + 4 * 12 * D + 3 * D * WIDTH


def decoded(reads: Reads, exits: tuple[int, ...], fires: dict[int, list[bool]]) -> int:
    """Elements that a decoder with exact KV reads, counted pass by pass: pending tokens ride along for nothing."""
    total = 0
    for n in range(len(next(iter(fires.values())))):
        for layer in range(1, reads.num_layers + 1):
            total += reads.layer
            if layer in exits:
                total += reads.exits[layer].test
                if fires[layer][n]:
                    total += reads.exits[layer].emit
                    break
        else:
            total += reads.head
    return total


def tensors(fires: dict[int, list[bool]]) -> dict[int, Tensor]:
    return {e: torch.tensor(line) for e, line in fires.items()}


@st.composite
def cases(draw: Any) -> tuple[Reads, dict[int, list[bool]]]:
    num_layers, tokens = draw(st.integers(2, 6)), draw(st.integers(1, 12))
    layers = draw(st.lists(st.integers(1, num_layers - 1), min_size=1, max_size=4, unique=True))
    rules = st.sampled_from(draw(st.sampled_from([["gate"], ["probability"], ["gate", "probability"]])))
    exits = {
        e: ExitReads(rule=draw(rules), test=draw(st.integers(0, 12)), emit=draw(st.integers(0, 6))) for e in layers
    }
    lines = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    reads = Reads(layer=draw(st.integers(1, 8)), num_layers=num_layers, head=draw(st.integers(0, 20)), exits=exits)
    return reads, {e: draw(lines) for e in layers}


@given(case=cases())
@settings(max_examples=300, deadline=None)
def test_the_choice_is_the_best_of_all(case: tuple[Reads, dict[int, list[bool]]]) -> None:
    reads, fires = case
    layers = sorted(fires)
    subsets = [s for n in range(len(layers) + 1) for s in itertools.combinations(layers, n)]
    of_one_rule = [s for s in subsets if len({reads.exits[e].rule for e in s}) < 2]
    chosen = choose_tested(reads, tensors(fires))
    assert chosen == min(of_one_rule, key=lambda s: (decoded(reads, s, fires), len(s), s))
    count_P = torch.ones(len(fires[layers[0]]), dtype=torch.long)
    for subset in subsets:
        assert elements_read(reads, subset, tensors(fires), count_P) == decoded(reads, subset, fires)


def alike(coverage: dict[int, float], test: int, tokens: int = 1000, **over: Any) -> tuple[Reads, dict[int, Tensor]]:
    """Exits with equal tests, whose deeper ones fire for what the shallower ones fire for, too."""
    exits = {e: ExitReads(rule="probability", test=test, emit=0) for e in coverage}
    settings = {"layer": 10, "num_layers": 30, "head": 80, **over}
    at = torch.arange(tokens) / tokens
    return Reads(exits=exits, **settings), {e: at < share for e, share in coverage.items()}


def test_the_expected_speed_is_that_of_the_formula() -> None:
    """One exit at half of the work that fires for half of the tokens: 1 / (f + (1 - f)(1 - q)) = 1.33."""
    reads, fires = alike({15: 0.5}, test=0, head=0)
    elements = elements_read(reads, (15,), fires, torch.ones(1000, dtype=torch.long))
    assert 1000 * reads.full() / elements == pytest.approx(4 / 3)


def test_exits_that_never_fire_are_not_tested() -> None:
    assert choose_tested(*alike({8: 0.0, 15: 0.0}, test=1)) == ()
    assert choose_tested(*alike({8: 0.0, 15: 0.0}, test=0)) == ()  # a tie goes to fewer
    assert choose_tested(*alike({8: 0.0, 15: 0.6}, test=1)) == (15,)


def test_a_test_that_costs_more_than_it_saves_is_not_made() -> None:
    saved = 0.2 * (15 * 10 + 80)
    assert choose_tested(*alike({15: 0.2}, test=int(saved) - 1)) == (15,)
    assert choose_tested(*alike({15: 0.2}, test=int(saved))) == ()  # a tie goes to fewer


def test_a_deeper_exit_counts_only_for_what_is_left() -> None:
    """Alone either exit pays; together the deeper one finds no tokens that the shallower one left."""
    together = alike({8: 0.4, 15: 0.4}, test=20)
    assert choose_tested(*together) == (8,)
    reads, fires = together
    fires[15] = ~fires[8]  # as many tokens, but others
    assert choose_tested(reads, fires) == (8, 15)


@given(shares=st.lists(st.floats(0, 1), min_size=2, max_size=2), test=st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_an_exit_that_is_tested_stays_so_with_more_coverage(shares: list[float], test: int) -> None:
    less, more = sorted(shares)
    if choose_tested(*alike({15: less}, test=test)):
        assert choose_tested(*alike({15: more}, test=test)) == (15,)


def test_many_exits_are_chosen_in_little_time() -> None:
    """More exits than subsets can be compared of; no single change of the choice is an improvement."""
    coverage = {e: (e / 30) ** 2 for e in range(1, 30)}
    assert len(coverage) > MAX_COMPARED
    reads, fires = alike(coverage, test=4)
    chosen = choose_tested(reads, fires)
    count_P = torch.ones(1000, dtype=torch.long)
    best = elements_read(reads, chosen, fires, count_P)
    assert 1 < len(chosen) < 20
    for e in coverage:
        assert elements_read(reads, tuple(sorted({*chosen} ^ {e})), fires, count_P) >= best


def test_without_exits_or_tokens_nothing_is_tested() -> None:
    reads, _ = alike({15: 0.5}, test=1)
    assert choose_tested(reads, {}) == ()
    assert choose_tested(reads, {30: torch.ones(4, dtype=torch.bool)}) == ()
    assert choose_tested(reads, {15: torch.ones(0, dtype=torch.bool)}) == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_matrices_of_a_model_are_counted(family: str) -> None:
    model = tiny_model(family)
    backbone = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2) + model.lm_head.weight.numel()
    assert reads_of(model).full() == backbone


@pytest.mark.parametrize(
    ("config", "test", "emit"),
    [
        (ExitConfig(layer=1), D * D + V * D, 0),
        (ExitConfig(layer=1, branch=True, candidates=40), D * D + 3 * D * WIDTH + 40 * D, 0),
        (ExitConfig(layer=1, branch=True, candidates=40, gate=True), D, D * D + 3 * D * WIDTH + 40 * D),
        (ExitConfig(layer=1, kind="embed"), V * D, 0),
        (ExitConfig(layer=1, kind="norm", output="own", candidates=40), 40 * D, 0),
        (ExitConfig(layer=1, kind="mlp", output="exits"), 3 * D * WIDTH + V * D, 0),
        (ExitConfig(layer=1, kind="norm", output="low_rank", rank=5), 5 * D + 5 * V, 0),
        (ExitConfig(layer=1, kind="block", gate=True), LAYER + D, V * D),
        (ExitConfig(layer=1, kind="block"), LAYER + V * D, 0),
    ],
)
def test_what_an_exit_reads(config: ExitConfig, test: int, emit: int) -> None:
    model = tiny_model("llama")
    model.add_exits([config, ExitConfig(layer=4)])
    found = reads_of(model)
    assert found.exits == {1: ExitReads(rule="gate" if config.gate else "probability", test=test, emit=emit)}
    assert (found.layer, found.num_layers, found.head) == (LAYER, 4, V * D)
