"""Many requests on one engine: each is answered or refused by itself, whoever comes, fails or leaves beside it."""

import copy
import dataclasses
import functools
import gc
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from exitlm.decode.engine import Engine, Event
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.kernels.runner import Arrived, Runner
from exitlm.decode.options import EngineConfig
from exitlm.decode.sequence import Draft
from exitlm.decode.sequence import Sequence as Text
from exitlm.errors import UserError
from exitlm.model.exits import ExitConfig
from tests.decode.models import attach, drafting_model, fade, generate, make_engine, random_ids
from tests.model.families import tiny_model

FREE: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full", **FREE},
    "threshold": {"mode": "threshold", "rule": "probability", "threshold": 0.05, **FREE},
    "lossless": {"mode": "lossless", "rule": "probability", "threshold": 0.02, "adaptive": False, **FREE},
}


def config(mode: str = "full", **over: Any) -> GenerationConfig:
    """Settings of a mode."""
    return GenerationConfig.of({**MODES[mode], **over})


@functools.cache
def reference() -> Engine:
    """An engine for one text at a time, which shares nothing."""
    return make_engine(drafting_model("llama"), options=EngineConfig(prefix_sharing=False))


def expected(prompt: Sequence[int], mode: str = "full", **over: Any) -> list[int]:
    """What a prompt gets alone."""
    return reference().generate(prompt, config(mode, **over)).token_ids


def check_idle(engine: Engine) -> None:
    """Nothing runs, and nothing is held."""
    assert not engine.roster.running
    assert not engine.roster.waiting
    assert not engine._sinks
    assert engine.memory.hidden.used == 0
    for allocator in engine.memory.pool.allocators:
        allocator.check()
        assert allocator.used == 0


def drain(engine: Engine) -> list[Event]:
    """Steps until nothing is left."""
    found = engine.step()
    while engine.roster.running or engine.roster.waiting:
        found += engine.step()
    return found


@pytest.fixture
def engine() -> Engine:
    return make_engine(drafting_model("llama"))


# ---- one bad request among good ones


def fails(ids: list[int], logits: Tensor) -> Tensor:
    """Raises at the third new token."""
    if len(ids) >= 9:
        raise ValueError("enough")
    return logits


def narrow(ids: list[int], logits: Tensor) -> Tensor:
    """Returns too few logits."""
    return logits[:-1]


def nothing(ids: list[int], logits: Tensor) -> Tensor:
    """Forbids everything."""
    return torch.full_like(logits, -torch.inf)


