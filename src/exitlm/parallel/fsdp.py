"""Sharding a stage over the data ranks (FSDP2, or whole copies), and the dtype that it computes in.

Gradients are sums over the ranks: losses are divided by the global number of tokens beforehand. Not here: tensor
parallelism, which is applied before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from exitlm.parallel.mesh import Mesh
from exitlm.parallel.pipeline.stage import Stage


def shard(stage: Stage, mesh: Mesh, *, compute: torch.dtype, master: torch.dtype) -> None:
    """Shard the parameters of a stage in place: a unit for each layer, and one for all the rest (embedding and heads,
    as they may share a matrix). Nothing is done for one data rank that computes in its master dtype, or whose model is
    frozen: only exits have a master dtype then.

    Parameters and gradient sums are ``master``, the work is done in ``compute``. In a pipeline, parameters stay
    gathered between a step's microbatches: schedules that split the backward would lose all gradients otherwise.
    """
    if mesh.layout.data == 1 and (compute == master or stage.frozen):
        return
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=master)
    options: dict[str, Any] = {"mesh": mesh.data_mesh, "mp_policy": precision}
    for layer in stage.model.model.layers.values():
        fully_shard(layer, **options, reshard_after_forward=mesh.layout.pipeline == 1)
        register_fsdp_forward_method(layer, "parts")
    fully_shard(stage, **options, reshard_after_forward=False)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            if mesh.layout.data > 1:  # one rank alone divides by 1, which it does not know to be nothing
                module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def sum_in(stage: Stage, master: torch.dtype) -> None:
    """Sum the gradients of a sharded stage in ``master`` from the first one on; its tensors must have been made. FSDP
    would do it for whole microbatches only, as it sees them: not for two heads that share a matrix, nor for the second
    halves of backwards that a schedule runs one after the other."""
    units = [module for module in stage.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
        for parameter in unit.parameters():
            if parameter.requires_grad and parameter.is_leaf:
                parameter.grad_dtype = master
        unit.reshard()
