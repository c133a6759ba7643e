"""Pipelined decoding by real processes: what stages gain over one process on as many cores, and what messages cost.

    python benchmarks/pipelined.py MODEL --adapter DIR [--what one|several|sleeping|messages] [--rounds 15]

one        one text: `full` and `threshold` of one process on one core, and `threshold` on two stages of one core each,
           cut at the exit; beside 1 / (f + (1 - f)(1 - q)): f is what a shallow pass with its test takes of a full one,
           q how many tokens left there
several    four texts in `full`: one process on one core, on two, and two stages of one core each
sleeping   four stages that take a fixed time whatever they are asked: how busy they are with B texts, and one text
           against the same formula, with an exit behind the first stage that fires for a chosen share of tokens
messages   a pass of one row and back, between two processes, by the bytes of its hidden states

Every comparison is interleaved. Processes are held to their cores; a speed stands beside its agreement with `full`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from company import decode
from measure import Spread, at_least, at_most, interleave, ratios, save, seconds, spread, table

sys.path.insert(0, str(Path(__file__).parents[1]))  # models and stages of the tests

from tests.decode.models import drafting_model, random_ids
from tests.decode.remote.threads import KEY, InMemory, pipelined

import exitlm
from exitlm.decode.batch import Batch, Part
from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.options import EngineConfig
from exitlm.decode.remote import pipeline as pipelines
from exitlm.decode.remote import stage as stages
from exitlm.decode.remote.engine import PipelinedEngine
from exitlm.decode.remote.hello import greet, receive
from exitlm.decode.remote.link import Closed, Link
from exitlm.decode.remote.messages import of_brought, of_work, to_brought, to_work
from exitlm.decode.remote.stage import serve_link
from exitlm.decode.remote.worker import Worker
from exitlm.decode.work import Brought, Final, Scored, Wants, Work
from exitlm.model.decoder import EarlyExitModel
from exitlm.native import abi, library

PROMPTS = (
    "Once upon a time, in a small village near the sea, there lived",
    "The three most important things to know about the planet Mars are",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "Dear Sir or Madam,\n\nI am writing to ask about",
)


def held_to(core: int, llm: exitlm.LLM) -> None:
    """Keep this process's threads, or those of the stages that an engine starts, on one core each."""
    engine = llm.engine
    if not isinstance(engine, PipelinedEngine):
        return
    launcher: Any = engine.pipeline._launcher
    for number, process in launcher.processes.items():
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {(core + number) % (os.cpu_count() or 1)})


def loaded(source: str, adapter: str | None, **engine: Any) -> exitlm.LLM:
    """A model with its engine ready."""
    llm = exitlm.load(source, adapter=adapter, engine=EngineConfig(**engine))
    llm.generate("warm up", max_new_tokens=4, mode="full")
    held_to(0, llm)
    return llm


def agreement(found: Sequence[Generation], full: Sequence[Generation]) -> float:
    """Share of tokens of the texts that `full` has at the same place, up to the first that differs."""
    same = total = 0
    for one, other in zip(found, full, strict=True):
        pairs = [a == b for a, b in zip(one.token_ids, other.token_ids, strict=False)]
        same += pairs.index(False) if False in pairs else len(pairs)
        total += len(pairs)
    return same / total


# ---- one text


