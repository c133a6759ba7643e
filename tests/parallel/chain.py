"""The stages of a pipeline one after the other in one process, without groups: what their tests look at. Not a test."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from exitlm.model.config import ModelConfig
from exitlm.model.exits import ExitConfig
from exitlm.parallel.pipeline.split import Split, make_split
from exitlm.parallel.pipeline.stage import Stage, StepPlan
from exitlm.parallel.tied import canonical
from exitlm.train.head_loss import HeadLosses
from tests.parallel.reference import Table, Values


def split_of(config: ModelConfig, exits: Sequence[ExitConfig], counts: Sequence[int], **options: Any) -> Split:
    """The stages with these numbers of layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_split(config, exits, len(counts), layers_per_stage=counts, **options)


def stages_of(
    config: ModelConfig,
    exits: Sequence[ExitConfig],
    split: Split,
    losses: HeadLosses,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> list[Stage]:
    """All stages, with the values of the reference."""
    built = [Stage(config, exits, split, i, losses, dtype=dtype, **options).to(dtype) for i in range(split.stages)]
    with torch.no_grad():
        for stage in built:
            for name, parameter in stage.tensors():
                parameter.copy_(Values(0, dtype).tensor(canonical(name, config, exits), parameter.shape))
    return built


def plan_of(exits: Sequence[ExitConfig], table: Table, *, final: bool = True, **options: Any) -> StepPlan:
    """All heads, with weights that differ; a token counts its share of all that do."""
    weights = {e.layer: 0.5 + 0.25 * e.layer for e in exits} | ({0: 1.0} if final else {})
    return StepPlan(weights=weights, shares=dict.fromkeys(weights, 1.0 / table.valid(range(len(table)))), **options)


def forward(stages: Sequence[Stage], table: Table, plan: StepPlan, microbatch: int = 0) -> list[tuple[Any, Any]]:
    """What went into each stage, as leaves of their own graphs, and what came out."""
    options = {"labels": table.labels, "documents": table.documents, "microbatch": microbatch, "plan": plan}
    passed: list[tuple[Any, Any]] = []
    inputs: tuple[Tensor, ...] = (table.ids,)
    for stage in stages:
        out = stage(*inputs, **options)
        outputs = out if isinstance(out, tuple) else (out,)
        passed.append((inputs, outputs))
        inputs = tuple(tensor.detach().requires_grad_() for tensor in outputs)
    return passed


def backward(passed: Sequence[tuple[Any, Any]]) -> None:
    """From the last stage to the first."""
    grads: tuple[Tensor, ...] = (torch.ones_like(passed[-1][1][0]),)
    for inputs, outputs in reversed(passed):
        torch.autograd.backward(outputs, grads)
        grads = tuple(tensor.grad for tensor in inputs)


def gradients(stages: Sequence[Stage], config: ModelConfig, exits: Sequence[ExitConfig]) -> dict[str, Tensor]:
    """By canonical name, copies summed."""
    out: dict[str, Tensor] = {}
    for stage in stages:
        for name, parameter in stage.tensors():
            if parameter.grad is not None:
                name = canonical(name, config, exits)
                out[name] = out[name] + parameter.grad if name in out else parameter.grad
    return out
