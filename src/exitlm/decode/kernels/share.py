"""Which part of a model is run here: some of its layers, with the exits at their ends. Plain data.

One process that has all is the usual case; a pipeline stage has a run of layers. Boundaries are those of the whole
model, by the layers below them: every layer at which any adapter has an exit, and every cut between two stages. An exit
at a cut belongs to the stage that ends there.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from exitlm.decode.cache.kv_pool import Entry
from exitlm.model.config import SLIDING, ModelConfig
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import ExitHead, ExitKey


@dataclass(frozen=True, kw_only=True)
class Share:
    """``layers``: the 0-based layers that are run here; ``bounds``: the layers below each boundary of the whole model,
    from 0 to all; ``blocks``: the cache entry of each block exit of the whole model, behind those of the layers."""

    layers: range
    bounds: tuple[int, ...]
    blocks: Mapping[ExitKey, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: EarlyExitModel) -> Share:
        """All layers that a model has, from the first on; those above may be absent."""
        depth, bounds = len(model.model.layers), bounds_of(model)
        return cls(layers=range(depth), bounds=tuple(sorted({*bounds[:-1], depth})), blocks=block_entries(model))

    @property
    def first(self) -> int:
        """The boundary at which the layers begin."""
        return self.bounds.index(self.layers.start)

    @property
    def last(self) -> int:
        """The boundary at which they end."""
        return self.bounds.index(self.layers.stop)

    @property
    def ends(self) -> bool:
        """Whether the last layer of the model, and so the final head, is among them."""
        return self.layers.stop == self.bounds[-1]

    def has_exit(self, layer: int) -> bool:
        """Whether an exit behind ``layer`` (1-based) belongs to them."""
        return self.layers.start < layer <= self.layers.stop

    def reads_output(self, heads: Iterable[ExitHead]) -> bool:
        """Whether the output matrix is read here: by the final head, or by exits that share it."""
        return self.ends or any(head.config.output == "shared" for head in heads)

    @property
    def entries(self) -> set[int]:
        """The cache entries of the layers and exits that are run here."""
        return {*self.layers, *(entry for (_, layer), entry in self.blocks.items() if self.has_exit(layer))}

    def all_entries(self, config: ModelConfig) -> list[Entry]:
        """The cache entries of the whole model: one for every layer, then one for every block exit."""
        inner, L = self.bounds[1:-1], config.num_hidden_layers
        windows = [config.sliding_window if kind == SLIDING else None for kind in config.layer_types]
        found = [Entry(windows[i], bisect.bisect_right(inner, i)) for i in range(L)]
        return found + [Entry(windows[e - 1], bisect.bisect_left(inner, e)) for _, e in self.blocks]


def block_entries(model: EarlyExitModel) -> dict[ExitKey, int]:
    """The cache entry of each block exit of a whole model: those behind the layers', in order."""
    blocks = [key for key, head in model.heads_by_key().items() if head.config.kind == "block"]
    return {key: model.config.num_hidden_layers + i for i, key in enumerate(blocks)}


def bounds_of(model: EarlyExitModel, cuts: Iterable[int] = ()) -> tuple[int, ...]:
    """The layers below each boundary: 0, the early exits of all adapters, ``cuts`` between stages, and all."""
    L = model.config.num_hidden_layers
    early = {layer for _, layer in model.heads_by_key() if layer < L}
    return (0, *sorted(early | set(cuts)), L)
