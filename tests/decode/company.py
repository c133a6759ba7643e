"""Random companies of sequences on one engine, and what each of them gets alone. Not a test."""

import functools
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from exitlm.decode import sequence as sequences
from exitlm.decode.batch import Batch
from exitlm.decode.cache.block_table import BlockTable
from exitlm.decode.engine import Engine
from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.kernels.runner import Runner
from exitlm.decode.options import EngineConfig
from exitlm.decode.rules import RULES
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.arithmetic import FLOAT64, Arithmetic
from tests.decode.models import attach, fade, fit_lenses, random_ids, some_costs, worst


class Letters:
    """Every token is a letter of its own, so that stop strings span tokens; 2 is special."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Text."""
        return "".join(chr(0x4E00 + i) for i in token_ids if i != 2)

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """Ids of a text of such letters."""
        return {"input_ids": [ord(letter) - 0x4E00 for letter in text.strip()]}


@functools.cache
def company_model(family: str, seed: int, arithmetic: Arithmetic = FLOAT64) -> EarlyExitModel:
    """Four layers with exits of all kinds behind some of them, often right; windows where the family has them."""
    rng = random.Random(f"company {family} {seed}")
    with torch.inference_mode(False):
        model = fade(arithmetic.tiny_model(family, seed), 3, rng.choice([0.2, 0.5]))
        layers = sorted(rng.sample(range(1, 4), rng.randint(1, 3)))
        kinds = ["lens", "lens", "norm", "mlp", "block"]
        candidates = rng.choice([0, 0, 40])
        configs = [
            ExitConfig(layer=layer, kind=rng.choice(kinds), candidates=candidates, gate=rng.random() < 0.7)
            for layer in layers
        ]
        return fit_lenses(attach(model, configs, seed), seed).to(arithmetic.dtype)


def shy(ids: list[int], logits: Tensor) -> Tensor:
    """A processor that looks at the whole text."""
    return logits.index_add(0, torch.tensor([sum(ids) % len(logits)]), torch.full((1,), 1.5, dtype=logits.dtype))


