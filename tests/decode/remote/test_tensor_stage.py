"""Stages of several tensor ranks: an engine over them has the tokens of one process."""

import os
import socket
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.kernels.packed import packed_model
from exitlm.decode.kernels.ranks import RankLost
from exitlm.decode.kernels.runner import Runner
from exitlm.decode.options import EngineConfig
from exitlm.decode.remote.engine import PipelinedEngine
from exitlm.decode.remote.frames import BadFrame, Frame, Kind
from exitlm.decode.remote.hello import greet
from exitlm.decode.remote.job import pieces
from exitlm.decode.remote.launch import admitted, listen
from exitlm.decode.remote.link import Closed, Late, Link, words_of
from exitlm.decode.remote.lockstep import Lockstep
from exitlm.decode.remote.pipeline import Pipeline
from exitlm.decode.remote.stage import serve_link
from exitlm.decode.remote.tensor_stage import Following, Leading, LeadingWorker, end, hand_on, hand_on_job
from exitlm.decode.remote.worker import Worker
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.models import attach, drafting_model, make_engine, random_ids, some_costs
from tests.decode.remote.threads import KEY, InMemory, InThreads, weights_of_model
from tests.model.families import tiny_model
from tests.parallel.launch import launch

OPTIONS = EngineConfig(block_size=4, kv_bytes=190_000)
REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    (random_ids(9, 1), dict(mode="full")),
    (random_ids(21, 2), dict(mode="threshold", threshold=0.4)),
    (random_ids(5, 3), dict(mode="lossless")),
    (random_ids(21, 2) + random_ids(4, 4), dict(mode="threshold", threshold=0.0)),
    (random_ids(14, 5), dict(mode="lossless", temperature=0.8, seed=3)),
    (random_ids(14, 5), dict(mode="full", temperature=0.8, seed=3, logprobs=3, prompt_logprobs=2)),
]


def texts(engine: Any) -> list[Any]:
    """Tokens of all requests, exit layers where they depend on nothing else, and log-probabilities."""
    requests = [
        (prompt, GenerationConfig.of({"max_new_tokens": 20, "ignore_eos": True, **settings}))
        for prompt, settings in REQUESTS
    ]
    found: list[Generation] = engine.generate_all(requests)
    assert [each.error for each in found] == [None] * len(found)
    out: list[Any] = []
    for each, (_, settings) in zip(found, REQUESTS, strict=True):
        out.append([each.token_ids, None if settings["mode"] == "lossless" else each.exit_layers])
    out.append([round(token.logprob, 9) for token in found[-1].trace])
    out.append([round(one, 9) for one, _ in found[-1].prompt_logprobs])
    return out


class TensorPipeline(Pipeline):
    """A pipeline whose first stage is this process and others of a group."""

    lockstep: Lockstep
    group: dist.ProcessGroup

    def _load_first(self) -> Worker:
        w, share = self._weights, self.shares[0]
        own = {key: head for key, head in self._heads.items() if share.has_exit(key[1])}
        hand_on_job(self.lockstep, self._job(0), pieces(own))
        fused = packed_model(self._model, w.quant, w.compile, w.options, share, w.rounds, self.group)
        return LeadingWorker(Runner(fused, w.options, self.pool.blocks), self.lockstep, list(self._model.exit_sets()))


