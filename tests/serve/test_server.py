"""The server as a whole: keys, limits, loading, draining, clients that leave, figures, and the log."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import exitlm
from exitlm import UserError
from exitlm.serve.config import HttpConfig, ServeConfig, merged
from exitlm.serve.keys import Keys
from exitlm.serve.server import Server, listening
from tests.serve.conftest import KEY, Served, run, serving

HI: Any = [{"role": "user", "content": "hi"}]
LONG: Any = {"messages": HI, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., exitlm.LLM]) -> exitlm.LLM:
    return make_model("float32", quant="none")


def wait_for(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.005)


# ---- keys


def test_keys_guard_all_but_health_metrics_and_the_page(model: exitlm.LLM) -> None:
    with serving(model, http={"port": 0, "api_keys": ["other", KEY]}) as served, served.http() as http:
        for method, path in (
            ("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/v1/anything"), ("PUT", "/api"),
            ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/v1"), ("GET", "/v1/exits"),
        ):  # fmt: skip
            for headers in ({}, {"authorization": "Bearer nope"}, {"authorization": KEY}, {"authorization": "Basic x"}):
                response = http.request(method, path, headers=headers)
                assert response.status_code == 401, path
                assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/metrics", "/openapi.json"):
            assert http.get(path).status_code == 200
        assert http.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert len(list(served.client().models.list())) == 2
        with pytest.raises(openai.AuthenticationError):
            served.client().with_options(api_key="wrong").models.list()


def test_keys() -> None:
    keys = Keys(["one", "two"])
    assert keys.opens(b"Bearer two")
    assert keys.opens(b"bearer one")
    assert not any(
        keys.opens(value) for value in (None, b"", b"Bearer", b"Bearer ", b"Bearer on", b"one", b"Basic one")
    )
    assert Keys([]).opens(None)


def test_no_other_machine_without_a_key(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UserError, match="--without-key"):
            HttpConfig(host=host).check_reach()
        HttpConfig(host=host, api_keys=["k"]).check_reach()
        HttpConfig(host=host, without_key=True).check_reach()
    for host in ("127.0.0.1", "::1", "localhost", "127.8.0.3"):
        HttpConfig(host=host).check_reach()
    file = tmp_path / "keys"
    file.write_text("# ours\nabc\n\n def \n")
    assert HttpConfig(api_key_file=str(file)).api_keys == ("abc", "def")
    file.write_text("\n")
    with pytest.raises(UserError, match="holds none"):
        HttpConfig(api_key_file=str(file))


def test_no_page_of_another_origin_unless_told(model: exitlm.LLM) -> None:
    origin = {"origin": "https://page.example"}
    with serving(model) as served, served.http() as http:
        assert "access-control-allow-origin" not in http.get("/v1/models", headers=origin).headers
    sections = {"port": 0, "cors_origins": ["https://page.example"], "api_keys": [KEY]}
    with serving(model, http=sections) as served, served.http() as http:
        asked = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        allowed = http.options("/v1/chat/completions", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        refused = http.get("/v1/models", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://page.example"


# ---- settings


def test_settings_are_checked() -> None:
    model = {"source": "x"}
    for tree, says in (
        ({}, "no model is named"),
        ({"model": {"source": "x", "adapter": "y"}}, "did you mean 'adapters'"),
        ({"model": model, "limit": {}}, r"no section \[limit\]; did you mean 'limits'"),
        ({"model": model, "limits": {"queu": 3}}, "did you mean 'queue'"),
        ({"model": model, "limits": {"queue": -1}}, "queue"),
        ({"model": model, "limits": {"deadline": 0}}, "deadline"),
        ({"model": model, "http": {"port": 70000}}, "port"),
        ({"model": model, "http": {"log": "all"}}, "requests or errors"),
        ({"model": model, "http": {"api_keys": ["a b"]}}, "one word"),
        ({"model": {"source": "x", "name": "a:b"}}, "':'"),
        ({"model": model, "defaults": {"n": 3}}, r"\[defaults\] has no setting 'n'"),
        ({"model": model, "defaults": {"mode": "quick"}}, "quick"),
        ({"model": model, "engine": {"block_siz": 3}}, "block_size"),
        ({"model": model, "replicas": {"number": -1}}, "replicas.number"),
        ({"model": model, "replicas": {"number": 3, "most": 2}}, "at least replicas.number, 3"),
        ({"model": model, "replicas": {"ongoing": 0}}, "replicas.ongoing"),
        ({"model": model, "replicas": {"target": 0}}, "above 0"),
        ({"model": model, "replicas": {"cpus": float("nan")}}, "from 0"),
        ({"model": model, "replicas": {"front": 1}}, "did you mean 'fronts'"),
    ):
        with pytest.raises(UserError, match=says):
            ServeConfig.of(tree)
    found = ServeConfig.of(
        merged({"model": {"source": "a/b.gguf"}}, {"limits": {"queue": 3}}, {"limits": {"choices": 2}})
    )
    assert (found.model.name, found.limits.queue, found.limits.choices) == ("b", 3, 2)


def test_defaults_of_the_server(model: exitlm.LLM) -> None:
    defaults = {"temperature": 0.0, "mode": "threshold", "threshold": 0.02}
    with serving(model, defaults=defaults, limits={"new_tokens": 20}) as served, served.client() as client:
        found = model.generate("Hi", mode="threshold", threshold=0.02, max_new_tokens=16)
        answer: Any = client.completions.create(model="tiny:exits", prompt="Hi", max_tokens=16)
        assert answer.choices[0].text == found.text
        assert answer.usage.exitlm["mode"] == "threshold"
        base: Any = client.completions.create(model="tiny", prompt="Hi", max_tokens=16)
        assert base.usage.exitlm["mode"] == "lossless"
        assert client.completions.create(model="tiny", prompt="Hi").usage.completion_tokens <= 16  # type: ignore[union-attr]
        with pytest.raises(openai.BadRequestError, match="at most 20"):
            client.completions.create(model="tiny", prompt="Hi", max_tokens=21)


# ---- load


def test_too_many_get_429_and_the_others_are_answered(model: exitlm.LLM) -> None:
    async def ask(served: Served) -> list[int]:
        async with httpx.AsyncClient(base_url=served.url, timeout=60, limits=httpx.Limits(max_connections=60)) as http:

            async def one() -> int:
                body = {"messages": HI, "max_tokens": 24, "ignore_eos": True}
                response = await http.post("/v1/chat/completions", json=body)
                if response.status_code == 429:
                    assert int(response.headers["retry-after"]) >= 1
                    assert response.json()["error"]["code"] == "queue_full"
                return response.status_code

            return await asyncio.gather(*(one() for _ in range(50)))

    with serving(model, limits={"queue": 4}) as served:
        served.server.state.service.engine.engine.roster.most = 4  # type: ignore[union-attr]
        try:
            found = run(ask(served))
        finally:
            served.server.state.service.engine.engine.roster.most = 64  # type: ignore[union-attr]
        assert set(found) == {200, 429}
        assert found.count(200) >= 8
        wait_for(lambda: served.server.state.service.engine.live == 0)  # type: ignore[union-attr]
        assert served.used_blocks == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_blocks_back(model: exitlm.LLM, stream: bool) -> None:
    with serving(model) as served:
        engine = served.server.state.service.engine  # type: ignore[union-attr]
        host, port = served.url.removeprefix("http://").split(":")
        for _ in range(5):
            body = json.dumps({"messages": HI, "max_tokens": 1900, "ignore_eos": True, "stream": stream}).encode()
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    + f"content-length: {len(body)}\r\n\r\n".encode() + body
                )  # fmt: skip
                if stream:
                    assert connection.recv(100)
                wait_for(lambda: served.used_blocks > 0)
            wait_for(lambda: engine.live == 0)
            assert served.used_blocks == 0


def test_a_deadline_has_status_504_or_ends_the_stream(model: exitlm.LLM) -> None:
    with serving(model, limits={"deadline": 0.1}) as served, served.client() as client:
        with pytest.raises(openai.APIStatusError, match="not ready") as caught:
            client.chat.completions.create(model="tiny", **LONG)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="not ready"):
            list(client.chat.completions.create(model="tiny", **LONG, stream=True))


def test_a_broken_engine_has_status_500_and_health_says_so(model: exitlm.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model) as served, served.http() as http:
        with monkeypatch.context() as patch:
            patch.setattr(model.engine.runner, "run", lambda *given: 1 / 0)
            for _ in range(3):
                response = http.post("/v1/chat/completions", json={"messages": HI})
                assert response.status_code == 500
                assert response.json()["error"]["code"] == "engine_error"
            assert http.get("/health").status_code == 503
            assert http.get("/health").json() == {"status": "broken"}
        assert http.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 2}).status_code == 200
        assert http.get("/health").json() == {"status": "ok"}


def test_a_defect_has_status_500_and_says_nothing_of_itself(
    model: exitlm.LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(*given: Any, **more: Any) -> Any:
        raise RuntimeError("a secret")

    with serving(model) as served, served.http() as http:
        monkeypatch.setattr(served.server.state.service.models, "find", breaks)  # type: ignore[union-attr]
        with caplog.at_level(logging.INFO, logger="exitlm.serve"):
            response = http.post("/v1/chat/completions", json={"messages": HI})
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "log" in response.json()["error"]["message"]
        wait_for(lambda: "a secret" in caplog.text)


# ---- begin and end


def test_503_while_the_model_is_loaded(model: exitlm.LLM) -> None:
    go = threading.Event()

    def load(config: ServeConfig) -> exitlm.LLM:
        go.wait(60)
        return model

    config = ServeConfig.of({"model": {"source": "tiny"}, "http": {"port": 0}})
    with listening(config) as listener:
        server = Server(config, load)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as http:
                assert http.get("/health").status_code == 503
                assert http.get("/health").json() == {"status": "loading"}
                early = http.post("/v1/chat/completions", json={"messages": HI})
                assert early.status_code == 503
                assert "being loaded" in early.json()["error"]["message"]
                assert early.headers["retry-after"]
                assert http.get("/metrics").status_code == 200
                go.set()
                wait_for(lambda: http.get("/health").status_code == 200)
        finally:
            go.set()
            server.should_exit = True
            thread.join(30)


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load(config: ServeConfig) -> exitlm.LLM:
        raise UserError("there is no such model")

    config = ServeConfig.of({"model": {"source": "tiny"}, "http": {"port": 0}})
    with listening(config) as listener:
        server = Server(config, load)
        server.run(sockets=[listener])
    assert isinstance(server.failure, UserError)


LOADS_FOR_EVER = """
import threading
from exitlm.serve.config import ServeConfig
from exitlm.serve.server import serve
config = ServeConfig.of({"model": {"source": "x"}, "http": {"port": 0}})
raise SystemExit(serve(config, lambda _: threading.Event().wait()))
"""


def test_a_signal_ends_a_server_that_still_loads() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOADS_FOR_EVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = re.search(r"http://\S+", process.stdout.readline())
        try:
            assert url
            with httpx.Client(base_url=url[0], timeout=60) as http:
                assert http.get("/health").json() == {"status": "loading"}
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, log
    assert [json.loads(line)["event"] for line in log.splitlines()] == ["drain"]  # no line for a poll


WARNS = """
import warnings
from exitlm.errors import UserError
from exitlm.serve.config import ServeConfig
from exitlm.serve.server import serve
def load(_):
    warnings.warn("so it is")
    raise UserError("no model")
