"""An engine on the first of several tensor ranks, and the others that follow it pass by pass. Not a test.

What the first rank's runner is asked goes to the others as frames: a line of JSON and raw tensors.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from exitlm.decode import engine as engines
from exitlm.decode.batch import Batch, Part
from exitlm.decode.engine import Engine
from exitlm.decode.kernels.runner import Arrived, Runner
from exitlm.decode.kernels.tensor_model import TensorModel
from exitlm.decode.options import EngineConfig
from exitlm.decode.remote.lockstep import Lockstep
from exitlm.model import EarlyExitModel
from tests.decode.models import some_costs


class LeadingRunner(Runner):
    """The runner of the first rank, which tells the others what it is asked."""

    def __init__(self, fused: TensorModel, options: EngineConfig, lockstep: Lockstep) -> None:
        super().__init__(fused, options)
        self.lockstep = lockstep
        self.newest: Arrived | None = None
        copy, clear = self.pool.copy, self.pool.clear

        def copied(group: int, sources: Sequence[int], targets: Sequence[int]) -> None:
            self.tell("copy", group=group, sources=list(sources), targets=list(targets))
            copy(group, sources, targets)

        def cleared(group: int, blocks: Sequence[int]) -> None:
            self.tell("clear", group=group, blocks=list(blocks))
            clear(group, blocks)

        self.pool.copy, self.pool.clear = copied, cleared  # type: ignore[method-assign]

    def tell(self, what: str, raw: bytes = b"", **said: Any) -> None:
        """Hand a request on."""
        self.lockstep.send(json.dumps({"what": what, **said}).encode() + b"\n" + raw)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        self.tell("embed", tokens=list(tokens))
        return super().embed(tokens)

    def run(self, first: int, last: int, batch: Batch, hidden_MD: Tensor) -> Arrived:
        parts = [dataclasses.asdict(part) for part in batch.parts]
        self.tell("run", hidden_MD.numpy().tobytes(), first=first, last=last, parts=parts)
        self.newest = super().run(first, last, batch, hidden_MD)
        return self.newest

    def exit_logits(self, boundary: int, arrived: Arrived, rows: Sequence[int], adapter: str | None = None) -> Tensor:
        assert arrived is self.newest
        self.tell("exit", boundary=boundary, rows=list(rows), adapter=adapter)
        return super().exit_logits(boundary, arrived, rows, adapter)

    def final_logits(self, arrived: Arrived, rows: Sequence[int]) -> Tensor:
        assert arrived is self.newest
        self.tell("final", rows=list(rows))
        return super().final_logits(arrived, rows)


@torch.inference_mode()
def follow(runner: Runner, lockstep: Lockstep) -> int:
    """Do what the first rank says until it says that it ends; how many passes there were."""
    arrived, passes = None, 0
    while True:
        line, _, raw = lockstep.receive().partition(b"\n")
        said = json.loads(line)
        match said.pop("what"):
            case "embed":
                runner.embed(said["tokens"])
            case "run":
                batch = Batch.of(tuple(part_of(part) for part in said["parts"]))
                hidden = torch.frombuffer(bytearray(raw), dtype=runner.fused.dtype).view(batch.count, -1)
                arrived, passes = runner.run(said["first"], said["last"], batch, hidden), passes + 1
            case "exit":
                assert arrived is not None
                runner.exit_logits(said["boundary"], arrived, said["rows"], said["adapter"])
            case "final":
                assert arrived is not None
                runner.final_logits(arrived, said["rows"])
            case "copy":
                runner.pool.copy(**said)
            case "clear":
                runner.pool.clear(**said)
            case "end":
                return passes


def part_of(said: dict[str, Any]) -> Part:
    """A part of a batch from JSON, which knows no tuples."""
    runs = {name: tuple(tuple(tuple(run) for run in group) for group in said[name]) for name in ("reads", "writes")}
    return Part(**{**said, **runs, "firsts": tuple(said["firsts"])})


def leading_engine(model: EarlyExitModel, fused: TensorModel, lockstep: Lockstep, options: EngineConfig) -> Engine:
    """An engine whose runner is one of several ranks."""
    with (
        patch.object(engines, "packed_model", lambda *_: fused),
        patch.object(engines, "Runner", lambda fused, options: LeadingRunner(fused, options, lockstep)),
    ):
        return Engine(model, quant="none", options=options, costs=some_costs(model))
