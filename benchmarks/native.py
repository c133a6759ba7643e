"""The native kernels on this CPU: speed against torch's path and llama.cpp, cost of rows, texts against float32.

    python benchmarks/native.py [--section full rows texts checkpoint ...] [--llama-python BIN] [--rounds 9]

``full``: greedy decoding of one sequence by activations of 15 and 8 bits, by every instruction set and on one thread,
beside torch's best format and (where ``--llama-python`` names an interpreter that has llama_cpp) llama.cpp on the same
file; all take turns, and so does reading all weights once, the bound of the memory. ``rows``: a whole pass (layers and
final head) over M rows of one sequence, or of M, against one. ``texts``: greedy texts and teacher-forced tokens against
float32 of the dequantised weights. ``checkpoint``: the same model in bfloat16. ``lossless``: texts of lossless, alone
and eight at a time, against full. ``prefill``: a prompt of 512 tokens. ``load``: import, load, first token, in a new
process. ``tuning``: hidden states of the frozen backbone as exit tuning wants them, and the demo's quick tuning.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from exit_tuning import tuning as tuned_by_both
from llama import Llama
from measure import at_least, at_most, interleave, ratios, save, seconds, spread, table
from passes import Passes

import exitlm
from decode import PROMPTS, QUESTION
from exitlm.decode.engine import Engine
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.kernels.formats import sixteen_bit_format
from exitlm.decode.kernels.native_model import NativeModel
from exitlm.decode.options import EngineConfig
from exitlm.native import abi, library
from exitlm.train.selftext import read_prompts

LLAMA = """
import json, sys, time
from llama_cpp import Llama
path, threads = sys.argv[1], int(sys.argv[2])
llm = Llama(model_path=path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
print("ready", flush=True)
for line in sys.stdin:
    tokens, count = json.loads(line)
    llm.reset()
    begin = time.perf_counter()
    llm.eval(tokens)
    prefill = time.perf_counter() - begin
    token = llm.sample(temp=0.0)
    begin = time.perf_counter()
    for _ in range(count - 1):
        llm.eval([token]); token = llm.sample(temp=0.0)
    print(json.dumps([prefill, (time.perf_counter() - begin) / max(1, count - 1)]), flush=True)
"""


class OneText:
    """A prompt and its continuation by llama.cpp."""

    def __init__(self, python: str, threads: int) -> None:
        self.llama = Llama(python, LLAMA, "smollm2", threads)

    def run(self, tokens: list[int], count: int) -> tuple[float, float]:
        """Seconds of the prompt, and seconds per token."""
        prefill, each = self.llama.ask([tokens, count])
        return prefill, each


def engine_of(llm: exitlm.LLM, quant: str = "auto", **options: Any) -> Engine:
    """An engine without exits' costs."""
    return Engine(llm.model, quant=quant, tokenizer=llm.tokenizer, options=EngineConfig(**options))


def kernels_of(engine: Engine) -> abi.Kernels:
    """The kernels of an engine, which must be native."""
    if not isinstance(engine.fused, NativeModel):
        raise SystemExit(f"the native kernels do not run here: {library.why_not()}")
    return engine.fused.kernels


def with_kernels(kernels: abi.Kernels, isa: str, threads: int, action: Callable[[], float]) -> float:
    """One figure under another instruction set and number of threads."""
    usual = kernels.isa
    kernels.use(isa)
    kernels.threads(threads)
    try:
        action()  # threads and caches
        return action()
    finally:
        kernels.use(usual)
        kernels.threads(library.default_threads())


def full(llm: exitlm.LLM, rounds: int, python: str | None, avx2_python: str | None = None) -> dict[str, Any]:
    """Seconds per token of one sequence, and of reading what a token reads."""
    count, threads = 64, library.default_threads()
    prompt = llm.encode(QUESTION, chat=True)
    config = GenerationConfig(mode="full", max_new_tokens=count, ignore_eos=True)
    wide, narrow = engine_of(llm), engine_of(llm, activation_bits=8)
    kernels = kernels_of(wide)
    single = engine_of(llm, kv_dtype="float32")
    torch_path = engine_of(llm, "int4" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "fp16")

    def decode(engine: Engine) -> float:
        return 1.0 / engine.generate(prompt, config).stats.tokens_per_second

    weights = np.concatenate([part for part in wide.fused._parts.kept if isinstance(part, np.ndarray)])
    usual = partial(with_kernels, kernels, kernels.isa, threads)
    actions: dict[str, Callable[[], float]] = {
        "reading all weights": lambda: usual(partial(kernels.read, weights, 3)),
        "native, 15 bits": lambda: usual(partial(decode, wide)),
        "native, 15 bits, float32 keys": lambda: usual(partial(decode, single)),
        "native, 8 bits": lambda: usual(partial(decode, narrow)),
        "native, 15 bits, 1 thread": lambda: with_kernels(kernels, kernels.isa, 1, partial(decode, wide)),
        f"torch, {torch_path.quant}": partial(decode, torch_path),
    }
    for isa in ("avx2", "avxvnni"):
        if isa != kernels.isa and kernels.use(isa):
            actions[f"native, 15 bits, {isa}"] = lambda isa=isa: with_kernels(
                kernels, isa, threads, partial(decode, wide)
            )
            actions[f"native, 8 bits, {isa}"] = lambda isa=isa: with_kernels(
                kernels, isa, threads, partial(decode, narrow)
            )
    kernels.use(wide.fused.compile.removeprefix("native "))
    if python:
        for number in dict.fromkeys((threads, 1)):
            name = "llama.cpp" if number == threads else "llama.cpp, 1 thread"
            process = OneText(python, number)
            actions[name] = lambda process=process: process.run(prompt, count)[1]
    held = None if avx2_python is None else OneText(avx2_python, threads)
    if held is not None:
        actions["llama.cpp, avx2"] = lambda: held.run(prompt, count)[1]
    found = interleave(actions, rounds)
    base, bound = found["native, 15 bits"], found["reading all weights"]
    rows = [
        {
            "what": name, "ms/token": spread([v * 1e3 for v in values]),
            "time of 'native, 15 bits'": ratios(values, base), "of reading": ratios(values, bound),
        }
        for name, values in found.items()
    ]  # fmt: skip
    print(table(rows))
    claims = [at_most("native, 15 bits: time of reading its weights", ratios(base, bound), 1.25)]
    if python:
        goal = 2.0 if statistics.median(found["llama.cpp"]) > 5e-3 else 1.5
        claims += [
            at_least("native, 15 bits: speed of llama.cpp", ratios(found["llama.cpp"], base), goal),
            at_least("native, 8 bits: speed of llama.cpp", ratios(found["llama.cpp"], found["native, 8 bits"]), 2.2),
            at_least("native, 15 bits, 1 thread: speed of llama.cpp on one",
                     ratios(found["llama.cpp, 1 thread"], found["native, 15 bits, 1 thread"]), 1.6),
        ]  # fmt: skip
    if held is not None and "native, 15 bits, avx2" in found:
        speed = ratios(found["llama.cpp, avx2"], found["native, 15 bits, avx2"])
        claims.append(at_least("native, 15 bits, avx2: speed of llama.cpp held to avx2, too", speed, 1.4))
    return {"instructions": kernels.isa, "threads": threads, "tokens": count, "bytes": len(weights), "rows": rows,
            "claims": claims}  # fmt: skip


def row_costs(llm: exitlm.LLM, rounds: int, python: str | None) -> dict[str, Any]:
    """Seconds of a pass over M rows against one row: rows of one sequence, as drafts are, or of M, each of which reads
    keys of its own. The goals are those of drafts."""
    sizes, rows, claims = (1, 2, 4, 8, 16), [], []
    goals = {15: {4: 1.3, 8: 1.75, 16: 3.0}, 8: {4: 1.2, 8: 1.5, 16: 2.5}}
    for bits, limits in goals.items():
        engine = engine_of(llm, activation_bits=bits)
        kernels_of(engine)
        for of, sequences in (("one sequence", 1), ("as many sequences", sizes[-1])):
            passes = Passes(engine.runner, 128, sequences, sizes[-1])
            counts = {str(m): [m] if sequences == 1 else [1] * m for m in sizes}
            actions = {m: partial(seconds, partial(passes.run, count)) for m, count in counts.items()}
            found = interleave(actions, 4 * rounds)
            passes.release()
            row: dict[str, Any] = {"activations": f"{bits} bits", "rows of": of}
            row["1 row, ms"] = spread([v * 1e3 for v in found["1"]])
            for m in sizes[1:]:
                row[f"{m} rows"] = ratios(found[str(m)], found["1"])
                if m in limits and sequences == 1:
                    claims.append(at_most(f"{m} rows against one, {bits} bits", row[f"{m} rows"], limits[m]))
            rows.append(row)
    print(table(rows))
    return {"rows": rows, "claims": claims}


def chats(llm: exitlm.LLM, count: int) -> list[list[int]]:
    """Encoded prompts that no exit was tuned on."""
    held = [text for texts in PROMPTS.values() for text in texts] + read_prompts("", 64)[1]
    return [llm.encode(text, chat=True) for text in held[:count]]


@torch.inference_mode()
def texts(llm: exitlm.LLM, rounds: int, python: str | None) -> dict[str, Any]:
    """Greedy texts and single tokens against float32 of the same weights by torch."""
    prompts, rows, claims = chats(llm, 32), [], []
    config = GenerationConfig(mode="full", max_new_tokens=96)
    exact = engine_of(llm, "none")
    wanted = [exact.generate(prompt, config).token_ids for prompt in prompts]
    for name, engine in (
        ("native, 15 bits", engine_of(llm)), ("native, 15 bits, float32 keys", engine_of(llm, kv_dtype="float32")),
        ("native, 8 bits", engine_of(llm, activation_bits=8)), ("torch, int4", engine_of(llm, "int4")),
    ):  # fmt: skip
        found = [engine.generate(prompt, config).token_ids for prompt in prompts]
        equal = sum(a == b for a, b in zip(found, wanted, strict=True))
        same = forced(engine, prompts, wanted)
        rows.append({"what": name, "equal texts": f"{equal} of {len(prompts)}", "best token equal": f"{same:.4f}"})
        if name == "native, 15 bits":
            claims = [at_least("texts equal to float32's, of 32", equal, 31),
                      at_least("best tokens equal to float32's, teacher-forced", same, 0.999)]  # fmt: skip
    print(table(rows))
    return {"rows": rows, "claims": claims}


@torch.inference_mode()
def checkpoint(llm: exitlm.LLM, rounds: int, python: str | None) -> dict[str, Any]:
    """Seconds per token of the same model as a bfloat16 checkpoint, as it is and as Q8_0, beside torch's formats; and
    how often each says what float32 of the same weights says."""
    count, prompts, rows, claims = 64, chats(llm, 8), [], []
    usual = sixteen_bit_format()
    with tempfile.TemporaryDirectory() as home:
        llm.export(home, dtype="bfloat16")
        half = exitlm.load(home)
        engines = {
            "native, as it is": engine_of(half),
            "native, Q8_0": engine_of(half, "q8_0"),
            f"torch, {usual} (its default)": engine_of(half, usual),
            "torch, float32": engine_of(exitlm.load(home, dtype="float32"), "none"),
        }
        kernels_of(engines["native, as it is"])
        config = GenerationConfig(mode="full", max_new_tokens=count, ignore_eos=True)

        def decode(engine: Engine) -> float:
            return 1.0 / engine.generate(prompts[0], config).stats.tokens_per_second

        found = interleave({name: partial(decode, engine) for name, engine in engines.items()}, rounds)
        wanted = [engines["torch, float32"].generate(prompt, config).token_ids for prompt in prompts]
        torchs = found[list(found)[2]]
        for name, engine in engines.items():
            equal = sum(engine.generate(p, config).token_ids == text for p, text in zip(prompts, wanted, strict=True))
            rows.append(
                {"what": name, "ms/token": spread([v * 1e3 for v in found[name]]),
                 "speed of torch's default": ratios(torchs, found[name]), "equal texts": f"{equal} of {len(prompts)}",
                 "best token equal": f"{forced(engine, prompts, wanted):.4f}"}
            )  # fmt: skip
    print(table(rows))
    for what, goal in (("as it is", 1.5), ("Q8_0", 2.0)):
        ratio = ratios(torchs, found[f"native, {what}"])
        claims.append(at_least(f"a bfloat16 checkpoint, {what}: speed of torch's", ratio, goal))
    return {"rows": rows, "claims": claims}


def forced(engine: Engine, prompts: list[list[int]], texts: list[list[int]]) -> float:
    """The share of given tokens that are an engine's most likely ones."""
    config = GenerationConfig(mode="full", max_new_tokens=0, prompt_logprobs=1)
    same = 0
    for prompt, text in zip(prompts, texts, strict=True):
        scores = engine.generate(prompt + text, config).prompt_logprobs[len(prompt) - 1 :]
        same += sum(token in tops for token, (_, tops) in zip(text, scores, strict=True))
    return same / sum(map(len, texts))


def lossless(llm: exitlm.LLM, rounds: int, python: str | None) -> dict[str, Any]:
    """Texts of lossless against those of full: alone and in company, with exits and the text as sources."""
    prompts = chats(llm, 32)
    engine = llm.engine
    kernels_of(engine)
    wanted = [
        g.token_ids
        for g in engine.generate_all([(p, GenerationConfig(mode="full", max_new_tokens=96)) for p in prompts])
    ]
    rows, claims = [], []
    config = GenerationConfig(mode="lossless", max_new_tokens=96, adaptive=False, exits=llm.exit_layers or None)
    for name, size in (("alone", 1), ("8 at a time", 8)):
        found = []
        for at in range(0, len(prompts), size):
            found += engine.generate_all([(prompt, config) for prompt in prompts[at : at + size]])
        equal = sum(g.token_ids == text for g, text in zip(found, wanted, strict=True))
        drafted, accepted = (sum(getattr(g.stats, key) for g in found) for key in ("drafted", "accepted"))
        rows.append(
            {"lossless": name, "equal texts": f"{equal} of {len(prompts)}", "drafts": drafted, "accepted": accepted}
        )
        claims.append(at_least(f"lossless texts equal to full's, {name}, of 32", equal, 32))
    print(table(rows))
    return {"exits": llm.exit_layers, "rows": rows, "claims": claims}


def prefill(llm: exitlm.LLM, rounds: int, python: str | None) -> dict[str, Any]:
    """Seconds of a prompt of 512 tokens."""
    words = llm.encode(" ".join(text for texts in PROMPTS.values() for text in texts) * 4)[:512]
    config = GenerationConfig(mode="full", max_new_tokens=1)
    actions: dict[str, Callable[[], float]] = {}
    for name, engine in (
        ("native", engine_of(llm, prefix_sharing=False)),
        ("torch", engine_of(llm, "int4", prefix_sharing=False)),
    ):
        actions[name] = partial(seconds, partial(engine.generate, words, config))
    if python:
        process = OneText(python, library.default_threads())
        actions["llama.cpp"] = lambda: process.run(words, 1)[0]
    found = interleave(actions, rounds)
    rows = [
        {"what": name, "ms": spread([v * 1e3 for v in values]), "tokens/s": spread([len(words) / v for v in values]),
         "time of native": ratios(values, found["native"])}
        for name, values in found.items()
    ]  # fmt: skip
    print(table(rows))
    claims = (
        [at_least("prefill: speed of llama.cpp", ratios(found["llama.cpp"], found["native"]), 3.0)] if python else []
    )
    return {"tokens": len(words), "rows": rows, "claims": claims}


LOAD = """
import time; begin = time.perf_counter()
import torch, transformers; libraries = time.perf_counter()
import exitlm; imported = time.perf_counter()
llm = exitlm.load("smollm2"); loaded = time.perf_counter()
llm.generate("Hi", mode="full", max_new_tokens=1); done = time.perf_counter()
print(libraries - begin, imported - libraries, loaded - imported, done - loaded)
"""


def load(llm: exitlm.LLM, rounds: int, python: str | None) -> dict[str, Any]:
    """Seconds from a new process to its first token, when everything was packed before, and Python keeps bytecode."""
    found = []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(rounds + 1):
        done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, check=True, env=environment)
        found.append([float(word) for word in done.stdout.split()])
    del found[0]
    parts = ("import torch, transformers", "import exitlm", "load", "engine and first token")
    rows = [
        {"part": name, "s": spread(list(values))} for name, values in zip(parts, zip(*found, strict=True), strict=True)
    ]
    rows.append({"part": "all", "s": spread([sum(each) for each in found])})
    print(table(rows))
    claims = [at_most("import, load and first token, s", spread([sum(each) for each in found]), 2.0),
              at_most("exitlm's own part, s", spread([sum(each[1:]) for each in found]), 0.5)]  # fmt: skip
    return {"rows": rows, "claims": claims}


def tuning(llm: exitlm.LLM, rounds: int, python: str | None) -> dict[str, Any]:
    """See ``exit_tuning.py``."""
    kernels_of(llm.engine)
    return tuned_by_both(llm, rounds)


SECTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "full": full, "rows": row_costs, "texts": texts, "checkpoint": checkpoint, "lossless": lossless, "prefill": prefill,
    "load": load, "tuning": tuning,
}  # fmt: skip


def main() -> None:
    """Run the sections and write ``results/native-SECTION.json`` for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", help="a tuned adapter, for lossless")
    parser.add_argument("--section", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--llama-python")
    parser.add_argument("--llama-avx2-python", help="one whose llama_cpp was built without AVX-512, for full")
    arguments = parser.parse_args()
    llm = exitlm.load(arguments.model, adapter=arguments.adapter)
    for name in arguments.section:
        print(f"\n## {name}")
        more = {"avx2_python": arguments.llama_avx2_python} if name == "full" else {}
        figures = SECTIONS[name](llm, arguments.rounds, arguments.llama_python, **more)
        if figures["claims"]:
            print(table(figures["claims"]))
        print(save(f"native-{name}", figures))


if __name__ == "__main__":
    main()
