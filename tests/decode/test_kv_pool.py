"""The pool of keys and values: what a budget holds, groups of windows, and that it is full only when it is."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.decode.cache.block_table import BlockTable
from exitlm.decode.cache.kv_pool import Entry, KVPool
from exitlm.decode.options import EngineConfig
from exitlm.errors import UserError

FULL, SHORT, LONG = None, 5, 40


def make_pool(windows: list[int | None], context: int = 64, zeroed: bool = False, **options: Any) -> KVPool:
    """A pool with an entry for each window, two of them to a segment."""
    entries = [Entry(window, i // 2) for i, window in enumerate(windows)]
    return KVPool(
        entries, heads=2, head_dim=3, dtype=torch.float32, device=torch.device("cpu"), context=context,
        options=EngineConfig(**{"block_size": 4, **options}), zeroed=zeroed,
    )  # fmt: skip


POSITION = 2 * 2 * 3 * 4  # bytes of an entry


def test_entries_with_one_window_are_a_group() -> None:
    pool = make_pool([SHORT, FULL, SHORT, LONG, FULL])
    assert [group.window for group in pool.groups] == [FULL, SHORT, LONG]
    assert [group.entries for group in pool.groups] == [(1, 4), (0, 2), (3,)]
    assert [group.segment for group in pool.groups] == [2, 1, 1]
    assert pool.group_of == [1, 0, 1, 2, 0]
    for entry, store in enumerate(pool.stores):
        blocks = pool.allocators[pool.group_of[entry]].num_blocks
        assert store.shape == (2, 2, blocks * pool.block_size, 3)


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(
    windows=st.lists(st.sampled_from([FULL, FULL, SHORT, LONG]), min_size=1, max_size=6),
    block_size=st.integers(1, 9),
    budget=st.integers(1, 200_000),
    rows=st.integers(1, 16),
    sequences=st.integers(1, 4),
)
def test_a_budget_is_used_and_not_exceeded(
    windows: list[int | None], block_size: int, budget: int, rows: int, sequences: int
) -> None:
    options: dict[str, Any] = {"max_rows": rows + sequences, "prefill_chunk": rows, "max_sequences": sequences}
    least = len(windows) * block_size * POSITION
    if budget < least:
        with pytest.raises(UserError, match=f"holds not one block of {block_size} positions, which takes {least}"):
            make_pool(windows, block_size=block_size, kv_bytes=budget, **options)
        return
    pool = make_pool(windows, block_size=block_size, kv_bytes=budget, **options)
    assert pool.nbytes() <= budget
    if None in windows:  # else a window may hold all that texts need
        assert pool.nbytes() > budget - least
    assert min(pool.blocks) >= 1


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(
    windows=st.lists(st.sampled_from([FULL, SHORT, LONG]), min_size=1, max_size=4),
    block_size=st.integers(1, 9),
    budget=st.integers(2_000, 60_000),
    rows=st.integers(1, 16),
    data=st.data(),
)
def test_one_text_can_be_as_long_as_the_pool_says(
    windows: list[int | None], block_size: int, budget: int, rows: int, data: st.DataObject
) -> None:
    """In passes of up to ``max_rows``, with pending rows, giving back what is out of the window."""
    pool = make_pool(
        windows, block_size=block_size, kv_bytes=budget, max_rows=rows + 1, prefill_chunk=1, max_sequences=1
    )
    tables = [BlockTable(allocator, block_size) for allocator in pool.allocators]
    end, deepest, longest = 0, 0, min(pool.capacity, 400)
    while end < longest:
        end = min(end + data.draw(st.integers(1, rows)), longest)
        for group, table in zip(pool.groups, tables, strict=True):
            assert table.ensure(end)
            if group.window is not None:
                table.free_before(max(0, deepest - group.window + 1))
        deepest = max(deepest, end - data.draw(st.integers(0, 64)))


def test_a_longer_text_than_the_pool_holds_has_no_room() -> None:
    pool = make_pool([FULL, SHORT], kv_bytes=2 * 10 * 4 * POSITION)
    assert pool.capacity == 40
    table = BlockTable(pool.allocators[0], pool.block_size)
    assert table.ensure(pool.capacity)
    assert not table.ensure(pool.capacity + 1)


def test_the_bytes_that_a_text_takes() -> None:
    """What an error names as enough is enough, and one block less is not."""
    for windows, positions in itertools.product(([FULL], [FULL, SHORT], [SHORT, LONG]), (1, 4, 37, 300)):
        needed = make_pool(windows).bytes_for(positions)
        assert make_pool(windows, kv_bytes=needed).capacity >= positions
        if positions > 4:
            assert make_pool(windows, kv_bytes=needed - 1).capacity < positions


def test_without_a_budget_one_context_fits() -> None:
    pool = make_pool([FULL, SHORT], context=100_000)
    assert pool.capacity >= 100_000
    assert pool.blocks[1] < pool.blocks[0]  # windows need less


def test_clearing_blocks_touches_no_other() -> None:
    pool = make_pool([FULL, SHORT, FULL], kv_bytes=100 * 4 * POSITION)
    for store in pool.stores:
        store.fill_(1.0)
    pool.clear(0, [2, 5])
    for entry, store in enumerate(pool.stores):
        zero = [slot for slot in range(store.shape[2]) if not store[:, :, slot].any()]
        assert zero == ([8, 9, 10, 11, 20, 21, 22, 23] if pool.group_of[entry] == 0 else [])
