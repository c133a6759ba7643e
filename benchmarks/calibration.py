"""Times of the parts of a model in full training, and the forward and backward times of pipeline stages made of them.

A head that is deferred computes nothing in its forward; its backward is both. Not here: what is done with the times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure import Spread, spread

from exitlm.model.exits import ExitConfig
from exitlm.model.layers import Tap
from exitlm.parallel.pipeline.split import Split
from exitlm.parallel.pipeline.stage import FINAL, Position, StepPlan
from exitlm.train.trainer import Trainer


@dataclass(frozen=True)
class Times:
    """Seconds of forward and backward of one microbatch: a layer, an exit's head, the final head, the embedding."""

    layer: tuple[float, float]
    exit: tuple[float, float]
    final: tuple[float, float]
    embedding: tuple[float, float]

    @property
    def head(self) -> float:
        """All of an exit: f_E + b_E."""
        return sum(self.exit)

    def stages(self, split: Split, exits: Sequence[ExitConfig]) -> tuple[list[float], list[float]]:
        """Forward and backward times of the stages of a split."""
        here = {e.layer for e in exits}
        forward, backward = [], []
        for index in range(split.stages):
            heads = len(here & set(split.exits(index)))
            count = len(split.layers(index))
            for side, out in ((0, forward), (1, backward)):
                value = count * self.layer[side] + heads * self.exit[side]
                value += (index == 0) * self.embedding[side] + (index == split.stages - 1) * self.final[side]
                out.append(value)
        return forward, backward


def calibrate(trainer: Trainer, rounds: int) -> tuple[Times, dict[str, Spread]]:
    """Medians, and all spreads in ms. All layers run one after the other, and parts take turns, so that no part finds
    its weights in a cache that it would not have in training. The model needs an exit."""
    stage, hidden = trainer.stages[0], trainer.runner.hidden
    shape = hidden.shape[:2]
    model, depth = stage.model, trainer.job.model.num_hidden_layers
    ids = torch.randint(trainer.job.model.vocab_size, shape, device=hidden.device)
    documents = torch.zeros(shape, dtype=torch.long)
    context = stage.context(documents, hidden.device)
    layer = min(model.exit_heads())
    plan = StepPlan(weights={layer: 1.0, FINAL: 1.0}, shares=dict.fromkeys((layer, FINAL), 1.0 / ids.numel()))
    gradient, state = torch.randn(hidden.shape), torch.randn(hidden.shape)

    def layers() -> Any:
        x = state.detach().requires_grad_()
        for index in range(depth):
            x = model.model.layers[str(index)](x, context)
        return x

    def head(which: int) -> Any:
        position = Position(which, model.exit_heads().get(which), model, context)
        return stage.losses(position, ids, plan, 0).attach(Tap(state.detach().requires_grad_()), None)[0]

    parts: dict[str, tuple[int, Callable[[], Any]]] = {
        "layer": (depth, layers),
        "exit": (1, lambda: head(layer)),
        "final": (1, lambda: head(FINAL)),
        "embedding": (1, lambda: model.embed(ids)),
    }
    found: dict[str, list[float]] = {f"{name} {way}": [] for name in parts for way in ("f", "b")}
    for turn in range(rounds + 1):
        for name, (count, run) in parts.items():
            begin = time.perf_counter()
            out = run()
            middle = time.perf_counter()
            out.backward(gradient)
            end = time.perf_counter()
            if turn:
                found[f"{name} f"].append((middle - begin) / count)
                found[f"{name} b"].append((end - middle) / count)
    stage.losses.take()
    trainer.shards.clear()
    spreads = {name: spread(values) for name, values in found.items()}
    times = Times(**{name: (spreads[f"{name} f"].median, spreads[f"{name} b"].median) for name in parts})
    return times, {name: spread([v * 1e3 for v in values]) for name, values in found.items()}
