"""Answers with calls, for tests: how parsers are fed, and what random calls and texts look like."""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from exitlm.serve.tools.deltas import Answer, Call, Delta, collect, merge
from exitlm.serve.tools.formats import DESCRIBED, FORMATS, HERMES, LLAMA, MISTRAL, MISTRAL_LIST, Format
from exitlm.serve.tools.offer import Tool

WEATHER = Tool(
    "get_weather",
    "The weather of a city.",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city"],
    },
)
CLOCK = Tool("clock", "The time of day.")
SEARCH = Tool("search-2", "", {"type": "object"})
TOOLS = (WEATHER, CLOCK, SEARCH)
NAMES = tuple(tool.name for tool in TOOLS)

MARKED: tuple[Format, ...] = (HERMES, MISTRAL, MISTRAL_LIST)
WRITTEN: tuple[Format, ...] = (HERMES, LLAMA, MISTRAL, MISTRAL_LIST)
assert {*WRITTEN, DESCRIBED} == set(FORMATS)

many = settings(deadline=None, derandomize=True, database=None, max_examples=50)


def counted_ids() -> Callable[[], str]:
    """Ids that a test can expect: call_0, call_1, ..."""
    counter = itertools.count()
    return lambda: f"call_{next(counter)}"


def deltas_of(
    format: Format, pieces: Iterable[str], *, names: Collection[str] = NAMES, parallel: bool = True
) -> list[Delta]:
    """What a parser gives for ``pieces``, with neighbours joined."""
    parser = format.parser(counted_ids(), names=names, parallel=parallel)
    found = [delta for piece in pieces for delta in parser.feed(piece)]
    return merge([*found, *parser.finish()])


def read(format: Format, text: str, *, names: Collection[str] = NAMES, parallel: bool = True) -> Answer:
    """The answer of a text that comes at once."""
    return collect(deltas_of(format, [text], names=names, parallel=parallel))


def expect(text: str = "", *calls: tuple[str, str]) -> Answer:
    """An answer of ``text`` and ``calls``, each a name and its arguments."""
    return Answer(text, tuple(Call(f"call_{n}", *call) for n, call in enumerate(calls)))


def cut(text: str, places: Sequence[int]) -> list[str]:
    """``text`` in pieces that end at ``places``, of which some may be empty."""
    ends = sorted({place % (len(text) + 1) for place in places})
    return [text[begin:end] for begin, end in itertools.pairwise([0, *ends, len(text)])]


def bare(text: str) -> str:
    """``text`` without blanks."""
    return "".join(text.split())


# ---- random ones

MARKERS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
PIECES = (
    *MARKERS, *'{}[]":,;\\ \nn1<', '"name"', '"arguments"', '"parameters"', '"clock"', "{}", '{"a": 1}', "clock",
    '{"name": "clock", "arguments": {}}', '{"name": "clock", "parameters": {', "\\u00e9", "é", "😀", "null", "<tool_",
    "[TOOL_", "<|py",
)  # fmt: skip
tricky_words = st.one_of(
    st.text(max_size=8),
    st.sampled_from([*MARKERS, '"}', "{{", "]}", '\\"', "\\u0041", "</tool", "\n\n", "}\n</tool_call>"]),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False) | tricky_words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(tricky_words, inner, max_size=3),
    max_leaves=6,
)
some_arguments = st.dictionaries(tricky_words, values, max_size=3)
some_calls = st.lists(st.tuples(st.sampled_from(NAMES), some_arguments), min_size=1, max_size=3)
broken_texts = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
places = st.lists(st.integers(0, 400), max_size=12)
