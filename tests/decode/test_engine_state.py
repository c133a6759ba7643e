"""Random histories of an engine: texts come, step, stop and are dropped in any order, and nothing that they held of the
pools is lost, held twice or written by two."""

import dataclasses
import functools
import random
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from exitlm.decode import accounts
from exitlm.decode.cache.block_allocator import BlockAllocator
from exitlm.decode.engine import Engine
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.options import EngineConfig
from exitlm.decode.pricing.scheduler import Pass
from exitlm.decode.sequence import Sequence
from exitlm.decode.streams import Event
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.company import Letters, check_state, draw_config
from tests.decode.models import attach, fade, fit_lenses, make_engine, random_ids, some_costs
from tests.model.families import tiny_model

KINDS = (("lens",), ("block", "lens"), ("norm", "block", "lens"), ("mlp", "lens", "block"))
Choose = Callable[[list[Sequence]], Pass | None]
STEM = random_ids(14, 1)
LONGEST = 14 + 2 * 6 + 17  # a prompt and the most new tokens that are drawn
PLACES = st.integers(0, 99)


SEEDS = st.integers(0, 2**63 - 1)  # what is drawn from a seed is as even as hypothesis is not
DRAFTS: dict[str, Any] = {
    "mode": "lossless", "draft": ("exits",), "rule": "probability", "threshold": 0.0, "adaptive": True,
    "max_new_tokens": 17, "max_draft": None, "max_pending": None, "ignore_eos": True, "stop": (), "stop_token_ids": (),
}  # fmt: skip


@functools.cache
def some_model(family: str, kinds: tuple[str, ...]) -> EarlyExitModel:
    """Four layers with exits of these kinds behind the first ones, often right; windows where the family has them."""
    with torch.inference_mode(False):
        model = fade(tiny_model(family), 3, 0.2)
        attach(model, [ExitConfig(layer=i, kind=kind, gate=True) for i, kind in enumerate(kinds, 1)])
        return fit_lenses(model)


def held_blocks(sequences: list[Sequence], group: int) -> Counter[int]:
    """How many of these sequences hold each block of a group."""
    return Counter(block for sequence in sequences for block in sequence.tables[group].blocks)


