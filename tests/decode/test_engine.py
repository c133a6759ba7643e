"""Requests from prompt to result: what comes back, how text ends, streams side by side, and what is left at default."""

import copy
import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exitlm.decode.engine import Engine
from exitlm.decode.generation import GenerationConfig
from exitlm.decode.options import EngineConfig
from exitlm.decode.planning import DEFAULT_THRESHOLD
from exitlm.decode.pricing import pricing as pricing_module
from exitlm.decode.pricing.measure_costs import NO_ROOM
from exitlm.decode.rules import PATIENCE_REACHED, RULES
from exitlm.errors import UserError
from exitlm.model import Calibration, EarlyExitModel, ExitRecord
from exitlm.model.exits import ExitConfig
from tests.decode.models import attach, drafting_model, fade, generate, make_engine, random_ids, some_costs
from tests.model.families import tiny_model

PROMPT = random_ids(5)
MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "threshold": {"mode": "threshold", "threshold": 0.05},
    "lossless": {"mode": "lossless", "threshold": 0.02, "adaptive": False},
}
FREE: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True}


class Letters:
    """Every token is its number in brackets; 2 is special."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Text."""
        return "".join(f"[{i}]" for i in token_ids if i != 2)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(drafting_model("llama"), tokenizer=Letters())


# ---- the result


@pytest.mark.parametrize("mode", MODES)
def test_the_result(engine: Engine, mode: str) -> None:
    out = generate(engine, PROMPT, **MODES[mode], **FREE)
    assert len(out.token_ids) == len(out.exit_layers) == len(out.trace) == 20
    assert out.finish_reason == "length"
    assert out.text == "".join(f"[{i}]" for i in out.token_ids)
    assert [token.text for token in out.trace] == [f"[{i}]" for i in out.token_ids]
    stats = out.stats
    assert stats.mode == mode
    assert (stats.tokens, stats.prompt_tokens) == (20, 5)
    assert stats.mean_layers == sum(out.exit_layers) / 20
    assert stats.tokens_per_second == pytest.approx(19 / stats.decode_seconds)
    assert stats.prefill_seconds > 0
    assert stats.quant == "none"
    first = out.trace[0]
    assert (first.exit_layer, first.source, first.confidence, first.drafted) == (4, "final", {}, False)
    for token in out.trace:
        assert (token.source == "exit") == (token.exit_layer < 4)
        assert token.drafted == (mode == "lossless" and token.source != "final")
        assert all(0 <= score <= 1 for score in token.confidence.values())
    if mode == "full":
        assert stats.exits == []
        assert stats.rule is None
        assert stats.acceptance is None
        assert stats.layer_rows == 19 * 4
        assert not any(token.confidence for token in out.trace)
    else:
        assert stats.exits == [1, 2, 3]
        assert stats.rule == "gate"
        assert stats.max_pending > 0
        tried = [token for token in out.trace[1:] if token.source == "exit"]
        assert tried
        for token in tried:
            assert max(token.confidence) == token.exit_layer
            assert token.confidence[token.exit_layer] >= stats.thresholds[token.exit_layer]
    if mode == "threshold":
        assert stats.drafted == 0
        assert stats.layer_rows <= sum(out.exit_layers[1:]) + 4 * stats.max_pending
    refused = [token for token in out.trace if token.refused is not None]
    if mode == "lossless":
        assert stats.acceptance == stats.accepted / stats.drafted
        assert 0 < len(refused) <= stats.drafted - stats.accepted
    else:
        assert not refused
    for token in refused:
        assert token.refused is not None
        assert token.refused.id != token.id
        assert (token.source, token.refused.source, token.refused.layer < 4) == ("final", "exit", True)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 3, "top_k": 5, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("mode", MODES)