BAD: dict[str, tuple[list[int], dict[str, Any], str, int]] = {  # prompt, settings, message, tokens before
    "no tokens": ([], {}, "prompt is empty", 0),
    "unknown id": ([5, 97], {}, "token id 97", 0),
    "longer than the context": (random_ids(130), {}, "context is 128", 0),
    "longer than the pool": (random_ids(60), {"max_new_tokens": 60}, "kv_bytes holds", 0),
    "stop without tokenizer": ([5], {"stop": "x"}, "tokenizer", 0),
    "unknown exit": ([5], {"mode": "threshold", "exits": [9]}, "no exit at layer 9", 0),
    "bias beyond the vocabulary": ([5], {"logit_bias": {97: 1.0}}, "logit_bias has token id 97", 0),
    "bad words as texts": ([5], {"bad_words": ["x"]}, "tokenizer", 0),
    "a processor that raises": (random_ids(6), {"logits_processor": fails}, "fails raised ValueError: .*enough", 3),
    "a processor of another shape": (random_ids(6), {"logits_processor": narrow}, r"returned shape \[96\]", 0),
    "a processor that forbids all": (random_ids(6), {"logits_processor": nothing}, "no token is allowed", 0),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_fails_by_its_index_and_the_others_are_answered(name: str, mode: str) -> None:
    model = drafting_model("llama")
    room = make_engine(model).memory.pool.bytes_for(80)
    engine = make_engine(model, options=EngineConfig(kv_bytes=room))
    prompt, settings, message, before = BAD[name]
    requests = [(random_ids(5 + i, i), config(mode)) for i in range(3)]
    requests.insert(1, (prompt, config(**{"mode": mode, **settings})))
    outs = engine.generate_all(requests)
    assert [out.error is None for out in outs] == [True, False, True, True]
    assert outs[1].finish_reason == "error"
    assert outs[1].token_ids == []
    with pytest.raises(UserError, match=message):
        raise outs[1].error or AssertionError
    for i, out in enumerate([outs[0], *outs[2:]]):
        assert out.token_ids == expected(random_ids(5 + i, i), mode)
    check_idle(engine)

    errors, tokens = {}, Counter[int]()
    for piece in engine.stream_all(requests):
        tokens[piece.index] += len(piece.tokens)
        if piece.error is not None:
            errors[piece.index] = piece.error
    assert list(errors) == [1]
    assert str(errors[1]) == str(outs[1].error)
    assert tokens[1] == before
    assert [tokens[0], tokens[2], tokens[3]] == [12, 12, 12]
    with pytest.raises(UserError, match=message):
        engine.generate(*requests[1])
    with pytest.raises(UserError, match=message):
        list(engine.stream(*requests[1]))
    check_idle(engine)


def test_an_error_that_was_made_before_is_told_by_its_index(engine: Engine) -> None:
    wrong = UserError("prompt 1 can't be read")
    outs = engine.generate_all([([5, 6], config()), (wrong, config()), ([7, 8], config())])
    assert [out.error for out in outs] == [None, wrong, None]


@pytest.mark.parametrize("mode", MODES)
def test_logits_that_are_no_numbers_end_one_text_alone(mode: str) -> None:
    """One token's embedding is damaged; only the text that has it is lost."""
    model = copy.deepcopy(drafting_model("llama"))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        model.model.embed_tokens.weight[40] = math.nan
    prompts = [ids for ids in ([i + 3, *random_ids(8, i)] for i in range(30)) if 40 not in ids]
    plain = make_engine(model)  # a draft of token 40 would harm the rows before it
    prompts = [ids for ids in prompts if plain.generate_all([(ids, config(mode))])[0].error is None][:4]
    engine = make_engine(model, options=EngineConfig(block_size=2))
    outs = engine.generate_all([(ids, config(mode)) for ids in [*prompts[:2], [40, 5, 6, 7], *prompts[2:]]])
    assert "new token 1 are not finite" in str(outs[2].error)
    for ids, out in zip(prompts, outs[:2] + outs[3:], strict=True):
        assert out.token_ids == expected(ids, mode)
    again = engine.generate_all([(ids, config(mode)) for ids in prompts])  # in blocks that the lost text had
    assert [out.token_ids for out in again] == [expected(ids, mode) for ids in prompts]
    check_idle(engine)


def test_one_of_several_choices_that_fails_is_enough(engine: Engine) -> None:
    calls: list[int] = []

    def late(ids: list[int], logits: Tensor) -> Tensor:
        calls.append(len(ids))
        if len(calls) == 7:
            raise ValueError("now")
        return logits

    settings: dict[str, Any] = {"temperature": 1.0, "seed": 1}
    outs = engine.generate_all(
        [([5, 6], config(n=3, logits_processor=late, **settings)), ([7, 8], config(n=2, **settings))]
    )
    assert "now" in str(outs[0].error)
    assert outs[0].choices == []
    alone = make_engine(drafting_model("llama")).generate([7, 8], config(n=2, **settings))
    assert [choice.token_ids for choice in outs[1].choices] == [choice.token_ids for choice in alone.choices]
    check_idle(engine)


def test_several_greedy_texts_are_warned_of(engine: Engine) -> None:
    with pytest.warns(UserWarning, match="n has no effect without a temperature above 0"):
        chosen = config(n=2)
    outs = engine.generate([5, 6], chosen)
    assert outs.choices[0].token_ids == outs.choices[1].token_ids


# ---- streams, threads, aborts


def test_pieces_carry_index_and_choice(engine: Engine) -> None:
    requests = [
        (random_ids(4), config("full")),
        (random_ids(9, 1), config("threshold", temperature=1.0, seed=3, n=3)),
        (random_ids(2, 2), config("lossless", max_new_tokens=5)),
    ]
    outs = engine.generate_all(requests)
    texts: dict[tuple[int, int], list[int]] = {}
    order = []
    for piece in engine.stream_all(requests):
        texts.setdefault((piece.index, piece.choice), []).extend(piece.token_ids)
        order.append(piece.index)
    assert sorted(texts) == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0)]
    for (index, choice), ids in texts.items():
        assert ids == (outs[index].choices or [outs[index]])[choice].token_ids
    assert order != sorted(order)  # they came side by side
    single = list(engine.stream(*requests[1]))
    assert {piece.choice for piece in single} == {0, 1, 2}
    assert {piece.index for piece in single} == {0}


