"""Texts that begin alike: the later one computes only the rest, and gets the text and the scores that it gets alone."""

import functools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from exitlm.decode.batch import Batch
from exitlm.decode.engine import Engine
from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.decode.kernels.runner import Arrived, Runner
from exitlm.decode.options import EngineConfig
from exitlm.decode.sequence import Draft
from exitlm.decode.sequence import Sequence as Text
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.company import check_state
from tests.decode.models import attach, fade, fit_lenses, greedy_reference, make_engine, random_ids
from tests.decode.test_many import MODES, check_idle, config
from tests.model.families import FAMILIES, tiny_model

SIZE = 4


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each pass takes from the embedding."""
    found: list[int] = []
    run = Runner.run

    def spy(self: Runner, first: int, last: int, batch: Batch, hidden: Tensor) -> Arrived:
        if first == 0:
            found.append(batch.count)
        return run(self, first, last, batch, hidden)

    monkeypatch.setattr(Runner, "run", spy)
    return found


@functools.cache
def blocks_model(family: str) -> EarlyExitModel:
    """With a block exit, whose keys are shared like a layer's."""
    model = fade(tiny_model(family, torch.float64, 5), 3, 0.5)
    return fit_lenses(
        attach(model, [ExitConfig(layer=1, kind="block"), ExitConfig(layer=2), ExitConfig(layer=3)], 5), 5
    )


def sharing(model: EarlyExitModel, **over: Any) -> Engine:
    """An engine with small blocks."""
    return make_engine(model, options=EngineConfig(**{"block_size": SIZE, **over}))


def check_alike(mine: Generation, its: Generation) -> None:
    """The same text, and scores to rounding."""
    assert mine.token_ids == its.token_ids
    if mine.stats.mode != "lossless":
        assert mine.exit_layers == its.exit_layers
    for a, b in zip(mine.trace, its.trace, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-12)
        if mine.stats.mode != "lossless":
            assert a.confidence == pytest.approx(b.confidence, abs=1e-12)


def alone(model: EarlyExitModel, prompt: Sequence[int], chosen: GenerationConfig) -> Generation:
    """What a prompt gets where nothing is shared."""
    return sharing(model, prefix_sharing=False).generate(prompt, chosen)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_begins_like_a_finished_text_computes_only_the_rest(
    family: str, mode: str, rows: list[int]
) -> None:
    model = blocks_model(family)
    engine, rng = sharing(model), random.Random(f"{family} {mode}")
    stem = random_ids(30, rng.randrange(999))
    engine.generate(stem, config(rng.choice(list(MODES))))
    for kept in (30, 17, 3):
        prompt = stem[:kept] + random_ids(rng.randint(0, 6), rng.randrange(999))
        first = next((i for i, (a, b) in enumerate(zip(prompt, stem, strict=False)) if a != b), min(len(prompt), 30))
        whole = min(first, len(prompt) - 1) // SIZE * SIZE  # the newest token always runs
        rows.clear()
        chosen = config(mode, logprobs=1, max_new_tokens=6)
        out = engine.generate(prompt, chosen)
        assert out.stats.shared_tokens >= whole  # more, where texts of the turns before went on alike
        assert rows[0] == len(prompt) - out.stats.shared_tokens
        assert out.stats.shared_tokens < len(prompt)
        check_alike(out, alone(model, prompt, chosen))
        check_idle(engine)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_prompt_that_begins_like_a_running_text(family: str, mode: str, rows: list[int]) -> None:
    """Of a text that runs, what has passed all layers is shared, and of a window what it still holds or left behind."""
    model = blocks_model(family)
    engine = sharing(model)
    stem = random_ids(22, 7)
    chosen = config(mode, max_new_tokens=20, logprobs=1, max_pending=3)
    first = engine.add(stem, chosen)
    found: dict[int, Generation] = {}
    begun: dict[int, list[int]] = {first: stem}
    for step in range(400):
        if step in (1, 4, 9):
            prompt = [*engine.roster.running[0].ids, 7, 8]
            begun[engine.add(prompt, chosen)] = prompt
        for event in engine.step():
            if event.generation is not None:
                found[event.key] = event.generation
        if step % 3 == 0:
            check_state(engine, model)
        if len(found) == 4:
            break
    for key, prompt in begun.items():
        check_alike(found[key], alone(model, prompt, chosen))
        if key != first:
            assert found[key].stats.shared_tokens >= 20
            assert found[key].stats.shared_tokens % SIZE == 0
    assert min(rows) < SIZE + 3
    check_idle(engine)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_generated_tokens_are_shared_as_well(family: str, mode: str, rows: list[int]) -> None:
    """A chat: each turn's prompt is the whole text so far."""
    model = blocks_model(family)
    engine, text, chosen = sharing(model), random_ids(6, 3), config(mode, logprobs=1, max_pending=1)
    for turn in range(4):
        rows.clear()
        out = engine.generate(text, chosen)
        check_alike(out, alone(model, text, chosen))
        if turn:
            known = len(text) - 3  # that is what this turn adds; the last token of the turn before has no keys
            pending = 2 if mode == "threshold" else 0
            assert out.stats.shared_tokens >= (known - 1 - pending) // SIZE * SIZE
            assert rows[0] == len(text) - out.stats.shared_tokens
        text = text + out.token_ids + random_ids(3, turn)
    assert engine.memory.pool.allocators[0].cached > 8