def test_log_probabilities_are_those_of_the_model(mode: str, sampling: dict[str, Any]) -> None:
    """Of the head that gave the token, before the sampler's filters."""
    model = drafting_model("qwen3")
    out = generate(make_engine(model), PROMPT, logprobs=4, **MODES[mode], **FREE, **sampling)
    text = [*PROMPT, *out.token_ids]
    heads = {**model.exit_logits(text), 4: model.logits(text)}
    sources = set()
    for at, token in enumerate(out.trace, 4):
        layer = token.exit_layer if mode == "threshold" else 4  # a verified draft is the full model's token
        expected = torch.log_softmax(heads[layer][0, at], -1)
        assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-11)
        best = expected.topk(4)
        assert list(token.top_logprobs) == best.indices.tolist()
        assert list(token.top_logprobs.values()) == pytest.approx(best.values.tolist(), abs=1e-11)
        sources.add(token.source)
    assert len(sources) > (mode != "full")


def test_no_log_probabilities_unless_asked_for(engine: Engine) -> None:
    out = generate(engine, PROMPT, **MODES["threshold"], **FREE)
    assert all(token.logprob is None and not token.top_logprobs for token in out.trace)


def test_text_without_a_tokenizer() -> None:
    engine = make_engine(drafting_model("llama"))
    assert generate(engine, PROMPT, **FREE).text is None
    with pytest.raises(UserError, match="tokenizer"):
        generate(engine, PROMPT, stop="x")
    with pytest.raises(UserError, match="tokenizer"):
        engine.stream(PROMPT, GenerationConfig(stop="x"))


# ---- ends


def certain(**over: Any) -> EarlyExitModel:
    """An exit at 2 that is always right: whole chains of drafts are accepted."""
    return attach(fade(tiny_model("llama", **over), 3, 0.0), [ExitConfig(layer=2, kind="norm")])


@pytest.mark.parametrize("mode", MODES)
def test_the_end_of_sequence_ends_the_text(mode: str) -> None:
    settings = {**MODES[mode], "rule": None if mode == "full" else "probability", "threshold": 0.0}
    free = generate(make_engine(certain()), PROMPT, **settings, **FREE)
    for at in (0, 1, 4, 11):
        eos = free.token_ids[at]
        engine = make_engine(certain(eos_token_id=[eos, 96]), tokenizer=Letters())
        out = generate(engine, PROMPT, max_new_tokens=20, **settings)
        end = free.token_ids.index(eos) + 1
        assert out.token_ids == free.token_ids[:end]
        assert out.finish_reason == "stop"
        ignored = generate(engine, PROMPT, **settings, **FREE)
        assert ignored.token_ids == free.token_ids
        assert ignored.finish_reason == "length"
        both = generate(engine, PROMPT, stop_token_ids=[free.token_ids[2]], **settings, **FREE)
        assert both.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[2]) + 1]


def test_a_stop_at_the_last_allowed_token_is_a_stop(engine: Engine) -> None:
    free = generate(engine, PROMPT, mode="full", **FREE)
    out = generate(engine, PROMPT, mode="full", max_new_tokens=1, stop_token_ids=[free.token_ids[0]])
    assert out.finish_reason == "stop"


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_string_inside_of_a_piece_of_several_tokens(mode: str) -> None:
    """In lossless mode a round gives several tokens; what follows the stop string is none of the result."""
    settings = {**MODES[mode], "rule": None if mode == "full" else "probability", "threshold": 0.0}
    engine = make_engine(certain(), tokenizer=Letters())
    free = generate(engine, PROMPT, mode="full", **FREE)
    assert free.text is not None
    for at in range(1, 12):
        word = f"{free.token_ids[at]}][{free.token_ids[at + 1]}"  # begins and ends within a token's text
        out = generate(engine, PROMPT, stop=[word, "no such text"], **settings, **FREE)
        expected = free.text[: free.text.index(word)]
        assert out.text == expected
        assert out.finish_reason == "stop"
        assert out.token_ids == free.token_ids[: len(out.token_ids)]
        seen = "".join(f"[{i}]" for i in out.token_ids)
        assert word in seen
        assert word not in "".join(f"[{i}]" for i in out.token_ids[:-1])
        assert len(out.trace) == len(out.exit_layers) == out.stats.tokens == len(out.token_ids)
        assert out.stats.accepted == sum(token.drafted for token in out.trace)
        streamed = list(engine.stream(PROMPT, GenerationConfig.of({"stop": [word], **settings, **FREE})))
        assert "".join(piece.text for piece in streamed) == expected
        assert [i for piece in streamed for i in piece.token_ids] == out.token_ids


