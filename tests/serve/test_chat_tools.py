"""Tool calls by the official client, whole and streamed. The model writes scripted ids, a byte or a marker each, so
that calls are cut in every place."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

import exitlm
from exitlm.serve.tools.formats import FORMATS
from tests.serve.conftest import Served, serving
from tests.serve.scripted import Scripted, scripted_server
from tests.serve.tools.answers import TOOLS
from tests.serve.tools.scripts import SCRIPTS, Script
from tests.serve.tools.templates import QWEN

MESSAGES: Any = [{"role": "user", "content": "What is the weather?"}]
OFFERED: Any = [tool.definition() for tool in TOOLS]
PARTS = 5  # of the scripts; the first one is in every run
TEMPLATES = list(dict.fromkeys(script.template for script in SCRIPTS))


@pytest.fixture(scope="module", params=TEMPLATES, ids=lambda template: template.strip()[:24])
def scripted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Scripted]]:
    with scripted_server(request.param, tmp_path_factory.mktemp("tools")) as model:
        yield request.param, model


def asked(scripted: Scripted, script: Script, **more: Any) -> dict[str, Any]:
    scripted.ids = script.ids
    stops = [script.tokenizer.eos_token_id]
    body = {"stop_token_ids": stops, **more.pop("extra_body", {})}
    return {"model": "tiny", "messages": MESSAGES, "tools": OFFERED, "temperature": 0, "extra_body": body, **more}


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))])
def test_scripted_answers(scripted: tuple[str, Scripted], part: int) -> None:
    template, model = scripted
    scripts = [script for script in SCRIPTS if script.template == template]
    with model.served.client() as client:
        for script in scripts[part::PARTS]:
            ask = asked(model, script)
            choice = client.chat.completions.create(**ask).choices[0]
            calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
            assert (choice.message.content or "") == script.answer.text
            assert calls == [(call.name, call.arguments) for call in script.answer.calls]
            assert choice.finish_reason == ("tool_calls" if calls else "stop")
            assert (choice.message.content is None) == (bool(calls) and not script.answer.text)
            text, named, written, reasons = "", {}, {}, []
            for chunk in client.chat.completions.create(**ask, stream=True):
                delta = chunk.choices[0].delta
                text += delta.content or ""
                for call in delta.tool_calls or []:
                    if call.id:
                        named[call.index] = call.function.name
                    written[call.index] = written.get(call.index, "") + (call.function.arguments or "")
                reasons.append(chunk.choices[0].finish_reason)
            assert text == script.answer.text
            assert [(named[i], written[i]) for i in range(len(named))] == calls
            assert reasons[-1] == choice.finish_reason


def test_calls_are_forced_by_a_grammar(scripted: tuple[str, Scripted]) -> None:
    pytest.importorskip("xgrammar")
    _, model = scripted
    model.ids = None
    tokenizer = model.served.model.tokenizer
    assert tokenizer is not None
    ask: dict[str, Any] = {
        "model": "tiny", "messages": MESSAGES, "tools": OFFERED, "seed": 3, "max_tokens": 400,
        "extra_body": {"stop_token_ids": [tokenizer.eos_token_id]}, "parallel_tool_calls": False,
    }  # fmt: skip
    name = TOOLS[0].name
    with model.served.client() as client:
        for choice in ("required", {"type": "function", "function": {"name": name}}):
            answer = client.chat.completions.create(**ask, tool_choice=choice).choices[0]
            if answer.finish_reason == "length":
                continue  # a model of noise may write a string for ever
            (call,) = answer.message.tool_calls or []
            assert json.loads(call.function.arguments) is not None
            assert call.function.name in [tool.name for tool in TOOLS]
            assert choice == "required" or call.function.name == name


def test_results_go_back_into_the_template(scripted: tuple[str, Scripted]) -> None:
    _, model = scripted
    script = next(s for s in SCRIPTS if s.template == scripted[0] and s.answer.calls)
    with model.served.client() as client:
        said = client.chat.completions.create(**asked(model, script)).choices[0].message
        results = [{"role": "tool", "tool_call_id": c.id, "content": "21 degrees"} for c in said.tool_calls or []]
        more = {**asked(model, script), "messages": [*MESSAGES, said.model_dump(), *results]}
        assert client.chat.completions.create(**more).choices[0].finish_reason == "tool_calls"


def test_none_offers_nothing(make_model: Callable[..., exitlm.LLM]) -> None:
    """With tool_choice "none" the prompt is that of a conversation without tools."""
    model = make_model("float32", quant="none")
    model.tokenizer.chat_template = QWEN  # type: ignore[union-attr]
    with serving(model) as served, served.client() as client:
        ask: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3, "temperature": 0}
        plain = client.chat.completions.create(**ask)
        none = client.chat.completions.create(**ask, tools=OFFERED, tool_choice="none")
        auto = client.chat.completions.create(**ask, tools=OFFERED)
    assert none.usage == plain.usage or none.usage.prompt_tokens == plain.usage.prompt_tokens  # type: ignore[union-attr]
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert auto.usage.prompt_tokens > plain.usage.prompt_tokens  # type: ignore[union-attr]


def test_a_forced_call_and_a_format_do_not_go_together(served: Served, client: openai.OpenAI) -> None:
    assert FORMATS
    with pytest.raises(openai.BadRequestError, match="response_format has no effect"):
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, tools=OFFERED, tool_choice="required",
            response_format={"type": "json_object"},
        )  # fmt: skip
