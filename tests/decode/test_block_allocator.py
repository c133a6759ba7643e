import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.decode.cache.block_allocator import EVICTED_TOGETHER, BlockAllocator, first_gap, longest_gap, next_key
from tests.decode.blocks import chain_keys, runs


def take(allocator: BlockAllocator, count: int, expected: int | None = None) -> list[int]:
    """A new sequence of ``count`` blocks that is expected to grow to ``expected``."""
    blocks: list[int] = []
    for index in range(count):
        block = allocator.allocate(blocks[-1] if blocks else None, (expected or count) - index)
        assert block is not None
        blocks.append(block)
    return blocks


def cache(allocator: BlockAllocator, name: str, count: int) -> list[int]:
    """Blocks of a sequence that was published and released."""
    blocks = take(allocator, count)
    for index, block in enumerate(blocks):
        allocator.publish(block, f"{name}{index}".encode())
    allocator.release_all(blocks)
    return blocks


def assert_as_new(allocator: BlockAllocator) -> None:
    """Nothing is held, cached or claimed: one sequence gets every block, in order."""
    allocator.check()
    assert (allocator.used, allocator.cached, allocator.free) == (0, 0, allocator.num_blocks)
    blocks = take(allocator, allocator.num_blocks)
    assert blocks == list(range(allocator.num_blocks))
    allocator.release_all(blocks)


def test_a_lone_sequence_is_one_run_with_and_without_an_expected_length() -> None:
    for expected in (1, 20, 64, 1000):
        allocator = BlockAllocator(64)
        blocks: list[int] = []
        for _ in range(64):
            block = allocator.allocate(blocks[-1] if blocks else None, expected)
            assert block is not None
            blocks.append(block)
            allocator.check()
        assert runs(blocks) == [(0, 64)]
        assert allocator.allocate(blocks[-1]) is None
        allocator.release_all(blocks)
        assert_as_new(allocator)


@pytest.mark.parametrize("renewed", [True, False])
def test_sequences_with_known_lengths_stay_one_run_each_as_they_grow_in_turn(renewed: bool) -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 40) for _ in range(8)]
    allocator = BlockAllocator(sum(lengths))
    held: list[list[int]] = [[] for _ in lengths]
    for step in range(max(lengths)):
        for blocks, length in zip(held, lengths, strict=True):
            if step < length:
                expected = length - step if renewed or not blocks else 1
                block = allocator.allocate(blocks[-1] if blocks else None, expected)
                assert block is not None
                blocks.append(block)
                allocator.check()
    assert [len(runs(blocks)) for blocks in held] == [1] * 8
    assert allocator.free == 0


def test_a_new_run_takes_the_lowest_gap_that_is_long_enough() -> None:
    allocator = BlockAllocator(40)
    first, second, third, _ = take(allocator, 3), take(allocator, 6), take(allocator, 6), take(allocator, 1)
    allocator.release_all(first)
    allocator.release_all(third)
    assert allocator.allocate(None, 5) == third[0]
    assert allocator.allocate(None, 3) == first[0]
    assert allocator.allocate(None, 7) == 16
    assert allocator.references(second[0]) == 1


def test_without_a_gap_long_enough_a_run_starts_in_the_longest_one() -> None:
    allocator = BlockAllocator(12)
    blocks = take(allocator, 12)
    for block in (1, 2, 5, 6, 7, 10):
        allocator.release(blocks[block])
    assert allocator.allocate(None, 9) == 5
    assert allocator.claimed(5) == 2
    assert allocator.allocate(None, 9) == 1
    assert allocator.allocate(None, 9) == 10
    assert {allocator.allocate(), allocator.allocate(), allocator.allocate()} == {2, 6, 7}
    assert allocator.allocate() is None
    allocator.check()


def test_a_claim_gives_way_and_generous_claims_are_halved() -> None:
    allocator = BlockAllocator(64)
    starts = [allocator.allocate(None, 1000) for _ in range(4)]
    allocator.check()
    assert all(start is not None for start in starts)
    room = [allocator.claimed(start) + 1 for start in starts if start is not None]
    assert min(room) >= 8, f"a sequence was squeezed: {room}"
    assert sum(room) == 64
    rest = [allocator.allocate() for _ in range(60)]
    assert None not in rest, "claims never make an allocation fail"
    assert allocator.allocate() is None
    allocator.check()


