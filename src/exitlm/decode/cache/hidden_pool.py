"""Hidden states of pending rows, in numbered slots of one growing table. Knows nothing of sequences or layers.

A row keeps its slot from the boundary where it first waits until it has passed the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HiddenPool:
    """A table ``[slots, D]`` and the slots that are free, the lowest first, so that neighbours get neighbours."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, device: torch.device, capacity: int = 64) -> None:
        self.states_SD = torch.zeros(capacity, hidden_size, dtype=dtype, device=device)
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def used(self) -> int:
        """Slots that are taken."""
        return len(self.states_SD) - len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` free slots; the table doubles when it has not as many."""
        while len(self._free) < count:
            old = len(self.states_SD)
            self.states_SD = torch.cat([self.states_SD, torch.zeros_like(self.states_SD)])
            self._free = list(range(2 * old - 1, old - 1, -1)) + self._free
        if count == 1:
            return [self._free.pop()]
        cut = len(self._free) - count
        taken, self._free = self._free[cut:][::-1], self._free[:cut]
        return taken

    def reach(self, slot: int) -> None:
        """Have a slot of this number: who numbers them is elsewhere."""
        if slot >= len(self.states_SD):
            more = self.states_SD.new_zeros(max(slot + 1, 2 * len(self.states_SD)), self.states_SD.shape[1])
            more[: len(self.states_SD)] = self.states_SD
            self.states_SD = more

    def give_back(self, slots: Sequence[int]) -> None:
        """Free these slots."""
        self._free.extend(reversed(slots))
        if len(self._free) == len(self.states_SD):
            self._free.sort(reverse=True)

    def put(self, slots: Sequence[int], hidden_MD: Tensor) -> None:
        """Store a row in each slot."""
        first = slots[0]
        if slots[-1] - first == len(slots) - 1 and _ascends(slots):
            self.states_SD[first : first + len(slots)] = hidden_MD
        else:
            self.states_SD.index_copy_(0, torch.tensor(slots, device=self.states_SD.device), hidden_MD)

    def get(self, slots: Sequence[int]) -> Tensor:
        """The rows ``[M, D]`` of these slots; a view where they are neighbours, good until the slots are written."""
        first = slots[0]
        if slots[-1] - first == len(slots) - 1 and _ascends(slots):
            return self.states_SD[first : first + len(slots)]
        return self.states_SD.index_select(0, torch.tensor(slots, device=self.states_SD.device))


def _ascends(slots: Sequence[int]) -> bool:
    return all(slots[i + 1] - slots[i] == 1 for i in range(len(slots) - 1))
