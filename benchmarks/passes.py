"""Passes of given rows over a runner, for timing: rows of one sequence or of several, each behind as many positions.

What the positions hold is zeros: it does not matter for the time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from exitlm.decode.batch import Batch, Part
from exitlm.decode.cache.block_table import BlockTable
from exitlm.decode.kernels.runner import Runner


class Passes:
    """Sequences with ``context`` positions each, to which rows are added again and again."""

    def __init__(self, runner: Runner, context: int, sequences: int = 1, rows: int = 32) -> None:
        """``rows``: the most that one sequence gets. The pool must hold them all."""
        self.runner, self.context = runner, context
        pool = runner.pool
        self.tables = [
            [BlockTable(each, pool.block_size, expected_length=context + rows) for each in pool.allocators]
            for _ in range(sequences)
        ]
        for tables in self.tables:
            for group, table in enumerate(tables):
                assert table.ensure(context + rows), "the pool is too small; raise engine.kv_bytes"
                pool.clear(group, table.blocks)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The next ``rows[i]`` rows of sequence i."""
        windows = [group.window for group in self.runner.pool.groups]
        firsts = tuple(0 if window is None else max(0, self.context + 1 - window) for window in windows)
        parts = []
        for tables, count in zip(self.tables, rows, strict=False):
            end = self.context + count
            reads = tuple(tuple(t.slots(at, end - at)) for t, at in zip(tables, firsts, strict=True))
            writes = tuple(tuple(table.slots(self.context, count)) for table in tables)
            parts.append(Part(self.context, count, firsts, reads, writes))
        return Batch.of(tuple(parts))

    @torch.inference_mode()
    def run(self, rows: Sequence[int]) -> list[int]:
        """A whole pass, from token ids to the most likely next ones."""
        batch = self.batch(rows)
        hidden = self.runner.embed([100 + i % 300 for i in range(batch.count)])
        arrived = self.runner.run(0, self.runner.segments, batch, hidden)
        found = self.runner.final_scores(arrived, range(batch.count)).best
        return found

    def release(self) -> None:
        """Give the blocks back."""
        for tables in self.tables:
            for table in tables:
                table.release()
