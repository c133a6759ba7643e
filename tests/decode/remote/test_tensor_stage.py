"""Stages of several tensor ranks: an engine over them has the tokens of one process."""

import itertools
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.kernels.share import Share
from exitlm.decode.options import EngineConfig
from exitlm.decode.remote import ranks
from exitlm.decode.remote.engine import PipelinedEngine
from exitlm.decode.remote.hello import greet
from exitlm.decode.remote.launch import admitted, listen
from exitlm.decode.remote.link import Closed, Link, words_of
from exitlm.decode.remote.lockstep import Lockstep
from exitlm.decode.remote.pipeline import Pipeline
from exitlm.decode.remote.ranks import Followers, follow
from exitlm.decode.remote.stage import Stage, _packed, serve_link
from exitlm.decode.remote.worker import Worker
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.models import attach, drafting_model, make_engine, random_ids, some_costs
from tests.decode.remote.threads import KEY, InMemory, weights_of_model
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


Work = Callable[[PipelinedEngine], str]
Serve = Callable[["Stages", EarlyExitModel, int, int], str]


class Forked(Followers):
    """The other ranks of a stage, which are processes of the launch and connect to ``listener``."""

    listener: socket.socket
    of_stage: dist.ProcessGroup

    def __init__(self, size: int, device: torch.device) -> None:
        self.links = [connected(self.listener) for _ in range(1, size)]
        self.group = self.of_stage
        self.lockstep = Lockstep(self.group)

    def close(self) -> None:
        """Their links are shut, by which they end."""
        for link in self.links:
            link.close()


def connected(listener: socket.socket) -> Link:
    """The next process that connects and greets."""
    link = admitted(listener, KEY, time.monotonic() + 20.0)
    assert link is not None
    link.trust()
    return link


class Connecting:
    """A launcher of stages that connect by themselves, each to the next listener."""

    def __init__(self, listeners: Sequence[socket.socket]) -> None:
        self._listeners = list(listeners)

    def start(self, number: int) -> Link:
        """See Launcher."""
        return connected(self._listeners.pop(0))

    def stop(self, number: int) -> None:
        """See Launcher."""

    def close(self) -> None:
        """See Launcher."""


class Stages:
    """A launch: the head, and after it ``tensor`` ranks for each stage that is started. What became of each process is
    written into ``directory`` under its rank, and it ends, since a lost one can't be waited for."""

    def __init__(self, directory: Path, tensor: int, started: int) -> None:
        self.directory, self.tensor = directory, tensor
        self.heads, self.firsts = ([listen("127.0.0.1", 0) for _ in range(started)] for _ in range(2))

    def launch(self, model: EarlyExitModel, counts: Sequence[int] | None, work: Work, stage: Serve) -> dict[int, str]:
        """Let the head do ``work`` with an engine whose stages have so many layers (None: as measured), and every rank
        of a stage ``stage``; what each process has written."""
        try:
            with pytest.raises(AssertionError, match="died"):
                launch(1 + self.tensor * len(self.heads), self._run, model, counts, work, stage)
        finally:
            for listener in (*self.heads, *self.firsts):
                listener.close()
        return {int(path.name): path.read_text() for path in self.directory.iterdir()}

    def _run(self, model: EarlyExitModel, counts: Sequence[int] | None, work: Work, stage: Serve) -> None:
        rank, size = dist.get_rank(), self.tensor
        ranks = [list(range(1 + size * s, 1 + size * (s + 1))) for s in range(len(self.heads))]
        groups = [dist.new_group(each, timeout=timedelta(seconds=20)) for each in ranks]
        try:
            if rank == 0:
                found = self._lead(model, counts, work)
            else:
                number, place = divmod(rank - 1, size)
                Forked.listener, Forked.of_stage = self.firsts[number], groups[number]
                found = stage(self, model, number, place)
        except BaseException:
            found = traceback.format_exc()
        (self.directory / str(rank)).write_text(found)
        os._exit(1)

    def _lead(self, model: EarlyExitModel, counts: Sequence[int] | None, work: Work) -> str:
        options = replace(OPTIONS, tensor=self.tensor)
        weights, stages = weights_of_model(model, "none", options), 1 if counts is None else len(counts)
        pipeline = Pipeline(model, weights, Connecting(self.heads), stages=stages, layers_per_stage=counts)
        return work(PipelinedEngine(model, pipeline, options=options, costs=some_costs(model)))


def serve(stages: Stages, model: EarlyExitModel, number: int, place: int) -> str:
    """Be a rank of a stage."""
    address = (stages.firsts if place else stages.heads)[number].getsockname()
    link, opens = Link(socket.create_connection(address), "another"), InMemory(model)
    greet(link, KEY)
    if place:
        stage = Stage(link, words_of(link.receive()), opens, Forked.of_stage)
        link.say(ready=True)
        follow(Forked.of_stage, link, stage.perform)
    with patch.object(ranks, "Followers", Forked), suppress(Closed):
        serve_link(link, opens)
    return "the head ended"


