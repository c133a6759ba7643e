"""The pending-token loop: whatever leaves early or is rolled back, keys and values are those of a full pass."""

import functools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from exitlm.decode.cache import Depths, KeyValueCache, boundaries
from exitlm.decode.fused import FusedHead, FusedModel
from exitlm.decode.step import PREFILL_ROWS, Fired, SequenceState, expand_logits
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.models import attach, drafting_model, leave_at, new_state, random_ids, worst
from tests.model.families import FAMILIES, tiny_model

LAYERS = 5
PATTERNS = settings(
    max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@functools.cache
def prepared(family: str, dtype: torch.dtype) -> tuple[EarlyExitModel, FusedModel]:
    """A model with an exit behind every layer, two of them blocks with a cache of their own."""
    with torch.inference_mode(False):
        model = tiny_model(family, dtype, num_hidden_layers=LAYERS)
        kinds = ("block", "lens", "mlp", "block")
        attach(model, [ExitConfig(layer=layer, kind=kind) for layer, kind in enumerate(kinds, 1)])
        return model, FusedModel(model, "none")


@dataclass(frozen=True)
class Move:
    """``rows`` new tokens of which the newest leaves at active exit number ``exit`` (None: nowhere), or, for rows 0, a
    rollback by ``back`` positions."""

    rows: int
    exit: int | None = None
    cap: int | None = None
    back: int = 0


MOVES = st.one_of(
    st.builds(Move, rows=st.just(1), exit=st.integers(0, LAYERS - 2), cap=st.sampled_from([None, None, 0, 1, 2, 5])),
    st.builds(Move, rows=st.integers(1, 3), exit=st.integers(0, LAYERS - 2)),
    st.builds(Move, rows=st.integers(1, 4)),
    st.builds(Move, rows=st.just(0), back=st.integers(1, 6)),
)


def play(state: SequenceState, moves: list[Move], seed: int) -> list[int]:
    """Make the moves; the tokens that are in the sequence at the end."""
    fresh, tokens = iter(random_ids(200, seed)), random_ids(3, seed + 1)
    active = [end for _, end in state.segments[:-1]]
    state.prefill(tokens)
    for move in moves:
        if not move.rows:
            length = max(1, state.length - move.back)
            state.truncate(length)
            tokens = tokens[:length]
            continue
        new = [next(fresh) for _ in range(move.rows)]
        tokens = tokens + new
        before = state.depths.pending
        layer = None if move.exit is None or not active else active[move.exit % len(active)]
        outcome = state.advance(new, leave_at(layer), move.cap)
        assert (None if outcome.fired is None else outcome.fired.layer) == layer
        if layer is None or (move.cap is not None and before + move.rows > move.cap):
            assert outcome.final_RD is not None
        else:
            assert outcome.final_RD is None
        if outcome.final_RD is not None:
            assert len(outcome.final_RD) == before + move.rows
            assert state.depths.pending == 0
        assert state.length == len(tokens)
    return tokens


@torch.no_grad()
def compare(state: SequenceState, model: EarlyExitModel, tokens: list[int], tolerance: float) -> None:
    """Every key, value and held state against one pass of all tokens through all layers; then the final logits."""
    fused, depths = state.fused, state.depths
    full = new_state(fused, list(fused.heads))
    full.advance(tokens)
    taps = model.taps(torch.tensor([tokens]), range(1, LAYERS + 1))
    assert depths.filled == sorted(depths.filled, reverse=True)
    for s, (first, end) in enumerate(state.segments):
        count = depths.filled[s]
        entries = list(range(first, end))
        if s < len(state.segments) - 1:
            block = fused.heads[end].block
            entries += [] if block is None else [block.entry]
            held = depths.held[s][: count - depths.filled[s + 1]]
            expected = taps[end].hidden[0, depths.filled[s + 1] : count].to(held.dtype)
            assert not len(held) or worst(held, expected) <= tolerance
        for entry in entries if count else ():
            found, expected = state.cache.layers[entry], full.cache.layers[entry]
            assert worst(found[:, :, :count], expected[:, :, :count]) <= tolerance
    hidden = state.advance([7]).final_RD
    assert hidden is not None
    assert worst(fused.final_logits(hidden[-1:])[0], model.logits([*tokens, 7])[0, -1].to(fused.dtype)) <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_keys_and_values_after_any_pattern_are_those_of_a_full_pass(dtype: torch.dtype, tolerance: float) -> None:
    seen = {"pending at the end": 0, "patterns": 0}

    @PATTERNS
    @given(
        family=st.sampled_from(FAMILIES),
        active=st.sets(st.integers(1, LAYERS - 1)),
        moves=st.lists(MOVES, min_size=2, max_size=14),
        seed=st.integers(0, 10_000),
    )
    @torch.inference_mode()
    def check(family: str, active: set[int], moves: list[Move], seed: int) -> None:
        model, fused = prepared(family, dtype)
        state = new_state(fused, sorted(active))
        tokens = play(state, moves, seed)
        seen["patterns"] += 1
        seen["pending at the end"] += state.depths.pending > 1
        compare(state, model, tokens, tolerance)

    check()
    assert seen["patterns"] >= 300
    assert seen["pending at the end"] >= 60


@pytest.mark.parametrize("cap", [0, 1, 2, 3, None])
def test_a_cap_forces_a_pass_for_the_keys_but_not_the_token(cap: int | None) -> None:
    _, fused = prepared("llama", torch.float64)
    state = new_state(fused, [1, 2])
    state.prefill([5, 6])
    for count, token in enumerate(random_ids(6), 1):
        outcome = state.advance([token], leave_at(1), cap)
        assert outcome.fired is not None
        assert outcome.fired.layer == 1
        expected = count if cap is None else count % (cap + 1)
        assert state.depths.pending == expected
        assert (outcome.final_RD is None) == (expected > 0)
    assert state.depths.high_water == (6 if cap is None else cap)


def test_each_token_passes_each_layer_once() -> None:
    """The loop's promise against KV recomputation: pending positions go deeper, they don't start again."""
    _, fused = prepared("llama", torch.float64)
    state = new_state(fused, [2, 4])
    for token, layer in zip(random_ids(7), (2, 2, 4, 2, 4, 4, None), strict=True):
        state.advance([token], leave_at(layer))
    assert state.layer_rows == 7 * LAYERS
    assert state.depths.filled == [7, 7, 7]


def test_a_long_prompt_is_run_in_pieces() -> None:
    model = tiny_model("llama", max_position_embeddings=2000)
    state = SequenceState(FusedModel(model, "none"), (), FusedModel(model, "none").new_cache(), 2 * PREFILL_ROWS + 20)
    ids = random_ids(PREFILL_ROWS + 9)
    hidden = state.prefill(ids)
    assert hidden.shape == (1, 32)
    assert worst(state.fused.final_logits(hidden)[0], model.logits(ids)[0, -1]) <= 1e-12
    assert state.length == len(ids)


def test_a_prefill_longer_than_the_held_states_leaves_nothing_pending() -> None:
    model, fused = prepared("qwen3", torch.float64)
    state = new_state(fused, [2])
    ids = random_ids(120)
    state.prefill(ids)
    assert state.depths.pending == 0
    state.advance([5], leave_at(2))
    assert state.depths.pending == 1
    compare(state, model, [*ids, 5], 1e-12)


def test_many_pending_positions_pass_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a deep pass is bounded: what was held goes on in pieces, with the result of one pass."""
    fused = FusedModel(drafting_model("llama"), "none")
    ids = random_ids(40, 3)
    whole = new_state(fused, [1])
    expected = whole.advance(ids).final_RD
    monkeypatch.setattr("exitlm.decode.step.PREFILL_ROWS", 7)
    state = new_state(fused, [1])
    for token in ids[:-1]:
        assert state.advance([token], leave_at(1)).final_RD is None
    found = state.advance(ids[-1:]).final_RD
    assert expected is not None
    assert found is not None
    assert worst(found, expected) < 1e-12
    assert state.depths.filled == [40, 40]


def test_nothing_is_tested_behind_the_exit_that_fired() -> None:
    _, fused = prepared("llama", torch.float64)
    state, tried = new_state(fused, [1, 2, 3]), []

    def test(head: FusedHead, hidden: Tensor, residual: Tensor, block: Tensor | None) -> Fired | None:
        tried.append(head.layer)
        assert hidden.shape == residual.shape == (1, 32)
        assert (block is None) == (head.kind != "block")
        return Fired(head.layer, head, hidden[0]) if head.layer == 2 else None

    state.advance([5, 6, 7], test, max_pending=0)
    assert tried == [1, 2]


def test_a_cache_is_reused_without_leaving_traces() -> None:
    model, fused = prepared("mistral", torch.float64)
    cache = fused.new_cache()
    SequenceState(fused, [1], cache, 60).advance(random_ids(50, 8))
    layers = cache.layers
    state = SequenceState(fused, [1, 3], cache, 40)
    assert cache.layers is layers
    tokens = play(state, [Move(1, 1), Move(2, 3), Move(1, 1)], 4)
    compare(state, model, tokens, 1e-12)


def test_cache_sizes() -> None:
    cache = KeyValueCache(3, 2, 4, torch.float32, torch.device("cpu"))
    assert cache.nbytes() == 0
    cache.reserve(65)
    assert cache.capacity == 128
    assert cache.nbytes() == 3 * 2 * 2 * 128 * 4 * 4
    cache.reserve(100)
    assert cache.capacity == 128


def test_segments() -> None:
    assert boundaries((), 4) == [(0, 4)]
    assert boundaries((3, 1, 1), 4) == [(0, 1), (1, 3), (3, 4)]
    assert boundaries((4,), 4) == [(0, 4)]


def test_held_states_stay_in_order_when_they_outgrow_their_room() -> None:
    depths = Depths(2, 4, 1, torch.float64, torch.device("cpu"))
    for at in range(70):
        depths.filled[0] += 1
        held = depths.hold(0, torch.tensor([[float(at)]], dtype=torch.float64))
        assert held[:, 0].tolist() == list(range(at + 1))
    depths.truncate(66)
    depths.filled[0] += 2
    held = depths.hold(0, torch.tensor([[-1.0], [-2.0]], dtype=torch.float64))
    assert held[:, 0].tolist() == [*range(66), -1, -2]


def test_candidate_logits_are_spread_over_the_vocabulary() -> None:
    model = attach(tiny_model("llama"), [ExitConfig(layer=1, candidates=3)])
    head = FusedModel(model, "none").heads[1]
    ids = head.candidate_list
    assert ids == sorted(ids)
    spread = expand_logits(head, torch.tensor([1.0, 2.0, 3.0]), 97)
    assert [float(spread[i]) for i in ids] == [1.0, 2.0, 3.0]
    assert int(spread.isneginf().sum()) == 94
    assert [head.token(i) for i in range(3)] == ids
