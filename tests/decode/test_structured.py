"""Structured output through the engine: in every mode and company the text fits its format, and `lossless` writes what
`full` writes."""

import dataclasses
import functools
import json
import random
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from exitlm.decode.engine import Engine
from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.options import EngineConfig
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.models import attach, fade, fit_lenses, make_engine, random_ids
from tests.decode.test_grammar import END, PERSON, VOCAB, byte_level, fits, random_schema
from tests.model.families import tiny_model

pytest.importorskip("xgrammar", reason="xgrammar is not installed: pip install 'exitlm[grammar]'")

MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "threshold": {"mode": "threshold", "rule": "probability", "threshold": 0.1},
    "lossless": {"mode": "lossless", "rule": "probability", "threshold": 0.05, "adaptive": False},
}
SMALL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3}, "ok": {"type": "boolean"}, "kind": {"enum": ["lens", "norm"]},
    },
    "required": ["name", "ok", "kind"],
}  # fmt: skip
TIGHT = {"type": "json_schema", "json_schema": {"schema": SMALL}, "any_whitespace": False}


@functools.cache
def model() -> EarlyExitModel:
    """Four layers over the vocabulary of a byte-level tokenizer, with an exit that knows some of it."""
    made = fade(tiny_model("llama", vocab_size=VOCAB, eos_token_id=END, max_position_embeddings=512), 3, 0.4)
    attach(made, [ExitConfig(layer=1), ExitConfig(layer=2, candidates=200, gate=True), ExitConfig(layer=3)])
    return fit_lenses(made)


@functools.cache
def tokenizer() -> Any:
    """Of 400 tokens and a few more."""
    return byte_level()


def engine(**options: Any) -> Engine:
    """An engine with the tokenizer."""
    return make_engine(model(), tokenizer=tokenizer(), options=EngineConfig(**options))


def closing(ids: list[int], logits: Tensor) -> Tensor:
    """Makes what ends texts likelier with each token, so that a random model comes to an end."""
    closers = torch.tensor([END, *tokenizer().convert_tokens_to_ids(['"', "}", "]", ","])])
    return logits.index_add(0, closers, torch.full((len(closers),), len(ids) / 6, dtype=logits.dtype))


def config(mode: str = "full", form: Any = TIGHT, **over: Any) -> GenerationConfig:
    """Settings of a mode for a format."""
    settings = {"max_new_tokens": 450, "logits_processor": closing, "response_format": form, **MODES[mode], **over}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GenerationConfig.of(settings)


def check_text(out: Generation, schema: Any) -> None:
    """It ended by itself, and is a text of the schema."""
    assert out.error is None
    assert out.finish_reason == "stop"
    assert out.text is not None
    assert fits(json.loads(out.text), schema)


@pytest.mark.parametrize("count", [8, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_texts_fit_their_schemas(mode: str, count: int) -> None:
    """In one company; greedy and sampled; a drafted text is the full one."""
    schemas = [random_schema(random.Random(seed)) for seed in range(count)]
    requests = []
    for seed, schema in enumerate(schemas):
        form = {"type": "json_schema", "json_schema": {"schema": schema}, "any_whitespace": seed % 2 == 0}
        sampling = {"temperature": 0.9, "seed": seed} if seed % 3 else {}
        requests.append((random_ids(6, seed, 400), config(mode, form, **sampling)))
    outs = engine(block_size=4).generate_all(requests)
    for out, schema in zip(outs, schemas, strict=True):
        check_text(out, schema)
    full = [(ids, dataclasses.replace(chosen, mode="full")) for ids, chosen in requests]
    texts = [out.token_ids for out in engine(prefix_sharing=False).generate_all(full)]
    if mode == "lossless":
        assert [out.token_ids for out in outs] == texts
        assert sum(out.stats.drafted - out.stats.accepted for out in outs) > 10
        assert sum(out.stats.accepted for out in outs) > 10
    if mode == "threshold":
        assert min(layer for out in outs for layer in out.exit_layers) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"type": "regex", "regex": r"(ab|é)+\d{2}"}, r"(ab|é)+\d{2}"),
        ({"type": "choice", "choice": ["yes", "no", "naïve"]}, "yes|no|naïve"),
        ({"type": "grammar", "grammar": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
    ],
)
def test_other_formats(mode: str, form: Any, pattern: str) -> None:
    for prompt in (random_ids(5, 1, 400), random_ids(5, 2, 400)):
        out = engine().generate(prompt, config(mode, form))
        assert out.text is not None
        assert re.fullmatch(pattern, out.text)
        assert out.finish_reason == "stop"


