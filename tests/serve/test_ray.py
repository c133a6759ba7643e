"""Replicas on a real cluster of Ray on this machine: two of them, and a front that hands requests out."""

import asyncio
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import exitlm
from exitlm import UserError
from exitlm.serve.config import ServeConfig
from tests.serve.conftest import KEY, serving
from tests.serve.held_model import LOADER, SLOW, STOP, VARIABLE

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'exitlm[ray]'")
pytest.importorskip("ray.serve", reason="ray is not installed: pip install 'exitlm[ray]'")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SECTIONS: dict[str, Any] = {
    "http": {"api_keys": [KEY], "cors_origins": ["https://page.example"]},
    "limits": {"body_bytes": 20_000, "drain": 60, "queue": 50},
    "defaults": {"temperature": 0.0, "mode": "full"},
}
ONGOING, QUEUE = 30, 50  # requests that a replica has, and that wait
HELD = 44  # requests at a time when a replica is killed


@dataclass
class Cluster:
    """Two replicas behind an address. While the file ``hold`` says so, texts stop after their first tokens."""

    url: str
    hold: Path

    def http(self, **options: Any) -> httpx.Client:
        """Plain HTTP."""
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.Client(base_url=self.url, timeout=60, **{"headers": headers, **options})

    def pids(self) -> dict[str, int]:
        """The processes of the replicas, by their names."""
        with self.http() as http:
            names = set(re.findall(r'num_requests_running\{replica="(\w+)"', http.get("/metrics").text))
        actors = {name: ray.get_actor(f"SERVE_REPLICA::exitlm#Replica#{name}", namespace="serve") for name in names}
        pid = {name: actor.__ray_call__.remote(lambda _: os.getpid()) for name, actor in actors.items()}
        return {name: ray.get(found, timeout=60) for name, found in pid.items()}


