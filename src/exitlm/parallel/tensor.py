"""Tensor and sequence parallelism: how the matrices of a stage are cut over the tensor ranks (Megatron-LM, arXiv
1909.08053; sequence parallelism arXiv 2205.05198), by torch's parallel styles.

Hidden states between layers are plain tensors: this rank's part of the sequence (``sequence``), or the whole. Embedding
and output matrices are cut by vocabulary; the loss knows how to read them (``exitlm.train.head_loss``). Applied from
outside: the model states maths only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from exitlm.errors import UserError
from exitlm.model.config import ModelConfig
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import ExitConfig, ExitHead
from exitlm.model.layers import RMSNorm


def check_tensor(config: ModelConfig, exits: list[ExitConfig], tensor: int, sequence: bool, seq_len: int) -> None:
    """Refuse a number of tensor ranks that the model can't be cut into.

    Raises:
        UserError: what does not divide, and what would.
    """
    if tensor == 1:
        return
    if config.fused_projections:
        raise UserError(f"parallel.tensor must be 1 for {config.model_type} models, whose projections are fused")
    if config.qk_norm == "full":
        raise UserError(
            f"parallel.tensor must be 1 for {config.model_type} models, which norm queries and keys over all heads"
        )
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
    }
    if sequence:
        sizes["data.seq_len (parallel.sequence splits it)"] = seq_len
    most = min(tensor - 1, config.num_attention_heads)
    works = [n for n in range(1, most + 1) if all(size % n == 0 for size in sizes.values())]
    for name, size in sizes.items():
        if size % tensor:
            raise UserError(
                f"parallel.tensor is {tensor}, but must divide {name} = {size}; use {' or '.join(map(str, works))}"
            )


def cut(model: EarlyExitModel, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Cut the matrices of a model, or of a pipeline stage's part of one, over the ranks of ``mesh`` in place; its
    parameters are then DTensors, with names as before. Tied matrices must be tied again afterwards."""
    between: Placement = Shard(1) if sequence else Replicate()
    parts = dict(model.model.named_children())
    if "embed_tokens" in parts:
        style = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
        parallelize_module(parts["embed_tokens"], mesh, style)
        parts["embed_tokens"].register_forward_hook(_arrived)
    for layer in model.model.layers.values():
        parallelize_module(layer, mesh, _layer_plan(layer, between))
    if "norm" in parts and sequence:
        parallelize_module(parts["norm"], mesh, _whole())
    if "lm_head" in dict(model.named_children()):
        parallelize_module(model.lm_head, mesh, ColwiseParallel())
    for head in model.exit_heads().values():
        parallelize_module(head, mesh, _head_plan(head, between))
        if sequence:
            for name in {"lens", "gate", "output_down"} & dict(head.named_children()).keys():
                setattr(head, name, _OnParts(getattr(head, name), mesh))


def _arrived(module: nn.Module, inputs: Any, hidden: Tensor) -> Tensor:
    """A tensor that no collective is under way in: the gradient of a compiled layer can't pass one that may be."""
    return hidden.clone()


def _whole() -> SequenceParallel:
    """A norm whose parameters are whole on every rank and that sees a part of the sequence: their gradients are summed
    over the ranks."""
    return SequenceParallel(use_local_output=True)


class _OnParts(nn.Linear):
    """The same for a linear map, which torch 2.11 can't apply to DTensors that are cut along the sequence."""

    def __init__(self, whole: nn.Linear, mesh: DeviceMesh) -> None:
        with torch.device("meta"):
            super().__init__(whole.in_features, whole.out_features, whole.bias is not None)
        self.weight, self.bias = whole.weight, whole.bias
        distribute_module(self, mesh)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (
            p.to_local(grad_placements=[Partial()]) if isinstance(p, DTensor) else p for p in (self.weight, self.bias)
        )
        return F.linear(input, weight, bias)


def _layer_plan(layer: nn.Module, between: Placement, prefix: str = "") -> dict[str, ParallelStyle]:
    whole = Replicate()
    attention = PrepareModuleInput(
        input_layouts=(between, None, None, None), desired_input_layouts=(whole, None, None, None)
    )
    plan: dict[str, ParallelStyle] = {
        "self_attn": attention,
        **{f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")},
        "self_attn.o_proj": RowwiseParallel(output_layouts=between),
        **_mlp_plan("mlp", between),
    }
    for name, module in layer.named_modules():
        if isinstance(module, RMSNorm):
            if "self_attn" in name:
                plan[name] = _heads()
            elif between.is_shard():
                plan[name] = _whole()
    return {f"{prefix}{name}": style for name, style in plan.items()}


def _mlp_plan(name: str, between: Placement) -> dict[str, ParallelStyle]:
    return {
        name: PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        f"{name}.gate_proj": ColwiseParallel(),
        f"{name}.up_proj": ColwiseParallel(),
        f"{name}.down_proj": RowwiseParallel(output_layouts=between),
    }


def _heads() -> SequenceParallel:
    """The norm of queries and keys, which sees this rank's heads [B, H, T, Dh]: whole parameters, as above."""
    return SequenceParallel(sequence_dim=1, use_local_output=True)


def _head_plan(head: ExitHead, between: Placement) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {}
    children = dict(head.named_children())
    if "mlp" in children:
        plan |= _mlp_plan("mlp", between)
    if "block" in children:
        plan |= _layer_plan(children["block"], between, "block.")
    for name in ("mlp_post_norm", "norm"):
        if name in children and between.is_shard():
            plan[name] = _whole()
    for name in ("output", "output_up"):
        if name in children:
            plan[name] = ColwiseParallel()
    return plan
