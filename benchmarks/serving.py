"""What the HTTP server takes: the engine's own loop beside the same texts through the server, and llama.cpp's server.

    python benchmarks/serving.py [--section speed peer] [--llama-python BIN] [--llama-server BIN] [--rounds 9]

Server and engine are in this process and share one engine, so that kernels, weights and threads are the same; they take
turns. The clients are another process (``clients.py``), on the same processors. ``speed``: tokens per second from the
first request to the last token, prompts included; the first byte; and what a token costs the server's processor.
``peer``: the same against llama.cpp on the same file, by 1, 4 and 8 clients: its Python server
(``--llama-python``: an interpreter that has llama_cpp with its extra ``server``), which answers one request after the
other, and its own one (``--llama-server``: that program), which decodes as many at a time as there are clients.
"""

from __future__ import annotations

import argparse
import itertools
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

from clients import Clients, Run
from measure import at_least, at_most, interleave, ratios, save, spread, table

import exitlm
from decode import PROMPTS
from exitlm.decode.engine import Engine
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.options import EngineConfig
from exitlm.native import library
from exitlm.serve.async_engine import AsyncEngine
from exitlm.serve.config import ServeConfig
from exitlm.serve.server import Server, listening
from exitlm.train.selftext import read_prompts
from exitlm.weights.source import resolve

PATH = "/v1/chat/completions"
SIZES = (1, 4, 8)
GOALS = {("whole", 1): 0.97, ("whole", 8): 0.95, ("streamed", 1): 0.93, ("streamed", 8): 0.80}
MICROSECONDS = 60.0  # of the processor, for a token of a stream
FIRST_BYTE = 10.0  # milliseconds after the engine's first token
HOW = {"engine": "the engine's own loop", "begun": "", "whole": "the server, whole", "streamed": "the server, streamed"}
COLUMNS = (
    "texts by", "at a time", "tokens/s", "of the engine's", "first token or byte, ms", "later than the engine's, ms",
    "HTTP side, µs a token", "HTTP side, ms a request", "process beyond the engine, µs a token", "clients, µs a token",
)  # fmt: skip
PEERS = {"python": "llama.cpp's Python server, one request at a time", "slots": "llama.cpp's own server"}


class Serving:
    """``exitlm serve`` in a thread of this process, as the command starts it."""

    def __init__(self, llm: exitlm.LLM, model: str) -> None:
        config = ServeConfig.of({"model": {"source": model}, "http": {"port": 0}})
        self._stack = ExitStack()
        listener = self._stack.enter_context(listening(config))
        self.port: int = listener.getsockname()[1]
        self.server = Server(config, lambda _: llm)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, name="server")
        self.delivering = 0.0  # processor seconds of the engine's thread for handing out what passes brought
        self._stack.enter_context(mock.patch.object(AsyncEngine, "_hand_out", self._metered(AsyncEngine._hand_out)))
        self.thread.start()
        while self.server.state.service is None:
            if self.server.failure is not None:
                raise self.server.failure
            time.sleep(0.01)
        assert self.thread.ident is not None
        self._clock = time.pthread_getcpuclockid(self.thread.ident)

    def _metered(self, call: Callable[[AsyncEngine], None]) -> Callable[[AsyncEngine], None]:
        def metered(engine: AsyncEngine) -> None:
            begin = time.thread_time()
            call(engine)
            self.delivering += time.thread_time() - begin

        return metered

    def cpu(self) -> float:
        """Processor seconds so far of what the engine alone would not do: the event loop's, and for handing it out."""
        return time.clock_gettime(self._clock) + self.delivering

    @property
    def loop(self) -> str:
        """The package of its event loop."""
        service = self.server.state.service
        assert service is not None
        return type(service.engine._loop).__module__.split(".")[0]

    def close(self) -> None:
        """End it as a signal would."""
        self.server.should_exit = True
        self.thread.join()
        self._stack.close()