def test_held_back_text_comes_with_the_last_token(engine: Engine) -> None:
    free = generate(engine, PROMPT, mode="full", **FREE)
    assert free.text is not None
    out = generate(engine, PROMPT, mode="full", stop=free.text[-3:] + "never", **FREE)
    assert out.text == free.text
    assert out.finish_reason == "length"


@pytest.mark.parametrize("mode", MODES)
def test_the_context_ends_the_text(mode: str) -> None:
    model = certain(max_position_embeddings=32)
    engine = make_engine(model)
    settings = {**MODES[mode], "rule": None if mode == "full" else "probability", "threshold": 0.0}
    out = generate(engine, random_ids(20), max_new_tokens=1000, ignore_eos=True, **settings)
    assert len(out.token_ids) == 12
    assert out.finish_reason == "length"
    last = generate(engine, random_ids(31), max_new_tokens=5, ignore_eos=True, **settings)
    assert len(last.token_ids) == 1
    with pytest.raises(UserError, match="context is 32"):
        generate(engine, random_ids(32), **settings)


@pytest.mark.parametrize(("prompt", "says"), [([], "empty"), ([5, 97], "token id 97"), ([-1], "token id -1")])
def test_prompts_that_cannot_be(engine: Engine, prompt: list[int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        generate(engine, prompt)


# ---- streams


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_gives_what_generate_gives(engine: Engine, mode: str) -> None:
    config = GenerationConfig.of({**MODES[mode], **FREE})
    out, pieces = engine.generate(PROMPT, config), list(engine.stream(PROMPT, config))
    assert [i for piece in pieces for i in piece.token_ids] == out.token_ids
    assert [layer for piece in pieces for layer in piece.exit_layers] == out.exit_layers
    assert "".join(piece.text for piece in pieces) == out.text
    assert len(pieces) == out.stats.rounds + 1
    if mode != "lossless":
        assert all(len(piece.tokens) == 1 for piece in pieces)


def test_streams_side_by_side_do_not_disturb_each_other(engine: Engine) -> None:
    configs = [
        GenerationConfig.of({**MODES[mode], **FREE, **sampling})
        for mode in MODES
        for sampling in ({}, {"temperature": 1.0, "seed": 5}, {"repetition_penalty": 1.5})
    ]
    prompts = [random_ids(3 + 9 * i, i) for i in range(len(configs))]
    alone = [engine.generate(prompt, config).token_ids for prompt, config in zip(prompts, configs, strict=True)]
    streams = [engine.stream(prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
    found: list[list[int]] = [[] for _ in streams]
    running = set(range(len(streams)))
    while running:
        for i in sorted(running):
            piece = next(streams[i], None)
            if piece is None:
                running.remove(i)
            else:
                found[i] += piece.token_ids
    assert found == alone


def is_idle(engine: Engine) -> bool:
    """Whether nothing runs and nothing is held."""
    used = [allocator.used for allocator in engine.memory.pool.allocators]
    return not (
        engine.roster.running or engine.roster.waiting or engine._sinks or any(used) or engine.memory.hidden.used
    )


def test_an_abandoned_stream_gives_its_memory_back() -> None:
    engine = make_engine(drafting_model("llama"))
    expected = generate(engine, PROMPT, **MODES["threshold"], **FREE).token_ids
    assert is_idle(engine)
    stream = engine.stream(PROMPT, GenerationConfig.of({**MODES["threshold"], **FREE}))
    next(stream)
    assert not is_idle(engine)
    stream.close()
    assert is_idle(engine)
    stream = engine.stream(random_ids(9, 2), GenerationConfig.of({**MODES["lossless"], **FREE}))
    next(stream)
    del stream
    gc.collect()
    assert is_idle(engine)
    assert generate(engine, PROMPT, **MODES["threshold"], **FREE).token_ids == expected


def test_a_stream_that_was_never_read_costs_nothing() -> None:
    engine = make_engine(drafting_model("llama"))
    for _ in range(5):
        engine.stream(PROMPT, GenerationConfig.of(FREE))
    assert is_idle(engine)
    assert len(generate(engine, PROMPT, **FREE).token_ids) == 20


def test_a_pass_that_breaks_off_ends_what_ran_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(drafting_model("llama"))
    expected = generate(engine, PROMPT, **FREE).token_ids
    other = engine.add(PROMPT, GenerationConfig.of(FREE))
    with monkeypatch.context() as patch:
        patch.setattr(engine.fused, "final_logits", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate(engine, PROMPT, **FREE)
    assert is_idle(engine)
    (event,) = engine.step()
    assert (event.key, type(event.error)) == (other, ZeroDivisionError)
    assert generate(engine, PROMPT, **FREE).token_ids == expected


# ---- what is run: explicit choices are honoured, defaults follow records and costs


def recorded(**records: ExitRecord) -> EarlyExitModel:
    """A model with gates, whose exits carry what tuning leaves; keys are e1, e2, e3."""
    model = copy.deepcopy(drafting_model("llama"))
    for name, record in records.items():
        model.exits[name[1:]].record = record
    return model


def plan(engine: Engine, **settings: Any) -> tuple[list[int], dict[int, float], str | None]:
    made = engine.intake.plan(GenerationConfig.of(settings))
    return made.exits, {} if made.rule is None else dict(made.rule.thresholds), made.rule and made.rule.name


def test_the_default_threshold_is_what_tuning_stored_for_the_rule() -> None:
    engine = make_engine(recorded(e1=ExitRecord(threshold=0.7, rule="gate"), e2=ExitRecord(threshold=0.8)))
    chosen = dict(mode="threshold", exits=[1, 2, 3])
    assert plan(engine, **chosen) == ([1, 2, 3], {1: 0.7, 2: 0.8, 3: DEFAULT_THRESHOLD}, "gate")
    assert plan(engine, **chosen, rule="margin")[1] == {1: DEFAULT_THRESHOLD, 2: 0.8, 3: DEFAULT_THRESHOLD}
    assert plan(engine, **chosen, threshold=0.3)[1] == {1: 0.3, 2: 0.3, 3: 0.3}
    assert plan(engine, **chosen, threshold={2: 0.1})[1] == {1: 0.7, 2: 0.1, 3: DEFAULT_THRESHOLD}


def test_the_default_rule() -> None:
    with_gates = make_engine(drafting_model("llama"))
    assert plan(with_gates, mode="threshold")[2] == "gate"
    some = attach(tiny_model("llama"), [ExitConfig(layer=1, gate=True), ExitConfig(layer=2)])
    assert plan(make_engine(some), mode="threshold")[2] == "probability"
    assert plan(make_engine(some), mode="threshold", exits=[1])[2] == "gate"


def test_rules_with_an_integer_of_their_own() -> None:
    engine = make_engine(drafting_model("llama"))
    assert plan(engine, mode="threshold", rule="fixed") == ([3], {3: 0.0}, "fixed")
    assert plan(engine, mode="threshold", rule="fixed", exit_layer=2) == ([2], {2: 0.0}, "fixed")
    assert plan(engine, mode="threshold", rule="fixed", exits=[1, 2])[0] == [2]
    assert plan(engine, mode="threshold", rule="patience")[1] == dict.fromkeys((1, 2, 3), PATIENCE_REACHED)
    with pytest.raises(UserError, match="exit_layer 4"):
        plan(engine, mode="threshold", rule="fixed", exit_layer=4)


def test_modes_that_need_no_exits() -> None:
    engine = make_engine(drafting_model("llama"))
    assert plan(engine, mode="full") == ([], {}, None)
    assert plan(engine, mode="lossless", draft="lookup") == ([], {}, None)
    bare = make_engine(tiny_model("llama"))
    assert plan(bare, mode="lossless") == ([], {}, None)
    with pytest.raises(UserError, match="exitlm tune"):
        plan(bare, mode="threshold")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"exits": [7]}, r"no exit at layer 7 \(it has: 1, 2, 3\)"),
        ({"exits": [4]}, "no exit at layer 4"),
        ({"exits": []}, "exits is empty"),
        ({"threshold": {7: 0.5}}, "layer|7"),
        ({"threshold": {"1": 0.5}}, "'1'"),
        ({"threshold": [0.5, 0.6]}, "threshold is \\[0.5, 0.6\\]"),
    ],
)
def test_plans_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    engine = make_engine(drafting_model("llama"))
    with pytest.raises(UserError, match=says):
        plan(engine, mode="threshold", **settings)


def test_a_gate_where_there_is_none_is_refused() -> None:
    engine = make_engine(attach(tiny_model("llama"), [ExitConfig(layer=1, gate=True), ExitConfig(layer=2)]))
    with pytest.raises(UserError, match="exit 2 has none"):
        plan(engine, mode="threshold", rule="gate")
    assert plan(engine, mode="threshold", rule="gate", exits=[1])[2] == "gate"


SURE = ExitRecord(rule="gate", threshold=0.6, coverage=0.9, tested=True)
NEVER = ExitRecord(rule="gate", threshold=0.6, coverage=0.0, tested=False)


def test_exits_that_tuning_found_not_worth_a_test_are_off_by_default_and_this_is_said_once() -> None:
    engine = make_engine(recorded(e1=NEVER, e2=SURE, e3=NEVER))
    for _ in range(2):
        assert plan(engine, mode="threshold") == ([2], {2: 0.6}, "gate")
    assert len(engine.notes) == 1
    assert "exits [1, 3], by what tuning measured; name them to use them: --exits 1,3" in engine.notes[0]
    out = generate(engine, PROMPT, mode="threshold", **FREE)
    assert out.stats.exits == [2]


def test_what_is_tested_by_default_depends_on_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pricing_module, "cached", lambda *_: 1 / 0)
    engine = make_engine(recorded(e1=NEVER, e2=SURE), costs=None)
    assert plan(engine, mode="threshold")[0] == [2, 3]
    assert generate(engine, PROMPT, mode="threshold", **FREE).stats.exits == [2, 3]


