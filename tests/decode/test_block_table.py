import itertools
import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from exitlm.decode.cache.block_allocator import BlockAllocator
from exitlm.decode.cache.block_table import BlockTable
from tests.decode.blocks import chain_keys, runs

BLOCK = 3
CLAIMS = st.sampled_from([0, 10, 20, 60])
INDEX = st.integers(0, 99)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=8)


@dataclass
class Written:
    """A sequence as the model sees it: the ids whose keys it wrote, and how many of them can't be rolled back."""

    table: BlockTable
    ids: list[int]
    verified: int
    window: int | None

    @property
    def first_seen(self) -> int:
        """The first position that the next verified one looks at."""
        return 0 if self.window is None else max(0, self.verified - self.window + 1)


class Blocks(RuleBasedStateMachine):
    """Sequences over {0, 1} write to a memory of slots; each slot must keep what its sequence, or the sequence that
    published it, wrote there: all ids up to the position."""

    @initialize(num_blocks=st.integers(1, 24))
    def start(self, num_blocks: int) -> None:
        self.allocator = BlockAllocator(num_blocks)
        self.memory: dict[int, tuple[int, ...]] = {}
        self.running: list[Written] = []
        self.shared: set[int] = set()  # blocks that were found in the index by a running sequence

    def ensure(self, sequence: Written, length: int) -> bool:
        """``table.ensure`` with what must hold before and after."""
        allocator, table = self.allocator, sequence.table
        cached, before = list(allocator._cached), (allocator.used, allocator.cached, list(table.blocks))
        missing = -(-length // BLOCK) * BLOCK - table.end
        possible = missing <= allocator.free * BLOCK
        assert table.ensure(length) == possible
        if not possible:
            assert (allocator.used, allocator.cached, table.blocks) == before, "something was taken"
        left = list(allocator._cached)
        assert left == cached[len(cached) - len(left) :], "not the least recently used was evicted"
        return possible

    def write(self, sequence: Written, tokens: list[int]) -> bool:
        first, table = len(sequence.ids), sequence.table
        if not self.ensure(sequence, first + len(tokens)):
            return False
        sequence.ids += tokens
        slots = [slot + i for slot, count in table.slots(first, len(tokens)) for i in range(count)]
        for position, slot in zip(range(first, len(sequence.ids)), slots, strict=True):
            block = slot // BLOCK
            assert self.allocator.references(block) == 1, "written to a block that another one holds"
            assert not self.allocator.published(block), "written to a block that the index finds"
            self.memory[slot] = tuple(sequence.ids[: position + 1])
        return True

    @rule(
        prompt=TOKENS, again=TOKENS, expected=CLAIMS, window=st.sampled_from([None, None, 1, 4, 7]), hit=st.booleans()
    )
    def add(self, prompt: list[int], again: list[int], expected: int, window: int | None, hit: bool) -> None:
        prompt = prompt + again
        table = BlockTable(self.allocator, BLOCK, expected_length=expected, window=window)
        known = self.adopt(table, chain_keys(prompt[:-1], BLOCK, b""), window) if hit else 0
        sequence = Written(table, prompt[:known], known, window)
        if self.write(sequence, prompt[known:]):
            self.running.append(sequence)
        else:
            table.release()

    def adopt(self, table: BlockTable, keys: list[bytes], window: int | None) -> int:
        """Take the longest prefix of which the index still has every block that is seen; return its length."""
        if window is None:
            first, found = 0, self.allocator.find(keys)
        else:
            for count in range(len(keys), -1, -1):
                first = max(0, count * BLOCK - window + 1) // BLOCK
                blocks = [self.allocator.find_one(key) for key in keys[first:count]]
                if None not in blocks:
                    break
            found = [block for block in blocks if block is not None]
        for block in found:
            self.allocator.acquire(block)
        self.shared |= set(found)
        table.adopt(found, first)
        return (first + len(found)) * BLOCK

    @precondition(lambda self: self.running)
    @rule(index=INDEX, tokens=TOKENS)
    def extend(self, index: int, tokens: list[int]) -> None:
        self.write(self.running[index % len(self.running)], tokens)

    @precondition(lambda self: self.running)
    @rule(index=INDEX, count=st.integers(1, 9))
    def verify(self, index: int, count: int) -> None:
        sequence = self.running[index % len(self.running)]
        sequence.verified = min(sequence.verified + count, len(sequence.ids))

    @precondition(lambda self: self.running)
    @rule(index=INDEX, count=st.integers(1, 9))
    def roll_back(self, index: int, count: int) -> None:
        """Its blocks stay, and are written again."""
        sequence = self.running[index % len(self.running)]
        del sequence.ids[max(sequence.verified, len(sequence.ids) - count) :]

    @precondition(lambda self: self.running)
    @rule(index=INDEX)
    def free_before(self, index: int) -> None:
        sequence = self.running[index % len(self.running)]
        sequence.table.free_before(sequence.first_seen)
        assert sequence.table.freed >= sequence.first_seen // BLOCK, "a block before the window was kept"

    @precondition(lambda self: self.running)
    @rule(index=INDEX)
    def publish(self, index: int) -> None:
        sequence = self.running[index % len(self.running)]
        keys = chain_keys(sequence.ids[: sequence.verified], BLOCK, b"")
        for block in range(sequence.table.freed, len(keys)):
            sequence.table.publish(block, keys[block])
            assert self.allocator.find_one(keys[block]) is not None

    @precondition(lambda self: self.running)
    @rule(index=INDEX)
    def release(self, index: int) -> None:
        self.running.pop(index % len(self.running)).table.release()

    @precondition(lambda self: self.running)
    @rule(index=INDEX)
    def preempt(self, index: int) -> None:
        """The same table takes a prefix again, and the sequence waits if there is no room."""
        sequence = self.running.pop(index % len(self.running))
        sequence.table.release()
        ids, sequence.ids = sequence.ids[: sequence.verified], []
        known = self.adopt(sequence.table, chain_keys(ids[:-1], BLOCK, b""), sequence.window)
        sequence.ids, sequence.verified = ids[:known], known
        if self.write(sequence, ids[known:]):
            self.running.append(sequence)
        else:
            sequence.table.release()

    @rule(index=INDEX)
    def forget(self, index: int) -> None:
        self.allocator.forget(index % self.allocator.num_blocks)

    @rule()
    def clear(self) -> None:
        self.allocator.clear()
        assert self.allocator.cached == 0

    @invariant()
    def blocks_have_the_right_holders(self) -> None:
        self.allocator.check()
        held = [block for sequence in self.running for block in sequence.table.blocks]
        counts = [held.count(block) for block in range(self.allocator.num_blocks)]
        assert [self.allocator.references(block) for block in range(self.allocator.num_blocks)] == counts
        self.shared &= set(held)
        assert all(count < 2 or block in self.shared for block, count in enumerate(counts)), "two own one block"

    @invariant()
    def slots_keep_what_was_written(self) -> None:
        for sequence in self.running:
            table = sequence.table
            first = max(table.freed * BLOCK, sequence.first_seen)
            covered = table.slots(first, len(sequence.ids) - first)
            slots = [slot + i for slot, count in covered for i in range(count)]
            assert all(a + n != b for (a, n), (b, _) in itertools.pairwise(covered)), "a run cut in two"
            expected = [tuple(sequence.ids[: position + 1]) for position in range(first, len(sequence.ids))]
            assert [self.memory[slot] for slot in slots] == expected

    def teardown(self) -> None:
        for sequence in self.running:
            sequence.table.release()
        allocator = self.allocator
        allocator.clear()
        allocator.check()
        assert (allocator.used, allocator.cached, allocator.free) == (0, 0, allocator.num_blocks)
        assert not allocator._claims
        assert not allocator._key_of


@pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_histories_leak_free_twice_and_alias_nothing(examples: int) -> None:
    run_state_machine_as_test(
        Blocks,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, derandomize=True, database=None
        ),
    )


