"""Sequences that are driven by hand over a runner: rows go from boundary to boundary, wait there, and are rolled back.

Not a test. It stands where the engine stands, without requests, rules or texts, so that tests of passes can leave rows
anywhere and look at every key that they wrote.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from exitlm.decode.batch import Batch, Part
from exitlm.decode.cache.block_table import BlockTable
from exitlm.decode.kernels.fused import FusedModel
from exitlm.decode.kernels.runner import Arrived, Runner
from exitlm.decode.options import EngineConfig

BLOCK_SIZE = 8
MAX_ROLLBACK = 4
"""How far a sequence that gives blocks back can be rolled back behind what it had."""


def make_runner(fused: FusedModel, positions: int = 1024, block_size: int = BLOCK_SIZE) -> Runner:
    """A runner whose pool holds at least this many positions, in small blocks."""
    config, itemsize = fused.config, fused.dtype.itemsize
    blocks = -(-positions // block_size)
    size = 2 * config.num_key_value_heads * config.head_dim * itemsize
    return Runner(
        fused, EngineConfig(block_size=block_size, kv_bytes=len(fused.entries()) * blocks * block_size * size)
    )


class Driver:
    """One sequence. ``filled[s]`` positions have passed segment s; ``held[b]`` are the rows that wait at boundary b."""

    def __init__(self, runner: Runner, *, scatter: int = 0, total: int = 0, leave_windows: bool = False) -> None:
        """``scatter``: after so many blocks the next one is not their neighbour (0: never). ``total``: the length of
        the text, which decides longrope's rotations. ``leave_windows``: give back blocks that no row will see."""
        self.runner, self.scatter, self.leave_windows = runner, scatter, leave_windows
        original = runner.fused.original_context
        self.stretched = original is not None and total > original
        pool = runner.pool
        self.tables = [BlockTable(allocator, pool.block_size) for allocator in pool.allocators]
        self.length = self.floor = 0  # no rollback goes below the floor
        self.filled = [0] * runner.segments
        hidden_0D = torch.zeros(
            0, runner.fused.config.hidden_size, dtype=runner.fused.dtype, device=runner.fused.device
        )
        self.held = [hidden_0D] * runner.segments
        self.obstacles: list[list[int]] = [[] for _ in self.tables]

    @property
    def pending(self) -> int:
        """Positions that have entered and not reached the end."""
        return self.length - self.filled[-1]

    def enter(self, tokens: Sequence[int]) -> None:
        """New rows that wait at boundary 0."""
        if tokens:
            self.length += len(tokens)
            self._reserve()
            self.held[0] = torch.cat([self.held[0], self.runner.embed(tokens)])

    def _reserve(self) -> None:
        size = self.runner.pool.block_size
        for table, obstacles in zip(self.tables, self.obstacles, strict=True):
            while table.end < self.length:
                assert table.ensure(table.end + size), "the pool is full"
                if self.scatter and (table.end // size) % self.scatter == 0:  # somebody else's block
                    block = table.allocator.allocate(table.blocks[-1])
                    assert block is not None
                    obstacles.append(block)

    def part(self, boundary: int) -> Part:
        """The rows that wait at a boundary."""
        start, count = self.filled[boundary], len(self.held[boundary])
        windows = [group.window for group in self.runner.pool.groups]
        firsts = tuple(0 if window is None else max(0, start + 1 - window) for window in windows)
        reads = tuple(tuple(t.slots(at, start + count - at)) for t, at in zip(self.tables, firsts, strict=True))
        writes = tuple(tuple(table.slots(start, count)) for table in self.tables)
        return Part(start, count, firsts, reads, writes, self.stretched)

    def arrive(self, first: int, last: int, arrived: Arrived) -> None:
        """Rows that have gone from one boundary to another."""
        end = self.filled[first] + len(arrived.hidden_MD)
        self.held[first] = self.held[first][:0]
        self.filled[first:last] = [end] * (last - first)
        if last < self.runner.segments:
            self.held[last] = torch.cat([self.held[last], arrived.hidden_MD])
        if self.leave_windows:
            for group, table in zip(self.runner.pool.groups, self.tables, strict=True):
                if group.window is not None:
                    self.floor = max(self.floor, self.filled[group.segment] - MAX_ROLLBACK)
                    table.free_before(max(0, self.floor - group.window + 1))

    def advance(self, tokens: Sequence[int], last: int | None = None) -> Arrived:
        """New rows to a boundary (None: the end), with all rows that wait before it. What the last pass brought there;
        its newest row is the last one."""
        return advance_many([(self, tokens)], last)[0]

    def prefill(self, tokens: Sequence[int], chunk: int = 64) -> Arrived:
        """All rows to the end, some at a time."""
        for at in range(0, len(tokens), chunk):
            arrived = self.advance(tokens[at : at + chunk])
        return arrived

    def truncate(self, length: int) -> None:
        """Forget the positions from ``length`` on; their blocks are written again."""
        assert length >= self.floor, "the blocks that the next row would see are gone"
        self.length = min(self.length, length)
        before = self.length
        for boundary, held in enumerate(self.held):
            filled = min(self.filled[boundary], length)
            self.held[boundary], self.filled[boundary] = held[: max(0, before - filled)], filled
            before = filled

    def release(self) -> None:
        """Give back all blocks."""
        for table, obstacles in zip(self.tables, self.obstacles, strict=True):
            table.release()
            table.allocator.release_all(obstacles)
            obstacles.clear()

    def stored(self, entry: int) -> Tensor:
        """Keys and values ``[2, Hkv, S, Dh]`` that an entry holds of this sequence, by position."""
        pool = self.runner.pool
        group = pool.group_of[entry]
        table, segment = self.tables[group], pool_segment(self.runner, entry)
        begin = table.freed * pool.block_size
        runs = table.slots(begin, max(0, self.filled[segment] - begin))
        store = pool.stores[entry]
        return torch.cat([store[:, :, first : first + count] for first, count in runs] or [store[:, :, :0]], 2)


def pool_segment(runner: Runner, entry: int) -> int:
    """The segment whose rows fill an entry."""
    return runner.fused.entries()[entry].segment


def advance_many(moves: Sequence[tuple[Driver, Sequence[int]]], last: int | None = None) -> list[Arrived]:
    """As :meth:`Driver.advance` for several sequences whose rows share every pass. All of one runner."""
    drivers, runner = [driver for driver, _ in moves], moves[0][0].runner
    end = runner.segments if last is None else last
    found: dict[int, Arrived] = {}
    for driver, tokens in moves:
        driver.enter(tokens)
    for first in range(end):
        members = [driver for driver in drivers if len(driver.held[first])]
        if not members:
            continue
        stop = next(b for b in range(first + 1, end + 1) if b == end or any(len(d.held[b]) for d in drivers))
        batch = Batch.of(tuple(driver.part(first) for driver in members))
        arrived = runner.run(first, stop, batch, torch.cat([driver.held[first] for driver in members]))
        at = 0
        for driver, part in zip(members, batch.parts, strict=True):
            piece = _rows(arrived, at, at + part.count)
            driver.arrive(first, stop, piece)
            found[id(driver)], at = piece, at + part.count
    return [found[id(driver)] for driver in drivers]


def _rows(arrived: Arrived, first: int, last: int) -> Arrived:
    blocks = {name: stream_MD[first:last] for name, stream_MD in arrived.blocks.items()}
    return Arrived(arrived.hidden_MD[first:last], arrived.residual_MD[first:last], blocks)


def logits_of(runner: Runner, arrived: Arrived) -> Tensor:
    """Final logits ``[M, V]`` of all rows."""
    return runner.final_logits(arrived, range(len(arrived.hidden_MD)))
