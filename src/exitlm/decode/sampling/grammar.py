"""Structured output: a grammar says which tokens may come next, whatever the logits.

xgrammar (extra ``grammar``; arXiv 2411.15100) compiles a grammar for a tokenizer and matches tokens against it. This
file reads a request's ``response_format``, keeps compiled grammars, and holds the state of one sequence, which walks
along drafts and is rolled back with them. It neither samples nor decides when a sequence ends. xgrammar is imported
when the first grammar is compiled.

A mask is packed: bit ``v % 32`` of word ``v // 32`` (int32) says whether token v is allowed. Shapes: M rows of a pass,
V vocab_size, W = ceil(V / 32) words, C candidate ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from exitlm.decode.sampling.schemas import (
    MAX_WHITESPACE,
    check_references,
    plain_schema,
    schemas_of,
    tag_source,
    warn_of_unenforced,
)
from exitlm.errors import UserError, nearest, short
from exitlm.values import elements, flag, wholes, wrong

if TYPE_CHECKING:
    import xgrammar

CACHE_BYTES = 64 * 2**20  # of compiled grammars, as xgrammar counts them; a large schema takes a few MiB
CONTEXT = 4  # tokens before a forced text that are encoded with it
# xgrammar 0.2 lets surrogates through as if they were characters; UTF-8 has none.
FIRST_OF_SURROGATE, SECOND_OF_SURROGATE = b"\xed", re.compile(rb"[\xa0-\xbf]")
NO_TEXT = re.compile(rb"\xed[\xa0-\xbf]")
# No JSON text needs these bytes raw. xgrammar 0.2 lets them into strings of bounded length, where JSON forbids them.
NO_JSON = re.compile(rb"\xed[\xa0-\xbf]|[\x00-\x09\x0b\x0c\x0e-\x1f]")
PROBE = '{"a b": [1, -2.5]}'

# The keys of each format beside "type". The first one is required; a name and a description don't change the text.
FORMATS: dict[str, tuple[str, ...]] = {
    "text": (),
    "json_object": ("any_whitespace",),
    "json_schema": ("json_schema", "any_whitespace"),
    "regex": ("regex",),
    "choice": ("choice",),
    "grammar": ("grammar",),
}
# A structural tag of xgrammar: fixed texts with JSON between them. Programs make it (forced calls), no request does.
TAGGED = "structural_tag"
SCHEMA_KEYS = ("schema", "strict", "name", "description")
JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
# A mapping without a "type" is a JSON schema if it has one of these.
SCHEMA_MARKS = ("$schema", "$ref", "$defs", "properties", "items", "anyOf", "oneOf", "allOf", "enum", "const")


@dataclass(frozen=True, kw_only=True)
class ResponseFormat:
    """What a text must look like. ``kind`` is one of :data:`FORMATS`, but not ``text``, or :data:`TAGGED`.

    ``source``: the JSON schema as JSON text, the regular expression, the EBNF, or the structural tag as JSON text.
    ``choices``: the texts to choose from. ``strict``: objects have no properties beyond those that the schema lists.
    ``any_whitespace``: up to ``MAX_WHITESPACE`` blanks and line breaks wherever JSON allows them; without it the text
    is laid out like ``json.dumps`` does, so that far more of it is forced. ``special``: special tokens that may stand
    for their names in the text; whoever reads it has to put the names there, for decoding skips them.
    """

    kind: str
    source: str = ""
    choices: tuple[str, ...] = ()
    strict: bool = True
    any_whitespace: bool = True
    special: tuple[str, ...] = ()


def read_response_format(value: Any) -> ResponseFormat | None:
    """A request's ``response_format``; None is free text.

    ``value``: a mapping of OpenAI's shape, ``{"type": "json_schema", "json_schema": {"schema": {...}}}`` or
    ``{"type": "json_object"}``; ``{"type": "regex", "regex": "..."}``, ``{"type": "choice", "choice": ["a", "b"]}``,
    ``{"type": "grammar", "grammar": EBNF with a rule root}``; ``{"type": "text"}`` or None; a JSON schema itself, a
    pydantic model class, or what this function returned. A key that is not read is refused. This checks the shape;
    :meth:`GrammarCompiler.compile` checks what is inside.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    schema_of = getattr(value, "model_json_schema", None)
    if isinstance(value, type) and callable(schema_of):
        return _json_schema(schema_of(), strict=True, any_whitespace=True)
    if not isinstance(value, Mapping):
        raise wrong("response_format", value, 'a mapping such as {"type": "json_object"}, or a JSON schema')
    kind = value.get("type")
    if _is_schema(value):
        return _json_schema(value, strict=True, any_whitespace=True)
    if not isinstance(kind, str) or kind not in FORMATS:
        near = nearest(kind, FORMATS) if isinstance(kind, str) else ""
        raise UserError(f"response_format has type {short(kind)}; use one of {', '.join(FORMATS)}{near}")
    _check_keys(value, ("type", *FORMATS[kind]), "response_format")
    if kind == "text":
        return None
    any_whitespace = flag(value.get("any_whitespace", True), "response_format.any_whitespace")
    if kind == "json_object":
        return _json_schema({"type": "object"}, strict=False, any_whitespace=any_whitespace)
    if kind not in value:
        raise UserError(f"response_format of type '{kind}' lacks its '{kind}'")
    content, name = value[kind], f"response_format.{kind}"
    if kind == "json_schema":
        if not isinstance(content, Mapping):
            raise wrong(name, content, 'a mapping such as {"schema": {...}}')
        _check_keys(content, SCHEMA_KEYS, name)
        if "schema" not in content:
            raise UserError(f"{name} lacks its 'schema'")
        strict = content.get("strict")
        strict = True if strict is None else flag(strict, f"{name}.strict")
        return _json_schema(content["schema"], strict=strict, any_whitespace=any_whitespace)
    if kind == "choice":
        choices = elements(content, name, "a list of texts")
        if not choices:
            raise UserError(f"{name} is empty; give at least one text")
        return ResponseFormat(kind=kind, choices=tuple(dict.fromkeys(_text(choice, name) for choice in choices)))
    return ResponseFormat(kind=kind, source=_text(content, name))