def one(source: str, adapter: str, rounds: int, tokens: int, layer: int, threshold: float) -> dict[str, Any]:
    """One text on two stages, cut at the exit."""
    L = exitlm.load(source).num_layers
    alone = loaded(source, adapter, threads=1)
    staged = loaded(source, adapter, threads=1, pipeline=2, layers_per_stage=(layer, L - layer))
    leaves = {"mode": "threshold", "exits": [layer], "threshold": threshold, "max_new_tokens": tokens}
    full = {"mode": "full", "max_new_tokens": tokens}
    rows, texts = [], dict[str, list[Generation]]()

    def speed(llm: exitlm.LLM, name: str, prompt: str, settings: dict[str, Any]) -> float:
        found = llm.generate(prompt, ignore_eos=True, **settings)
        texts.setdefault(name, []).append(found)
        return found.stats.tokens_per_second

    for prompt in PROMPTS:
        texts.clear()
        rates = interleave(
            {
                "full": lambda p=prompt: speed(alone, "full", p, full),
                "threshold": lambda p=prompt: speed(alone, "threshold", p, leaves),
                "two stages": lambda p=prompt: speed(staged, "two stages", p, leaves),
                "full, two stages": lambda p=prompt: speed(staged, "full, two stages", p, full),
            },
            rounds,
        )
        assert texts["two stages"][0].token_ids == texts["threshold"][0].token_ids, "the texts differ"
        q = sum(e == layer for e in texts["two stages"][0].exit_layers) / tokens
        f = shallow_share(alone, layer)
        bound = 1.0 / (f + (1.0 - f) * (1.0 - q))
        rows.append(
            {
                "prompt": prompt.split("\n")[0][:32],
                "q": round(q, 3),
                "f": round(f, 3),
                "formula": round(bound, 3),
                "threshold, one process": ratios(rates["threshold"], rates["full"]),
                "threshold, two stages": ratios(rates["two stages"], rates["full"]),
                "of the formula": ratios(rates["two stages"], [rate * bound for rate in rates["full"]]),
                "full, two stages": ratios(rates["full, two stages"], rates["full"]),
                "agreement with full": round(agreement(texts["threshold"][:1], texts["full"][:1]), 3),
            }
        )
        print(" ".join(str(value) for value in rows[-1].values()), flush=True)
    staged.close()
    return {"rows": rows, "claims": [
        at_least("one text on two stages, of the formula, by the worst prompt",
                 min((row["of the formula"] for row in rows), key=lambda s: s.median), 0.9),
    ]}  # fmt: skip


def shallow_share(llm: exitlm.LLM, layer: int) -> float:
    """What layers up to the exit and its test take of a whole token, by passes in turn."""
    runner = llm.engine.runner
    last, first = runner.segments, runner.bounds.index(layer)
    slots = tuple(((0, 129),) for _ in runner.pool.groups)
    writes = tuple(((128, 1),) for _ in runner.pool.groups)
    batch = Batch.of((Part(128, 1, tuple(0 for _ in slots), tuple(slots), tuple(writes)),))

    def shallow() -> None:
        arrived = runner.run(0, first, batch, runner.embed([5]))
        runner.exit_scores(first, arrived, [0])

    def whole() -> None:
        arrived = runner.run(0, last, batch, runner.embed([5]))
        runner.final_scores(arrived, [0])

    with torch.inference_mode():
        times = interleave({"shallow": lambda: seconds(shallow), "whole": lambda: seconds(whole)}, 60)
    return spread([a / b for a, b in zip(times["shallow"], times["whole"], strict=True)]).median


# ---- four texts


def several(source: str, adapter: str | None, rounds: int, tokens: int) -> dict[str, Any]:
    """Four texts on two cores, as threads of one process and as two stages."""
    engines = {
        "one process, 1 thread": loaded(source, adapter, threads=1),
        "two stages of 1 thread": loaded(source, adapter, threads=1, pipeline=2),
    }
    both = loaded(source, adapter, threads=2)
    texts: dict[str, list[Generation]] = {}

    def rate(name: str, llm: exitlm.LLM, threads: int) -> float:
        set_threads(threads)
        begin = time.perf_counter()
        texts[name] = llm.generate(list(PROMPTS), mode="full", max_new_tokens=tokens, ignore_eos=True)
        return 4 * tokens / (time.perf_counter() - begin)

    rates = interleave(
        {
            "one process, 1 thread": lambda: rate("one", engines["one process, 1 thread"], 1),
            "one process, 2 threads": lambda: rate("both", both, 2),
            "two stages of 1 thread": lambda: rate("stages", engines["two stages of 1 thread"], 1),
        },
        rounds,
    )
    assert [g.token_ids for g in texts["one"]] == [g.token_ids for g in texts["stages"]], "the texts differ"
    base = rates["one process, 1 thread"]
    rows = [
        {"engine": name, "tokens/s": spread(found), "of 1 thread": ratios(found, base)} for name, found in rates.items()
    ]
    gain = ratios(rates["two stages of 1 thread"], rates["one process, 2 threads"])
    engines["two stages of 1 thread"].close()
    return {"rows": rows, "claims": [at_least("two stages of what two threads gain", gain, 0.85)]}


