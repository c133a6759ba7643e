"""What a process of a training run holds in memory, counted from its settings: nothing is allocated or measured.

* *weights*: parameters in at least float32, a part of them where they are sharded over the data ranks, and the copy
  that is computed with, where it has another dtype or is gathered: all of it in a pipeline, else that of two layers and
  of what is in no layer. A frozen backbone is there in its own dtype alone.
* *gradients* of what is trained, whole where a step adds up several microbatches. *AdamW*: its two moments, sharded.
* *activations* that wait for their backward: for each layer, the tensors that autograd keeps, counted as Korthikanti et
  al. (arXiv 2205.05198, section 4) do for GPT, here for RMSNorm, a gated MLP, grouped keys and no dropout. Fused
  attention keeps no matrix of positions by positions. Tensor ranks share what is cut by heads or columns, and with
  sequence parallelism the inputs of norms; what enters a column-cut product is whole on each of them, as torch's
  parallel styles gather it once (the paper's gather it again). How many microbatches wait is read from the schedule.
* *heads*: the largest head at work. Deferred, a head holds its features and one chunk of logits, for one microbatch at
  a time; eager ones also keep their features and the gradient of all logits for each microbatch that waits.

On a frozen model nothing of a layer waits, only what its exits read.

Left out: what allocator, communication buffers and libraries take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from exitlm.model.config import ModelConfig
from exitlm.model.exits import ExitConfig
from exitlm.parallel.mesh import Layout
from exitlm.parallel.pipeline.schedule import Schedule
from exitlm.parallel.pipeline.split import Split, StageCost
from exitlm.train.head_loss import tokens_at_once


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process, by what they are for. ``waiting``: the most microbatches that wait for their backward at
    once, on all stages of the rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    heads: int
    waiting: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.heads


@dataclass(frozen=True, kw_only=True)
class _Head:
    """Bytes of a head at ``work``, for each microbatch ``waiting`` for its backward, and ``between`` the two halves of
    a split backward."""

    work: float
    waiting: float = 0.0
    between: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """All that memory depends on. ``tokens`` are those of a microbatch; ``compute``, ``master`` and ``backbone`` the
    bytes of an element in computation, in the optimizer and in frozen weights; ``device`` is the type of all devices;
    ``accumulates``: a step adds up the gradients of several microbatches; ``teacher``: exits learn from the final head.
    """

    model: ModelConfig
    exits: Sequence[ExitConfig]
    split: Split
    costs: Sequence[StageCost]
    layout: Layout
    tokens: int
    compute: int
    master: int
    backbone: int
    device: str = "cuda"
    exit_forward: Literal["eager", "checkpoint", "deferred"] = "deferred"
    frozen: bool = False
    recompute: bool = False
    teacher: bool = False
    accumulates: bool = True

    def of_rank(self, rank: int, schedule: Schedule) -> Memory:
        """The memory of a pipeline rank under a schedule."""
        mine = self.layout.stages_of(rank)
        heads = {stage: self._heads_of(stage) for stage in mine}
        held = {s: self._layers_of(s) + sum(head.waiting for head in heads[s]) for s in mine}
        halves = {s: sum(head.between for head in heads[s]) for s in mine}
        waiting, activations = waiting_most(schedule, rank, held, halves)
        if self.frozen or self.recompute:  # one layer at work
            activations += self.layer_elements() * self.tokens * (self.backbone if self.frozen else self.compute)
        trained = sum(self.per_process(self.costs[s].trained, self.costs[s].trained_whole) for s in mine)
        return Memory(
            weights=round(sum(self._weights(self.costs[s]) for s in mine)),
            gradients=round(trained * self.master / (1 if self.accumulates else self._shards)),
            optimizer=round(2 * trained * self.master / self._shards),
            activations=round(activations),
            heads=round(max((head.work for s in mine for head in heads[s]), default=0.0)),
            waiting=waiting,
        )

    @property
    def _shards(self) -> int:
        return self.layout.data if self.layout.shard else 1

    @property
    def _sequence(self) -> int:
        """Over how many ranks sequences are cut between matrix products."""
        return self.layout.tensor if self.layout.sequence else 1

    def per_process(self, parameters: int, whole: int) -> float:
        """How many of a stage's ``parameters`` one tensor rank has, if each has ``whole`` ones."""
        return (parameters - whole) / self.layout.tensor + whole

    def _weights(self, cost: StageCost) -> float:
        trained = self.per_process(cost.trained, cost.trained_whole)
        still = self.per_process(cost.parameters, cost.whole) - trained
        # Out of a pipeline, a layer's copy is given back after use; two are there at a time.
        most = 1.0 if self.layout.pipeline > 1 else min(1.0, 2 / self.split.bounds[-1])
        idle = cost.layer_parameters / self.layout.tensor * (1 - most)
        gathered, copied = self._shards > 1, self._shards > 1 or self.compute < self.master
        stored = (trained * self.master + still * self.backbone) / self._shards
        if self.frozen:
            return stored + trained * self.compute * copied + (still - idle) * self.backbone * gathered
        return stored + (trained - idle) * self.compute * copied

    def _layers_of(self, stage: int) -> float:
        """Bytes that the layers of a stage keep of a microbatch for its backward."""
        if self.frozen:
            read = sum(3 if e.kind == "mlp" else 1 for e in self.exits if self.split.owners[e.layer] == stage)
            return read * self.model.hidden_size / self._sequence * self.tokens * self.backbone
        kept = self.model.hidden_size / self._sequence if self.recompute else self.layer_elements()
        return len(self.split.layers(stage)) * kept * self.tokens * self.compute

    def layer_elements(self) -> float:
        """Tensor elements that a layer keeps per token: each norm's input and normed input, what enters attention and
        MLP, queries, keys, values and what attention gives, and four times the MLP's inner width."""
        model, D = self.model, self.model.hidden_size
        wide, narrow = (count * model.head_dim for count in (model.num_attention_heads, model.num_key_value_heads))
        norms = 4 if model.norm_placement == "sandwich" else 2
        cut = 2 * wide + 2 * narrow + 4 * model.intermediate_size
        if model.qk_norm is not None:
            cut += 2 * (wide + narrow)
        return norms * 2 * D / self._sequence + 2 * D + cut / self.layout.tensor

    def _feature_elements(self, e: ExitConfig | None) -> float:
        """Tensor elements that a head holds per token up to the input of its matrix; None is the final head."""
        D = self.model.hidden_size
        held = float(D)
        if e is None or e.kind != "embed":
            held += 2 * D / self._sequence
        if e is not None and (e.kind == "mlp" or e.branch):
            held += D + 4 * self.model.intermediate_size / self.layout.tensor
        if e is not None and e.kind == "block":
            held += self.layer_elements()
        return held

    def _heads_of(self, stage: int) -> list[_Head]:
        heads = [self._head(e) for e in self.exits if self.split.owners[e.layer] == stage]
        if self.costs[stage].has_final_head and not self.frozen:
            heads.append(self._head(None))
        return heads

    def _head(self, e: ExitConfig | None) -> _Head:
        """The bytes of one head; the final head's logits beside its own where it learns from them."""
        rows = -(-(self.model.vocab_size if e is None or not e.candidates else e.candidates) // self.layout.tensor)
        width = e.rank if e is not None and e.output == "low_rank" else self.model.hidden_size
        matrix = 0 if self.frozen and (e is None or e.output == "shared") else rows * width
        features = self._feature_elements(e) * self.tokens * self.compute
        logits = self.tokens * rows
        if self.exit_forward == "deferred":
            chunk = min(self.tokens, tokens_at_once(rows, self.device)) * rows
            chunk *= 2 if self.teacher and e is not None else 1
            gradients = self.tokens * self.model.hidden_size + matrix
            return _Head(work=features + (chunk + gradients) * self.master, between=float(matrix * self.compute))
        work = logits * self.master + matrix * self.compute
        if self.exit_forward == "checkpoint":
            return _Head(work=work + features + logits * self.compute)
        kept = features + logits * self.compute
        return _Head(work=work + kept) if self.frozen else _Head(work=float(work), waiting=kept)


def waiting_most(
    schedule: Schedule, rank: int, held: Mapping[int, float], halves: Mapping[int, float]
) -> tuple[int, float]:
    """The most microbatches that wait on a rank at once, and the most bytes. By stage, ``held`` is what one keeps from
    its forward to the end of its backward, ``halves`` what it keeps besides between the halves of a split one."""
    count = most = 0
    total = peak = 0.0
    for action in schedule.ranks[rank]:
        lo, hi = schedule.spans[action.microbatch]
        stage = action.stage
        if action.op == "F" and lo <= stage <= hi:
            count, total = count + 1, total + held[stage]
        elif action.op == "I":
            total += halves[stage]
        elif action.op == "W":
            count, total = count - 1, total - held[stage] - halves[stage]
        elif action.op == "B":
            count, total = count - 1, total - held[stage]
        most, peak = max(most, count), max(peak, total)
    return most, peak
