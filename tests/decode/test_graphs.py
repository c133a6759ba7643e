"""Passes with static shapes against eager ones, on a CPU: as they are, and through a recorder that stands in for CUDA
graphs (fixed addresses, nothing of the call but what lies in the buffers)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from exitlm.decode.cache import rounded
from exitlm.decode.engine import Engine
from exitlm.decode.fused import FusedModel
from exitlm.decode.graphs import (
    ROWS,
    Recorded,
    StaticRows,
    attend_in_chunks,
    chunks,
    key_bucket,
    resolve_compile,
    row_bucket,
)
from exitlm.decode.measure_costs import measure
from exitlm.decode.step import SequenceState
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel
from tests.decode.models import drafting_model, generate, make_engine, random_ids, worst
from tests.decode.patterns import long_model, walk
from tests.decode.test_costs import any_time_counts
from tests.model.families import FAMILIES


def record_on_cpu(body: Callable[[], Tensor]) -> Recorded:
    """Record as CUDA graphs do: one address for the output, and a replay that sees nothing but the buffers."""
    with torch.inference_mode(False), torch.no_grad():
        output = body()

    def replay() -> None:
        with torch.inference_mode(False), torch.no_grad():
            output.copy_(body())

    return Recorded(replay, output)


def fused_pair(model: EarlyExitModel, recorded: bool) -> tuple[FusedModel, FusedModel]:
    """The eager model and the static one."""
    eager, static = FusedModel(model, "none"), FusedModel(model, "none", "static")
    assert static.static is not None
    if recorded:
        static.static.record = record_on_cpu
    return eager, static


@pytest.mark.parametrize("recorded", [False, True], ids=["as it is", "recorded"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_static_passes_equal_eager_ones(family: str, recorded: bool) -> None:
    with torch.inference_mode(False):
        pair = fused_pair(long_model(family), recorded)
    for seed in range(3):
        assert walk(pair, [1, 2, 3, 4], 3, 12, seed) <= 1e-12


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.inference_mode()
def test_in_float32(family: str) -> None:
    with torch.inference_mode(False):
        pair = fused_pair(long_model(family, torch.float32), True)
    assert walk(pair, [1, 3], 3, 12, 0) <= 2e-5


@pytest.mark.parametrize("start", [250, 505, 1018])
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
@torch.inference_mode()
def test_across_the_boundaries_of_buckets(family: str, start: int) -> None:
    """From 1024 keys on attention is computed in chunks, of which the last ones may have no visible key."""
    with torch.inference_mode(False):
        pair = fused_pair(long_model(family), True)
    assert walk(pair, [2], start, 8, start) <= 1e-12


def test_buckets() -> None:
    assert [row_bucket(n) for n in (1, 2, 3, 4, 5, 16, 17, 32)] == [1, 2, 4, 4, 8, 16, 32, 32]
    assert [key_bucket(n, 4096) for n in (1, 256, 257, 512, 513, 4096)] == [256, 256, 512, 512, 1024, 4096]
    assert key_bucket(600, 640) == 640
    assert key_bucket(10, 64) == 64
    assert [chunks(n) for n in (64, 256, 512, 1024, 1088, 4096, 16384, 49152)] == [1, 1, 1, 4, 4, 16, 32, 32]
    assert [rounded(n) for n in (1, 1024, 1025, 16384, 16385, 40000)] == [1024, 1024, 2048, 16384, 32768, 49152]


def test_padding_touches_nothing_else() -> None:
    """A padded pass writes its own positions, and no other."""
    _, fused = fused_pair(long_model("llama"), False)
    state = SequenceState(fused, (), fused.new_cache(), 300)
    for layer in state.cache.layers:
        layer.fill_(7.0)
    for count in (3, 5, 9):
        at = state.length
        before = [layer.clone() for layer in state.cache.layers]
        state.advance(random_ids(count))
        for layer, old in zip(state.cache.layers[:5], before, strict=False):
            changed = (layer != old).any(0).any(0).any(-1).nonzero().flatten().tolist()
            assert changed == list(range(at, at + count))


def test_the_result_of_a_pass_outlives_the_next_one() -> None:
    _, fused = fused_pair(long_model("llama"), True)
    state = SequenceState(fused, (), fused.new_cache(), 64)
    first = state.advance([5]).final_RD
    assert first is not None
    kept = first.clone()
    head = fused.heads[1]
    logits = head.logits(first, first, None)
    kept_logits = logits.clone()
    second = state.advance([9]).final_RD
    assert second is not None
    head.logits(second, second, None)
    assert torch.equal(first, kept)
    assert torch.equal(logits, kept_logits)


def test_recordings_belong_to_the_addresses_of_a_cache() -> None:
    """A second cache records for itself; a cache that grows forgets; as many recordings as shapes, and no more."""
    model = long_model("llama")
    eager, fused = fused_pair(model, True)
    caches = [fused.new_cache(), fused.new_cache()]
    for repeat in range(2):
        for cache in caches:
            state, reference = SequenceState(fused, (2,), cache, 60), SequenceState(eager, (2,), eager.new_cache(), 60)
            for size in (1, 1, 3, 4, 1):
                ids = random_ids(size, size + repeat)
                mine, theirs = state.advance(ids).final_RD, reference.advance(ids).final_RD
                assert mine is not None
                assert theirs is not None
                assert worst(mine, theirs) <= 1e-12
            assert len(cache.graphs) == 4  # two segments, one row and four
    caches[0].reserve(1000)
    assert not caches[0].graphs
    assert caches[1].graphs


def test_longer_rotation_tables_are_recorded_anew() -> None:
    """A recording reads the tables it was made with; when a longer text has replaced them, it is made again."""
    _, fused = fused_pair(long_model("llama"), True)
    cache = fused.new_cache()
    cache.reserve(900)  # so that it keeps its recordings
    for capacity in (100, 800):
        SequenceState(fused, (), cache, capacity).advance([5])
        assert [found.tables is fused.rotations(1)[0] for found in cache.graphs.values()] == [True]


@torch.inference_mode()
def test_longrope_changes_tables_within_a_text() -> None:
    """When a text outgrows the original context it is prefilled again with other rotations."""
    with torch.inference_mode(False):
        scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        over = {"rope_scaling": scaling, "original_max_position_embeddings": 16}
        pair = fused_pair(long_model("phi3", **over), True)
    states = [SequenceState(fused, (), fused.new_cache(), 64) for fused in pair]
    for total in (10, 20, 10):
        for ids in (random_ids(9), [4]):
            one, two = (state.prefill(ids, total) if len(ids) > 1 else state.advance(ids).final_RD for state in states)
            assert one is not None
            assert two is not None
            assert worst(two, one) <= 1e-12


def test_when_recording_fails_decoding_goes_on() -> None:
    eager, fused = fused_pair(long_model("llama"), True)
    assert fused.static is not None

    def fail(body: Callable[[], Tensor]) -> Recorded:
        raise RuntimeError("out of memory")

    fused.static.record = fail
    state, reference = (SequenceState(each, (), each.new_cache(), 64) for each in (fused, eager))
    with pytest.warns(UserWarning, match="without them: out of memory"):
        mine = state.advance([4, 5]).final_RD
    theirs = reference.advance([4, 5]).final_RD
    assert mine is not None
    assert theirs is not None
    assert worst(mine, theirs) <= 1e-12
    assert not fused.static.takes(1)
    state.advance([6])


@pytest.mark.parametrize("count", [3, 4])
def test_attention_in_chunks(count: int) -> None:
    """Chunks without a visible key have no weight; grouped queries and half precision."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 6, 8, generator=generator, dtype=torch.float64)
    seen = torch.randn(2, 2, 48, 8, generator=generator, dtype=torch.float64)
    for visible in (1, 13, 48):
        mask = torch.zeros(6, 48, dtype=torch.float64)
        mask[:, visible:] = -1e30
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, seen[0][None, :, :visible], seen[1][None, :, :visible], scale=0.3
        )
        assert worst(attend_in_chunks(query, seen, mask, 0.3, count), expected) <= 1e-12
        half = attend_in_chunks(query.bfloat16(), seen.bfloat16(), mask.bfloat16(), 0.3, count)
        assert half.dtype == torch.bfloat16
        assert worst(half.double(), expected) <= 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_mask_is_finite_in_every_dtype(dtype: torch.dtype) -> None:
    mask = StaticRows([], torch.tensor([3, 4]), 8, 2, dtype)._mask(None)
    assert mask.isfinite().all()
    assert (mask == 0).sum(1).tolist() == [4, 5, 4, 5]


