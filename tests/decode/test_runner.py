"""Passes between boundaries: wherever rows wait and whatever is rolled back, keys are those of a full pass."""

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from exitlm.decode.kernels.fused import FusedModel, Rows
from exitlm.decode.kernels.runner import Runner, select
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.arithmetic import FLOAT64, NATIVE, Arithmetic, param
from tests.decode.driver import Driver, advance_many, logits_of, make_runner, pool_segment
from tests.decode.models import attach, random_ids, worst
from tests.model.families import FAMILIES, tiny_model

LAYERS = 5
FLOAT32 = Arithmetic("float32", torch.float32, "none", 1e-5, native=False)


@functools.cache
def prepared(family: str, exits: frozenset[int], arithmetic: Arithmetic) -> tuple[EarlyExitModel, Runner]:
    """A model with exits behind some of its layers, two kinds of them with a cache entry of their own."""
    with torch.inference_mode(False):
        model = arithmetic.tiny_model(family, num_hidden_layers=LAYERS).to(arithmetic.dtype)
        kinds = ("block", "lens", "mlp", "block")
        attach(model, [ExitConfig(layer=layer, kind=kinds[layer - 1]) for layer in sorted(exits)])
        return model, make_runner(arithmetic.pack(model), 2048, block_size=3)


@dataclass(frozen=True)
class Move:
    """New tokens of some sequences (their numbers), which go to boundary number ``last``, or, with no tokens, a
    rollback by ``back`` positions."""

    members: tuple[int, ...]
    rows: int
    last: int
    back: int = 0


MEMBERS = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True).map(tuple)
MOVES = st.one_of(
    st.builds(Move, MEMBERS, st.integers(1, 3), st.integers(0, LAYERS)),
    st.builds(Move, MEMBERS, st.just(1), st.just(0)),
    st.builds(Move, MEMBERS, st.just(0), st.just(0), st.integers(1, 6)),
)


def play(drivers: list[Driver], moves: list[Move], texts: list[list[int]]) -> list[list[int]]:
    """Make the moves; the tokens that each sequence has at the end."""
    segments, known = drivers[0].runner.segments, [text[:9] for text in texts]
    fresh = [iter(text[9:]) for text in texts]
    for driver, tokens in zip(drivers, known, strict=True):
        driver.prefill(tokens)
    for move in moves:
        batch = []
        for i in move.members:
            if move.rows:
                new = [next(fresh[i]) for _ in range(move.rows)]
                known[i] = known[i] + new
                batch.append((drivers[i], new))
            else:
                length = max(1, drivers[i].floor, drivers[i].length - move.back)
                drivers[i].truncate(length)
                known[i] = known[i][:length]
        if batch:
            last = move.last % segments + 1
            for driver, arrived in zip(move.members, advance_many(batch, last), strict=True):
                assert len(arrived.hidden_MD) >= move.rows
                assert drivers[driver].filled[last - 1] == len(known[driver])
    return known


@torch.no_grad()
def compare(driver: Driver, model: EarlyExitModel, tokens: list[int], arithmetic: Arithmetic) -> None:
    """Every key, value and held state against one pass of all tokens through all layers; then the final logits. Those
    of the model itself where both compute alike, else of the same kernels."""
    runner, tolerance = driver.runner, arithmetic.tolerance
    full, states = Driver(runner), dict[int, Tensor]()
    full.enter(tokens)
    for boundary in range(1, runner.segments + 1):
        states[runner.bounds[boundary]] = full.advance([], boundary).hidden_MD
    if not arithmetic.native:
        taps = model.taps(torch.tensor([tokens]), range(1, LAYERS + 1))
        states = {layer: tap.hidden[0] for layer, tap in taps.items()}
    assert driver.filled == sorted(driver.filled, reverse=True)
    for boundary in range(1, runner.segments):
        held = driver.held[boundary]
        assert len(held) == driver.filled[boundary - 1] - driver.filled[boundary]
        expected = states[runner.bounds[boundary]][driver.filled[boundary] : driver.filled[boundary - 1]]
        assert not len(held) or worst(held, expected.to(held.dtype)) <= tolerance
    for entry in range(len(runner.pool.stores)):
        found, count = driver.stored(entry), driver.filled[pool_segment(runner, entry)]
        expected = full.stored(entry)[:, :, count - found.shape[2] : count]
        assert not found.numel() or worst(found, expected) <= tolerance
    logits_MV = logits_of(runner, driver.advance([7]))
    if arithmetic.native:
        expected_V = logits_of(runner, full.advance([7]))[-1]
    else:
        expected_V = model.logits([*tokens, 7])[0, -1].to(logits_MV.dtype)
    full.release()
    assert worst(logits_MV[-1], expected_V) <= tolerance


