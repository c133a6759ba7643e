"""The engine over stand-ins of its runner, so that what it does itself can be measured: exits on a simulated device,
and what a step takes outside of kernels.

``forced``: each pass sleeps the time of a table that is flat in rows and computes nothing; exits fire by a seeded coin.
What is reached is compared with S(B, k), the closed form for fixed rounds. ``overhead``: layers and final head return
at once, so that planning, bookkeeping, sampling and text are left. Indexing the keys' slots belongs to the runner's
pass, and is not counted.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import company
import torch
from measure import at_least, at_most, interleave, quartiles, ratios, spread, table
from torch import Tensor

import exitlm
from decode import PROMPTS
from exitlm.decode.batch import Batch
from exitlm.decode.engine import Engine
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.kernels.runner import Arrived, Runner
from exitlm.decode.options import EngineConfig
from exitlm.decode.pricing.costs import Costs
from exitlm.decode.sampling.sampler import finite_rows
from exitlm.model.exits import ExitConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # the simulator and small models are shared with the tests

from tests.decode.models import attach
from tests.decode.simulation import best_predicted, cost_table
from tests.model.families import tiny_model

FIRING, EXIT_LAYER = 0.7, 1  # of four layers, without a head: f = .25
_SPIN = 0.0003  # seconds before the end of a pass in which it is waited for without sleeping
_PASS = 0.1  # seconds of a full pass
_DECK = 100  # tests of which exactly a share of FIRING fires
_STEPS = 64  # steps of one measurement


class SimulatedRunner(Runner):
    """Passes sleep a table's times, ``busy`` seconds so far. An exit's logits are certain or flat, by a seeded coin;
    the final head's are certain."""

    def __init__(self, fused: Any, options: EngineConfig, *, costs: Costs, seed: int) -> None:
        super().__init__(fused, options)
        self.costs = costs
        self.busy = 0.0
        self.coins: list[bool] = []
        self.random = random.Random(seed)

    def run(self, first: int, last: int, batch: Batch, hidden_MD: Tensor) -> Arrived:
        """Nothing but time."""
        self._sleep(self.costs.span(self.bounds[first], self.bounds[last], batch.count))
        return Arrived(hidden_MD, hidden_MD)

    def exit_logits(self, boundary: int, arrived: Arrived, rows: Sequence[int]) -> Tensor:
        """Of some rows; those that fire have one token that is certain."""
        logits_TV = self._flat(len(rows))
        logits_TV[[i for i in range(len(rows)) if self._fires()], 5] = 100.0
        return logits_TV

    def final_logits(self, arrived: Arrived, rows: Sequence[int]) -> Tensor:
        """Of some rows, after the head's time."""
        self._sleep(self.costs.final(len(rows)))
        logits_TV = self._flat(len(rows))
        logits_TV[:, 7] = 100.0
        return logits_TV

    def _sleep(self, seconds: float) -> None:
        self.busy += seconds
        end = time.perf_counter() + seconds
        if seconds > _SPIN:
            time.sleep(seconds - _SPIN)
        while time.perf_counter() < end:
            pass

    def _flat(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.fused.config.vocab_size)

    def _fires(self) -> bool:
        """The next of a shuffled deck, which is as good as a coin for neighbours, and has no luck in the long run."""
        if not self.coins:
            self.coins = [i < FIRING * _DECK for i in range(_DECK)]
            self.random.shuffle(self.coins)
        return self.coins.pop()


def simulated_engine(costs: Costs, seed: int) -> tuple[Engine, SimulatedRunner]:
    """An engine whose passes take the times of ``costs``, and its runner."""
    model = attach(tiny_model("llama", max_position_embeddings=4096), [ExitConfig(layer=EXIT_LAYER)])
    with mock.patch("exitlm.decode.engine.Runner", partial(SimulatedRunner, costs=costs, seed=seed)):
        engine = Engine(model, quant="none", costs=costs)
    assert isinstance(engine.runner, SimulatedRunner)
    return engine, engine.runner


