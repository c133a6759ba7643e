"""Passes with static shapes against eager ones, on a CPU: as they are, and through a recorder that stands in for CUDA
graphs (fixed addresses, nothing of the call but what lies in the buffers)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from exitlm.decode.batch import Batch
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
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel
from tests.decode.driver import Driver, advance_many, make_runner
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
        assert walk(pair, 3, 12, seed) <= 1e-12


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@torch.inference_mode()
def test_in_float32(family: str) -> None:
    with torch.inference_mode(False):
        pair = fused_pair(long_model(family, torch.float32), True)
    assert walk(pair, 3, 12, 0) <= 2e-5


@pytest.mark.parametrize("start", [250, 505, 1018])
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
@torch.inference_mode()
def test_across_the_boundaries_of_buckets(family: str, start: int) -> None:
    """From 1024 keys on attention is computed in chunks, of which the last ones may have no visible key."""
    with torch.inference_mode(False):
        pair = fused_pair(long_model(family, kinds=("mlp", "lens")), True)
    assert walk(pair, start, 8, start) <= 1e-12


def test_buckets() -> None:
    assert [row_bucket(n) for n in (1, 2, 3, 4, 5, 16, 17, 32)] == [1, 2, 4, 4, 8, 16, 32, 32]
    assert [key_bucket(n, 4096) for n in (1, 256, 257, 512, 513, 4096)] == [256, 256, 512, 512, 1024, 4096]
    assert key_bucket(600, 640) == 640
    assert key_bucket(10, 64) == 64
    assert [chunks(n) for n in (64, 256, 512, 1024, 1088, 4096, 16384, 49152)] == [1, 1, 1, 4, 4, 16, 32, 32]


@pytest.mark.parametrize("rows", [[3], [1, 1, 1], [2, 4, 3], [9]])
def test_padding_touches_nothing_else(rows: list[int]) -> None:
    """A padded pass writes the slots of its own positions, and no other."""
    _, fused = fused_pair(long_model("mistral"), False)
    runner = make_runner(fused, 400)
    drivers = [Driver(runner, scatter=i) for i in range(len(rows))]
    for number, driver in enumerate(drivers):
        driver.advance(random_ids(5 + number))
    for store in runner.pool.stores:
        store.fill_(7.0)
    advance_many([(driver, random_ids(count)) for driver, count in zip(drivers, rows, strict=True)])
    for entry, store in enumerate(runner.pool.stores):
        changed = (store != 7.0).any(0).any(0).any(-1).nonzero().flatten().tolist()
        tables = [driver.tables[runner.pool.group_of[entry]] for driver in drivers]
        runs = [
            table.slots(driver.length - count, count)
            for driver, table, count in zip(drivers, tables, rows, strict=True)
        ]
        written = sorted(n for each in runs for first, count in each for n in range(first, first + count))
        assert changed == written


def test_no_slot_of_a_pool_for_static_passes_holds_what_is_no_number() -> None:
    """Padded reads meet slots that nobody has written: zero times NaN would be NaN."""
    _, fused = fused_pair(long_model("llama"), False)
    assert all(not store.any() for store in make_runner(fused, 400).pool.stores)


def test_the_result_of_a_pass_outlives_the_next_one() -> None:
    _, fused = fused_pair(long_model("llama"), True)
    runner = make_runner(fused)
    driver = Driver(runner)
    first = driver.advance([5], 1)
    kept = first.hidden_MD.clone(), first.residual_MD.clone()
    logits = runner.exit_logits(1, first, [0])
    kept_logits = logits.clone()
    runner.exit_logits(1, driver.advance([9], 1), [0])
    assert torch.equal(first.hidden_MD, kept[0])
    assert torch.equal(first.residual_MD, kept[1])
    assert torch.equal(logits, kept_logits)


def recordings(fused: FusedModel) -> list[Recorded]:
    """What has been recorded of passes."""
    assert fused.static is not None
    return list(fused.static._passes.values())


def test_all_sequences_share_the_recordings_of_a_pool() -> None:
    """As many recordings as shapes, and no more; another pool has its own."""
    eager, fused = fused_pair(long_model("llama", kinds=("mlp",)), True)
    for _ in range(2):
        runner, reference = make_runner(fused), make_runner(eager)
        for size in (1, 1, 3, 4, 1):
            ids = random_ids(size, size)
            moves = [[(Driver(each, scatter=i), ids[i:]) for i in range(2)] for each in (runner, reference)]
            for sides in zip(*moves, strict=True):
                mine, theirs = (driver.advance([8, *tokens], 1) for driver, tokens in sides)
                assert worst(mine.hidden_MD, theirs.hidden_MD) <= 1e-12
            mine, theirs = (advance_many([(driver, [7]) for driver, _ in each])[1] for each in moves)
            assert worst(mine.hidden_MD, theirs.hidden_MD) <= 1e-12
            for each in moves:
                for driver, _ in each:
                    driver.release()
        assert fused.static is not None
        shapes = {key[2:5] for key in fused.static._passes}
        assert shapes == {(m, 256, True) for m in (1, 2, 4, 8)} | {(m, 256, False) for m in (2, 8, 16)}
        assert len(recordings(fused)) <= 3 * len(shapes)
    first = recordings(fused)
    Driver(make_runner(fused)).advance([5])
    assert not set(map(id, recordings(fused))) & set(map(id, first))


def test_longer_rotation_tables_are_recorded_anew() -> None:
    """A recording reads the tables it was made with; when a longer text has replaced them, it is made again."""
    _, fused = fused_pair(long_model("llama"), True)
    runner = make_runner(fused, 2 * 2048)
    Driver(runner).advance([5])
    before = fused.rotation_tables(1, False)
    assert all(found.tables is before for found in recordings(fused))
    long = Driver(runner)
    long.prefill(random_ids(1100), 400)
    after = fused.rotation_tables(1, False)
    assert after is not before
    Driver(runner).advance([5])
    assert all(found.tables is after for found in recordings(fused))


def longrope_pair() -> tuple[FusedModel, FusedModel]:
    """Models whose rotations change when a text passes 16 tokens."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    over = {"rope_scaling": scaling, "original_max_position_embeddings": 16}
    return fused_pair(long_model("phi3", kinds=("mlp",), **over), True)


