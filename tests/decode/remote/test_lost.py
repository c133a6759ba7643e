"""Stages that die, hang, lie or talk nonsense: every text is answered once, or its error says which stage it was."""

import math
import os
import random
import socket
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest

from exitlm.decode.generation import GenerationConfig
from exitlm.decode.remote.engine import PipelinedEngine
from exitlm.decode.remote.frames import HEADER, MAGIC, Frame, Kind
from exitlm.decode.remote.hello import Refused
from exitlm.decode.remote.link import Link
from exitlm.decode.remote.lost import PipelineDown
from exitlm.decode.remote.stage import serve_link
from exitlm.decode.remote.worker import Worker
from exitlm.decode.work import Brought, Work
from exitlm.errors import UserError
from tests.decode.arithmetic import FLOAT64
from tests.decode.company import Letters, company_model
from tests.decode.models import random_ids
from tests.decode.remote.threads import InMemory, InThreads, pipelined


def requests(count: int, seed: int) -> list[tuple[list[int], GenerationConfig]]:
    """Prompts and settings in all modes."""
    rng = random.Random(seed)
    modes = ["full", "threshold", "lossless"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            (
                random_ids(rng.randint(2, 9), seed * 100 + i),
                GenerationConfig(
                    mode=modes[i % 3], max_new_tokens=rng.randint(4, 24), ignore_eos=True, seed=i, threshold=0.05,
                    temperature=rng.choice([0.0, 0.8]), rule="probability",
                ),
            )
            for i in range(count)
        ]  # fmt: skip


def decode(
    engine: PipelinedEngine, some: list[tuple[list[int], GenerationConfig]], at: dict[int, int],
    kill: Callable[[int], None] = lambda number: None,
) -> list[list[int]]:  # fmt: skip
    """All texts, each of which has to end once; ``kill`` is called for stage ``at[step]`` before the step of this
    number."""
    keys = [engine.add(prompt, config) for prompt, config in some]
    found: dict[int, list[int]] = {}
    told: dict[int, list[int]] = {key: [] for key in keys}
    step = 0
    while len(found) < len(keys):
        if step in at:
            kill(at[step])
        for event in engine.step():
            assert event.error is None, event.error
            assert event.key not in found  # nothing follows the end
            if event.piece is not None:
                told[event.key] += [token.id for token in event.piece.tokens]
            if event.generation is not None:
                found[event.key] = event.generation.token_ids
        step += 1
        assert step < 5000
    assert found == told  # each token was told once
    return [found[key] for key in keys]


def kills(seed: int, times: int) -> None:
    """Stages die ``times`` times while texts are decoded."""
    rng = random.Random(seed)
    model, some = company_model("llama", seed % 3, FLOAT64), requests(9, seed)
    options = replace(FLOAT64.options(), block_size=4)
    plain = FLOAT64.engine(model, tokenizer=Letters(), options=options)
    expected = [plain.generate(*request).token_ids for request in some]
    launcher = InThreads(model)
    engine = pipelined(model, [1, 1, 2], launcher=launcher, options=options, tokenizer=Letters())
    try:
        at = {step: rng.choice([1, 2]) for step in rng.sample(range(2, 40), times)}
        with pytest.warns(UserWarning, match="was lost"):
            assert decode(engine, some, at, launcher.kill) == expected
        assert 1 <= engine.lost <= times
        assert len(launcher.started) == 2 + engine.lost
    finally:
        engine.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_stage_that_dies_twice_costs_no_text(seed: int) -> None:
    kills(seed, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 8))
def test_a_stage_that_dies_twenty_times_costs_no_text(seed: int) -> None:
    kills(seed, 20)


class Ends(InThreads):
    """A launcher that has no stage any more after the first ones."""

    over = False

    def start(self, number: int) -> Link:
        """One of the first."""
        if self.over:
            raise UserError("there is no other machine")
        return super().start(number)


