"""Noise of a counter: the exponential variables that decide which token is drawn.

The noise of token v at output position t of choice c is E = -log((w + 1/2) / 2^32), where w is word v % 4 of the block
that Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) makes of the counter
(v // 4, t, c, 0) under the 64 bits of the seed as key, low word first. There is no state: the noise of any token at any
position can be computed alone, in any order, any number of times. The words are the same bits on every device; their
logarithms may differ in the last bit between a CPU and an accelerator.

This file draws no token: see :mod:`exitlm.decode.sampling.sampler`. Shapes: V vocab_size, n token ids, N blocks.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROUNDS = 10
# The constants of Philox4x32: what the words 0 and 2 are multiplied by, and what is added to the key in each round.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)

_MULTIPLIERS = np.array(MULTIPLIERS, np.uint64)[:, None]
_WORD, _SEED = 2**32 - 1, 2**64 - 1
_KEPT = 8  # rows of noise: a position is drawn for as a draft, and again when it is verified


def noise(seed: int, choice: int, position: int, *, vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The noise ``[V]`` of all tokens, in float64 and above 0. It is shared with other callers: don't write to it.

    ``seed`` is a whole number of at most 64 bits, a negative one stands for its two's complement; ``choice`` and
    ``position`` have at most 32 bits.
    """
    return _all(seed & _SEED, choice, position, vocab_size, torch.device(device))


def noise_at(seed: int, choice: int, position: int, ids_n: NDArray[np.int64]) -> NDArray[np.float64]:
    """The noise ``[n]`` of the token ids ``[n]`` alone, in float64; else as :func:`noise`. On the CPU, and in numpy:
    torch's calls cost several times as much as the work for a few tokens."""
    words_4n = philox_numpy(_counters(ids_n >> 2, choice, position), seed & _SEED)
    return _exponential(words_4n[ids_n & 3, np.arange(len(ids_n))].astype(np.float64))


@functools.lru_cache(maxsize=_KEPT)
def _all(seed: int, choice: int, position: int, vocab_size: int, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return _all_torch(seed, choice, position, vocab_size, device)
    words_4N = philox_numpy(_counters(np.arange(-(-vocab_size // 4)), choice, position), seed)
    words_N4 = np.empty(words_4N.T.shape)
    for i, words_N in enumerate(words_4N):
        words_N4[:, i] = words_N  # in half the time of a transposed copy
    return torch.from_numpy(_exponential(words_N4.reshape(-1)[:vocab_size]))


def _all_torch(seed: int, choice: int, position: int, vocab_size: int, device: torch.device) -> Tensor:
    block_N = torch.arange(-(-vocab_size // 4), device=device)
    counter_4N = block_N.new_zeros(4, len(block_N))
    counter_4N[0], counter_4N[1], counter_4N[2] = block_N, position, choice
    words_V = philox_torch(counter_4N, seed).T.flatten()[:vocab_size]
    return -torch.log((words_V.double() + 0.5) * 2.0**-32)


def _counters(block_N: NDArray[np.int64], choice: int, position: int) -> NDArray[np.uint32]:
    """The counters ``[4, N]`` of blocks of four tokens."""
    counter_4N = np.zeros((4, len(block_N)), np.uint32)
    counter_4N[0], counter_4N[1], counter_4N[2] = block_N, position, choice
    return counter_4N


def _exponential(words_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """-log((w + 1/2) / 2^32) of words w, which are overwritten."""
    words_N += 0.5
    words_N *= 2.0**-32
    np.log(words_N, out=words_N)
    return np.negative(words_N, out=words_N)


def philox_numpy(counter_4N: NDArray[np.uint32], key: int) -> NDArray[np.uint32]:
    """The four output words ``[4, N]`` of Philox4x32-10 for counters ``[4, N]``; ``key`` has 64 bits and no sign."""
    even, odd = counter_4N[0::2].copy(), counter_4N[1::2]  # words 0 and 2, words 1 and 3
    round_keys = _round_keys(key)
    products = [np.empty(even.shape, np.uint64) for _ in range(2)]
    halves = [product.view("<u4")[::-1] for product in products]  # what comes of a product changes sides
    for r in range(ROUNDS):
        half = halves[r % 2]
        np.multiply(even, _MULTIPLIERS, out=products[r % 2])
        np.bitwise_xor(half[:, 1::2], odd, out=even)
        np.bitwise_xor(even, round_keys[r], out=even)
        odd = half[:, 0::2]
    out_4N = np.empty_like(counter_4N)
    out_4N[0::2], out_4N[1::2] = even, odd
    return out_4N


def philox_torch(counter_4N: Tensor, key: int) -> Tensor:
    """As :func:`philox_numpy` for int64 that hold words, on any device.

    A product of two words needs 64 bits without a sign, so a word x is taken as x - 2^31. For an odd multiplier m,
    x m = ((x - 2^31) m + 2^31) + 2^32 (m // 2): the term in brackets fits, has the low word of the product, and its
    high word less m // 2.
    """
    multiplier_21 = counter_4N.new_tensor(MULTIPLIERS)[:, None]
    missing_21 = (multiplier_21 // 2).flip(0)
    round_keys = torch.from_numpy(np.stack(_round_keys(key)).astype(np.int64)).to(counter_4N.device)
    even, odd = counter_4N[0::2], counter_4N[1::2]
    for r in range(ROUNDS):
        product = ((even - 2**31) * multiplier_21 + 2**31).flip(0)
        even = (((product >> 32) + missing_21) ^ odd ^ round_keys[r]) & _WORD
        odd = product
    return torch.stack([even[0], odd[0] & _WORD, even[1], odd[1] & _WORD])


@functools.lru_cache(maxsize=256)
def _round_keys(key: int) -> list[NDArray[np.uint32]]:
    """The two words of the key in each round, ``[2, 1]`` each."""
    halves = np.array([key & _WORD, key >> 32])
    return [((halves + r * np.array(WEYL)) & _WORD).astype(np.uint32)[:, None] for r in range(ROUNDS)]
