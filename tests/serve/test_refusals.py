"""Whatever is wrong with a request is a 4xx with OpenAI's error object, which says what, and what to do."""

import json
import logging
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import Served

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]

BAD: list[tuple[str, Any, int, str]] = [
    (CHAT, {}, 400, "field 'messages' is missing"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": "hi"}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user"}, {"role": "robot", "content": "hi"}]}, 400, "messages.1.role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400,
     "text alone is read"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "UTF-8"),
    (CHAT, {"messages": HI, "model": "gpt-4o"}, 404, "'gpt-4o' does not exist"),
    (CHAT, {"messages": HI, "model": "tiny:exit"}, 404, "did you mean 'tiny:exits'"),
    (CHAT, {"messages": HI, "temperatur": 1}, 400, "did you mean 'temperature'"),
    (CHAT, {"messages": HI, "temperature": "hot"}, 400, "temperature"),
    (CHAT, {"messages": HI, "temperature": 2.5}, 400, "temperature"),
    (CHAT, {"messages": HI, "temperature": True}, 400, "temperature"),
    (CHAT, {"messages": HI, "top_p": -0.1}, 400, "top_p"),
    (CHAT, {"messages": HI, "max_tokens": 1.5}, 400, "max_tokens"),
    (CHAT, {"messages": HI, "max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"messages": HI, "max_tokens": -1}, 400, "max_tokens"),
    (CHAT, {"messages": HI, "max_tokens": 3, "max_completion_tokens": 4}, 400, "differ"),
    (CHAT, {"messages": HI, "n": 0}, 400, "n"),
    (CHAT, {"messages": HI, "n": 17}, 400, "at most 16"),
    (CHAT, {"messages": HI, "stop": [""]}, 400, "stop"),
    (CHAT, {"messages": HI, "stop": ["x"] * 17}, 400, "stop"),
    (CHAT, {"messages": HI, "seed": 2**64}, 400, "seed"),
    (CHAT, {"messages": HI, "logit_bias": {"one": 1}}, 400, "logit_bias"),
    (CHAT, {"messages": HI, "logit_bias": {"1": 101}}, 400, "logit_bias"),
    (CHAT, {"messages": HI, "logit_bias": {"99999": 1}}, 400, "99999"),
    (CHAT, {"messages": HI, "top_logprobs": 3}, 400, "logprobs"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    (CHAT, {"messages": HI, "presence_penalty": 3}, 400, "presence_penalty"),
    (CHAT, {"messages": HI, "stream_options": {"include_usag": True}}, 400, "include_usag"),
    (CHAT, {"messages": HI, "exitlm": {"mode": "quick"}}, 400, "exitlm.mode"),
    (CHAT, {"messages": HI, "exitlm": {"threshold": 2}}, 400, "threshold"),
    (CHAT, {"messages": HI, "exitlm": {"threshold": {"x": 0.5}}}, 400, "threshold"),
    (CHAT, {"messages": HI, "exitlm": {"exits": [2]}}, 400, "no exit at layer 2"),
    (CHAT, {"messages": HI, "exitlm": {"rule": "luck"}}, 400, "luck"),
    (CHAT, {"messages": HI, "exitlm": {"rule": "gate"}}, 400, "gate"),
    (CHAT, {"messages": HI, "model": "tiny", "exitlm": {"mode": "threshold"}}, 400, "has none"),
    (CHAT, {"messages": HI, "model": "tiny", "exitlm": {"exits": [1]}}, 400, "has no exits"),
    (CHAT, {"messages": HI, "response_format": {"type": "xml"}}, 400, "xml"),
    (CHAT, {"messages": HI, "modalities": ["audio"]}, 400, "modalities"),
    (CHAT, {"messages": HI, "audio": {"voice": "x"}}, 400, "audio"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 2100}]}, 400, "context is 2048"),
    (CHAT, [1, 2], 400, "JSON object"),
    (CHAT, "text", 400, "JSON object"),
    (TEXT, {}, 400, "field 'prompt' is missing"),
    (TEXT, {"prompt": ""}, 400, "prompt is empty"),
    (TEXT, {"prompt": []}, 400, "prompt is an empty list"),
    (TEXT, {"prompt": [[]]}, 400, "prompt is empty"),
    (TEXT, {"prompt": ["a", 1]}, 400, "prompt"),
    (TEXT, {"prompt": [1, 9999]}, 400, "9999"),
    (TEXT, {"prompt": [-1]}, 400, "-1"),
    (TEXT, {"prompt": ["x"] * 129}, 400, "at most 128"),
    (TEXT, {"prompt": "x", "suffix": "y"}, 400, "suffix"),
    (TEXT, {"prompt": "x", "best_of": 3}, 400, "best_of"),
    (TEXT, {"prompt": "x", "logprobs": 21}, 400, "logprobs"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0"),
    ("/tokenize", {}, 400, "either prompt"),
    ("/tokenize", {"prompt": "x", "messages": HI}, 400, "either prompt"),
    ("/tokenize", {"prompt": "\udfff"}, 400, "prompt"),
    ("/detokenize", {"tokens": [5, 272]}, 400, "272"),
    ("/detokenize", {"tokens": ["5"]}, 400, "tokens.0"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, 400, "tools[0]"),
    (CHAT, {"messages": HI, "tool_choice": "required"}, 400, "no tools"),
]  # fmt: skip