def _is_schema(value: Mapping[str, Any]) -> bool:
    """Whether a mapping is a JSON schema and not a response format."""
    kind = value.get("type")
    if kind is None:
        return any(mark in value for mark in SCHEMA_MARKS)
    return isinstance(kind, list) or kind in JSON_TYPES


def _json_schema(schema: Any, *, strict: bool, any_whitespace: bool) -> ResponseFormat:
    name = "response_format.json_schema.schema"
    if not isinstance(schema, Mapping):
        raise wrong(name, schema, "a JSON schema (a mapping)")
    try:
        source = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{name} can't be written as JSON: {error}") from error
    return ResponseFormat(kind="json_schema", source=source, strict=strict, any_whitespace=any_whitespace)


def _check_keys(value: Mapping[str, Any], known: Sequence[str], name: str) -> None:
    for key in value:
        if key not in known:
            near = nearest(str(key), known)
            raise UserError(f"{name} has an unknown key {short(key)}; known are {', '.join(known)}{near}")


def _text(value: Any, name: str) -> str:
    """A text that is not empty and that UTF-8 can hold."""
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise wrong(name, value, "a text without lone surrogates") from None
    if not value:
        raise UserError(f"{name} has an empty text; give one with at least one character")
    return value


# ---- compiling


class Alphabet:
    """The tokens that a grammar may use for text: those that spell something and hold nothing ``forbidden``."""

    def __init__(self, words: Sequence[bytes], forbidden: re.Pattern[bytes]) -> None:
        """``words``: the bytes of each of V tokens."""
        usable = [token for token, word in enumerate(words) if word and not forbidden.search(word)]
        second = [token for token in usable if SECOND_OF_SURROGATE.match(words[token])]
        self._usable, self._after_first = frozenset(usable), frozenset(usable).difference(second)
        self._usable_W, self._after_first_W = (
            pack_ids(sorted(tokens), len(words)) for tokens in (self._usable, self._after_first)
        )

    def holds(self, token: int, before: bytes) -> bool:
        """Whether ``token`` may follow a token of the bytes ``before``."""
        return token in (self._after_first if before.endswith(FIRST_OF_SURROGATE) else self._usable)

    def packed(self, before: bytes) -> Tensor:
        """The packed mask ``[W]`` of the tokens that :meth:`holds` is true for."""
        return self._after_first_W if before.endswith(FIRST_OF_SURROGATE) else self._usable_W