@torch.inference_mode()
def test_longrope_has_the_rotations_of_each_sequence() -> None:
    """Short and long texts side by side: passes of one kind are static, mixed ones are eager; neither is recorded
    again because the other came between."""
    with torch.inference_mode(False):
        pair = longrope_pair()
    sides = [[Driver(runner, total=total) for total in (10, 20, 20, 10)] for runner in map(make_runner, pair)]
    made = 0
    for members in ([0], [1], [0, 3], [1, 2], [0, 1, 2, 3], [3], [2], [0, 3], [1, 2]):
        batches = [advance_many([(side[i], [7]) for i in members]) for side in sides]
        for one, two in zip(*batches, strict=True):
            assert worst(two.hidden_MD, one.hidden_MD) <= 1e-12
        found = set(map(id, recordings(pair[1])))
        if members == [0, 1, 2, 3]:
            made = len(found)
    assert made == len(found) == 4
    short, long = (sides[1][i] for i in (0, 1))
    assert worst(short.stored(0)[0, :, 1], long.stored(0)[0, :, 1]) > 1e-3


def test_when_recording_fails_decoding_goes_on() -> None:
    eager, fused = fused_pair(long_model("llama"), True)
    assert fused.static is not None

    def fail(body: Callable[[], Tensor]) -> Recorded:
        raise RuntimeError("out of memory")

    fused.static.record = fail
    driver, reference = Driver(make_runner(fused)), Driver(make_runner(eager))
    with pytest.warns(UserWarning, match="without them: out of memory"):
        mine = driver.advance([4, 5])
    theirs = reference.advance([4, 5])
    assert worst(mine.hidden_MD, theirs.hidden_MD) <= 1e-12
    assert fused.static.broken
    assert worst(driver.advance([6]).hidden_MD, reference.advance([6]).hidden_MD) <= 1e-12


@pytest.mark.parametrize("count", [3, 4])
def test_attention_in_chunks(count: int) -> None:
    """Every row has keys of its own; chunks without a visible key have no weight; grouped queries, half precision."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 6, 8, generator=generator, dtype=torch.float64)
    seen = torch.randn(2, 3, 2, 48, 8, generator=generator, dtype=torch.float64)
    visible = (1, 13, 48)
    mask = torch.zeros(3, 6, 48, dtype=torch.float64)
    for row, keys in enumerate(visible):
        mask[row, :, keys:] = -1e30
    found = attend_in_chunks(query, seen, mask, 0.3, count)
    half = attend_in_chunks(query.bfloat16(), seen.bfloat16(), mask.bfloat16(), 0.3, count)
    assert half.dtype == torch.bfloat16
    for row, keys in enumerate(visible):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[row], seen[0, row, :, :keys], seen[1, row, :, :keys], scale=0.3
        )
        assert worst(found[row], expected) <= 1e-12
        assert worst(half[row].double(), expected) <= 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_mask_is_finite_in_every_dtype(dtype: torch.dtype) -> None:
    pool = make_runner(fused_pair(long_model("llama"), False)[1]).pool
    numbers = torch.tensor([[[3, 0, 0]], [[4, 0, 0]]])
    for alone, visible in ((False, [[4, 4], [5, 5]]), (True, [[4, 5, 4, 5]])):
        mask = StaticRows(pool, [], numbers, 8, dtype, alone)._mask(None, 2)
        assert mask.isfinite().all()
        assert (mask == 0).sum(-1).tolist() == visible


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
    costs = measure(make_runner(fused))
    assert recordings(fused)
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
    driver = Driver(make_runner(fused))
    assert fused.static is not None
    for count in (ROWS[-1], ROWS[-1] + 1):
        driver.enter(random_ids(count - len(driver.held[0])))
        assert fused.static.takes(Batch.of((driver.part(0),))) == (count == ROWS[-1])
