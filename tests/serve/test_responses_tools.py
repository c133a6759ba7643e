"""Function calls in responses by the official client, whole and streamed, cut in every place; and back into the
conversation."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from exitlm.serve.protocol.response import ResponseBody
from exitlm.serve.response_input import chat_body
from tests.serve.conftest import Served
from tests.serve.scripted import Scripted, scripted_server
from tests.serve.test_responses import raw_events
from tests.serve.tools.answers import TOOLS
from tests.serve.tools.scripts import SCRIPTS, Script
from tests.serve.tools.templates import LLAMA_3, QWEN

ASK = "What is the weather?"
OFFERED: Any = [
    {"type": "web_search"},
    *({"type": "function", **tool.definition()["function"], "strict": False} for tool in TOOLS),
]  # the first one is skipped
PARTS = 5  # of the scripts; the first one is in every run


@pytest.fixture(scope="module", params=[QWEN, LLAMA_3], ids=["qwen", "llama"])
def scripted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Scripted]]:
    with scripted_server(request.param, tmp_path_factory.mktemp("tools")) as model:
        yield request.param, model


def asked(model: Scripted, script: Script, **more: Any) -> dict[str, Any]:
    model.ids = script.ids
    body = {"stop_token_ids": [script.tokenizer.eos_token_id]}
    return {"model": "tiny", "input": ASK, "tools": OFFERED, "temperature": 0, "extra_body": body, **more}


def calls_of(output: list[Any]) -> list[tuple[str, str]]:
    return [(item.name, item.arguments) for item in output if item.type == "function_call"]


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
def test_scripted_answers(scripted: tuple[str, Scripted], part: int) -> None:
    template, model = scripted
    scripts = [script for script in SCRIPTS if script.template == template]
    with model.served.client() as client:
        for script in scripts[part::PARTS]:
            ask = asked(model, script)
            calls = [(call.name, call.arguments) for call in script.answer.calls]
            response = client.responses.create(**ask)
            assert Response.model_validate(response.model_dump(warnings=False)).status == "completed"
            assert calls_of(response.output) == calls
            assert response.output_text == script.answer.text
            assert {item.status for item in response.output} == {"completed"}  # type: ignore[union-attr]
            assert [tool.name for tool in response.tools] == [tool.name for tool in TOOLS]  # type: ignore[union-attr]
            with client.responses.stream(**ask) as stream:
                added, texts, written = [], {}, {}
                for event in stream:
                    if event.type == "response.output_item.added":
                        added.append(event.output_index)
                    elif event.type == "response.output_text.delta":
                        texts[event.output_index] = texts.get(event.output_index, "") + event.delta
                    elif event.type == "response.function_call_arguments.delta":
                        written[event.output_index] = written.get(event.output_index, "") + event.delta
                final = stream.get_final_response()
            assert added == list(range(len(final.output)))
            assert [item.type for item in final.output] == [item.type for item in response.output]
            assert calls_of(final.output) == calls
            assert "".join(texts.values()) == final.output_text == script.answer.text
            assert [written.get(i, "") for i in added if final.output[i].type == "function_call"] == [
                c for _, c in calls
            ]


def _script(template: str, calls: int, text: bool) -> Script:
    return next(
        s for s in SCRIPTS
        if s.template == template and len(s.answer.calls) == calls and bool(s.answer.text) is text
    )  # fmt: skip


def test_the_order_of_events_of_a_call(scripted: tuple[str, Scripted]) -> None:
    template, model = scripted
    script = _script(template, 1, text=False)
    ask = asked(model, script)
    for trace in (False, True):
        more = {**ask.pop("extra_body", {}), **ask, "max_output_tokens": None, "instructions": None}
        more["stop_token_ids"] = [script.tokenizer.eos_token_id]
        events = raw_events(model.served, **more, exitlm={"trace": trace})
        names = [event["type"] for event in events]
        deltas = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
        assert [name for name in names if name != "response.function_call_arguments.delta"] == [
            "response.created", "response.in_progress", "response.output_item.added",
            "response.function_call_arguments.done", "response.output_item.done", "response.completed",
        ]  # fmt: skip
        call = script.answer.calls[0]
        item = events[-2]["item"]
        assert events[2]["item"] == {**item, "status": "in_progress", "arguments": ""}
        assert (item["name"], item["arguments"], item["status"]) == (call.name, call.arguments, "completed")
        assert item["call_id"].startswith("call_")
        assert events[-3]["arguments"] == "".join(event["delta"] for event in deltas) == call.arguments
        assert {event["item_id"] for event in (*deltas, events[-3])} == {item["id"]}
        if trace:  # every token is told of once
            told = [token for event in deltas for token in event["exitlm"]["tokens"]]
            assert told == events[-1]["response"]["exitlm"]["tokens"]
            assert len(told) == events[-1]["response"]["usage"]["output_tokens"]


def test_a_call_that_is_cut_is_incomplete(scripted: tuple[str, Scripted]) -> None:
    template, model = scripted
    script = _script(template, 1, text=False)
    with model.served.client() as client:
        response = client.responses.create(**asked(model, script, max_output_tokens=len(script.ids) - 14))
    assert response.status == "incomplete"
    (item,) = response.output
    assert item.type == "function_call"
    assert item.status == "incomplete"
    assert script.answer.calls[0].arguments.startswith(item.arguments)


def test_an_answer_without_a_token_is_an_empty_message(scripted: tuple[str, Scripted]) -> None:
    template, model = scripted
    ask = asked(model, _script(template, 1, text=False))
    model.ids = model.ids[-1:]
    with model.served.client() as client:
        response = client.responses.create(**ask)
        assert response.output_text == ""
        assert [item.type for item in response.output] == ["message"]
        with client.responses.stream(**ask) as stream:
            assert [item.type for item in stream.get_final_response().output] == ["message"]


def test_results_go_back_into_the_conversation(scripted: tuple[str, Scripted]) -> None:
    template, model = scripted
    script = _script(template, 2, text=False)
    with model.served.client() as client:
        first = client.responses.create(**asked(model, script))
        results = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "21 degrees"}
            for item in first.output if item.type == "function_call"
        ]  # fmt: skip
        items: Any = [{"role": "user", "content": ASK}, *first.output, *results]
        again = client.responses.create(**asked(model, script, input=items))
        calls = [
            {"id": i.call_id, "type": "function", "function": {"name": i.name, "arguments": i.arguments}}
            for i in first.output if i.type == "function_call"
        ]  # fmt: skip
        told = [{"role": "tool", "tool_call_id": r["call_id"], "content": r["output"]} for r in results]
        messages: Any = [{"role": "user", "content": ASK}, {"role": "assistant", "tool_calls": calls}, *told]
        chat = client.chat.completions.create(
            model="tiny", messages=messages, tools=[tool.definition() for tool in TOOLS], max_tokens=1  # type: ignore[misc]
        )  # fmt: skip
    assert again.usage.input_tokens == chat.usage.prompt_tokens  # type: ignore[union-attr]


def test_calls_and_text_of_one_answer_are_one_message() -> None:
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    body = ResponseBody.model_validate({
        "instructions": "A.",
        "input": [
            {"role": "system", "content": "B."}, {"role": "user", "content": "Go."},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Now"}]}, {**call, "call_id": "1"},
            {"type": "reasoning", "summary": []}, {**call, "call_id": "2"},
            {"role": "assistant", "content": " done."},
            {"type": "function_call_output", "call_id": "1", "output": "x"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
            {**call, "call_id": "3"}, {"role": "system", "content": "C."},
        ],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [
            {"type": "mcp", "server_label": "m"}, {"type": "function", "name": "f"},
        ]},
        "tools": [{"type": "mcp", "server_label": "m"}, {"type": "function", "name": "f"}],
    })  # fmt: skip
    found = chat_body(body)
    said = [(m.role, m.content, [c.id for c in m.tool_calls or []], m.tool_call_id) for m in found.messages]
    assert said == [
        ("system", "A.\n\nB.", [], None), ("user", "Go.", [], None), ("assistant", "Now done.", ["1", "2"], None),
        ("tool", "x", [], "1"), ("tool", "y", [], "2"), ("assistant", None, ["3"], None), ("system", "C.", [], None),
    ]  # fmt: skip
    assert found.tools == [{"type": "function", "name": "f"}]
    assert found.tool_choice == {
        "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}],
    }  # fmt: skip


def test_a_forced_call(scripted: tuple[str, Scripted]) -> None:
    pytest.importorskip("xgrammar")
    _, model = scripted
    model.ids = None
    tokenizer = model.served.model.tokenizer
    assert tokenizer is not None
    with model.served.client() as client:
        response = client.responses.create(
            model="tiny", input=ASK, tools=OFFERED, max_output_tokens=300, parallel_tool_calls=False,
            tool_choice={"type": "function", "name": TOOLS[1].name},
            extra_body={"stop_token_ids": [tokenizer.eos_token_id], "seed": 3},
        )  # fmt: skip
    (call,) = response.output
    assert call.type == "function_call"
    assert call.name == TOOLS[1].name


def test_a_tool_that_is_not_offered(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not one of the tools"):
        client.responses.create(
            model="tiny", input=ASK, tools=OFFERED, tool_choice={"type": "function", "name": "nope"}
        )