@pytest.mark.parametrize(
    ("arithmetic", "examples"),
    [
        param(FLOAT64, 100),
        param(FLOAT32, 10),
        *(param(native, 20) for native in NATIVE),
        *(param(each, 1000, slow=True) for each in (FLOAT64, *NATIVE)),
    ],
)
def test_keys_and_values_after_any_pattern_are_those_of_a_full_pass(arithmetic: Arithmetic, examples: int) -> None:
    seen = {"pending at the end": 0, "patterns": 0, "freed": 0}

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(
        family=st.sampled_from(FAMILIES),
        exits=st.frozensets(st.integers(1, LAYERS - 1)),
        moves=st.lists(MOVES, min_size=3, max_size=14),
        seed=st.integers(0, 10_000),
    )
    @torch.inference_mode()
    def check(family: str, exits: frozenset[int], moves: list[Move], seed: int) -> None:
        model, runner = prepared(family, exits, arithmetic)
        drivers = [Driver(runner, scatter=i, leave_windows=i == 2) for i in range(3)]
        tokens = play(drivers, moves, [random_ids(60, seed + i) for i in range(3)])
        for driver, ids in zip(drivers, tokens, strict=True):
            seen["patterns"] += 1
            seen["pending at the end"] += driver.pending > 1
            seen["freed"] += any(table.freed for table in driver.tables)
            compare(driver, model, ids, arithmetic)
            driver.release()
        assert all(allocator.used == 0 for allocator in runner.pool.allocators)

    check()
    assert seen["patterns"] >= 3 * examples
    assert seen["pending at the end"] >= examples / 2
    assert examples < 100 or seen["freed"] >= examples / 20


def test_boundaries_are_the_early_exits() -> None:
    """An exit at the last layer is the end of the model."""
    model = attach(tiny_model("llama"), [ExitConfig(layer=layer) for layer in (3, 1, 4)])
    runner = make_runner(FusedModel(model, "none"))
    assert (runner.early, runner.bounds, runner.segments) == ((1, 3), (0, 1, 3, 4), 3)
    assert [runner.head(boundary).key for boundary in (1, 2)] == [("exits", 1), ("exits", 3)]
    bare = make_runner(FusedModel(tiny_model("llama"), "none"))
    assert (bare.bounds, bare.segments) == ((0, 4), 1)


@torch.no_grad()
def test_a_block_exit_has_the_keys_of_rows_that_do_not_stop_there() -> None:
    """A pass over several segments fills the entries of the blocks in between as passes of one segment do."""
    model = attach(tiny_model("llama"), [ExitConfig(layer=layer, kind="block") for layer in (1, 2, 3)])
    runner = make_runner(FusedModel(model, "none"))
    at_once, stepwise, ids = Driver(runner), Driver(runner), random_ids(7)
    at_once.advance(ids)
    stepwise.enter(ids)
    for boundary in range(1, runner.segments + 1):
        stepwise.advance([], boundary)
    assert len(runner.pool.stores) == 4 + 3
    for entry in range(7):
        assert worst(at_once.stored(entry), stepwise.stored(entry)) <= 1e-12


@torch.no_grad()
def test_segments_without_a_block_exit_between_them_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {1: "lens", 2: "block", 3: "mlp", 4: "lens"}
    model = attach(
        tiny_model("llama", num_hidden_layers=6), [ExitConfig(layer=e, kind=kind) for e, kind in kinds.items()]
    )
    fused = FusedModel(model, "none")
    calls: list[tuple[int, int]] = []
    run = fused.run

    def count(hidden_MD: Tensor, first: int, last: int, rows: Rows) -> tuple[Tensor, Tensor]:
        calls.append((first, last))
        return run(hidden_MD, first, last, rows)

    monkeypatch.setattr(fused, "run", count)
    driver = Driver(make_runner(fused))
    driver.advance([5, 6])
    driver.advance([7], 1)
    driver.advance([8])  # one row waits at the first boundary
    assert calls == [(0, 2), (2, 6), (0, 1), (0, 1), (1, 2), (2, 6)]


@pytest.mark.parametrize("rows", [[0], [2, 3, 4], [0, 1, 2, 3, 4, 5], [1, 4], [0, 5], [0, 2, 3]])
def test_rows_are_selected(rows: list[int]) -> None:
    rows_MX = torch.arange(12.0).view(6, 2)
    found = select(rows_MX, rows)
    assert found.tolist() == [rows_MX[row].tolist() for row in rows]
    together = rows[-1] - rows[0] == len(rows) - 1
    assert (found.untyped_storage().data_ptr() == rows_MX.untyped_storage().data_ptr()) == together
