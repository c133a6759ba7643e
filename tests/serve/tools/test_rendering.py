"""Conversations with tools through templates of each family."""

import json
import re
from typing import Any

import pytest

from exitlm.errors import UserError
from exitlm.serve.tools.deltas import collect
from exitlm.serve.tools.formats import HERMES, detect
from exitlm.serve.tools.rendering import render
from tests.serve.tools.answers import CLOCK, NAMES, TOOLS, WEATHER
from tests.serve.tools.templates import (
    CHATML,
    FAMILIES,
    HERMES_2,
    LLAMA_3,
    MISTRAL_3,
    MISTRAL_13,
    QWEN,
    SPECIAL,
    prompt,
)

each = pytest.mark.parametrize(
    "template", FAMILIES, ids=["qwen", "hermes2", "chatml", "llama3", "mistral3", "mistral13"]
)
USER = {"role": "user", "content": "Rain in Zürich?"}


def call(id: str, name: str = "get_weather", arguments: Any = '{"city": "Zürich"}') -> dict[str, Any]:
    """A call of the history."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(id: str, content: Any = "wet") -> dict[str, Any]:
    """Its result."""
    return {"role": "tool", "tool_call_id": id, "content": content}


TWO = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [call("call_1"), call("call_2", "clock", "{}")]},
    result("call_2", "noon"),
    result("call_1"),
    {"role": "assistant", "content": "Wet at noon."},
    {"role": "user", "content": "Thanks"},
]


def shown(template: str, messages: list[Any], tools: Any = TOOLS) -> str:
    """The prompt of a conversation."""
    rendered = render(detect(template), messages, tools)
    return prompt(template, rendered.messages, rendered.tools)


@each
def test_the_prompt_shows_the_tools(template: str) -> None:
    text = shown(template, [USER])
    assert text.count("Rain in Zürich?") == 1
    for tool in TOOLS:
        assert tool.name in text
        assert tool.description in text
    assert '"required"' in text
    assert "get_weather" not in shown(template, [USER], ())
    assert shown(template, [USER], ()) == prompt(template, [USER])


@each
def test_the_prompt_shows_calls_and_results(template: str) -> None:
    text = shown(template, TWO)
    history = text[text.index("Rain in") :] if template is not LLAMA_3 else text[text.rindex("Rain in") :]
    for part in ('"city": "Zürich"', "get_weather", "clock", "noon", "wet", "Wet at noon.", "Thanks"):
        assert part in history
    assert "None" not in history
    assert '\\"city' not in history


@each
def test_the_models_own_parser_reads_the_calls_of_the_history(template: str) -> None:
    """What a template writes of a call is what its format's parser reads."""
    text = shown(template, TWO[:2]).rpartition("Rain in Zürich?")[2]
    format = detect(template)
    skipped = [re.escape(token) for token in SPECIAL[FAMILIES[template]] if token not in format.markers]
    answer = "".join(part.removeprefix("assistant") for part in re.split("|".join(skipped), text))
    parser = format.parser(names=NAMES)
    found = collect([*parser.feed(answer), *parser.finish()])
    assert [(one.name, json.loads(one.arguments)) for one in found.calls] == [
        ("get_weather", {"city": "Zürich"}),
        ("clock", {}),
    ]
    assert found.text == ""


def test_one_call_a_message_where_the_template_takes_no_more() -> None:
    rendered = render(detect(LLAMA_3), [*TWO[:4], result("call_9", "late"), *TWO[4:]])
    assert [
        (message["role"], [one["id"] for one in message.get("tool_calls", ())], message["content"])
        for message in rendered.messages
    ] == [
        ("user", [], "Rain in Zürich?"), ("assistant", ["call_1"], ""), ("tool", [], "wet"),
        ("assistant", ["call_2"], ""), ("tool", [], "noon"), ("tool", [], "late"),
        ("assistant", [], "Wet at noon."), ("user", [], "Thanks"),
    ]  # fmt: skip