def test_of_an_adapter_that_does_not_say_exits_with_a_threshold_below_1_are_tested() -> None:
    stored = {"e1": ExitRecord(rule="gate", threshold=1.0), "e2": ExitRecord(rule="gate", threshold=0.9)}
    assert plan(make_engine(recorded(**stored)), mode="threshold") == ([2, 3], {2: 0.9, 3: DEFAULT_THRESHOLD}, "gate")


def test_the_default_rule_is_that_of_the_exits_that_are_tested() -> None:
    model = attach(tiny_model("llama"), [ExitConfig(layer=1, gate=True), ExitConfig(layer=2)])
    model.exits["1"].record, model.exits["2"].record = SURE, NEVER
    assert plan(make_engine(model), mode="threshold") == ([1], {1: 0.6}, "gate")


def test_drafting_that_does_not_pay_is_said_once() -> None:
    curve = Calibration(scores=(0.5,), coverage=(0.5,), precision=(0.1,))
    record = replace(SURE, calibration=curve)
    engine = make_engine(recorded(e1=record, e2=record, e3=record))
    for _ in range(2):
        assert plan(engine, mode="lossless") == ([], {}, None)
    assert len(engine.notes) == 1
    assert "no token will draft at exits [1, 2, 3]" in engine.notes[0]


