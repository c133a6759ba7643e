"""Everything that needs a GPU: checks, decode speed, cost of rows, exits and tests, tuning and training, memory.

    benchmarks/gpu.sh [--section NAME ...] [--device cuda] [--quick]

Weights are random, so that nothing is downloaded; shapes are those of SmolLM2-135M, a Llama of 1.3 billion parameters
and Llama-3-8B. Every section runs in a process of its own with a limit of time, and every part of it by itself: what
fails is recorded with its traceback, the rest goes on, and the exit code is 1 at the end. ``results/gpu.json`` (or
``$OUT/gpu.json``) is written after every section: ``rows`` for the report, ``sections`` with all details, ``errors``.

``--device cpu --quick`` runs the same program on tiny models with static passes that are not recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import interleave, ratios, save, seconds, spread

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "llama-1.3b": {
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16,
    },
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LIMITS = {"checks": 95, "smollm2-135m": 65, "llama-1.3b": 65, "llama-3-8b": 95, "training": 125, "attention": 25}
"""Seconds per section; together less than eight minutes."""
TOTAL = 470.0
BANDWIDTH = 4.8e12
"""Bytes per second of an H200's memory, by its data sheet: the bound of decoding one sequence."""
SECTION_CODES = {0: "done", 1: "errors"}


class Section:
    """What one section finds: parts by name, errors, rows for the report; written to ``path`` after every part."""

    def __init__(self, name: str, path: Path, device: torch.device, quick: bool, limit: float) -> None:
        self.name, self.path, self.device, self.quick = name, path, device, quick
        self.end = time.monotonic() + limit
        self.parts: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.errors: list[dict[str, str]] = []
        self.compile = "graphs" if device.type == "cuda" else "static"
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def part(self, name: str, action: Callable[[dict[str, Any]], Any], needs: float = 5.0) -> bool:
        """Let ``action`` put figures into a dictionary, if ``needs`` seconds are left. An exception is recorded and
        goes no further; False then."""
        found: dict[str, Any] = {}
        self.parts[name] = found
        begin, before = time.monotonic(), len(self.errors)
        try:
            if begin + needs > self.end:
                raise TimeoutError(f"only {self.end - begin:.0f} s are left for this section")
            action(found)
        except Exception as error:
            self.errors.append(
                {"part": f"{self.name}: {name}", "error": repr(error), "traceback": traceback.format_exc()}
            )
            print(f"{self.name}: {name}: FAILED: {error!r}", flush=True)
        found["seconds"] = round(time.monotonic() - begin, 2)
        if self.device.type == "cuda":
            found["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        print(f"{self.name}: {name}: {found['seconds']} s", flush=True)
        self.write()
        self.release()
        return len(self.errors) == before

    def row(self, what: str, value: Any, unit: str = "") -> None:
        """A line of the report."""
        self.rows.append({"section": self.name, "what": what, "value": value, "unit": unit})

    def write(self) -> None:
        """Write what is known so far, whole or not at all."""
        data = {"parts": self.parts, "rows": self.rows, "errors": self.errors}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(data, default=plain))
        partial.replace(self.path)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def release(self) -> None:
        """Give memory back that nothing holds any more, and measure the peak from here."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def plain(value: Any) -> Any:
    """What JSON does not know."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


# ---- checks


def checks(section: Section) -> None:
    """``gpu_checks.py``, each by itself."""
    import gpu_checks

    for check in gpu_checks.CHECKS:

        def run(found: dict[str, Any], check: Any = check) -> None:
            found["rows"] = check(section.device, section.compile, section.quick)
            for row in found["rows"]:
                section.row(row["what"], row["value"], f"limit {row['limit']:.3g}")

        section.part(check.__name__, run)


# ---- one shape


