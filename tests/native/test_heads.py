"""What the kernels read of a head's scores, for vocabularies of one and of several stretches: the first of the largest,
whether all are numbers, and the sum of exponentials, alike with any rows beside and on any number of threads."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from exitlm.native import abi
from exitlm.native.pack import RawMatrix
from tests.native.cases import ISAS, Packed, forced, kernels, needs_native, random_rows, threads

pytestmark = needs_native
WIDTHS = (1, 15, 16, 17, 97, 4095, 4096, 4097, 4113, 8192, 12345)
D = 32


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param), threads(1):
        yield request.param


@dataclass(frozen=True)
class Found:
    """Scores ``[M, V]`` of the tokens, and of each row the best token, its score, and the sum of exponentials."""

    scores: NDArray[np.float32]
    best: NDArray[np.int32]
    top: NDArray[np.float32]
    mass: NDArray[np.float32]


def through(weight_VD: NDArray[np.float32], x_MD: NDArray[np.float32]) -> Found:
    width, M = len(weight_VD), len(x_MD)
    matrix = Packed(RawMatrix("F32", weight_VD.astype(np.float32).view(np.uint8), D))
    head, shape = abi.Head(), abi.Shape(D, 1, 1, D, D, 0, 1e-6, 1.0)
    head.first, head.width = matrix.c, width
    scores, best = np.full((M, matrix.c.rows), 7.0, np.float32), np.full(M, -7, np.int32)
    top, mass = np.empty(M, np.float32), np.empty(M, np.float32)
    x_MD = np.ascontiguousarray(x_MD)
    pointers = [each.ctypes.data for each in (x_MD, scores, best, top, mass)]
    kernels().head(shape, head, M, *pointers)
    again = np.empty_like(best), np.empty_like(top)
    kernels().head(shape, head, M, *pointers[:2], again[0].ctypes.data, again[1].ctypes.data, None)
    assert np.array_equal(again[0], best)
    assert np.array_equal(again[1], top, equal_nan=True)
    return Found(scores[:, :width], best, top, mass)


def spread(width: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, (width, D)).astype(np.float32)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_best_token_and_the_sum(isa: str, width: int) -> None:
    """Padding rows, whose scores are zero, are no tokens: with scores below zero none of them wins."""
    x = random_rows(7, D)
    weight = spread(width)
    weight[:, 0], x[:, 0] = -40, np.abs(x[:, 0]) + 1
    found = through(weight, x)
    assert np.allclose(found.scores, x.astype(np.float64) @ weight.T.astype(np.float64), atol=1e-4, rtol=1e-5)
    assert np.array_equal(found.best, found.scores.argmax(1))
    assert np.array_equal(found.top, found.scores.max(1))
    wide = found.scores.astype(np.float64)
    assert np.allclose(found.mass, np.exp(wide - wide.max(1, keepdims=True)).sum(1), rtol=2e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_of_equals_the_first(isa: str, width: int) -> None:
    """In one vector and in several, in the last part of a vector, and in other stretches."""
    x = np.zeros((1, D), np.float32)
    x[0, 0] = 1.0
    rng = np.random.default_rng(width)
    for _ in range(30):
        weight = np.zeros((width, D), np.float32)
        weight[:, 0] = rng.integers(-3, 0, width)
        places = rng.integers(0, width, 4)
        weight[places, 0] = 5.0
        found = through(weight, x)
        assert found.best[0] == places.min()
        assert found.top[0] == 5.0
    assert through(np.zeros((width, D), np.float32), x).best[0] == 0


@pytest.mark.parametrize("width", [97, 4096, 8200])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_with_a_score_that_is_no_number_says_so(isa: str, width: int, value: float) -> None:
    """Wherever it stands; other rows of the pass have theirs."""
    x = np.zeros((3, D), np.float32)
    x[:, 0], x[1, 1] = 1.0, 1.0
    expected = through(spread(width) * (np.arange(D) != 1), x)
    for place in (0, 40, width // 2, width - 1):
        weight = spread(width) * (np.arange(D) != 1).astype(np.float32)
        weight[place, 1] = 1.0
        broken = x.copy()
        broken[1, 1] = value
        found = through(weight, broken)
        assert found.best[1] == -1
        for row in (0, 2):
            assert found.best[row] == expected.best[row]
            assert np.array_equal(found.scores[row], expected.scores[row])
            assert found.mass[row] == expected.mass[row]


def test_scores_that_are_minus_infinity_are_no_numbers(isa: str) -> None:
    x = np.full((1, D), 1.0, np.float32)
    weight = np.full((50, D), -3e38, np.float32)
    assert np.isneginf(through(weight, x).scores).all()
    assert through(weight, x).best[0] == -1


def test_a_row_is_read_alike_with_any_neighbours_and_threads(isa: str) -> None:
    x, weight = random_rows(33, D), spread(9001)
    alone = [through(weight, x[i : i + 1]) for i in range(33)]
    for number, count in ((1, 33), (2, 2), (3, 5), (8, 33)):
        with threads(number):
            found = through(weight, x[:count])
        for row in range(count):
            assert np.array_equal(found.scores[row], alone[row].scores[0])
            assert found.best[row] == alone[row].best[0]
            assert found.top[row] == alone[row].top[0]
            assert found.mass[row] == alone[row].mass[0]


def test_far_apart_scores_have_a_sum_of_one(isa: str) -> None:
    weight = np.zeros((5000, D), np.float32)
    weight[4321, 0] = 3e4
    found = through(weight, np.eye(1, D, dtype=np.float32))
    assert found.best[0] == 4321
    assert found.mass[0] == pytest.approx(1.0, abs=1e-6)
