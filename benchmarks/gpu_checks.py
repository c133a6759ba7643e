"""What must be right on a GPU, checked there: eager and recorded passes against the plain model, texts against texts.

Not a test of pytest, which GPU machines may lack: ``gpu.py`` runs these functions and records what they find. Each
returns one row per figure, with its limit, and raises :class:`AssertionError` naming the figures beyond their limits.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from tests.decode.driver import Driver, advance_many, logits_of, make_runner
from tests.decode.models import drafting_model, generate, greedy_reference, make_engine, random_ids, worst
from tests.decode.patterns import long_model, walk
from tests.model.families import FAMILIES, tiny_model

from exitlm.decode.engine import Engine
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.kernels.fused import FusedModel
from exitlm.decode.kernels.graphs import attend_in_chunks
from exitlm.decode.pricing.measure_costs import measure
from exitlm.model import EarlyExitModel

Rows = list[dict[str, Any]]
# What kernels of different shapes may differ by; attention in float32 multiplies in several TF32 products.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.15}


def families(quick: bool) -> tuple[str, ...]:
    """The families to check."""
    return ("llama", "gemma3_text") if quick else FAMILIES


def sizes(family: str) -> dict[str, Any]:
    """A head width that fused attention kernels take."""
    return {} if family == "phi3" else {"head_dim": 16}


def judged(rows: Rows) -> Rows:
    """The rows, if no value is beyond its limit."""
    wrong = [
        f"{row['what']}: {row['value']} (limit {row['limit']})" for row in rows if not row["value"] <= row["limit"]
    ]
    assert not wrong, "; ".join(wrong)
    return rows


@torch.inference_mode()
def decoded(fused: FusedModel, ids: list[int], start: int) -> torch.Tensor:
    """Logits of the positions from ``start - 1`` on, by a prefill and passes of one to five rows."""
    runner = make_runner(fused, len(ids) + 64)
    driver, rng = Driver(runner), random.Random(0)
    found = [logits_of(runner, driver.advance(ids[:start]))[-1:]]
    while driver.length < len(ids):
        count = rng.choice((1, 1, 2, 3, 5))
        found.append(logits_of(runner, driver.advance(ids[driver.length : driver.length + count])))
    return torch.cat(found)


def precision(device: torch.device, compile: str, quick: bool) -> Rows:
    """Logits of the engine, eager and recorded, against the plain model; in bfloat16 both against float64."""
    rows: Rows = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for way in ("none", compile):
            found, plain = [0.0], [0.0]
            for family in families(quick):
                model = tiny_model(family, dtype, **sizes(family)).to(device)
                fused, ids = FusedModel(model, "none", way), random_ids(72)
                mine, theirs = decoded(fused, ids, 40).double(), model.logits(ids)[0, 39:].double()
                exact = model.double().logits(ids)[0, 39:]
                found.append(worst(mine, exact))
                plain.append(worst(theirs, exact))
                assert fused.static is None or not fused.static.broken, "passes could not be recorded"
            limit = LIMITS[dtype] if dtype != torch.bfloat16 else 2 * max(plain) + 0.01
            rows.append({"what": f"logits, {dtype}, {way}", "value": max(found), "limit": limit})
    return judged(rows)


def patterns(device: torch.device, compile: str, quick: bool) -> Rows:
    """Random passes, exits and rollbacks of several sequences, recorded against eager, within a bucket of keys and
    across boundaries."""
    rows: Rows = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for start, steps in ((3, 12), (250, 6), (1018, 6)):
            found = [0.0]
            every = start == 3 and dtype == torch.float64
            for family in families(quick) if every else ("llama", "mistral"):
                model = long_model(family, dtype, **sizes(family)).to(device)
                pair = FusedModel(model, "none"), FusedModel(model, "none", compile)
                with torch.inference_mode():
                    found.append(walk(pair, start, steps, start))
                assert pair[1].static is not None
                assert not pair[1].static.broken, "passes could not be recorded"
            rows.append({"what": f"patterns, {dtype}, from {start}", "value": max(found), "limit": LIMITS[dtype]})
    return judged(rows)


def company(device: torch.device, compile: str, quick: bool) -> Rows:
    """Logits of 1, 4, 8 and 16 rows of so many sequences, recorded, against the plain model's for each text alone; in
    blocks that lie together and in scattered ones."""
    rows: Rows = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for count in (1, 4, 8, 16):
            found, plain = [0.0], [0.0]
            for family in families(quick)[:: 1 if dtype == torch.float64 else 4]:
                model = tiny_model(family, dtype, **sizes(family)).to(device)
                runner = make_runner(FusedModel(model, "none", compile), 2 * count * 64)
                texts = [random_ids(20 + i, i) for i in range(count)]
                drivers = [Driver(runner, scatter=i % 3) for i in range(count)]
                with torch.inference_mode():
                    for driver, text in zip(drivers, texts, strict=True):
                        driver.advance(text[:-3])
                    for at in (-3, -2, -1):
                        moves = [(driver, [text[at]]) for driver, text in zip(drivers, texts, strict=True)]
                        out = [logits_of(runner, arrived)[0].double() for arrived in advance_many(moves)]
                theirs = [model.logits(text)[0, -1].double() for text in texts]
                exact = [model.double().logits(text)[0, -1] for text in texts]
                found += [worst(a, b) for a, b in zip(out, exact, strict=True)]
                plain += [worst(a, b) for a, b in zip(theirs, exact, strict=True)]
                assert runner.fused.static is None or not runner.fused.static.broken, "passes could not be recorded"
            limit = LIMITS[dtype] if dtype != torch.bfloat16 else 2 * max(plain) + 0.01
            rows.append({"what": f"{count} sequences, {dtype}", "value": max(found), "limit": limit})
    return judged(rows)


def chunked_attention(device: torch.device, compile: str, quick: bool) -> Rows:
    """Attention in chunks, some of them without a visible key, against float64; each row has keys of its own."""
    rows: Rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(0)
        found = [0.0]
        for count, queries, size in ((1, 4, 64), (3, 12, 128), (16, 8, 128)):
            query = torch.randn(count, 2, queries, size, generator=generator).to(device, dtype)
            seen = torch.randn(2, count, 2, 1024, size, generator=generator).to(device, dtype)
            mask = torch.zeros(count, queries, 1024, dtype=dtype, device=device)
            for row in range(count):
                mask[row, :, 400 - 20 * row :] = max(-1e30, torch.finfo(dtype).min / 2)
            exact = attend_in_chunks(query.double(), seen.double(), mask.double(), size**-0.5, 4)
            found.append(worst(attend_in_chunks(query, seen, mask, size**-0.5, 4).double(), exact))
        limit = 1e-3 if dtype == torch.float32 else 0.04
        rows.append({"what": f"attention in chunks, {dtype}", "value": max(found), "limit": limit})
    return judged(rows)


def on(model: EarlyExitModel, device: torch.device) -> EarlyExitModel:
    """A copy of a shared model on the device."""
    return copy.deepcopy(model).to(device)


def together(engine: Engine, model: EarlyExitModel, way_of: list[dict[str, Any]], count: int) -> list[bool]:
    """Whether texts that are decoded together, each in its own mode, are those of each alone."""
    prompts = [random_ids(4 + i, 50 + i) for i in range(5)]
    requests = [
        (prompt, GenerationConfig.of({**way_of[i % len(way_of)], "max_new_tokens": count, "ignore_eos": True}))
        for i, prompt in enumerate(prompts)
    ]
    out = {index: event.generation for index, _, event in engine.events(requests) if event.generation is not None}
    return [out[i].token_ids == greedy_reference(model, prompt, count) for i, prompt in enumerate(prompts)]


def texts(device: torch.device, compile: str, quick: bool) -> Rows:
    """In float64: full is the plain model's greedy text, lossless is full, threshold mode is that of eager passes."""
    same: list[bool] = []
    ways: list[dict[str, Any]] = [{"mode": "full"}]
    ways += [{"mode": "lossless", "threshold": threshold} for threshold in (0.2, 0.6)]
    for family in families(quick):
        model = on(drafting_model(family), device)
        engines = make_engine(model, compile="none"), make_engine(model, compile=compile)
        for seed in range(2 if quick else 3):
            prompt = random_ids(6, seed)
            settings: dict[str, Any] = {"max_new_tokens": 32, "ignore_eos": True}
            reference = greedy_reference(model, prompt, 32)
            for engine in engines:
                same += [generate(engine, prompt, **way, **settings).token_ids == reference for way in ways]
            if seed == 0:
                for engine in engines:
                    same += together(engine, model, way_of=ways, count=32)
            settings |= {"mode": "threshold", "threshold": 0.5}
            for rule in ("probability", "gate"):
                one, two = (generate(engine, prompt, rule=rule, **settings) for engine in engines)
                same.append((one.token_ids, one.exit_layers) == (two.token_ids, two.exit_layers))
    return judged([{"what": f"texts that differ, of {len(same)}", "value": same.count(False), "limit": 0}])