def test_what_the_user_names_is_used_whether_it_pays_or_not() -> None:
    engine = make_engine(recorded(e1=NEVER, e2=NEVER, e3=NEVER))
    assert plan(engine, mode="threshold") == ([], {}, None)
    assert "none pays" in engine.notes[0]
    assert plan(engine, mode="threshold", threshold=0.5)[0] == [1, 2, 3]
    assert plan(engine, mode="threshold", rule="gate")[0] == [1, 2, 3]
    assert plan(engine, mode="threshold", exits=[3])[0] == [3]
    out = generate(engine, PROMPT, mode="threshold", **FREE)
    assert set(out.exit_layers) == {4}


def test_drafting_thresholds_come_from_calibration_and_costs() -> None:
    curve = Calibration(scores=(0.2, 0.5, 0.9), coverage=(0.9, 0.6, 0.2), precision=(0.5, 0.95, 0.99))
    hopeless = Calibration(scores=(0.2, 0.9), coverage=(0.9, 0.2), precision=(0.0, 0.01))
    model = recorded(e1=replace(SURE, calibration=hopeless), e2=replace(SURE, calibration=curve), e3=SURE)
    engine = make_engine(model)
    assert plan(engine, mode="lossless") == ([2, 3], {2: 0.5, 3: 0.6}, "gate")
    assert plan(engine, mode="lossless", adaptive=False)[1] == {1: 0.6, 2: 0.6, 3: 0.6}
    assert plan(engine, mode="lossless", threshold=0.4)[1] == {1: 0.4, 2: 0.4, 3: 0.4}
    for settings, layer, prior in (({}, 2, 0.95), ({}, 3, 0.7), ({"rule": "margin", "threshold": 0.5}, 2, 0.7)):
        engine.add(PROMPT, GenerationConfig.of(settings))
        drafting = engine.roster.waiting[-1].drafting
        assert drafting is not None
        assert drafting.sources["exit", "exits", layer].prior == prior


