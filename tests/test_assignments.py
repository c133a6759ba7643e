"""KEY=VALUE words: every value that JSON or Python prints comes back, and what is no value is text."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitlm.assignments import assignments, numbered, value_of
from exitlm.errors import UserError

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text()
trees = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text("ab"), inner), max_leaves=8)


@given(trees)
def test_json_comes_back(value: Any) -> None:
    assert value_of(json.dumps(value)) == value


@given(st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none())
def test_what_python_prints_comes_back(value: Any) -> None:
    assert value_of(repr(value)) == value


@given(st.lists(st.integers(), min_size=2) | st.lists(st.floats(-1e9, 1e9), min_size=2))
def test_numbers_with_commas_are_a_list(values: list[Any]) -> None:
    assert value_of(",".join(map(str, values))) == value_of(" , ".join(map(str, values))) == values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (".05", 0.05), ("5.", 5.0), ("-.5e-1", -0.05), ("1_000", 1000), ("8", 8), ("08", 8.0), ("8,.5", [8, 0.5]),
        ('["\\n\\n"]', ["\n\n"]), ("['a', 'b']", ["a", "b"]), ('"40"', "40"), ("'40'", "40"), ("true", True),
        ('{"8": 0.9, "15": 0.5}', {8: 0.9, 15: 0.5}), ("{8 = 0.9}", {8: 0.9}), ('{"8": 1, "x": 2}', {"8": 1, "x": 2}),
        ("{}", {}), ("lossless", "lossless"), ("Hello, world", "Hello, world"), ("a=b", "a=b"), ("", ""),
        ("2020-01-01", "2020-01-01"), ("1\nb = 2", "1\nb = 2"), ("[1", "[1"), ("1,", "1,"), ("9" * 5000, "9" * 5000),
        ("[" * 5000, "[" * 5000), ("٣", "٣"),
    ],
)  # fmt: skip
def test_what_a_text_stands_for(text: str, value: Any) -> None:
    found = value_of(text)
    assert found == value
    assert type(found) is type(value)


def test_a_number_that_is_none() -> None:
    assert math.isnan(value_of("nan"))


def test_only_a_mapping_of_whole_numbers_gets_them() -> None:
    for value in (["8"], "8", {"8": 1, "-1": 2}, {"8.5": 1}, {}, None, {"": 1}):
        assert numbered(value) == value
    assert numbered({"8": {"8": 1}}) == {8: {"8": 1}}  # a JSON schema keeps its names


def test_words_are_settings_and_sections() -> None:
    words = ["top_k=40", "top_k = 41", "stop=a=b", "engine.max_rows=8", "engine.kv.bytes=2", "other.x=1"]
    plain, parts = assignments(words, ["engine"])
    assert plain == {"top_k": 41, "stop": "a=b", "other.x": 1}
    assert parts == {"engine": {"max_rows": 8, "kv.bytes": 2}}
    assert assignments(words[3:4]) == ({"engine.max_rows": 8}, {})


@pytest.mark.parametrize("word", ["top_k", "=40", " =1", ""])
def test_a_word_without_key_or_value(word: str) -> None:
    with pytest.raises(UserError, match="write KEY=VALUE, such as top_k=40"):
        assignments([word])