def test_a_generation_within_a_stream(engine: Engine) -> None:
    found, inner = [], []
    for piece in engine.stream(random_ids(5), config("threshold")):
        found += piece.token_ids
        inner.append(engine.generate(random_ids(7, 1), config("lossless")).token_ids)
    assert found == expected(random_ids(5), "threshold")
    assert inner == [expected(random_ids(7, 1), "lossless")] * 12
    check_idle(engine)


def test_two_threads_on_one_engine(engine: Engine) -> None:
    """And one of them asks only for what the other has begun."""
    found: dict[tuple[int, int], list[int]] = {}

    def work(number: int) -> None:
        for turn in range(6):
            mode = list(MODES)[(number + turn) % 3]
            out = engine.generate(random_ids(3 + turn, number), config(mode, temperature=0.8, seed=turn))
            found[number, turn] = out.token_ids

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(3):
        for turn in range(6):
            mode = list(MODES)[(number + turn) % 3]
            wanted = expected(random_ids(3 + turn, number), mode, temperature=0.8, seed=turn)
            assert found[number, turn] == wanted
    check_idle(engine)


def test_an_abort_from_another_thread_ends_a_text_within_one_step(engine: Engine) -> None:
    inside, go = threading.Event(), threading.Event()

    def slow(ids: list[int], logits: Tensor) -> Tensor:
        if len(ids) == 8:
            inside.set()
            assert go.wait(30)
        return logits

    doomed = engine.add(random_ids(6), config(logits_processor=slow))
    other = engine.add(random_ids(4, 1), config())
    events: list[Event] = []
    worker = threading.Thread(target=lambda: events.extend(drain(engine)))
    aborter = threading.Thread(target=engine.abort, args=(doomed,))
    worker.start()
    assert inside.wait(30)
    aborter.start()  # while the step is under way
    go.set()
    aborter.join(30)
    worker.join(30)
    tokens = [i for event in events if event.key == doomed and event.piece for i in event.piece.token_ids]
    assert not any(event.last for event in events if event.key == doomed)
    assert 2 <= len(tokens) < 12
    (end,) = [event.generation for event in events if event.generation is not None]
    assert end.token_ids == expected(random_ids(4, 1))
    assert other == next(event.key for event in events if event.last)
    check_idle(engine)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_comes_of_a_text_after_its_abort(engine: Engine, mode: str) -> None:
    for steps in (0, 1, 2, 5):
        doomed = [engine.add(random_ids(9, i), config(mode)) for i in range(3)]
        kept = engine.add(random_ids(5), config(mode))
        for _ in range(steps):
            engine.step()
        for key in doomed:
            engine.abort(key)
            engine.abort(key)
        events = drain(engine)
        assert {event.key for event in events} == {kept}
        assert events[-1].generation is not None
        assert events[-1].generation.token_ids == expected(random_ids(5), mode)
        check_idle(engine)
    engine.abort(-5)
    engine.abort(10**9)


def test_what_had_come_of_a_text_is_gone_with_its_abort(engine: Engine) -> None:
    """A generation in between took the step that brought its first tokens."""
    doomed = engine.add(random_ids(9), config())
    engine.generate(random_ids(5), config(max_new_tokens=3))
    assert engine.roster.running
    engine.abort(doomed)
    assert engine.step() == []
    check_idle(engine)