def test_costs_are_measured_only_where_they_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    model = drafting_model("llama")
    monkeypatch.setattr(pricing_module, "cached", lambda _, place: asked.append(place) or some_costs(model))
    engine = Engine(model, cache_dir=tmp_path)
    generate(engine, PROMPT, mode="full", **FREE)
    generate(engine, PROMPT, mode="threshold", threshold=0.5, **FREE)
    generate(engine, PROMPT, mode="lossless", adaptive=False, **FREE)
    assert asked == []
    generate(engine, PROMPT, mode="lossless", **FREE)
    assert asked == [tmp_path]


def test_a_measured_engine_and_a_given_table_write_the_same_text(tmp_path: Path) -> None:
    """The clock may choose how to draft; it never chooses the words."""
    model = drafting_model("olmo2")
    texts = set()
    for costs in (None, some_costs(model), some_costs(model, row=1.0), some_costs(model, layer=0.01, head=9.0)):
        engine = Engine(model, costs=costs, cache_dir=tmp_path)
        texts.add(tuple(generate(engine, random_ids(4) * 3, **FREE).token_ids))
    assert len(texts) == 1


def test_speed_of_one_token_is_not_a_number(engine: Engine) -> None:
    out = generate(engine, PROMPT, max_new_tokens=1)
    assert math.isnan(out.stats.tokens_per_second)
    assert out.stats.tokens == 1


# ---- numbers that are none


