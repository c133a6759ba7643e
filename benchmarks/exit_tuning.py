"""Exit tuning on a CPU by its two backbones: hidden states for 1,000 tokens, and the demo's quick tuning.

Section ``tuning`` of ``native.py``.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import at_least, at_most, interleave, ratios, seconds, spread, table

import exitlm
from decode import PROMPTS
from exitlm.demo import tuning as demo_tuning
from exitlm.train.backbone import Backbone, NativeBackbone, TorchBackbone
from exitlm.train.hidden import HiddenStates
from exitlm.weights.load import load_model


@torch.no_grad()
def hidden_states(llm: exitlm.LLM, rounds: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Seconds for 1,000 tokens of what tuning reads of the backbone, by blocks of several lengths."""
    layers, rows, claims = (8, 15, 22, 30), [], []
    exact = TorchBackbone(load_model("smollm2", dtype="float32"))
    backbones: dict[str, Backbone] = {
        "native": NativeBackbone(exact.model),
        "torch": exact,
        "torch, bfloat16": TorchBackbone(load_model("smollm2", dtype="bfloat16")),
    }
    words = torch.tensor(llm.encode(" ".join(text for texts in PROMPTS.values() for text in texts) * 4))
    for length in (64, 256, 1024):
        piece = words[:length]
        taps = {name: next(each.taps([piece], layers)) for name, each in backbones.items()}
        features = {name: backbones[name].features(taps[name][30].hidden[0]) for name in backbones}
        expected = [taps["torch"][layer].hidden for layer in layers]
        for part, work in (
            ("layers", lambda name, piece=piece: list(backbones[name].taps([piece], layers))),
            ("final head", lambda name, features=features: backbones[name].teacher(features[name], 1.0)),
        ):
            found = interleave({name: partial(seconds, partial(work, name)) for name in backbones}, rounds)
            for name, values in found.items():
                mine = (taps[name][layer].hidden.float() for layer in layers)
                error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, expected, strict=True))
                rows.append(
                    {"block": length, "part": part, "by": name,
                     "s for 1,000 tokens": spread([1e3 / length * v for v in values]),
                     "time of native": ratios(values, found["native"]),
                     "largest error": f"{error:.1e}" if part == "layers" else "-"}
                )  # fmt: skip
            claims.append(
                at_least(f"{part} of {length} tokens: speed of torch", ratios(found["torch"], found["native"]), 1.0)
            )
    return rows, claims


def quick_tuning(choose: Callable[[Any], Backbone]) -> tuple[float, float, dict[str, float]]:
    """Seconds of the demo's quick tuning and of its hidden states, with this backbone, and the exits' agreement."""
    module, spent, compute = sys.modules["exitlm.train.tune"], 0.0, HiddenStates.compute

    def timed(states: HiddenStates, index: int) -> Any:
        nonlocal spent
        begin = time.perf_counter()
        row = compute(states, index)
        spent += time.perf_counter() - begin
        return row

    with (
        tempfile.TemporaryDirectory() as home, contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()), patch.object(HiddenStates, "compute", timed),
        patch.object(module, "backbone_of", lambda model, *_: choose(model)),
    ):  # fmt: skip
        begin = time.perf_counter()
        out = exitlm.tune(demo_tuning(Path(home) / "adapter", quick=True))
        total = time.perf_counter() - begin
        exits = json.loads((out / "exits.json").read_text())["exits"]
    return total, spent, {f"exit {e['layer']}": e["record"]["agreement"] for e in exits}


def tuning(llm: exitlm.LLM, rounds: int) -> dict[str, Any]:
    """Hidden states of the frozen backbone, and whole runs on one text."""
    rows, claims = hidden_states(llm, rounds)
    print(table(rows))
    ways: dict[str, Callable[[Any], Backbone]] = {"native": NativeBackbone, "torch": TorchBackbone}
    runs: dict[str, list[Any]] = {name: [quick_tuning(ways[name])] for name in ways}  # the text is written here
    for name in list(ways) * max(5, rounds // 2):
        runs[name].append(quick_tuning(ways[name]))
    whole = {name: [run[0] for run in found[1:]] for name, found in runs.items()}
    part = {name: [run[1] for run in found[1:]] for name, found in runs.items()}
    quick = [
        {"quick tuning": name, "s": spread(whole[name]), "of it hidden states, s": spread(part[name]),
         "time of native": ratios(whole[name], whole["native"]),
         "hidden states' time of native": ratios(part[name], part["native"]), **runs[name][0][2]}
        for name in ways
    ]  # fmt: skip
    print(table(quick))
    both = [runs[name][0][2] for name in ways]
    apart = max(abs(both[0][name] - both[1][name]) for name in both[0])
    claims += [at_least("quick tuning: speed of torch's hidden states", ratios(part["torch"], part["native"]), 1.0),
               at_most("quick tuning: agreement apart from torch's", apart, 0.01)]  # fmt: skip
    return {"rows": rows, "whole runs": quick, "claims": claims}
