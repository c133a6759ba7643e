"""Values of a caller: each becomes Python's own, or one sentence that names it, its type and what it must be."""

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exitlm.errors import UserError, short
from exitlm.values import flag, number, path_of, paths_of, seed_of, whole, wholes, words


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3)])
def test_whole_numbers(value: Any) -> None:
    assert (whole(value, "n"), type(whole(value, "n"))) == (3, int)
    assert wholes([value, 4], "n") == wholes((value, 4), "n") == wholes(iter([value, 4]), "n") == [3, 4]


def test_whole_numbers_in_collections() -> None:
    for values in (range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), {1, 2}, {1: 0, 2: 0}.keys()):
        assert wholes(values, "n") == [1, 2]


@pytest.mark.parametrize("value", [0.5, 2, Fraction(1, 2), np.float16(0.5), np.array(0.5), torch.tensor(0.5), math.inf])
def test_numbers(value: Any) -> None:
    assert number(value, "x") == float(value)
    assert type(number(value, "x")) is float


def test_switches_words_and_paths(tmp_path: Path) -> None:
    assert flag(np.bool_(True), "f") is flag(torch.tensor(True), "f") is True
    assert words("ab", "w") == words(["ab"], "w") == words(np.array(["ab"]), "w") == ("ab",)
    assert path_of(tmp_path, "p") == str(tmp_path)
    assert paths_of(tmp_path, "p") == paths_of([tmp_path], "p") == [str(tmp_path)]
    assert paths_of([], "p") == []


WRONG: list[tuple[Callable[..., object], Any, str]] = [
    (whole, True, "it is True (bool), but must be a whole number"),
    (whole, np.bool_(True), "it is np.True_ (bool), but must be a whole number"),
    (whole, torch.tensor(True), "it is tensor(True) (Tensor), but must be a whole number"),
    (whole, torch.tensor([3]), "it is tensor([3]) (Tensor), but must be a whole number"),
    (whole, 3.0, "it is 3.0 (float), but must be a whole number"),
    (whole, "3", "it is '3' (str), but must be a whole number"),
    (whole, np.int64, "it is <class 'numpy.int64'> (type), but must be a whole number"),
    (wholes, [1, True], "it is [1, True] (list), but must be a sequence of whole numbers"),
    (wholes, "12", "it is '12' (str), but must be a sequence of whole numbers"),
    (wholes, {1: 2}, "it is {1: 2} (dict), but must be a sequence of whole numbers"),
    (wholes, torch.tensor(3), "it is tensor(3) (Tensor), but must be a sequence of whole numbers"),
    (number, False, "it is False (bool), but must be a number"),
    (number, "0.5", "it is '0.5' (str), but must be a number"),
    (number, 1j, "it is 1j (complex), but must be a number"),
    (number, Decimal("0.5"), "it is Decimal('0.5') (Decimal), but must be a number"),
    (number, 10**400, f"it is {short(10**400)}, but must be a number that a float can hold"),
    (seed_of, 2**64, f"it is {2**64}, but must be a whole number of at most 64 bits"),
    (flag, 1, "it is 1 (int), but must be True or False"),
    (flag, "no", "it is 'no' (str), but must be True or False"),
    (words, b"ab", "it is b'ab' (bytes), but must be a text or a sequence of texts"),
    (words, ["a", 5], "it is ['a', 5] (list), but must be a text or a sequence of texts"),
    (path_of, 5, "it is 5 (int), but must be a path (a text or a pathlib.Path)"),
    (path_of, "", "it is '' (str), but must be a path (a text or a pathlib.Path)"),
    (path_of, "a\0b", "it is 'a\\x00b' (str), but must be a path (a text or a pathlib.Path)"),
    (paths_of, None, "it is None (NoneType), but must be a path or a sequence of paths"),
]


@pytest.mark.parametrize(("check", "value", "sentence"), WRONG)
def test_anything_else_is_one_sentence(check: Callable[..., object], value: Any, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        check(value, "it")
    assert str(refused.value) == sentence


def test_a_least_number() -> None:
    assert whole(0, "n", least=0) == 0
    with pytest.raises(UserError, match="n is -1, but must be a whole number from 0"):
        whole(-1, "n", least=0)


def test_long_values_are_shown_on_one_short_line() -> None:
    for value in (list(range(1000)), "x" * 1000, torch.zeros(9, 9), {i: i for i in range(99)}, [10**5000]):
        assert len(short(value)) < 100
        assert "\n" not in short(value)