@dataclass(kw_only=True)
class Figures:
    """What is counted beside speed, run by run: seconds to the first byte of an answer (the engine: to the first
    token); processor seconds of all that the engine alone would not do, of the whole process, and of the clients."""

    first: list[float]
    beyond: list[float]
    process: list[float]
    clients: list[float]

    @classmethod
    def none(cls) -> Figures:
        """Before the first run."""
        return cls(first=[], beyond=[], process=[], clients=[])

    def of(self, name: str) -> list[float]:
        """Those that count: the first run is not one of them."""
        return list(getattr(self, name))[1:]


def chats() -> list[str]:
    """Questions that no exit was tuned on."""
    return [text for texts in PROMPTS.values() for text in texts] + read_prompts("", 64)[1]


def groups(prompts: Sequence[str], size: int) -> Iterator[list[str]]:
    """Neighbouring prompts, other ones for each run, so that nobody finds the last run's in a cache."""
    for start in itertools.count(0, size):
        yield [prompts[(start + i) % len(prompts)] for i in range(size)]


def engine_run(engine: Engine, prompts: Iterator[list[list[int]]], tokens: int, figures: Figures) -> float:
    """Tokens per second of the engine's own loop."""
    config = GenerationConfig(mode="full", max_new_tokens=tokens, ignore_eos=True)
    texts = next(prompts)
    cpu, begin = time.process_time(), time.perf_counter()
    keys, firsts, written, done = [engine.add(ids, config) for ids in texts], {}, 0, 0
    while done < len(keys):
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.piece is not None:
                written += len(event.piece.tokens)
                firsts.setdefault(event.key, time.perf_counter() - begin)
            done += event.generation is not None
    seconds = time.perf_counter() - begin
    assert written == tokens * len(keys)
    figures.first.append(sum(firsts.values()) / len(firsts))
    figures.process.append(time.process_time() - cpu)
    return written / seconds


def server_run(
    serving: Serving, clients: Clients, prompts: Iterator[list[str]], tokens: int, figures: Figures, streamed: bool
) -> float:
    """Tokens per second through the server."""
    bodies = [_body(text, tokens, streamed) for text in next(prompts)]
    begin, cpu = serving.cpu(), time.process_time()
    run = clients.run(serving.port, PATH, bodies)
    begin, cpu = serving.cpu() - begin, time.process_time() - cpu
    if run.tokens != tokens * len(bodies):
        raise SystemExit(f"{run.tokens} tokens came, not {tokens * len(bodies)}")
    figures.first.append(sum(answer.first for answer in run.answers) / len(run.answers))
    figures.beyond.append(begin)
    figures.process.append(cpu)
    figures.clients.append(run.cpu)
    return run.tokens / run.seconds


def _body(text: str, tokens: int, streamed: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "exitlm": {"mode": "full"},
    }  # fmt: skip
    return found | {"stream": True, "stream_options": {"include_usage": True}} if streamed else found