def test_a_short_run_takes_only_the_end_of_a_claim() -> None:
    allocator = BlockAllocator(64)
    assert allocator.allocate(None, 64) == 0
    assert allocator.allocate(None, 4) == 60
    assert allocator.claimed(0) == 59


def test_the_claim_ends_with_the_last_reference_to_its_block() -> None:
    allocator = BlockAllocator(8)
    assert allocator.allocate(None, 6) == 0
    allocator.retain(0)
    allocator.release(0)
    assert allocator.claimed(0) == 5
    allocator.release(0)
    assert allocator.claimed(0) == 0
    assert_as_new(allocator)


def test_a_claim_moves_on_with_its_sequence() -> None:
    allocator = BlockAllocator(32)
    assert allocator.allocate(None, 10) == 0
    assert allocator.allocate(0) == 1
    assert allocator.claimed(0) == 0
    assert allocator.claimed(1) == 8
    assert allocator.allocate(None, 5) == 10
    assert allocator.allocate(1, 12) == 2, "a longer expectation reaches up to the neighbour"
    assert allocator.claimed(2) == 7


def test_a_claim_is_replaced_and_stops_at_the_next_block_in_use() -> None:
    allocator = BlockAllocator(10)
    tip, other = allocator.allocate(None, 6), allocator.allocate(None, 1)
    assert (tip, other) == (0, 6)
    allocator.claim(0, 2)
    assert allocator.claimed(0) == 2
    allocator.claim(0, 10**12)
    assert allocator.claimed(0) == 5
    allocator.claim(0, 0)
    assert allocator.claimed(0) == 0
    allocator.check()


def test_cached_blocks_are_evicted_when_none_is_free_the_oldest_and_the_tail_first() -> None:
    allocator = BlockAllocator(6)
    old, new = cache(allocator, "old", 2), cache(allocator, "new", 2)
    assert (allocator.cached, allocator.free, allocator.used) == (4, 6, 0)
    taken = [allocator.allocate() for _ in range(2)]
    assert allocator.cached == 4
    assert not {*old, *new} & {*taken}
    order = [old[1], old[0], new[1], new[0]]
    assert [allocator.allocate() for _ in range(4)] == order
    assert allocator.find([b"old0"]) == allocator.find([b"new0"]) == []
    assert allocator.allocate() is None
    allocator.check()


def test_use_makes_a_cached_block_the_last_to_be_evicted() -> None:
    allocator = BlockAllocator(3)
    a, b, c = cache(allocator, "a", 1) + cache(allocator, "b", 1) + cache(allocator, "c", 1)
    allocator.acquire(a)
    assert allocator.cached == 2
    allocator.release(a)
    assert [allocator.allocate() for _ in range(3)] == [b, c, a]


def test_eviction_never_takes_a_block_that_is_held() -> None:
    allocator = BlockAllocator(4)
    blocks = cache(allocator, "a", 4)
    allocator.acquire(blocks[0])
    allocator.acquire(blocks[0])
    allocator.release(blocks[0])
    taken = [allocator.allocate(None, 4) for _ in range(3)]
    assert allocator.allocate() is None
    assert blocks[0] not in taken
    assert allocator.find_one(b"a0") == blocks[0]
    allocator.make_room(4)
    assert allocator.find_one(b"a0") == blocks[0]
    allocator.check()


def test_a_run_makes_the_room_that_it_expects_and_no_more() -> None:
    allocator = BlockAllocator(4 * EVICTED_TOGETHER)
    for name in "abcd":
        cache(allocator, name, EVICTED_TOGETHER)
    assert allocator.allocate(None, 5) == EVICTED_TOGETHER - 5, "the end of the oldest sequence"
    assert allocator.cached == 4 * EVICTED_TOGETHER - 5
    assert allocator.allocate(EVICTED_TOGETHER - 5, 4) == EVICTED_TOGETHER - 4, "a claim needs no room again"
    assert allocator.cached == 4 * EVICTED_TOGETHER - 5
    assert allocator.allocate(None, 1000) is not None
    assert allocator.cached == 3 * EVICTED_TOGETHER - 5
    allocator.check()


def test_a_run_goes_on_where_the_block_behind_it_is_evicted() -> None:
    allocator = BlockAllocator(5)
    (first,) = take(allocator, 1)
    assert cache(allocator, "a", 4) == [1, 2, 3, 4]
    assert allocator.allocate(first, 4) == 1