def test_short_ids_belong_together() -> None:
    messages = render(detect(MISTRAL_3), TWO).messages
    ids = [one["id"] for one in messages[1]["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(len(id) == 9 and id.isalnum() for id in ids)
    assert [messages[2]["tool_call_id"], messages[3]["tool_call_id"]] == ids[::-1]
    kept = render(detect(MISTRAL_3), [{"role": "assistant", "tool_calls": [call("a1B2c3D4e")]}]).messages
    assert kept[0]["tool_calls"][0]["id"] == "a1B2c3D4e"


def test_results_have_the_name_of_what_was_called() -> None:
    messages = render(HERMES, TWO).messages
    assert [message.get("name") for message in messages] == [None, None, "clock", "get_weather", None, None]
    assert '"name": "clock", "content": "noon"' in shown(HERMES_2, TWO)


def test_described_tools_stand_in_the_systems_message() -> None:
    format = detect(CHATML)
    one = render(format, [{"role": "developer", "content": "Be brief."}, *TWO], [CLOCK])
    assert one.tools is None
    assert [message["role"] for message in one.messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert one.messages[0]["content"].startswith("Be brief.\n\nYou may call")
    assert '{"type": "function", "function": {"name": "clock"' in one.messages[0]["content"]
    assert one.messages[2]["content"] == format.write([("get_weather", {"city": "Zürich"}), ("clock", {})])
    assert one.messages[3]["content"] == (
        "<tool_response>\nnoon\n</tool_response>\n<tool_response>\nwet\n</tool_response>"
    )
    assert render(format, [USER], [CLOCK]).messages[0]["role"] == "system"
    assert render(format, [{"role": "system", "content": ""}], [CLOCK]).messages[0]["content"].startswith("You may")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        ("[1]", "[1]"),
        ('{"a": ', '{"a": '),
        ("{" * 100_000, "{" * 100_000),
        ('{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ("\ud800", "?"),
    ],
    ids=lambda value: str(value)[:20].encode(errors="replace").decode(),
)
def test_arguments_of_the_history(arguments: Any, found: Any) -> None:
    """A mapping where they are a JSON object, and what the model wrote where they are not."""
    messages = [{"role": "assistant", "tool_calls": [call("x", "f", arguments)]}]
    for template in FAMILIES:
        rendered = render(detect(template), messages, [WEATHER]).messages[-1]
        if "tool_calls" in rendered:
            assert rendered["tool_calls"][0]["function"]["arguments"] == found


def test_content() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "refusal": None, "tool_calls": None},
        {"role": "assistant", "content": None},
        result("x", parts),
    ]
    assert render(HERMES, messages).messages == [
        {"role": "user", "content": "ab"}, {"role": "assistant", "content": "no"}, {"role": "assistant", "content": ""},
        {"role": "tool", "content": "ab", "tool_call_id": "x"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (5, r"message 2 is 5 \(int\), but must be a mapping"),
        ({"content": "x"}, "message 2 has role None; use one of system, developer, user, assistant, tool"),
        ({"role": "function", "content": "x"}, "message 2 has role 'function'"),
        ({"role": ["x"], "content": "x"}, r"message 2 has role \['x'\]"),
        ({"role": "user"}, "content of message 2 is None"),
        ({"role": "user", "content": 5}, "content of message 2 is 5"),
        ({"role": "user", "content": [5]}, "content of message 2 is 5"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content of message 2 is .*shape"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "content of message 2 is .*shape"),
        ({"role": "user", "content": "\ud800"}, "content of message 2 is not valid UTF-8"),
        ({"role": "tool", "content": "x"}, "tool_call_id of message 2 is None"),
        ({"role": "tool", "content": "x", "tool_call_id": "\ud800"}, "tool_call_id of message 2 is not valid UTF-8"),
        ({"role": "assistant", "tool_calls": 5}, "tool_calls of message 2 is 5"),
        ({"role": "assistant", "tool_calls": [5]}, "call 1 of message 2 is 5"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "call 1 of message 2 is .*shape"),
        ({"role": "assistant", "tool_calls": [call(5)]}, "id of call 1 of message 2 is 5"),  # type: ignore[arg-type]
        ({"role": "assistant", "tool_calls": [call("x", 5)]}, "function's name in call 1 of message 2"),  # type: ignore[arg-type]
        ({"role": "assistant", "tool_calls": [call("x", "f", 5)]}, "arguments of call 1 of message 2 is 5"),
        ({"role": "assistant", "tool_calls": [call("x", "\ud800")]}, "call 1 of message 2 is not valid UTF-8"),
    ],
)
def test_what_is_no_message(message: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        render(HERMES, [USER, message])


def test_messages_are_copied() -> None:
    given = json.loads(json.dumps(TWO))
    for template in (QWEN, LLAMA_3, MISTRAL_3, MISTRAL_13, CHATML):
        render(detect(template), given, TOOLS)
    assert given == TWO
