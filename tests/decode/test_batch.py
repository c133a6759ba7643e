"""The rows of a pass as plain data: blocks of a part against a lookup position by position."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.decode.batch import Batch, Part, Run


def runs_of(blocks: list[int], block_size: int, first: int, end: int) -> tuple[Run, ...]:
    """Runs of neighbouring slots of the positions from ``first`` to ``end``, slot by slot."""
    found: list[Run] = []
    for position in range(first, end):
        slot = blocks[position // block_size] * block_size + position % block_size
        if found and slot == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((slot, 1))
    return tuple(found)


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(
    block_size=st.integers(1, 9),
    start=st.integers(0, 60),
    count=st.integers(1, 12),
    seen=st.integers(0, 60),
    stay=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_blocks_of_the_positions_that_are_read(
    block_size: int, start: int, count: int, seen: int, stay: float, seed: int
) -> None:
    """Blocks that lie together or not, from a position on that need not begin one."""
    rng, end, first = random.Random(seed), start + count, max(0, start - seen)
    blocks = [rng.randrange(1, 1000)]
    while len(blocks) * block_size < end:
        blocks.append(blocks[-1] + 1 if rng.random() < stay else rng.randrange(1, 1000))
    reads, writes = (runs_of(blocks, block_size, at, end) for at in (first, start))
    part = Part(start, count, (first,), (reads,), (writes,))
    found = part.blocks(0, block_size)
    assert len(found) == -(-end // block_size)
    for index, block in enumerate(found):
        assert block == (blocks[index] if (index + 1) * block_size > first else 0)


def test_a_batch_counts_its_rows() -> None:
    parts = tuple(
        Part(start, count, (0,), (((0, start + count),),), (((start, count),),)) for start, count in ((0, 5), (9, 1))
    )
    batch = Batch.of(parts)
    assert batch.count == 6
    assert [part.end for part in batch.parts] == [5, 10]