@pytest.mark.parametrize("mode", MODES)
def test_a_text_of_one_pass_is_shared(mode: str) -> None:
    engine = sharing(blocks_model("llama"))
    prompt = random_ids(20)
    for shared in (0, 16, 16):
        assert engine.generate(prompt, config(mode, max_new_tokens=1)).stats.shared_tokens == shared


def test_tokens_that_are_pending_or_refused_are_not_shared() -> None:
    """Their keys are not filled at every depth, or are not of the text."""
    model = blocks_model("llama")
    for mode in ("threshold", "lossless"):
        engine = sharing(model)
        engine.add(random_ids(9), config(mode, threshold=0.0, max_new_tokens=40))
        most = 0
        for step in range(40):
            engine.step()
            if not engine.roster.running:
                break
            for sequence in engine.roster.running:
                most = max(most, sequence.pending)
                assert sequence.published * SIZE <= min(sequence.filled[-1], len(sequence.ids))
            check_state(engine, model)
            if step % 8 != 7:  # alone, so that no other's deep passes take pending rows along
                continue
            prompt = [*engine.roster.running[0].ids, 5]
            out = engine.generate(prompt, config("full", max_new_tokens=2, logprobs=1))
            check_alike(out, alone(model, prompt, config("full", max_new_tokens=2, logprobs=1)))
        assert most > SIZE


def test_equal_prompts_that_come_together_share_where_they_are_choices(rows: list[int]) -> None:
    """The others wait until the first has computed the prompt."""
    engine = sharing(blocks_model("llama"))
    out = engine.generate(random_ids(21), config("full", temperature=1.0, seed=1, n=5))
    assert [choice.stats.shared_tokens for choice in out.choices] == [0, 20, 20, 20, 20]
    assert rows[:2] == [21, 1 + 4]


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_what_was_evicted_is_computed_again(family: str, rows: list[int]) -> None:
    model = blocks_model(family)
    stem, chosen = random_ids(28, 1), config("lossless", logprobs=1)
    room = sharing(model).memory.pool.bytes_for(48)
    engine = sharing(model, kv_bytes=room, prefill_chunk=16, max_rows=16, max_sequences=8)
    expected = alone(model, stem, chosen)
    engine.generate(stem, chosen)
    assert engine.generate(stem, chosen).stats.shared_tokens == 24
    seen = set()
    for other in range(2, 9):
        engine.generate(random_ids(5 * (other % 5 + 1), other), chosen)
        out = engine.generate(stem, chosen)
        check_alike(out, expected)
        seen.add(out.stats.shared_tokens)
        check_idle(engine)
    assert len(seen) > 1
    engine.generate(random_ids(35, 99), chosen)
    rows.clear()
    out = engine.generate(stem, chosen)
    check_alike(out, expected)
    assert sum(rows[: 2 if out.stats.shared_tokens < 12 else 1]) == 28 - out.stats.shared_tokens