SETTINGS: dict[str, dict[str, Any]] = {
    **{rule: {"mode": "threshold", "rule": rule, "threshold": 0.5} for rule in ("probability", "margin", "entropy")},
    "gate": {"mode": "threshold", "rule": "gate", "threshold": 0.5},
    "decay": {"mode": "threshold", "rule": "decay", "threshold": 0.5},
    "patience": {"mode": "threshold", "rule": "patience", "patience": 2},
    "fixed": {"mode": "threshold", "rule": "fixed", "exit_layer": 2},
    "capped": {"mode": "threshold", "rule": "fixed", "exit_layer": 1, "max_pending": 3},
    "sampled": {"mode": "full", "temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    "penalised": {"mode": "full", "repetition_penalty": 1.3, "logprobs": 3},
    "sampled losslessly": {"mode": "lossless", "threshold": 0.2, "temperature": 1.0, "top_p": 0.9},
}


def settings_of_generation(device: torch.device, compile: str, quick: bool) -> Rows:
    """In float64: every rule and every filter of the sampler writes on the device what it writes on a CPU."""
    there = make_engine(on(drafting_model("llama"), device), compile=compile)
    here = make_engine(drafting_model("llama"))
    wrong = []
    for name, settings in SETTINGS.items():
        for seed in range(2):
            one, two = (
                generate(engine, random_ids(5, seed), max_new_tokens=24, seed=seed, ignore_eos=True, **settings)
                for engine in (here, there)
            )
            if (one.token_ids, one.exit_layers) != (two.token_ids, two.exit_layers):
                wrong.append(name)
    assert not wrong, f"settings with another text than on a CPU: {wrong}"
    return [{"what": f"settings that differ, of {len(SETTINGS)}", "value": 0, "limit": 0}]


def costs(device: torch.device, compile: str, quick: bool) -> Rows:
    """The costs that an engine measures are positive."""
    engine = Engine(on(drafting_model("llama"), device), compile=compile)
    found = measure(engine.runner)
    assert all(value > 0 for value in (*found.layer, *found.head, *found.test.values(), *found.draft.values()))
    return [{"what": "seconds of a layer of a tiny model", "value": found.layer[0], "limit": 1.0}]


CHECKS = (precision, patterns, company, chunked_attention, texts, settings_of_generation, costs)
