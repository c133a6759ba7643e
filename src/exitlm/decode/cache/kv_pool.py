"""Keys and values of all sequences: one table of slots per cache entry, cut into numbered blocks.

Every layer is an entry, and so is every block exit. Entries with one attention window form a *group*; a group has block
numbers of its own, since a windowed group gives blocks back that the full ones must keep. A slot is
``block * block_size + offset``. The pool knows nothing of requests; who holds which block stands in block tables.

Shapes: Hkv key/value heads, S slots, Dh head_dim.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exitlm.decode.cache.block_allocator import BlockAllocator
from exitlm.decode.options import EngineConfig
from exitlm.errors import UserError

_MAX_PENDING_ROWS = 64


@dataclass(frozen=True)
class Entry:
    """One cache entry: its attention window (None: all positions) and the segment whose rows fill it."""

    window: int | None
    segment: int


@dataclass(frozen=True)
class Group:
    """Entries with one window. ``segment`` is the last one that fills an entry of the group."""

    window: int | None
    segment: int
    entries: tuple[int, ...]


class KVPool:
    """``stores[i]`` is entry i's table ``[2, Hkv, S, Dh]``; ``allocators[g]`` numbers the blocks of group g."""

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        context: int,
        options: EngineConfig,
        zeroed: bool = False,
        held: Collection[int] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """``context`` is the longest text; ``zeroed`` is for readers of padded slots. ``held``: the entries whose
        tables are here (None: all); those of the others are empty. ``blocks`` of each group (None: as the budget
        allows). Raises :class:`UserError` where the budget holds no block."""
        self.block_size, self.device, self.options = options.block_size, device, options
        self.longest = context
        windows = sorted({entry.window for entry in entries}, key=lambda window: (window is not None, window))
        self.groups = tuple(self._group(entries, window) for window in windows)
        self.group_of = [windows.index(entry.window) for entry in entries]
        self._position_bytes = 2 * heads * head_dim * dtype.itemsize
        self.blocks = self._counts(context) if blocks is None else list(blocks)
        self.allocators = [BlockAllocator(count) for count in self.blocks]
        make = torch.zeros if zeroed else torch.empty  # pages that nobody writes are never touched
        self.held = frozenset(range(len(entries)) if held is None else held)
        slots = [self.blocks[group] * self.block_size * (i in self.held) for i, group in enumerate(self.group_of)]
        with torch.inference_mode(False):  # written in and out of inference mode
            self.stores: list[Tensor] = [make(2, heads, count, head_dim, dtype=dtype, device=device) for count in slots]

    @staticmethod
    def _group(entries: Sequence[Entry], window: int | None) -> Group:
        members = tuple(i for i, entry in enumerate(entries) if entry.window == window)
        return Group(window, max(entries[i].segment for i in members), members)

    def _counts(self, context: int) -> list[int]:
        """Blocks of each group: as many for full attention as the budget allows, and of a windowed group as many as the
        same texts need."""
        budget = self.options.kv_bytes
        if budget is None:
            one, many, memory = self.bytes_for(context), self.bytes_for(16 * 2048), _memory(self.device)
            budget = max(one, min(many, memory // 4))
            if self.device.type == "cuda":  # which takes it at once
                budget = min(budget, memory * 3 // 4)
        low, high = 0, max(1, budget // (self.block_size * self._position_bytes))
        while low < high:  # the most blocks whose bytes fit
            middle = (low + high + 1) // 2
            if self._bytes(middle) <= budget:
                low = middle
            else:
                high = middle - 1
        if low == 0:
            raise UserError(
                f"engine.kv_bytes = {budget} holds not one block of {self.block_size} positions, which takes "
                f"{self._bytes(1)}; raise it"
            )
        return self._per_group(low)

    def _per_group(self, blocks: int) -> list[int]:
        """Blocks of each group beside ``blocks`` of full attention."""
        return [
            blocks if group.window is None else min(blocks, self.options.max_sequences * self._held(group.window))
            for group in self.groups
        ]

    def _held(self, window: int) -> int:
        """Blocks of a windowed group that one text of any length holds at most."""
        rows = window + max(self.options.max_rows, self.options.prefill_chunk) + _MAX_PENDING_ROWS
        return rows // self.block_size + 2

    def _bytes(self, blocks: int) -> int:
        counts = self._per_group(blocks)
        sizes = (len(group.entries) * count for group, count in zip(self.groups, counts, strict=True))
        return sum(sizes) * self.block_size * self._position_bytes

    def bytes_for(self, positions: int) -> int:
        """Bytes of blocks that hold this many positions of one text."""
        return self._bytes(-(-positions // self.block_size))

    def least_bytes(self, positions: int) -> int:
        """The smallest budget with which one text can have this many positions."""
        blocks = -(-positions // self.block_size)
        if all(group.window is not None for group in self.groups):
            blocks = min(blocks, max(self._held(group.window) for group in self.groups if group.window is not None))
        return self._bytes(blocks)

    @property
    def capacity(self) -> int:
        """Positions that one text can have when it is alone."""
        found = _UNBOUNDED
        for group, count in zip(self.groups, self.blocks, strict=True):
            if group.window is None or count < self._held(group.window):
                found = min(found, count * self.block_size)
        return found

    @property
    def bytes(self) -> int:
        """Bytes of all blocks of all entries, wherever their tables are."""
        return self._bytes(max(self.blocks))

    def nbytes(self) -> int:
        """Bytes of all entries, touched or not."""
        return sum(store.numel() * store.element_size() for store in self.stores)

    def copy(self, group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the contents of some blocks to others, in every entry of a group."""
        size, device = self.block_size, self.device
        both = (torch.tensor(blocks, device=device)[:, None] * size for blocks in (sources, targets))
        source, target = ((first + torch.arange(size, device=device)).flatten() for first in both)
        for entry in self.held.intersection(self.groups[group].entries):
            self.stores[entry].index_copy_(2, target, self.stores[entry].index_select(2, source))

    def clear(self, group: int, blocks: Sequence[int]) -> None:
        """Overwrite blocks whose contents may not be numbers: padded reads would meet them."""
        for entry in self.held.intersection(self.groups[group].entries):
            for block in blocks:
                self.stores[entry][:, :, block * self.block_size : (block + 1) * self.block_size] = 0.0


_UNBOUNDED = 1 << 62


def _memory(device: torch.device) -> int:
    """Bytes of memory: what a device has left, or what this machine has."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 4 << 30