@pytest.mark.parametrize("mode", MODES)
def test_grammars_in_company_and_after_preemption(mode: str) -> None:
    """Some with a format and some without; short of memory, so that grammars are kept while their texts wait."""
    requests = []
    for seed in range(7):
        form = [TIGHT, None, SMALL, {"type": "choice", "choice": ["lens", "norm", "block"]}][seed % 4]
        over: dict[str, Any] = {"temperature": 0.8, "seed": seed, "logprobs": 1, "max_new_tokens": 60}
        requests.append((random_ids(4 + seed, seed, 400), config(mode, form, **over)))
    alone = [engine(prefix_sharing=False).generate(*request) for request in requests]
    for options in ({"max_sequences": 2}, {"block_size": 2, "prefill_chunk": 3}, {"block_size": 1}):
        room = make_engine(model(), options=EngineConfig(**options)).memory.pool.bytes_for(80)
        tight = engine(**options, kv_bytes=room)
        outs = tight.generate_all(requests)
        for out, its in zip(outs, alone, strict=True):
            assert (out.token_ids, out.text, out.finish_reason) == (its.token_ids, its.text, its.finish_reason)
            for a, b in zip(out.trace, its.trace, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-12)
        assert tight.memory.hidden.used == 0
        assert all(allocator.used == 0 for allocator in tight.memory.pool.allocators)
        if "max_sequences" not in options:
            pairs = zip(outs, requests, strict=True)
            assert sum(out.stats.preemptions for out, (_, chosen) in pairs if chosen.response_format) > 0


def test_forced_tokens_are_drafts_that_are_accepted() -> None:
    out = engine().generate(random_ids(5, 3, 400), config("lossless", draft="grammar"))
    full = engine().generate(random_ids(5, 3, 400), config("full"))
    assert out.token_ids == full.token_ids
    check_text(out, SMALL)
    forced = [token for token in out.trace if token.source == "grammar"]
    assert out.stats.accepted == len(forced) == sum(token.drafted for token in out.trace)
    assert len(forced) > 5
    assert out.stats.accepted / out.stats.drafted > 0.5
    assert out.stats.rounds <= len(out.token_ids) - len(forced)
    assert {token.exit_layer for token in forced} == {4}
    none = engine().generate(random_ids(5, 3, 400), config("lossless", draft="exits"))
    assert none.token_ids == full.token_ids
    assert not any(token.source == "grammar" for token in none.trace)


def test_all_sources_of_drafts_together() -> None:
    sources = set()
    for seed in range(4):
        prompt = tokenizer().encode('{"name": "x", "ok": true, "kind": "lens"} ') * 2 + [seed + 9]
        out = engine().generate(prompt, config("lossless"))
        assert out.token_ids == engine().generate(prompt, config("full")).token_ids
        sources |= {token.source for token in out.trace}
    assert {"grammar", "exit"} <= sources


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, "type 'json_schema' can't be used: Unsupported"),
        ({"type": "regex", "regex": "a("}, "type 'regex' can't be used"),
        ({"type": "grammar", "grammar": "root := x"}, "type 'grammar' can't be used"),
    ],
)  # fmt: skip
def test_a_format_that_is_refused_is_one_sentence_for_its_request_alone(form: Any, message: str) -> None:
    made = engine()
    with pytest.raises(UserError, match=message) as e:
        made.stream([5, 6], config("full", form))
    assert "\n" not in str(e.value)
    outs = made.generate_all([([5, 6], config()), ([5, 6], config("full", form)), ([7, 8], config())])
    assert str(outs[1].error) == str(e.value)
    check_text(outs[0], SMALL)
    check_text(outs[2], SMALL)


def test_a_format_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="response_format needs a tokenizer, and this model has none"):
        make_engine(model()).generate([5, 6], config())


