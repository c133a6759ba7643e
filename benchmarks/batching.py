"""Many sequences in one engine: what company costs and gains, against one sequence, the table of passes and others.

    python benchmarks/batching.py [--section many peers ...] [--adapter runs/demo] [--against DIR] [--quick]

``one``: one sequence in ``full`` against another checkout (needs ``--against``), behind 128 and 2,000 tokens. ``many``:
``full`` with 1 to 16 sequences against one, and against passes of as many rows. ``peers``: 8 sequences here, by
transformers' padded ``generate`` and by its continuous batching. ``modes``: lossless and threshold at 1 to 16 sequences
against full at as many (needs ``--adapter``). ``forced`` and ``overhead``: see ``stand_ins.py``. ``soak``: 2,000 short
requests through a pool that holds 8 sequences; only when named. Speeds of ``many`` and ``modes`` are those while all
sequences are decoded, see ``company.py``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import company
import stand_ins
from checkout import Checkout
from llama_slots import Slots
from measure import at_least, at_most, interleave, quartiles, ratios, save, seconds, spread, table
from passes import Passes
from peer import resident
from transformers_engines import Padded, Paged

import exitlm
from decode import PROMPTS
from exitlm import demo
from exitlm.decode import engine as engine_module
from exitlm.decode.engine import Engine
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.options import EngineConfig
from exitlm.decode.streams import Request
from exitlm.native import library

SIZES = (1, 2, 4, 8, 16)
TURNS = 4  # of each text, before the next one begins behind the same number of tokens
TEXTS = list(itertools.chain(*PROMPTS.values()))
MORE_CHATS = (  # kinds that PROMPTS lacks
    "Translate into French and explain each word: The train to Lyon leaves at seven in the morning.",
    "A farmer has 17 sheep and buys 5 more each month. How many are there after a year? Explain step by step.",
    "List ten animals that live in the sea, with one sentence about each.",
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much each section measures."""

    rounds: int
    pairs: int  # of section one
    sizes: tuple[int, ...]
    tokens: int
    requests: int
    forced_tokens: int


FULL = Size(rounds=5, pairs=32, sizes=SIZES, tokens=64, requests=2000, forced_tokens=400)
QUICK = Size(rounds=2, pairs=4, sizes=(1, 4), tokens=16, requests=60, forced_tokens=60)


