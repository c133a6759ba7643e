"""What the engine needs of whoever runs its passes, in this process or in others, and of the rows that arrive.

Shapes: T rows that are asked for, K rows of an exit's output matrix, V vocab_size, M rows of a pass, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from exitlm.decode.cache.kv_pool import KVPool
from exitlm.decode.kernels.runner import Arrived, Runner
from exitlm.decode.kernels.scores import Scores
from exitlm.model.config import ModelConfig


class Head(Protocol):
    """What is known of an exit head wherever it runs."""

    @property
    def candidate_ids(self) -> Tensor | None:
        """The token ids ``[K]`` that it knows, ascending; None: all."""

    def token(self, index: int) -> int:
        """The token id of a row of its output matrix."""


class Packed(Protocol):
    """What is known of a model as it is run."""

    @property
    def config(self) -> ModelConfig:
        """Of the whole model."""

    @property
    def quant(self) -> str:
        """How matrices are packed."""

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values."""

    @property
    def device(self) -> torch.device:
        """Where hidden states wait."""

    @property
    def kernels_name(self) -> str:
        """What computes."""

    @property
    def note(self) -> str:
        """What the user should know of it; else empty."""

    @property
    def exact(self) -> bool:
        """Whether a row is computed alike whatever runs beside it."""

    @property
    def adapters(self) -> list[str]:
        """The names of those that the exits come from."""

    @property
    def original_context(self) -> int | None:
        """The length beyond which a text has other rotations at all its positions (longrope); None: there is none."""

    @property
    def heads(self) -> Mapping[tuple[str, int], Any]:
        """The exits by adapter and layer."""


class Runs(Protocol):
    """Whoever runs passes."""

    bounds: tuple[int, ...]
    early: tuple[int, ...]

    @property
    def pool(self) -> KVPool:
        """The blocks of keys and values."""

    @property
    def fused(self) -> Packed:
        """The model as it is run."""

    @property
    def segments(self) -> int:
        """How many segments the boundaries cut the layers into."""

    @property
    def reads_runs(self) -> bool:
        """Whether keys in one run of neighbouring blocks are read faster than scattered ones."""

    def head(self, boundary: int, adapter: str | None = None) -> Head:
        """The head of an adapter's exit at a boundary; of the first adapter that has one there (None)."""


class Arrival(Protocol):
    """What a pass brought. ``rows`` are numbers of its rows, ascending."""

    @property
    def hidden_MD(self) -> Tensor | None:
        """Hidden states ``[M, D]`` to keep until they go on; None where another process keeps them."""

    def gates(self, rows: Sequence[int], adapter: str) -> list[float]:
        """The score of the gate of an adapter's exit for some rows."""

    def exit_scores(self, rows: Sequence[int], adapter: str) -> Scores:
        """Logits ``[T, K]`` of an adapter's exit for some rows, with what is read of each."""

    def final_scores(self, rows: Sequence[int]) -> Scores:
        """Logits ``[T, V]`` of the final head for some rows, with what is read of each."""

    def log_probabilities(
        self, rows: Sequence[int], tokens: Sequence[int], most: int
    ) -> list[tuple[float, dict[int, float]]]:
        """The log-probability, by the final head, of the token behind each row, and of the ``most`` likely ones."""


@dataclass(frozen=True, slots=True)
class Here:
    """Rows that a runner of this process brought to a boundary; heads run when they are asked."""

    runner: Runner
    boundary: int
    arrived: Arrived

    @property
    def hidden_MD(self) -> Tensor:
        """Hidden states ``[M, D]``."""
        return self.arrived.hidden_MD

    def gates(self, rows: Sequence[int], adapter: str) -> list[float]:
        """See :class:`Arrival`."""
        return self.runner.gates(self.boundary, self.arrived, rows, adapter)

    def exit_scores(self, rows: Sequence[int], adapter: str) -> Scores:
        """See :class:`Arrival`."""
        return self.runner.exit_scores(self.boundary, self.arrived, rows, adapter)

    def final_scores(self, rows: Sequence[int]) -> Scores:
        """See :class:`Arrival`."""
        return self.runner.final_scores(self.arrived, rows)

    def log_probabilities(
        self, rows: Sequence[int], tokens: Sequence[int], most: int
    ) -> list[tuple[float, dict[int, float]]]:
        """See :class:`Arrival`."""
        return self.runner.log_probabilities(self.arrived, rows, tokens, most)