def test_a_stage_that_cant_be_replaced_ends_its_texts_with_a_clear_error_and_others_follow() -> None:
    model, some = company_model("llama", 0, FLOAT64), requests(4, 0)
    launcher = Ends(model)
    engine = pipelined(model, [2, 2], launcher=launcher, tokenizer=Letters())
    keys = [engine.add(*request) for request in some]
    engine.step()
    launcher.over = True
    launcher.kill(1)
    errors: dict[int, Exception] = {}

    def fail() -> None:
        while len(errors) < len(keys):
            errors.update({event.key: event.error for event in engine.step() if event.error is not None})

    with pytest.warns(UserWarning, match="stage 2 of 2 was lost"):
        fail()
    assert all(isinstance(error, PipelineDown) for error in errors.values())
    assert str(errors[keys[0]]) == "stage 2 of 2 ended and can't be replaced: there is no other machine"
    assert engine.memory.hidden.used == 0
    launcher.over = False
    plain = FLOAT64.engine(model, tokenizer=Letters())
    assert engine.generate(*some[0]).token_ids == plain.generate(*some[0]).token_ids
    engine.close()


def test_a_stage_that_does_not_answer_is_given_up_by_name() -> None:
    model, some = company_model("llama", 0, FLOAT64), requests(3, 1)
    hung: list[bool] = []

    def once(link: Link, opens: InMemory) -> None:
        if hung:
            serve_link(link, opens)
        hung.append(True)
        link.send, kept = (
            lambda frame, timeout=60.0: None if frame.kind == Kind.DONE else kept(frame, timeout),
            link.send,
        )
        serve_link(link, opens)

    expected = [FLOAT64.engine(model, tokenizer=Letters()).generate(*request).token_ids for request in some]
    engine = pipelined(model, [2, 2], serve=once, timeout=0.3, tokenizer=Letters())
    with pytest.warns(UserWarning, match="stage 2 did not answer in time"):
        assert decode(engine, some, {}) == expected
    engine.close()


