"""The endless sequence of rows that full training reads, and the batches of it.

Row p is a pure function of data, weights, seed and p: which source it comes from, which pass over that source, which
block of it. Nothing is drawn ahead and nothing is remembered: a run goes on at any step at once, a rank reads no rows
but its own, and memory holds the tables of segments, never the text. Files, tokens and packing are
:mod:`exitlm.train.data`.

Without weights all sources are one deck of rows; with weights each is a deck, and decks take turns as a table of
``PERIOD`` rows says, which repeats. A deck is dealt once per epoch, in an order that is a Feistel network over the next
power of two, walked until it falls below the number of rows (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002): constant time and no memory for any row.

Shapes: B rows, T seq_len, N rows that are looked up, S sources.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exitlm.errors import UserError
from exitlm.train.data import Blocks

FORMAT = 1
IGNORED = -100
ROUNDS = 8
LEAST_BITS = 6
# A multiple of 1000, of 9 and of 64: weights such as 0.125, 1/3 or 5% are met exactly.
PERIOD = 72_000

Ints = NDArray[np.int64]
Bits = NDArray[np.uint64]


@dataclass(frozen=True)
class Batch:
    """Rows of token ids. ``labels``: the next token, or ``IGNORED`` where none counts. ``documents``: the number of the
    piece in its row, to keep attention within it; what pads the row is a piece of its own."""

    ids_BT: Tensor
    labels_BT: Tensor
    documents_BT: Tensor


class Stream:
    """Rows p = 0, 1, ... of ``sources``, each row one block. ``weights``: how often each source is drawn, relative to
    the others; none: every row once per epoch. ``shuffle`` False gives the rows of a source in order. ``digest``
    identifies data, weights and ``seq_len``.

    Raises:
        UserError: a weight so small that its source would never come.
    """

    def __init__(
        self,
        sources: Sequence[Blocks],
        *,
        seq_len: int,
        seed: int,
        weights: Sequence[float] = (),
        shuffle: bool = True,
    ) -> None:
        assert len(weights) in (0, len(sources)), "one weight for each source, or none"
        assert all(source.longest() <= seq_len for source in sources), "a block is longer than a row"
        self.sources, self.seq_len, self.shuffle = tuple(sources), seq_len, shuffle
        self._starts = np.cumsum([0, *map(len, sources)])
        self._deck_starts = self._starts[:-1] if weights else self._starts[:1]
        self._deck_sizes = np.diff(self._starts) if weights else self._starts[-1:]
        self._quotas, self._deck_at, self._nth_at = turns(weights or (1.0,))
        assert (self._deck_sizes[self._quotas > 0] > 0).all(), "a source without rows"
        named = [hashlib.sha256(f"{seed} {deck}".encode()).digest() for deck in range(len(self._quotas))]
        self._keys = np.array([int.from_bytes(name[:8]) for name in named], dtype=np.uint64)
        data = [FORMAT, seq_len, self._quotas.tolist(), [source.digest for source in sources]]
        self.digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()

    def __len__(self) -> int:
        """How many rows all sources have: one epoch, where there are no weights."""
        return int(self._starts[-1])

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows, ``[B, T]`` int64 each; nothing else is read.

        Raises:
            UserError: the token cache changed while the run was reading it.
        """
        shape = (len(rows), self.seq_len)
        ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
        documents = torch.zeros(shape, dtype=torch.int64)
        for b, (source, block) in enumerate(self.places(rows)):
            start = 0
            segments = self.sources[source][block]
            for number, segment in enumerate(segments):
                stop = start + len(segment.ids) - 1
                ids[b, start:stop] = segment.ids[:-1]
                labels[b, start + segment.first : stop] = segment.ids[1 + segment.first :]
                documents[b, start:stop] = number
                start = stop
            documents[b, start:] = len(segments)
        return Batch(ids, labels, documents)

    def valid(self, rows: Sequence[int]) -> int:
        """How many labels of these rows count; reads no tokens."""
        return sum(self.sources[source].targets(block) for source, block in self.places(rows))

    def places(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """The source of each row and the block in it."""
        index = np.array(self.indices(rows), dtype=np.int64)
        source = np.searchsorted(self._starts, index, side="right") - 1
        return list(zip(source.tolist(), (index - self._starts[source]).tolist(), strict=True))

    def indices(self, rows: Sequence[int]) -> list[int]:
        """The block of each row, counted through all sources."""
        period, turn = np.divmod(np.array(rows, dtype=np.int64), PERIOD)
        deck = self._deck_at[turn]
        drawn = period * self._quotas[deck] + self._nth_at[turn]  # from the same deck before
        size = self._deck_sizes[deck]
        epoch, place = np.divmod(drawn, size)
        if self.shuffle:
            place = permuted(place, size, _mixed(self._keys[deck] ^ _mixed(epoch.astype(np.uint64))))
        found: list[int] = (self._deck_starts[deck] + place).tolist()
        return found


def turns(weights: Sequence[float]) -> tuple[Ints, Ints, Ints]:
    """How often each source comes in ``PERIOD`` rows ``[S]``: its exact share, rounded up for those with the largest
    remainders. Then, for each of these rows, its source and how many rows of that source come before ``[PERIOD]``: the
    k-th of n is due at (k + 1/2) / n of the period, so that any stretch of rows has about the right mixture."""
    parts = [Fraction(weight) for weight in weights]
    shares = [part / sum(parts) * PERIOD for part in parts]
    if any(0 < share < 1 for share in shares):
        raise UserError(
            f"the smallest of the data weights {list(weights)} comes less than once in {PERIOD} rows; "
            "raise it, or leave its text out"
        )
    quotas = np.array([int(share) for share in shares])
    remainders = np.array([float(share - int(share)) for share in shares])
    quotas[np.argsort(-remainders, kind="stable")[: PERIOD - quotas.sum()]] += 1
    source = np.repeat(np.arange(len(parts)), quotas)
    nth = np.concatenate([np.arange(quota) for quota in quotas])
    order = np.argsort((nth + 0.5) / quotas[source], kind="stable")
    return quotas, source[order], nth[order]


def permuted(places: Ints, counts: Ints, keys: Bits) -> Ints:
    """Where the permutation of ``range(count)`` that a key chooses takes a place; all ``[N]``, each element by itself.

    The halves of an unbalanced Feistel network swap their widths with each round, and ``ROUNDS`` is even. It permutes
    fewer than ``2 * count`` numbers, so that a walk takes less than two steps on average; but ``2 ** LEAST_BITS`` at
    least, since a narrower one prefers some orders.
    """
    bits = np.frexp((counts - 1).astype(np.float64))[1]  # the bit length of count - 1
    bits = np.maximum(bits, LEAST_BITS).astype(np.uint64)
    widths = bits - bits // 2, bits // 2
    masks = [(np.uint64(1) << width) - np.uint64(1) for width in widths]
    round_keys = [_mixed(keys + np.uint64(r)) for r in range(ROUNDS)]
    out = places.astype(np.uint64)
    walking = np.arange(len(out))
    while len(walking):
        x = out[walking]
        left, right = x >> widths[0][walking], x & masks[0][walking]
        for r, key in enumerate(round_keys):
            left, right = right, left ^ (_mixed(right ^ key[walking]) & masks[1 - r % 2][walking])
        out[walking] = x = left << widths[0][walking] | right
        walking = walking[x >= counts[walking].astype(np.uint64)]
    return out.astype(np.int64)


def _mixed(x: Bits) -> Bits:
    """64 bits of which each depends on all of ``x`` (splitmix64: Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
