"""Where a JSON value ends: at its last character, however it is cut, and broken where no JSON goes on."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitlm.serve.tools.json_value import JsonValue, Status
from tests.serve.tools.answers import many, values


def scan(text: str, step: int | None = None) -> tuple[int, Status]:
    """How much of ``text`` belongs to the value, and how it ends; ``step`` characters at a time."""
    value, read = JsonValue(), 0
    for begin in range(0, len(text), step or max(1, len(text))):
        piece = text[begin : begin + step] if step else text
        used = value.feed(piece, 0)
        read += used
        if used < len(piece):
            break
    return read, value.status


@many
@given(values, st.sampled_from([None, 1, "\t"]), st.booleans(), st.sampled_from([", ", "}", "]", "</", ";{}"]))
def test_a_value_ends_where_json_ends(value: Any, indent: Any, plain: bool, behind: str) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=plain)
    for step in (None, 1, 3):
        assert scan(text + behind, step) == (len(text), Status.DONE)


@many
@given(values)
def test_a_value_is_open_until_its_last_character(value: Any) -> None:
    text = json.dumps(value)
    closed = text[-1] in '"]}'
    for end in range(1, len(text)):
        assert scan(text[:end])[1] is Status.OPEN
    assert scan(text)[1] is (Status.DONE if closed else Status.OPEN)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("<", 0),
        ("}", 0),
        ("'a'", 0),
        ("{a: 1}", 1),
        ("{'a': 1}", 1),
        ('{"a" 1}', 5),
        ('{"a"}', 4),
        ('{"a": [1}}', 8),
        ('{"a": (1)}', 6),
        ('{"a": 1 "b": 2}', 8),
        ('{"a": {"b": "c"]', 15),
        ("[1}", 2),
        ('{"a": "x"\n</tool_call>', 10),
    ],
)
def test_what_json_cannot_hold_breaks_it(text: str, read: int) -> None:
    for step in (None, 1, 3):
        assert scan(text, step) == (read, Status.BROKEN)


@pytest.mark.parametrize("text", ['{"a": True}', '{"a": 1,}', "[1,]", '{"a": "b\nc"}', '{"a": "\\x"}', "[NaN, 01, -]"])
def test_ends_are_found_where_the_inside_is_no_json(text: str) -> None:
    for step in (None, 1, 3):
        assert scan(text + "}", step) == (len(text), Status.DONE)