def wait_for(true: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.05)


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What processes of Ray inherit; the path of the file that holds texts."""
    hold = tmp_path_factory.mktemp("hold") / "hold"
    place = tempfile.mkdtemp(prefix="ray-")  # a short path: sockets lie in it
    path = os.pathsep.join([str(Path(exitlm.__file__).parents[1]), str(ROOT)])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            VARIABLE: str(hold), "PYTHONPATH": path, "EXITLM_CACHE": str(tmp_path_factory.mktemp("cache")),
            "RAY_TMPDIR": place, "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }.items():  # fmt: skip
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        try:
            yield hold
        finally:
            shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(tiny: Path, environment: Path) -> Iterator[Cluster]:
    from ray import serve

    from exitlm.serve.ray_app import application_of

    config = ServeConfig.of(
        {
            "model": {"source": str(tiny), "name": "tiny", "dtype": "float64"},
            "replicas": {"number": 2, "cpus": 1, "ongoing": ONGOING},
            **SECTIONS,
        }
    )
    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(application_of(config, LOADER), name="exitlm")
        yield Cluster(f"http://127.0.0.1:{port}", environment)
    finally:
        environment.unlink(missing_ok=True)
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tiny: Path, environment: Path) -> exitlm.LLM:
    return exitlm.load(tiny, dtype="float64")


NAMES = {
    "id", "created", "created_at", "completed_at", "item_id", "prompt_tokens_details", "input_tokens_details",
    "request_time", "requst_time",
}  # fmt: skip


def without_names(found: Any) -> Any:
    """An answer without what differs from one to the next by its nature: ids and times."""
    if isinstance(found, dict):
        return {key: without_names(value) for key, value in found.items() if key not in NAMES and "second" not in key}
    return [without_names(one) for one in found] if isinstance(found, list) else found


CHAT: Any = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 24}
REQUESTS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny", None),
    ("GET", "/v1/exits", None),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/completions", {"prompt": ["Hi", "Ho"], "max_tokens": 12, "n": 2, "temperature": 0.7, "seed": 5}),
    ("POST", "/v1/responses", {"input": "Hi", "max_output_tokens": 16}),
    ("POST", "/tokenize", {"prompt": "Hi"}),
    ("PUT", "/api", {"prompts": ["Hi"], "tokens_to_generate": 5}),
    # refusals
    ("POST", "/v1/completions", {"promt": "Hi"}),
    ("POST", "/v1/completions", {"prompt": "Hi", "temperature": -1}),
    ("POST", "/v1/chat/completions", {**CHAT, "model": "other"}),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 3000}], "stream": True}),
    ("POST", "/v1/chat/completions", {**CHAT, "user": "x" * 30_000}),
    ("POST", "/v1/completions", b"{"),
    ("GET", "/v1/nothing", None),
    ("GET", "/v1/completions", None),
    ("DELETE", "/v1/responses/x", None),
]


def test_answers_and_refusals_are_those_of_one_process(cluster: Cluster, model: exitlm.LLM) -> None:
    with serving(model, **SECTIONS) as served, served.http() as alone, cluster.http() as http:
        alone.headers["authorization"] = f"Bearer {KEY}"
        statuses = Counter()
        for method, path, body in REQUESTS:
            given = {"content": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
            one, other = (client.request(method, path, **given) for client in (alone, http))
            assert (other.status_code, other.headers["content-type"]) == (
                one.status_code, one.headers["content-type"],
            ), path  # fmt: skip
            assert without_names(other.json()) == without_names(one.json()), path
            assert one.status_code == 200 or other.json()["error"]["message"]
            statuses[one.status_code] += 1
        assert statuses == {200: 8, 400: 5, 404: 2, 405: 1, 413: 1}
        for headers in ({}, {"authorization": "Bearer nope"}):
            one, other = (httpx.get(f"{url}/v1/models", headers=headers) for url in (served.url, cluster.url))
            assert (other.status_code, other.json()) == (one.status_code, one.json())
            assert other.headers["www-authenticate"] == "Bearer"
        asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
        assert http.options("/v1/completions", headers=asked).status_code == 200
        origins = http.get("/v1/models", headers=asked).headers.get_list("access-control-allow-origin")
        assert origins == ["https://page.example"]
        named = http.get("/v1/models", headers={"x-request-id": "mine"}).headers.get_list("x-request-id")
        assert named == ["mine"]
        assert http.get("/health").json() == {"status": "ok"}


def test_streams_are_those_of_one_process(cluster: Cluster, model: exitlm.LLM) -> None:
    with serving(model, **SECTIONS) as served:
        for url in (served.url, cluster.url):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
            chat = list(client.chat.completions.create(model="tiny", **CHAT, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chat)
            with client.responses.stream(model="tiny", input="Hi", max_output_tokens=24) as stream:
                events = list(stream)
            if url == served.url:
                first = text, [event.type for event in events], events[-1].response.output_text  # type: ignore[union-attr]
        assert (text, [event.type for event in events], events[-1].response.output_text) == first  # type: ignore[union-attr]
        assert len(text) > 10
        whole = client.chat.completions.create(model="tiny", **CHAT)
        assert whole.choices[0].message.content == text


def test_a_stream_comes_as_it_is_written(cluster: Cluster) -> None:
    """The first tokens are there while the text can't go on."""
    cluster.hold.write_text(STOP)
    try:
        body = {"prompt": "Hi", "max_tokens": 20, "stream": True, "ignore_eos": True}
        with cluster.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            found = [next(lines) for _ in range(2)]
            assert found[0].startswith("data: {")
            cluster.hold.unlink()
            assert [line for line in lines if line][-1] == "data: [DONE]"
    finally:
        cluster.hold.unlink(missing_ok=True)


def test_a_client_that_leaves_frees_its_replica(cluster: Cluster) -> None:
    def running() -> float:
        with cluster.http() as http:
            return sum(map(float, re.findall(r"num_requests_running\{\S+ (\S+)", http.get("/metrics").text)))

    cluster.hold.write_text(SLOW)
    try:
        body = {"prompt": "Hi", "max_tokens": 1900, "stream": True, "ignore_eos": True}
        with cluster.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            wait_for(lambda: running() == 1)
        wait_for(lambda: running() == 0)
        with cluster.http() as http:
            assert 'finished_reason="abort"' in http.get("/metrics").text
    finally:
        cluster.hold.unlink(missing_ok=True)


def test_a_session_stays_with_its_replica(cluster: Cluster) -> None:
    with cluster.http() as http:

        def place(body: Any, **headers: str) -> tuple[str, int]:
            answer = http.post("/v1/chat/completions", json={"max_tokens": 40, **body}, headers=headers)
            details = answer.json()["usage"]["prompt_tokens_details"]
            return answer.headers["exitlm-replica"], details["cached_tokens"]

        homes = set()
        for session in range(12):
            messages: list[dict[str, str]] = [{"role": "user", "content": f"{session}: " + "why do cats purr? " * 4}]
            cached = []
            found = set()
            for _ in range(3):
                home, again = place({"messages": messages})
                found.add(home)
                cached.append(again)
                messages += [{"role": "assistant", "content": "because"}, {"role": "user", "content": "and dogs?"}]
            assert len(found) == 1
            assert cached[1] >= 32  # the first block of the conversation was there
            assert cached[2] >= cached[1]
            homes |= found
        assert len(homes) == 2  # by chance in all but one of 2^11 runs
        for number in range(4):
            by_header = {
                place({"messages": [{"role": "user", "content": str(i)}]}, **{"x-session-id": str(number)})[0]
                for i in range(4)
            }
            by_key = {
                place({"messages": [{"role": "user", "content": str(i)}], "prompt_cache_key": str(number)})[0]
                for i in range(4)
            }
            assert len(by_header) == len(by_key) == 1