def forced(rounds: int, tokens: int) -> dict[str, Any]:
    """Exits that fire by chance on a flat table: the engine's speed against S(B, k) as its wait bound allows k, by the
    clock and by the device's own time. ``tokens`` in all at each B; plain decoding, which chance does not touch,
    decodes a tenth of them."""
    costs, rows, claims = replace(cost_table({1: 1.0, 512: 1.0}), speed=_PASS), [], []
    leaves: dict[str, Any] = {"mode": "threshold", "rule": "probability", "threshold": 0.5, "exits": [EXIT_LAYER]}
    for B in (1, 2, 4, 8):
        prompts, count = [[3 + i, 4, 5, 6] for i in range(B)], max(8, tokens // B)
        engine, runner = simulated_engine(costs, seed=B)
        free = GenerationConfig(**leaves, max_new_tokens=count, ignore_eos=True)
        full = GenerationConfig(mode="full", max_new_tokens=max(8, count // 10), ignore_eos=True)
        decode = partial(company.decode, engine, prompts, meter=lambda runner=runner: runner.busy)
        decode(replace(full, max_new_tokens=2))
        found = [(decode(full), decode(free)) for _ in range(rounds)]
        plain, forced = [a.rate for a, _ in found], [b.rate for _, b in found]
        S, k = best_predicted(costs, B, FIRING, wait=engine.options.max_wait, layer=EXIT_LAYER)
        by_table = B / costs.full(B)
        reached = spread([rate / by_table / S for rate in forced])
        rows.append({
            "B": B, "plain by the table, tokens/s": f"{by_table:.4g}", "full, tokens/s": spread(plain),
            "forced, tokens/s": spread(forced), "against full": ratios(forced, plain),
            "quartiles": quartiles(forced, plain), "S": f"{S:.3f}", "k": k, "of S": reached,
            "of S by the device's time": spread([b.tokens / b.metered / by_table / S for _, b in found]),
        })  # fmt: skip
        claims.append(at_least(f"B = {B}: speed on the simulated device, of S(B, {k})", reached, 0.95))
    print(table(rows))
    details = {"q": FIRING, "f": EXIT_LAYER / costs.num_hidden_layers, "a full pass, s": _PASS}
    return {**details, "tokens": tokens, "rows": rows, "claims": claims}


# ---- a step without kernels


def overhead(llm: exitlm.LLM, rounds: int) -> dict[str, Any]:
    """Processor time of a step in ``full`` behind 128 positions, layers and final head apart, and of its two reads of
    the final logits, argmax and the check that they are finite. The least of the repetitions, by one thread."""
    sizes, threads = (1, 8, 32), torch.get_num_threads()
    engine = Engine(llm.model, quant="none", tokenizer=llm.tokenizer)
    torch.set_num_threads(1)
    try:
        with ExitStack() as stack:
            vocab_size = llm.model.config.vocab_size
            logits_RV = torch.randn(2 * sizes[-1], vocab_size, generator=torch.Generator().manual_seed(0))
            stack.enter_context(mock.patch.object(engine.runner, "run", _arrive))
            stack.enter_context(mock.patch.object(engine.runner, "final_logits", _Logits(logits_RV)))
            actions: dict[str, Callable[[], float]] = {}
            for B in sizes:
                prompts = company.passages(llm, [*itertools.chain(*PROMPTS.values())], B, 128)
                actions[f"step {B}"] = partial(step_seconds, engine, prompts)
                actions[f"argmax {B}"] = partial(_processor, lambda B=B: logits_RV[:B].argmax(-1).tolist())
                actions[f"finite {B}"] = partial(_processor, lambda B=B: finite_rows(logits_RV[:B]))
            with torch.inference_mode():
                found = interleave(actions, rounds)
    finally:
        torch.set_num_threads(threads)
    least = {name: min(values) * 1e3 for name, values in found.items()}
    rows, rest = [], {}
    for B in sizes:
        step, argmax, finite = (least[f"{name} {B}"] for name in ("step", "argmax", "finite"))
        rest[B] = step - argmax - finite
        rows.append({
            "B": B, "step, ms": f"{step:.3f}", "median step, ms": spread([v * 1e3 for v in found[f"step {B}"]]),
            "argmax, ms": f"{argmax:.3f}", "finiteness, ms": f"{finite:.3f}", "the rest, ms": f"{rest[B]:.3f}",
            "the rest, for each further row": "-" if B == 1 else f"{(rest[B] - rest[1]) / (B - 1):.4f}",
        })  # fmt: skip
    print(table(rows))
    more = (rest[sizes[-1]] - rest[1]) / (sizes[-1] - 1)
    claims = [
        at_most("B = 1: ms of a step outside of kernels, argmax and finiteness apart", rest[1], 0.3),
        at_most(f"ms for each further row, of {sizes[-1]}", more, 0.05),
    ]
    return {"repetitions": rounds, "rows": rows, "claims": claims}


def _arrive(first: int, last: int, batch: Batch, hidden_MD: Tensor) -> Arrived:
    """A pass that is over at once."""
    return Arrived(hidden_MD, hidden_MD)


class _Logits:
    """Prepared final logits ``[R, V]``: the next rows at each call, so that tokens differ."""

    def __init__(self, logits_RV: Tensor) -> None:
        self.logits_RV, self.at = logits_RV, 0

    def __call__(self, arrived: Arrived, rows: Sequence[int]) -> Tensor:
        self.at = (self.at + 1) % (len(self.logits_RV) - len(rows) + 1)
        return self.logits_RV[self.at : self.at + len(rows)]


def _processor(action: Callable[[], object]) -> float:
    """Processor seconds of an action, on average over some."""
    begin = time.process_time()
    for _ in range(_STEPS):
        action()
    return (time.process_time() - begin) / _STEPS


def step_seconds(engine: Engine, prompts: Sequence[Sequence[int]]) -> float:
    """Processor seconds of a step in which each text gets a token, on average over some."""
    config = GenerationConfig(mode="full", max_new_tokens=2 * _STEPS + len(prompts), ignore_eos=True)
    keys = [engine.add(prompt, config) for prompt in prompts]
    begun: set[int] = set()
    while len(begun) < len(keys):
        begun |= {event.key for event in engine.step()}
    found = _processor(engine.step)
    for key in keys:
        engine.abort(key)
    return found
