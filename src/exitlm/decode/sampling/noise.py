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

_WORD, _SEED = 2**32 - 1, 2**64 - 1
_KEPT = 8  # rows of noise: a position is drawn for as a draft, and again when it is verified


def noise(seed: int, choice: int, position: int, *, vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The noise ``[V]`` of all tokens, in float64 and above 0. It is shared with other callers: don't write to it.

    ``seed`` is a whole number of at most 64 bits, a negative one stands for its two's complement; ``choice`` and
    ``position`` have at most 32 bits.
    """
    return _all(seed & _SEED, choice, position, vocab_size, torch.device(device))


def noise_at(seed: int, choice: int, position: int, ids_n: Tensor) -> Tensor:
    """The noise ``[n]`` of the token ids ``[n]`` (int64) alone, in float64 on their device; else as :func:`noise`."""
    words_4n = _words(seed & _SEED, choice, position, ids_n >> 2)
    return _exponential(words_4n.gather(0, (ids_n & 3)[None])[0])


@functools.lru_cache(maxsize=_KEPT)
def _all(seed: int, choice: int, position: int, vocab_size: int, device: torch.device) -> Tensor:
    words_4N = _words(seed, choice, position, torch.arange(-(-vocab_size // 4), device=device))
    words_N4 = words_4N.new_empty(words_4N.shape[1], 4)
    for column_N, words_N in zip(words_N4.unbind(1), words_4N, strict=True):  # faster than a transposed copy
        column_N.copy_(words_N)
    return _exponential(words_N4.flatten()[:vocab_size])


def _words(seed: int, choice: int, position: int, block_N: Tensor) -> Tensor:
    """The words ``[4, N]`` of the blocks ``[N]`` of four tokens each, as numbers in float64."""
    if block_N.device.type == "cpu":
        counter = np.zeros((4, len(block_N)), np.uint32)
        counter[0], counter[1], counter[2] = block_N.numpy(), position, choice
        return torch.from_numpy(philox_numpy(counter, seed).astype(np.float64))
    counter_4N = block_N.new_zeros(4, len(block_N))
    counter_4N[0], counter_4N[1], counter_4N[2] = block_N, position, choice
    return philox_torch(counter_4N, seed).double()


def _exponential(words_N: Tensor) -> Tensor:
    """-log((w + 1/2) / 2^32) of words w, which are overwritten."""
    uniform_N = words_N.add_(0.5).mul_(2.0**-32)
    if uniform_N.device.type == "cpu":  # numpy's logarithm takes half the time of torch's
        values = uniform_N.numpy()
        np.log(values, out=values)
    else:
        uniform_N.log_()
    return uniform_N.neg_()


def philox_numpy(counter_4N: NDArray[np.uint32], key: int) -> NDArray[np.uint32]:
    """The four output words ``[4, N]`` of Philox4x32-10 for counters ``[4, N]``; ``key`` has 64 bits and no sign."""
    multiplier_21 = np.array(MULTIPLIERS, np.uint64)[:, None]
    even, odd = counter_4N[0::2].copy(), counter_4N[1::2]  # words 0 and 2, words 1 and 3
    round_keys = _round_keys(key).astype(np.uint32)
    products = np.empty((2, *even.shape), np.uint64)
    halves = products.view("<u4").reshape(*products.shape, 2)[:, ::-1]  # the words that come of products change sides
    for r in range(ROUNDS):
        np.multiply(even, multiplier_21, out=products[r % 2])
        np.bitwise_xor(halves[r % 2, ..., 1], odd, out=even)
        even ^= round_keys[r]
        odd = halves[r % 2, ..., 0]
    return np.stack([even[0], odd[0], even[1], odd[1]])


def philox_torch(counter_4N: Tensor, key: int) -> Tensor:
    """As :func:`philox_numpy` for int64 that hold words, on any device.

    A product of two words needs 64 bits without a sign, so a word x is taken as x - 2^31. For an odd multiplier m,
    x m = ((x - 2^31) m + 2^31) + 2^32 (m // 2): the term in brackets fits, has the low word of the product, and its
    high word less m // 2.
    """
    multiplier_21 = counter_4N.new_tensor(MULTIPLIERS)[:, None]
    missing_21 = (multiplier_21 // 2).flip(0)
    round_keys = torch.from_numpy(_round_keys(key)).to(counter_4N.device)
    even, odd = counter_4N[0::2], counter_4N[1::2]
    for r in range(ROUNDS):
        product = ((even - 2**31) * multiplier_21 + 2**31).flip(0)
        even = (((product >> 32) + missing_21) ^ odd ^ round_keys[r]) & _WORD
        odd = product
    return torch.stack([even[0], odd[0] & _WORD, even[1], odd[1] & _WORD])


def _round_keys(key: int) -> NDArray[np.int64]:
    """The two words of the key in each round, ``[rounds, 2, 1]``."""
    words: NDArray[np.int64] = (np.array([key & _WORD, key >> 32]) + _STEPS) & _WORD
    return words[..., None]


_STEPS = np.arange(ROUNDS)[:, None] * np.array(WEYL)