@dataclass
class Outcome:
    """What a client of a held request got. ``text`` of all events; ``errors``, ``ends``: how many of each."""

    prompt: str
    streams: bool
    replica: str = ""
    status: int = 0
    text: str = ""
    errors: int = 0
    ends: int = 0


async def ask(client: httpx.AsyncClient, outcome: Outcome, tokens: int, begun: asyncio.Event) -> None:
    """Send one request and read its answer to the end."""
    body = {"prompt": outcome.prompt, "max_tokens": tokens, "ignore_eos": True, "stream": outcome.streams}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        outcome.status, outcome.replica = response.status_code, response.headers["exitlm-replica"]
        if not outcome.streams:
            outcome.text = json.loads(await response.aread())["choices"][0]["text"]
            outcome.ends = 1
            return
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                outcome.ends += 1
            elif line:
                said = json.loads(line.removeprefix("data: "))
                if "error" in said:
                    assert said["error"]["code"] == "replica_lost"
                    outcome.errors += 1
                else:
                    outcome.text += "".join(choice["text"] for choice in said["choices"])
                    begun.set()


def test_a_replica_is_killed_under_load(cluster: Cluster, model: exitlm.LLM) -> None:
    """Each request is answered exactly once: whole by another replica where nothing was sent yet, and else by what was
    sent and an error."""
    tokens = 300
    outcomes = [Outcome(f"{i} is", streams=i % 2 == 0) for i in range(HELD)]
    before = cluster.pids()

    async def running(client: httpx.AsyncClient) -> float:
        return sum(map(float, re.findall(r"num_requests_running\{\S+ (\S+)", (await client.get("/metrics")).text)))

    async def main() -> str:
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {KEY}"}
        async with (
            httpx.AsyncClient(base_url=cluster.url, timeout=120, headers=headers, limits=limits) as client,
            asyncio.timeout(300),
        ):
            begun = [asyncio.Event() for _ in outcomes]
            tasks = [
                asyncio.create_task(ask(client, outcome, tokens, event))
                for outcome, event in zip(outcomes, begun, strict=True)
            ]
            await asyncio.gather(*(event.wait() for o, event in zip(outcomes, begun, strict=True) if o.streams))
            while await running(client) < HELD:
                await asyncio.sleep(0.05)
            assert not any(task.done() for task in tasks)
            victim = outcomes[0].replica
            os.kill(before[victim], signal.SIGKILL)
            cluster.hold.unlink()
            await asyncio.gather(*tasks)
            return victim

    cluster.hold.write_text(SLOW)
    try:
        victim = asyncio.run(main())
    finally:
        cluster.hold.unlink(missing_ok=True)
    expected = [
        found.text
        for found in model.generate([o.prompt for o in outcomes], max_new_tokens=tokens, ignore_eos=True, mode="full")
    ]
    for outcome, text in zip(outcomes, expected, strict=True):
        lost = outcome.streams and outcome.replica == victim
        assert (outcome.status, outcome.ends, outcome.errors) == (200, 1, int(lost)), outcome
        if lost:
            assert 0 < len(outcome.text) < len(text)
            assert text.startswith(outcome.text.rstrip("\ufffd"))
        else:
            assert outcome.text == text, outcome
            assert outcome.replica != victim
    wait_for(lambda: len(cluster.pids()) == 2)
    assert victim not in cluster.pids()
    with cluster.http() as http:
        found = {
            http.post("/v1/completions", json={"prompt": f"{i}", "max_tokens": 1}).headers["exitlm-replica"]
            for i in range(24)
        }
    assert found == set(cluster.pids())


def test_what_finds_no_room_is_refused(cluster: Cluster) -> None:
    """While no text goes on, replicas have what they may have, as many wait as may, and all others get 429."""
    from exitlm.serve.ray_app import SPARE

    surplus = 12
    total = 2 * (ONGOING + SPARE) + QUEUE + surplus

    async def main() -> Counter[int]:
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {KEY}"}
        async with (
            httpx.AsyncClient(base_url=cluster.url, timeout=240, headers=headers, limits=limits) as client,
            asyncio.timeout(300),
        ):
            bodies: list[Any] = [{"prompt": f"{i} was", "max_tokens": 12, "ignore_eos": True} for i in range(total)]
            tasks = {asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies}
            left = tasks
            while total - len(left) < surplus:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    answer = task.result()
                    assert answer.status_code == 429
                    assert int(answer.headers["retry-after"]) > 0
                    error = answer.json()["error"]
                    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
            cluster.hold.unlink()
            await asyncio.gather(*left)
            return Counter(task.result().status_code for task in tasks)

    cluster.hold.write_text(STOP)
    try:
        statuses = asyncio.run(main())
    finally:
        cluster.hold.unlink(missing_ok=True)
    assert set(statuses) == {200, 429}
    assert statuses[200] >= 2 * ONGOING


