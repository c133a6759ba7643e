"""Matrices that several stages hold a copy of: the embedding, the final head, and exits that share either or their own.

Copies begin equal and receive the same gradient, the sum of all, so that they stay equal to the last bit. Each has one
canonical name, by which it is initialised, saved and counted. The sum runs over the pipeline ranks that have a copy,
on local shards, after those were reduced over the data ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from exitlm.model.config import ModelConfig
from exitlm.model.exits import ExitConfig
from exitlm.parallel.mesh import Mesh

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def canonical(name: str, config: ModelConfig, exits: Sequence[ExitConfig]) -> str:
    """The one name of the matrix that the parameter ``name`` of a stage is a copy of; other names stay as they are."""
    if name == HEAD and config.tie_word_embeddings:
        return EMBEDDING
    sharing = sorted(e.layer for e in exits if e.output == "exits")
    if name in {f"exits.{layer}.output.weight" for layer in sharing}:
        return f"exits.{sharing[0]}.output.weight"
    return name


class TiedCopies:
    """The copies of this process, and the groups that share them. All processes build it at the same time."""

    def __init__(self, names: Iterable[str], mesh: Mesh) -> None:
        """``names``: the canonical name of every parameter of every stage of this process."""
        self.mine = list(names)
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.leads = set(self.mine)
        """Canonical names whose copy here counts in sums over all processes."""
        pipeline = mesh.layout.pipeline
        if pipeline == 1:
            return
        everyone: list[list[str]] = [[] for _ in range(pipeline)]
        dist.all_gather_object(everyone, self.mine, group=mesh.pipeline)
        ranks = torch.arange(mesh.layout.world).reshape(pipeline, -1)
        for name in sorted({name for names in everyone for name in names}):
            owners = [r for r, names in enumerate(everyone) if name in names]
            if len(owners) == 1:
                continue
            if mesh.pipeline_rank != owners[0]:
                self.leads.discard(name)
            for column in ranks.T:
                members = [int(column[r]) for r in owners]
                group = dist.new_group(members, timeout=mesh.timeout)
                if dist.get_rank() in members:
                    self.groups[name] = group

    def sum(self, gradients: Mapping[str, Sequence[Tensor]]) -> None:
        """Replace the gradient of every copy by the sum of all. ``gradients``: by canonical name, those of this
        process."""
        for name in sorted(gradients):
            copies = gradients[name]
            if len(copies) < 2 and name not in self.groups:
                continue
            total = copies[0]
            for copy in copies[1:]:
                total += copy
            if name in self.groups:
                dist.all_reduce(total, group=self.groups[name])
            for copy in copies[1:]:
                copy.copy_(total)
