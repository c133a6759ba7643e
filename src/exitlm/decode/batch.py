"""The rows of one pass, as plain data: which positions of which sequences, and where their keys and values lie.

A pass takes rows of any number of sequences through the same layers. Everything that a runner must know about them is
here, decided by the engine; a runner keeps no table of sequences. Nothing here knows models or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

Run = tuple[int, int]
"""A run of neighbouring slots of a pool: the first one, and how many."""


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one sequence: positions ``start`` to ``start + count - 1``.

    Per group of cache entries (see :class:`~exitlm.decode.cache.kv_pool.KVPool`): ``reads`` are the slots of the
    positions from ``firsts`` up to the newest of these rows, ``writes`` those of the rows. ``stretched`` says
    which rotations the sequence has, where they depend on the length of the text (longrope).
    """

    start: int
    count: int
    firsts: tuple[int, ...]
    reads: tuple[tuple[Run, ...], ...]
    writes: tuple[tuple[Run, ...], ...]
    stretched: bool = False

    @property
    def end(self) -> int:
        """One past the newest position."""
        return self.start + self.count

    def blocks(self, group: int, block_size: int) -> list[int]:
        """The block of every ``block_size`` positions up to the newest row; 0 for those that are not read any more."""
        found = [0] * (self.firsts[group] // block_size)
        for first, count in self.reads[group]:  # only the first run may begin, and the last one end, within a block
            found += range(first // block_size, (first + count - 1) // block_size + 1)
        return found


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a pass in order: those of each part, one part after the other."""

    parts: tuple[Part, ...]
    count: int

    @classmethod
    def of(cls, parts: tuple[Part, ...]) -> Batch:
        """A batch of these parts."""
        return cls(parts, sum(part.count for part in parts))
