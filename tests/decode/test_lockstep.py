"""Tensor ranks in lockstep: frames arrive whole, and a lost rank is noticed."""

import os
import random
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from exitlm.decode.kernels.ranks import RankLost, Ranks
from exitlm.decode.remote.lockstep import MAX_FRAME, Lockstep
from tests.parallel.launch import launch

FRAMES = [b"\0", b"request", random.Random(0).randbytes(1 << 20), memoryview(b"a view"), bytearray(5000)]


def world() -> dist.ProcessGroup:
    """The group of all processes of a launch."""
    group = dist.group.WORLD
    assert group is not None
    return group


# ---- frames


def exchange() -> list[bytes]:
    """What a rank sent or received, with beats in between."""
    lockstep = Lockstep(world())
    if lockstep.rank:
        return [lockstep.receive() for _ in FRAMES]
    for frame in FRAMES:
        lockstep.beat()
        lockstep.beat()
        lockstep.send(frame)
    return [bytes(frame) for frame in FRAMES]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_gets_every_frame_in_order(ranks: int) -> None:
    assert launch(ranks, exchange) == [[bytes(frame) for frame in FRAMES]] * ranks


def second_of_two() -> bytes:
    """A frame among the ranks 2 and 3, whose first is not that of the world."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    lockstep = Lockstep(groups[dist.get_rank() // 2])
    frame = b"group %d" % (dist.get_rank() // 2)
    if lockstep.rank:
        return lockstep.receive()
    lockstep.send(frame)
    return frame


def test_each_group_has_a_first_rank_of_its_own() -> None:
    assert launch(4, second_of_two) == [b"group 0", b"group 0", b"group 1", b"group 1"]


def announce(length: int) -> str:
    """What a rank makes of a length that is not one of a frame."""
    if dist.get_rank() == 0:
        dist.broadcast(torch.tensor([length]), 0)
        return ""
    with pytest.raises(RankLost) as caught:
        Lockstep(world()).receive()
    return str(caught.value)


@pytest.mark.parametrize("length", [-1, MAX_FRAME + 1, 1 << 62])
def test_a_length_that_no_frame_has_is_refused_before_memory_is_taken(length: int) -> None:
    assert f"a frame of {length} bytes" in launch(2, announce, length)[1]


# ---- ranks that are lost


def noted(directory: Path, work: Callable[[], object]) -> None:
    """Write down whether a rank noticed, and end it: a launch can't say it, since its ranks wait for each other."""
    try:
        work()
    except RankLost as error:
        (directory / str(dist.get_rank())).write_text(str(error))
        os._exit(1)


def first_dies(directory: Path) -> None:
    """The first rank ends between two frames."""
    lockstep = Lockstep(world())
    if lockstep.rank == 0:
        lockstep.send(b"last")
        os._exit(1)
    assert lockstep.receive() == b"last"
    noted(directory, lockstep.receive)


def other_dies(directory: Path) -> None:
    """Another rank ends, and the first one goes on with beats."""
    lockstep = Lockstep(world())
    if lockstep.rank == 1:
        assert lockstep.receive() == b"only"
        os._exit(1)

    def go_on() -> None:
        lockstep.send(b"only")
        while True:
            lockstep.beat()

    noted(directory, go_on if lockstep.rank == 0 else lockstep.receive)


def dies_in_a_pass(directory: Path) -> None:
    """A rank ends while another one waits for its part of a sum."""
    ranks = Ranks(world())
    ranks.sum(torch.ones(3))
    if ranks.rank == 1:
        os._exit(1)
    noted(directory, lambda: ranks.sum(torch.ones(3)))


@pytest.mark.parametrize(
    ("work", "ranks", "left"), [(first_dies, 3, {"1", "2"}), (other_dies, 2, {"0"}), (dies_in_a_pass, 2, {"0"})]
)
def test_a_rank_that_died_is_noticed(work: Callable[[Path], None], ranks: int, left: set[str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died"):
        launch(ranks, work, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == left
    assert all("lost another one of its group" in path.read_text() for path in tmp_path.iterdir())


def silent(directory: Path) -> None:
    """The first rank is there and sends nothing; the others wait as long as the group does."""
    lockstep = Lockstep(dist.new_group(timeout=timedelta(seconds=1)))
    if lockstep.rank:
        noted(directory, lockstep.receive)
    while not (directory / "1").exists():
        time.sleep(0.05)
    os._exit(1)


def test_a_silent_first_rank_is_noticed_after_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died"):
        launch(2, silent, tmp_path)
    assert "lost another one of its group" in (tmp_path / "1").read_text()