@settings(deadline=None)
@given(st.permutations(range(8)), st.integers(1, 5), st.integers(0, 3), st.data())
def test_slots_are_those_of_each_position_in_order(
    blocks: list[int], block_size: int, first_index: int, data: st.DataObject
) -> None:
    table = BlockTable(BlockAllocator(8), block_size)
    table.adopt(blocks, first_index)
    start = data.draw(st.integers(first_index * block_size, table.end))
    count = data.draw(st.integers(0, table.end - start))
    slots = [slot + i for slot, run in table.slots(start, count) for i in range(run)]
    positions = range(start, start + count)
    assert slots == [blocks[p // block_size - first_index] * block_size + p % block_size for p in positions]


@pytest.mark.parametrize("expected_length", [0, 100, 256, 10**9])
def test_a_lone_sequence_is_always_one_run(expected_length: int) -> None:
    table = BlockTable(BlockAllocator(64), 4, expected_length=expected_length)
    rng = random.Random(2)
    length = 0
    while length < 256:
        length = min(256, length + rng.randrange(1, 12))
        assert table.ensure(length)
        assert table.slots(0, length) == [(0, length)]
        length -= rng.randrange(min(6, length))
    assert not table.ensure(257)


def test_sequences_with_known_lengths_stay_one_run_each_while_drafts_are_rolled_back() -> None:
    rng = random.Random(3)
    lengths = [rng.randrange(1, 200) for _ in range(8)]
    allocator = BlockAllocator(sum(-(-length // 4) for length in lengths))
    tables = [BlockTable(allocator, 4, expected_length=length) for length in lengths]
    for table in tables:
        assert table.ensure(1)
    done = [1] * 8
    while done != lengths:
        for i in rng.sample(range(8), 8):
            drafted = min(lengths[i], done[i] + rng.randrange(12))
            assert tables[i].ensure(drafted)
            done[i] = min(drafted, done[i] + rng.randrange(3))
            assert len(tables[i].slots(0, done[i])) == 1
            allocator.check()
    assert allocator.free == 0


def published(allocator: BlockAllocator, count: int, **settings: int) -> BlockTable:
    """A table of ``count`` blocks of 4 that the index finds as 0, 1, ..."""
    table = BlockTable(allocator, 4, **settings)
    assert table.ensure(4 * count)
    for index in range(count):
        table.publish(index, str(index).encode())
    return table


def hit(allocator: BlockAllocator, count: int, **settings: int) -> BlockTable:
    """A table that begins with the first ``count`` blocks of :func:`published`."""
    table = BlockTable(allocator, 4, **settings)
    blocks = allocator.find([str(index).encode() for index in range(count)])
    for block in blocks:
        allocator.acquire(block)
    table.adopt(blocks)
    return table


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("shared", [1, 3, 5])
def test_a_prefix_hit_is_two_runs_at_most_and_leaves_its_owner_one(shared: int, released: bool) -> None:
    allocator = BlockAllocator(64)
    owner = published(allocator, 5, expected_length=80)
    if released:
        owner.release()
    sharers = [hit(allocator, shared, expected_length=80) for _ in range(2)]
    for length in range(20, 80):
        for table in sharers if released else [*sharers, owner]:
            assert table.ensure(length)
            assert len(table.slots(0, length)) <= (1 if table is owner else 2)
    assert [table.blocks[:shared] for table in sharers] == [sharers[0].blocks[:shared]] * 2


def leave(table: BlockTable, how: str) -> None:
    """The table holds its last block no more."""
    match how:
        case "release":
            table.release()
        case "free_before":
            table.free_before(16)


@pytest.mark.parametrize("how", ["release", "free_before"])
def test_an_owner_that_leaves_takes_its_claim_from_a_block_that_is_still_shared(how: str) -> None:
    allocator = BlockAllocator(32)
    before = BlockTable(allocator, 4)
    assert before.ensure(16)
    owner = published(allocator, 4, expected_length=64)
    table = hit(allocator, 4, expected_length=24)
    before.release()
    assert allocator.claimed(owner.blocks[-1]) == 12
    leave(owner, how)
    assert allocator.claimed(table.blocks[-1]) == 0
    assert table.ensure(24)
    assert runs(table.blocks) == [(4, 6)], "the room behind the shared prefix is free again"


def test_a_prompt_evicts_for_all_of_its_blocks_at_once() -> None:
    allocator = BlockAllocator(200)
    published(allocator, 150).release()
    held, table = BlockTable(allocator, 4), BlockTable(allocator, 4)
    assert held.ensure(200)
    assert table.ensure(400)
    assert runs(table.blocks) == [(50, 100)]
    assert allocator.cached == 50


def test_a_window_claims_no_more_than_it_holds_at_once() -> None:
    allocator = BlockAllocator(64)
    table = BlockTable(allocator, 4, expected_length=2000, window=20)
    for length in range(1, 100):
        assert table.ensure(length)
        assert allocator.claimed(table.blocks[-1]) == 5


def test_ensure_takes_all_or_nothing_and_evicts_for_it() -> None:
    allocator = BlockAllocator(6)
    published(allocator, 3).release()
    held, table = BlockTable(allocator, 4), BlockTable(allocator, 4)
    assert held.ensure(5)
    assert not table.ensure(17)
    assert (allocator.free, allocator.cached, table.blocks) == (4, 3, [])
    assert table.ensure(16)
    assert (allocator.free, allocator.cached) == (0, 0)
    assert held.ensure(8)
    assert not held.ensure(9)


def test_a_released_sequence_is_evicted_from_its_tail() -> None:
    allocator = BlockAllocator(4)
    published(allocator, 4).release()
    table = BlockTable(allocator, 4)
    for left in (3, 2, 1, 0):
        assert table.ensure(table.end + 1)
        assert len(allocator.find([b"0", b"1", b"2", b"3"])) == left


def test_a_window_holds_few_blocks_in_few_runs() -> None:
    allocator = BlockAllocator(64)
    tables = [BlockTable(allocator, 4, expected_length=2000, window=20) for _ in range(4)]
    several = 0
    for length in range(1, 2000):
        for table in tables:
            assert table.ensure(length)
            table.free_before(length - 20)
            assert len(table.blocks) <= 6
            first = max(0, length - 20)
            assert table.freed == first // 4
            several += len(table.slots(first, length - first)) > 1
            assert len(table.slots(first, length - first)) <= 2
    allocator.check()
    assert several < 0.5 * 4 * 2000, "more often scattered than not"
    for table in tables:
        table.release()
        assert table.ensure(4)
        assert table.freed == 0
        table.release()
    assert allocator.free == 64


def test_positions_that_were_freed_have_no_slots_and_a_prefix_comes_first() -> None:
    table = published(BlockAllocator(16), 2)
    table.free_before(4)
    assert (table.freed, table.end) == (1, 8)
    with pytest.raises(AssertionError, match="without a slot"):
        table.slots(3, 1)
    with pytest.raises(AssertionError, match="new table"):
        table.adopt([])


def test_slots_and_keys_of_blocks_that_are_not_held_are_refused() -> None:
    table = BlockTable(BlockAllocator(16), 4)
    assert table.ensure(6)
    assert table.slots(5, 3) == [(5, 3)]
    with pytest.raises(AssertionError, match="without a slot"):
        table.slots(5, 4)
    with pytest.raises(AssertionError, match="no block 2"):
        table.publish(2, b"key")
