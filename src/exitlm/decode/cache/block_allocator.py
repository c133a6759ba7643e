"""Numbered KV blocks: who holds them, which are free, and which hold a prefix that the next prompt may share.

This is bookkeeping alone. It knows no tensors (the pool holds those) and no requests (a
:class:`~exitlm.decode.cache.block_table.BlockTable` holds the blocks of one). Blocks with reference counts follow
PagedAttention (arXiv 2309.06180, section 4). Two things are added. Neighbouring numbers are preferred, because keys in
one contiguous run are read without a copy. And a full block can be published under a hash of all ids up to its end, so
that it outlives its sequence until the memory is needed.

A block is in exactly one of three states: *free*, *used* (its count is above 0), or *cached* (nobody holds it, but the
prefix index still finds it). Free blocks may be *claimed*: the last block of a growing sequence reserves the blocks
that follow it. A claim is a hint about where to start other sequences and never makes an allocation fail.

Sets of blocks are the bits of one Python integer: the first gap of n blocks is found by log n shifts, however
fragmented the pool is.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

# A new run gets room for this many blocks, if it is expected to need it, at the cost of cached ones. With none evicted
# before the last block is taken, a pool full of cached blocks would give runs of one block each.
EVICTED_TOGETHER = 32


class BlockAllocator:
    """Reference counts, claims and the prefix index of ``num_blocks`` blocks. Not thread safe."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._used = 0
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._open = _span(0, num_blocks)  # free and not claimed
        self._claims: dict[int, int] = {}  # a used block -> end of the free blocks behind it that it claims

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self._used

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and the prefix index still finds."""
        return len(self._cached)

    @property
    def free(self) -> int:
        """Blocks that can be allocated: the free ones, and the cached ones, which are evicted for it."""
        return self.num_blocks - self._used

    def references(self, block: int) -> int:
        """How often ``block`` is held."""
        return self._references[block]

    def allocate(self, after: int | None = None, expected: int = 1) -> int | None:
        """Take one block, with a count of 1; None when every block is used.

        ``after`` is the last block of the sequence. If the block behind it is free, it is taken; so while it is
        claimed, only the sequence that claimed it may name it, not one that shares it. Otherwise a new run starts,
        where ``expected`` blocks in a row (this one included) are free and unclaimed, at the lowest such number:
        memory that was touched before is reused. Without such a gap it starts in the longest one, or in the second
        half of the longest claim if that has more room. The ``expected - 1`` blocks that follow are claimed, as far as
        they are free; an older claim behind ``after`` stays if it reaches further.

        Cached blocks are evicted, least recently used first, when a new run would have less room than ``expected``,
        or :data:`EVICTED_TOGETHER` if that is less: as many as that, once per run.
        """
        assert expected > 0
        assert after is None or self._references[after] > 0, f"block {after} is not in use"
        if self._used == self.num_blocks:
            return None
        wanted = min(expected, EVICTED_TOGETHER)
        if not self._follows(after) and self._place(expected)[1] < wanted:
            self._evict(wanted)
        if after is not None and self._follows(after):
            block = after + 1
            claimed = self.claimed(after) - 1
            self.claim(after, 0)
        else:
            block, _, tip = self._place(expected)
            claimed = 0
            if tip is not None:
                self.claim(tip, block - tip - 1)
        self._open ^= 1 << block
        self._references[block] = 1
        self._used += 1
        self.claim(block, max(expected - 1, claimed))
        return block

    def make_room(self, count: int) -> None:
        """Evict cached blocks, least recently used first, until ``count`` blocks are free or none is cached."""
        self._evict(count - (self.num_blocks - self._used - len(self._cached)))

    def claim(self, block: int, count: int) -> None:
        """Reserve the next ``count`` blocks behind ``block``, as far as they are free and unclaimed, for the sequence
        that ends with it. Replaces the claim that it had; 0 drops it. It ends with the last reference to ``block``."""
        stop = self._claims.pop(block, None)
        if stop is not None:
            self._open |= _span(block + 1, stop)
        if count <= 0:
            return
        assert self._references[block] > 0, f"block {block} is not in use"
        ahead = self._open >> (block + 1) & _span(0, min(count, self.num_blocks))
        length = _lowest(~ahead)
        if length:
            self._claims[block] = block + 1 + length
            self._open ^= _span(block + 1, block + 1 + length)

    def claimed(self, block: int) -> int:
        """Free blocks that are reserved behind ``block``."""
        return self._claims.get(block, block + 1) - block - 1

    def retain(self, block: int) -> None:
        """Hold a used block once more."""
        assert self._references[block] > 0, f"block {block} is not in use"
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Let go of a block once. With the last reference it becomes cached if it is published, else free."""
        assert self._references[block] > 0, f"block {block} is released more often than it was taken"
        self._references[block] -= 1
        if self._references[block]:
            return
        self._used -= 1
        self.claim(block, 0)
        if block in self._key_of:
            self._cached[block] = None
        else:
            self._open |= 1 << block

    def release_all(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, the last one first: a prefix is evicted from its tail, so that the rest of it
        can still be found."""
        for block in reversed(blocks):
            self.release(block)

    def publish(self, block: int, key: bytes) -> None:
        """Enter a used block into the prefix index. Its contents must be final: it is never written again.

        Where another block has this key already nothing changes, and the caller keeps its own block.
        """
        assert self._references[block] > 0, f"block {block} is not in use"
        assert self._key_of.get(block, key) == key, f"block {block} is published under another key"
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def published(self, block: int) -> bool:
        """Whether the prefix index finds ``block``."""
        return block in self._key_of

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest prefix of ``keys`` that is there. No reference is taken: the next allocation may
        evict what was found, so :meth:`acquire` it first."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def find_one(self, key: bytes) -> int | None:
        """The block published under ``key``. No reference is taken."""
        return self._block_of.get(key)

    def acquire(self, block: int) -> None:
        """Hold a block that the index has found, cached or used."""
        if block in self._cached:
            del self._cached[block]
            self._references[block] = 1
            self._used += 1
        else:
            self.retain(block)

    def forget(self, block: int) -> None:
        """Take a block out of the prefix index, as when its contents are damaged. Who holds it keeps it; a cached one
        becomes free; one that is not published stays as it is."""
        key = self._key_of.pop(block, None)
        if key is None:
            return
        del self._block_of[key]
        if block in self._cached:
            del self._cached[block]
            self._open |= 1 << block

    def clear(self) -> None:
        """Evict all cached blocks. Used ones stay in the index."""
        self._evict(len(self._cached))

    def check(self) -> None:
        """Assert every invariant. Takes time in proportion to ``num_blocks``: for tests."""
        used = {block for block, count in enumerate(self._references) if count}
        cached = set(self._cached)
        free = {block for block in range(self.num_blocks) if self._open >> block & 1}
        assert min(self._references) >= 0, "a negative reference count"
        assert self._open >> self.num_blocks == 0, "a free block beyond the pool"
        for tip, stop in self._claims.items():
            claimed = set(range(tip + 1, stop))
            assert claimed, "an empty claim"
            assert tip in used, "a claim of nobody"
            assert not claimed & free, "two claims overlap, or a claimed block counts as unclaimed"
            free |= claimed
        assert len(used) == self._used, "used blocks are miscounted"
        assert len(used) + len(cached) + len(free) == self.num_blocks, "a block in two states, or in none"
        assert used | cached | free == set(range(self.num_blocks)), "a lost block"
        assert {key: block for block, key in self._key_of.items()} == self._block_of, "the index is not a bijection"
        assert len(self._key_of) == len(self._block_of), "the index is not a bijection"
        assert cached <= set(self._key_of), "a cached block without a key"
        assert set(self._key_of) <= used | cached, "a free block in the index"

    def _follows(self, after: int | None) -> bool:
        """Whether the block behind ``after`` is free."""
        if after is None or after + 1 == self.num_blocks:
            return False
        return not self._references[after + 1] and after + 1 not in self._cached

    def _place(self, expected: int) -> tuple[int, int, int | None]:
        """Where a new run would start, the room that it has there (up to ``expected`` blocks; 0 if none is free), and
        the block whose claim would have to give way."""
        start = first_gap(self._open, expected)
        if start is not None:
            return start, expected, None
        start, length = longest_gap(self._open)
        if self._claims:
            tip, stop = max(self._claims.items(), key=lambda claim: claim[1] - claim[0])
            middle = max(stop - expected, (tip + 1 + stop) // 2)
            if stop - middle > length:
                return middle, stop - middle, tip
        return start, length, None

    def _evict(self, count: int) -> None:
        for _ in range(min(count, len(self._cached))):
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            self._open |= 1 << block


def first_gap(free: int, length: int) -> int | None:
    """The lowest number of ``length`` bits in a row that are set in ``free``."""
    known = 1  # a set bit is the start of this many set bits
    while free and known < length:
        step = min(known, length - known)
        free &= free >> step
        known += step
    return _lowest(free) if free else None


def longest_gap(free: int) -> tuple[int, int]:
    """The first bit and the length of the longest row of bits set in ``free``, the lowest of equals; (0, 0) if none."""
    if not free:
        return 0, 0
    known = 1
    while longer := free & free >> known:
        free, known = longer, 2 * known
    step = known // 2
    while step:
        if longer := free & free >> step:
            free, known = longer, known + step
        step //= 2
    return _lowest(free), known


def next_key(previous: bytes, ids: Sequence[int]) -> bytes:
    """Key of a full block with these ``ids``, behind the block whose key is ``previous``: 32 bytes of SHA-256.

    The length of ``previous`` is hashed too and each id takes 8 bytes, so different inputs give different messages.
    """
    return hashlib.sha256(len(previous).to_bytes(8, "little") + previous + array("q", ids).tobytes()).digest()


def _span(start: int, stop: int) -> int:
    return (1 << stop) - (1 << start)


def _lowest(bits: int) -> int:
    """The number of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1
