"""What a request offers: OpenAI's fields, read or refused by name."""

import copy
import json
from typing import Any

import pytest

from exitlm.errors import UserError
from exitlm.serve.tools.offer import MAX_TOOLS, Offer, Tool, read_offer


def function(name: Any = "f", **fields: Any) -> dict[str, Any]:
    """A tool of a request."""
    return {"type": "function", "function": {"name": name, **fields}}


F, G = function("f"), function("g")
CALL_F = {"type": "function", "function": {"name": "f"}}


def test_tools_as_templates_take_them() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    offer = read_offer([function("f", description="Does it.", parameters=schema, strict=True), G])
    assert [tool.definition() for tool in offer.tools] == [
        {"type": "function", "function": {"name": "f", "description": "Does it.", "parameters": schema}},
        {
            "type": "function",
            "function": {"name": "g", "description": "", "parameters": {"type": "object", "properties": {}}},
        },
    ]


def test_the_shape_of_responses_is_read_too() -> None:
    flat = {"type": "function", "name": "f", "description": "x", "parameters": {"type": "object"}}
    assert read_offer([flat]) == read_offer([function("f", description="x", parameters={"type": "object"})])


def test_a_schema_is_one_of_objects() -> None:
    for parameters, found in (
        ({}, {"type": "object"}),
        ({"properties": {}}, {"type": "object", "properties": {}}),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}}, None),
    ):
        tool = read_offer([function("f", parameters=parameters)]).tools[0]
        assert tool.parameters == (found or parameters)


def test_schemas_are_copied() -> None:
    given = [function("f", parameters={"type": "object", "properties": {"a": {}}})]
    before = copy.deepcopy(given)
    tool = read_offer(given).tools[0]
    given[0]["function"]["parameters"]["properties"]["a"]["type"] = "null"
    assert tool.parameters == before[0]["function"]["parameters"]


@pytest.mark.parametrize(
    ("choice", "offer"),
    [
        (None, Offer(tools=(Tool("f"), Tool("g")))),
        ("auto", Offer(tools=(Tool("f"), Tool("g")))),
        ("none", Offer()),
        ("required", Offer(tools=(Tool("f"), Tool("g")), forced=True)),
        (CALL_F, Offer(tools=(Tool("f"), Tool("g")), forced=True, name="f", parallel=False)),
        ({"type": "function", "name": "g"}, Offer(tools=(Tool("f"), Tool("g")), forced=True, name="g", parallel=False)),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [CALL_F]}}, Offer(tools=(Tool("f"),))),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]},
            Offer(tools=(Tool("g"),), forced=True),
        ),
    ],
)
def test_choices(choice: Any, offer: Offer) -> None:
    assert read_offer([F, G], choice) == offer


def test_without_tools() -> None:
    for choice in (None, "auto", "none"):
        assert read_offer(None, choice) == read_offer([], choice) == Offer()


def test_parallel_calls() -> None:
    assert not read_offer([F], None, False).parallel
    assert not read_offer([F], CALL_F, False).parallel
    assert read_offer([F], "required", None).parallel


@pytest.mark.parametrize(
    ("tools", "choice", "parallel", "says"),
    [
        (5, None, None, r"tools is 5 \(int\), but must be a list"),
        ({"f": F}, None, None, "tools is .*, but must be a list"),
        ([5], None, None, r"tools\[0\] is 5 \(int\)"),
        ([F, {"type": "custom", "custom": {}}], None, None, r"tools\[1\] is .*, but must be of the shape"),
        ([{"type": "function"}], None, None, r"tools\[0\].name is None"),
        ([{"type": "function", "function": 5}], None, None, r"tools\[0\].function is 5"),
        ([function("a b")], None, None, r"tools\[0\].name is 'a b' \(str\), but must be 1 to 64 letters"),
        ([function("x" * 65)], None, None, r"tools\[0\].name is"),
        ([function(5)], None, None, r"tools\[0\].name is 5"),
        ([F, G, F], None, None, r"tools\[2\] has the name 'f' of an earlier one"),
        ([function("f", description=5)], None, None, r"tools\[0\].description is 5"),
        ([function("f", description="\ud800")], None, None, r"tools\[0\] is not valid UTF-8"),
        ([function("f", parameters={"title": "\ud800"})], None, None, r"tools\[0\] is not valid UTF-8"),
        ([function("f", parameters=[])], None, None, r"tools\[0\].parameters is \[\]"),
        ([function("f", parameters={"a": {1}})], None, None, r"tools\[0\].parameters can't be written as JSON"),
        ([function("f", parameters={"type": "array"})], None, None, "has type 'array', but arguments are an object"),
        ([function(f"f{n}") for n in range(MAX_TOOLS + 1)], None, None, "give at most 128"),
        ([F], "requird", None, "tool_choice is 'requird', .*; did you mean 'required'"),
        ([F], 5, None, r"tool_choice is 5 \(int\)"),
        ([F], {"type": "custom"}, None, "tool_choice has type 'custom'"),
        ([F], {"type": "function"}, None, "tool_choice is .*, but must be of the shape"),
        ([function("foo")], {"type": "function", "name": "fo"}, None, "names 'fo', .*; did you mean 'foo'"),
        ([F], {"type": "allowed_tools", "allowed_tools": 5}, None, "tool_choice.allowed_tools is 5"),
        ([F], {"type": "allowed_tools", "tools": 5}, None, "tool_choice.tools is 5"),
        ([F], {"type": "allowed_tools", "tools": [5]}, None, "tool_choice.tools is 5"),
        ([F], {"type": "allowed_tools", "tools": [CALL_F], "mode": 5}, None, "tool_choice.mode is 5"),
        (None, "required", None, "'required', but the request has no tools"),
        (None, CALL_F, None, "tool_choice names 'f', which is not one of the tools"),
        ([F], None, "no", "parallel_tool_calls is 'no'"),
    ],
)
def test_what_is_no_offer(tools: Any, choice: Any, parallel: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_offer(tools, choice, parallel)


def test_a_schema_that_is_too_deep() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5_000):
        deep = {"items": deep}
    with pytest.raises(UserError, match="can't be written as JSON"):
        read_offer([function("f", parameters=deep)])
    assert json.dumps(read_offer([F]).tools[0].definition())