def test_a_pool_full_of_cached_blocks_still_gives_long_runs() -> None:
    rng = random.Random(4)
    allocator = BlockAllocator(500)
    growing: list[tuple[int, list[int]]] = []
    counts: list[int] = []
    for number in range(400):
        while len(growing) < 6:
            length = rng.randrange(10, 40)
            growing.append((length, take(allocator, 1, length)))
        while max(len(blocks) - length for length, blocks in growing) < 0:
            length, blocks = rng.choice(growing)
            block = allocator.allocate(blocks[-1], length - len(blocks))
            assert block is not None
            blocks.append(block)
        length, blocks = growing.pop(next(i for i, (length, blocks) in enumerate(growing) if len(blocks) == length))
        for index, block in enumerate(blocks):
            allocator.publish(block, f"{number} {index}".encode())
        counts.append(len(runs(blocks)))
        allocator.release_all(blocks)
    assert sum(counts[50:]) / len(counts[50:]) < 4, "sequences of 25 blocks are scattered"
    assert allocator.cached > 250, "more was evicted than needed"


def test_the_index_finds_the_longest_prefix_and_takes_no_reference() -> None:
    allocator = BlockAllocator(8)
    blocks = cache(allocator, "a", 3)
    assert allocator.find([b"a0", b"a1", b"b2", b"a2"]) == blocks[:2]
    assert allocator.find([b"b0", b"a1"]) == allocator.find([]) == []
    assert allocator.find_one(b"a2") == blocks[2]
    assert allocator.find_one(b"b0") is None
    assert (allocator.used, allocator.cached) == (0, 3)
    for block in blocks:
        allocator.acquire(block)
        allocator.acquire(block)
        assert allocator.references(block) == 2
    assert (allocator.used, allocator.cached) == (3, 0)
    allocator.check()


def test_a_second_block_under_a_known_key_stays_private() -> None:
    allocator = BlockAllocator(4)
    first, second = take(allocator, 2)
    allocator.publish(first, b"a")
    allocator.publish(second, b"a")
    allocator.publish(first, b"a")
    assert allocator.find_one(b"a") == first
    assert allocator.published(first)
    assert not allocator.published(second)
    allocator.release_all([first, second])
    assert (allocator.cached, allocator.used) == (1, 0)
    allocator.check()


def test_a_forgotten_block_is_found_no_more_and_its_holder_keeps_it() -> None:
    allocator = BlockAllocator(4)
    held, cached = take(allocator, 2)
    allocator.publish(held, b"held")
    allocator.publish(cached, b"cached")
    allocator.release(cached)
    allocator.forget(held)
    allocator.forget(held)
    allocator.forget(cached)
    assert allocator.find_one(b"held") is allocator.find_one(b"cached") is None
    assert (allocator.used, allocator.cached) == (1, 0)
    allocator.check()
    allocator.release(held)
    assert_as_new(allocator)


def test_clear_drops_what_nobody_holds() -> None:
    allocator = BlockAllocator(6)
    cache(allocator, "a", 3)
    block = allocator.find_one(b"a0")
    assert block is not None
    allocator.acquire(block)
    allocator.clear()
    assert (allocator.used, allocator.cached) == (1, 0)
    assert allocator.find_one(b"a0") == block
    assert allocator.find_one(b"a1") is None
    allocator.release(block)
    allocator.clear()
    assert_as_new(allocator)


@pytest.mark.parametrize("state", ["free", "cached"])
def test_a_block_that_nobody_holds_is_neither_released_nor_retained_nor_published(state: str) -> None:
    allocator = BlockAllocator(2)
    block = cache(allocator, "a", 1)[0] if state == "cached" else 0
    for use in (allocator.release, allocator.retain, allocator.allocate):
        with pytest.raises(AssertionError):
            use(block)
    with pytest.raises(AssertionError):
        allocator.publish(block, b"a0")
    with pytest.raises(AssertionError):
        allocator.claim(block, 1)
    if state == "free":
        with pytest.raises(AssertionError):
            allocator.acquire(block)
    allocator.check()


def test_a_published_block_keeps_its_key() -> None:
    allocator = BlockAllocator(2)
    (block,) = take(allocator, 1)
    allocator.publish(block, b"a")
    with pytest.raises(AssertionError, match="another key"):
        allocator.publish(block, b"b")