NONSENSE = {
    "garbage": b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + b"x" * 64,
    "four gigabytes": HEADER.pack(MAGIC, Kind.DONE, 0, 0, 0, 4 << 30),
    "an answer to nothing": None,
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_closes_the_link_and_nothing_else(what: str) -> None:
    model, some = company_model("llama", 0, FLOAT64), requests(3, 2)
    expected = [FLOAT64.engine(model, tokenizer=Letters()).generate(*request).token_ids for request in some]
    launcher = InThreads(model)
    engine = pipelined(model, [2, 2], launcher=launcher, tokenizer=Letters())
    data, far = NONSENSE[what], launcher.far[1]
    if data is None:
        Link(far.dup(), "a liar").send(Frame(Kind.DONE, [77, 0, 0, 0, 0], [0.1]))
    else:
        far.sendall(data)
    with pytest.warns(UserWarning, match="stage 2 of 2 was lost"):
        assert decode(engine, some, {}) == expected
    engine.close()


@pytest.mark.parametrize("what", NONSENSE)
def test_a_stage_hangs_up_on_a_head_that_talks_nonsense(what: str) -> None:
    near, far = socket.socketpair()
    link, data = Link(far, "the head"), NONSENSE[what]
    if data is None:
        Link(near.dup(), "a liar").send(Frame(Kind.DONE, [77, 0, 0, 0, 0], [0.1]))
    else:
        near.sendall(data)
    from exitlm.decode.remote.frames import BadFrame

    with pytest.raises(BadFrame):
        serve_link(link, InMemory(company_model("llama", 0, FLOAT64)))


class OtherWeights(InMemory):
    """Weights whose digest is another."""

    def digest(self, source: str) -> str:
        """Of others."""
        return "of others"


def test_a_stage_with_other_weights_is_refused_by_name() -> None:
    model = company_model("llama", 0, FLOAT64)
    with pytest.raises(Refused, match="the weights of this stage have digest of others"):
        pipelined(model, [2, 2], serve=lambda link, opens: serve_link(link, OtherWeights(model)))


def test_a_stage_that_takes_other_weights_for_the_head_s_is_refused_by_name() -> None:
    model = company_model("llama", 0, FLOAT64)

    def lies(link: Link, opens: InMemory) -> None:
        say = link.say
        link.say = lambda **words: say(**{k: "of others" if k == "accepted" else v for k, v in words.items()})
        serve_link(link, opens)

    with pytest.raises(Refused, match="stage 2 has other weights than this head"):
        pipelined(model, [2, 2], serve=lies)


def test_a_stage_that_computes_otherwise_is_refused_by_name() -> None:
    model = company_model("llama", 0, FLOAT64)

    def lies(link: Link, opens: InMemory) -> None:
        say = link.say
        link.say = lambda **words: say(
            **{k: {**v, "kernels": "native neon"} if k == "ready" else v for k, v in words.items()}
        )
        serve_link(link, opens)

    with pytest.raises(Refused, match="stage 2 runs by native neon with quant none, but this head by torch"):
        pipelined(model, [2, 2], serve=lies)


def test_a_pass_that_breaks_off_in_a_stage_ends_what_runs_and_names_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    model = company_model("llama", 0, FLOAT64)
    engine = pipelined(model, [2, 2], tokenizer=Letters())
    perform, broken = Worker.perform, [True]

    def breaks(worker: Worker, work: object) -> object:
        if worker.runner.fused.share.ends and broken:
            broken.clear()
            raise MemoryError("no room")
        return perform(worker, work)  # type: ignore[arg-type]

    monkeypatch.setattr(Worker, "perform", breaks)
    with pytest.raises(RuntimeError, match="stage 2: MemoryError: no room"):
        engine.generate([1, 2, 3], GenerationConfig(max_new_tokens=4))
    monkeypatch.undo()
    assert len(engine.generate([1, 2, 3], GenerationConfig(max_new_tokens=4, ignore_eos=True)).token_ids) == 4
    engine.close()


def test_an_interrupt_in_a_pass_of_the_first_stage_leaves_an_engine_that_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = company_model("llama", 0, FLOAT64)
    engine = pipelined(model, [2, 2], tokenizer=Letters())
    perform = Worker.perform

    def interrupted(worker: Worker, work: Work) -> Brought:
        if worker.runner.fused.share.layers.start == 0:
            monkeypatch.setattr(Worker, "perform", perform)
            raise KeyboardInterrupt
        return perform(worker, work)

    config = GenerationConfig(max_new_tokens=4, ignore_eos=True)
    expected = engine.generate([1, 2, 3], config).token_ids
    for _ in range(3):
        monkeypatch.setattr(Worker, "perform", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([1, 2, 3], config)
        assert engine.generate([1, 2, 3], config).token_ids == expected
    engine.close()


@pytest.mark.parametrize("lie", ["no rows", "a token beyond the vocabulary", "a time that never was"])
def test_a_stage_whose_answers_can_t_be_is_replaced(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = company_model("llama", 0, FLOAT64), requests(3, 4)
    expected = [FLOAT64.engine(model, tokenizer=Letters()).generate(*request).token_ids for request in some]
    engine = pipelined(model, [2, 2], tokenizer=Letters())
    perform = Worker.perform

    def lies(worker: Worker, work: Work) -> Brought:
        found = perform(worker, work)
        if not found.finals:
            return found
        monkeypatch.setattr(Worker, "perform", perform)
        if lie == "no rows":
            return replace(found, finals={})
        if lie == "a time that never was":
            return replace(found, seconds=math.nan)
        return replace(found, finals={row: replace(one, best=1 << 40) for row, one in found.finals.items()})

    monkeypatch.setattr(Worker, "perform", lies)
    with pytest.warns(UserWarning, match="an answer came that is none to what was asked"):
        assert decode(engine, some, {}) == expected
    engine.close()


def test_descriptors_of_any_number_are_waited_for() -> None:
    resource = pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1300:
        pytest.skip("this system allows too few open files")
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        engine = pipelined(company_model("llama", 0, FLOAT64), [2, 2], tokenizer=Letters())
        assert max(link.fileno() for link in engine.pipeline.links.values()) > 1024
        config = GenerationConfig(max_new_tokens=4, ignore_eos=True)
        assert len(engine.generate([1, 2, 3], config).token_ids) == 4
        engine.close()
    finally:
        for number in held:
            os.close(number)


def test_a_closed_engine_says_so() -> None:
    engine = pipelined(company_model("llama", 0, FLOAT64), [2, 2], tokenizer=Letters())
    stream = engine.stream([1, 2, 3], GenerationConfig(max_new_tokens=8, ignore_eos=True))
    next(stream)
    engine.close()
    with pytest.raises(UserError, match="the engine was closed"):
        list(stream)


def test_a_stage_that_dies_while_nothing_is_decoded_is_replaced_when_it_is_looked_after() -> None:
    launcher = InThreads(company_model("llama", 0, FLOAT64))
    engine = pipelined(company_model("llama", 0, FLOAT64), [2, 2], launcher=launcher, tokenizer=Letters())
    engine.tend()
    assert engine.lost == 0
    launcher.kill(1)
    with pytest.warns(UserWarning, match="stage 2 of 2 was lost"):
        engine.tend()
    assert engine.lost == 1
    engine.close()