def one(llm: exitlm.LLM, model: str, adapter: str | None, against: str, size: Size) -> dict[str, Any]:
    """One sequence in ``full``, here and by the other checkout in turn; each begins every other time. A turn is a few
    tokens of a text that both are in the middle of."""
    rows, claims, each = [], [], max(4, size.tokens // TURNS)
    sides = [Checkout(place, model, adapter) for place in (Path(__file__).parents[1], Path(against))]
    try:
        for context in (128, 2000):
            found: list[list[float]] = [[], []]
            texts = -(-size.pairs // TURNS)
            equal = 0
            for prompt in company.passages(llm, TEXTS, texts, context):
                written = [side.begin(prompt, 1 + each * TURNS) for side in sides]
                for turn in range(TURNS):
                    for i in (0, 1) if turn % 2 == 0 else (1, 0):
                        time_of, tokens = sides[i].turn(each)
                        found[i].append(time_of)
                        written[i] += tokens
                equal += written[0] == written[1]
            speed = ratios(found[1], found[0])
            rows.append({
                "context": context, "pairs": len(found[0]), "this, ms/token": spread([v * 1e3 for v in found[0]]),
                "other, ms/token": spread([v * 1e3 for v in found[1]]), "speed against the other": speed,
                "quartiles": quartiles(found[1], found[0]), "equal texts": f"{equal} of {texts}",
            })  # fmt: skip
            claims.append(at_least(f"context {context}: speed against the engine before", speed, 0.98))
            claims.append(at_least(f"context {context}: share of equal texts", equal / texts, 1.0))
    finally:
        for side in sides:
            side.end()
    print(table(rows))
    return {"against": sides[1].commit, "tokens of a turn": each, "rows": rows, "claims": claims}


def many(llm: exitlm.LLM, size: Size) -> dict[str, Any]:
    """``full`` with B different texts behind 128 tokens: tokens of all per second against one text, and against
    B / T(B) of passes that are timed between them, final head included, at decoding's mean context."""
    engine, context, count = llm.engine, 128, min(48, size.tokens)
    config = GenerationConfig(mode="full", max_new_tokens=count, ignore_eos=True)
    passes = Passes(engine.runner, context + count // 2, size.sizes[-1], 1)
    actions: dict[str, Callable[[], float]] = {}
    for B in size.sizes:
        prompts = company.passages(llm, TEXTS, B, context)
        actions[f"seconds {B}"] = partial(_seconds_per_token, engine, prompts, config)
        actions[f"pass {B}"] = partial(_median_pass, passes, [1] * B)
    try:
        found = interleave(actions, size.rounds)
    finally:
        passes.release()
    rows, claims = [], []
    for B in size.sizes:
        values, times = found[f"seconds {B}"], found[f"pass {B}"]
        T = ratios(times, found["pass 1"])
        gains = [a / b for a, b in zip(found["seconds 1"], values, strict=True)]
        bounds = [B * a / b for a, b in zip(found["pass 1"], times, strict=True)]
        share = ratios(gains, bounds)
        rows.append({
            "B": B, "tokens/s": spread([1 / v for v in values]), "against one": spread(gains),
            "quartiles": quartiles(found["seconds 1"], values), "a pass, ms": spread([v * 1e3 for v in times]),
            "T(B)": T, "B / T(B)": spread(bounds), "of B / T(B)": share,
            "share of a step in its pass": ratios(times, [B * v for v in values]),
        })  # fmt: skip
        if B == 8:
            claims.append(at_least("8 sequences: tokens/s against one", spread(gains), 3.0))
        if B > 1:
            claims.append(at_least(f"{B} sequences: tokens/s against one, of B / T(B)", share, 0.9))
    print(table(rows))
    return {"format": engine.quant, "context": context, "tokens": count, "rows": rows, "claims": claims}


def _seconds_per_token(engine: Engine, prompts: list[list[int]], config: GenerationConfig) -> float:
    return 1.0 / company.decode(engine, prompts, config).rate


def _median_pass(passes: Passes, rows: list[int]) -> float:
    return statistics.median(seconds(partial(passes.run, rows)) for _ in range(9))


def peers(llm: exitlm.LLM, size: Size, model: str, llama: str | None) -> dict[str, Any]:
    """8 chats of different lengths by each engine, prefill included, nothing kept from the round before."""
    prompts = chats(llm)[: 8 if len(size.sizes) > 2 else 2]
    count, apart = size.tokens, EngineConfig(prefix_sharing=False)
    texts: dict[str, list[list[int]]] = {}

    def ours(quant: str, alone: exitlm.LLM) -> float:
        def run() -> None:
            found = alone.generate(prompts, mode="full", max_new_tokens=count, ignore_eos=True)
            texts[quant] = [generation.token_ids for generation in found]

        return seconds(run)

    actions: dict[str, Callable[[], float]] = {}
    for quant in ("none", llm.engine.quant):
        name = f"exitlm, {'float32' if quant == 'none' else quant + ' (default)'}"
        actions[name] = partial(ours, name, exitlm.LLM(llm.model, quant=quant, engine=apart))
    padded, paged = Padded(llm, prompts, count), Paged(llm, prompts, count)
    why_not = paged.why_not()
    slots = [Slots(llama, model, prompts, count, library.default_threads())] if llama else []
    for peer in (padded, *(() if why_not else (paged,)), *slots):
        actions[peer.name] = partial(peer.run, texts)
    found = interleave(actions, size.rounds)
    base, rows, claims, total = found["exitlm, float32"], [], [], count * len(prompts)
    for name, values in found.items():
        equal = sum(a == b for a, b in zip(texts[name], texts["exitlm, float32"], strict=True))
        rows.append({
            "what": name, "tokens/s": spread([total / v for v in values]),
            "exitlm in float32 against it": ratios(values, base), "quartiles": quartiles(values, base),
            "exitlm's default against it": ratios(values, found[list(found)[1]]),
            "texts equal to exitlm's in float32": f"{equal} of {len(prompts)}",
        })  # fmt: skip
        if name.startswith("transformers"):
            claims.append(at_least(f"float32 against {name}", ratios(values, base), 2.0))
            claims.append(at_least(f"the default against {name}", ratios(values, found[list(found)[1]]), 2.0))
        if name.startswith("llama.cpp"):
            claims.append(at_least(f"the default against {name}", ratios(values, found[list(found)[1]]), 3.0))
    if why_not:
        blank = dict.fromkeys(rows[0], "-")
        rows.append({**blank, "what": f"{paged.name}: {why_not}"})
    print(table(rows))
    lengths = ", ".join(str(len(prompt)) for prompt in prompts)
    return {"prompt tokens": lengths, "new tokens": count, "rows": rows, "claims": claims}


def chats(llm: exitlm.LLM) -> list[list[int]]:
    """16 chat prompts; neighbours are of different kinds."""
    kinds = [*PROMPTS.values(), list(demo.PROMPTS), list(MORE_CHATS)]
    mixed = [text for row in itertools.zip_longest(*kinds) for text in row if text is not None]
    return [llm.encode(text, chat=True) for text in mixed]


def modes(llm: exitlm.LLM, size: Size) -> dict[str, Any]:
    """Lossless and threshold at their defaults against full, with as many chats at a time. Each B decodes at least 8 of
    them. ``agreement``: tokens that full would have written after the same text; ``layers``: the mean exit layer."""
    engine, prompts, rows, claims = llm.engine, chats(llm), [], []
    engine.intake.plan(GenerationConfig(mode="lossless"))  # measures what passes cost, if no table is kept
    for B in size.sizes:
        taken = prompts[: max(B, 8 if len(size.sizes) > 2 else 4)]
        groups = [taken[i : i + B] for i in range(0, len(taken), B)]
        runs: dict[str, list[company.Window]] = {}

        def run(mode: str, groups: Any = groups, runs: dict[str, list[company.Window]] = runs) -> float:
            config = GenerationConfig(mode=mode, max_new_tokens=size.tokens, ignore_eos=True)
            clock = Clock()
            with clock.of_tests(engine) if mode == "threshold" else ExitStack():
                runs[mode] = [company.decode(engine, group, config, lambda: clock.seconds) for group in groups]
            return sum(w.seconds for w in runs[mode]) / sum(w.tokens for w in runs[mode])

        found = interleave({mode: partial(run, mode) for mode in ("full", "lossless", "threshold")}, size.rounds)
        full = [g.token_ids for window in runs["full"] for g in window.generations]
        for mode, values in found.items():
            generations = [g for window in runs[mode] for g in window.generations]
            texts = [g.token_ids for g in generations]
            pairs = [pair for mine, its in zip(texts, full, strict=True) for pair in zip(mine, its, strict=True)]
            agreeing = sum(demo.agreeing(engine, *each) for each in zip(taken, texts, full, strict=True))
            drafted, accepted = (sum(getattr(g.stats, name) for g in generations) for name in ("drafted", "accepted"))
            tests = sum(w.metered for w in runs[mode]) / sum(w.seconds for w in runs[mode])
            rows.append({
                "B": B, "mode": mode, "tokens/s": spread([1 / v for v in values]),
                "speed": ratios(found["full"], values), "quartiles": quartiles(found["full"], values),
                "equal texts": f"{sum(a == b for a, b in zip(texts, full, strict=True))} of {len(texts)}",
                "same tokens": f"{sum(a == b for a, b in pairs) / len(pairs):.3f}",
                "agreement": f"{agreeing / len(pairs):.3f}",
                "acceptance": f"{accepted / drafted:.2f} of {drafted}" if drafted else "-",
                "layers": f"{statistics.fmean(e for g in generations for e in g.exit_layers):.1f}",
                "tests, of the time": f"{tests:.1%}" if mode == "threshold" else "-",
            })  # fmt: skip
            if mode != "full":
                floor = 0.98 if mode == "lossless" else 1.0 - tests
                claims.append(at_least(f"{mode}, B = {B}: speed against full", ratios(found["full"], values), floor))
    print(table(rows))
    return {"tokens": size.tokens, "format": engine.quant, "costs of passes": engine.pricing.costs.origin,
            "notes": engine.notes, "rows": rows, "claims": claims}  # fmt: skip


class Clock:
    """Seconds spent in some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, with its time counted."""

        def timed(*given: Any) -> Any:
            begin = time.perf_counter()
            found = call(*given)
            self.seconds += time.perf_counter() - begin
            return found

        return timed

    def of_tests(self, engine: Engine) -> ExitStack:
        """While it is open, count the exits' tests of an engine: gates, logits and scores."""
        stack = ExitStack()
        for owner, name in ((engine.runner, "gates"), (engine.runner, "exit_scores"), (engine_module, "scores")):
            stack.enter_context(mock.patch.object(owner, name, self.timed(getattr(owner, name))))
        return stack


def soak(llm: exitlm.LLM, size: Size) -> dict[str, Any]:
    """Short requests of all lengths, greedy and sampled, full and lossless, through a pool that holds 8 sequences, by
    the native kernels, or in float32, where near-ties fall alike in nearly any company; some are compared with the same
    request alone."""
    longest, held = 64, 8
    quant = "auto" if llm.engine.fused.exact else "none"
    budget = exitlm.LLM(llm.model, quant=quant).engine.memory.pool.bytes_for(held * longest)
    engine = exitlm.LLM(llm.model, quant=quant, engine=EngineConfig(kv_bytes=budget)).engine
    numbers = random.Random(0)
    prompts = company.passages(llm, TEXTS, 256, longest - 16)
    requests: list[Request] = [
        (prompts[i % len(prompts)][: numbers.randrange(8, longest - 15)],
         GenerationConfig(
             mode=("full", "lossless")[i % 2], temperature=(0.0, 0.8)[i // 2 % 2], seed=i, ignore_eos=True,
             max_new_tokens=numbers.randrange(2, 17)))
        for i in range(size.requests)
    ]  # fmt: skip
    unused = [allocator.free for allocator in engine.memory.pool.allocators]
    sample = set(range(0, size.requests, max(1, size.requests // 64)))
    kept, memory, tokens, preempted, failed = {}, [], 0, 0, 0
    gc.collect()
    gc.freeze()  # what was there before need not be looked through each time
    begin = time.perf_counter()
    for done, (index, generation) in enumerate(engine.finished(requests), 1):
        failed += generation.error is not None or len(generation.token_ids) != requests[index][1].max_new_tokens
        tokens += len(generation.token_ids)
        preempted += generation.stats.preemptions
        if index in sample:
            kept[index] = generation.token_ids
        if done % max(1, size.requests // 100) == 0:
            gc.collect()
            # not the pages of mapped weights, which come in as tokens first occur
            memory.append((done, resident("RssAnon") * 2**20))
    taken = time.perf_counter() - begin
    gc.unfreeze()
    left = [allocator.free for allocator in engine.memory.pool.allocators]
    alone = exitlm.LLM(llm.model, quant=quant).engine
    right = sum(kept[i] == alone.generate(*requests[i]).token_ids for i in sorted(sample))
    late = [point for point in memory if point[0] > size.requests / 2]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope
    rows = [{
        "requests": size.requests, "tokens/s": f"{tokens / taken:.0f}", "failed": failed,
        "equal to alone": f"{right} of {len(sample)}", "preemptions": preempted,
        "blocks free before and after": f"{unused}, {left}",
        "memory at half and at the end, MiB": f"{late[0][1] / 2**20:.1f}, {late[-1][1] / 2**20:.1f}",
        "slope, bytes per request": f"{slope:.0f}",
    }]  # fmt: skip
    print(table(rows))
    claims = [
        at_most("requests that failed", failed, 0),
        at_least("share of the sample that is equal to the same request alone", right / len(sample), 1.0),
        # pages come and go by the megabyte; a request that is kept takes several KiB
        at_most("memory slope over the second half, bytes per request", slope, 1024.0),
        at_most("blocks lost", sum(unused) - sum(left), 0),
    ]
    return {"the pool, positions": held * longest, "rows": rows, "claims": claims}


def main() -> None:
    """Run the sections that were asked for and write ``results/batching-SECTION.json`` for each."""
    names = ("one", "many", "peers", "modes", "forced", "overhead", "soak")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", default=None, help="a tuned adapter, for the modes")
    parser.add_argument("--against", default=None, help="another checkout, for section one")
    parser.add_argument("--section", nargs="+", default=names[:-1], choices=names)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--llama-python", help="an interpreter that has llama_cpp, for the peers")
    parser.add_argument("--quick", action="store_true", help="a few tokens of everything, to see that it runs")
    given = parser.parse_args()
    size = QUICK if given.quick else FULL
    rounds = given.rounds or size.rounds
    if given.rounds:
        size = Size(**{**vars(size), "rounds": rounds, "pairs": max(size.pairs, given.rounds)})
    runs: dict[str, Callable[[exitlm.LLM], dict[str, Any]]] = {
        "one": lambda llm: one(llm, given.model, given.adapter, given.against, size),
        "many": lambda llm: many(llm, size),
        "peers": lambda llm: peers(llm, size, given.model, given.llama_python),
        "modes": lambda llm: modes(llm, size),
        "forced": lambda llm: stand_ins.forced(min(rounds, 3), size.forced_tokens),
        "overhead": lambda llm: stand_ins.overhead(llm, 4 * rounds),
        "soak": lambda llm: soak(llm, size),
    }
    needs = {"one": ("--against", given.against), "modes": ("--adapter", given.adapter)}
    for section in given.section:
        option, value = needs.get(section, ("", ""))
        if value is None:
            print(f"{section}: skipped, since it needs {option}")
            continue
        print(f"\n## {section}", flush=True)
        llm = exitlm.load(given.model, adapter=given.adapter if section == "modes" else None)
        figures = runs[section](llm)
        print(table(figures["claims"]))
        print(save(f"batching-{section}", figures), flush=True)


if __name__ == "__main__":
    main()