def test_settings_reach_ray() -> None:
    from exitlm.serve.ray_app import SPARE, application_of

    config = ServeConfig.of(
        {"model": {"source": "x"}, "limits": {"queue": 5, "drain": 9}, "engine": {"max_sequences": 3},
         "replicas": {"number": 2, "most": 6, "cpus": 0.5, "fronts": 2}}
    )  # fmt: skip
    front = application_of(config)._bound_deployment
    replica = front.init_args[1]._bound_deployment
    scaling = replica._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 6, 1.5)
    assert (replica.max_ongoing_requests, replica._deployment_config.max_queued_requests) == (3 + SPARE, 5)
    assert replica._deployment_config.graceful_shutdown_timeout_s == 9
    assert replica.ray_actor_options["num_cpus"] == 0.5
    assert front.num_replicas == 2


def test_the_builder_takes_words_sections_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exitlm.serve.ray_app import build, config_of

    monkeypatch.delenv("EXITLM_API_KEY", raising=False)

    file = tmp_path / "serve.toml"
    file.write_text('[model]\nsource = "a"\n[limits]\nqueue = 3\nprompts = 5\n')
    found = config_of({"config": str(file), "model.source": "b", "limits": {"queue": 4}, "replicas.number": "2"})
    assert (found.model.source, found.limits.queue, found.limits.prompts) == ("b", 4, 5)
    assert (found.replicas.number, config_of({"model.source": "b"}).replicas.number) == (2, 1)
    for args, says in (
        ({}, "no model is named"),
        ({"source": "x"}, "SECTION.KEY=VALUE"),
        ({"model.source": "x", "replicas.numbr": 2}, "did you mean 'number'"),
        ({"config": str(tmp_path / "nowhere")}, "can't be read"),
        ({"model.source": "x", "http.host": "0.0.0.0"}, "leave out http.host"),
        ({"model.source": "x"}, "http.without_key=true"),
    ):
        with pytest.raises(UserError, match=says):
            build(args)
    assert build({"model.source": "x", "http.without_key": "true"})
    monkeypatch.setenv("EXITLM_API_KEY", "k")
    assert config_of({"model.source": "x"}).http.api_keys == ("k",)
    assert config_of({"model.source": "x", "http": {"api_keys": ["other"]}}).http.api_keys == ("other",)


# ---- the command


def command(tiny: object, *more: object) -> subprocess.Popen[str]:
    given = [sys.executable, "-m", "exitlm", "serve", tiny, "--dtype", "float32", "--quant", "none", *more]
    return subprocess.Popen([str(word) for word in given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_serves_and_drains(tiny: Path, environment: Path) -> None:
    """SIGTERM: the answer that runs is written to its end; exit code 0."""
    process = command(tiny, "--replicas", 2, "--port", free_port(), "--set", "limits.drain=60", "replicas.cpus=0.5")
    try:
        assert process.stdout is not None
        line = next((found for found in process.stdout if "serving" in found), "")
        url = re.search(r"http://\S+", line)
        assert url, process.stderr and process.stderr.read()
        assert "by 2 replicas" in line
        body = {"prompt": "Hi", "max_tokens": 1900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url[0]}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"length"' in rest[-2]
        _, log = process.communicate(timeout=120)
        assert process.returncode == 0, log
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("source", "more", "says"),
    [
        ("nowhere-such", (), "nowhere-such"),
        ("tiny", ("--adapter", "nowhere-such"), "nowhere-such"),
        ("tiny", ("--set", "replicas.cpus=1000"), "need 2000, but the cluster has"),
        ("tiny", ("--dtype", "float77"), "float77"),  # what replicas alone find, Ray's own log tells of as well
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    tiny: Path, environment: Path, source: str, more: tuple[str, ...], says: str
) -> None:
    process = command(tiny if source == "tiny" else source, "--replicas", 2, "--port", free_port(), *more)
    try:
        _, log = process.communicate(timeout=180)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 2, log
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert says in error
    assert "Traceback" not in log or "--dtype" in more
