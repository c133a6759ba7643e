"""What a stage is told to be: which layers of which model, with which exits, in which pool. Plain data, as JSON.

The weights of the layers are on the stage's own disk, and their digest says that they are the head's. Exits are sent,
tensor by tensor, so that those of any adapter, or of none, are the same everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exitlm.decode.kernels.share import Share
from exitlm.decode.options import EngineConfig
from exitlm.decode.remote.frames import BadFrame, Frame, Kind
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import ExitConfig, ExitHead, ExitKey
from exitlm.values import settings_of
from exitlm.weights.load import Unfilled

_PIECE = 64 << 20  # bytes of a tensor in one frame


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Which weights, and how they are run. ``source``: what the head calls the model; ``digest`` of its weights.
    ``dtype``, ``device``, ``quant`` and ``compile`` are those of the head; ``rounds``: whether exits' matrices are
    rounded to 8 bits."""

    source: str
    digest: str
    dtype: str
    device: str
    quant: str
    compile: str
    rounds: bool
    options: EngineConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a stage has to be. ``number`` is its place, of ``stages``; ``blocks`` of each group of cache entries;
    ``adapters`` are the names of all; ``exits`` those at the ends of the stage's own layers."""

    weights: Weights
    number: int
    stages: int
    share: Share
    blocks: Sequence[int]
    adapters: Sequence[str]
    exits: Sequence[tuple[str, ExitConfig]]

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        weights = dataclasses.asdict(self.weights)
        share = {
            "layers": [self.share.layers.start, self.share.layers.stop], "bounds": list(self.share.bounds),
            "blocks": [[name, layer, entry] for (name, layer), entry in self.share.blocks.items()],
        }  # fmt: skip
        exits = [[name, dataclasses.asdict(config)] for name, config in self.exits]
        return {
            "weights": weights, "number": self.number, "stages": self.stages, "share": share,
            "blocks": list(self.blocks), "adapters": list(self.adapters), "exits": exits,
        }  # fmt: skip

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Job:
        """From JSON.

        Raises:
            BadFrame: it is no job.
        """
        try:
            share = found["share"]
            start, stop = share["layers"]
            return cls(
                weights=weights_of(found["weights"]), number=int(found["number"]), stages=int(found["stages"]),
                share=Share(
                    layers=range(start, stop), bounds=tuple(share["bounds"]),
                    blocks={(name, layer): entry for name, layer, entry in share["blocks"]},
                ),
                blocks=[int(count) for count in found["blocks"]], adapters=[str(name) for name in found["adapters"]],
                exits=[(str(name), ExitConfig(**config)) for name, config in found["exits"]],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, UserError) as error:
            raise BadFrame(f"a job came that is none ({error})") from error


def weights_of(found: Mapping[str, Any]) -> Weights:
    """From JSON. Raises Python's own errors for what is none."""
    options = settings_of(EngineConfig, found["options"], "the engine")
    return Weights(**{**found, "options": options})


# ---- exits


def pieces(exits: Mapping[ExitKey, ExitHead]) -> Iterator[Frame]:
    """The tensors of exits, each in frames that are not too large: (exit, tensor, rows before) and some rows."""
    for at, head in enumerate(exits.values()):
        for number, tensor in enumerate(head.state_dict().values()):
            held = tensor.detach().cpu()
            rows = max(1, _PIECE // max(1, held[:1].numel() * held.element_size())) if held.dim() else 1
            for start in range(0, max(1, len(held) if held.dim() else 1), rows):
                yield Frame(
                    Kind.TENSOR, [at, number, start], tensors=[held[start : start + rows] if held.dim() else held]
                )


class Exits:
    """The exits that a stage is sent."""

    def __init__(self, model: EarlyExitModel, exits: Sequence[tuple[str, ExitConfig]]) -> None:
        self._model, self._exits = model, exits
        with torch.device("meta"), Unfilled():
            self._heads = [ExitHead(config, model.config) for _, config in exits]
        self._states: list[dict[str, Tensor]] = [{} for _ in exits]
        self.missing = sum(tensor.numel() for head in self._heads for tensor in head.state_dict().values())

    def take(self, frame: Frame) -> None:
        """Some rows of a tensor.

        Raises:
            BadFrame: no exit has them.
        """
        at, number, start = (*frame.ints, -1, -1, -1)[:3]
        if frame.kind != Kind.TENSOR or len(frame.tensors) != 1 or not 0 <= at < len(self._heads):
            raise BadFrame("something else came than a part of an exit")
        wanted, (piece,) = list(self._heads[at].state_dict().items()), frame.tensors
        if not 0 <= number < len(wanted):
            raise BadFrame("a tensor came that no exit has")
        name, expected = wanted[number]
        dtype = self._model.dtype if expected.is_floating_point() else expected.dtype
        held = self._states[at].setdefault(name, torch.empty(expected.shape, dtype=dtype, device=self._model.device))
        place = held[start : start + len(piece)] if held.dim() else held
        if place.shape != piece.shape or piece.is_floating_point() != held.is_floating_point():
            raise BadFrame("a tensor came that does not fit its exit")
        place.copy_(piece)
        self.missing -= piece.numel()

    def attach(self) -> None:
        """Give them to the model, under the names of their adapters."""
        sets: dict[str, dict[int, ExitHead]] = {}
        for (name, config), head, state in zip(self._exits, self._heads, self._states, strict=True):
            head.load_state_dict(state, assign=True)
            sets.setdefault(name, {})[config.layer] = head.eval()
        self._model.add_adapters(sets)