def all_texts(engine: PipelinedEngine) -> str:
    """What the engine writes."""
    return str(texts(engine))


EXITS = (
    ExitConfig(layer=1, kind="block"),
    ExitConfig(layer=2, kind="mlp", candidates=40),
    ExitConfig(layer=3, kind="norm", output="low_rank", rank=9),
)
MODELS = {"llama": lambda: drafting_model("llama"), "gemma3_text": lambda: attach(tiny_model("gemma3_text"), EXITS)}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("counts", [(4,), (2, 2), (1, 3)], ids=str)
def test_stages_of_two_ranks_have_the_tokens_of_one_process(family: str, counts: Sequence[int], tmp_path: Path) -> None:
    """All modes at once; an exit at a cut, and with blocks for some of the texts only."""
    model = MODELS[family]()
    expected = str(texts(make_engine(model, options=OPTIONS)))
    found = Stages(tmp_path, 2, len(counts)).launch(model, counts, all_texts, serve)
    assert found[0] == expected


def test_four_ranks_have_the_tokens_of_one_process(tmp_path: Path) -> None:
    """One KV head each, parts of the vocabulary that are not of one length, candidates."""
    model = attach(tiny_model("gemma3_text", num_key_value_heads=4), EXITS)
    expected = str(texts(make_engine(model, options=OPTIONS)))
    assert Stages(tmp_path, 4, 1).launch(model, (4,), all_texts, serve)[0] == expected


# ---- ranks that are lost


def fifth(do: Callable[[], object]) -> Any:
    """Let a worker of this process do something else than its fifth pass."""
    perform, count = Worker.perform, itertools.count(1)

    def performed(worker: Worker, work: Any) -> Any:
        if next(count) == 5:
            do()
        return perform(worker, work)

    return patch.object(Worker, "perform", performed)


def fail() -> None:
    """What a pass may break off by."""
    raise ValueError("no memory is left")


def last_falls(stages: Stages, model: EarlyExitModel, number: int, place: int) -> str:
    """The second rank of the first stage ends in its fifth pass, which the first one has begun already."""
    with fifth(lambda: os._exit(1)) if (number, place) == (0, 1) else nullcontext():
        return serve(stages, model, number, place)


def last_fails(stages: Stages, model: EarlyExitModel, number: int, place: int) -> str:
    """Its fifth pass breaks off there, and not on the first rank."""
    with fifth(fail) if (number, place) == (0, 1) else nullcontext():
        return serve(stages, model, number, place)


def first_fails(stages: Stages, model: EarlyExitModel, number: int, place: int) -> str:
    """The fifth pass breaks off on the first rank, and not on the second one."""
    with fifth(fail) if (number, place) == (0, 0) else nullcontext():
        return serve(stages, model, number, place)


@pytest.mark.parametrize("how", [last_falls, last_fails])
def test_a_stage_that_loses_a_rank_ends_and_is_replaced(how: Serve, tmp_path: Path) -> None:
    """The first rank notices within the pass, and the head notices that; every text has its tokens."""
    model = MODELS["llama"]()
    found = Stages(tmp_path, 2, 2).launch(model, (4,), replaced, how)
    assert found[0] == f"1 {texts(make_engine(model, options=OPTIONS))}"
    assert "RankLost" in found[1]


def replaced(engine: PipelinedEngine) -> str:
    """How many stages were lost, and what the engine writes."""
    with pytest.warns(UserWarning, match="stage 1 of 1 was lost"):
        found = texts(engine)
    return f"{engine.lost} {found}"


def test_a_first_rank_that_fails_says_so_and_ends(tmp_path: Path) -> None:
    """Its requests have that error; the next ones are for a new stage, since the others are not in step with it."""
    model = MODELS["llama"]()
    found = Stages(tmp_path, 2, 2).launch(model, (4,), again, first_fails)
    assert found[0] == f"1 {texts(make_engine(model, options=OPTIONS))}"
    assert "RankLost: a pass broke off on the first rank" in found[1]


def again(engine: PipelinedEngine) -> str:
    """What the engine writes after its requests have failed."""
    with pytest.raises(RuntimeError, match="ValueError: no memory is left"):
        texts(engine)
    return replaced(engine)


def test_formats_of_the_native_kernels_are_refused() -> None:
    model, group = tiny_model("llama"), Any
    weights = replace(weights_of_model(model, "none", OPTIONS), quant="q8_0")
    with pytest.raises(UserError, match="quant 'q8_0' is a format of the native kernels, which tensor ranks lack"):
        _packed(model, weights, Share.of(model), group)  # type: ignore[arg-type]
