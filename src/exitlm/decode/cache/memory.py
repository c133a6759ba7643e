"""What sequences hold of the pools: blocks for keys and values, and slots for hidden states that wait.

Blocks are given out as positions are computed, shared where texts begin alike, and given back when a text ends, waits
again, or has left them behind its windows. Knows nothing of passes or requests.
"""

from __future__ import annotations

from exitlm.decode.arrival import Runs
from exitlm.decode.cache.block_allocator import next_key
from exitlm.decode.cache.block_table import BlockTable
from exitlm.decode.cache.hidden_pool import HiddenPool
from exitlm.decode.options import EngineConfig
from exitlm.decode.sequence import Sequence

MAX_PENDING = 64  # positions of a sequence that wait at most, if its request sets no lower cap; no token depends on it
_EXPECTED_TOKENS = 512  # blocks beside each other are kept free for as many
_ROOM_TO_COPY = 4  # shared blocks are copied where so many times as many are free


class Memory:
    """The pools of one runner, and who holds what."""

    def __init__(self, runner: Runs, options: EngineConfig) -> None:
        self.pool, self.options = runner.pool, options
        self.hidden = HiddenPool(runner.fused.config.hidden_size, runner.fused.dtype, runner.fused.device)
        self.windows = [group.window for group in self.pool.groups]
        self._copies, self._segments = runner.reads_runs, runner.segments

    def open(self, sequence: Sequence) -> None:
        """Tables for a sequence that begins, with the blocks of a text that began alike."""
        expected = sequence.prompt_length + min(sequence.output.max_new_tokens, _EXPECTED_TOKENS)
        sequence.tables = [
            BlockTable(allocator, self.options.block_size, expected_length=expected, window=self._held(window))
            for allocator, window in zip(self.pool.allocators, self.windows, strict=True)
        ]
        if self.options.prefix_sharing and not sequence.wants_prompt_scores:
            self._adopt(sequence)

    def _held(self, window: int | None) -> int | None:
        """Positions that a sequence holds of a group at once: a window, the rows of a pass, and pending ones."""
        return None if window is None else window + self.options.prefill_chunk + MAX_PENDING

    def fits(self, sequence: Sequence) -> bool:
        """Whether there are blocks for all tokens that a sequence has, and one more."""
        needed = len(sequence.ids) + 1
        for allocator, window in zip(self.pool.allocators, self.windows, strict=True):
            held = self._held(window)
            if -(-(needed if held is None else min(needed, held)) // self.options.block_size) > allocator.free:
                return False
        return True

    @staticmethod
    def ensure(sequence: Sequence, rows: int) -> bool:
        """Blocks for the next ``rows`` positions of a sequence; False where there are none."""
        return all(table.ensure(sequence.sent[0] + rows) for table in sequence.tables)

    def release(self, sequence: Sequence) -> None:
        """Take all that a sequence holds."""
        for table in sequence.tables:
            table.release()
        self.hidden.give_back(sequence.slots)
        sequence.tables, sequence.slots = [], []
        sequence.epoch += 1  # what is on its way is in vain

    def spoil(self, sequence: Sequence) -> None:
        """What a sequence left may not be numbers: it is neither shared nor left to padded reads."""
        for group, table in enumerate(sequence.tables):
            for block in table.blocks:
                self.pool.allocators[group].forget(block)
            self.pool.clear(group, [b for b in table.blocks if self.pool.allocators[group].references(b) == 1])

    def roll_back(self, sequence: Sequence) -> None:
        """Forget what was computed for refused drafts; all positions but the newest have keys at every depth then."""
        length = len(sequence.ids) - 1
        sequence.set_filled([min(filled, length) for filled in sequence.filled])
        sequence.deep_end = 0
        kept = sequence.pending
        self.hidden.give_back(sequence.slots[kept:])
        del sequence.slots[kept:]

    def leave_windows(self, sequence: Sequence) -> None:
        """Give back blocks that no row can see any more, by the deepest segment that reads them."""
        for group, table in zip(self.pool.groups, sequence.tables, strict=True):
            if group.window is not None:
                deepest = min(sequence.filled[group.segment], len(sequence.ids) - 1)  # drafts may be rolled back
                table.free_before(max(0, deepest - group.window + 1))

    def _block_key(self, sequence: Sequence, index: int) -> bytes:
        """The key of a sequence's full block: of all its ids so far, and of its rotations."""
        keys, size = sequence.block_keys, self.options.block_size
        while len(keys) <= index:
            previous = keys[-1] if keys else (b"stretched" if sequence.stretched else b"")
            keys.append(next_key(previous, sequence.ids[len(keys) * size : (len(keys) + 1) * size]))
        return keys[index]

    def publish(self, sequence: Sequence) -> None:
        """Let others share the blocks whose positions are all verified, and filled in every entry."""
        if not self.options.prefix_sharing:
            return
        full = min(sequence.filled[-1], len(sequence.ids)) // self.options.block_size
        for index in range(sequence.published, full):
            key = self._block_key(sequence, index)
            for table in sequence.tables:
                if index >= table.freed:
                    table.publish(index, key)
        sequence.published = max(sequence.published, full)

    def _adopt(self, sequence: Sequence) -> None:
        """Begin with the blocks of a text that began alike. A windowed group needs only those in its last window.

        A runner that reads a run of neighbouring blocks faster than scattered ones gets a copy beside the blocks to
        come, while there is room: copying is once, and reading is in every pass.
        """
        size = self.options.block_size
        last = sequence.prefill_end - (sequence.prefill_end == len(sequence.ids))  # the newest token always runs
        keys = [self._block_key(sequence, index) for index in range(last // size)]
        count = len(keys)
        for allocator, window in zip(self.pool.allocators, self.windows, strict=True):
            if window is None:
                count = min(count, len(allocator.find(keys[:count])))
        while count and not all(
            all(allocator.find_one(key) is not None for key in keys[self._needed_from(window, count) : count])
            for allocator, window in zip(self.pool.allocators, self.windows, strict=True)
        ):
            count -= 1
        if not count:
            return
        for group, table in enumerate(sequence.tables):
            begin = self._needed_from(self.windows[group], count)
            found = [table.allocator.find_one(key) for key in keys[begin:count]]
            blocks = [block for block in found if block is not None]
            for block in blocks:
                table.allocator.acquire(block)
            room = table.allocator.free - table.allocator.cached
            if self._copies and not begin and room > _ROOM_TO_COPY * count:
                table.ensure(count * size)
                self.pool.copy(group, blocks, table.blocks)
                table.allocator.release_all(blocks)
            else:
                table.adopt(blocks, begin)
        sequence.set_filled([count * size] * self._segments)
        sequence.published = count
        if not sequence.tally.preemptions:  # else they may be its own
            sequence.tally.shared += count * size

    def _needed_from(self, window: int | None, count: int) -> int:
        """The first of ``count`` blocks that the position behind them sees."""
        if window is None:
            return 0
        return max(0, count * self.options.block_size - window + 1) // self.options.block_size