try:
    serve(ServeConfig.of({"model": {"source": "x"}, "http": {"port": 0}}), load)
except UserError as error:
    print(error)
"""


def test_a_warning_is_a_line_of_the_log() -> None:
    found = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True, timeout=110)
    assert found.stdout.endswith("no model\n"), found.stderr
    (line,) = map(json.loads, found.stderr.splitlines())
    assert (line["level"], line["event"], line["message"]) == ("warning", "warning", "so it is")


def test_a_taken_port_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServeConfig.of({"model": {"source": "x"}, "http": {"port": taken.getsockname()[1]}})
        with pytest.raises(UserError, match="choose another --port"), listening(config):
            pass


@pytest.fixture(scope="module")
def adapter(make_model: Callable[..., exitlm.LLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model().save_exits(tmp_path_factory.mktemp("adapters") / "quick")


def test_the_command_serves_and_drains(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    """SIGTERM: the answer that runs is written to its end, new ones get 503, exit code 0."""
    file = tmp_path / "serve.toml"
    file.write_text("[limits]\nqueue = 7\n[defaults]\ntemperature = 0.0\n[http]\nport = 1\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "exitlm", "serve", tiny, "--adapter", adapter, "--name", "tiny", "--port", "0",
         "--config", file, "--set", "limits.drain=60", "engine.max_sequences=3"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "EXITLM_API_KEY": KEY},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.search(r"http://\S+", line)
        assert url, line
        with httpx.Client(base_url=url[0], timeout=60) as http:
            wait_for(lambda: http.get("/health").status_code == 200)
        client = openai.OpenAI(base_url=f"{url[0]}/v1", api_key=KEY, max_retries=0, timeout=60)
        assert [entry.id for entry in client.models.list()] == ["tiny", "tiny:quick"]
        stream = client.chat.completions.create(model="tiny:quick", **{**LONG, "max_tokens": 700}, stream=True)
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)

        def late() -> httpx.Response:
            return httpx.post(
                f"{url[0]}/v1/completions", headers={"authorization": f"Bearer {KEY}"},
                json={"prompt": "x", "max_tokens": 1}, timeout=60,
            )  # fmt: skip

        wait_for(lambda: late().status_code == 503)
        assert "shutting down" in late().json()["error"]["message"]
        chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0, log
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in log.splitlines()]
    assert {"ready", "drain", "request"} <= {line.get("event") for line in lines}
    asked = [line for line in lines if line.get("event") == "request" and line.get("stream")]
    assert asked[0]["completion_tokens"] == 700
    assert "hi" not in [str(value) for line in lines for value in line.values()]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve"], "no model is named"),
        (["serve", "nowhere-such", "--port", "0"], "nowhere-such"),
        (["serve", "x", "--host", "0.0.0.0"], "--without-key"),
        (["serve", "x", "--config", "/nowhere.toml"], "can't be read"),
        (["serve", "x", "--api-key-file", "/nowhere"], "keys /nowhere can't be read: No such file or directory\n"),
        (["serve", "x", "--set", "limits.que=1"], "did you mean 'queue'"),
        (["serve", "x", "--set", "queue=1"], "SECTION.KEY"),
        (["serve", "x", "--prt", "1"], "did you mean '--port'"),
    ],
)
def test_mistakes_on_the_command_line(run: Any, arguments: list[str], says: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1 or "event" in err


def test_replicas_need_ray(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "exitlm.serve.ray_app", raising=False)
    code, _, err = run("serve", "x", "--replicas", "2")
    assert (code, err) == (2, "error: serve needs ray; install it with: pip install 'exitlm[ray]'\n")


# ---- what is told


def test_figures(model: exitlm.LLM) -> None:
    with serving(model) as served, served.client() as client, served.http() as http:
        ask: Any = {"model": "tiny:exits", "messages": HI, "max_tokens": 40, "temperature": 0}
        exits = {"exitlm": {"mode": "threshold", "threshold": 0.02}}
        for stream in (False, True):
            answer = client.chat.completions.create(**ask, stream=stream, extra_body={**exits, "ignore_eos": True})
            if stream:
                list(answer)
        client.chat.completions.create(
            **ask, extra_body={"exitlm": {"adaptive": False, "threshold": 0.02}, "ignore_eos": True}
        )
        text = http.get("/metrics").text
        found = dict(re.findall(r"^(exitlm:\S+) (\S+)$", text, re.MULTILINE))
        value = {name: float(number) for name, number in found.items()}
        assert value["exitlm:num_requests_running"] == value["exitlm:num_requests_waiting"] == 0
        assert value["exitlm:kv_cache_usage_perc"] == 0
        assert value["exitlm:generation_tokens_total"] == 120
        assert value["exitlm:prompt_tokens_total"] == 3 * value["exitlm:prefix_cache_queries_total"] / 3 > 0
        layers = {name: n for name, n in value.items() if name.startswith("exitlm:exit_layer_tokens_total")}
        assert sum(layers.values()) == 120
        assert len(layers) > 1
        assert value["exitlm:time_to_first_token_seconds_count"] == 3
        assert value["exitlm:e2e_request_latency_seconds_count"] == 3
        assert value["exitlm:inter_token_latency_seconds_count"] == 117
        assert value['exitlm:inter_token_latency_seconds_bucket{le="+Inf"}'] == 117
        for name in ("queue", "prefill", "decode"):
            assert value[f"exitlm:request_{name}_time_seconds_count"] == 3
        drafts = value["exitlm:spec_decode_num_draft_tokens_total"]
        accepted = value["exitlm:spec_decode_num_accepted_tokens_total"]
        assert drafts >= accepted > 0
        by_position = [n for name, n in value.items() if "accepted_tokens_per_pos" in name]
        assert sum(by_position) == accepted
        assert value["exitlm:spec_decode_num_drafts_total"] > 0
        assert value["exitlm:scheduler_rate_ratio"] >= 1
        assert value['exitlm:request_success_total{finished_reason="length"}'] == 3
        for name in ("prefix_cache_hits_total", "num_preemptions_total", "num_requests_running"):
            assert f"exitlm:{name}" in value
        assert "# TYPE exitlm:time_to_first_token_seconds histogram" in text


def test_the_log_tells_of_requests_and_not_of_prompts(model: exitlm.LLM, caplog: pytest.LogCaptureFixture) -> None:
    secret = "the prompt of a person"
    for told in (False, True):
        caplog.clear()
        sections = {"port": 0, "log_prompts": told}
        with serving(model, http=sections) as served, served.http() as http, caplog.at_level("INFO", "exitlm.serve"):
            body = {"prompt": secret, "max_tokens": 3, "temperature": 0}
            headers = {"x-request-id": "mine-1"}
            response = http.post("/v1/completions", json=body, headers=headers)
            assert response.headers["x-request-id"] == "mine-1"
            bad = http.post("/v1/completions", json={"prompt": secret, "x": 1}, headers={"x-request-id": "a b"})
            assert re.fullmatch(r"req_[0-9a-f]{24}", bad.headers["x-request-id"])
            quiet = http.put("/api", json={"prompts": secret, "tokens_to_generate": 1, "no_log": True})
            assert quiet.status_code == 200
            wait_for(lambda: '"status": 400' in caplog.text)
        lines = [json.loads(record.message) for record in caplog.records if "event" in record.message]
        asked = [line for line in lines if line["event"] == "request"]
        assert [(line["status"], line["path"]) for line in asked] == [
            (200, "/v1/completions"),
            (400, "/v1/completions"),
        ]
        assert asked[0]["id"] == "mine-1"
        assert asked[0]["completion_tokens"] == 3
        assert (secret in caplog.text) == told


def test_the_openapi_document_names_every_path(served: Served) -> None:
    with served.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/api", "/v1/exits",
            "/health", "/metrics"} <= set(paths)  # fmt: skip