def test_a_stream_that_is_dropped_while_others_run(engine: Engine) -> None:
    kept = engine.stream(random_ids(5), config("threshold"))
    tokens = next(kept).token_ids
    for take in (1, 3):
        dropped = engine.stream_all([(random_ids(9, i), config("lossless")) for i in range(3)])
        for _ in range(take):
            next(dropped)
        assert len(engine.roster.running) == 4
        del dropped
        gc.collect()
        assert len(engine.roster.running) == 1
    tokens += [i for piece in kept for i in piece.token_ids]
    assert tokens == expected(random_ids(5), "threshold")
    check_idle(engine)


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_ends_within_a_step_of_another(engine: Engine, mode: str) -> None:
    """As when the last reference to it goes away in the middle of a pass that it is part of."""
    closing: list[Any] = []

    def closer(ids: list[int], logits: Tensor) -> Tensor:
        if len(ids) == 9:
            for stream in closing:
                stream.close()
        return logits

    streams = [engine.stream(random_ids(6, 1), config(mode)), engine.stream(random_ids(7, 2), config(mode))]
    closing += streams
    tokens = next(streams[0]).token_ids + next(streams[1]).token_ids
    out = engine.generate(random_ids(6), config(mode, logits_processor=closer))
    assert out.token_ids == expected(random_ids(6), mode)
    assert tokens
    check_idle(engine)


def test_a_processor_that_decodes_with_its_own_engine_is_refused(engine: Engine) -> None:
    other = make_engine(drafting_model("llama"))

    def asks(ids: list[int], logits: Tensor, whom: Engine = engine) -> Tensor:
        whom.generate([5, 6], config("threshold", max_new_tokens=2))
        return logits

    def asks_another(ids: list[int], logits: Tensor) -> Tensor:
        return asks(ids, logits, other)

    requests = [(random_ids(6 + i, i), config("threshold")) for i in range(3)]
    requests[1] = (random_ids(7, 1), config("threshold", logits_processor=asks))
    outs = engine.generate_all(requests)
    assert "needs an engine of its own" in str(outs[1].error)
    assert [outs[i].token_ids for i in (0, 2)] == [expected(random_ids(6 + i, i), "threshold") for i in (0, 2)]
    check_idle(engine)
    out = engine.generate(random_ids(7, 1), config("threshold", logits_processor=asks_another))
    assert out.token_ids == expected(random_ids(7, 1), "threshold")


# ---- as a server uses it


def test_events_come_in_order_and_end_with_the_generation(engine: Engine) -> None:
    rng, keys, found = random.Random(3), {}, dict[int, list[Event]]()
    left = [(random_ids(rng.randint(1, 20), i), config(rng.choice(list(MODES)))) for i in range(12)]
    requests = list(left)
    while left or engine.roster.running or engine.roster.waiting:
        for _ in range(rng.choice([0, 0, 1, 2])):
            if left:
                keys[engine.add(*left.pop(0))] = len(keys)
        for event in engine.step():
            found.setdefault(event.key, []).append(event)
    assert engine.step() == []
    assert sorted(found) == sorted(keys)
    for key, events in found.items():
        prompt, chosen = requests[keys[key]]
        assert [event.last for event in events] == [False] * (len(events) - 1) + [True]
        assert all(event.error is None and event.piece is not None for event in events)
        out = events[-1].generation
        assert out is not None
        assert [i for event in events if event.piece for i in event.piece.token_ids] == out.token_ids
        assert out.token_ids == expected(prompt, chosen.mode)
    check_idle(engine)


def test_a_request_that_comes_when_all_others_have_left(engine: Engine) -> None:
    engine.add(random_ids(4), config())
    drain(engine)
    assert engine.step() == []
    key = engine.add(random_ids(5, 1), config("lossless"))
    (end,) = [event for event in drain(engine) if event.last]
    assert end.key == key
    assert end.generation is not None
    assert end.generation.token_ids == expected(random_ids(5, 1), "lossless")


def test_a_request_that_is_refused_was_not_added(engine: Engine) -> None:
    for prompt, settings in (([], {}), ([5], {"stop": "x"}), ([5], {"exits": [9], "mode": "threshold"})):
        with pytest.raises(UserError):
            engine.add(prompt, config(**settings))
    check_idle(engine)
    assert engine.step() == []


