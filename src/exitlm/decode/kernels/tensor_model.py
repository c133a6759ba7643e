"""The part of a model that one of T tensor ranks holds: attention heads with their keys and values, MLP columns, and
rows of the embedding and of every output matrix.

The cut is that of training (``exitlm.parallel.tensor``: Megatron-LM, arXiv 1909.08053): it is applied to a copy of the
model without storage, which then tells the part of each matrix that is this rank's. The fused decoder runs that part as
a model with fewer heads and columns; sums stand behind the two matrices that a layer ends its branches with, and logits
are joined. So every rank has the same hidden states and logits, and all must run the same passes
(``exitlm.decode.remote.lockstep`` hands them on). Float64 gives what the whole model gives, but for the last bits.

Output matrices are cut into T runs of rows of one length, the last ones filled up with zeros, so that any vocabulary
and any number of candidates can be cut. Torch alone runs it: eagerly, with static shapes, or recorded (``graphs.py``).

Shapes: M rows, D hidden_size, V vocab_size, K rows of an output matrix, T ranks, c columns of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from exitlm.decode.kernels.formats import Linear
from exitlm.decode.kernels.fused import FusedHead, FusedLayer, FusedMLP, FusedModel
from exitlm.decode.kernels.ranks import Ranks
from exitlm.decode.kernels.scores import Scores, digest
from exitlm.decode.kernels.share import Share
from exitlm.model.config import ModelConfig
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import ExitHead
from exitlm.parallel.shards import part_of
from exitlm.parallel.tensor import check_tensor, cut


class TensorModel(FusedModel):
    """What a rank of ``group`` runs of a model, with the surface of :class:`FusedModel`; ``config`` has the heads and
    the MLP columns of this rank, so that its cache has as many heads. ``whole`` is the model's own configuration."""

    def __init__(
        self,
        model: EarlyExitModel,
        quant: str,
        compile: str = "none",
        share: Share | None = None,
        *,
        group: dist.ProcessGroup,
        device: torch.device | None = None,
    ) -> None:
        """``model`` is what :class:`FusedModel` takes, on every rank; only this rank's part of it is moved to
        ``device`` (None: where it is). ``quant``, ``compile`` and ``share`` are the same on all ranks.

        Raises:
            UserError: the model can't be cut into so many parts; training refuses it in the same words.
        """
        self.ranks, self.whole = Ranks(group), model.config
        check_tensor(model.config, [head.config for head in model.heads_by_key().values()], self.ranks.size, False, 0)
        layers = model.model.layers.by_number() if share is None else share.layers
        part = local_part(model, layers, self.ranks, device or model.device)
        super().__init__(part, quant, compile, share)
        self.prefers_digests = self.static is None  # a recorded pass has logits anyway
        self._first_row = self.ranks.rank * rows_of_each(self.whole.vocab_size, self.ranks.size)
        for layer in self.layers.values():
            self._sum_layer(layer)
        if hasattr(self, "final_head"):  # a pipeline stage may have no use for it
            self.final_head = Joined(self.final_head, self.whole.vocab_size, self.ranks)
        originals = model.heads_by_key()
        for key, head in self.heads.items():
            self._join_head(head, originals[key])

    def _sum_layer(self, layer: FusedLayer) -> None:
        layer.output = Summed(layer.output, self.dtype, self.ranks)
        self._sum_mlp(layer.mlp)

    def _sum_mlp(self, mlp: FusedMLP) -> None:
        mlp.down = Summed(mlp.down, self.dtype, self.ranks)

    def _join_head(self, head: FusedHead, original: ExitHead) -> None:
        head.config = original.config
        if head.mlp is not None:
            self._sum_mlp(head.mlp)
        if head.block is not None:
            self._sum_layer(head.block)
        last = head.projections[-1]
        if not isinstance(last, Joined):
            rows = head.config.candidates or self.whole.vocab_size
            head.projections[-1] = Joined(last, rows, self.ranks)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Hidden states ``[M, D]`` of token ids: each rank has the rows of some tokens, and zeros for the others."""
        rows = [token - self._first_row for token in tokens]
        mine = [i for i, row in enumerate(rows) if 0 <= row < len(self.embedding)]
        hidden = torch.zeros(len(tokens), self.config.hidden_size, dtype=self.dtype, device=self.device)
        if mine:
            chosen = torch.tensor([rows[i] for i in mine], device=self.device)
            found = self.embedding.index_select(0, chosen).to(self.dtype)
            hidden.index_copy_(0, torch.tensor(mine, device=self.device), found)
        hidden = self.ranks.sum(hidden)
        return hidden * self.embedding_scale if self.embedding_scale != 1.0 else hidden

    def exit_digest(self, head: FusedHead, input_MD: Tensor) -> Scores:
        """See :class:`FusedModel`: four numbers for each row and rank are sent instead of K logits."""
        last = head.projections[-1]
        assert isinstance(last, Joined)
        return last.digest(head.features(input_MD), self.dtype)

    def final_digest(self, hidden_MD: Tensor) -> Scores:
        """See :class:`FusedModel`."""
        assert isinstance(self.final_head, Joined)
        return self.final_head.digest(self.final_features(hidden_MD), self.dtype)


@dataclass(frozen=True)
class Summed:
    """A linear layer whose input columns are cut: the sum of what the ranks find, in the stream's ``dtype``."""

    linear: Linear
    dtype: torch.dtype
    ranks: Ranks

    def __call__(self, x: Tensor) -> Tensor:
        return self.ranks.sum(self.linear(x).to(self.dtype))


