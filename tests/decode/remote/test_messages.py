"""Passes and answers as frames: nothing is lost on the way, and what would reach beyond the pool is refused."""

import math
import random
from dataclasses import replace

import pytest
import torch

from exitlm.decode.batch import Batch, Part
from exitlm.decode.remote.frames import HEADER, BadFrame, Frame, decode, encode, read_header
from exitlm.decode.remote.messages import of_brought, of_work, to_brought, to_work
from exitlm.decode.work import AtExit, Brought, Final, Follower, Scored, Wants, Work

ADAPTERS, BLOCKS, SIZE = ["exits", "other"], [7, 3], 4


def over_the_wire(frame: Frame) -> Frame:
    """A frame as the other end has it."""
    data = b"".join(bytes(piece) for piece in encode(frame))
    return decode(read_header(data[: HEADER.size], 1 << 20), bytearray(data[HEADER.size :]))


def runs(rng: random.Random, count: int, slots: int) -> tuple[tuple[int, int], ...]:
    """``count`` slots in one or two runs."""
    first = rng.randint(1, count)
    parts = [first, count - first] if first < count else [first]
    return tuple((rng.randint(0, slots - n), n) for n in parts)


def draw_work(rng: random.Random) -> Work:
    """Any pass."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        start, count = rng.randint(0, 5), rng.randint(1, 3)
        firsts = (0, rng.randint(0, start))
        reads = tuple(runs(rng, start + count - at, n * SIZE) for at, n in zip(firsts, BLOCKS, strict=True))
        writes = tuple(runs(rng, count, n * SIZE) for n in BLOCKS)
        parts.append(Part(start, count, firsts, reads, writes, rng.random() < 0.3))
    batch, rows = Batch.of(tuple(parts)), range(sum(part.count for part in parts))
    tests = []
    for name in rng.sample(ADAPTERS, rng.randint(0, 2)):
        some = sorted(rng.sample(rows, rng.randint(1, len(rows))))
        gates = tuple(rng.choice([0.5, math.nan]) for _ in some)
        tests.append(AtExit(name, tuple(some), gates, tuple(rng.random() < 0.5 for _ in some)))
    finals = tuple(Final(row, rng.random() < 0.5) for row in rows if rng.random() < 0.5)
    followers = tuple(Follower(row, rng.randrange(99), rng.randrange(3)) for row in rows if rng.random() < 0.5)
    given = rng.choice(["tokens", "hidden", "slots"])
    return Work(
        rng.randrange(99), 0, 2, batch, Wants(tuple(tests), finals, followers),
        tokens=[rng.randrange(97) for _ in rows] if given == "tokens" else [],
        hidden_MD=torch.randn(len(rows), 8) if given == "hidden" else None,
        slots=[rng.randrange(50) for _ in rows] if given == "slots" else [],
        kept=[rng.randrange(50) for _ in rows] if rng.random() < 0.5 else [],
    )  # fmt: skip


def same(one: Work, other: Work) -> bool:
    """Whether two passes are alike; NaN equals itself here."""
    if (one.hidden_MD is None) != (other.hidden_MD is None):
        return False
    if one.hidden_MD is not None and not torch.equal(one.hidden_MD, other.hidden_MD):
        return False
    return repr(replace(one, hidden_MD=None)) == repr(replace(other, hidden_MD=None))


@pytest.mark.parametrize("seed", range(150))
def test_a_pass_comes_out_as_it_went_in(seed: int) -> None:
    work = draw_work(random.Random(seed))
    assert same(to_work(over_the_wire(of_work(work, ADAPTERS)), ADAPTERS, BLOCKS, SIZE), work)


@pytest.mark.parametrize("seed", range(300))
def test_a_changed_pass_never_leaves_the_pool(seed: int) -> None:
    rng = random.Random(seed)
    frame = of_work(draw_work(rng), ADAPTERS)
    ints = list(frame.ints)
    for _ in range(rng.randint(1, 3)):
        ints[rng.randrange(len(ints))] = rng.choice([-1, 0, 1, 2, 5, 29, 1 << 40])
    if rng.random() < 0.2:
        ints = ints[: rng.randrange(len(ints))]
    try:
        work = to_work(replace(frame, ints=ints), ADAPTERS, BLOCKS, SIZE)
    except BadFrame:
        return
    for part in work.batch.parts:
        for both in (part.reads, part.writes):
            for group, blocks in zip(both, BLOCKS, strict=True):
                assert all(first >= 0 and n > 0 and first + n <= blocks * SIZE for first, n in group)
    rows = work.batch.count
    given = len(work.tokens), len(work.slots), 0 if work.hidden_MD is None else len(work.hidden_MD)
    assert sorted(given) == [
        0,
        0,
        rows,
    ]
    assert all(0 <= row < rows for test in work.wants.tests for row in test.rows)


def draw_brought(rng: random.Random) -> Brought:
    """Any answer."""

    def scored(width: int) -> dict[int, Scored]:
        return {
            row: Scored(
                rng.random(),
                rng.randrange(width),
                rng.random() < 0.9,
                rng.choice([rng.random(), math.nan]),
                torch.randn(width) if rng.random() < 0.5 else None,
            )
            for row in sorted(rng.sample(range(20), rng.randint(0, 5)))
        }

    tests = {name: scored(rng.choice([5, 9])) for name in rng.sample(ADAPTERS, rng.randint(0, 2))}
    followers = {row: (-rng.random(), {row: -1.0, 3 + row: -2.0}) for row in range(rng.randint(0, 3))}
    hidden = torch.randn(4, 5) if rng.random() < 0.5 else None
    return Brought(rng.randrange(99), rng.random(), tests, scored(9), followers, hidden)


@pytest.mark.parametrize("seed", range(150))
def test_an_answer_comes_out_as_it_went_in(seed: int) -> None:
    brought = draw_brought(random.Random(seed))
    found = to_brought(over_the_wire(of_brought(brought, ADAPTERS)), ADAPTERS)
    assert repr(found) == repr(brought)


@pytest.mark.parametrize("seed", range(200))
def test_a_changed_answer_is_refused_or_still_an_answer(seed: int) -> None:
    rng = random.Random(seed)
    frame = of_brought(draw_brought(rng), ADAPTERS)
    ints = list(frame.ints)
    for _ in range(rng.randint(1, 3)):
        ints[rng.randrange(len(ints))] = rng.choice([-1, 0, 1, 2, 5, 29, 1 << 40])
    try:
        found = to_brought(replace(frame, ints=ints[: rng.randint(0, len(ints))]), ADAPTERS)
    except BadFrame:
        return
    assert isinstance(found, Brought)
