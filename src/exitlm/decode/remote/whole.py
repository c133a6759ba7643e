"""What the head process knows of a model whose parts run in several processes: plain data, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exitlm.model.config import ModelConfig
from exitlm.model.exits import ExitHead, ExitKey


@dataclass(frozen=True)
class HeadFacts:
    """What the head process knows of an exit that runs elsewhere."""

    config: Any
    candidate_ids: Tensor | None
    candidate_list: list[int] | None

    @classmethod
    def of(cls, head: ExitHead) -> HeadFacts:
        """Of an exit head."""
        ids = head.candidate_ids
        return cls(head.config, ids, None if ids is None else ids.tolist())

    def token(self, index: int) -> int:
        """The token id of a row of its output matrix."""
        return index if self.candidate_list is None else self.candidate_list[index]


@dataclass(frozen=True)
class Whole:
    """What is known of a model whose parts run in several processes; see :class:`~exitlm.decode.arrival.Packed`."""

    config: ModelConfig
    quant: str
    dtype: torch.dtype
    cache_dtype: torch.dtype
    kernels_name: str
    note: str
    exact: bool
    adapters: list[str]
    heads: Mapping[ExitKey, HeadFacts]
    device: torch.device

    @property
    def original_context(self) -> int | None:
        """The length beyond which a text has other rotations at all its positions (longrope); None: there is none."""
        rope = self.config.rope
        return rope.original_max_position_embeddings if rope.kind == "longrope" else None
