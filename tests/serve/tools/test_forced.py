"""Forced calls: the grammar of a format accepts what its parser reads as calls of the tools, and nothing else."""

import functools
import json
import random
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitlm.decode.sampling.grammar import GrammarCompiler, ResponseFormat
from exitlm.errors import UserError
from exitlm.serve.tools.deltas import collect
from exitlm.serve.tools.formats import HERMES, LLAMA, MISTRAL, MISTRAL_LIST, Format, detect
from exitlm.serve.tools.layout import MAX_CALLS
from exitlm.serve.tools.offer import Tool, read_offer
from tests.decode.test_grammar import END, byte_level, fits, make_compiler, random_schema, write
from tests.serve.tools.answers import SEARCH, TOOLS, WRITTEN, cut, deltas_of, many, read, some_arguments
from tests.serve.tools.scripts import pieces
from tests.serve.tools.templates import FAMILIES, LETTERS, tokenizer_of

xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed: pip install 'exitlm[grammar]'")

each = pytest.mark.parametrize("format", WRITTEN, ids=lambda format: format.name)
LEVEL = {
    "type": "object",
    "properties": {
        "on": {"type": "boolean"}, "level": {"type": "integer", "minimum": 1, "maximum": 30},
        "mode": {"enum": ["low", "}", "naïve"]}, "note": {"type": "string", "maxLength": 4},
    },
    "required": ["on", "mode"],
}  # fmt: skip
EMPTY: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
SWITCHES = (Tool("set", "", LEVEL), Tool("reset", "", EMPTY))
SCHEMAS = {"set": LEVEL, "reset": EMPTY}


@functools.cache
def compiler() -> GrammarCompiler:
    """A compiler whose tokens don't matter: texts are matched as such."""
    return make_compiler()


def accepts(wanted: ResponseFormat, text: str) -> bool:
    """Whether ``text`` is a whole text of the grammar."""
    matcher = xgrammar.GrammarMatcher(compiler().compile(wanted), terminate_without_stop_token=True)
    return bool(matcher.accept_string(text) and matcher.is_completed())


level_arguments = st.fixed_dictionaries(
    {"on": st.booleans(), "mode": st.sampled_from(["low", "}", "naïve"])},
    optional={"level": st.integers(1, 30), "note": st.text("ab]}{:é😀 ", max_size=4)},
).map(lambda found: {key: found[key] for key in LEVEL["properties"] if key in found})
switch_calls = st.lists(
    st.tuples(st.just("set"), level_arguments) | st.tuples(st.just("reset"), st.just({})), min_size=1, max_size=3
)


@each
@many
@given(calls=switch_calls)
def test_calls_of_the_tools_are_accepted(format: Format, calls: list[tuple[str, Any]]) -> None:
    text = format.write(calls)
    assert accepts(format.grammar(SWITCHES), text)
    assert accepts(format.grammar(SWITCHES, None, False), text) == (len(calls) == 1)
    for name in SCHEMAS:
        of_one = all(called == name for called, _ in calls)
        assert accepts(format.grammar(SWITCHES, name), text) == of_one
        assert accepts(format.grammar(SWITCHES, name, False), text) == (of_one and len(calls) == 1)


def is_forced(format: Format, text: str) -> bool:
    """The same by the parser: nothing but calls of the tools, with arguments of their schemas, in this layout."""
    found = read(format, text, names=SCHEMAS)
    try:
        calls = [(call.name, json.loads(call.arguments)) for call in found.calls]
    except ValueError:
        return False
    return (
        not found.text
        and all(name in SCHEMAS and fits(arguments, SCHEMAS[name]) for name, arguments in calls)
        and 0 < len(calls) <= MAX_CALLS
        and format.write(calls) == text
    )


@each
@many
@given(calls=switch_calls, data=st.data())
def test_what_the_parser_does_not_read_is_not_accepted(
    format: Format, calls: list[tuple[str, Any]], data: st.DataObject
) -> None:
    """A text of calls with a few characters changed is accepted if, and only if, the parser reads calls in it."""
    text = format.write(calls)
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(text)))
        keep = at + data.draw(st.integers(0, 2))
        put = data.draw(
            st.sampled_from(["", "", " ", *'{}[]",:;a1<', "set", "reset", "true", "\n", "[ARGS]", '"level": 7, '])
        )
        text = text[:at] + put + text[keep:]
    assert accepts(format.grammar(SWITCHES), text) == is_forced(format, text)


