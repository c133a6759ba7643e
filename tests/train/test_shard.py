"""Shards: made once whoever asks, whole or not at all, and read without a crash whatever happens to the file."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exitlm.errors import UserError
from exitlm.train.data import Blocks, ByteTokenizer, load_blocks, tokenise, tokenise_all
from exitlm.train.shard import META, OFFSETS, TOKENS, Shard, publish, published

BYTES = ByteTokenizer()
IDS = np.arange(100, 200, dtype=np.uint16)


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    (tmp_path / TOKENS).write_bytes(IDS.tobytes())
    return Shard(tmp_path / TOKENS, IDS.dtype)


@pytest.fixture
def home(cache: Path) -> Path:
    return cache / "tokens" / "key"


def write(directory: Path) -> None:
    (directory / TOKENS).write_bytes(IDS.tobytes())
    np.save(directory / OFFSETS, np.array([0, 100]))
    (directory / META).write_text('{"digest": "d", "tokens": 100}')


def started(*targets: Callable[[], object]) -> list[Any]:
    """A fork for each function."""
    forks = [multiprocessing.get_context("fork").Process(target=target) for target in targets]
    for fork in forks:
        fork.start()
    return forks


def ended(forks: list[Any]) -> list[int]:
    """The exit codes."""
    for fork in forks:
        fork.join(30)
    return [fork.exitcode for fork in forks]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.01)


def test_parts_of_a_file(shard: Shard) -> None:
    assert len(shard) == 100
    for a, b in ((0, 100), (0, 1), (17, 40), (99, 100), (5, 5)):
        assert np.array_equal(shard[a:b], IDS[a:b])
    assert np.array_equal(shard[:], IDS)
    assert np.array_equal(shard[90:], IDS[90:])
    assert np.array_equal(pickle.loads(pickle.dumps(shard))[3:9], IDS[3:9])


def test_a_file_that_shrinks_is_an_error_and_one_that_vanishes_is_not(shard: Shard) -> None:
    os.truncate(shard.path, 100)
    assert np.array_equal(shard[:50], IDS[:50])
    with pytest.raises(UserError, match=r"tokens\.bin changed while the run was reading it; start again"):
        shard[40:60]
    shard.path.unlink()
    assert np.array_equal(shard[10:50], IDS[10:50])


def test_blocks_outlive_their_files_forks_and_pickles(text: Path, cache: Path) -> None:
    blocks = load_blocks([str(text)], BYTES, vocab_size=257, seq_len=16, cache=cache)
    wanted = [blocks[i][0].ids for i in range(4)]

    def check(found: Blocks) -> None:
        assert all(torch.equal(found[i][0].ids, wanted[i]) for i in range(4))

    check(pickle.loads(pickle.dumps(blocks)))
    shutil.rmtree(cache / "tokens")
    assert ended(started(lambda: check(blocks), lambda: check(blocks))) == [0, 0]
    check(blocks)
    assert int(blocks.counts(257).sum()) == blocks.total_targets()


def test_one_of_many_processes_does_the_work(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, log = tmp_path / "a.txt", tmp_path / "log"
    path.write_text("text of a corpus\n" * 50)
    encode = ByteTokenizer.arrays

    def noted(self: ByteTokenizer, texts: Any) -> Any:
        with log.open("a") as out:
            out.write(f"{os.getpid()}\n")
        time.sleep(0.3)  # the others come meanwhile
        return encode(self, texts)

    monkeypatch.setattr(ByteTokenizer, "arrays", noted)

    def run() -> None:
        shard, offsets, _ = tokenise(path, BYTES, vocab_size=257, cache=cache)
        assert bytes(shard[0 : len(shard) - 1].tolist()) == path.read_bytes()
        assert offsets.tolist() == [0, len(shard)]

    assert ended(started(*[run] * 6)) == [0] * 6
    assert len(log.read_text().split()) == 1
    assert len(list((cache / "tokens").iterdir())) == 1


def test_what_a_killed_writer_leaves_is_not_taken_for_whole(home: Path) -> None:
    def half(directory: Path) -> None:
        write(directory)
        time.sleep(60)

    writer = started(lambda: publish(home, IDS.dtype, half))[0]
    wait_for(lambda: bool(list(home.parent.glob(f".*/{META}"))))
    waiter = started(lambda: publish(home, IDS.dtype, write))
    time.sleep(0.2)
    assert published(home, IDS.dtype) is None
    os.kill(writer.pid, signal.SIGKILL)
    assert ended([writer, *waiter]) == [-signal.SIGKILL, 0]
    assert [p.name for p in home.parent.iterdir()] == [home.name]
    shard, offsets, digest = publish(home, IDS.dtype, lambda _: pytest.fail("written again"))
    assert (shard[:].tolist(), offsets.tolist(), digest) == (IDS.tolist(), [0, 100], "d")


@pytest.mark.parametrize("name", [TOKENS, OFFSETS, META])
@pytest.mark.parametrize("size", [None, 0, 20])
def test_what_is_not_whole_is_made_again(home: Path, name: str, size: int | None) -> None:
    home.mkdir(parents=True)
    write(home)
    assert published(home, IDS.dtype) is not None
    if size is None:
        (home / name).unlink()
    else:
        os.truncate(home / name, size)
    assert published(home, IDS.dtype) is None
    assert publish(home, IDS.dtype, write)[0][:].tolist() == IDS.tolist()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (META, []), (META, 5), (META, None), (META, {"digest": 5, "tokens": 100}), (META, {"tokens": 100}),
        (OFFSETS, [0, 60, 40, 100]), (OFFSETS, [-5, 100]), (OFFSETS, [10, 100]), (OFFSETS, [[0, 100]]), (OFFSETS, 100),
        (OFFSETS, [0.0, 100.0]), (OFFSETS, []),
    ],
)  # fmt: skip
def test_what_is_of_another_shape_is_made_again(home: Path, name: str, content: Any) -> None:
    home.mkdir(parents=True)
    write(home)
    if name == META:
        (home / META).write_text(json.dumps(content))
    else:
        np.save(home / OFFSETS, np.array(content))
    assert published(home, IDS.dtype) is None
    shard, offsets, digest = publish(home, IDS.dtype, write)
    assert (shard[:].tolist(), offsets.tolist(), digest) == (IDS.tolist(), [0, 100], "d")


def test_one_that_waits_can_be_stopped(home: Path) -> None:
    lock = home.parents[1] / "locks" / home.name
    lock.parent.mkdir(parents=True)
    with lock.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CancelledError):
            publish(home, IDS.dtype, write, stopped=lambda: True)
    publish(home, IDS.dtype, write, stopped=lambda: True)


def test_a_file_system_without_locks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    def both(directory: Path) -> None:
        write(directory)
        first = publish(home, IDS.dtype, write)  # as another process would
        held.append(first[0])

    held: list[Shard] = []
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert publish(home, IDS.dtype, both)[0][:].tolist() == held[0][:].tolist() == IDS.tolist()
    assert [p.name for p in home.parent.iterdir()] == [home.name]


def test_a_cache_that_cannot_be_written(home: Path, cache: Path) -> None:
    def full(directory: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; set EXITLM_CACHE"):
        publish(home, IDS.dtype, full)
    assert not list(home.parent.iterdir())
    shutil.rmtree(cache / "tokens")
    (cache / "tokens").write_text("")
    with pytest.raises(UserError, match="cannot"):
        publish(home, IDS.dtype, write)


def test_more_files_than_a_process_may_open(tmp_path: Path, cache: Path) -> None:
    import resource

    paths = [tmp_path / f"{i:03}.txt" for i in range(150)]
    for path in paths:
        path.write_text(path.name)

    def run() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
        shards = [shard for shard, _, _ in tokenise_all(paths, BYTES, vocab_size=257, cache=cache)]
        assert [bytes(shard[0:7].tolist()).decode() for shard in shards] == [path.name for path in paths]

    assert ended(started(run)) == [0]


def test_descriptors_are_closed(tmp_path: Path, shard: Shard) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.suppress(FileNotFoundError):
        Shard(tmp_path / "absent", IDS.dtype)
    for _ in range(5):
        assert len(Shard(shard.path, IDS.dtype)) == 100
    assert len(os.listdir("/proc/self/fd")) == before
