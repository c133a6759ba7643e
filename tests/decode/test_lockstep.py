"""Tensor ranks in lockstep: frames arrive whole, a lost rank is noticed, an engine has the tokens of one process."""

import os
import random
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.kernels.ranks import RankLost, Ranks
from exitlm.decode.kernels.runner import Runner
from exitlm.decode.kernels.tensor_model import TensorModel
from exitlm.decode.options import EngineConfig
from exitlm.decode.remote.lockstep import MAX_FRAME, Lockstep
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.lockstep import LeadingRunner, follow, leading_engine
from tests.decode.models import attach, drafting_model, make_engine, random_ids
from tests.model.families import tiny_model
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


# ---- an engine over several ranks

REQUESTS = [
    (random_ids(9, 1), dict(mode="full")),
    (random_ids(21, 2), dict(mode="threshold", threshold=0.4)),
    (random_ids(5, 3), dict(mode="lossless")),
    (random_ids(21, 2) + random_ids(4, 4), dict(mode="threshold", threshold=0.0)),
    (random_ids(14, 5), dict(mode="lossless", temperature=0.8, seed=3)),
    (random_ids(14, 5), dict(mode="full", temperature=0.8, seed=3, logprobs=3)),
]


def requests(count: int) -> list[tuple[list[int], GenerationConfig]]:
    """All modes, with so many new tokens."""
    return [
        (prompt, GenerationConfig.of({"max_new_tokens": count, "ignore_eos": True, **settings}))
        for prompt, settings in REQUESTS
    ]


def models() -> list[EarlyExitModel]:
    """Lenses with gates; and blocks, candidates and windows, with four KV heads."""
    kinds = [
        ExitConfig(layer=1, kind="block"),
        ExitConfig(layer=2, kind="mlp", candidates=40),
        ExitConfig(layer=3, kind="norm", output="low_rank", rank=9),
    ]
    return [drafting_model("llama"), attach(tiny_model("gemma3_text", num_key_value_heads=4), kinds)]


def said(generations: Sequence[Generation]) -> list[list[int]]:
    """The tokens of each text, and the layers that gave them where these do not depend on what was drafted when."""
    modes = [settings["mode"] for _, settings in REQUESTS]
    return [
        each.token_ids if mode == "lossless" else [*each.token_ids, *each.exit_layers]
        for mode, each in zip(modes, generations, strict=True)
    ]


def options(model: EarlyExitModel, ranks: int) -> EngineConfig:
    """Blocks of 4 positions, too few for all texts together, and as many whoever holds how many heads of them."""
    config = model.config
    entries = config.num_hidden_layers + sum(head.config.kind == "block" for head in model.exit_heads().values())
    position = 2 * config.num_key_value_heads * config.head_dim * 8 * entries
    return EngineConfig(block_size=4, kv_bytes=120 * position // ranks)


def decode(which: list[EarlyExitModel]) -> list[list[list[int]]] | int:
    """What the first rank says by model and request; on the others, how many passes they ran."""
    lockstep, found, passes = Lockstep(world()), [], 0
    for model in which:
        fused, room = TensorModel(model, "none", group=world()), options(model, lockstep.size)
        if lockstep.rank:
            passes += follow(Runner(fused, room), lockstep)
            continue
        engine = leading_engine(model, fused, lockstep, room)
        found.append(said(engine.generate_all(requests(24))))
        assert isinstance(engine.runner, LeadingRunner)
        engine.runner.tell("end")
    return passes or found


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_engine_over_ranks_has_the_tokens_of_one_process(ranks: int) -> None:
    """All modes at once; texts wait for blocks, and share them."""
    which = models() if ranks == 2 else models()[1:]
    alone = [make_engine(model, options=options(model, 1)) for model in which]
    expected = [said(engine.generate_all(requests(24))) for engine in alone]
    first, *others = launch(ranks, decode, which)
    assert first == expected
    assert all(passes >= 24 * len(which) for passes in others)