class Spelling:
    """What each of V tokens spells, and the part of xgrammar that compiles grammars for that."""

    def __init__(self, words: list[bytes]) -> None:
        """``words``: the bytes of each token, none where it spells nothing."""
        import xgrammar

        self.words = words
        self.texts, self.json_texts = (Alphabet(words, forbidden) for forbidden in (NO_TEXT, NO_JSON))
        # The state handles stop tokens itself, so that a stop id that is text too can stay text.
        info = xgrammar.TokenizerInfo(words, xgrammar.VocabType.RAW, vocab_size=len(words), stop_token_ids=[])
        self.compiler = xgrammar.GrammarCompiler(
            info, max_threads=torch.get_num_threads(), cache_limit_bytes=CACHE_BYTES
        )


class GrammarCompiler:
    """Compiles response formats for one tokenizer and keeps the results, least recently used out first.

    It may be used from several threads. ``stop_token_ids``: the ids that end a text; they are allowed once the grammar
    is complete.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
        """``tokenizer``: a fast one of transformers; ``vocab_size``: V of the model, which may exceed the tokenizer's.

        A ``UserError`` if xgrammar is missing, or if the tokens' bytes can't be read from the tokenizer.
        """
        if find_spec("xgrammar") is None:
            raise UserError("response_format needs xgrammar; install it with: pip install 'exitlm[grammar]'")
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.stop_token_ids = frozenset(stop_token_ids)
        self.token_bytes = token_bytes(tokenizer, vocab_size)
        self._spellings: dict[tuple[int, ...], Spelling] = {(): Spelling(self.token_bytes)}

    def _spelling(self, special: Collection[str]) -> Spelling:
        """The tokens, of which the ``special`` ones spell their names."""
        if not special:
            return self._spellings[()]
        added = self.tokenizer.added_tokens_decoder.items()
        ids = tuple(
            index for index, token in added if token.special and index < self.vocab_size and str(token) in special
        )
        if ids not in self._spellings:
            words = list(self.token_bytes)
            for index in ids:
                words[index] = str(self.tokenizer.added_tokens_decoder[index]).encode()
            self._spellings[ids] = Spelling(words)
        return self._spellings[ids]

    def compile(self, wanted: ResponseFormat) -> xgrammar.CompiledGrammar:
        """The compiled grammar; a ``UserError`` with xgrammar's reason where it refuses one."""
        compiler = self._spelling(wanted.special).compiler
        try:
            match wanted.kind:
                case "json_schema":
                    schema = json.loads(wanted.source)
                    check_references(schema)
                    warn_of_unenforced(schema)
                    return compiler.compile_json_schema(
                        json.dumps(plain_schema(schema, closed=wanted.strict)),
                        any_whitespace=wanted.any_whitespace,
                        max_whitespace_cnt=MAX_WHITESPACE if wanted.any_whitespace else None,
                        strict_mode=False,
                    )
                case "structural_tag":
                    for schema in schemas_of(json.loads(wanted.source)):
                        check_references(schema)
                        warn_of_unenforced(schema)
                    source = tag_source(wanted.source, closed=wanted.strict, any_whitespace=wanted.any_whitespace)
                    return compiler.compile_structural_tag(source)
                case "regex":
                    return compiler.compile_regex(wanted.source)
                case "choice":
                    return compiler.compile_grammar(choice_ebnf(wanted.choices))
                case _:
                    return compiler.compile_grammar(wanted.source)
        except (RuntimeError, ValueError, TypeError) as error:  # RecursionError is a RuntimeError
            what = (
                "the parameters of the tools" if wanted.kind == TAGGED else f"response_format of type '{wanted.kind}'"
            )
            raise UserError(f"{what} can't be used: {_reason(error)}") from error

    def state(self, wanted: ResponseFormat, stop_token_ids: Sequence[int] = ()) -> GrammarState:
        """The state of a new sequence, whose own ``stop_token_ids`` end it as well once the grammar is complete."""
        stops = self.stop_token_ids | frozenset(wholes(stop_token_ids, "stop_token_ids"))
        stops = frozenset(token for token in stops if 0 <= token < self.vocab_size)
        if not stops:
            raise UserError("response_format needs a token that ends the text, but there is none; give stop_token_ids")
        import xgrammar

        spelling = self._spelling(wanted.special)
        alphabet = spelling.json_texts if wanted.kind in ("json_schema", TAGGED) else spelling.texts
        matcher = xgrammar.GrammarMatcher(self.compile(wanted))
        return GrammarState(matcher, self.tokenizer, spelling.words, alphabet, stops)


