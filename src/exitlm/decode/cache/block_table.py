"""The KV blocks that one sequence holds of one group of cache entries, and the slots of its positions.

A group is all entries with the same attention window; each group has a table of its own. The table knows no tensors and
no other sequence. Position p lies in block number ``p // block_size`` of the sequence (its logical index), at slot
``block * block_size + p % block_size`` of the pool. The name follows PagedAttention (arXiv 2309.06180, section 4).

Leading blocks may be shared with other sequences. They are full and verified, and nothing is written to them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from exitlm.decode.cache.block_allocator import BlockAllocator


class BlockTable:
    """``blocks`` are those held now, in order of position; ``freed`` logical indices lie before the first of them."""

    def __init__(
        self, allocator: BlockAllocator, block_size: int, *, expected_length: int = 0, window: int | None = None
    ) -> None:
        """``expected_length``: positions that the sequence is expected to reach, a hint that keeps its blocks
        neighbours. ``window``: positions that are held at once, if leading blocks are freed."""
        self.allocator = allocator
        self.block_size = block_size
        self.blocks: list[int] = []
        self.freed = 0
        self._expected = -(-expected_length // block_size)
        self._ahead = None if window is None else -(-window // block_size) + 1
        self._first_own = 0  # logical index from which on this table allocated the blocks itself
        # Runs of neighbouring blocks: the first position of each, and the slot of that position.
        self._run_positions: list[int] = []
        self._run_slots: list[int] = []

    @property
    def end(self) -> int:
        """The position behind the last one that has a slot."""
        return (self.freed + len(self.blocks)) * self.block_size

    def ensure(self, length: int) -> bool:
        """Hold slots for the positions below ``length``; False, with nothing taken, when too few blocks are left."""
        missing = -(-length // self.block_size) - self.freed - len(self.blocks)
        if missing <= 0:
            return True
        if missing > self.allocator.free:
            return False
        self.allocator.make_room(missing)
        for left in range(missing, 0, -1):
            tip = self.blocks[-1] if self._may_follow() else None
            block = self.allocator.allocate(tip, max(left, self._growth()))
            assert block is not None
            self._append(block)
        return True

    def free_before(self, position: int) -> None:
        """Give back the blocks that lie wholly before ``position``: no later position sees them."""
        count = min(position // self.block_size - self.freed, len(self.blocks))
        if count <= 0:
            return
        if count == len(self.blocks):
            self._drop_claim()
        self.allocator.release_all(self.blocks[:count])
        del self.blocks[:count]
        self.freed += count
        start = self.freed * self.block_size
        gone = bisect_right(self._run_positions, start) - 1
        del self._run_positions[:gone], self._run_slots[:gone]

    def release(self) -> None:
        """Give back every block. The table is as new."""
        self._drop_claim()
        self.allocator.release_all(self.blocks)
        self.blocks = []
        self.freed = self._first_own = 0
        self._run_positions, self._run_slots = [], []

    def adopt(self, blocks: Sequence[int], first_index: int = 0) -> None:
        """Begin with shared blocks, which were acquired for this table and are given back by it. The first one has
        the logical index ``first_index``: a window needs only the last blocks of a prefix."""
        assert self.end == 0, "only a new table adopts a prefix"
        self.freed = first_index
        for block in blocks:
            self._append(block)
        self._first_own = first_index + len(blocks)

    def publish(self, index: int, key: bytes) -> None:
        """Enter the block with this logical index into the prefix index. All its positions must be verified and
        filled; none of them can be written again."""
        assert self.freed <= index < self.freed + len(self.blocks), f"the table holds no block {index}"
        self.allocator.publish(self.blocks[index - self.freed], key)

    def slots(self, start: int, count: int) -> list[tuple[int, int]]:
        """Runs (first slot, count) of neighbouring slots that cover the positions ``start`` to ``start + count - 1``,
        in order. The runs are kept up to date as blocks come and go: this takes time in proportion to the runs that
        are returned, whatever their length."""
        end = start + count
        assert self.freed * self.block_size <= start <= end <= self.end, "positions without a slot"
        covered: list[tuple[int, int]] = []
        run = bisect_right(self._run_positions, start) - 1
        while start < end:
            first, slot = self._run_positions[run], self._run_slots[run]
            run += 1
            stop = min(self._run_positions[run], end) if run < len(self._run_positions) else end
            covered.append((slot + start - first, stop - start))
            start = stop
        return covered

    def _append(self, block: int) -> None:
        if not self.blocks or block != self.blocks[-1] + 1:
            self._run_positions.append(self.end)
            self._run_slots.append(block * self.block_size)
        self.blocks.append(block)

    def _growth(self) -> int:
        """Blocks that are expected to follow those held now."""
        growth = self._expected - self.freed - len(self.blocks)
        return growth if self._ahead is None else min(growth, self._ahead)

    def _owns_tip(self) -> bool:
        return bool(self.blocks) and self.freed + len(self.blocks) > self._first_own

    def _may_follow(self) -> bool:
        """Whether the block behind the last one is this table's to take, not that of the sequence it shares with."""
        return self._owns_tip() or bool(self.blocks and not self.allocator.claimed(self.blocks[-1]))

    def _drop_claim(self) -> None:
        """A block that is still shared would keep the claim."""
        if self._owns_tip():
            self.allocator.claim(self.blocks[-1], 0)