def test_an_error_of_one_text_is_its_last_event(engine: Engine) -> None:
    bad, good = engine.add(random_ids(6), config(logits_processor=fails)), engine.add(random_ids(6, 1), config())
    events = drain(engine)
    last = {event.key: event for event in events if event.last}
    assert isinstance(last[bad].error, UserError)
    assert last[good].generation is not None
    came = [event for event in events if event.key == bad]
    assert came[-1] is last[bad]
    assert sum(len(event.piece.tokens) for event in came if event.piece) == 3


# ---- scores of a prompt


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "smollm3"])
def test_scores_of_a_prompt_are_those_of_the_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a new token, in chunks of any length, with others beside, and never many rows of logits at once."""
    rows: list[int] = []
    final_logits = Runner.final_logits

    def spy(self: Runner, arrived: Arrived, wanted: Sequence[int]) -> Tensor:
        rows.append(len(wanted))
        return final_logits(self, arrived, wanted)

    monkeypatch.setattr(Runner, "final_logits", spy)
    model = drafting_model(family)
    prompt = random_ids(100)
    log_p = torch.log_softmax(model.logits(prompt)[0], -1)
    for chunk, most in ((512, 0), (7, 3)):
        engine = make_engine(model, options=EngineConfig(prefill_chunk=chunk, block_size=4))
        scores = config(max_new_tokens=0, prompt_logprobs=most)
        busy = (random_ids(9), config("threshold"))
        other = (random_ids(80, 1), config())
        outs = engine.generate_all([busy, (prompt, scores), other, (prompt[:1], scores)])
        out = outs[1]
        assert (out.token_ids, out.finish_reason, out.text) == ([], "length", None)
        assert len(out.prompt_logprobs) == 99
        for at, (value, tops) in enumerate(out.prompt_logprobs):
            assert value == pytest.approx(float(log_p[at, prompt[at + 1]]), abs=1e-11)
            best = log_p[at].topk(most)
            assert list(tops) == best.indices.tolist()
            assert list(tops.values()) == pytest.approx(best.values.tolist(), abs=1e-11)
        assert outs[3].prompt_logprobs == []
        assert out.stats.prefill_seconds > 0
        assert out.stats.tokens == 0
        alone = make_engine(model).generate(*busy)
        assert outs[0].token_ids == alone.token_ids
        check_idle(engine)
    assert max(rows) == 64


def test_scores_of_a_prompt_come_with_its_text(engine: Engine) -> None:
    prompt = random_ids(20)
    log_p = torch.log_softmax(drafting_model("llama").logits(prompt)[0], -1)
    for mode in MODES:
        engine.generate(prompt, config(mode))  # whose blocks would be shared
        out = engine.generate(prompt, config(mode, prompt_logprobs=0))
        assert out.token_ids == expected(prompt, mode)
        assert [value for value, _ in out.prompt_logprobs] == pytest.approx(
            [float(log_p[at, prompt[at + 1]]) for at in range(19)], abs=1e-11
        )


def test_scores_are_listed_once_when_a_prompt_is_preempted() -> None:
    model = drafting_model("llama")
    room = make_engine(model, options=EngineConfig(block_size=1)).memory.pool.bytes_for(44)
    engine = make_engine(model, options=EngineConfig(prefill_chunk=3, block_size=1, kv_bytes=room))
    prompt = random_ids(35, 3)
    outs = engine.generate_all(
        [(random_ids(10), config(max_new_tokens=30)), (prompt, config(max_new_tokens=3, prompt_logprobs=0))]
    )
    assert outs[1].stats.preemptions > 0
    log_p = torch.log_softmax(model.logits(prompt)[0], -1)
    assert [value for value, _ in outs[1].prompt_logprobs] == pytest.approx(
        [float(log_p[at, prompt[at + 1]]) for at in range(34)], abs=1e-11
    )


def test_a_prompt_without_new_tokens_and_without_scores_is_computed(engine: Engine) -> None:
    """So that texts that begin like it share its keys."""
    out = engine.generate(random_ids(70), config(max_new_tokens=0))
    assert (out.token_ids, out.prompt_logprobs, out.finish_reason) == ([], [], "length")
    assert engine.generate(random_ids(70), config()).stats.shared_tokens == 64


def test_drafts_of_a_round_are_as_many_as_rows_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    final_logits = Runner.final_logits

    def spy(self: Runner, arrived: Arrived, wanted: Sequence[int]) -> Tensor:
        rows.append(len(wanted))
        return final_logits(self, arrived, wanted)

    monkeypatch.setattr(Runner, "final_logits", spy)
    model = attach(fade(tiny_model("llama"), 3, 0.0), [ExitConfig(layer=2, kind="norm")])
    for draft in ("lookup", "exits"):
        out = generate(
            make_engine(model), random_ids(4) * 5, max_new_tokens=90, threshold=0.0, max_draft=99, draft=draft,
            adaptive=False, ignore_eos=True,
        )  # fmt: skip
        assert out.stats.drafted >= 63
    assert max(rows) == 64


@pytest.mark.parametrize("most", [1, 2, 5])
def test_all_drafts_of_a_round_together_are_no_more_than_allowed(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    extend = Text.extend_drafts

    def spy(self: Text, drafts: Sequence[Draft]) -> bool:
        found = extend(self, drafts)
        lengths.append(len(self.drafts))
        return found

    monkeypatch.setattr(Text, "extend_drafts", spy)
    sources = Counter[str]()
    for seed in range(6):
        out = reference().generate(random_ids(4, seed) * 3, config("lossless", max_draft=most, max_new_tokens=40))
        sources.update(token.source for token in out.trace)
    assert max(lengths) == most
    assert min(sources["exit"], sources["lookup"]) > 0


# ---- memory


def test_memory_that_is_short_is_not_taken_for_drafts() -> None:
    """A text whose drafts found no room would give its memory, come back, draft again, and so on."""
    model = drafting_model("llama")
    room = make_engine(model, options=EngineConfig(block_size=1)).memory.pool.bytes_for(70)
    engine = make_engine(model, options=EngineConfig(block_size=1, kv_bytes=room))
    requests = [
        (random_ids(4, seed) * 3, config("lossless", threshold=0.0, max_new_tokens=50, max_draft=12))
        for seed in range(4)
    ]
    outs = engine.generate_all(requests)
    for (prompt, chosen), out in zip(requests, outs, strict=True):
        assert out.token_ids == reference().generate(prompt, chosen).token_ids
    assert 0 < sum(out.stats.preemptions for out in outs) <= 12
    assert sum(out.stats.drafted for out in outs) > 100


@pytest.mark.parametrize(
    ("family", "size"),
    [("llama", 32), ("mistral", 1), ("mistral", 32), ("gemma3_text", 1), ("gemma3_text", 32), ("phi3", 8)],
)
def test_a_budget_that_is_too_small_names_the_least_that_works(family: str, size: int) -> None:
    model, prompt, chosen = drafting_model(family), random_ids(90), config("lossless", max_new_tokens=30)
    wanted = make_engine(model).generate(prompt, chosen).token_ids
    options = EngineConfig(block_size=size, prefill_chunk=16, max_rows=16, max_sequences=8)
    budget = make_engine(model, options=options).memory.pool.bytes_for(1)
    small = make_engine(model, options=dataclasses.replace(options, kv_bytes=budget))
    with pytest.raises(
        UserError, match=r"up to 120 tokens, but engine.kv_bytes holds \d+; .* set it to \d+ or more$"
    ) as e:
        small.generate(prompt, chosen)
    least = int(str(e.value).split()[-3])
    engine = make_engine(model, options=dataclasses.replace(options, kv_bytes=least))
    assert engine.memory.pool.nbytes() <= least
    assert engine.generate(prompt, chosen).token_ids == wanted
    with pytest.raises(UserError, match=f"set it to {least} or more"):
        make_engine(model, options=dataclasses.replace(options, kv_bytes=least - 1)).generate(prompt, chosen)


def test_a_budget_for_no_block_names_one_that_works() -> None:
    model = drafting_model("llama")
    with pytest.raises(
        UserError, match=r"kv_bytes = 5 holds not one block of 32 positions, which takes \d+; raise it"
    ) as e:
        make_engine(model, options=EngineConfig(kv_bytes=5))
    enough = int(str(e.value).split()[-3].rstrip(";"))
    engine = make_engine(model, options=EngineConfig(kv_bytes=enough))
    assert len(engine.generate([5, 6], config()).token_ids) == 12
    with pytest.raises(UserError):
        make_engine(model, options=EngineConfig(kv_bytes=enough - 1))


@pytest.mark.parametrize("draft", ["exits", "lookup"])
def test_windows_hold_any_length_of_text_and_any_drafts(draft: str) -> None:
    """A sequence whose pending rows filled its windows would take its own memory, for ever."""
    model = attach(fade(tiny_model("mistral", num_hidden_layers=2), 2, 0.0), [ExitConfig(layer=1, kind="norm")])
    options = EngineConfig(block_size=1, max_sequences=1, max_rows=2, prefill_chunk=1)
    settings: dict[str, Any] = {
        "threshold": 0.0, "max_draft": 90, "max_pending": 90, "adaptive": False, "max_new_tokens": 75, "draft": draft,
        "ignore_eos": True,
    }  # fmt: skip
    for mode in ("lossless", "threshold"):
        engine = make_engine(model, options=options)
        assert engine.memory.pool.blocks == [73]
        chosen = GenerationConfig(mode=mode, **settings)
        out, free = (each.generate(random_ids(3) * 4, chosen) for each in (engine, make_engine(model)))
        assert out.token_ids == free.token_ids
        check_idle(engine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_bytes": 0}, "engine.kv_bytes"), ({"kv_bytes": "1G"}, "engine.kv_bytes"),
        ({"kv_bytes": 1.5}, "engine.kv_bytes"),
        ({"block_size": 0}, "engine.block_size"), ({"block_size": True}, "engine.block_size"),
        ({"max_rows": 0}, "engine.max_rows"), ({"max_sequences": -1}, "engine.max_sequences"),
        ({"prefill_chunk": None}, "engine.prefill_chunk"), ({"prefix_sharing": "yes"}, "engine.prefix_sharing"),
        ({"max_wait": -0.1}, "engine.max_wait"), ({"max_wait": math.nan}, "engine.max_wait"),
        ({"max_wait": math.inf}, "engine.max_wait"), ({"max_wait": "x"}, "engine.max_wait"),
        ({"block_sise": 8}, "no setting 'block_sise'.*block_size"),
    ],
)  # fmt: skip
def test_engine_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EngineConfig.of(settings)


def many_short(count: int) -> None:
    """Requests through a pool that holds eight sequences at most."""
    model, rng = drafting_model("gemma3_text"), random.Random(count)
    room = make_engine(model).memory.pool.bytes_for(8 * 32)
    engine = make_engine(model, options=EngineConfig(kv_bytes=room, block_size=8, max_sequences=8))
    blocks = list(engine.memory.pool.blocks)
    prompts = [random_ids(rng.randint(1, 20), rng.randrange(40)) for _ in range(count)]
    configs = [config(rng.choice(list(MODES)), max_new_tokens=rng.choice([1, 4, 8])) for _ in range(count)]
    alone: dict[Any, list[int]] = {}
    reference: Callable[..., Any] = make_engine(model).generate
    most = 0
    for index, out in engine.finished(list(zip(prompts, configs, strict=True))):
        name = (tuple(prompts[index]), configs[index].mode, configs[index].max_new_tokens)
        if name not in alone:
            alone[name] = reference(prompts[index], configs[index]).token_ids
        assert out.error is None
        assert out.token_ids == alone[name]
        most = max(most, len(engine.memory.hidden.states_SD))
    check_idle(engine)
    assert engine.memory.pool.blocks == blocks
    assert most <= 8 * 32  # slots of hidden states
    for allocator in engine.memory.pool.allocators:
        allocator.clear()
        assert (allocator.used, allocator.cached, allocator.free) == (0, 0, allocator.num_blocks)
    assert not engine._outbox


def test_many_short_requests() -> None:
    many_short(200)


@pytest.mark.slow
def test_very_many_short_requests() -> None:
    many_short(2000)