def build(section: Section, name: str) -> tuple[Any, Any]:
    """A transformers model with random weights on the device, and ours over the same memory."""
    import transformers

    import exitlm
    from exitlm.model import EarlyExitModel, ModelConfig

    shape = {"tie_word_embeddings": False, **(TINY if section.quick else SHAPES[name])}
    config = transformers.LlamaConfig(
        **shape, max_position_embeddings=8192, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(section.device):
        reference = transformers.AutoModelForCausalLM.from_config(config, dtype=section.dtype).eval()
    reference.requires_grad_(False)
    with torch.device("meta"):
        model = EarlyExitModel(ModelConfig.from_hf(config.to_dict()))
    missing, unexpected = model.load_state_dict(reference.state_dict(), strict=False, assign=True)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    model.requires_grad_(False).eval()
    return reference, exitlm.LLM(model)


def decoding(section: Section) -> None:
    """Speed, cost of rows, exits and tests for one shape."""
    quick = section.quick
    made: list[Any] = []

    def make(found: dict[str, Any]) -> None:
        made.extend(build(section, section.name))
        model = made[1].model
        found["parameters"] = sum(p.numel() for p in model.parameters())
        read = found["parameters"] - (0 if model.config.tie_word_embeddings else model.lm_head.weight.numel())
        found["bound_ms"] = read * model.lm_head.weight.element_size() / BANDWIDTH * 1e3
        section.row("bound by memory bandwidth (data sheet)", found["bound_ms"], "ms/token")

    if not section.part("build", make, 10):
        return
    llm = made[1]
    count, rounds, prompt = (8, 1, 20) if quick else (64, 3, 128)
    section.part("logits", lambda found: agreement(section, made[0], llm, found))
    section.part("speed", lambda found: speed(section, made[0], llm, found, prompt, count, rounds), 25)
    made.clear()  # transformers' model is not needed any more
    section.part(
        "rows", lambda found: cost_of_rows(section, llm, found, (64,) if quick else (128, 1024), rounds * 5), 10
    )
    section.part(
        "together",
        lambda found: together(section, llm, found, prompt, count // 2, (1, 2) if quick else (1, 4, 8, 16)),
        12,
    )
    if not quick:
        section.part("long text", lambda found: long_text(section, llm, found, count), 10)
    exits(section, llm, count, rounds)


def agreement(section: Section, reference: Any, llm: Any, found: dict[str, Any]) -> None:
    """Logits of our plain model and of the engine, eager and recorded, against transformers'."""
    from gpu_checks import decoded
    from tests.decode.models import random_ids, worst

    from exitlm.decode.kernels.fused import FusedModel

    ids = random_ids(96, vocab_size=llm.model.config.vocab_size)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids], device=section.device)).logits[0].float()
    found["plain"] = worst(llm.model.logits(ids)[0].float(), expected)
    for way in ("none", section.compile):
        found[way] = worst(decoded(FusedModel(llm.model, "none", way), ids, 48).float(), expected[47:])
    for way, value in found.items():
        section.row(f"logits against transformers, {way}", value, "of the largest")
    assert found["plain"] <= 0.15, found
    assert max(found.values()) <= 2 * found["plain"] + 0.02, found


def speed(
    section: Section, reference: Any, llm: Any, found: dict[str, Any], prompt: int, count: int, rounds: int
) -> None:
    """Milliseconds per token of greedy decoding, one sequence: transformers, ours eager, ours recorded."""
    from tests.decode.models import random_ids

    from exitlm.decode.engine import Engine
    from exitlm.decode.generation import GenerationConfig

    ids = random_ids(prompt, vocab_size=llm.model.config.vocab_size)
    there = torch.tensor([ids], device=section.device)

    def generate(tokens: int) -> float:
        def run() -> None:
            options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            reference.generate(there, attention_mask=torch.ones_like(there), **options)
            section.synchronize()

        return seconds(run)

    options = room(llm, prompt + count)
    engines = {f"exitlm {way}": Engine(llm.model, compile=way, options=options) for way in ("none", section.compile)}
    if section.device.type == "cuda":
        found["memory_of_weights_and_two_engines_gib"] = torch.cuda.memory_allocated() / 2**30
    config = GenerationConfig(mode="full", max_new_tokens=count, ignore_eos=True)
    texts: dict[str, list[int]] = {}

    def ours(name: str) -> float:
        out = engines[name].generate(ids, config)
        texts[name] = out.token_ids
        return 1.0 / float(out.stats.tokens_per_second)

    actions: dict[str, Callable[[], float]] = {"transformers": lambda: (generate(count) - generate(1)) / (count - 1)}
    actions |= {name: lambda name=name: ours(name) for name in engines}
    timed = interleave(actions, rounds)
    for name, values in timed.items():
        found[name] = {"ms": spread([v * 1e3 for v in values]), "speed": ratios(timed["transformers"], values)}
        section.row(f"full, {name}", found[name]["ms"], "ms/token")
        section.row(f"full, {name}, against transformers", found[name]["speed"], "x")
    one, two = texts.values()
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), len(one))
    found["same_tokens"] = f"eager and {section.compile} agree on the first {same} of {len(one)} tokens"
    engine = engines[f"exitlm {section.compile}"]
    assert engine.fused.static is not None
    assert not engine.fused.static.broken, "passes could not be recorded"
    if section.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        section.row("peak memory with transformers' model over the same weights and two engines", peak, "GiB")
        recorded = next(kept for key, kept in engine.fused.static._passes.items() if key[2] == 1)
        found["pass_ms"] = spread([milliseconds(recorded.replay) for _ in range(5)])
        section.row("a recorded pass of one row, without the head and the host", found["pass_ms"], "ms")
        found["kernels"] = kernels(recorded.replay)