class Connecting:
    """A launcher of stages that connect by themselves."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener

    def start(self, number: int) -> Link:
        """See Launcher."""
        link = admitted(self._listener, KEY, time.monotonic() + 20.0)
        assert link is not None
        return link

    def stop(self, number: int) -> None:
        """See Launcher."""

    def close(self) -> None:
        """See Launcher."""


def decode(
    model: EarlyExitModel, tensor: int, stages: int, counts: Sequence[int] | None, listener: socket.socket
) -> list[Any] | None:
    """What an engine over stages of so many ranks writes, on the first rank of all; ``counts`` None measures."""
    rank = dist.get_rank()
    groups, steps = ([dist.new_group([*range(s * tensor, (s + 1) * tensor)]) for s in range(stages)] for _ in range(2))
    stage, place = divmod(rank, tensor)
    group, lockstep = groups[stage], Lockstep(steps[stage])
    opens = InMemory(model)
    if rank == 0:
        TensorPipeline.lockstep, TensorPipeline.group = lockstep, group
        pipeline = TensorPipeline(
            model,
            weights_of_model(model, "none", OPTIONS),
            Connecting(listener),
            stages=stages,
            layers_per_stage=counts,
        )
        engine = PipelinedEngine(model, pipeline, options=OPTIONS, costs=some_costs(model))
        found = texts(engine)
        engine.close()
        end(lockstep)
        return found
    with suppress(Closed):
        if place:
            serve_link(Following(lockstep), opens, group)
        link = Link(socket.create_connection(listener.getsockname()), "the head")
        greet(link, KEY)
        serve_link(Leading(link, lockstep), opens, group)
    return None


EXITS = (
    ExitConfig(layer=1, kind="block"),
    ExitConfig(layer=2, kind="mlp", candidates=40),
    ExitConfig(layer=3, kind="norm", output="low_rank", rank=9),
)
MODELS = {"llama": lambda: drafting_model("llama"), "gemma3_text": lambda: attach(tiny_model("gemma3_text"), EXITS)}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("counts", [(4,), (2, 2), (1, 3)], ids=str)
def test_stages_of_two_ranks_have_the_tokens_of_one_process(family: str, counts: Sequence[int]) -> None:
    """All modes at once; an exit at a cut, and with blocks for some of the texts only."""
    model = MODELS[family]()
    expected = texts(make_engine(model, options=OPTIONS))
    with listen("127.0.0.1", 0) as listener:
        first, *others = launch(2 * len(counts), decode, model, 2, len(counts), counts, listener)
    assert first == expected
    assert others == [None] * len(others)


def test_four_ranks_have_the_tokens_of_one_process() -> None:
    """One KV head each, parts of the vocabulary that are not of one length, candidates."""
    model = attach(tiny_model("gemma3_text", num_key_value_heads=4), EXITS)
    expected = texts(make_engine(model, options=OPTIONS))
    with listen("127.0.0.1", 0) as listener:
        assert launch(4, decode, model, 4, 1, (4,), listener)[0] == expected


def test_the_ranks_of_a_stage_measure_together() -> None:
    """Where the head asks how fast a stage is; how it splits the layers changes no token."""

    model = MODELS["llama"]()
    expected = texts(make_engine(model, options=OPTIONS))
    with listen("127.0.0.1", 0) as listener:
        assert launch(4, decode, model, 2, 2, None, listener)[0] == expected


# ---- ranks that are lost


class Falling(Following):
    """A rank that ends when its fifth pass comes, which the first one has begun already."""

    passes = 0

    def receive(self, timeout: float | None = None) -> Frame:
        """See Following."""
        frame = super().receive(timeout)
        self.passes += frame.kind == Kind.PASS
        if self.passes == 5:
            os._exit(1)
        return frame


class Replacing(Connecting):
    """A launcher whose first stage connects, and that puts a thread in its place."""

    def __init__(self, listener: socket.socket, model: EarlyExitModel) -> None:
        super().__init__(listener)
        self._threads, self.starts = InThreads(model), 0

    def start(self, number: int) -> Link:
        """See Launcher."""
        self.starts += 1
        return super().start(number) if self.starts == 1 else self._threads.start(number)


def lose(model: EarlyExitModel, listener: socket.socket, directory: Path) -> None:
    """A head whose other stage has two ranks, one of which ends; what became of the others is written down."""
    rank = dist.get_rank()
    group, steps = (dist.new_group([1, 2]) for _ in range(2))
    try:
        found = _led(model, listener) if rank == 0 else _served(model, listener, group, Lockstep(steps))
    except BaseException:
        found = traceback.format_exc()
    (directory / str(rank)).write_text(found)
    os._exit(1)


def _led(model: EarlyExitModel, listener: socket.socket) -> str:
    launcher = Replacing(listener, model)
    weights = weights_of_model(model, "none", OPTIONS)
    pipeline = Pipeline(model, weights, launcher, stages=2, layers_per_stage=(2, 2))
    with pytest.warns(UserWarning, match="stage 2 of 2 was lost"):
        found = texts(PipelinedEngine(model, pipeline, options=OPTIONS, costs=some_costs(model)))
    return f"{launcher.starts} {found}"


def _served(model: EarlyExitModel, listener: socket.socket, group: dist.ProcessGroup, lockstep: Lockstep) -> str:
    if lockstep.rank:
        serve_link(Falling(lockstep), InMemory(model), group)
    link = Link(socket.create_connection(listener.getsockname()), "the head")
    greet(link, KEY)
    with pytest.raises(RankLost):
        serve_link(Leading(link, lockstep), InMemory(model), group)
    return "lost another"


def test_a_stage_that_loses_a_rank_ends_and_is_replaced(tmp_path: Path) -> None:
    """Its first rank notices within a pass and ends, which the head notices; every text has its tokens."""
    model = MODELS["llama"]()
    expected = texts(make_engine(model, options=OPTIONS))
    with listen("127.0.0.1", 0) as listener, pytest.raises(AssertionError, match="died"):
        launch(3, lose, model, listener, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": f"2 {expected}", "1": "lost another"}


# ---- what goes from the first rank to the others


class Recorder:
    """What stands for a lockstep: it keeps what is sent, and gives what it is given."""

    def __init__(self, given: bytes = b"", ring: Any = None) -> None:
        self.sent: list[bytes] = []
        self.beats, self._given, self._ring = 0, given, ring

    def send(self, frame: bytes) -> None:
        """Keep it."""
        self.sent.append(frame)

    def beat(self) -> None:
        """Count, and ring at the third."""
        self.beats += 1
        if self.beats == 3:
            self._ring()

    def receive(self) -> bytes:
        """What it was given."""
        return self._given


def test_the_first_rank_hands_on_every_frame_and_beats_while_none_comes() -> None:
    near, far = (Link(end, "another") for end in socket.socketpair())
    lockstep: Any = Recorder(ring=lambda: far.say(hello="you"))
    leading = Leading(near, lockstep, beat=0.01)
    frame = leading.receive()
    assert words_of(frame) == {"hello": "you"}
    assert lockstep.beats >= 3
    follower: Any = Recorder(given=lockstep.sent[0])
    assert words_of(Following(follower).receive()) == {"hello": "you"}
    leading.say(hello="me")
    assert far.hear(5.0) == {"hello": "me"}
    with pytest.raises(Late):
        leading.receive(0.0)
    assert len(lockstep.sent) == 2
    far.close()
    with pytest.raises(Closed):
        leading.receive()
    for ended in lockstep.sent[1:]:
        last: Any = Recorder(given=ended)
        with pytest.raises(Closed, match="no head any more"):
            Following(last).receive()


@pytest.mark.parametrize("cut", [slice(0, 5), slice(0, -1), slice(1, None)])
def test_what_is_no_frame_is_refused_by_a_follower(cut: slice) -> None:
    lockstep: Any = Recorder()
    hand_on(lockstep, Frame(Kind.CLEAR, [1, 2, 3]))
    follower: Any = Recorder(given=lockstep.sent[0][cut])
    with pytest.raises(BadFrame):
        Following(follower).receive()


def test_formats_of_the_native_kernels_are_refused() -> None:
    group: Any = object()
    with pytest.raises(UserError, match="quant 'q8_0' is a format of the native kernels, which tensor ranks lack"):
        packed_model(tiny_model("llama"), "q8_0", "none", OPTIONS, group=group)