def spoiled(allocator: BlockAllocator, kind: str) -> None:
    used, cached = allocator._references.index(1), next(iter(allocator._cached))
    match kind:
        case "leak":
            allocator._open &= allocator._open - 1
        case "free and used":
            allocator._open |= 1 << used
        case "free and cached":
            allocator._open |= 1 << cached
        case "negative":
            allocator._references[-1] = -1
        case "count":
            allocator._used += 1
        case "index":
            allocator._block_of[b"stray"] = cached
        case "cached without a key":
            del allocator._block_of[allocator._key_of.pop(cached)]
        case "claim":
            allocator._claims[used] += 1
        case "claim of nobody":
            allocator._claims[cached] = allocator._claims.pop(used)


KINDS = ["leak", "free and used", "free and cached", "negative", "count", "index", "cached without a key", "claim"]


@pytest.mark.parametrize("kind", [*KINDS, "claim of nobody"])
def test_check_sees(kind: str) -> None:
    allocator = BlockAllocator(16)
    cache(allocator, "a", 2)
    allocator.allocate(None, 4)
    allocator.check()
    spoiled(allocator, kind)
    with pytest.raises(AssertionError):
        allocator.check()


def test_after_10_000_short_requests_the_pool_is_as_at_the_start() -> None:
    rng = random.Random(1)
    allocator = BlockAllocator(64)
    running: list[list[int]] = []
    admitted = evicted = shared = 0
    while admitted < 10_000 or running:
        if admitted < 10_000 and (len(running) < 4 or rng.random() < 0.4):
            admitted += 1
            ids = [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
            keys = chain_keys(ids, 2, b"")
            blocks = allocator.find(keys)
            shared += bool(blocks)
            for block in blocks:
                allocator.acquire(block)
            known = len(blocks)
            for _ in range(rng.randrange(6)):
                cached = allocator.cached
                block_or_none = allocator.allocate(blocks[-1] if len(blocks) > known else None, rng.randrange(1, 8))
                evicted += allocator.cached < cached
                if block_or_none is not None:
                    blocks.append(block_or_none)
            for block, key in zip(blocks, keys, strict=False):
                allocator.publish(block, key)
            running.append(blocks)
        else:
            allocator.release_all(running.pop(rng.randrange(len(running))))
        if admitted % 500 == 0:
            allocator.check()
    assert min(evicted, shared) > 100, "the pool was never short, or nothing was shared"
    assert allocator.used == 0
    assert allocator.cached > 0
    allocator.clear()
    assert_as_new(allocator)


def plain_gaps(free: int) -> list[tuple[int, int]]:
    """(first, length) of each row of set bits, by looking at every bit."""
    return runs([bit for bit in range(free.bit_length()) if free >> bit & 1])


@settings(deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 45))
def test_gaps_are_those_found_bit_by_bit(free: int, length: int) -> None:
    gaps = plain_gaps(free)
    assert first_gap(free, length) == next((first for first, count in gaps if count >= length), None)
    assert longest_gap(free) == max(gaps, key=lambda gap: gap[1], default=(0, 0))


@settings(deadline=None)
@given(*[st.tuples(st.binary(max_size=10), st.lists(st.integers(0, 300), max_size=3))] * 2)
def test_different_inputs_give_different_keys(a: tuple[bytes, list[int]], b: tuple[bytes, list[int]]) -> None:
    assert (next_key(*a) == next_key(*b)) == (a == b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((b"", [1, 2]), (b"", [2, 1])),
        ((b"", [1]), (b"", [1, 0])),
        ((b"", [256]), (b"", [1])),
        ((b"", [2**31]), (b"", [0])),
        ((b"\0" * 8, []), (b"", [0])),
    ],
)
def test_near_inputs_give_different_keys(a: tuple[bytes, Sequence[int]], b: tuple[bytes, Sequence[int]]) -> None:
    assert next_key(*a) != next_key(*b)


def test_a_key_depends_on_everything_before_its_block_and_on_nothing_behind() -> None:
    ids = list(range(12))
    keys = chain_keys(ids, 4, b"root")
    assert chain_keys([*ids[:11], 99], 4, b"root")[:2] == keys[:2]
    assert not set(chain_keys([99, *ids[1:]], 4, b"root")) & set(keys)
    assert not set(chain_keys(ids, 4, b"other")) & set(keys)