@dataclass(frozen=True)
class Joined:
    """A linear layer whose output rows are cut: the logits ``[M, K]`` of all ranks, ``rows`` is K."""

    linear: Linear
    rows: int
    ranks: Ranks

    def __call__(self, x: Tensor) -> Tensor:
        return self.ranks.join(self.linear(x), self.rows)

    def digest(self, x: Tensor, dtype: torch.dtype) -> Scores:
        """What is read of the logits in ``dtype``, which are not joined for it."""
        each = rows_of_each(self.rows, self.ranks.size)
        counted = max(0, min(each, self.rows - self.ranks.rank * each))
        return Scores.of_parts(self.ranks.stack(digest(self.linear(x).to(dtype)[:, :counted])), each)


def rows_of_each(rows: int, ranks: int) -> int:
    """How many of the rows of an output matrix each rank has, zeros at the end included."""
    return -(-rows // ranks)


# ---- the parts


def local_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """The configuration of what each of so many ranks computes."""
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // ranks,
        num_key_value_heads=config.num_key_value_heads // ranks,
        intermediate_size=config.intermediate_size // ranks,
    )


@torch.no_grad()
def local_part(model: EarlyExitModel, layers: Iterable[int], ranks: Ranks, device: torch.device) -> EarlyExitModel:
    """The part that this rank has of a model's ``layers`` (0-based) and of all around them, on ``device``: modules with
    its names, plain parameters of fewer rows or columns, and biases that are added to sums on the first rank alone.
    Only :class:`FusedModel` can run it."""
    mesh = DeviceMesh.from_group(ranks.group, "cuda" if dist.get_backend(ranks.group) == "nccl" else "cpu")
    parts = _Parts(ranks, device)
    with torch.device("meta"):
        part = EarlyExitModel(model.config, layers)
    cut(part, mesh, sequence=False)
    parts.fill(part, model)
    part.config = local_config(model.config, ranks.size)
    part.add_adapters({name: _local_heads(model, heads, mesh, parts) for name, heads in model.exit_sets().items()})
    return part.eval()


def _local_heads(
    model: EarlyExitModel, heads: dict[int, ExitHead], mesh: DeviceMesh, parts: _Parts
) -> dict[int, ExitHead]:
    """The parts of an adapter's exits."""
    with torch.device("meta"):
        holder = EarlyExitModel(model.config, ())  # all that a plan is made for
        for layer, head in heads.items():
            holder.exits[str(layer)] = ExitHead(head.config, model.config, head.candidate_ids)
    cut(holder, mesh, sequence=False)
    found = holder.exit_heads()
    for layer, head in heads.items():
        part = found[layer]
        parts.fill(part, head)
        if head.candidate_ids is not None:
            part.candidate_ids = head.candidate_ids.to(parts.device)
            if head.config.output == "shared":  # the ranks would have very different numbers of the final head's rows
                part.output = parts.output(head.output_weight(model.lm_head.weight).detach())
                part.config = replace(head.config, output="own")
        elif head.config.output == "exits":
            part.output = parts.shared(part.output, head.output)
    return found


class _Parts:
    """Takes this rank's part of tensors. Matrices that are one in the whole model are one here."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self._made: dict[tuple[int, int | None], nn.Parameter] = {}
        self._outputs: dict[int, nn.Linear] = {}

    def fill(self, part: nn.Module, whole: nn.Module) -> None:
        """Give every parameter of ``part``, cut and without storage, its part of the one that ``whole`` has under its
        name."""
        parameters = list(part.named_parameters(remove_duplicate=False))
        summed = {name.removesuffix("weight") for name, parameter in parameters if _dimension(parameter) == 1}
        for name, parameter in parameters:
            at, _, leaf = name.rpartition(".")
            added_elsewhere = leaf == "bias" and name.removesuffix("bias") in summed and self.ranks.rank > 0
            made = None if added_elsewhere else self._part(whole.get_parameter(name), parameter)
            setattr(part.get_submodule(at), leaf, made)

    def _part(self, whole: nn.Parameter, parameter: Tensor) -> nn.Parameter:
        dimension = _dimension(parameter)
        key = (id(whole), dimension)
        if key not in self._made:
            if dimension is None:
                found = whole.detach().to(self.device)
            else:
                found = self._own(part_of(whole.detach(), parameter), whole.shape[0], dimension)
            self._made[key] = nn.Parameter(found, requires_grad=False)
        return self._made[key]

    def _own(self, found: Tensor, rows: int, dimension: int) -> Tensor:
        """A copy, so that the whole can go; where rows are cut, as many as every rank has."""
        missing = 0 if dimension else rows_of_each(rows, self.ranks.size) - len(found)
        return F.pad(found, (0,) * (2 * found.dim() - 1) + (missing,)).to(self.device).contiguous()

    def output(self, rows_KD: Tensor) -> nn.Linear:
        """An output matrix with this rank's part of some rows."""
        pieces = rows_KD.chunk(self.ranks.size)
        mine = pieces[self.ranks.rank] if self.ranks.rank < len(pieces) else rows_KD[:0]
        with torch.device("meta"):
            found = nn.Linear(rows_KD.shape[1], rows_of_each(len(rows_KD), self.ranks.size), bias=False)
        found.weight = nn.Parameter(self._own(mine, len(rows_KD), 0), requires_grad=False)
        return found

    def shared(self, part: nn.Linear, whole: nn.Linear) -> nn.Linear:
        """The one part of a matrix that several exits have."""
        return self._outputs.setdefault(id(whole), part)


def _dimension(parameter: Tensor) -> int | None:
    """The dimension along which a parameter is cut; None where each rank has all of it."""
    if not isinstance(parameter, DTensor):
        return None
    dimension: int | None = getattr(parameter.placements[0], "dim", None)
    return dimension
