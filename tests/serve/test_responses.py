"""Responses by the official client: the same tokens as from ``generate``, whole and streamed, and nothing is kept."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

import exitlm
from tests.serve.conftest import Served, run, serving

NAME = "tiny:exits"
QUESTION = "Why is the sky blue?"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
EVENTS: Any = pydantic.TypeAdapter(ResponseStreamEvent)
TEXT = [
    "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    "response.output_text.delta", "response.output_text.done", "response.content_part.done",
    "response.output_item.done",
]  # fmt: skip


def asked(**more: Any) -> dict[str, Any]:
    return {"model": NAME, "input": QUESTION, "instructions": "Be brief.", "max_output_tokens": 24, **more}


def expected(served: Served, **settings: Any) -> Any:
    """What the model writes by itself."""
    return served.model.generate(MESSAGES, **{"temperature": 1.0, "max_new_tokens": 24, **settings})


def raw_events(served: Served, **more: Any) -> list[dict[str, Any]]:
    """The events of a stream as they are on the wire, each of the shape that the official types have."""
    with served.http() as http:
        answer = http.post("/v1/responses", json={**asked(), "stream": True, **more})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *frames, rest = answer.text.split("\n\n")
    assert rest == ""
    found = []
    for number, frame in enumerate(frames):
        kind, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        assert event["sequence_number"] == number
        assert EVENTS.validate_python(event).type == event["type"]
        found.append(event)
    return found


def late(text: str) -> str:
    """Two characters of a text that do not stand within its first five."""
    return next(text[at : at + 2] for at in range(5, len(text)) if text.index(text[at : at + 2]) == at)


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """The types of events, neighbours of one type once."""
    names = [event["type"] for event in events]
    return [name for number, name in enumerate(names) if number == 0 or names[number - 1] != name]


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.9, "extra_body": {"seed": 5}}, {"temperature": 0.7, "top_p": 0.9, "seed": 5}),
        ({"extra_body": {"seed": 4, "min_p": 0.02, "top_k": 30}}, {"seed": 4, "min_p": 0.02, "top_k": 30}),
        ({"extra_body": {"seed": 6, "exitlm": {"mode": "threshold", "threshold": 0.02}}},
         {"seed": 6, "mode": "threshold", "threshold": 0.02}),
    ],
)  # fmt: skip
def test_a_response_is_what_generate_gives(
    served: Served, client: openai.OpenAI, fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    found = expected(served, **settings)
    response = client.responses.create(**asked(**fields))
    assert Response.model_validate(response.model_dump(warnings=False)).status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == found.text
    assert [(item.type, item.status) for item in response.output] == [("message", "incomplete")]  # type: ignore[union-attr]
    assert response.usage is not None
    assert response.usage.input_tokens == found.stats.prompt_tokens
    assert response.usage.output_tokens == 24
    assert response.usage.exitlm["mode"] == found.stats.mode  # type: ignore[attr-defined]
    assert response.usage.exitlm["exact"] is True  # type: ignore[attr-defined]
    events = list(client.responses.create(**asked(**fields), stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == found.text
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == found.text
    assert last.response.usage.output_tokens == 24  # type: ignore[union-attr]


def test_the_order_of_events(served: Served) -> None:
    found = expected(served, temperature=0.0)
    events = raw_events(served, temperature=0)
    assert kinds(events) == [*TEXT, "response.incomplete"]
    message, index = events[2]["item"]["id"], 0
    for event in events[3:-2]:
        assert (event["item_id"], event["output_index"], event["content_index"]) == (message, index, 0)
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == events[-4]["text"] == events[-3]["part"]["text"] == found.text
    assert len(deltas) > 5
    assert events[2]["item"] == {**events[2]["item"], "status": "in_progress", "content": []}
    assert events[-2]["item"]["status"] == "incomplete"
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert [event["response"]["status"] for event in events[:2]] == ["in_progress"] * 2
    assert len({event["response"]["id"] for event in (*events[:2], events[-1])}) == 1


def test_a_whole_text_is_completed(served: Served, client: openai.OpenAI) -> None:
    whole = expected(served, temperature=0.0).text
    stop = {"stop": [late(whole)]}
    response = client.responses.create(**asked(temperature=0, extra_body=stop, metadata={"a": "b"}, store=True))
    assert response.status == "completed"
    assert response.incomplete_details is None
    assert response.output_text == whole[: whole.index(late(whole))]
    assert response.completed_at is not None
    assert response.metadata == {"a": "b"}
    assert response.store is False  # type: ignore[attr-defined]
    events = raw_events(served, temperature=0, **stop)
    assert kinds(events) == [*TEXT, "response.completed"]
    assert events[-1]["response"]["output"][0]["content"] == [
        {"type": "output_text", "text": response.output_text, "annotations": [], "logprobs": []}
    ]


def test_the_clients_own_stream_helper(served: Served, client: openai.OpenAI) -> None:
    whole = expected(served, temperature=0.0).text
    with client.responses.stream(**asked(temperature=0, extra_body={"stop": [late(whole)]})) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == snapshots[-1] == whole[: whole.index(late(whole))]


def test_asyncio_clients(served: Served) -> None:
    async def ask_all() -> list[str]:
        import asyncio

        async with served.async_client() as client:

            async def ask(seed: int) -> str:
                fields = asked(extra_body={"seed": seed})
                if seed % 2:
                    stream = await client.responses.create(**fields, stream=True)
                    return "".join([e.delta async for e in stream if e.type == "response.output_text.delta"])
                return (await client.responses.create(**fields)).output_text

            return list(await asyncio.gather(*(ask(seed) for seed in range(6))))

    assert run(ask_all()) == [expected(served, seed=seed).text for seed in range(6)]


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([{"role": "user", "content": "hi"}], [{"role": "user", "content": "hi"}]),
        ([{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be "},
                                                               {"type": "input_text", "text": "brief."}]},
          {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
          {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
          {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "phase": "final_answer",
           "content": [{"type": "output_text", "text": "Hello.", "annotations": []}]},
          {"role": "user", "content": "bye"}],
         [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"},
          {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "bye"}]),
    ],
)  # fmt: skip
def test_items_are_the_messages_of_a_chat(client: openai.OpenAI, items: Any, messages: Any) -> None:
    response = client.responses.create(model=NAME, input=items, max_output_tokens=9, temperature=0)
    chat = client.chat.completions.create(model=NAME, messages=messages, max_tokens=9, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_and_the_trace(served: Served, client: openai.OpenAI, stream: bool) -> None:
    settings = {"mode": "threshold", "threshold": 0.02}
    found = expected(served, temperature=0.0, max_new_tokens=16, logprobs=3, **settings)
    ask = asked(
        max_output_tokens=16, temperature=0, include=["message.output_text.logprobs"], top_logprobs=3,
        extra_body={"exitlm": {**settings, "trace": True}},
    )  # fmt: skip
    if stream:
        events = list(client.responses.create(**ask, stream=True))
        deltas: list[Any] = [event for event in events if event.type == "response.output_text.delta"]
        assert [layer for event in deltas for layer in event.exitlm["exit_layers"]] == found.exit_layers
        entries = [entry for event in deltas for entry in event.logprobs]
        assert [e.logprob for e in entries] == pytest.approx([token.logprob for token in found.trace])
        response: Any = events[-1].response  # type: ignore[union-attr]
    else:
        response = client.responses.create(**ask)
    assert set(found.exit_layers) > {4}, "no token left at an exit, and the test shows nothing"
    assert response.exitlm["exit_layers"] == found.exit_layers
    entries = response.output[0].content[0].logprobs
    assert [e.logprob for e in entries] == pytest.approx([token.logprob for token in found.trace])
    assert [len(e.top_logprobs) for e in entries] == [3] * 16
    assert bytes(b for e in entries for b in e.bytes).decode(errors="replace") == found.text


class Number(pydantic.BaseModel):
    """What a response is parsed into."""

    model_config = pydantic.ConfigDict(extra="forbid")
    n: bool


def test_json_by_a_schema(client: openai.OpenAI) -> None:
    pytest.importorskip("xgrammar")
    ask: Any = {"model": NAME, "input": QUESTION, "max_output_tokens": 200}
    parsed = client.responses.parse(**ask, text_format=Number, extra_body={"seed": 1})
    assert isinstance(parsed.output_parsed, Number)
    assert parsed.text.format.type == "json_schema"  # type: ignore[union-attr]
    given = client.responses.create(**ask, text={"format": {"type": "json_object"}, "verbosity": "low"})
    assert given.output_text.lstrip().startswith("{")


def test_a_request_as_codex_sends_it(served: Served) -> None:
    """Built from the fields that Codex serialises; what is not for this server has no effect."""
    body = {
        "instructions": "Be brief.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandboxed."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        ],
        "tools": [{"type": "web_search", "external_web_access": False}, {"type": "local_shell"},
                  {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}}],
        "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False, "stream": True, "include": ["reasoning.encrypted_content"], "prompt_cache_key": "thread",
        "text": {"verbosity": "low"}, "client_metadata": {"x": "y"}, "temperature": 0,
        "stream_options": {"reasoning_summary_delivery": "sequential_cutoff"},
    }  # fmt: skip
    events = raw_events(served, **body)
    assert kinds(events) == [*TEXT, "response.incomplete"]
    assert events[0]["response"]["tools"] == []
    system = [{"role": "system", "content": "Be brief.\n\nSandboxed."}, MESSAGES[1]]
    found = served.model.generate(system, temperature=0.0, max_new_tokens=24)
    assert events[-2]["item"]["content"][0]["text"] == found.text


def test_a_stream_that_breaks_off_says_so(make_model: Callable[..., exitlm.LLM]) -> None:
    model = make_model("float32", quant="none")
    advance, left = model.engine.advance, 8

    def broken(*given: Any) -> Any:
        nonlocal left
        left -= 1
        if left <= 0:
            raise RuntimeError("a test's")
        return advance(*given)

    model.engine.advance = broken  # type: ignore[method-assign]
    with serving(model) as served:
        events = raw_events(served, temperature=0, max_output_tokens=400, exitlm={"mode": "full"})
        assert kinds(events) == [*TEXT[:5], "response.failed"]
        last = events[-1]["response"]
        assert last["status"] == "failed"
        assert last["error"]["code"] == "server_error"
        assert "RuntimeError" in last["error"]["message"]
        assert last["output"] == []
        with served.client() as client, pytest.raises(openai.InternalServerError, match="RuntimeError"):
            client.responses.create(**asked())


HI = "hi"
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
BAD: list[tuple[Any, str, str | None]] = [
    ({}, "field 'input' is missing", "input"),
    ({"input": []}, "input is empty", "input"),
    ({"input": 5}, "field 'input", "input"),
    ({"input": [{"role": "robot", "content": HI}]}, "input.0.role", "input.0.role"),
    ({"input": [{"role": "user"}]}, "field 'input.0.content' is missing", "input.0.content"),
    ({"input": [{"content": HI}]}, "field 'input.0.role' is missing", "input.0.role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "text alone is read",
     "input.0.content"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "'input.0.content.0.text' is missing",
     "input.0.content.0.text"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "keeps no responses; send the item itself", "input.0"),
    ({"input": [{"type": "computer_call"}]}, "has type 'computer_call'", "input.0.type"),
    ({"input": [{**CALL, "call_id": None}]}, "'input.0.call_id' is missing", "input.0.call_id"),
    ({"input": [{**CALL, "arguments": {}}]}, "input.0.arguments", "input.0.arguments"),
    ({"input": [CALL, {"type": "function_call_output", "call_id": "c"}]}, "'input.1.output' is missing",
     "input.1.output"),
    ({"input": "\ud800"}, "UTF-8", None),
    ({"input": HI, "previous_response_id": "resp_1"}, "send the whole conversation", "previous_response_id"),
    ({"input": HI, "conversation": "conv_1"}, "send the whole conversation", "conversation"),
    ({"input": HI, "background": True}, "use stream", "background"),
    ({"input": HI, "prompt": {"id": "pmpt_1"}}, "keeps no prompts", "prompt"),
    ({"input": HI, "truncation": "auto"}, "input is never cut", "truncation"),
    ({"input": HI, "max_output_tokens": 0}, "max_output_tokens", "max_output_tokens"),
    ({"input": HI, "max_output_token": 5}, "did you mean 'max_output_tokens'", "max_output_token"),
    ({"input": HI, "max_output_tokens": 501}, "max_output_tokens is 501, but", "max_output_tokens"),
    ({"input": HI, "temperature": 3}, "temperature", "temperature"),
    ({"input": HI, "n": 2}, "field 'n'", "n"),
    ({"input": HI, "top_logprobs": 21}, "top_logprobs", "top_logprobs"),
    ({"input": HI, "text": {"format": {"type": "xml"}}}, "text.format has type 'xml'", None),
    ({"input": HI, "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format lacks its 'schema'", None),
    ({"input": HI, "text": {"form": 1}}, "unknown field 'form'", "text.form"),
    ({"input": HI, "tool_choice": "required"}, "no tools", None),
    ({"input": HI, "tool_choice": "required", "tools": [{"type": "web_search"}]}, "no tools", None),
    ({"input": HI, "tool_choice": {"type": "function", "name": "f"}}, "'f'", None),
    ({"input": HI, "tools": [{"type": "function"}]}, "tools[0]", None),
    ({"input": HI, "tool_choice": "required", "tools": [{"type": "function", "name": "f"}],
      "text": {"format": {"type": "json_object"}}}, "text.format has no effect", "text.format"),
    ({"input": HI, "exitlm": {"exits": [2]}}, "no exit at layer 2", None),
    ({"input": "x" * 2100}, "context is 2048", None),
    ({"input": HI, "metadata": {"a": 1}}, "field 'metadata.a' is 1", "metadata.a"),
    ({"input": HI, "tools": [{"type": "function", "name": "f", "strict": float("nan")}]}, "leave out NaN", None),
    ([1], "JSON object", None),
]  # fmt: skip


@pytest.fixture(scope="module")
def limited(make_model: Callable[..., exitlm.LLM]) -> Any:
    with serving(make_model("float32", quant="none"), limits={"new_tokens": 500}) as found:
        yield found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "says", "param"), BAD)
def test_refusals(limited: Served, body: Any, says: str, param: str | None, stream: bool) -> None:
    if isinstance(body, dict):
        body = {**body, "stream": stream}
    with limited.http() as http:
        response = http.post(
            "/v1/responses", content=json.dumps(body), headers={"content-type": "application/json"}
        )  # fmt: skip
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]
    assert "\n" not in error["message"]
    assert error["param"] == param


def test_nothing_is_kept(served: Served, client: openai.OpenAI) -> None:
    response = client.responses.create(**asked(max_output_tokens=1, store=True))
    calls: list[Callable[[str], Any]] = [
        client.responses.retrieve, client.responses.delete, client.responses.cancel, client.responses.input_items.list,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(openai.BadRequestError, match="keeps no responses"):
            call(response.id)
    with served.http() as http:
        answer: httpx.Response = http.get("/v1/responses")
    assert answer.status_code == 405
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(**asked(model="nope"))
    assert missing.value.code == "model_not_found"
