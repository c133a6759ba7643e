"""``exitlm bench-serve``: the plan it follows, what it prints and writes, and one sentence for each mistake."""

from __future__ import annotations

import functools
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from exitlm import cli
from exitlm.bench_serve import Plan, measure, notes
from exitlm.bench_serve import Run as LoadRun
from exitlm.errors import UserError
from tests.conftest import Run
from tests.serve.bench import virtual
from tests.serve.bench.virtual import Script
from tests.serve.mock_server import Answer, Asked, events, said, serving, usage


def answer(asked: Asked) -> Answer:
    """A server that is content with everything."""
    if asked.body is None:
        return Answer(body={"data": [{"id": "tiny"}]} if asked.path == "/v1/models" else {})
    if not asked.body.get("stream"):
        return Answer(body={"choices": [{"text": "a b"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    chunks = (events(said("a"), done=False), events(said(" b", "stop"), usage(3, 2)))
    return Answer(chunks=chunks)


@pytest.fixture
def run(run: Run) -> Run:
    """Run ``exitlm bench-serve`` in this process."""
    return functools.partial(run, "bench-serve")


def test_a_run_over_a_real_connection(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run.json"
    with serving(answer) as server:
        code, printed, err = run("--url", server.url, "--clients", 3, "--requests", 7, "--json", "--out", out)
    found = json.loads(printed)
    assert (code, err) == (0, "")
    assert found["plan"]["model"] == "tiny"
    assert found["plan"]["url"] == f"{server.url}/v1"
    figures = found["figures"]
    assert (figures["requests"], figures["whole"], figures["errors"]) == (7, 7, {})
    assert (figures["prompt_tokens"], figures["output_tokens"]) == (21, 14)
    assert [figures[name]["count"] for name in ("ttft", "itl", "tpot", "end_to_end", "late")] == [7] * 5
    assert 1 <= figures["peak_running"] <= 3
    written = json.loads(out.read_text())
    assert [one["index"] for one in written["requests"]] == list(range(7))
    assert {name: written[name] for name in found} == found
    bodies = server.bodies()
    assert len(bodies) == 8  # with the one before, which does not count
    assert bodies[0]["stream_options"] == {"include_usage": True}
    assert (bodies[0]["model"], bodies[0]["max_tokens"], bodies[0]["temperature"]) == ("tiny", 128, 0)
    assert len({json.dumps(body["messages"]) for body in bodies}) == 8


def test_what_is_printed_for_a_reader(run: Run) -> None:
    with serving(answer) as server:
        code, printed, _ = run("--url", server.url, "--rate", 500, "--requests", 5)
    assert code == 0
    assert f"tiny at {server.url}/v1: 5 requests, Poisson arrivals at 500/s, streamed" in printed
    assert "5 answered in" in printed
    for word in (
        "TTFT",
        "ITL",
        "TPOT",
        "whole answer",
        "sent late by",
        "p50",
        "p90",
        "p99",
        "from when a request was due",
    ):
        assert word in printed


def test_what_is_asked_follows_the_flags(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "one", "max_tokens": 5}\n{"prompt": "two"}\n')
    with serving(answer) as server:
        code, printed, _ = run(
            "--url", f"{server.url}/v1/", "--model", "other", "--endpoint", "completions", "--prompts", file,
            "--requests", 3, "--warmup", 0, "--no-stream", "--max-tokens", 9, "--api-key", "secret", "--json",
            "--set", "temperature=null", "seed=4", "exitlm.mode=full", "exitlm.threshold=.5",
        )  # fmt: skip
    assert code == 0
    assert [asked.path for asked in server.asked] == ["/v1/completions"] * 3
    common = {"model": "other", "seed": 4, "exitlm": {"mode": "full", "threshold": 0.5}}
    assert server.bodies() == [
        {**common, "prompt": "one", "max_tokens": 5}, {**common, "prompt": "two", "max_tokens": 9},
        {**common, "prompt": "one", "max_tokens": 5},
    ]  # fmt: skip
    assert server.asked[0].headers["Authorization"] == "Bearer secret"
    assert "secret" not in printed
    found = json.loads(printed)["figures"]
    assert found["ttft"] is found["itl"] is found["tpot"] is None
    assert found["output_tokens"] == 6


def test_the_picture_is_drawn(run: Run, tmp_path: Path) -> None:
    with serving(answer) as server:
        code, _, err = run("--url", server.url, "--requests", 4, "--png", tmp_path / "a" / "run.svg")
    assert (code, err) == (0, f"{tmp_path / 'a' / 'run.svg'}\n")
    picture = (tmp_path / "a" / "run.svg").read_text()
    for word in ("tiny: 4 of 4 requests answered, 1 client in a closed loop", "share of requests within a time"):
        assert f"<!-- {word} -->" in picture


def flaky() -> Any:
    """Every second request is refused: of those that are measured, the first and the third."""
    lock, count = threading.Lock(), 0

    def refuse(asked: Asked) -> Answer:
        nonlocal count
        if asked.body is None:
            return answer(asked)
        with lock:
            count += 1
            full = count % 2 == 0
        return Answer(429, {"error": {"message": "the queue is full"}}) if full else answer(asked)

    return refuse


def test_some_requests_fail(run: Run) -> None:
    with serving(flaky()) as server:
        code, printed, _ = run("--url", server.url, "--requests", 4)
    assert code == 0
    assert "2 answered in" in printed
    assert "note: 2 failed (429), the first one:" in printed
    assert "the queue is full" in printed


def test_all_requests_fail(run: Run) -> None:
    with serving(lambda asked: Answer(503, {"error": "loading"}) if asked.body else answer(asked)) as server:
        code, printed, _ = run("--url", server.url, "--requests", 2, "--warmup", 0)
    assert code == 1
    assert "2 failed (503)" in printed


def test_a_server_that_counts_no_tokens(run: Run) -> None:
    def silent(asked: Asked) -> Answer:
        return answer(asked) if asked.body is None else Answer(chunks=[events(said("a", "stop"))])

    with serving(silent) as server:
        code, printed, _ = run("--url", server.url, "--requests", 2)
    assert code == 0
    assert "the server did not count the tokens of each answer" in printed
    assert "tokens/s" not in printed.replace("token rates", "")


MISTAKES: list[tuple[list[str], str]] = [
    ([], "--url"),
    (["--url", "localhost:8000"], "is not the address of a server"),
    (["--url", "URL", "--rate", "0"], "--rate is 0, but must be a number above 0"),
    (["--url", "URL", "--rate", "nan"], "--rate is nan"),
    (["--url", "URL", "--rate", "1", "--clients", "2"], "leave one of them out"),
    (["--url", "URL", "--clients", "0"], "--clients is 0, but must be 1 or more"),
    (["--url", "URL", "--requests", "0"], "--requests is 0"),
    (["--url", "URL", "--max-tokens", "0"], "--max-tokens is 0"),
    (["--url", "URL", "--endpoint", "chats"], "did you mean 'chat'"),
    (["--url", "URL", "--png", "TMP/a.txt"], "let its name end in .png"),
    (["--url", "URL", "--out", "TMP"], "is a directory"),
    (["--url", "URL", "--prompts", "TMP/none"], "cannot be read"),
    (["--url", "URL", "--set", "top_k"], "write KEY=VALUE"),
    (["--url", "URL", "--request", "3"], "did you mean '--requests'"),
    (["--url", "http://127.0.0.1:1"], "cannot reach http://127.0.0.1:1/v1/models"),
    (["--url", "http://127.0.0.1:1", "--model", "m"], "the first request was not answered"),
    (["--url", "URL", "--model", "none"], "the first request was not answered: "),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_sentence(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    def choosy(asked: Asked) -> Answer:
        if asked.body is not None and asked.body["model"] == "none":
            return Answer(404, {"error": {"message": "no model 'none'"}})
        return answer(asked)

    with serving(choosy) as server:
        words = [word.replace("TMP", str(tmp_path)).replace("URL", server.url) for word in arguments]
        code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_without_httpx2_one_sentence_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    assert run("--url", "http://a") == (
        2, "", "error: bench-serve needs httpx2; install it with: pip install 'exitlm[serve]'\n",
    )  # fmt: skip


def plan(**over: Any) -> Plan:
    usual: dict[str, Any] = dict(
        url="http://a", model="", endpoint="chat", rate=None, clients=None, requests=8, warmup=1, prompts=None,
        max_tokens=4, stream=True, seed=0, timeout=60.0, fields={},
    )  # fmt: skip
    return Plan(**{**usual, **over})


def measured(chosen: Plan, script: Script, seen: list[dict[str, Any]] | None = None) -> LoadRun:
    """A run on a clock of its own, against a server of a script."""
    return virtual.run(measure(chosen, None, virtual.transport(lambda _: script, seen)))


COUNTED = {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def test_a_closed_loop_has_the_figures_of_its_script() -> None:
    figures = measured(plan(clients=2), Script(waits=(0.5, 0.25, 0.25), usage=COUNTED)).figures
    assert (figures.seconds, figures.peak_running) == (4.0, 2)
    assert (figures.requests_per_second, figures.output_tokens_per_second) == (2.0, 6.0)
    assert figures.ttft is not None
    assert (figures.ttft.p50, figures.ttft.p99, figures.ttft.count) == (0.5, 0.5, 8)
    assert figures.itl is not None
    assert (figures.itl.max, figures.itl.count) == (0.25, 16)
    assert figures.late is not None
    assert figures.late.max == 0.0


def test_an_open_loop_keeps_its_plan_while_the_server_is_slow() -> None:
    """A server that needs ten seconds gets all of some hundred requests a second: what is late is the server."""
    run = measured(plan(rate=100.0, requests=50), Script(waits=(10.0,), usage=COUNTED))
    assert run.figures.peak_running == 50
    assert run.figures.late is not None
    assert run.figures.late.max == pytest.approx(0, abs=1e-6)
    assert run.figures.end_to_end is not None
    assert run.figures.end_to_end.max == pytest.approx(10.0)


def test_the_arrivals_follow_the_seed() -> None:
    first, again, other = (
        [record.due for record in measured(plan(rate=3.0, seed=seed), Script(usage=COUNTED)).records]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_requests_before_do_not_count() -> None:
    seen: list[dict[str, Any]] = []
    run = measured(plan(requests=2, warmup=3, clients=1), Script(waits=(1.0,), usage=COUNTED), seen)
    assert len(seen) == 5
    assert (run.figures.requests, run.records[0].due) == (2, 0.0)


def test_a_server_that_refuses_at_once_is_told_at_once() -> None:
    with pytest.raises(UserError, match=r"the first request was not answered: .* status 401: no"):
        measured(plan(clients=1), Script(status=401))


def test_what_a_reader_should_know() -> None:
    run = measured(plan(clients=1), Script(usage=COUNTED))
    quiet = LoadRun(plan=run.plan, records=run.records, figures=run.figures, busy=0.0)
    (cached,) = notes(quiet)
    assert cached.startswith("40% of the prompt tokens were in the server's cache")
    busy = LoadRun(plan=run.plan, records=run.records, figures=run.figures, busy=0.9)
    assert "the load generator used 90% of a processor" in notes(busy)[-1]


def test_the_verb_is_known() -> None:
    verb, values = cli._parse(["bench-serve", "--url", "http://a"])
    assert (verb, values["stream"], values["requests"]) == ("bench-serve", True, 100)