def set_threads(threads: int) -> None:
    """The kernels have one number of threads for a process."""
    abi.Kernels(library.load().lib).threads(threads)
    torch.set_num_threads(threads)


# ---- stages that sleep


class Forked:
    """Stages that are forks of this process, so that they have the model already."""

    def __init__(self, model: EarlyExitModel) -> None:
        self._model = model

    def start(self, number: int) -> Link:
        """A stage."""
        near, far = socket.socketpair()
        if os.fork() == 0:
            near.close()
            os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})  # the head has the first core
            with contextlib.suppress(Closed):
                link = Link(far, "the head")
                greet(link, KEY)
                serve_link(link, InMemory(self._model))
            os._exit(0)
        far.close()
        link = Link(near, f"stage {number + 1}")
        receive(link, KEY)
        return link

    def stop(self, number: int) -> None:
        """It ends with its link."""

    def close(self) -> None:
        """They end with their links."""


class Sleeping(Worker):
    """Takes a fixed time for every pass."""

    stage = 0.01

    def perform(self, work: Work) -> Brought:
        """Run the pass, and wait until its time is over."""
        until = time.perf_counter() + self.stage
        found = super().perform(work)
        while (left := until - time.perf_counter()) > 0:
            time.sleep(max(0.0, left - 1e-4))
        return replace(found, seconds=self.stage)


def sleeping(rounds: int, tokens: int, stage: float) -> dict[str, Any]:
    """Four stages that take ``stage`` seconds for each pass."""
    Sleeping.stage = stage
    stages.Worker = pipelines.Worker = Sleeping  # type: ignore[attr-defined, misc]
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {0})
    model = drafting_model("llama", dtype=torch.float64)
    engine = pipelined(model, [1, 1, 1, 1], launcher=Forked(model))
    pipeline, rows, claims = engine.pipeline, list[dict[str, Any]](), []
    passes = [0]
    submit = pipeline.submit

    def counted(number: int, work: Work) -> int:
        passes[0] += 1
        return submit(number, work)

    pipeline.submit = counted  # type: ignore[method-assign]
    config = GenerationConfig(mode="full", max_new_tokens=tokens, ignore_eos=True)
    for B in (1, 2, 4, 8, 16, 32):
        shares, rates = [], []
        for turn in range(rounds):
            prompts = [random_ids(3, 100 * turn + i) for i in range(B)]
            window = decode(engine, prompts, config, lambda: float(passes[0]))
            shares.append(window.metered * stage / window.seconds / 4)
            rates.append(window.rate * 4 * stage / B)
        rows.append({"texts": B, "mode": "full", "share of the stages busy": spread(shares),
                     "tokens of a text in the time of four stages": spread(rates)})  # fmt: skip
        print(" ".join(map(str, rows[-1].values())), flush=True)
        if B >= 8:
            claims.append(at_least(f"share of four stages that is busy with {B} texts", spread(shares), 0.9))
    for threshold in (0.0, 0.03, 0.05, 0.08, 0.4):
        found = []
        for turn in range(rounds):
            leaves = GenerationConfig(
                mode="threshold", exits=[1], rule="probability", threshold=threshold, max_new_tokens=4 * tokens,
                ignore_eos=True,
            )  # fmt: skip
            text = engine.generate(random_ids(3, turn), leaves)
            q = sum(e == 1 for e in text.exit_layers[1:]) / (len(text.exit_layers) - 1)
            found.append((q, text.stats.tokens_per_second * 4 * stage * (0.25 + 0.75 * (1.0 - q))))
        of, q = spread([share for _, share in found]), spread([q for q, _ in found])
        rows.append({"texts": 1, "mode": f"threshold {threshold}, q = {q}", "share of the stages busy": "",
                     "tokens of a text in the time of four stages": of})  # fmt: skip
        print(" ".join(map(str, rows[-1].values())), flush=True)
        claims.append(at_least(f"one text on four stages, of the formula, q = {q.median:.2f}", of, 0.9))
    for limit in (1, 4):  # drafts go on while those before them are verified
        found = []
        for turn in range(rounds):
            drafts = GenerationConfig(
                mode="lossless", exits=[1], draft=("exits",), rule="probability", threshold=0.0, max_draft=limit,
                max_new_tokens=2 * tokens, ignore_eos=True,
            )  # fmt: skip
            stats = engine.generate(random_ids(3, turn), drafts).stats
            found.append((stats.accepted / max(1, stats.drafted), stats.tokens_per_second * 4 * stage))
        accepted = spread([a for a, _ in found])
        rows.append({"texts": 1, "mode": f"lossless, at most {limit} drafts, accepted {accepted}",
                     "share of the stages busy": "",
                     "tokens of a text in the time of four stages": spread([speed for _, speed in found])})  # fmt: skip
        print(" ".join(map(str, rows[-1].values())), flush=True)
    engine.close()
    return {"rows": rows, "stage_seconds": stage, "claims": claims}