@each
@pytest.mark.parametrize("count", [0, 1, MAX_CALLS, MAX_CALLS + 1])
def test_how_many_calls(format: Format, count: int) -> None:
    text = format.write([("reset", {})] * count)
    assert accepts(format.grammar(SWITCHES), text) == is_forced(format, text) == (0 < count <= MAX_CALLS)


@each
@many
@given(arguments=some_arguments)
def test_arguments_of_a_tool_that_says_nothing_of_them(format: Format, arguments: dict[str, Any]) -> None:
    assert accepts(format.grammar([SEARCH]), format.write([("search-2", arguments)]))
    assert accepts(format.grammar(TOOLS), format.write([("clock", arguments)])) == (arguments == {})


@each
@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_model_that_writes_at_random_calls_its_tools(format: Format, count: int) -> None:
    """Tokens and masks as in the engine; what is written is read, whole and cut anywhere."""
    compiler = make_compiler()
    for seed in range(count):
        rng = random.Random(seed)
        schemas = {f"tool_{n}": object_of(rng) for n in range(rng.randint(1, 3))}
        tools = [Tool(name, "", schema) for name, schema in schemas.items()]
        text = write(compiler.state(format.grammar(tools, None, seed % 2 == 0)), compiler, rng, limit=3000)
        parser = format.parser(names=schemas)
        pieces = cut(text, [rng.randrange(10_000) for _ in range(20)])
        found = collect([delta for piece in pieces for delta in parser.feed(piece)] + parser.finish())
        assert found.text == ""
        assert len(found.calls) == 1 or (len(found.calls) <= MAX_CALLS and seed % 2 == 0)
        for call in found.calls:
            assert fits(json.loads(call.arguments), schemas[call.name])


def object_of(rng: random.Random) -> dict[str, Any]:
    """A random schema of an object."""
    while (schema := random_schema(rng)).get("type") != "object":
        pass
    return schema


def test_schemas_with_references_of_their_own() -> None:
    """Two tools may define the same name otherwise."""
    tools = read_offer([
        {"type": "function", "function": {"name": name, "parameters": {
            "type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "required": ["x"],
            "$defs": {"X": {"type": kind}},
        }}}
        for name, kind in (("f", "integer"), ("g", "boolean"))
    ]).tools  # fmt: skip
    wanted = HERMES.grammar(tools)
    for name, value, right in (("f", 1, True), ("f", True, False), ("g", True, True), ("g", 1, False)):
        assert accepts(wanted, HERMES.write([(name, {"x": value})])) == right


def test_a_schema_that_no_grammar_can_be_made_of_is_the_users_mistake() -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"x": {"type": "string", "pattern": "(("}}})
    with pytest.raises(UserError, match="the parameters of the tools can't be used: "):
        compiler().compile(MISTRAL.grammar([tool]))


def test_keywords_that_are_not_enforced_are_named() -> None:
    tool = Tool("f", "", {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}})
    with pytest.warns(UserWarning, match="doesn't enforce uniqueItems"):
        compiler().compile(LLAMA.grammar([tool]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiler().compile(MISTRAL_LIST.grammar(TOOLS))


@pytest.mark.parametrize("template", FAMILIES, ids=FAMILIES.values())
@pytest.mark.parametrize("spelled_out", [False, True])
def test_markers_may_be_tokens_or_letters(template: str, spelled_out: bool) -> None:
    """Where markers are special tokens, the model may write those; the parser gets the same text."""
    tokenizer, format = tokenizer_of(template), detect(template)
    end = tokenizer.eos_token_id
    calls: list[tuple[str, Any]] = [("set", {"on": True, "mode": "naïve"}), ("reset", {})]
    text = format.write(calls)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if spelled_out:
        ids = tokenizer.convert_tokens_to_ids([LETTERS[byte] for byte in text.encode()])
    state = GrammarCompiler(tokenizer, len(tokenizer), [end]).state(format.grammar(SWITCHES))
    for token in ids:
        state.advance(token)
    assert state.complete
    found = collect(deltas_of(format, pieces(format, tokenizer, [*ids, end]), names=SCHEMAS))
    assert found.text == ""
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == calls


def test_end_and_tokens_of_the_compiler() -> None:
    """The end comes when calls are complete, and text of the tokenizer forces the marker."""
    state = make_compiler().state(HERMES.grammar(SWITCHES, "reset", False))
    ids = byte_level()(HERMES.write([("reset", {})]), add_special_tokens=False)["input_ids"]
    for token in ids:
        assert not state.allowed(END)
        state.advance(token)
    assert state.finished