@pytest.mark.parametrize("mode", ["full", "threshold", "lossless"])
def test_engines_write_the_same_text(mode: str) -> None:
    model = drafting_model("llama")
    eager, static = make_engine(model), make_engine(model, compile="static")
    assert static.fused.static is not None
    static.fused.static.record = record_on_cpu
    for seed in range(4):
        settings: dict[str, Any] = {"mode": mode, "max_new_tokens": 40, "ignore_eos": True, "threshold": 0.5}
        settings |= {"temperature": 1.0, "seed": seed} if seed % 2 else {}
        if mode == "full":
            settings.pop("threshold")
        one, two = (generate(engine, random_ids(6, seed), **settings) for engine in (eager, static))
        assert (one.token_ids, one.exit_layers) == (two.token_ids, two.exit_layers)


def test_costs_are_measured_with_static_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    any_time_counts(monkeypatch)
    _, fused = fused_pair(drafting_model("llama"), True)
    costs = measure(fused)
    assert all(value > 0 for value in (*costs.layer[0], *costs.head, *costs.test.values()))


def test_compile_is_resolved() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert [resolve_compile("auto", device) for device in (cpu, cuda)] == ["none", "graphs"]
    assert resolve_compile("static", cpu) == "static"
    with pytest.raises(UserError, match="'graphs' needs a CUDA device"):
        resolve_compile("graphs", cpu)
    with pytest.raises(UserError, match=r"compile 'graph' is unknown.*did you mean 'graphs'"):
        Engine(drafting_model("llama"), compile="graph")


def test_large_passes_stay_eager() -> None:
    _, fused = fused_pair(long_model("llama"), False)
    assert fused.static is not None
    assert fused.static.takes(ROWS[-1])
    assert not fused.static.takes(ROWS[-1] + 1)