# ---- messages


@dataclass(frozen=True)
class Sizes:
    """Rows of a message, and the width of their hidden states."""

    rows: int
    width: int


def messages(rounds: int) -> dict[str, Any]:
    """A pass to another process and its answer, of which nothing is computed: half of it is a message."""
    listener = socket.create_server(("127.0.0.1", 0))
    if os.fork() == 0:
        far = Link(socket.create_connection(listener.getsockname()), "the head")
        far.trust()
        try:
            while True:
                work = to_work(far.receive(), ["exits"], [1000], 32)
                finals = {final.row: Scored(best=5) for final in work.wants.finals}
                far.send(of_brought(Brought(work.number, 0.0, {}, finals, {}, work.hidden_MD), ["exits"]))
        except Closed:
            os._exit(0)
    connection, _ = listener.accept()
    link = Link(connection, "the stage")
    link.trust()

    def once(sizes: Sizes) -> float:
        parts = tuple(Part(200, 1, (0,), (((0, 201),),), (((200, 1),),)) for _ in range(sizes.rows))
        hidden = torch.zeros(sizes.rows, sizes.width)
        finals = tuple(Final(row, False) for row in range(sizes.rows))
        batch, found = Batch.of(parts), []
        for number in range(400):
            begin = time.perf_counter()
            link.send(of_work(Work(number, 1, 2, batch, Wants(finals=finals), hidden_MD=hidden), ["exits"]))
            to_brought(link.receive(), ["exits"])
            found.append((time.perf_counter() - begin) / 2 * 1e6)
        return spread(found).median

    cases = {f"{rows} x {width}": Sizes(rows, width) for rows in (1, 8, 64) for width in (576, 4096)}
    found = interleave({name: (lambda s=sizes: once(s)) for name, sizes in cases.items()}, rounds)  # type: ignore[misc]
    with awake():
        busy = interleave({name: (lambda s=sizes: once(s)) for name, sizes in cases.items()}, rounds)  # type: ignore[misc]
    rows = [
        {
            "rows x width": name, "bytes": cases[name].rows * cases[name].width * 4,
            "us a message, cores idle between": spread(times), "cores kept awake": spread(busy[name]),
        }
        for name, times in found.items()
    ]  # fmt: skip
    one_row: Spread = spread(busy["1 x 576"])
    return {"rows": rows, "claims": [at_most("microseconds of a message of one row, cores kept awake", one_row, 60.0)]}


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Keep every core from sleeping, by programs that give way to all others: a virtual core takes long to wake."""
    loops = [
        subprocess.Popen([sys.executable, "-c", "import os; os.nice(19)\nwhile True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    """Measure and write ``results/pipelined-WHAT.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--adapter")
    parser.add_argument("--what", default="messages", choices=["one", "several", "sleeping", "messages"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--layer", type=int, default=15, help="the exit at which `one` cuts")
    parser.add_argument("--threshold", type=float, default=0.6)
    parser.add_argument("--stage", type=float, default=0.02, help="seconds of a stage that sleeps")
    given = parser.parse_args()
    if given.what == "one":
        figures = one(given.model, given.adapter, given.rounds, given.tokens, given.layer, given.threshold)
    elif given.what == "several":
        figures = several(given.model, given.adapter, given.rounds, given.tokens)
    elif given.what == "sleeping":
        figures = sleeping(given.rounds, given.tokens, given.stage)
    else:
        figures = messages(given.rounds)
    print(table(figures["rows"]))
    print(table(figures["claims"]))
    print(save(f"pipelined-{given.what}", figures))


if __name__ == "__main__":
    main()
