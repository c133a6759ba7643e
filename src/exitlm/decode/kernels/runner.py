"""Runs passes: a range of segments with the exit heads at their ends, on the rows of a batch.

A runner knows models and the pool of keys and values, and nothing of sequences or policy. Segment s lies between
boundaries s and s + 1; boundary 0 is the embedding and the last one the end of the model. A boundary is a layer at
which any adapter has an exit. In every pass and mode each row leaves its key at the block exits that it passes, those
of all adapters, tested or not, so that a block's entry is filled as a layer's is.

Shapes: M rows, T tested rows, D hidden_size, K rows of an exit's output matrix, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from exitlm.decode.batch import Batch
from exitlm.decode.cache.kv_pool import KVPool
from exitlm.decode.kernels.fused import FusedHead, FusedLayer, FusedModel
from exitlm.decode.kernels.graphs import attention_backends
from exitlm.decode.kernels.native_model import NativeBlock, NativeHead, NativeModel
from exitlm.decode.kernels.scores import Scores, log_probabilities
from exitlm.decode.options import EngineConfig


@dataclass(frozen=True, slots=True)
class Arrived:
    """What a pass brought to its last boundary: the hidden states ``[M, D]``, the stream before the last layer's MLP,
    and the stream of each block exit there, ``[M, D]`` by adapter."""

    hidden_MD: Tensor
    residual_MD: Tensor
    blocks: Mapping[str, Tensor] = field(default_factory=dict)


class Runner:
    """The runner of this process: native kernels, eager torch, or static shapes and CUDA graphs (see ``graphs.py``)."""

    def __init__(
        self, fused: FusedModel | NativeModel, options: EngineConfig, blocks: Sequence[int] | None = None
    ) -> None:
        """``blocks``: the number of each group's blocks (None: as the budget allows)."""
        self.fused, config, self.bounds = fused, fused.config, fused.share.bounds
        self.early = tuple(sorted({e for _, e in fused.heads if e < config.num_hidden_layers}))
        self._heads: list[dict[str, FusedHead | NativeHead]] = [  # of each boundary, by adapter
            {name: head for (name, at), head in fused.heads.items() if at == layer} for layer in self.bounds
        ]
        self._blocks: list[dict[str, FusedLayer | NativeBlock]] = [
            {name: head.block for name, head in heads.items() if head.block is not None} for heads in self._heads[:-1]
        ] + [{}]
        self.pool = KVPool(
            fused.entries(), heads=config.num_key_value_heads, head_dim=config.head_dim, dtype=fused.cache_dtype,
            device=fused.device, context=config.max_position_embeddings, options=options,
            zeroed=fused.static is not None, held=fused.share.entries, blocks=blocks,
        )  # fmt: skip

    @property
    def reads_runs(self) -> bool:
        """Whether keys in one run of neighbouring blocks are read faster than scattered ones: eager torch reads them
        where they lie, a static pass gathers all."""
        return self.fused.static is None

    @property
    def segments(self) -> int:
        """How many segments the boundaries cut the layers into."""
        return len(self.bounds) - 1

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Hidden states ``[M, D]`` of token ids."""
        return self.fused.embed(tokens)

    def run(self, first: int, last: int, batch: Batch, hidden_MD: Tensor) -> Arrived:
        """Take rows from boundary ``first`` to boundary ``last``; segments without a block exit between them are one
        call."""
        rows: Any = self.fused.rows(batch, self.pool)  # of its own kind
        at = self.bounds[first]
        residual, streams = hidden_MD, dict[str, Tensor]()
        for boundary in range(first + 1, last + 1):
            layer, blocks = self.bounds[boundary], self._blocks[boundary]
            if not blocks and boundary < last:
                continue
            hidden_MD, residual = self.fused.run(hidden_MD, at, layer, rows)
            at, streams = layer, {}
            if blocks:
                with attention_backends(self.fused.device):
                    streams = {name: block.attend(hidden_MD, rows) for name, block in blocks.items()}
        return Arrived(hidden_MD, residual, streams)

    def head(self, boundary: int, adapter: str | None = None) -> FusedHead | NativeHead:
        """The head of an adapter's exit at a boundary; of the first adapter that has one there (None)."""
        heads = self._heads[boundary]
        return next(iter(heads.values())) if adapter is None else heads[adapter]

    def heads_at(self, boundary: int) -> Mapping[str, FusedHead | NativeHead]:
        """The heads of the exits at a boundary, by adapter."""
        return self._heads[boundary]

    def exit_logits(self, boundary: int, arrived: Arrived, rows: Sequence[int], adapter: str | None = None) -> Tensor:
        """Logits ``[T, K]`` of an exit at a boundary for some of the rows that arrived there; ``adapter``: see
        :meth:`head`."""
        head = self.head(boundary, adapter)
        block_TD = self._block(head, arrived, rows)
        return head.logits(select(arrived.hidden_MD, rows), select(arrived.residual_MD, rows), block_TD)

    def exit_scores(
        self, boundary: int, arrived: Arrived, rows: Sequence[int], adapter: str | None = None, *, logits: bool = True
    ) -> Scores:
        """The same with what is read of each row; where nobody wants ``logits``, they may be left out."""
        head = self.head(boundary, adapter)
        if isinstance(head, NativeHead):
            return head.scores(self._input(head, arrived, rows), mass=True)
        if not logits and isinstance(self.fused, FusedModel) and self.fused.prefers_digests:
            return self.fused.exit_digest(head, self._input(head, arrived, rows))
        return Scores.of(self.exit_logits(boundary, arrived, rows, adapter))

    @classmethod
    def _input(cls, head: FusedHead | NativeHead, arrived: Arrived, rows: Sequence[int]) -> Tensor:
        """What the head of an exit reads for some of the rows."""
        hidden_TD, residual_TD = select(arrived.hidden_MD, rows), select(arrived.residual_MD, rows)
        return head.input(hidden_TD, residual_TD, cls._block(head, arrived, rows))

    @staticmethod
    def _block(head: FusedHead | NativeHead, arrived: Arrived, rows: Sequence[int]) -> Tensor | None:
        """What the block of an exit puts out for some of the rows, where the exit has one."""
        if head.block is None:
            return None
        return head.block.feed_forward(select(arrived.blocks[head.key[0]], rows))

    def gates(self, boundary: int, arrived: Arrived, rows: Sequence[int], adapter: str | None = None) -> list[float]:
        """The gate's score for some of the rows that arrived at a boundary."""
        return self.head(boundary, adapter).gates(select(arrived.hidden_MD, rows))

    def final_logits(self, arrived: Arrived, rows: Sequence[int]) -> Tensor:
        """Logits ``[T, V]`` of the final head for some of the rows that arrived at the end."""
        return self.fused.final_logits(select(arrived.hidden_MD, rows))

    def final_scores(self, arrived: Arrived, rows: Sequence[int], *, logits: bool = True) -> Scores:
        """The same with what is read of each row; where nobody wants ``logits``, they may be left out."""
        if isinstance(self.fused, NativeModel):
            return self.fused.final.scores(select(arrived.hidden_MD, rows))
        if not logits and self.fused.prefers_digests:
            return self.fused.final_digest(select(arrived.hidden_MD, rows))
        return Scores.of(self.final_logits(arrived, rows))

    def log_probabilities(
        self, arrived: Arrived, rows: Sequence[int], tokens: Sequence[int], most: int
    ) -> list[tuple[float, dict[int, float]]]:
        """For some of the rows that arrived at the end, the log-probability of the token behind each, and of the
        ``most`` likely ones."""
        raw_RV = self.final_logits(arrived, rows)
        return [log_probabilities(raw_V, token, most) for raw_V, token in zip(raw_RV, tokens, strict=True)]


def select(rows_MX: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, in ascending order; a view where they are neighbours. Not by ``rows_MX[...]``, which on a CPU wakes
    threads for 8 rows and more: milliseconds."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return rows_MX if len(rows) == len(rows_MX) else rows_MX[rows[0] : rows[-1] + 1]
    return rows_MX.index_select(0, torch.tensor(rows, device=rows_MX.device))
