"""Speed of decoding on a CPU: full against transformers, cost of rows, efficiency of exits, and the three modes.

    python benchmarks/decode.py [--adapter runs/demo] [--section full rows forced test modes] [--rounds 5]

``full``: greedy decoding, every weight format against transformers' float32 ``generate`` (and llama.cpp where
``--llama-python`` names an interpreter that has llama_cpp). ``rows``: a pass over M rows, of one sequence and of M,
against one row. ``forced``: random exit patterns forced on the engine against the bound of measured pass times.
``test``: what a test that does not fire costs. ``modes``: lossless and threshold against full, prompt set by prompt set
(needs ``--adapter``).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from measure import interleave, ratios, save, seconds, spread, table
from passes import Passes

import exitlm
from exitlm.decode.engine import Engine
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.pricing.measure_costs import measure
from exitlm.decode.rules import ExitTest
from exitlm.model.exits import ExitConfig

QUESTION = "Explain in a few paragraphs how a bicycle stays upright and why it is harder at low speed."
PROMPTS = {
    "questions": [
        QUESTION,
        "What are the main causes of the tides, and why are there two of them a day?",
        "Give me five pieces of advice for a first job interview.",
    ],
    "stories": [
        "Write a short story about a lighthouse keeper who finds a message in a bottle on a stormy night.",
        "Write a story about a robot that learns to bake bread.",
    ],
    "code": [
        "Write a Python function that reads a CSV file and returns the average of each numeric column, and explain it.",
        "Write a function in Python that checks whether a string is a palindrome, with an example.",
    ],
    "rewriting": [
        "Repeat this text and correct its spelling: The quik brown fox jumps over the lazi dog. Then the dog wakes up "
        "and chases the quik brown fox through the gardn until both are tired and fall aslep under the apple tree.",
        "Summarise this text: The harbour of the town was built four hundred years ago. Fishing boats leave the "
        "harbour before sunrise and come back at noon. In the afternoon the market sells what the boats brought.",
    ],
}
LLAMA = """
import json, sys, time
from llama_cpp import Llama
path, tokens, count, rounds = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
llm = Llama(model_path=path, n_ctx=1024, n_threads=2, verbose=False)
found = []
for _ in range(rounds + 1):
    llm.reset()
    for token in tokens: llm.eval([token])  # one by one: builds for AMX have crashed on longer prompts
    token = llm.sample(temp=0.0); begin = time.perf_counter()
    for _ in range(count - 1):
        llm.eval([token]); token = llm.sample(temp=0.0)
    found.append((time.perf_counter() - begin) / (count - 1))
print(json.dumps(found[1:]))
"""


def transformers_model(llm: exitlm.LLM) -> Any:
    """transformers' model with the same weights, in float32."""
    import transformers

    config = transformers.AutoConfig.for_model(**llm.model.config.hf)
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    reference.load_state_dict(llm.model.state_dict(), strict=False)
    return reference