def refused(response: httpx.Response, status: int) -> str:
    """The sentence of a refusal in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["type"]
    return error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "status", "says"), BAD)
def test_bad_requests(served: Served, path: str, body: Any, status: int, says: str, stream: bool) -> None:
    if stream:
        if not isinstance(body, dict) or not path.startswith("/v1"):
            pytest.skip("nothing that streams")
        body = {**body, "stream": True}
    with served.http() as http:
        message = refused(
            http.post(path, content=json.dumps(body), headers={"content-type": "application/json"}), status
        )
    assert says in message or says in str(message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"messages": ', b"\xff\xfe\x00", b'{"prompt": "\xff"}', b"[" * 100_000, b'{"a":' * 50_000,
     b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", b'{"prompt": "x", "temperature": NaN}',
     b'{"prompt": "x", "temperature": 1e999}', b"null", b"\x00"],
)  # fmt: skip
def test_bodies_that_are_not_json(served: Served, content: bytes) -> None:
    with served.http() as http:
        for path in (CHAT, TEXT, "/tokenize"):
            refused(http.post(path, content=content, headers={"content-type": "application/json"}), 400)
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("content", [b'{"prompt": "\xff"}', b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}"])
def test_bodies_that_no_decoder_takes_are_told_what_to_send(served: Served, content: bytes) -> None:
    with served.http() as http:
        said = refused(http.post(TEXT, content=content, headers={"content-type": "application/json"}), 400)
    assert "send an object in UTF-8" in said


def test_a_prompt_that_is_too_long_brings_no_warning_of_the_tokenizer(served: Served) -> None:
    """transformers would write one to standard error, where each line is a JSON object."""
    found: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = found.append  # type: ignore[method-assign]
    logger, tokenizer = logging.getLogger("transformers"), served.model.tokenizer
    before = tokenizer.model_max_length, logger.level
    tokenizer.model_max_length = 16
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    text = "x" * 2100
    try:
        with served.http() as http:
            for path, body in (
                (CHAT, {"messages": [{"role": "user", "content": text}]}), (TEXT, {"prompt": text}),
                ("/tokenize", {"prompt": text}), ("/api", {"prompts": [text]}),
            ):  # fmt: skip
                tokenizer.deprecation_warnings.clear()  # it warns once
                http.request("PUT" if path == "/api" else "POST", path, json=body)
                assert not [record.getMessage() for record in found], path
    finally:
        logger.removeHandler(handler)
        tokenizer.model_max_length = before[0]
        logger.setLevel(before[1])


def test_bodies_of_another_type_and_size(served: Served) -> None:
    with served.http() as http:
        for kind in ({"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}, {}):
            said = refused(http.post(TEXT, content=b'{"prompt": "x"}', headers=kind), 400)
            assert "content-type: application/json" in said  # curl -d names another type, if none is given
        assert "larger than" in refused(http.post(TEXT, json={"prompt": "x" * (5 * 2**20)}), 413)

        def endless() -> Any:
            for _ in range(80):
                yield b" " * 2**16

        refused(http.post(TEXT, content=endless(), headers={"content-type": "application/json"}), 413)


def test_paths_and_methods(served: Served) -> None:
    with served.http() as http:
        assert "/v1/nothing" in refused(http.get("/v1/nothing"), 404)
        assert "GET" in refused(http.get(CHAT), 405)
        refused(http.get("/v1/models/none"), 404)
        assert http.get("/v1/models/tiny:exits").json()["id"] == "tiny:exits"


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HI, temperature=3)  # type: ignore[arg-type]
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=HI)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