def check_pools(engine: Engine) -> None:
    """Blocks are counted for those that hold them, none that is still written is anybody else's, and every pending row
    has a slot of its own."""
    running = engine.roster.running
    for sequence in engine.roster.waiting:
        assert not sequence.tables
        assert not sequence.slots
    for number, (group, allocator) in enumerate(
        zip(engine.memory.pool.groups, engine.memory.pool.allocators, strict=True)
    ):
        allocator.check()
        held = held_blocks(running, number)
        assert all(allocator.references(block) == held[block] for block in range(allocator.num_blocks))
        for sequence in running:
            table = sequence.tables[number]
            assert len(set(table.blocks)) == len(table.blocks)
            written = min(sequence.filled[group.segment], len(sequence.ids) - 1)  # positions that keep what they hold
            for block in table.blocks[max(0, written // engine.memory.pool.block_size - table.freed) :]:
                assert held[block] == 1, "a block that is still written has two holders"
                assert not allocator.published(block), "a block that is still written can be found"
    slots = [slot for sequence in running for slot in sequence.slots]
    assert len(set(slots)) == len(slots)
    assert [len(sequence.slots) for sequence in running] == [sequence.pending for sequence in running]
    assert engine.memory.hidden.used == len(slots)


def as_new(allocator: BlockAllocator) -> bool:
    """Whether an allocator is as it was made."""
    return vars(allocator) == vars(BlockAllocator(allocator.num_blocks))


def check_idle(engine: Engine) -> None:
    """Nobody is there, and the pools are as at the start but for blocks that the index keeps and nobody holds."""
    assert not engine.roster.running
    assert not engine.roster.waiting
    assert not engine._sinks
    assert not engine._outbox
    assert not engine._to_abort
    hidden = engine.memory.hidden
    assert hidden.used == 0
    assert hidden._free == list(range(len(hidden.states_SD) - 1, -1, -1))
    for allocator in engine.memory.pool.allocators:
        allocator.check()
        assert allocator.used == 0
        assert not allocator._claims
        assert engine.options.prefix_sharing or as_new(allocator)
        allocator.clear()
        assert as_new(allocator)


def whimsical(choose: Choose) -> Choose:
    """A scheduler that leaves drafted rows behind at random, which it may. A sequence then has pending rows when the
    rows before them have reached the end."""
    rng = random.Random(0)

    def chosen(sequences: list[Sequence]) -> Pass | None:
        found = choose(sequences)
        if found is None or found.first == 0:
            return found
        by_key, members = {sequence.key: sequence for sequence in sequences}, []
        for member in found.members:
            sequence = by_key[member.key]
            if sequence.is_priced and not sequence.moving and member.rows > 1 and rng.random() < 0.7:
                member = dataclasses.replace(member, rows=rng.randint(1, member.rows - 1), tested=False)
            members.append(member)
        return dataclasses.replace(found, members=tuple(members))

    return chosen


class Ticks:
    """A clock on which every look takes a second."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        self.seconds += 1.0
        return self.seconds


class Histories(RuleBasedStateMachine):
    """One engine and all who use it. ``seen`` counts what has happened in all histories together."""

    seen: ClassVar[Counter[str]] = Counter()

    @initialize(seed=SEEDS)
    def start(self, seed: int) -> None:
        rng = random.Random(seed)
        family = rng.choice(["llama", "mistral", "qwen2", "gemma3_text", "phi3"])
        self.model = some_model(family, rng.choice(KINDS))
        options = EngineConfig(
            block_size=rng.choice([1, 1, 2, 3, 5]), prefill_chunk=rng.choice([1, 3, 8, 512]),
            max_sequences=rng.choice([2, 3, 8, 64]), prefix_sharing=rng.random() < 0.6,
            max_wait=rng.choice([0.0, 0.25, 3.0]),
        )  # fmt: skip
        measure = make_engine(self.model, options=dataclasses.replace(options, max_sequences=1)).memory.pool
        room = int(measure.bytes_for(LONGEST) * rng.choice([1.0, 1.0, 1.3, 2.0]))
        costs = some_costs(self.model, row=rng.choice([0.0, 0.0, 0.1, 0.7]))
        options = dataclasses.replace(options, kv_bytes=room)
        self.engine = make_engine(self.model, tokenizer=Letters(), options=options, costs=costs)
        if rng.random() < 0.6:
            self.engine.pricing.choose = whimsical(self.engine.pricing.choose)
        self.live: set[int] = set()
        self.ended: list[int] = []
        self.sink: deque[Event] = deque()
        self.seen["windows"] += any(group.window is not None for group in self.engine.memory.pool.groups)
        self.seen["blocks"] += any(head.config.kind == "block" for head in self.model.exit_heads().values())

    # ---- what comes of a text

    def end(self, key: int) -> None:
        self.live.remove(key)
        self.ended.append(key)

    def read(self, events: list[Event]) -> None:
        """No event is of a text that has ended."""
        for event in events:
            assert event.key in self.live
            if event.last:
                self.end(event.key)
            if event.error is not None:
                assert isinstance(event.error, UserError)
                self.seen["failed"] += 1
            if event.generation is not None:
                self.seen["finished"] += 1
                self.seen["shared"] += event.generation.stats.shared_tokens > 0
                self.seen["preempted"] += event.generation.stats.preemptions

    def read_sink(self) -> None:
        """What comes of a text that was dropped before it was read is nobody's."""
        self.read([event for event in self.sink if event.key in self.live])
        self.sink.clear()

    def pass_on(self, count: int = 1) -> None:
        for _ in range(count):
            self.read(self.engine.step())
            self.read_sink()
            check_pools(self.engine)
            self.look()

    def look(self) -> None:
        """Count what the checks are for."""
        roster = self.engine.roster
        self.seen["waited for memory"] += bool(roster.waiting) and 0 < len(roster.running) < roster.most
        self.seen["pending behind the end"] += any(
            sequence.pending and not sequence.prefilling and sequence.filled[-1] == len(sequence.ids) - 1
            and 0 < len(sequence.drafts) <= sequence.pending for sequence in roster.running
        )  # fmt: skip

    # ---- rules

    def aborts(self, drawn: int) -> Callable[[list[int], Tensor], Tensor]:
        """A processor that drops a text, perhaps its own, in the middle of a pass."""
        calls = [drawn % 7]

        def processor(ids: list[int], logits: Tensor) -> Tensor:
            calls[0] -= 1
            if calls[0] == 0 and self.live:
                key = sorted(self.live)[drawn % len(self.live)]
                self.engine.abort(key)
                self.end(key)
                self.seen["aborted in a pass"] += 1
            return logits

        return processor

    def request(self, rng: random.Random) -> tuple[list[int], GenerationConfig]:
        """A prompt that may begin like others, and any settings."""
        own = [rng.randrange(3, 97) for _ in range(rng.randint(1, 6))]
        config = draw_config(rng, self.model)
        if rng.random() < 0.4:
            config = dataclasses.replace(config, **DRAFTS)
        if rng.random() < 0.2:
            number = rng.randrange(1000)
            processor = fails_late(number % 4) if rng.random() < 0.3 else self.aborts(number)
            config = dataclasses.replace(config, logits_processor=processor)
        return STEM[: rng.randint(0, 14)] + own * rng.randint(1, 2), config

    @rule(seed=SEEDS, count=st.integers(1, 6))
    def add(self, seed: int, count: int) -> None:
        """Texts with a sink of their own, or such as ``step`` tells of."""
        rng = random.Random(seed)
        for _ in range(count):
            n = rng.choice([0, 0, 0, 1, 3])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                prompt, config = self.request(rng)
                if n:
                    config = dataclasses.replace(config, n=n)
            keys = self.engine.add_choices(prompt, config, self.sink) if n else [self.engine.add(prompt, config)]
            assert not {*keys} & {*self.live, *self.ended}
            self.live |= {*keys}

    @rule(prompt=st.sampled_from([[], [97], [-1], [5] * LONGEST * 9]))
    def add_what_cannot_be(self, prompt: list[int]) -> None:
        with pytest.raises(UserError):
            self.engine.add(prompt, GenerationConfig(mode="full"))

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        self.pass_on(count)

    @rule(count=st.integers(1, 4))
    def step_for_a_stream(self, count: int) -> None:
        """Passes of another thread, which reads its sink; ``step`` tells later what came of the others' texts."""
        for _ in range(count):
            with self.engine.lock:
                self.engine.advance()
        self.read_sink()

    @precondition(lambda self: self.live)
    @rule(place=PLACES)
    def abort_one(self, place: int) -> None:
        self.abort(sorted(self.live), place)

    @precondition(lambda self: self.engine.roster.waiting)
    @rule(place=PLACES)
    def abort_one_that_waits(self, place: int) -> None:
        self.seen["aborted waiting"] += 1
        self.abort([sequence.key for sequence in self.engine.roster.waiting], place)

    def abort(self, keys: list[int], place: int) -> None:
        key = keys[place % len(keys)]
        self.engine.abort(key)
        self.end(key)

    @rule(place=PLACES)
    def abort_one_that_is_not_there(self, place: int) -> None:
        before = [*self.engine.roster.running, *self.engine.roster.waiting]
        self.engine.abort((self.ended or [10**6])[place % len(self.ended or [0])])
        self.engine.abort(-1 - place)
        assert [*self.engine.roster.running, *self.engine.roster.waiting] == before

    @rule()
    def drain(self) -> None:
        for _ in range(3000):
            if not self.live:
                break
            self.pass_on()
        assert not self.live

    @rule()
    def compare(self) -> None:
        """What is stored is what a pass of the same tokens through all layers stores."""
        check_state(self.engine, self.model)

    # ---- what always holds

    @invariant()
    def the_pools_belong_to_those_who_run(self) -> None:
        check_pools(self.engine)

    @invariant()
    def all_who_are_there_were_added_and_have_not_ended(self) -> None:
        roster = self.engine.roster
        keys = [sequence.key for sequence in [*roster.running, *roster.waiting]]
        untold = [event.key for event in self.engine._outbox if event.last]
        assert sorted([*keys, *untold]) == sorted(self.live)
        assert {*self.engine._sinks} <= self.live
        assert len(roster.running) <= roster.most

    def teardown(self) -> None:
        for key in sorted(self.live)[::2]:
            self.engine.abort(key)
            self.end(key)
        self.drain()
        check_idle(self.engine)


def fails_late(calls: int) -> Callable[[list[int], Tensor], Tensor]:
    """A processor that raises after so many calls."""
    left = [calls]

    def processor(ids: list[int], logits: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise ValueError("too late")
        return logits

    return processor


@pytest.mark.parametrize("examples", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_random_histories_leak_free_twice_and_alias_nothing(examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Histories.seen = Counter()
    monkeypatch.setattr(accounts, "time", Ticks())  # what the scheduler chooses depends on what passes took
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=examples, stateful_step_count=30, deadline=None, derandomize=True, database=None
        ),
    )
    names = (
        "windows", "blocks", "finished", "failed", "shared", "preempted", "waited for memory", "aborted waiting",
        "aborted in a pass", "pending behind the end",
    )  # fmt: skip
    assert min(Histories.seen[name] for name in names) >= examples / 30, Histories.seen


# ---- what the checks see


def busy() -> Engine:
    """An engine in which two texts share a block, one has pending rows, and one waits."""
    model = little_model()
    options = EngineConfig(block_size=4, max_sequences=2)
    engine = make_engine(model, options=options)
    engine.generate(STEM, GenerationConfig(mode="full", max_new_tokens=1))
    config = GenerationConfig(mode="threshold", rule="probability", threshold=0.0, max_new_tokens=9, ignore_eos=True)
    for _ in range(3):
        engine.add(STEM, config)
    for _ in range(40):
        engine.step()
        if engine.memory.hidden.used:
            break
    assert [len(engine.roster.running), len(engine.roster.waiting)] == [2, 1]
    check_pools(engine)
    return engine


def spoil(engine: Engine, kind: str) -> None:
    """Damage what an engine keeps."""
    one, two = engine.roster.running
    allocator = engine.memory.pool.allocators[0]
    match kind:
        case "leak":
            allocator.allocate()
        case "freed too early":
            allocator.release(one.tables[0].blocks[-1])
        case "held twice":
            allocator.retain(one.tables[0].blocks[-1])
        case "alias":
            allocator.retain(one.tables[0].blocks[-1])
            allocator.release(two.tables[0].blocks[-1])
            two.tables[0].blocks[-1] = one.tables[0].blocks[-1]
        case "found too early":
            allocator.publish(one.tables[0].blocks[-1], b"key")
        case "slot lost":
            engine.memory.hidden.take(1)
        case "slot for two":
            slots = [sequence.slots for sequence in (one, two) if sequence.slots]
            slots[0].append(slots[0][0])
        case "held while waiting":
            engine.roster.waiting[0].slots = [0]


@pytest.mark.parametrize(
    "kind",
    ["leak", "freed too early", "held twice", "alias", "found too early", "slot lost", "slot for two",
     "held while waiting"],
)  # fmt: skip
def test_damage_is_seen(kind: str) -> None:
    engine = busy()
    spoil(engine, kind)
    with pytest.raises(AssertionError):
        check_pools(engine)


# ---- many short requests


def little_model() -> EarlyExitModel:
    """Two layers of width 16 with windows, and a block exit between them."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 4, "num_hidden_layers": 2}
    types = ["sliding_attention", "full_attention"]
    model = fade(tiny_model("gemma3_text", layer_types=types, **sizes), 2, 0.2)
    return attach(model, [ExitConfig(layer=1, kind="block")])


def sizes_of(thing: Any, path: str = "engine", known: set[int] | None = None) -> dict[str, int]:
    """How many elements each container has that is reached from an object of this package."""
    known = set() if known is None else known
    if id(thing) in known:
        return {}
    known.add(id(thing))
    found: dict[str, int] = {}
    if isinstance(thing, dict | list | tuple | set | frozenset | deque):
        found[path] = len(thing)
        for place, inner in enumerate([*thing.values()] if isinstance(thing, dict) else [*thing]):
            found |= sizes_of(inner, f"{path}[{place}]", known)
    elif type(thing).__module__.startswith("exitlm.decode"):
        names = [*getattr(thing, "__dict__", {}), *getattr(type(thing), "__slots__", ())]
        for name in names:
            found |= sizes_of(getattr(thing, name, None), f"{path}.{name}", known)
    return found


def requests(count: int) -> Iterator[tuple[list[int], GenerationConfig]]:
    """Short prompts that often begin alike, one in twenty with a processor that fails."""
    rng = random.Random(count)
    common: dict[str, Any] = {"ignore_eos": True, "rule": "probability", "threshold": 0.02}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = [
            GenerationConfig(mode=mode, max_new_tokens=most, temperature=temperature, seed=0, **common)
            for mode in ("full", "threshold", "lossless") for most in (1, 2, 4) for temperature in (0.0, 1.0)
        ]  # fmt: skip
    for _ in range(count):
        prompt = STEM[: rng.randint(1, 14)] + random_ids(rng.randint(0, 3), rng.randrange(9))
        config = rng.choice(configs)
        yield prompt, dataclasses.replace(config, logits_processor=fails_late(0)) if rng.random() < 0.05 else config


def few_at_a_time(engine: Engine, count: int, at_once: int = 12) -> Counter[str]:
    """Put requests through an engine and drop one in ten somewhere on its way; how many ended how."""
    rng, ends, sink, live = random.Random(1), Counter[str](), deque[Event](), set[int]()
    coming = requests(count)
    while True:
        while len(live) < at_once and (request := next(coming, None)) is not None:
            live |= {engine.add(*request)} if rng.random() < 0.5 else {*engine.add_choices(*request, sink)}
        if not live:
            return ends
        for event in [*engine.step(), *sink]:
            if event.last and event.key in live:
                live.remove(event.key)
                ends["failed" if event.error else "finished"] += 1
                if event.generation is not None:
                    ends["shared"] += event.generation.stats.shared_tokens > 0
                    ends["preempted"] += event.generation.stats.preemptions
        sink.clear()
        if live and rng.random() < 0.05:
            key = rng.choice(sorted(live))
            engine.abort(key)
            live.remove(key)
            ends["dropped"] += 1


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_after_many_short_requests_the_engine_is_as_at_the_start(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "time", Ticks())
    model = little_model()
    room = make_engine(model).memory.pool.bytes_for(3 * 21)
    engine = make_engine(model, options=EngineConfig(kv_bytes=room, block_size=4, max_sequences=8))
    few_at_a_time(engine, 200)
    check_idle(engine)
    before = sizes_of(engine)
    ends = few_at_a_time(engine, count)
    assert ends["finished"] + ends["failed"] + ends["dropped"] == count
    assert min(ends[name] for name in ("finished", "failed", "dropped", "shared", "preempted")) >= count / 50, ends
    assert any(allocator.cached for allocator in engine.memory.pool.allocators)
    check_idle(engine)
    grown = {path: size - before.get(path, 0) for path, size in sizes_of(engine).items()}
    assert max(grown.values()) <= 8, grown  # passes of one row, and sources of drafts, that came up later