def draw_config(rng: random.Random, model: EarlyExitModel) -> GenerationConfig:
    """Any settings that are good for this model."""
    heads = model.exit_heads()
    layers = sorted(rng.sample(list(heads), rng.randint(1, len(heads))))
    gated = all(heads[layer].config.gate for layer in layers)
    settings: dict[str, Any] = {
        "mode": rng.choice(["full", "threshold", "threshold", "lossless", "lossless"]),
        "max_new_tokens": rng.choice([1, 3, 9, 17]),
        "ignore_eos": rng.random() < 0.8,
        "seed": rng.randrange(4),
        "logprobs": rng.choice([0, 3]),
    }
    if rng.random() < 0.5:
        settings |= {"temperature": rng.choice([0.7, 1.0]), "top_k": rng.choice([0, 8])}
        settings |= {"top_p": rng.choice([1.0, 0.9]), "min_p": rng.choice([0.0, 0.02])}
    if rng.random() < 0.3:
        settings |= {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    if rng.random() < 0.2:
        settings["logits_processor"] = shy
    if rng.random() < 0.2:
        settings |= {"logit_bias": {rng.randrange(97): 3.0}, "bad_words": [[rng.randrange(97)], [5, 6]]}
    if rng.random() < 0.3:
        settings["stop"] = [chr(0x4E00 + rng.randrange(97)) + rng.choice(["", chr(0x4E00 + rng.randrange(97))])]
    if rng.random() < 0.3:
        settings["stop_token_ids"] = [rng.randrange(97), rng.randrange(97)]
    if rng.random() < 0.15:
        settings["prompt_logprobs"] = rng.choice([0, 2])
    if settings["mode"] != "full":
        settings |= {
            "exits": layers,
            "rule": rng.choice([rule for rule in RULES if rule != "gate" or gated]),
            "threshold": rng.choice([0.0, 0.02, 0.1, 0.3, {layers[-1]: 0.05}, 0.9]),
            "patience": rng.randint(1, 2),
            "max_pending": rng.choice([None, None, 0, 1, 4]),
            "min_exit_tokens": rng.choice([0, 0, 3]),
        }
    if settings["mode"] == "lossless":
        settings |= {"adaptive": rng.random() < 0.5, "max_draft": rng.choice([None, 0, 1, 4])}
        settings |= {"draft": rng.choice([("exits",), ("lookup",), ("exits", "lookup")])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GenerationConfig.of(settings)


@dataclass
class Company:
    """Some requests, when they arrive, and the engine that decodes them together."""

    model: EarlyExitModel
    requests: list[tuple[list[int], GenerationConfig]]
    arrivals: list[int]
    options: EngineConfig
    arithmetic: Arithmetic
    dropped: set[int] = field(default_factory=set)


def draw_company(rng: random.Random, family: str, most: int = 6, arithmetic: Arithmetic = FLOAT64) -> Company:
    """Prompts that partly begin alike, arriving over time at an engine with a small or large budget."""
    model = company_model(family, rng.randrange(3), arithmetic)
    return company_of(rng, model, lambda: draw_config(rng, model), most, arithmetic)


def company_of(
    rng: random.Random,
    model: EarlyExitModel,
    draw: Callable[[], GenerationConfig],
    most: int = 6,
    arithmetic: Arithmetic = FLOAT64,
) -> Company:
    """The same with settings that ``draw`` gives."""
    stem = random_ids(rng.randint(1, 14), rng.randrange(10**6))
    requests = []
    for _ in range(rng.randint(2, most)):
        own = random_ids(rng.randint(1, 9), rng.randrange(10**6))
        prompt = rng.choice([own, stem + own, own * 3, stem, (stem + own)[:14] * 2])
        requests.append((prompt, draw()))
    size = rng.choice([1, 2, 3, 5, 8, 32])
    options = arithmetic.options(
        block_size=size, prefill_chunk=rng.choice([1, 3, 8, 512]), max_sequences=rng.choice([1, 2, 3, 64]),
        prefix_sharing=rng.random() < 0.7, max_wait=rng.choice([0.0, 0.25, 3.0]),
    )  # fmt: skip
    if rng.random() < 0.5:  # room for the longest alone, and little more
        longest = max(len(prompt) + config.max_new_tokens for prompt, config in requests)
        measure = arithmetic.engine(model, options=replace(options, max_sequences=1)).memory.pool
        options = replace(options, kv_bytes=int(measure.bytes_for(longest) * rng.choice([1.0, 1.3, 2.0])))
    arrivals = sorted(rng.choice([0, 0, 1, 3, 9, 20]) for _ in requests)
    dropped = {i for i in range(len(requests)) if rng.random() < 0.1}
    return Company(model, requests, arrivals, options, arithmetic, dropped)


def alone(company: Company) -> list[Generation]:
    """What each request gets by itself, on an engine of its own that shares nothing."""
    options = company.arithmetic.options(prefix_sharing=False)
    engine = company.arithmetic.engine(company.model, tokenizer=Letters(), options=options)
    return [engine.generate(prompt, config) for prompt, config in company.requests]


def together(
    company: Company, rng: random.Random, check_every: int = 0, **given: Any
) -> tuple[dict[int, Generation], Engine]:
    """What they get in company. Every ``check_every`` steps, keys and hidden states are compared with a full pass.
    ``given``: further options of the engine."""
    costs = some_costs(company.model, row=rng.choice([0.0, 0.1, 0.7]))
    options = {"tokenizer": Letters(), "options": company.options, "costs": costs, **given}
    engine = company.arithmetic.engine(company.model, **options)
    left, keys, found, step = list(range(len(company.requests))), {}, {}, 0
    while left or engine.roster.running or engine.roster.waiting:
        while left and company.arrivals[left[0]] <= step:
            index = left.pop(0)
            keys[engine.add(*company.requests[index])] = index
        for event in engine.step():
            assert event.error is None, event.error
            if event.generation is not None:
                found[keys[event.key]] = event.generation
        step += 1
        if check_every and step % check_every == 0:
            check_state(engine, company.model, company.arithmetic)
        for key, index in keys.items():
            if index in company.dropped and index not in found and rng.random() < 0.1:
                engine.abort(key)
                company.dropped.discard(index)
                found[index] = None  # type: ignore[assignment]
        assert step < 5000
    return {index: generation for index, generation in found.items() if generation is not None}, engine


# ---- keys, values and hidden states


@functools.lru_cache(maxsize=32)
def _reference(model: EarlyExitModel, arithmetic: Arithmetic) -> Runner:
    with torch.inference_mode(False):
        return Runner(arithmetic.pack(model), arithmetic.options(kv_bytes=1 << 24))


@torch.inference_mode()
def full_pass(
    model: EarlyExitModel, ids: Sequence[int], arithmetic: Arithmetic = FLOAT64
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values ``[2, Hkv, T, Dh]`` of every cache entry after one pass of all tokens through all layers, and the
    hidden states ``[T, D]`` at every boundary."""
    runner = _reference(model, arithmetic)
    tables = [BlockTable(allocator, runner.pool.block_size) for allocator in runner.pool.allocators]
    try:
        assert all(table.ensure(len(ids)) for table in tables)
        windows = [group.window for group in runner.pool.groups]
        draft = sequences.Part(
            0, len(ids), tuple(0 for _ in windows), tuple(tuple(t.slots(0, len(ids))) for t in tables),
            tuple(tuple(t.slots(0, len(ids))) for t in tables),
        )  # fmt: skip
        hidden = [runner.embed(ids)]
        for boundary in range(runner.segments):
            hidden.append(runner.run(boundary, boundary + 1, Batch.of((draft,)), hidden[-1]).hidden_MD)
        return [read(runner, tables, entry, 0, len(ids)) for entry in range(len(runner.pool.stores))], hidden
    finally:
        for table in tables:
            table.release()


def read(runner: Runner, tables: Sequence[BlockTable], entry: int, start: int, count: int) -> Tensor:
    """What an entry holds of some positions."""
    runs = tables[runner.pool.group_of[entry]].slots(start, count)
    return torch.cat([runner.pool.stores[entry][:, :, first : first + n] for first, n in runs], 2)


@torch.inference_mode()
def check_state(engine: Engine, model: EarlyExitModel, arithmetic: Arithmetic = FLOAT64) -> None:
    """Compare everything that is stored for every running sequence with one pass of its tokens through all layers."""
    tolerance = arithmetic.tolerance
    entries = engine.fused.entries()
    for sequence in engine.roster.running:
        assert sequence.filled == sorted(sequence.filled, reverse=True)
        assert len(sequence.slots) == sequence.pending
        ids = sequence.tokens(0, sequence.filled[0])
        if not ids:
            continue
        expected, states = full_pass(model, ids, arithmetic)
        for number, entry in enumerate(entries):
            group = engine.memory.pool.group_of[number]
            start, stop = sequence.tables[group].freed * engine.memory.pool.block_size, sequence.filled[entry.segment]
            if stop > start:
                stored = read(engine.runner, sequence.tables, number, start, stop - start)
                assert worst(stored, expected[number][:, :, start:stop]) <= tolerance
        if sequence.pending:
            taps = {} if arithmetic.native else model.taps(torch.tensor([ids]), engine.intake.exits.layers)
            for boundary in range(1, engine.runner.segments):
                first, last = sequence.filled[boundary], sequence.filled[boundary - 1]
                if last > first:
                    hidden = engine.memory.hidden.get(sequence.slots_of(first, last - first))
                    assert worst(hidden, states[boundary][first:last]) <= tolerance
                    if taps:
                        tapped = taps[engine.runner.bounds[boundary]].hidden[0, first:last]
                        assert worst(hidden, tapped.to(hidden.dtype)) <= tolerance
    held = sum(sequence.pending for sequence in engine.roster.running)
    assert engine.memory.hidden.used == held