def speed(llm: exitlm.LLM, given: argparse.Namespace) -> dict[str, Any]:
    """The engine alone, and through the server, whole answers and streams, by 1 and 8 clients. A stream of one token
    says what a request takes apart from its tokens."""
    texts, figures = chats(), {f"{how} {size}": Figures.none() for size in (1, 8) for how in HOW}
    encoded = {text: llm.encode(text, chat=True) for text in texts}
    actions: dict[str, Callable[[], float]] = {}
    with exit_of(Serving(llm, given.model)) as serving, exit_of(Clients()) as clients:
        for name, counted in figures.items():
            how, size = name.split()
            group, tokens = groups(texts, int(size)), 1 if how == "begun" else given.tokens
            if how == "engine":
                ids = ([encoded[text] for text in each] for each in group)
                actions[name] = partial(engine_run, llm.engine, ids, tokens, counted)
            else:
                actions[name] = partial(server_run, serving, clients, group, tokens, counted, how != "whole")
        found, loop = interleave(actions, given.rounds), serving.loop
    rows, claims = [], []
    for name, values in found.items():
        how, size = name.split()
        if how == "begun":
            continue
        mine, alone, begun = figures[name], figures[f"engine {size}"], figures[f"begun {size}"]
        tokens, several = given.tokens * int(size), f"{size} client{'s' * (size != '1')}"
        share = ratios(values, found[f"engine {size}"])
        later = spread([1e3 * (a - b) for a, b in zip(mine.of("first"), alone.of("first"), strict=True)])
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "-") | {
            "texts by": HOW[how], "at a time": size, "tokens/s": spread(values), "of the engine's": share,
        }  # fmt: skip
        rows.append(row)
        if how != "whole":
            row["first token or byte, ms"] = spread([1e3 * value for value in mine.of("first")])
        if how == "engine":
            continue
        beyond = [1e6 * (a - b) / tokens for a, b in zip(mine.of("process"), alone.of("process"), strict=True)]
        row["process beyond the engine, µs a token"] = spread(beyond)
        row["clients, µs a token"] = spread([1e6 * value / tokens for value in mine.of("clients")])
        kind = "streamed" if how == "streamed" else "not streamed"
        claims.append(at_least(f"{kind}, {several}: tokens/s of the engine's", share, GOALS[how, int(size)]))
        if how == "streamed":
            pairs = zip(mine.of("beyond"), begun.of("beyond"), strict=True)
            cost = spread([1e6 * (a - b) / (tokens - int(size)) for a, b in pairs])
            row["later than the engine's, ms"] = later
            row["HTTP side, µs a token"] = cost
            row["HTTP side, ms a request"] = spread([1e3 * value / int(size) for value in begun.of("beyond")])
            claims.append(at_most(f"streamed, {several}: processor time of a token event, µs", cost, MICROSECONDS))
            if size == "1":
                claims.append(at_most("first byte after the engine's first token, ms", later, FIRST_BYTE))
    print(table(rows))
    note = (
        "the HTTP side is the event loop's thread, and what the engine's thread takes to hand out what passes brought; "
        "of a request, a stream of one token; of a token, what a longer one takes beyond it. Clients run on the same "
        "processors"
    )
    return {"tokens of an answer": given.tokens, "event loop": loop, "notes": [note], "rows": rows,
            "claims": claims}  # fmt: skip


@contextmanager
def exit_of(thing: Any) -> Iterator[Any]:
    """Close it at the end."""
    try:
        yield thing
    finally:
        thing.close()


