"""What full decoding takes by the times of single passes, and what the user is told where ``threshold`` was slower."""

import math
from typing import Any

import pytest

from exitlm.decode.engine import Engine
from exitlm.decode.generation import GenerationConfig, Stats
from exitlm.decode.pricing.pass_times import PassTimes
from tests.decode.models import drafting_model, make_engine, random_ids


def test_the_quickest_chain_of_passes_counts() -> None:
    times = PassTimes()
    assert math.isnan(times.full(3))
    for first, last, seconds in ((0, 1, 2.0), (1, 3, 5.0), (2, 3, 1.0)):
        times.add(first, last, seconds)
    assert math.isnan(times.full(3))
    times.add_head(0.5)
    assert times.full(3) == 7.5
    times.add(1, 2, 1.0)
    assert times.full(3) == 4.5
    assert math.isnan(times.full(4))


def test_times_follow_the_machine() -> None:
    times = PassTimes()
    for seconds in [1.0] * 50 + [2.0] * 50:
        times.add(0, 1, seconds)
        times.add_head(seconds)
    assert times.full(1) == pytest.approx(4.0, rel=0.02)


def judged(times: PassTimes, tokens_per_second: float, **over: Any) -> str:
    """The note after a text of this speed, where a token takes 0.1 seconds through all layers."""
    stats: dict[str, Any] = {"mode": "threshold", "tokens": 32, "mean_layers": 2.5, **over}
    times.judge(Stats(tokens_per_second=tokens_per_second, **stats), (0, 1, 4))
    return times.note


@pytest.fixture
def tenth() -> PassTimes:
    times = PassTimes()
    times.add(0, 1, 0.02)
    times.add(1, 2, 0.05)
    times.add_head(0.03)
    return times


def test_the_note_comes_where_a_text_was_slower_and_goes_with_one_that_was_not(tenth: PassTimes) -> None:
    assert judged(tenth, 9.6) == ""
    note = judged(tenth, 9.4)
    assert note.startswith("mode threshold ran at 0.94 times the speed of full")
    assert "left at 2.5 of 4 layers on average" in note
    assert judged(tenth, 9.9) == note  # nearly as fast: what was said stays
    assert "0.50 times" in judged(tenth, 5.0)
    assert judged(tenth, 10.1) == ""


@pytest.mark.parametrize("over", [{"mode": "full"}, {"mode": "lossless"}, {"tokens": 31}])
def test_other_modes_and_short_texts_are_not_judged(tenth: PassTimes, over: dict[str, Any]) -> None:
    assert judged(tenth, 1.0, **over) == ""
    note = judged(tenth, 1.0)
    assert judged(tenth, 100.0, **over) == note != ""


def test_what_is_not_known_changes_no_note(tenth: PassTimes) -> None:
    assert judged(PassTimes(), 1e-9) == ""
    note = judged(tenth, 1.0)
    assert judged(tenth, math.nan) == note != ""


LATE: dict[str, Any] = {"rule": "probability", "threshold": 1.0, "ignore_eos": True, "max_new_tokens": 40}


def decode(engine: Engine, full: float, monkeypatch: pytest.MonkeyPatch, prompts: int = 1, **over: Any) -> list[str]:
    """Decode prompts together with passes that are said to take so many seconds in full; what is noted of speed."""
    monkeypatch.setattr(PassTimes, "full", lambda self, end: full if end == engine.runner.segments else math.nan)
    config = GenerationConfig(**{"mode": "threshold", **LATE, **over})
    engine.generate_all([(random_ids(5, i), config) for i in range(prompts)])
    return [note for note in engine.notes if "the speed of full" in note]


FAST, SLOW = 1e-12, 1e12  # seconds of a token in full, against which any text is slow, or fast


def test_the_engine_notes_where_threshold_was_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(drafting_model("llama"))
    assert decode(engine, SLOW, monkeypatch) == []
    (note,) = decode(engine, FAST, monkeypatch)
    assert "tokens left at 4.0 of 4 layers on average" in note
    assert decode(engine, math.nan, monkeypatch) == [note]
    assert decode(engine, SLOW, monkeypatch) == []


@pytest.mark.parametrize(
    "over", [{"mode": "full"}, {"mode": "lossless"}, {"max_new_tokens": 31}, {"prompts": 2}], ids=str
)
def test_the_engine_judges_only_threshold_and_only_alone(over: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode(make_engine(drafting_model("llama")), FAST, monkeypatch, **over) == []


def test_only_passes_of_one_row_are_timed() -> None:
    prompts = [(random_ids(5, i), GenerationConfig(mode="full", ignore_eos=True, max_new_tokens=9)) for i in range(2)]
    engine = make_engine(drafting_model("llama"))
    engine.generate_all(prompts)
    assert math.isnan(engine.accounts.times.full(engine.runner.segments))
    engine.generate(*prompts[0])
    assert engine.accounts.times.full(engine.runner.segments) > 0.0