def test_nothing_is_shared_where_it_is_off_or_scores_are_wanted(rows: list[int]) -> None:
    model, prompt = blocks_model("llama"), random_ids(20)
    for engine, over in ((sharing(model, prefix_sharing=False), {}), (sharing(model), {"prompt_logprobs": 0})):
        for _ in range(2):
            rows.clear()
            assert engine.generate(prompt, config("full", **over)).stats.shared_tokens == 0
            assert rows[0] == 20


# ---- longrope: two sets of rotations


ORIGINAL = 16


@functools.cache
def longrope() -> EarlyExitModel:
    """A phi3 whose rotations change where a text passes 16 tokens."""
    settings = {
        "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0],
        "factor": 8.0,
    }  # fmt: skip
    model = tiny_model("phi3", rope_parameters=settings, original_max_position_embeddings=ORIGINAL)
    return fit_lenses(attach(fade(model, 3, 0.4), [ExitConfig(layer=1), ExitConfig(layer=2)]))


@pytest.mark.parametrize("mode", ["full", "lossless"])
def test_stretched_texts_and_others_share_no_blocks(mode: str) -> None:
    model = longrope()
    engine, stem = sharing(model), random_ids(12, 2)
    short, long = stem, stem + random_ids(20, 3)
    chosen = config(mode, max_new_tokens=3, logprobs=1)
    for turn in range(2):
        outs = [engine.generate(prompt, chosen) for prompt in (short, long)]
        assert [out.stats.shared_tokens for out in outs] == ([8, 28] if turn else [0, 0])
        for out, prompt in zip(outs, (short, long), strict=True):
            check_alike(out, alone(model, prompt, chosen))
            assert out.token_ids == greedy_reference(model, prompt, 3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [9, 16, 17])
def test_a_text_that_passes_the_original_context_is_computed_again(mode: str, length: int, rows: list[int]) -> None:
    """And shares the stretched blocks of an earlier text, if it has any."""
    model = longrope()
    engine, prompt = sharing(model), random_ids(length, 4)
    chosen = config(mode, max_new_tokens=24, logprobs=1)
    expected = alone(model, prompt, chosen)
    if mode != "threshold":
        assert expected.token_ids == greedy_reference(model, prompt, 24)
    for turn in range(2):
        rows.clear()
        out = engine.generate(prompt, chosen)
        check_alike(out, expected)
        assert out.stats.preemptions == (length <= ORIGINAL)
        if length <= ORIGINAL and not turn:
            assert ORIGINAL in rows  # all but the newest, in other rotations
        if turn:
            assert out.stats.shared_tokens >= length // SIZE * SIZE - SIZE
        check_idle(engine)


@pytest.mark.parametrize("draft", ["exits", "lookup"])
def test_drafts_do_not_cross_into_other_rotations(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    extend = Text.extend_drafts

    def spy(self: Text, drafts: Sequence[Draft]) -> bool:
        found = extend(self, drafts)
        lengths.append(self.length)
        assert self.stretched or self.length <= ORIGINAL
        return found

    monkeypatch.setattr(Text, "extend_drafts", spy)
    model, prompt = longrope(), random_ids(3, 4) * 3
    for max_draft in (2, 6):
        chosen = config("lossless", max_new_tokens=40, draft=draft, max_draft=max_draft, threshold=0.0)
        out = sharing(model).generate(prompt, chosen)
        assert out.token_ids == greedy_reference(model, prompt, 40)
    assert max(lengths) > ORIGINAL
    assert min(lengths) <= ORIGINAL
