"""Keys and values of one slot, and how deep each position has gone.

The layers are cut into S segments at the active exits. ``filled[s]`` counts the positions whose keys and values segment
s holds; it never grows with s, since a position passes the segments in order. The positions between ``filled[s + 1]``
and ``filled[s]`` are *pending* at the boundary behind segment s: their hidden states are held there until a deeper pass
takes them along. Rolling back is cutting these numbers: nothing is moved or cleared.

Shapes: Hkv key/value heads, T capacity in positions, Dh head_dim, D hidden_size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from exitlm.decode.graphs import Recorded


class KeyValueCache:
    """Preallocated ``[2, Hkv, T, Dh]`` per layer, one slot. Block exits have entries of their own after the layers."""

    def __init__(self, entries: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.entries, self.heads, self.head_dim = entries, heads, head_dim
        self.dtype, self.device = dtype, device
        self.capacity = 0
        self.layers: list[Tensor] = []
        self.graphs: dict[tuple[int, ...], Recorded] = {}  # passes recorded over these addresses

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` positions, rounded up to 64 (on a GPU so that it seldom grows again: recorded
        passes are lost then). What was stored is dropped when it grows."""
        if capacity <= self.capacity:
            return
        self.capacity = rounded(capacity) if self.device.type == "cuda" else -(-capacity // 64) * 64
        self.layers, self.graphs = [], {}  # let go of the old memory before taking the new
        shape = (2, self.heads, self.capacity, self.head_dim)
        with torch.inference_mode(False):  # written in and out of inference mode
            self.layers = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(self.entries)]

    def nbytes(self) -> int:
        """Bytes held by all entries."""
        return sum(layer.numel() * layer.element_size() for layer in self.layers)


def rounded(capacity: int, least: int = 1024, most: int = 16384) -> int:
    """The next power of two from ``least`` to ``most``; above that the next multiple of ``most``."""
    if capacity > most:
        return -(-capacity // most) * most
    return int(max(least, 1 << (capacity - 1).bit_length()))


class Depths:
    """``filled`` per segment and the held hidden states per boundary: the whole state of pending tokens."""

    def __init__(
        self, segments: int, capacity: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.filled = [0] * segments
        self.held = [torch.empty(capacity, hidden_size, dtype=dtype, device=device) for _ in range(segments - 1)]
        self.high_water = 0

    @property
    def length(self) -> int:
        """Positions that have passed the first segment."""
        return self.filled[0]

    @property
    def pending(self) -> int:
        """Positions that have not reached the last layer."""
        return self.filled[0] - self.filled[-1]

    def hold(self, boundary: int, hidden_MD: Tensor) -> Tensor:
        """Add what segment ``boundary`` put out to the states held behind it; return all that are held there, in order.

        Must be called after ``filled[boundary]`` was advanced.
        """
        count = self.filled[boundary] - self.filled[boundary + 1]
        held = self.held[boundary]
        if count > len(held):  # a prefill is longer than any run of pending tokens: grow once
            grown = torch.empty(-(-count // 64) * 64, held.shape[1], dtype=held.dtype, device=held.device)
            grown[: count - len(hidden_MD)] = held[: count - len(hidden_MD)]
            self.held[boundary] = held = grown
        held[count - len(hidden_MD) : count] = hidden_MD
        return held[:count]

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on, at every depth."""
        self.filled = [min(count, length) for count in self.filled]


def boundaries(active_exits: Sequence[int], num_hidden_layers: int) -> list[tuple[int, int]]:
    """Segments as (first layer, one past the last layer), 0-based, cut at the active exits below the last layer."""
    cuts = [0, *sorted(e for e in set(active_exits) if e < num_hidden_layers), num_hidden_layers]
    return list(itertools.pairwise(cuts))