@pytest.mark.parametrize("mode", MODES)
def test_a_dead_end_ends_its_request_alone(mode: str) -> None:
    """After "b" nothing can ever come."""
    dead = {"type": "grammar", "grammar": 'root ::= "a" | "b" rest\nrest ::= rest "c"'}
    a, b = (tokenizer().convert_tokens_to_ids(letter) for letter in "ab")
    requests = [
        ([5, 6], config(mode)), ([5, 6], config(mode, dead, logit_bias={b: 100.0})),
        ([5, 6], config(mode, dead, logit_bias={a: 100.0})), ([7], config(mode, None, max_new_tokens=5)),
    ]  # fmt: skip
    outs = engine().generate_all(requests)
    check_text(outs[0], SMALL)
    assert "allows no token after 1 of them" in str(outs[1].error)
    assert outs[2].text == "a"
    assert outs[3].error is None


@pytest.mark.parametrize("mode", MODES)
def test_bans_and_a_grammar_that_leave_no_token(mode: str) -> None:
    form = {"type": "choice", "choice": ["a"]}
    a = tokenizer().convert_tokens_to_ids("a")
    with pytest.raises(UserError, match="no token is allowed"):
        engine().generate([5, 6], config(mode, form, bad_words=[[a]]))


@pytest.mark.parametrize("mode", MODES)
def test_a_format_whose_end_is_ignored(mode: str) -> None:
    """After the stop token nothing but stop tokens can follow."""
    form = {"type": "choice", "choice": ["a"]}
    out = engine().generate([5, 6], config(mode, form, ignore_eos=True, max_new_tokens=6))
    assert out.text == "a"
    assert out.token_ids[1:] == [END] * 5


@pytest.mark.parametrize("mode", MODES)
def test_stop_ids_and_lengths_with_a_format(mode: str) -> None:
    """A stop id of the request's own ends a text that is complete; the length cuts one that is not."""
    form = {"type": "regex", "regex": "a{3}b*"}
    stop = 350
    out = engine().generate([5, 6], config(mode, form, stop_token_ids=[stop], logit_bias={stop: 60.0, END: -60.0}))
    assert out.token_ids[-1] == stop
    assert out.finish_reason == "stop"
    assert out.text is not None
    assert out.text.startswith("aaa")
    for length in (1, 2, 5):
        cut = engine().generate([5, 6], config(mode, TIGHT, max_new_tokens=length))
        assert (len(cut.token_ids), cut.finish_reason) == (length, "length")


@pytest.mark.parametrize("rule", ["probability", "margin", "entropy", "gate", "patience", "fixed", "decay"])
def test_an_exit_none_of_whose_candidates_is_allowed_never_fires(rule: str) -> None:
    made = tiny_model("llama", vocab_size=VOCAB, eos_token_id=END)
    attach(made, [ExitConfig(layer=2, candidates=60, gate=True)])
    head = made.exits["2"]
    assert head.candidate_ids is not None
    words = [tokenizer().decode([token]) for token in range(2, 300)]
    known = set(head.candidate_ids.tolist())
    unknown = [w for token, w in enumerate(words, 2) if len(w) == 1 and w.isalnum() and token not in known]
    form = {"type": "choice", "choice": [f"{a}{b}" for a in unknown[:4] for b in unknown[4:8]]}
    chosen = config("threshold", form, rule=rule, threshold=0.0, patience=1)
    out = make_engine(made, tokenizer=tokenizer()).generate([5, 6], chosen)
    assert out.finish_reason == "stop"
    assert set(out.exit_layers[:2]) == {4}


def test_log_probabilities_are_of_the_raw_logits() -> None:
    out = engine().generate([5, 6], config("full", logprobs=2))
    text = [5, 6, *out.token_ids]
    log_p = torch.log_softmax(model().logits(text)[0], -1)
    for at, token in enumerate(out.trace, 1):
        assert token.logprob == pytest.approx(float(log_p[at, token.id]), abs=1e-11)
    assert any(token.id not in token.top_logprobs for token in out.trace)


def test_choices_have_grammars_of_their_own() -> None:
    out = engine().generate([5, 6], config("lossless", temperature=1.2, seed=1, n=4))
    for choice in out.choices:
        check_text(choice, SMALL)
    assert len({choice.text for choice in out.choices}) == 4


def test_a_schema_with_blanks_anywhere() -> None:
    out = engine().generate([5, 6], config("lossless", {"type": "json_schema", "json_schema": {"schema": PERSON}}))
    check_text(out, PERSON)