@pytest.mark.parametrize("mode", MODES)
def test_final_logits_that_are_not_finite_end_the_generation(mode: str) -> None:
    model = copy.deepcopy(drafting_model("llama"))
    with torch.no_grad():
        model.lm_head.weight[40, 3] = math.nan
    with pytest.raises(UserError, match=r"final logits for new token 1 are not finite .* are damaged: get them again"):
        generate(make_engine(model), PROMPT, **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_a_text_ends_at_the_token_whose_logits_are_not_finite(mode: str) -> None:
    plain = generate(make_engine(drafting_model("llama")), PROMPT, mode="full", **FREE).token_ids
    after = next(i for i in range(3, 20) if plain[i] not in (*PROMPT, *plain[:i]))
    model = copy.deepcopy(drafting_model("llama"))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # not the embedding's, if they are tied
    with torch.no_grad():
        model.model.embed_tokens.weight[plain[after]] = math.nan
    engine, pieces = make_engine(model), []
    settings = {**MODES[mode], "threshold": 1.0} if mode == "threshold" else MODES[mode]
    with pytest.raises(UserError, match=f"new token {after + 2} are not finite"):
        pieces.extend(engine.stream(PROMPT, GenerationConfig.of({**settings, **FREE})))
    assert [i for piece in pieces for i in piece.token_ids] == plain[: after + 1]
    assert generate(engine, PROMPT, **{**settings, **FREE, "max_new_tokens": after}).token_ids == plain[:after]


@pytest.mark.parametrize("part", ["lens.weight", "lens.bias", "gate.weight", "gate.bias"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", ["threshold", "lossless"])
def test_an_exit_with_a_weight_that_is_no_number_never_fires(mode: str, rule: str, part: str) -> None:
    model = copy.deepcopy(drafting_model("llama"))
    with torch.no_grad():
        for head in model.exit_heads().values():
            head.get_parameter(part).view(-1)[0] = math.nan
    settings: dict[str, Any] = {"mode": mode, "rule": rule, "threshold": 0.0, "draft": ("exits",), "patience": 1}
    out = generate(make_engine(model), PROMPT, **settings, **FREE)
    if part.startswith("lens") or rule == "gate":
        assert set(out.exit_layers) == {model.config.num_hidden_layers}
    else:  # a gate that nobody reads does no harm
        assert min(out.exit_layers) < model.config.num_hidden_layers
    plain = generate(make_engine(model), PROMPT, mode="full", **FREE)
    assert mode == "threshold" or out.token_ids == plain.token_ids


# ---- costs of passes


def test_costs_of_a_busy_machine_are_named_and_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drafting_model("llama")
    tables = [replace(some_costs(model), spread=0.9, origin="measured"), replace(some_costs(model), origin="measured")]
    monkeypatch.setattr(pricing_module, "cached", lambda *_: tables.pop(0))
    engine = make_engine(model, costs=None)
    settings = {**MODES["lossless"], "adaptive": True, "max_new_tokens": 4}
    for _ in range(2):  # a table serves for a while, whatever it is
        assert generate(engine, PROMPT, **settings).stats.costs == "measured"
        assert len(tables) == 1
        (note,) = engine.notes
        assert "this machine is busy (equal passes took up to 1.9 times as long)" in note
    monkeypatch.setattr(pricing_module, "MEASURE_AGAIN", 0.0)
    engine.pricing._next_measure = 0.0
    generate(engine, PROMPT, **settings)
    assert (tables, engine.notes) == ([], [])
    generate(engine, PROMPT, **settings)  # which is not measured again


def test_a_table_that_was_measured_again_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drafting_model("llama")
    origin = "measured again, since passes take 0.30 to 0.90 times as long as was kept"
    monkeypatch.setattr(pricing_module, "cached", lambda *_: replace(some_costs(model), origin=origin))
    engine = make_engine(model, costs=None)
    settings = {**MODES["lossless"], "adaptive": True, "max_new_tokens": 4}
    assert generate(engine, PROMPT, **settings).stats.costs == origin
    assert engine.notes == [f"the costs of passes were {origin}"]
    assert generate(make_engine(model), PROMPT, mode="full").stats.costs == "given"


def test_a_machine_that_interrupts_every_pass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drafting_model("llama")
    guess = replace(some_costs(model), spread=math.inf, origin="guessed")
    monkeypatch.setattr(pricing_module, "cached", lambda *_: guess)
    engine = make_engine(model, costs=None)
    settings = {**MODES["lossless"], "adaptive": True, "max_new_tokens": 4}
    assert generate(engine, PROMPT, **settings).stats.costs == "guessed"
    assert "this machine is busy (equal passes were interrupted)" in engine.notes[0]


def test_a_pool_without_room_to_measure_is_no_busy_machine(tmp_path: Path) -> None:
    small = EngineConfig(kv_bytes=make_engine(drafting_model("llama")).memory.pool.bytes_for(64))
    engine = Engine(drafting_model("llama"), quant="none", options=small, cache_dir=tmp_path)
    assert generate(engine, PROMPT, max_new_tokens=2).stats.costs == NO_ROOM
    assert engine.notes[0].startswith("engine.kv_bytes leaves no room")


@pytest.mark.parametrize("compile", ["none", "static"])
def test_what_a_refused_generation_left_harms_no_other(compile: str) -> None:
    model = copy.deepcopy(drafting_model("llama", dtype=torch.float32))
    with torch.no_grad():
        model.model.embed_tokens.weight[40] = math.nan
    model.lm_head.weight = drafting_model("llama", dtype=torch.float32).lm_head.weight
    engine = make_engine(model, compile=compile)
    before = generate(engine, PROMPT, mode="full", **FREE).token_ids[:4]
    with pytest.raises(UserError, match="not finite"):
        generate(engine, [40, *PROMPT], mode="full", **FREE)
    assert generate(engine, PROMPT, mode="full", **{**FREE, "max_new_tokens": 4}).token_ids == before
