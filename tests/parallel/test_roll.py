"""The processes beside their work: who is missing is named, who fails is heard, and one of them tells the user."""

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from exitlm.errors import AlreadyTold, UserError
from exitlm.parallel import roll
from exitlm.parallel.mesh import Layout, group
from tests.parallel.launch import free_port

CPU = torch.device("cpu")
SECONDS = 3.0


def over(world: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` gives on each of so many forked processes that can meet, or the exit code of one that gave
    nothing."""
    context = multiprocessing.get_context("fork")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))

    def run(rank: int, pipe: Any) -> None:
        roll.ALIVE, roll.SIGNED, roll.GRACE, roll.WATCH = 1.0, 1.0, 1.0, 0.1
        pipe.send(work(rank))

    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    children = [context.Process(target=run, args=(rank, pipes[rank][1])) for rank in range(world)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
        assert child.exitcode is not None
    return [pipe.recv() if pipe.poll() else child.exitcode for (pipe, _), child in zip(pipes, children, strict=True)]


def what_is_raised(rank: int, world: int, work: Callable[[], Any], timeout: float = SECONDS) -> tuple[str, str]:
    """The kind and the words of the error that a process has to raise."""
    with roll.meet(rank, world, timeout) as met:
        try:
            with group(met, CPU):
                dist.barrier()
                work()
        except Exception as error:
            found = met.failed(error, Layout(data=world).named)
            return type(found).__name__, str(found)
    return "", ""


def told_once(found: list[Any], *words: str) -> None:
    speakers = [said for kind, said in found if kind == "UserError"]
    assert len(speakers) == 1, found
    assert all(word in speakers[0] for word in words), found
    assert sum(kind == "AlreadyTold" for kind, _ in found) == len(found) - 1, found


def test_a_sleeping_process_is_named_and_then_ended() -> None:
    def work(rank: int) -> Any:
        return what_is_raised(rank, 3, lambda: time.sleep(20) if rank == 1 else dist.all_reduce(torch.zeros(1)))

    *others, sleeper = sorted(over(3, work), key=lambda found: found == 2)
    told_once(others, "rank 1 (pipeline 0, data 1, tensor 0) did not answer within 3 seconds (parallel.timeout)")
    assert sleeper == 2


def test_a_dead_process_is_named_also_by_one_that_waits_for_another() -> None:
    def work(rank: int) -> Any:
        def step() -> None:
            pair = dist.new_group([0, 2], timeout=timedelta(seconds=SECONDS))
            if rank == 1:
                os._exit(7)
            if rank == 2:
                dist.recv(torch.zeros(1), 0, group=pair)  # what rank 0, which waits for rank 1, will never send
            dist.all_reduce(torch.zeros(1))

        return what_is_raised(rank, 3, step, 60.0 if rank == 2 else SECONDS)

    first, dead, third = over(3, work)
    assert dead == 7
    told_once([first, third], "rank 1 (pipeline 0, data 1, tensor 0) died or can't be reached")


def test_the_first_reason_is_the_one_that_is_told() -> None:
    def work(rank: int) -> Any:
        def step() -> None:
            if rank == 1:
                raise UserError("a mistake")
            dist.all_reduce(torch.zeros(1))

        return what_is_raised(rank, 3, step)

    told_once(over(3, work), "a mistake")


def test_a_mistake_of_all_is_told_by_one() -> None:
    def work(rank: int) -> Any:
        def step() -> None:
            raise UserError("a mistake")

        return what_is_raised(rank, 3, step)

    told_once(over(3, work), "a mistake")


def test_a_failure_before_the_group_is_heard_by_those_who_wait() -> None:
    def work(rank: int) -> Any:
        started = time.monotonic()
        with roll.meet(rank, 2, 60.0) as met:
            try:
                if rank == 1:
                    raise met.failed(UserError("no data"), str)
                met.gather("data")
            except UserError as error:
                return type(error).__name__, str(error), time.monotonic() - started < 10
        return None

    assert over(2, work) == [("AlreadyTold", "no data", True), ("UserError", "no data", True)]


def test_a_program_may_meet_again() -> None:
    def work(rank: int) -> Any:
        sums = []
        for settings in ("a", "b"):
            with roll.meet(rank, 2, 20.0) as met:
                met.agree("settings", settings, lambda mine, first: f"{mine} {first}")
                met.gather("claimed")
                with group(met, CPU):
                    ones = torch.ones(1)
                    dist.all_reduce(ones)
                    sums.append(float(ones))
        return sums

    assert over(2, work) == [[2.0, 2.0]] * 2


def test_one_alone_needs_no_one() -> None:
    with roll.meet(0, 1, 1.0) as met:
        met.agree("settings", "a", lambda mine, first: "")
        met.gather("data")
        mistake = UserError("a mistake")
        assert met.failed(mistake, str) is mistake


def test_what_was_told_stays_told() -> None:
    with roll.meet(0, 1, 1.0) as met:
        told = AlreadyTold("elsewhere")
        assert met.failed(told, str) is told
    assert isinstance(told, UserError)


def test_processes_without_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="start them with torchrun"), roll.meet(1, 2, 1.0):
        pass
