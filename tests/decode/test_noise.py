"""Philox against its published vectors and a reference in plain numbers; noise: its law, and that nothing in it leans
on its neighbours."""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exitlm.decode.sampling import noise as noise_module
from exitlm.decode.sampling.noise import noise, noise_at, philox_numpy, philox_torch
from tests.decode.chance import chi_square, contingency, rejected

Philox = Callable[[list[list[int]], int], list[list[int]]]

# philox4x32-10 in kat_vectors of Random123: counter, key, output
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def by_numpy(counters: list[list[int]], key: int) -> list[list[int]]:
    """One block for each counter of four words."""
    found: list[list[int]] = philox_numpy(np.array(counters, np.uint32).T, key).T.tolist()
    return found


def by_torch(counters: list[list[int]], key: int) -> list[list[int]]:
    """The same in torch."""
    found: list[list[int]] = philox_torch(torch.tensor(counters).T, key).T.tolist()
    return found


def in_plain_numbers(counters: list[list[int]], key: int) -> list[list[int]]:
    """The same in Python's whole numbers, as the paper writes it."""
    found = []
    for a, b, c, d in counters:
        k, m = key % 2**32, key >> 32
        for _ in range(10):
            p, q = a * 0xD2511F53, c * 0xCD9E8D57
            a, b, c, d = (q >> 32) ^ b ^ k, q % 2**32, (p >> 32) ^ d ^ m, p % 2**32
            k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
        found.append([a, b, c, d])
    return found


@pytest.mark.parametrize("philox", [by_numpy, by_torch, in_plain_numbers])
@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_published_vectors(philox: Philox, counter: str, key: str, output: str) -> None:
    words, (low, high), expected = ([int(word, 16) for word in text.split()] for text in (counter, key, output))
    assert philox([words], low | high << 32) == [expected]


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(
    counters=st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4), min_size=1, max_size=20),
    key=st.integers(0, 2**64 - 1),
)
def test_any_device_makes_the_same_words(counters: list[list[int]], key: int) -> None:
    assert by_numpy(counters, key) == by_torch(counters, key) == in_plain_numbers(counters, key)


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    choice=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**32 - 1),
    vocab_size=st.integers(1, 40),
)
def test_noise_is_what_it_is_defined_as(seed: int, choice: int, position: int, vocab_size: int) -> None:
    expected = []
    for v in range(vocab_size):
        (block,) = in_plain_numbers([[v // 4, position, choice, 0]], seed % 2**64)
        expected.append(-math.log((block[v % 4] + 0.5) / 2**32))
    found = noise(seed, choice, position, vocab_size=vocab_size)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-14)


def test_a_negative_seed_is_its_twos_complement() -> None:
    assert noise(-1, 0, 3, vocab_size=9).equal(noise(2**64 - 1, 0, 3, vocab_size=9))
    assert noise(-(2**63), 1, 3, vocab_size=9).equal(noise(2**63, 1, 3, vocab_size=9))
    assert not noise(-1, 0, 3, vocab_size=9).equal(noise(2**32 - 1, 0, 3, vocab_size=9))


def test_noise_of_some_tokens_is_that_of_all() -> None:
    rng = random.Random(0)
    for case in range(50):
        vocab_size = rng.choice([1, 2, 5, 100, 5003])
        ids = [rng.randrange(vocab_size) for _ in range(rng.choice([0, 1, 3, 8, 77]))]
        everything = noise(case, case % 3, 2 * case, vocab_size=vocab_size)
        assert noise_at(case, case % 3, 2 * case, np.array(ids, np.int64)).tolist() == everything[ids].tolist()
        assert noise(case, case % 3, 2 * case, vocab_size=vocab_size + 3)[:vocab_size].equal(everything)


def test_an_accelerator_makes_the_same_noise() -> None:
    for case, vocab_size in enumerate((1, 7, 100, 5003)):
        found = noise_module._all_torch(2**63 + case, case, 9, vocab_size, torch.device("cpu"))
        assert torch.allclose(found, noise(2**63 + case, case, 9, vocab_size=vocab_size), rtol=1e-15, atol=0)


def test_the_smallest_and_the_largest_word_make_finite_noise_above_zero() -> None:
    found = noise_module._exponential(np.array([0.0, 2.0**32 - 1]))
    assert found.tolist() == pytest.approx([33 * math.log(2), 2.0**-33], rel=1e-6)


def test_noise_is_exponential() -> None:
    """In 64 cells of equal probability, over tokens, positions, seeds and choices."""
    parts = {
        "tokens": noise(3, 0, 0, vocab_size=20_000),
        "positions": torch.cat([noise(3, 0, t, vocab_size=20) for t in range(1000)]),
        "seeds": torch.cat([noise(seed, 0, 5, vocab_size=20) for seed in range(1000)]),
        "choices": torch.cat([noise(3, choice, 5, vocab_size=20) for choice in range(1000)]),
    }
    p_values = {}
    for name, values in parts.items():
        cells = ((-values).exp() * 64).long().clamp(max=63)
        p_values[name] = chi_square(torch.bincount(cells, minlength=64).tolist(), [1 / 64] * 64)
    assert rejected(p_values) == []


KINDS = 6  # tokens, so that one and a half blocks take part


def winners(at: Callable[[int], tuple[int, int, int]], runs: int) -> Tensor:
    """The token that wins among ``KINDS`` equals, in each run."""
    return torch.stack([noise(*at(i), vocab_size=KINDS).argmin() for i in range(runs)])


@pytest.mark.parametrize("runs", [400, pytest.param(4_000, marks=pytest.mark.slow)])
def test_neighbours_do_not_depend_on_each_other(runs: int) -> None:
    texts = winners(lambda i: (i, 0, 7), runs + 1)  # the same position of texts with successive seeds
    text = winners(lambda i: (5, 0, i), runs + 1)  # successive positions of one text
    pairs = {"a position and the next": (text[:-1], text[1:]), "a seed and the next": (texts[:-1], texts[1:])}
    for distance in (1, 3, 2**16):
        for name, at in {
            "positions": lambda i, d=distance: (i, 0, 7 + d),
            "choices": lambda i, d=distance: (i, d, 7),
            "high words of seeds": lambda i, d=distance: (i + (d << 32), 0, 7),
        }.items():
            pairs[f"{name} {distance} apart"] = (texts[:-1], winners(at, runs))
        pairs[f"seeds {distance} apart"] = (text[:-1], winners(lambda i, d=distance: (5 + d, 0, i), runs))  # type: ignore[misc]
    pairs["position and choice exchanged"] = (winners(lambda i: (i, 7, 0), runs), texts[:-1])
    row = (noise(1, 0, 0, vocab_size=9 * runs) < math.log(2)).long().view(runs, 9)
    for distance in (1, 2, 3, 4, 8):
        pairs[f"tokens {distance} apart"] = (row[:, 0], row[:, distance])
    p_values = {
        name: contingency(*pair, kinds=2 if name.startswith("tokens") else KINDS) for name, pair in pairs.items()
    }
    assert rejected(p_values) == []


def test_the_test_of_neighbours_notices_noise_that_forgets_the_choice() -> None:
    first = winners(lambda i: (i, 0, 7), 400)
    second = torch.where(torch.arange(400) % 4 == 0, first, winners(lambda i: (i, 1, 7), 400))
    assert rejected({"one in four": contingency(first, second, KINDS)})
