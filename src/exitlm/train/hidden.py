"""What the frozen backbone computes for each block of training data, and a bounded cache of it.

One forward of the backbone (``backbone.py``) gives every exit its input, and the final features where the objective
needs them; no layer above the highest one asked for is run. A document piece is a sequence of its own, so a result is a
pure function of the block and the cache changes nothing but the time.

Shapes: N positions of a block that count, D hidden_size, V vocab_size, k of the teacher's best ids.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from exitlm.model.layers import Tap
from exitlm.train.backbone import Backbone, cut_tap, join_taps
from exitlm.train.data import Blocks

_TAP_FIELDS = ("hidden", "residual", "normed")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the objective needs: taps of ``exits``; ``whole`` are those with attention of their own, which need every
    position of a piece. ``final``: the final features. ``teacher``: its argmax, log-sum-exp at ``temperature`` and best
    ids, so that no full product is needed while training."""

    exits: tuple[int, ...]
    whole: frozenset[int] = frozenset()
    final: bool = True
    teacher: bool = False
    temperature: float = 1.0


@dataclass(frozen=True)
class Row:
    """One block. ``taps[layer]`` holds one tap ``[1, N, D]``, or for a ``whole`` exit one per piece with all positions,
    of which the last ``counted[i]`` count."""

    labels_N: Tensor
    counted: tuple[int, ...]
    taps: dict[int, list[Tap]]
    final_ND: Tensor | None = None
    argmax_N: Tensor | None = None
    lse_N: Tensor | None = None
    best_Nk: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, for a file."""
        out = {"labels": self.labels_N, "counted": torch.tensor(self.counted)}
        for name in ("final_ND", "argmax_N", "lse_N", "best_Nk"):
            if (tensor := getattr(self, name)) is not None:
                out[name] = tensor
        for layer, taps in self.taps.items():
            for i, tap in enumerate(taps):
                for field in _TAP_FIELDS:
                    if (tensor := getattr(tap, field)) is not None:
                        out[f"tap.{layer}.{i}.{field}"] = tensor
        return out

    @staticmethod
    def from_tensors(found: dict[str, Tensor]) -> Row:
        """The inverse of :meth:`tensors`."""
        parts: dict[int, dict[int, dict[str, Tensor]]] = {}
        for name, tensor in found.items():
            if name.startswith("tap."):
                _, layer, i, field = name.split(".")
                parts.setdefault(int(layer), {}).setdefault(int(i), {})[field] = tensor
        taps = {layer: [Tap(**many[i]) for i in sorted(many)] for layer, many in sorted(parts.items())}
        rest = {name: found.get(name) for name in ("final_ND", "argmax_N", "lse_N", "best_Nk")}
        return Row(found["labels"], tuple(found["counted"].tolist()), taps, **rest)

    def nbytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


class HiddenStates:
    """The rows of ``blocks``, computed when first asked for. ``keep``: ``memory``, ``disk`` (files under ``home``, gone
    with :meth:`close`) or ``none``; at most ``limit`` bytes are kept, the rest is computed again."""

    def __init__(
        self, backbone: Backbone, blocks: Blocks, wanted: Wanted, *, keep: str, limit: float, home: Path
    ) -> None:
        self.backbone, self.blocks, self.wanted = backbone, blocks, wanted
        self.keep, self.limit, self.home = keep, limit, home
        self.held: dict[int, Row | Path] = {}
        self.bytes = 0
        self.computed = 0
        shutil.rmtree(home, ignore_errors=True)

    def __len__(self) -> int:
        return len(self.blocks)

    def row(self, index: int) -> Row:
        """The row of a block, from the cache or computed."""
        if (found := self.held.get(index)) is not None:
            return found if isinstance(found, Row) else Row.from_tensors(load_file(found, str(self.backbone.device)))
        row = self.compute(index)
        self.computed += 1
        size = row.nbytes()
        if self.keep != "none" and self.bytes + size <= self.limit:
            if self.keep == "memory":
                self.held[index] = row
            else:
                self._store(index, row)
            self.bytes += size
        return row

    def _store(self, index: int, row: Row) -> None:
        path = self.home / f"{index}.safetensors"
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in row.tensors().items()}, path)
            self.held[index] = path
        except (OSError, SafetensorError) as error:
            warnings.warn(f"no more hidden states are kept, they are computed again instead: {error}", stacklevel=3)
            path.unlink(missing_ok=True)
            self.keep = "none"

    def close(self) -> None:
        """Forget everything, files included."""
        self.held.clear()
        shutil.rmtree(self.home, ignore_errors=True)

    @torch.no_grad()
    def compute(self, index: int) -> Row:
        """Run the backbone on one block."""
        wanted, backbone, depth = self.wanted, self.backbone, self.backbone.depth
        layers = {*wanted.exits, *([depth] if wanted.final else [])}
        labels, counted, final = [], [], []
        taps: dict[int, list[Tap]] = {layer: [] for layer in wanted.exits}
        pieces = self.blocks[index]
        for piece, found in zip(pieces, backbone.taps([piece.ids[:-1] for piece in pieces], layers), strict=True):
            labels.append(piece.ids[1 + piece.first :].to(backbone.device))
            counted.append(piece.targets)
            if wanted.final:
                final.append(backbone.features(found[depth].hidden[0, piece.first :]))
            for layer in wanted.exits:
                first = 0 if layer in wanted.whole else piece.first
                taps[layer].append(cut_tap(found[layer], first, len(piece.ids) - 1).map(torch.clone))
        joined = {layer: many if layer in wanted.whole else [join_taps(many)] for layer, many in taps.items()}
        row = Row(torch.cat(labels), tuple(counted), joined, torch.cat(final) if final else None)
        if not wanted.teacher:
            return row
        assert row.final_ND is not None
        found_N = backbone.teacher(row.final_ND, wanted.temperature)
        return replace(row, argmax_N=found_N.argmax_N, lse_N=found_N.lse_N, best_Nk=found_N.best_Nk)


def join_rows(rows: Sequence[Row], layer: int) -> Tap:
    """The tap of an exit without attention of its own for several rows, ``[1, sum of N, D]``."""
    return join_taps([row.taps[layer][0] for row in rows])


def join_optional(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """All tensors in one, or None if they are absent."""
    present = [t for t in tensors if t is not None]
    assert len(present) in (0, len(tensors))
    return torch.cat(present) if present else None
