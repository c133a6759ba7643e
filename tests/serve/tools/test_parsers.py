"""Answers in the three formats: what is a call, what is text, and that no cut changes either."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitlm.serve.tools.deltas import Answer, Delta, Text, ToolArguments, ToolStart, collect
from exitlm.serve.tools.formats import HERMES, LLAMA, MISTRAL, MISTRAL_LIST, Format
from tests.serve.tools.answers import (
    MARKED,
    NAMES,
    WRITTEN,
    bare,
    broken_texts,
    counted_ids,
    cut,
    deltas_of,
    expect,
    many,
    places,
    read,
    some_arguments,
    some_calls,
)

each = pytest.mark.parametrize("format", WRITTEN, ids=lambda format: format.name)
CLOCK, RAIN = ("clock", "{}"), ("get_weather", '{"city": "Zürich", "days": 2}')
HERMES_RAIN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>'
HERMES_CLOCK = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
LLAMA_RAIN = '{"name": "get_weather", "parameters": {"city": "Zürich", "days": 2}}'
LLAMA_CLOCK = '{"name": "clock", "parameters": {}}'
MISTRAL_RAIN = '[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich", "days": 2}'

# Text -> answer. What is malformed is text, character by character; blanks around calls are nobody's.
CASES: list[tuple[Format, str, Answer]] = [
    # Hermes and Qwen
    (HERMES, HERMES_RAIN, expect("", RAIN)),
    (HERMES, f"{HERMES_RAIN}\n{HERMES_CLOCK}\n", expect("", RAIN, CLOCK)),
    (HERMES, f"Let me see.\n\n{HERMES_RAIN}", expect("Let me see.", RAIN)),
    (HERMES, f"a {HERMES_CLOCK} b {HERMES_CLOCK} c", expect("abc", CLOCK, CLOCK)),
    (HERMES, "\n\nHello \n", expect("\n\nHello \n")),
    (HERMES, "", expect("")),
    (HERMES, ' <tool_call>{"arguments": {"a": [1]}, "name": "f"}</tool_call>', expect("", ("f", '{"a": [1]}'))),
    (HERMES, '<tool_call>{"id": 1, "name": "f", "arguments": {}, "x": [{}]}</tool_call>', expect("", ("f", "{}"))),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', expect("", ("f", "{}"))),
    (HERMES, '<tool_call>{"n\\u0061me": "caf\\u00e9", "parameters": {}}</tool_call>', expect("", ("café", "{}"))),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
     expect("", ("f", '{"a": "</tool_call>"}'))),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "\\"}{<tool_call>"}}</tool_call>',
     expect("", ("f", '{"a": "\\"}{<tool_call>"}'))),
    (HERMES, '<tool_call>[{"name": "f", "arguments": {}},\n{"name": "g", "arguments": {}}]</tool_call> x',
     expect("x", ("f", "{}"), ("g", "{}"))),
    (HERMES, "<tool_call>\n<tool_call>" + HERMES_CLOCK, expect("<tool_call>\n<tool_call>", CLOCK)),
    (HERMES, "Use <tool_call> to call.", expect("Use <tool_call> to call.")),
    (HERMES, "1 < 2 <tool", expect("1 < 2 <tool")),
    (HERMES, "<tool_call>", expect("<tool_call>")),
    (HERMES, "<tool_call>[]</tool_call>", expect("<tool_call>[]</tool_call>")),
    (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
     expect('<tool_call>{"name": 5, "arguments": {}}</tool_call>')),
    (HERMES, '<tool_call>{"name": "", "arguments": {}}</tool_call>',
     expect('<tool_call>{"name": "", "arguments": {}}</tool_call>')),
    (HERMES, '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
     expect('<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>')),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
     expect('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>')),
    (HERMES, "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
     expect("<tool_call>{'name': 'f', 'arguments': {}}</tool_call>")),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": 5}</tool_call>',
     expect('<tool_call>{"arguments": {"a": 1}, "name": 5}</tool_call>')),
    (HERMES, '<tool_call>{"arguments": {"a": 1}}</tool_call>',
     expect('<tool_call>{"arguments": {"a": 1}}</tool_call>')),
    (HERMES, 'a <tool_call>\n{"name": "f", "argum', expect('a <tool_call>\n{"name": "f", "argum')),
    # Hermes: broken once it has started
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>\n' + HERMES_CLOCK,
     expect("", ("f", '{"a": 1}'), CLOCK)),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "b', expect("", ("f", '{"a": "b'))),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}}\n</tool', expect("", ("f", '{"a": 1}'))),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}\n', expect("", ("f", '{"a": 1}'))),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}, "x": ', expect(', "x": ', ("f", '{"a": 1}'))),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": [1}}\n</tool_call>\n' + HERMES_CLOCK,
     expect("}}\n</tool_call>", ("f", '{"a": [1'), CLOCK)),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}, "name": "g"} </tool_call>',
     expect(', "name": "g"} </tool_call>', ("f", "{}"))),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}} or so</tool_call> x',
     expect("or so</tool_call> x", ("f", "{}"))),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": True,}}</tool_call>', expect("", ("f", '{"a": True,}'))),
    # Llama
    (LLAMA, LLAMA_RAIN, expect("", RAIN)),
    (LLAMA, f"\n{LLAMA_RAIN}; {LLAMA_CLOCK}", expect("", RAIN, CLOCK)),
    (LLAMA, f"<|python_tag|>{LLAMA_RAIN};{LLAMA_CLOCK}\n{LLAMA_RAIN}", expect("", RAIN, CLOCK, RAIN)),
    (LLAMA, f"Wait.\n<|python_tag|>{LLAMA_RAIN} Done.", expect("Wait.Done.", RAIN)),
    (LLAMA, f"{LLAMA_RAIN}<|python_tag|>{LLAMA_CLOCK}", expect("", RAIN, CLOCK)),
    (LLAMA, f"{LLAMA_RAIN};", expect("", RAIN)),
    (LLAMA, f"{LLAMA_RAIN}; and more", expect("; and more", RAIN)),
    (LLAMA, '{"type": "function", "name": "clock", "parameters": {}}', expect("", CLOCK)),
    (LLAMA, '{"name": "clock", "arguments": {}}', expect("", CLOCK)),
    (LLAMA, '{"name": "Ann", "parameters": {}}', expect('{"name": "Ann", "parameters": {}}')),
    (LLAMA, '<|python_tag|>{"name": "Ann", "parameters": {}}', expect("", ("Ann", "{}"))),
    (LLAMA, f'{LLAMA_RAIN} {{"name": "Ann"}}', expect('{"name": "Ann"}', RAIN)),
    (LLAMA, '{"answer": [1, 2]}', expect('{"answer": [1, 2]}')),
    (LLAMA, f"Call {LLAMA_CLOCK}", expect(f"Call {LLAMA_CLOCK}")),
    (LLAMA, "<|python_tag|>print(1)", expect("<|python_tag|>print(1)")),
    (LLAMA, " \n", expect(" \n")),
    (LLAMA, f"\n<|python_tag|>{LLAMA_CLOCK}", expect("", CLOCK)),
    (LLAMA, "\n<|python_tag|>[", expect("\n<|python_tag|>[")),
    # Mistral
    (MISTRAL, MISTRAL_RAIN, expect("", RAIN)),
    (MISTRAL, f"{MISTRAL_RAIN}[TOOL_CALLS]clock[ARGS]{{}}", expect("", RAIN, CLOCK)),
    (MISTRAL, f"Let me see.{MISTRAL_RAIN}", expect("Let me see.", RAIN)),
    (MISTRAL, "[TOOL_CALLS]clock[CALL_ID]a1b2c3d4e[ARGS]{}", expect("", CLOCK)),
    (MISTRAL, "[TOOL_CALLS] clock{} x", expect("x", CLOCK)),
    (MISTRAL, '[TOOL_CALLS] [{"name": "clock", "arguments": {}}]', expect("", CLOCK)),
    (MISTRAL_LIST, '[TOOL_CALLS] [{"name": "clock", "arguments": {}, "id": "a1b2c3d4e"}, {"name": "f", "arguments": '
     '{"a": "]"}}] x', expect("x", CLOCK, ("f", '{"a": "]"}'))),
    (MISTRAL_LIST, '[TOOL_CALLS]{"name": "clock", "arguments": {}}', expect("", CLOCK)),
    (MISTRAL_LIST, '[TOOL_CALLS][{"name": "clock", "arguments": {}}, 5]', expect(", 5]", CLOCK)),
    (MISTRAL_LIST, '[TOOL_CALLS][{"name": "clock", "arguments": {}} 5]', expect("5]", CLOCK)),
    (MISTRAL_LIST, '[TOOL_CALLS][{"name": "clock", "arguments": {}}', expect("", CLOCK)),
    (MISTRAL_LIST, '[TOOL_CALLS][{"name": "f", "arguments": {}, {"name": "clock", "arguments": {}}]',
     expect("", ("f", "{}"), CLOCK)),
    (MISTRAL_LIST, "[TOOL_CALLS] nothing to call", expect("[TOOL_CALLS] nothing to call")),
    (MISTRAL, "[TOOL_CALLS]clock[ARGS]no", expect("[TOOL_CALLS]clock[ARGS]no")),
    (MISTRAL, "[TOOL_CALLS]clock[ARG", expect("[TOOL_CALLS]clock[ARG")),
    (MISTRAL, "[TOOL_CALLS][ARGS]{}", expect("[TOOL_CALLS][ARGS]{}")),
    (MISTRAL, "[TOOL_CALLS]clock[CALL_ID]x{}", expect("", CLOCK)),
    (MISTRAL, '[TOOL_CALLS]clock[ARGS]{"a": 1', expect("", ("clock", '{"a": 1'))),
    (MISTRAL, '[TOOL_CALLS]clock[ARGS]{"a": )}[TOOL_CALLS]clock[ARGS]{}', expect(")}", ("clock", '{"a": '), CLOCK)),
]  # fmt: skip
cases = pytest.mark.parametrize(("format", "text", "answer"), CASES, ids=[f"{f.name}-{t[:60]}" for f, t, _ in CASES])


@cases
def test_what_an_answer_holds(format: Format, text: str, answer: Answer) -> None:
    assert read(format, text) == answer


@cases
def test_every_cut_in_two_gives_the_same(format: Format, text: str, answer: Answer) -> None:
    whole = deltas_of(format, [text])
    for place in range(len(text) + 1):
        assert deltas_of(format, [text[:place], text[place:]]) == whole
    assert deltas_of(format, text) == whole


# ---- random answers


@each
@many
@given(text=broken_texts, at=places)
def test_no_cut_changes_any_text(format: Format, text: str, at: list[int]) -> None:
    assert deltas_of(format, cut(text, at)) == deltas_of(format, [text])


@each
@many
@given(text=broken_texts)
def test_a_text_without_calls_arrives_as_it_is(format: Format, text: str) -> None:
    found = read(format, text)
    if not found.calls:
        assert found.text == text


@each
@many
@given(text=broken_texts)
def test_deltas_are_in_order(format: Format, text: str) -> None:
    """Calls are numbered from 0, arguments follow their start, and nothing is empty."""
    started = 0
    for delta in deltas_of(format, text):
        match delta:
            case Text(said):
                assert said
            case ToolStart(index, id, name):
                assert (index, id) == (started, f"call_{started}")
                assert name
                started += 1
            case ToolArguments(index, fragment):
                assert index == started - 1
                assert fragment


@each
@many
@given(calls=some_calls, before=st.text(max_size=10), after=st.text(max_size=10), at=places)
def test_calls_come_back(format: Format, calls: list[tuple[str, Any]], before: str, after: str, at: list[int]) -> None:
    text = format.write(calls)
    if format is LLAMA:
        text, after = f"<|python_tag|>{text}" if before else text, after.lstrip("; \t\r\n{")
    found = collect(deltas_of(format, cut(before + text + after, at)))
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == calls
    assert found.text == before.rstrip(" \t\r\n") + after.lstrip(" \t\r\n")


@pytest.mark.parametrize("format", [HERMES, LLAMA, MISTRAL_LIST], ids=lambda format: format.name)
@many
@given(
    arguments=some_arguments,
    indent=st.sampled_from([None, 0, 2, "\t"]),
    plain=st.booleans(),
    order=st.permutations(["name", "arguments", "id"]),
    at=places,
)
def test_an_object_may_be_laid_out_in_any_way(
    format: Format, arguments: Any, indent: Any, plain: bool, order: list[str], at: list[int]
) -> None:
    fields = {"name": "clock", "arguments": arguments, "id": {"arguments": {"name": "x"}}}
    call = json.dumps({key: fields[key] for key in order}, indent=indent, ensure_ascii=plain)
    wrapped = {
        "hermes": f"<tool_call>{call}</tool_call>",
        "llama": call,
        "mistral_list": f"[TOOL_CALLS] [\n{call} ,{call}\n ]",
    }
    found = collect(deltas_of(format, cut(wrapped[format.name], at)))
    assert found.text == ""
    assert [json.loads(call.arguments) for call in found.calls] == [arguments] * (1 + (format is MISTRAL_LIST))


BROKEN = {
    "hermes": [
        "<tool_call>no</tool_call>", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": "f", "arguments": 5}',
        "<tool_call>{name: f}", "</tool_call>", "<tool_call>[5]", '<tool_call>{"arguments": {}, "x": "y"}</tool_call>',
    ],
    "mistral": ["[TOOL_CALLS]no[X]", "[TOOL_CALLS]f[ARGS][]", "[TOOL_CALLS]f[CALL_ID]5[X]", "[TOOL_CALLS]]"],
    "mistral_list": ["[TOOL_CALLS][]", "[TOOL_CALLS][5]", '[TOOL_CALLS][{"name": 5}]', "[TOOL_CALLS]!", "]"],
}  # fmt: skip


@pytest.mark.parametrize("format", MARKED, ids=lambda format: format.name)
@many
@given(data=st.data())
def test_what_is_malformed_is_kept_as_text(format: Format, data: st.DataObject) -> None:
    """Malformed calls between good ones: all of them arrive, in order, and no good one is lost."""
    parts = data.draw(st.lists(st.booleans(), max_size=6))
    text, expected, good = "", "", 0
    for is_good in parts:
        if is_good:
            text += format.write([("clock", {})])
            good += 1
        else:
            broken = data.draw(st.sampled_from(BROKEN[format.name]))
            text, expected = f"{text} {broken} ", expected + broken
    found = collect(deltas_of(format, cut(text, data.draw(places))))
    assert bare(found.text) == bare(expected)
    assert found.calls == expect("", *[CLOCK] * good).calls


# ---- streaming


@pytest.mark.parametrize(
    ("format", "before", "arguments", "after"),
    [
        (HERMES, '<tool_call>\n{"name": "f", "arguments": ', '{"a": "b\\"}", "c": [1, {}]}', "}\n</tool_call>"),
        (LLAMA, '{"name": "clock", "parameters": ', '{"a": "b\\"}", "c": [1, {}]}', "}"),
        (MISTRAL, "[TOOL_CALLS]f[ARGS]", '{"a": "b\\"}", "c": [1, {}]}', ""),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_arguments_stream_as_they_come(format: Format, before: str, arguments: str, after: str) -> None:
    parser = format.parser(counted_ids(), names=NAMES)
    assert [delta for char in before for delta in parser.feed(char)] == []
    first, *rest = arguments
    start = parser.feed(first)
    assert [type(delta) for delta in start] == [ToolStart, ToolArguments]
    for char in rest:
        assert parser.feed(char) == [ToolArguments(0, char)]
    assert [delta for char in after for delta in parser.feed(char)] == parser.finish() == []


@each
def test_text_streams_as_it_comes(format: Format) -> None:
    """Only blanks and what may begin a marker are kept back."""
    parser = format.parser()
    found: list[Delta] = []
    for piece in ("Hi", " you", "\n", "[TOOL_", "x <tool", "y <|py", "z"):
        found += parser.feed(piece)
    assert "".join(delta.text for delta in found if isinstance(delta, Text)) == "Hi you\n[TOOL_x <tooly <|pyz"
    assert parser.feed(" ") == []
    assert parser.finish() == [Text(" ")]


def test_a_call_whose_name_comes_last_waits_for_it() -> None:
    parser = HERMES.parser(counted_ids())
    assert parser.feed('<tool_call>{"arguments": {"a": 1}, ') == []
    assert parser.feed('"name": "f"') == [ToolStart(0, "call_0", "f"), ToolArguments(0, '{"a": 1}')]


@each
def test_one_call_where_calls_are_not_parallel(format: Format) -> None:
    text = format.write([("clock", {}), ("get_weather", {"city": "x"})]) + " Done."
    parser = format.parser(counted_ids(), names=NAMES, parallel=False)
    found = []
    for char in text:
        assert not (parser.finished and found == [])
        found += parser.feed(char)
    assert parser.finished
    assert collect([*found, *parser.finish()]) == expect("", CLOCK)
    assert not read(format, text).text.startswith("[")


@pytest.mark.parametrize("format", MARKED, ids=lambda format: format.name)
def test_a_broken_call_is_the_only_one_too_where_calls_are_not_parallel(format: Format) -> None:
    text = format.write([("clock", {"a": 1})]).replace("1", ")", 1) + " x " + format.write([("clock", {})])
    found = read(format, text, parallel=False)
    assert found.calls == expect("", ("clock", '{"a": ')).calls
    assert bare(found.text) == bare(text[text.index(")") :])


def test_random_ids_are_openais() -> None:
    found = collect(HERMES.parser().feed(HERMES_CLOCK * 2))
    assert len({call.id for call in found.calls}) == 2
    assert all(call.id.startswith("call_") and len(call.id) == 29 for call in found.calls)
    assert int(found.calls[0].id.removeprefix("call_"), 16) >= 0


@each
def test_long_answers_arrive_whole(format: Format) -> None:
    """Hundreds of calls arrive whole, as one piece and in tens of thousands."""
    call = ("clock", {"a": "{" * 500})
    text = format.write([call] * 500)
    assert len(read(format, text).calls) == 500
    assert len(collect(deltas_of(format, cut(text, range(0, len(text), 7)))).calls) == 500
