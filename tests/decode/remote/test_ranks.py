"""Stages of several tensor ranks, each a process of its own: the texts of one process in float64, whoever is killed.

The parts of a model that ranks hold are compared with the whole one in ``test_tensor_model.py``; here they run behind
the whole engine.
"""

import random
import subprocess
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import exitlm
from exitlm import UserError
from exitlm.model.exits import ExitConfig
from exitlm.parallel.tensor import check_tensor
from exitlm.weights.export import export
from tests.decode.models import attach, fade, fit_lenses
from tests.decode.remote.processes import (
    KINDS,
    LENSES,
    children_of,
    children_of_process,
    engine_of,
    is_gone,
    kill_process,
    texts,
    write_model,
)
from tests.decode.remote.test_lost import decode, requests
from tests.decode.tensor_cases import KINDS as ALL_KINDS
from tests.decode.tensor_cases import OUTPUTS, cuttable
from tests.model.families import tiny_model

pytestmark = pytest.mark.usefixtures("cache")
FLOAT64: dict[str, Any] = {"dtype": "float64", "quant": "none"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its exits, and over how many processes it is spread."""

    pipeline: int
    tensor: int = 2
    family: str = "llama"
    exits: tuple[ExitConfig, ...] = KINDS
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.family}, {self.pipeline} x {self.tensor}, {self.seed}"


def drawn(seed: int) -> Case:
    """Any family that training cuts, any kinds of exits, tied or not, two or four ranks."""
    rng = random.Random(f"ranks {seed}")
    family = rng.choice(cuttable())
    candidates = rng.choice((0, 17, 40))
    exits = tuple(
        ExitConfig(
            layer=layer, kind=(kind := rng.choice(ALL_KINDS)), output=(output := rng.choice(OUTPUTS)), rank=5,
            candidates=candidates if output == "exits" else rng.choice((0, 0, 3, 17, 40)), gate=rng.random() < 0.4,
            branch=kind == "lens" and rng.random() < 0.4,
        )
        for layer in sorted(rng.sample(range(1, 4), rng.randint(1, 3)))
    )  # fmt: skip
    settings: dict[str, Any] = {"tie_word_embeddings": rng.random() < 0.5, "vocab_size": rng.choice((97, 100))}
    tensor = rng.choice((2, 2, 4))
    if tensor == 4:
        settings["num_key_value_heads"] = 4
    return Case(
        pipeline=rng.choice((1, 1, 2)), tensor=tensor, family=family, exits=exits, settings=settings, seed=seed
    )  # fmt: skip


WINDOWS = Case(pipeline=2, family="gemma3_text", exits=LENSES, seed=1)  # and four norms around a layer
MANY = [Case(pipeline=1), *map(drawn, range(20))]


@pytest.mark.parametrize("case", [WINDOWS, *(pytest.param(each, marks=pytest.mark.slow) for each in MANY)], ids=str)
def test_texts_of_ranks_are_those_of_one_process(case: Case, tmp_path: Path) -> None:
    directory, some = tmp_path / "model", requests(9, case.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = fade(tiny_model(case.family, seed=case.seed, **case.settings), 3, 0.5)
        export(fit_lenses(attach(model, case.exits, case.seed), case.seed).float(), directory)
        expected = texts(exitlm.load(directory, **FLOAT64), some)
    several = exitlm.load(directory, engine={"pipeline": case.pipeline, "tensor": case.tensor}, **FLOAT64)
    try:
        engine = engine_of(several)
        firsts = children_of(engine)
        assert len(firsts) == case.pipeline  # no stage is this process
        ranks = [pid for first in firsts.values() for pid in children_of_process(first)]
        assert len(ranks) == case.pipeline * (case.tensor - 1)
        assert texts(several, some) == expected
        assert engine.lost == 0
        assert f"of {case.tensor} ranks" in engine.fused.kernels_name
    finally:
        several.close()
    assert all(map(is_gone, firsts.values()))


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_its_stage_which_is_replaced(tmp_path: Path, times: int) -> None:
    """Grouped heads, a tied output matrix, candidates, and three kinds of exits."""
    directory, some = write_model(tmp_path / "model", tie_word_embeddings=True), requests(9, 3)
    expected = texts(exitlm.load(directory, **FLOAT64), some)
    several = exitlm.load(directory, engine={"tensor": 2}, **FLOAT64)
    try:
        engine = engine_of(several)

        def end(number: int) -> None:
            first = children_of(engine)[number]
            (second,) = children_of_process(first)
            kill_process(second)
            ends.append((first, second))

        for _ in range(times):
            ends = list[tuple[int, int]]()
            with pytest.warns(UserWarning, match="stage 1 of 1 was lost"):
                assert decode(engine, some, {5: 0}, end) == expected
            assert all(is_gone(pid) for pids in ends for pid in pids)
        assert engine.lost == times
    finally:
        several.close()


@pytest.mark.parametrize(("family", "tensor"), [("llama", 3), ("llama", 4), ("phi3", 2), ("olmo2", 2)])
def test_what_training_refuses_is_refused_before_a_process_is_started(
    family: str, tensor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    with pytest.raises(UserError) as expected:
        check_tensor(model.config, [], tensor, False, 0)
    export(model.float(), tmp_path / "model")
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(UserError) as caught:
        exitlm.load(tmp_path / "model", engine={"tensor": tensor}).generate([1, 2])
    assert str(caught.value) == str(expected.value)
