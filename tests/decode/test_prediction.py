"""Drafts from an expected text: followed, lost and found again; they change no token, and their fate is counted."""

import random
import warnings
from collections.abc import Sequence
from typing import Any

import pytest

from exitlm.decode.generation import GenerationConfig
from exitlm.decode.prediction import Prediction
from exitlm.errors import UserError
from tests.decode.arithmetic import FLOAT64, GRID, Arithmetic, param
from tests.decode.company import Letters
from tests.decode.models import generate, random_ids


def followed(expected: Sequence[int], output: Sequence[int], unverified: Sequence[int], count: int) -> list[int]:
    """What :meth:`Prediction.draft` says, by reading everything again."""
    at: int | None = 0
    lost = 0
    text: list[int] = []
    for token in [*output, *unverified]:
        text.append(token)
        if at is not None and at < len(expected) and expected[at] == token:
            at = lost = at + 1
            continue
        lost = lost if at is None else at
        at = None
        for n in (4, 3, 2):
            ends = [e for e in range(n, len(expected)) if n <= len(text) and list(expected[e - n : e]) == text[-n:]]
            if ends:
                at = next((end for end in ends if end >= lost), ends[-1])
                break
    return [] if at is None else list(expected[at : at + count])


def test_drafts_are_those_of_a_slow_reader() -> None:
    rng, drafted = random.Random(0), 0
    for _ in range(300):
        expected = [rng.randrange(6) for _ in range(rng.randint(0, 30))]
        output = list(expected)
        for _ in range(rng.randint(0, 4)):  # edits
            at = rng.randrange(len(output) + 1)
            output[at : at + rng.randint(0, 2)] = [rng.randrange(6) for _ in range(rng.randint(0, 2))]
        prediction, cut = Prediction(expected), rng.randint(0, len(output))
        for i in range(cut):
            prediction.extend(output[i : i + 1])
        unverified, count = output[cut : cut + rng.randint(0, 3)], rng.randint(0, 9)
        found = prediction.draft(unverified, count)
        assert found == followed(expected, output[:cut], unverified, count)
        drafted += len(found)
    assert drafted > 300


def test_an_edit_is_left_behind() -> None:
    prediction = Prediction([1, 2, 3, 4, 5, 6, 7, 8])
    assert prediction.draft([], 3) == [1, 2, 3]
    prediction.extend([1, 2, 9])
    assert prediction.draft([], 3) == []
    prediction.extend([4, 5])
    assert prediction.draft([], 3) == [6, 7, 8]
    assert prediction.draft([6], 3) == [7, 8]
    assert prediction.draft([9], 3) == []


def test_of_equal_places_the_one_behind_counts() -> None:
    prediction = Prediction([1, 2, 3, 1, 2, 4, 1, 2, 5])
    prediction.extend([1, 2, 3, 9, 1, 2])
    assert prediction.draft([], 2) == [4, 1]


@pytest.mark.parametrize("arithmetic", [param(FLOAT64), param(GRID)])
@pytest.mark.parametrize("adaptive", [True, False])
def test_no_token_depends_on_a_prediction(arithmetic: Arithmetic, adaptive: bool) -> None:
    model = arithmetic.drafting_model("llama")
    engine, rng = arithmetic.engine(model, tokenizer=Letters()), random.Random(1)
    accepted = rejected = 0
    for case in range(12):
        prompt = random_ids(6, case)
        settings: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True, "seed": case, "adaptive": adaptive}
        settings["temperature"] = rng.choice([0.0, 0.8])
        plain = generate(engine, prompt, mode="full", **settings)
        expected = list(plain.token_ids)
        for _ in range(rng.randint(0, 3)):
            expected[rng.randrange(len(expected))] = rng.randrange(97)
        given: Any = expected if rng.random() < 0.5 else Letters().decode(expected)
        found = generate(engine, prompt, prediction=given, draft=rng.choice([["prediction"], ["prediction", "exits"]]),
                         **settings)  # fmt: skip
        assert found.token_ids == plain.token_ids
        stats = found.stats
        assert 0 <= stats.predicted_accepted <= stats.predicted <= stats.drafted
        assert sum(token.source == "prediction" for token in found.trace) == stats.predicted_accepted
        accepted += stats.predicted_accepted
        rejected += stats.predicted - stats.predicted_accepted
    assert accepted > 100
    assert rejected > 0
    counts = engine.accounts.drafts
    assert sum(counts.accepted_at) >= accepted
    assert counts.drafted >= sum(counts.accepted_at) + rejected
    assert counts.accepted_at[0] >= counts.accepted_at[1] >= counts.accepted_at[2]


def test_what_is_right_saves_rounds() -> None:
    model = FLOAT64.drafting_model("llama")
    engine, prompt = FLOAT64.engine(model), random_ids(6, 3)
    plain = generate(engine, prompt, mode="full", max_new_tokens=30, ignore_eos=True)
    found = generate(
        engine, prompt, prediction=plain.token_ids, draft=["prediction"], adaptive=False, max_new_tokens=30,
        ignore_eos=True,
    )  # fmt: skip
    assert found.token_ids == plain.token_ids
    assert found.stats.predicted_accepted >= 26
    assert found.stats.rounds <= 3


def test_predictions_that_are_none() -> None:
    model = FLOAT64.drafting_model("llama")
    engine = FLOAT64.engine(model)
    for value in (5, [1.5], ["a"], object()):
        with pytest.raises(UserError, match="prediction"):
            GenerationConfig(prediction=value)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="UTF-8"):
        GenerationConfig(prediction="\ud800")
    with pytest.raises(UserError, match="tokenizer"):
        generate(engine, [5], prediction="text")
    with pytest.warns(UserWarning, match="prediction has no effect"):
        GenerationConfig(prediction="text", mode="full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = generate(engine, [5, 6], prediction=[7, 9999, 8], adaptive=False, max_new_tokens=4).token_ids
    assert ids == generate(engine, [5, 6], mode="full", max_new_tokens=4).token_ids