class LlamaServer:
    """A server of llama.cpp in a process of its own, on the same file and as many threads."""

    def __init__(self, kind: str, binary: str, size: int) -> None:
        """``size``: clients at a time."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        file, threads, context = str(resolve("smollm2")), str(library.default_threads()), 1024
        shared = ["--host", "127.0.0.1", "--port", str(self.port)]
        if kind == "python":
            command = [binary, "-m", "llama_cpp.server", "--model", file, "--n_ctx", str(context), *shared]
            command += ["--n_threads", threads, "--n_threads_batch", threads, "--verbose", "false"]
            command += ["--interrupt_requests", "false", "--logits_all", "false"]
        else:
            command = [binary, "--model", file, "--ctx-size", str(context * size), "--parallel", str(size), *shared]
            command += ["--threads", threads, "--threads-batch", threads]
        quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=quiet)
        self._await()

    def _await(self) -> None:
        until = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=5):
                    return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    self.process.kill()
                    raise SystemExit("llama.cpp's server did not start") from None
                time.sleep(0.2)

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()


def peer_run(
    port: int, clients: Clients, prompts: Iterator[list[str]], ours: bool, tokens: int, runs: list[Run]
) -> float:
    """Tokens per second of all clients together."""
    bodies = [_body(text, tokens, streamed=False) for text in next(prompts)]
    if not ours:
        bodies = [{name: body[name] for name in ("messages", "max_tokens", "temperature")} for body in bodies]
    run = clients.run(port, PATH, bodies)
    runs.append(run)
    return run.tokens / run.seconds


def peer(llm: exitlm.LLM, given: argparse.Namespace) -> dict[str, Any]:
    """This server and llama.cpp's: whole answers, every layer for every token, prompts included."""
    texts = chats()
    kinds = {kind: binary for kind in PEERS if (binary := getattr(given, f"llama_{LLAMA_OPTIONS[kind]}"))}
    actions: dict[str, Callable[[], float]] = {}
    runs: dict[str, list[Run]] = {}
    with ExitStack() as stack:
        serving = stack.enter_context(exit_of(Serving(llm, given.model)))
        clients = stack.enter_context(exit_of(Clients()))
        one = stack.enter_context(exit_of(LlamaServer("python", kinds["python"], 1))) if "python" in kinds else None
        for size in SIZES:
            ports = {"exitlm": serving.port}
            if one is not None:
                ports["python"] = one.port
            if "slots" in kinds:
                ports["slots"] = stack.enter_context(exit_of(LlamaServer("slots", kinds["slots"], size))).port
            for who, port in ports.items():
                name = f"{who} {size}"
                runs[name] = []
                actions[name] = partial(
                    peer_run, port, clients, groups(texts, size), who == "exitlm", given.tokens, runs[name]
                )
        found = interleave(actions, given.rounds)
    rows, claims = [], []
    for name, values in found.items():
        who, size = name.split()
        counted, ours = runs[name][1:], found[f"exitlm {size}"]
        ends = [[answer.end for answer in run.answers] for run in counted]
        rates = [[answer.tokens / answer.end for answer in run.answers] for run in counted]
        rows.append({
            "clients": size, "server": PEERS.get(who, "exitlm serve"), "tokens/s, all clients": spread(values),
            "tokens/s, a client": spread([sum(each) / len(each) for each in rates]),
            "the slowest client": spread([min(each) for each in rates]),
            "first answer, s": spread([min(each) for each in ends]),
            "last answer, s": spread([max(each) for each in ends]),
            "tokens of an answer": spread([run.tokens / len(run.answers) for run in counted]),
            "exitlm against it": ratios(ours, values),
        })  # fmt: skip
        if who != "exitlm":
            title = f"{size} client{'s' * (size != '1')}: tokens/s against {PEERS[who]}"
            claims.append(at_least(title, ratios(ours, values), 1.0))
    rows.sort(key=lambda row: int(row["clients"]))
    print(table(rows))
    note = (
        "llama_cpp.server (with logits_all off, which is faster than its default) holds one lock and has no slots: "
        "requests wait for one another, and more clients only wait longer; the package ships no program that decodes "
        "several at a time. Both sides write greedily, up to the same number of tokens; llama.cpp's answers end where "
        "the model ends them, exitlm's are told to go on. llama.cpp's threads wait for one another by spinning, so "
        "that a busy machine slows it far more than exitlm"
    )
    return {"tokens at most": given.tokens, "notes": [note], "rows": rows, "claims": claims}


LLAMA_OPTIONS = {"python": "python", "slots": "server"}
SECTIONS = {"speed": speed, "peer": peer}


def main() -> None:
    """Run the sections and write ``results/serving-SECTION.json`` for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--section", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--llama-python", help="an interpreter that has llama_cpp with its extra 'server'")
    parser.add_argument("--llama-server", help="llama.cpp's own server, the program llama-server")
    given = parser.parse_args()
    for section in given.section:
        if section == "peer" and not (given.llama_python or given.llama_server):
            print("peer: skipped, since it needs --llama-python or --llama-server")
            continue
        print(f"\n## {section}", flush=True)
        llm = exitlm.load(given.model, engine=EngineConfig(prefix_sharing=False))
        figures = SECTIONS[section](llm, given)
        print(table(figures["claims"]))
        print(save(f"serving-{section}", figures), flush=True)


if __name__ == "__main__":
    main()