def milliseconds(action: Callable[[], Any], times: int = 20) -> float:
    """Time of ``action`` on the device, called back to back."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        action()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def kernels(action: Callable[[], Any]) -> Any:
    """Where the time of ``action`` goes: name, calls and microseconds of its kernels. What a profiler can't see here is
    no error."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            action()
            torch.cuda.synchronize()
        events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
        return [(event.key[:100], event.count, round(event.self_device_time_total, 1)) for event in events[:16]]
    except Exception as error:
        return f"no profile: {error!r}"


def cost_of_rows(section: Section, llm: Any, found: dict[str, Any], contexts: tuple[int, ...], rounds: int) -> None:
    """A pass over M rows, head and argmax included, against one row: rows of one sequence, and of M sequences."""
    from passes import Passes

    from exitlm.decode.engine import Engine

    ours: dict[str, Callable[[int], list[int]]] = {"one sequence": lambda m: [m], "M sequences": lambda m: [1] * m}
    sizes = {"one sequence": (1, 2, 4, 8, 16, 32), "M sequences": (1, 4, 8, 16)}
    for way in ("none", section.compile):
        runner = Engine(llm.model, compile=way, options=room(llm, 17 * (contexts[-1] + 32))).runner
        for context, (whose, shape) in itertools.product(contexts, ours.items()):
            passes = Passes(runner, context, max(len(shape(m)) for m in sizes[whose]))
            timed = interleave({str(m): partial(seconds, partial(passes.run, shape(m))) for m in sizes[whose]}, rounds)
            passes.release()
            figures = {
                m: {"ms": spread([v * 1e3 for v in values]), "ratio": ratios(values, timed["1"])}
                for m, values in timed.items()
            }
            found[f"{way}, {whose}, {context} positions"] = figures
            if whose == "one sequence":
                section.row(f"1 row, {way}, {context} positions", figures["1"]["ms"], "ms")
            for m in sizes[whose][1:]:
                what = f"{m} rows of {whose.replace('M', str(m))} against 1, {way}, {context} positions"
                section.row(what, figures[str(m)]["ratio"], "x")
        assert runner.fused.static is None or not runner.fused.static.broken, "passes could not be recorded"