def _reason(error: Exception) -> str:
    """xgrammar's message without time, place in its source, and line breaks."""
    text = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error).strip())
    text = text.removeprefix("Check failed: (error.empty()) is false: ")
    return " ".join(text.split())[:300].rstrip(".")


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """The bytes that each of V tokens adds to a text; none for special tokens and for ids without a token.

    Special tokens are not part of a text (decoding skips them), so no grammar may be matched by their names.
    """
    import xgrammar

    try:
        # The stop token only keeps xgrammar from looking for one.
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, stop_token_ids=[0])
        found = list(info.decoded_vocab)[:vocab_size]
        found += [b""] * (vocab_size - len(found))
        for index, token in tokenizer.added_tokens_decoder.items():
            if token.special and index < vocab_size:
                found[index] = b""
        probe = b"".join(found[index] for index in tokenizer.encode(PROBE, add_special_tokens=False))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"response_format can't be used with this tokenizer: {_reason(error)}") from error
    if probe.lstrip(b" ") != PROBE.encode():
        raise UserError("response_format can't be used with this tokenizer: its tokens don't spell what they encode")
    return found


def choice_ebnf(choices: Sequence[str]) -> str:
    """A grammar of fixed texts, with everything but letters and digits of ASCII escaped."""
    escaped = ("".join(c if c.isascii() and c.isalnum() else f"\\U{ord(c):08X}" for c in choice) for choice in choices)
    return "root ::= " + " | ".join(f'"{choice}"' for choice in escaped)


# ---- matching


class GrammarState:
    """Where one sequence stands in its grammar. Drafts are walked with :meth:`advance` and taken back with
    :meth:`rollback`. Not thread-safe: it belongs to its sequence."""

    def __init__(
        self,
        matcher: xgrammar.GrammarMatcher,
        tokenizer: Any,
        words: list[bytes],
        alphabet: Alphabet,
        stops: frozenset[int],
    ) -> None:
        """Made by :meth:`GrammarCompiler.state`. ``words``: the bytes of each of V tokens; ``stops``: the ids that end
        the sequence, all below V."""
        self._matcher, self._tokenizer, self._words = matcher, tokenizer, words
        self._alphabet, self._stops = alphabet, stops
        self.vocab_size = len(words)
        self.ids: list[int] = []
        self._ended = 0  # stop tokens at the end of ids
        self._stops_W = pack_ids(sorted(stops), self.vocab_size)

    @property
    def complete(self) -> bool:
        """Whether the text so far is a whole text of the grammar: it may end here."""
        return bool(self._ended or self._matcher.is_completed())

    @property
    def finished(self) -> bool:
        """Whether nothing but a stop token can follow."""
        return bool(self._ended) or (self._matcher.is_completed() and not self._grammar_mask().any())

    @property
    def _last(self) -> bytes:
        """The bytes of the newest token."""
        return self._words[self.ids[-1]] if self.ids else b""

    def _grammar_mask(self) -> Tensor:
        """Packed ``[W]``, without stop tokens."""
        words_1W = torch.full((1, packed_words(self.vocab_size)), -1, dtype=torch.int32)
        self._matcher.fill_next_token_bitmask(words_1W)
        return words_1W[0] & self._alphabet.packed(self._last)

    def fill(self, words_W: Tensor) -> None:
        """Write the packed mask of the next token into ``words_W`` (int32 on the CPU, [W]).

        A ``UserError`` where the grammar allows no token at all: it can't be completed in this vocabulary. (After a
        draft that only means that the draft is a bad one.) After a stop token only stop tokens are allowed, so that a
        row behind one has a token to choose.
        """
        if self._ended:
            words_W.copy_(self._stops_W)
            return
        words_W.copy_(self._grammar_mask())
        if self._matcher.is_completed():
            words_W |= self._stops_W
        elif not words_W.any():
            raise UserError(
                f"response_format allows no token after {len(self.ids)} of them: its grammar can't be completed with "
                "this tokenizer; change the grammar"
            )

    def packed(self) -> Tensor:
        """The packed mask of the next token, int32 ``[W]`` on the CPU."""
        words_W = torch.empty(packed_words(self.vocab_size), dtype=torch.int32)
        self.fill(words_W)
        return words_W

    def mask(self) -> Tensor:
        """The tokens that are allowed next, bool ``[V]`` on the CPU."""
        return unpack_mask(self.packed(), self.vocab_size)

    def allowed(self, token: int) -> bool:
        """Whether ``token`` may come next."""
        if fits := self._accept(token):
            self.rollback(1)
        return fits

    def advance(self, token: int) -> None:
        """Add a token that is allowed; any other raises ``ValueError``."""
        if not self._accept(token):
            raise ValueError(f"token {token} is not allowed by the grammar after {len(self.ids)} tokens")

    def _accept(self, token: int) -> bool:
        """Add ``token`` if it is allowed; whether it was."""
        if token in self._stops and self.complete:
            self._ended += 1
        else:
            # xgrammar writes to stderr about ids that spell nothing, so it isn't asked about those.
            usable = not self._ended and self._alphabet.holds(token, self._last)
            if not (usable and self._matcher.accept_token(token)):
                return False
        self.ids.append(token)
        return True

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        assert 0 <= count <= len(self.ids)
        stops = min(count, self._ended)
        self._ended -= stops
        if count > stops:
            self._matcher.rollback(count - stops)
        del self.ids[len(self.ids) - count :]

    def jump_forward(self) -> list[int]:
        """Tokens of the text that the grammar forces next, each allowed after those before it; often none.

        The tokens are those of the tokenizer, in the light of the tokens before. The model may still cut the text
        otherwise, above all at the last token, which a longer one may replace; so they are drafts, not output.
        """
        if self._ended:
            return []
        text = self._matcher.find_jump_forward_string()
        if not text:
            return []
        return self._allowed_part(self._encoded(text)) or self._allowed_part(self._matcher.find_jump_forward_tokens())

    def _allowed_part(self, tokens: Sequence[int]) -> list[int]:
        """The first of ``tokens``, up to one that is not allowed after those before it."""
        begin = len(self.ids)
        all(self._accept(token) for token in tokens)
        found = self.ids[begin:]
        self.rollback(len(found))
        return found

    def _encoded(self, text: str) -> list[int]:
        """``text`` in the tokens that follow the last ones, or nothing if the tokenizer would cut those otherwise."""
        spelled = self._words
        context = _tail([spelled[token] for token in self.ids[-CONTEXT:]])
        found = self._tokenizer.encode(context + text, add_special_tokens=False)
        # Its tokens up to where the text begins; some tokenizers put a space in front of everything.
        left = sum(len(spelled[token]) for token in found) - len(text.encode())
        while left > 0 and found:
            left -= len(spelled[found.pop(0)])
        return found if left == 0 else []