def full_speed(llm: exitlm.LLM, rounds: int, count: int, llama_python: str | None) -> dict[str, Any]:
    """Seconds per token of greedy decoding; each side times decoding without the prefill."""
    prompt, reference = llm.encode(QUESTION, chat=True), transformers_model(llm)
    ids = torch.tensor([prompt])

    def generate(tokens: int) -> float:
        return seconds(
            lambda: reference.generate(
                ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        )

    actions: dict[str, Callable[[], float]] = {
        "transformers float32": lambda: (generate(count) - generate(1)) / (count - 1)
    }
    auto = Engine(llm.model).quant
    config = GenerationConfig(mode="full", max_new_tokens=count, ignore_eos=True)
    for quant in dict.fromkeys((auto, "none", "fp16", "bf16", "int8", "int4")):
        engine = Engine(llm.model, quant=quant)
        name = f"exitlm {quant}{' (default)' if quant == auto else ''}"
        actions[name] = lambda engine=engine: 1.0 / engine.generate(prompt, config).stats.tokens_per_second
    found = interleave(actions, rounds)
    base = found["transformers float32"]
    rows = [
        {
            "what": name,
            "ms/token": spread([v * 1e3 for v in values]),
            "speed against transformers": ratios(base, values),
        }
        for name, values in found.items()
    ]
    if llama_python:
        from exitlm.weights.source import resolve

        command = [llama_python, "-c", LLAMA, str(resolve("smollm2")), json.dumps(prompt), str(count), str(rounds)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"llama.cpp failed: {done.stderr.strip().splitlines()[-1:]}")
        values = json.loads(done.stdout.splitlines()[-1])
        name = "llama.cpp, the Q4_1 file (a process of its own)"
        rows.append({"what": name, "ms/token": spread([v * 1e3 for v in values]),
                     "speed against transformers": ratios(base, values)})  # fmt: skip
    print(table(rows))
    return {"default": auto, "tokens": count, "rows": rows}


def row_costs(llm: exitlm.LLM, rounds: int) -> dict[str, Any]:
    """Seconds of a whole pass (layers and final head) over M rows against one row, by format: rows of one sequence, as
    drafts are, and of M sequences with 128 positions each."""
    sizes, rows = (1, 2, 4, 8, 16), []
    for quant in ("fp16", "bf16", "int8", "int4"):
        passes = Passes(Engine(llm.model, quant=quant).runner, 128, sizes[-1], sizes[-1])
        for whose, shape in (("one", lambda m: [m]), ("M", lambda m: [1] * m)):
            found = interleave({str(m): partial(seconds, partial(passes.run, shape(m))) for m in sizes}, rounds * 4)
            row: dict[str, Any] = {
                "format": quant, "sequences": whose, "1 row, ms": spread([v * 1e3 for v in found["1"]])
            }  # fmt: skip
            for m in sizes[1:]:
                row[f"{m} rows"] = ratios(found[str(m)], found["1"])
            rows.append(row)
    print(table(rows))
    return {"rows": rows}


def with_timing_exits(llm: exitlm.LLM, candidates: int) -> list[int]:
    """Exits at L/4, L/2 and 3L/4 for timing alone (their values do not matter)."""
    L = llm.num_layers
    layers = [round(L / 4), round(L / 2), round(3 * L / 4)]
    for layer in llm.exit_layers:
        llm.remove_exits([layer])
    llm.model.add_exits([ExitConfig(layer=e, candidates=candidates, gate=True, branch=True) for e in layers])
    return layers


class ForcedTest(ExitTest):
    """Stands in for the test of a token: it leaves where ``pattern`` says, by its position, and is tested nowhere
    else."""

    pattern: tuple[int, ...] = ()

    def tries(self, layer: int) -> bool:
        """Whether the token leaves at this layer."""
        return layer == self.pattern[self.position - 1]  # the first token belongs to the prefill


def decode_seconds(engine: Engine, config: GenerationConfig) -> float:
    """Seconds per token behind 128 positions, without the prefill."""
    return 1.0 / engine.generate(list(range(100, 228)), config).stats.tokens_per_second


def forced(llm: exitlm.LLM, rounds: int, count: int, candidates: int, compile: str = "auto") -> dict[str, Any]:
    """Speed-up of forced random exits over full against the bound from measured pass times."""
    layers, rows = with_timing_exits(llm, candidates), []
    engine, L = Engine(llm.model, compile=compile), llm.num_layers
    costs, length = measure(engine.runner), {"max_new_tokens": count + 1, "ignore_eos": True}
    full = GenerationConfig(mode="full", **length)
    free = GenerationConfig(mode="threshold", rule="probability", threshold=0.0, exits=layers, **length)
    for share in (0.25, 0.5, 0.75):
        numbers = random.Random(0)
        pattern = tuple(numbers.choice(layers) if numbers.random() < share else L for _ in range(count))

        def run(pattern: tuple[int, ...] = pattern) -> float:
            with (
                mock.patch("exitlm.decode.engine.ExitTest", ForcedTest),
                mock.patch.object(ForcedTest, "pattern", pattern),
            ):
                return decode_seconds(engine, free)

        found = interleave({"full": lambda: decode_seconds(engine, full), "forced": run}, rounds)
        # the bound: every pass at its measured cost for the rows it carries, and one head per token
        pending, spent = dict.fromkeys(layers, 0), 0.0
        for layer in pattern:
            at, carried = 0, 1
            for e in [*layers, L]:
                spent += costs.layers(e - at, carried)
                if e == layer:
                    spent += costs.draft[e] if e < L else costs.final()
                    if e < L:
                        pending[e] += carried
                    break
                carried, pending[e], at = carried + pending[e], 0, e
        bound = count * costs.full() / spent
        speed = ratios(found["full"], found["forced"])
        rows.append({"tokens that exit": f"{share:.0%}", "speed-up": speed, "bound": f"{bound:.2f}",
                     "efficiency": f"{speed.median / bound:.2f}"})  # fmt: skip
    print(table(rows))
    return {"layers": layers, "candidates": candidates, "format": engine.quant, "rows": rows}


def cost_of_tests(llm: exitlm.LLM, rounds: int, count: int, candidates: int, compile: str = "auto") -> dict[str, Any]:
    """Time of three tests that never fire, as a share of a token, by rule and head."""
    rows, length = [], {"max_new_tokens": count + 1, "ignore_eos": True}
    for rule, rows_of_head in (("gate", candidates), ("probability", candidates), ("probability", 0)):
        layers = with_timing_exits(llm, rows_of_head)
        engine = Engine(llm.model, compile=compile)
        plain = GenerationConfig(mode="full", **length)
        never = GenerationConfig(mode="threshold", rule=rule, threshold=0.9999999, exits=layers, **length)

        def run(config: GenerationConfig, engine: Engine = engine) -> float:
            return decode_seconds(engine, config)

        found = interleave({"plain": lambda c=plain: run(c), "tested": lambda c=never: run(c)}, rounds)
        extra = spread([(t / p - 1) / len(layers) * 100 for t, p in zip(found["tested"], found["plain"], strict=True)])
        rows.append({"rule": rule, "candidates": rows_of_head or "all", "one test, % of a token": extra})
    print(table(rows))
    return {"format": engine.quant, "rows": rows}


def modes(llm: exitlm.LLM, rounds: int, count: int) -> dict[str, Any]:
    """Lossless and threshold at their defaults against full, per prompt set; the last set is random tokens.

    ``same tokens``: the share of places at which both texts have the same token; ``agreement``: the share of tokens
    that full would have written after the same text; ``equal texts``: those that are full's from end to end.
    """
    from exitlm import demo  # needs rich, which the GPU machines' programs above do without

    numbers = random.Random(0)
    texts_by_set = {"the demo's": list(demo.PROMPTS), **PROMPTS}
    sets = {name: [llm.encode(text, chat=True) for text in texts] for name, texts in texts_by_set.items()}
    vocabulary = llm.model.config.vocab_size
    sets["random tokens"] = [[numbers.randrange(100, vocabulary) for _ in range(96)] for _ in range(3)]
    engine, rows = llm.engine, []
    settings = {
        "full": {"mode": "full"},
        "lossless": {"mode": "lossless"},
        "lossless, exits alone": {"mode": "lossless", "draft": ("exits",)},
        "lossless, lookup alone": {"mode": "lossless", "draft": ("lookup",)},
        "threshold": {"mode": "threshold"},
    }
    for name, prompts in sets.items():
        texts: dict[str, list[list[int]]] = {}
        stats: dict[str, dict[str, Any]] = {}

        def run(mode: str, texts: Any = texts, stats: Any = stats, prompts: list[list[int]] = prompts) -> float:
            config = GenerationConfig(**settings[mode], max_new_tokens=count)
            out = [engine.generate(prompt, config) for prompt in prompts]
            texts[mode] = [g.token_ids for g in out]
            stats[mode] = {key: sum(getattr(g.stats, key) for g in out) for key in ("drafted", "accepted", "tokens")}
            return sum(g.stats.decode_seconds for g in out) / sum(g.stats.tokens - 1 for g in out)

        found = interleave({mode: lambda mode=mode: run(mode) for mode in settings}, rounds)
        for mode, values in found.items():
            s = stats[mode]
            same = sum(
                sum(a == b for a, b in zip(mine, full, strict=False)) / max(len(full), 1)
                for mine, full in zip(texts[mode], texts["full"], strict=True)
            ) / len(prompts)  # fmt: skip
            triples = list(zip(prompts, texts[mode], texts["full"], strict=True))
            agreeing = sum(demo.agreeing(engine, prompt, mine, full) for prompt, mine, full in triples)
            rows.append({
                "prompts": name, "mode": mode, "tokens/s": spread([1 / v for v in values]),
                "speed": ratios(found["full"], values), "same tokens": f"{same:.3f}",
                "agreement": f"{agreeing / sum(len(mine) for _, mine, _ in triples):.3f}",
                "equal texts": f"{sum(mine == full for _, mine, full in triples)} of {len(prompts)}",
                "acceptance": f"{s['accepted'] / s['drafted']:.2f} of {s['drafted']}" if s["drafted"] else "-",
            })  # fmt: skip
    print(table(rows))
    agreement = ", ".join(f"{e}: {record.agreement:.1%}" for e, record in engine.intake.exits.records.items())
    held_out = {"agreement with the final head on held-out text, by exit": agreement}
    return {"tokens": count, "format": engine.quant, **held_out, "notes": engine.notes, "rows": rows}


def main() -> None:
    """Run the sections that were asked for and write ``results/decode-SECTION.json`` for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", default=None, help="a tuned adapter, for the modes")
    parser.add_argument("--section", nargs="+", default=["full", "rows", "forced", "test", "modes"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=4096)
    parser.add_argument("--llama-python", default=None)
    given = parser.parse_args()
    runs: dict[str, Callable[[exitlm.LLM], dict[str, Any]]] = {
        "full": lambda llm: full_speed(llm, given.rounds, given.tokens, given.llama_python),
        "rows": lambda llm: row_costs(llm, given.rounds),
        "forced": lambda llm: forced(llm, given.rounds, given.tokens, given.candidates),
        "test": lambda llm: cost_of_tests(llm, given.rounds, given.tokens, 4096),
        "modes": lambda llm: modes(llm, given.rounds, given.tokens),
    }
    for section in given.section:
        if section == "modes" and given.adapter is None:
            print("modes: skipped, since it needs --adapter")
            continue
        print(f"\n## {section}")
        llm = exitlm.load(given.model, adapter=given.adapter if section == "modes" else None)
        print(save(f"decode-{section}", runs[section](llm)))


if __name__ == "__main__":
    main()