def room(llm: Any, positions: int) -> Any:
    """Settings of an engine whose pool holds so many positions: memory on a GPU is taken at once."""
    from exitlm.decode.options import EngineConfig

    config = llm.model.config
    size = 2 * config.num_key_value_heads * config.head_dim * llm.model.lm_head.weight.element_size()
    block = EngineConfig().block_size
    blocks = -(-positions // block) + 32  # every sequence has an unfinished block
    return EngineConfig(kv_bytes=config.num_hidden_layers * blocks * block * size)


def together(
    section: Section, llm: Any, found: dict[str, Any], prompt: int, count: int, counts: tuple[int, ...]
) -> None:
    """Tokens per second of B sequences that are decoded together, recorded (and the most of them eager), and how many
    of their tokens are those of each alone: kernels of other shapes round otherwise."""
    from tests.decode.models import random_ids

    from exitlm.decode.engine import Engine
    from exitlm.decode.generation import GenerationConfig

    vocabulary = llm.model.config.vocab_size
    prompts = [random_ids(prompt, i, vocabulary) for i in range(counts[-1])]
    for way, sizes in (("none", counts[-1:]), (section.compile, counts)):
        engine = Engine(llm.model, compile=way, options=room(llm, (prompt + count + 32) * counts[-1]))

        def run(many: int, tokens: int, engine: Any = engine) -> list[list[int]]:
            config = GenerationConfig(mode="full", max_new_tokens=tokens, ignore_eos=True)
            events = engine.events([(each, config) for each in prompts[:many]])
            out = {index: event.generation for index, _, event in events if event.generation is not None}
            return [out[index].token_ids for index in range(many)]

        config = GenerationConfig(mode="full", max_new_tokens=count, ignore_eos=True)
        alone = [engine.generate(each, config).token_ids for each in prompts[: 1 if way == "none" else None]]
        for many in sizes:
            texts = run(many, count)
            taken = min(seconds(lambda m=many: run(m, count)) - seconds(lambda m=many: run(m, 1)) for _ in range(2))
            same = [a == b for mine, text in zip(texts, alone, strict=False) for a, b in zip(mine, text, strict=True)]
            speed = many * (count - 1) / max(taken, 1e-9)
            found[f"{way}, {many}"] = {"tokens_per_second": speed, "same_tokens": sum(same) / len(same)}
            section.row(f"{many} sequences together, {way}", speed, "tokens/s")
            section.row(f"their tokens that are those of each alone, {way}", sum(same) / len(same), "share")
        assert engine.fused.static is None or not engine.fused.static.broken, "passes could not be recorded"


def long_text(section: Section, llm: Any, found: dict[str, Any], count: int) -> None:
    """Milliseconds per token behind 4,000 tokens of prompt, and the prefill's speed."""
    from tests.decode.models import random_ids

    from exitlm.decode.engine import Engine
    from exitlm.decode.generation import GenerationConfig

    ids = random_ids(4000, vocab_size=llm.model.config.vocab_size)
    options = replace(room(llm, len(ids) + count), prefix_sharing=False)  # the prefill is timed again and again
    engines = {way: Engine(llm.model, compile=way, options=options) for way in ("none", section.compile)}
    prefill: list[float] = []

    def run(way: str) -> float:
        stats = engines[way].generate(ids, GenerationConfig(mode="full", max_new_tokens=count, ignore_eos=True)).stats
        prefill.append(len(ids) / stats.prefill_seconds)
        return 1e3 / float(stats.tokens_per_second)

    for way, values in interleave({way: lambda way=way: run(way) for way in engines}, 2).items():
        found[way] = spread(values)
        section.row(f"full behind 4000 tokens, {way}", found[way], "ms/token")
    found["prefill_tokens_per_second"] = spread(prefill[2:])
    section.row("prefill of 4000 tokens", found["prefill_tokens_per_second"], "tokens/s")


def exits(section: Section, llm: Any, count: int, rounds: int) -> None:
    """Forced exit patterns against their bound, and the price of a test that does not fire (``decode.py``)."""
    from decode import cost_of_tests, forced

    candidates = 64 if section.quick else 4096

    def patterns(found: dict[str, Any]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            found |= forced(llm, rounds, count, candidates, section.compile)
        for row in found["rows"]:
            section.row(f"forced exits of {row['tokens that exit']} of the tokens", row["speed-up"], "x")
            section.row(f"the same, bound {row['bound']}, efficiency", float(row["efficiency"]), "")

    def tests(found: dict[str, Any]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            found |= cost_of_tests(llm, rounds, count, candidates, section.compile)
        for row in found["rows"]:
            what = f"a test that does not fire, {row['rule']}, {row['candidates']} candidates"
            section.row(what, row["one test, % of a token"], "% of a token")

    section.part("forced exits", patterns, 15)
    section.part("tests", tests, 15)


# ---- tuning and training


def attention(section: Section) -> None:
    """Ways to attend (``gpu_attention.py``)."""
    from gpu_attention import attention

    attention(section)


def training(section: Section) -> None:
    """Exits on a frozen model, then all parameters (``gpu_training.py``)."""
    from gpu_training import full

    tuning(section)
    full(section)


def tuning(section: Section) -> None:
    """Tokens per second of an optimizer step on three exits of a frozen backbone, distilled from the final head."""
    made: list[Any] = []
    if not section.part("build", lambda found: made.append(build(section, "llama-1.3b")[1]), 10):
        return
    for kind in ("lens", "mlp"):

        def run(found: dict[str, Any], kind: str = kind) -> None:
            tokens, taken, backbone = tuning_steps(section, made[0], kind)
            found["step"] = spread([tokens / s for s in taken])
            found["backbone"] = spread([tokens / s for s in backbone])
            section.row(f"tuning three exits ({kind})", found["step"], "tokens/s")
            section.row(f"of it the frozen backbone alone ({kind})", found["backbone"], "tokens/s")

        section.part(kind, run, 12)


def tuning_steps(section: Section, llm: Any, kind: str) -> tuple[int, list[float], list[float]]:
    """Tokens of a step, and the seconds of steps and of the backbone's part."""
    import numpy as np

    from exitlm.model.exits import ExitConfig
    from exitlm.train.backbone import TorchBackbone
    from exitlm.train.data import Blocks
    from exitlm.train.heads import Heads
    from exitlm.train.hidden import HiddenStates, Wanted
    from exitlm.train.loop import Trainer
    from exitlm.train.run import RunConfig

    length, batch, rounds = (16, 2, 1) if section.quick else (1024, 8, 4)
    L, model = llm.num_layers, llm.model
    model.remove_exits(llm.exit_layers)
    layers = (L // 4, L // 2, 3 * L // 4)
    model.add_exits([ExitConfig(layer=e, kind=kind, gate=True, branch=kind == "lens") for e in layers])
    config = RunConfig()
    name = str(section.dtype).removeprefix("torch.")
    train = replace(config.train, steps=100, global_batch=batch, microbatch=batch // 2, dtype=name)
    config = replace(config, exits=replace(config.exits, layers=layers), train=train)
    ids = np.random.Generator(np.random.PCG64(0)).integers(3, model.config.vocab_size, 4 * batch * length + 1)
    starts = np.arange(4 * batch) * length
    segments = np.stack([starts * 0, starts, starts + length + 1, starts * 0], 1)
    blocks = Blocks([ids.astype(np.int64)], segments, np.arange(4 * batch + 1), "random")
    with tempfile.TemporaryDirectory() as home:
        wanted = Wanted(exits=layers, final=True)
        hidden = HiddenStates(TorchBackbone(model), blocks, wanted, keep="none", limit=0.0, home=Path(home))
        trainer = Trainer(config, Heads(model, section.dtype), hidden)

        def step() -> None:
            trainer.step()
            section.synchronize()

        def backbone() -> None:
            for index in range(batch):
                hidden.compute(index)
            section.synchronize()

        timed = interleave({"step": lambda: seconds(step), "backbone": lambda: seconds(backbone)}, rounds)
        return batch * length, timed["step"], timed["backbone"]


# ---- the program

SECTIONS: dict[str, Callable[[Section], None]] = {
    "checks": checks,
    **dict.fromkeys(SHAPES, decoding),
    "training": training,
    "attention": attention,
}


def child(name: str, given: argparse.Namespace) -> int:
    """Run one section in this process."""
    section = Section(name, Path(given.child), torch.device(given.device), given.quick, given.limit)
    if given.device == "cuda":
        section.device = torch.device("cuda", torch.cuda.current_device())
    else:
        torch.set_num_threads(1)
    section.part("everything", lambda found: SECTIONS[name](section), 0)
    return 1 if section.errors else 0


def run_section(name: str, given: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run one section in a process of its own; what it had found when it died counts too."""
    with tempfile.TemporaryDirectory() as home:
        path, why = Path(home) / "section.json", ""
        command = [sys.executable, __file__, "--section", name, "--child", str(path)]
        command += ["--device", given.device, "--limit", str(limit - 5), *(["--quick"] if given.quick else [])]
        environment = {**os.environ, "EXITLM_CACHE": home}
        try:
            code = subprocess.run(command, timeout=limit, env=environment).returncode
            why = "" if code in SECTION_CODES else f"the process ended with code {code}"
        except subprocess.TimeoutExpired:
            why = f"the process was stopped after {limit:.0f} s"
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            found = {"parts": {}, "rows": [], "errors": []}
            why = why or "the process wrote nothing"
    if why:
        found["errors"].append({"part": name, "error": why, "traceback": ""})
    return found


def main() -> int:
    """Run the sections and write ``gpu.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round: exercises the program alone")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=600.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given.section[0], given)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; use --device cpu --quick to try the program itself", file=sys.stderr)
        return 2
    begin, path = time.monotonic(), Path()
    result: dict[str, Any] = {"rows": [], "sections": {}, "errors": []}
    for name in given.section:
        left = TOTAL - (time.monotonic() - begin)
        limit = min(float(LIMITS[name]), left) if given.device == "cuda" else 300.0
        found = run_section(name, given, limit) if limit > 20 else {"parts": {}, "rows": [], "errors": [
            {"part": name, "error": "no time was left", "traceback": ""}]}  # fmt: skip
        result["sections"][name] = found["parts"]
        result["rows"] += found["rows"]
        result["errors"] += found["errors"]
        path = save("gpu", {**result, "seconds": round(time.monotonic() - begin, 1)})
    print(f"{path}: {len(result['rows'])} figures, {len(result['errors'])} errors")
    for error in result["errors"]:
        print(f"\n{error['part']}: {error['error']}\n{error['traceback']}")
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