def _tail(words: Sequence[bytes]) -> str:
    """The text of ``words``, without the first ones where those begin within a character."""
    for first in range(len(words)):
        try:
            return b"".join(words[first:]).decode()
        except UnicodeDecodeError:
            continue
    return ""


# ---- masks


def packed_words(vocab_size: int) -> int:
    """W, the int32 words of a packed mask over V tokens."""
    return -(-vocab_size // 32)


def pack_ids(ids: Sequence[int], vocab_size: int) -> Tensor:
    """The packed mask ``[W]`` in which the tokens ``ids`` alone are allowed."""
    bits = np.zeros(packed_words(vocab_size) * 32, dtype=np.uint8)
    bits[list(ids)] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))


def unpack_mask(words_MW: Tensor, vocab_size: int) -> Tensor:
    """Bool ``[..., V]`` on the device of the packed masks ``[..., W]``."""
    if words_MW.device.type == "cpu":  # several times as fast as shifting
        bits = np.unpackbits(words_MW.contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")
        return torch.from_numpy(bits[..., :vocab_size]).view(torch.bool)
    return pick_mask(words_MW, torch.arange(vocab_size, device=words_MW.device))


def pick_mask(words_MW: Tensor, candidate_ids_C: Tensor) -> Tensor:
    """Bool ``[..., C]``: the packed masks at the candidates of an exit head, on their device."""
    words_MC = words_MW.to(candidate_ids_C.device)[..., candidate_ids_C >> 5]
    return ((words_MC >> (candidate_ids_C & 31)) & 1).bool()


def mask_logits(logits_MV: Tensor, words_MW: Tensor, candidate_ids_C: Tensor | None = None) -> Tensor:
    """A copy of logits ``[..., V]`` (or ``[..., C]`` of the candidates) with -inf where the packed masks ``[..., W]``
    forbid the token. Any device and floating dtype; the masks are moved to the logits' device."""
    forbidden_MW = ~words_MW.to(logits_MV.device, non_blocking=True)
    if candidate_ids_C is None:
        forbidden = unpack_mask(forbidden_MW, logits_MV.shape[-1])
    else:
        forbidden = pick_mask(forbidden_MW, candidate_ids_C)
    return logits_MV.masked_fill(forbidden, -torch.inf)
