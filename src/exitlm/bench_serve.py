"""``exitlm bench-serve``: its flags, and a run from the first request to the table and the picture.

The load itself is :mod:`exitlm.serve.bench`. Nothing heavy is loaded to parse or to print help.
"""

from __future__ import annotations

import argparse
import json as json_format
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exitlm.assignments import assignments
from exitlm.errors import UserError, nearest

if TYPE_CHECKING:
    import asyncio

    import httpx2

    from exitlm.serve.bench.client import LoadClient
    from exitlm.serve.bench.figures import Figures, Spread
    from exitlm.serve.bench.records import Ask, Record

ENDPOINTS = {"chat": "chat/completions", "completions": "completions"}
_BUSY = 0.7  # of a processor: from there on what is slow may be the load generator itself
_SHARED = 0.15  # of the prompt tokens, cached by the server: from there on it is worth saying
_ROWS = {
    "TTFT, first text": "ttft", "ITL, between texts": "itl", "TPOT, per token": "tpot",
    "whole answer": "end_to_end", "sent late by": "late",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is sent where: ``rate`` requests a second on average, or by ``clients`` that wait for their answers."""

    url: str
    model: str
    endpoint: str
    rate: float | None
    clients: int | None
    requests: int
    warmup: int
    prompts: str | None
    max_tokens: int
    stream: bool
    seed: int
    timeout: float
    fields: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What was planned, and what became of it. ``busy``: the share of a processor that this program used."""

    plan: Plan
    records: Sequence[Record]
    figures: Figures
    busy: float


def bench_serve(
    *,
    url: str,
    model: str | None = None,
    api_key: str | None = None,
    endpoint: str = "chat",
    rate: float | None = None,
    clients: int | None = None,
    requests: int = 100,
    warmup: int = 1,
    prompts: str | None = None,
    max_tokens: int = 128,
    stream: bool = True,
    seed: int = 0,
    timeout: float = 600.0,
    set: Sequence[str] = (),
    json: bool = False,
    out: str | None = None,
    png: str | None = None,
) -> int:
    """Put load on a server with OpenAI's interface, and say how long its answers take."""
    fields, sections = assignments(set, ("exitlm",))
    if sections["exitlm"]:
        fields["exitlm"] = sections["exitlm"]
    plan = Plan(
        url=url, model=model or "", endpoint=endpoint, rate=rate, clients=1 if clients is rate is None else clients,
        requests=requests, warmup=warmup, prompts=prompts, max_tokens=max_tokens, stream=stream, seed=seed,
        timeout=timeout, fields=fields,
    )  # fmt: skip
    _check(plan)
    _check_place(out, png)
    import asyncio

    run = asyncio.run(measure(plan, api_key))
    _write(run, json=json, out=out, png=png)
    return 0 if run.figures.whole else 1


def _check(plan: Plan) -> None:
    """Refuse a plan that can't be followed."""
    if plan.endpoint not in ENDPOINTS:
        known = " or ".join(ENDPOINTS)
        raise UserError(f"--endpoint is '{plan.endpoint}', but must be {known}{nearest(plan.endpoint, ENDPOINTS)}")
    if plan.rate is not None and plan.clients is not None:
        raise UserError("--rate sends by a plan of arrivals, --clients waits for answers; leave one of them out")
    for name, least in (("clients", 1), ("requests", 1), ("warmup", 0), ("max_tokens", 1)):
        if (value := getattr(plan, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}, but must be {least} or more")
    for name in ("rate", "timeout"):
        if (value := getattr(plan, name)) is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} is {value:g}, but must be a number above 0")


def _check_place(out: str | None, png: str | None) -> None:
    """Refuse what is not installed or can't be written before minutes of measuring, not after."""
    try:
        import httpx2  # noqa: F401
    except ImportError:
        raise UserError("bench-serve needs httpx2; install it with: pip install 'exitlm[serve]'") from None
    if png is not None:
        from exitlm.evaluate.plots import check_picture

        check_picture(Path(png))
    if out is not None and Path(out).is_dir():
        raise UserError(f"--out {out} is a directory; name a file")


# ---- measuring


async def measure(plan: Plan, api_key: str | None, transport: httpx2.AsyncBaseTransport | None = None) -> Run:
    """Follow a plan; without a model in it, the first one that the server offers is asked. ``transport`` replaces the
    network.

    Raises:
        UserError: the server is not there, or refuses the first request.
    """
    from exitlm.serve.bench.asks import asks_of, built_in, read_file
    from exitlm.serve.bench.client import LoadClient, first_model, new_client
    from exitlm.serve.bench.figures import figures
    from exitlm.serve.bench.load import arrivals, closed_loop, open_loop
    from exitlm.serve.wire import base_of, headers

    base, count = base_of(plan.url), plan.requests + plan.warmup
    lines = built_in(count, plan.seed) if plan.prompts is None else read_file(Path(plan.prompts))
    async with new_client(base, headers(api_key), transport) as client:
        model = plan.model or await first_model(client, base)
        plan = Plan(**{**asdict(plan), "url": base, "model": model})
        asks = asks_of(lines, count, _common(plan), plan.endpoint)
        url = f"{base}/{ENDPOINTS[plan.endpoint]}"
        await _warm_up(LoadClient(client, url, plan.timeout), asks[plan.requests :])
        sender, asks = LoadClient(client, url, plan.timeout), asks[: plan.requests]
        used, begin = time.process_time(), time.perf_counter()
        with _Progress(plan.requests, sender):
            if plan.rate is not None:
                records = await open_loop(asks, arrivals(len(asks), plan.rate, plan.seed), sender.send)
            else:
                records = await closed_loop(asks, plan.clients or 1, sender.send)
        busy = (time.process_time() - used) / max(time.perf_counter() - begin, 1e-9)
    return Run(plan=plan, records=records, figures=figures(records), busy=busy)


def _common(plan: Plan) -> dict[str, Any]:
    """The fields that all requests have; greedy decoding is the default, so that runs can be compared."""
    found: dict[str, Any] = {"model": plan.model, "max_tokens": plan.max_tokens, "temperature": 0}
    if plan.stream:
        found |= {"stream": True, "stream_options": {"include_usage": True}}
    return {**found, **plan.fields}


async def _warm_up(sender: LoadClient, asks: Sequence[Ask]) -> None:
    """Some requests, one after the other, that do not count: a server may load or compile at the first."""
    for ask in asks:
        record = await sender.send(ask, sender.clock())
        if not record.is_whole:
            raise UserError(f"the first request was not answered: {record.message}")


class _Progress:
    """A line on a terminal that counts answers."""

    def __init__(self, total: int, sender: LoadClient) -> None:
        self._total, self._sender = total, sender
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        if sys.stderr.isatty():
            import asyncio

            self._task = asyncio.create_task(self._show())

    def __exit__(self, *error: object) -> None:
        if self._task is not None:
            self._task.cancel()
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    async def _show(self) -> None:
        import asyncio

        while True:
            print(f"\r\x1b[K{self._sender.done} of {self._total} answered", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(0.5)


# ---- telling


def _write(run: Run, *, json: bool, out: str | None, png: str | None) -> None:
    whole = {"plan": asdict(run.plan), "figures": run.figures.to_json(), "notes": notes(run)}
    if json:
        print(json_format.dumps(whole))
    else:
        _print(run)
    if out is not None:
        from exitlm.atomic import replace_file

        with replace_file(Path(out)) as place:
            records = [asdict(record) for record in run.records]
            place.write_text(json_format.dumps({**whole, "requests": records}) + "\n")
    if png is not None:
        _draw(run, Path(png))


def how(plan: Plan) -> str:
    """How requests came, in words."""
    if plan.rate is not None:
        return f"Poisson arrivals at {plan.rate:g}/s"
    return f"{plan.clients} client{'s' * (plan.clients != 1)} in a closed loop"


def rates(figures: Figures) -> str:
    """Throughput, in words."""
    tokens = figures.output_tokens_per_second
    return f"{figures.requests_per_second:.2f} requests/s" + ("" if tokens is None else f", {tokens:.1f} tokens/s")


def notes(run: Run) -> list[str]:
    """What the reader of the figures should know."""
    figures, found = run.figures, []
    for status, count in figures.errors.items():
        message = next(record.message for record in run.records if record.status == status and not record.is_whole)
        found.append(f"{count} failed ({status}), the first one: {message}")
    if figures.whole and figures.output_tokens is None:
        found.append("the server did not count the tokens of each answer, so that there are no token rates")
    if figures.cached_tokens and figures.prompt_tokens and figures.cached_tokens > _SHARED * figures.prompt_tokens:
        share = figures.cached_tokens / figures.prompt_tokens
        found.append(
            f"{share:.0%} of the prompt tokens were in the server's cache: prompts begin alike, or were asked before "
            "(another --seed makes others)"
        )
    if run.busy > _BUSY:
        found.append(f"the load generator used {run.busy:.0%} of a processor; part of these times may be its own")
    return found


def _print(run: Run) -> None:
    from rich.console import Console

    from exitlm import show

    figures, plan = run.figures, run.plan
    console = Console(highlight=False, soft_wrap=True, markup=False)
    streamed = "streamed" if plan.stream else "not streamed"
    console.print(f"{plan.model} at {plan.url}: {figures.requests} requests, {how(plan)}, {streamed}")
    console.print(
        f"{figures.whole} answered in {figures.seconds:.2f} s, up to {figures.peak_running} at once: {rates(figures)}"
    )
    spreads: list[tuple[str, Spread]] = [
        (label, value) for label, name in _ROWS.items() if (value := getattr(figures, name)) is not None
    ]
    columns = ("mean", "p50", "p90", "p99", "max")
    rows = [
        {"milliseconds": label, **{c: f"{1e3 * getattr(value, c):.1f}" for c in columns}, "count": f"{value.count}"}
        for label, value in spreads
    ]
    console.print(show.table(rows))
    console.print("times count from when a request was due, whenever it was sent", style="dim")
    for note in notes(run):
        console.print(f"note: {note}", style="dim")


def _draw(run: Run, path: Path) -> None:
    from exitlm.evaluate.load import LoadRun, in_words, load_picture
    from exitlm.serve.bench.figures import running

    good = [record for record in run.records if record.is_whole]
    drawn = LoadRun(
        first=[(r.due, r.first_text) for r in good if r.first_text is not None],
        whole=[(r.due, r.whole_text) for r in good],
        gaps=[gap for record in good for gap in record.gaps],
        failed=[record.due for record in run.records if not record.is_whole],
        running=running(run.records),
    )  # fmt: skip
    figures = run.figures
    title = f"{run.plan.model}: {figures.whole} of {figures.requests} requests answered, {how(run.plan)}"
    parts = [("first text", figures.ttft), ("between texts", figures.itl), ("whole answer", figures.end_to_end)]
    spreads = [f"{name} p50 {in_words(s.p50)}, p99 {in_words(s.p99)}" for name, s in parts if s is not None]
    print(load_picture(path, drawn, title=title, note="; ".join([rates(figures), *spreads])), file=sys.stderr)


# ---- flags


def add_bench_serve(parser: argparse.ArgumentParser) -> None:
    """The flags of ``bench-serve``."""
    add = parser.add_argument
    add("--url", required=True, metavar="URL", help="the server's address, such as http://localhost:8000")
    add("--model", metavar="NAME", help="(default: the first that the server offers, or the first with exits)")
    add("--api-key", metavar="K", help="the server's key (default: the variable EXITLM_API_KEY)")
    add("--endpoint", default="chat", metavar="E", help="chat (default) or completions")
    add("--rate", type=float, metavar="R", help="requests a second on average, at random times (Poisson arrivals)")
    add("--clients", type=int, metavar="N", help="instead: clients that each wait for their answer (default: 1)")
    add("--requests", type=int, default=100, metavar="N", help="how many in all (default: 100)")
    add("--warmup", type=int, default=1, metavar="N", help="requests before, which do not count (default: 1)")
    add(
        "--prompts", metavar="FILE", help="JSON lines with prompt or messages, or a .txt file (default: a packaged set)"
    )
    add("--max-tokens", type=int, default=128, metavar="N", help="of an answer, unless its line says so (default: 128)")
    add("--stream", action=argparse.BooleanOptionalAction, default=True, help="ask for streamed answers (default)")
    add("--seed", type=int, default=0, metavar="S", help="of the arrivals and the built-in prompts (default: 0)")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds that an answer may take (default: 600)")
    add(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="any field of the requests, such as temperature=0.8 (default: 0) or exitlm.mode=full; null leaves one out",
    )  # fmt: skip
    add("--json", action="store_true", help="print one JSON object with the plan and all figures (seconds)")
    add("--out", metavar="FILE", help="write that object there, with a record of each request")
    add("--png", metavar="FILE", help="draw the run there: a .png, .svg or .pdf file")
