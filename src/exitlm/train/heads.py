"""The exits as the tuner sees them: their parameters, what they read of a row, and the matrices they multiply with.

Heads compute in one dtype (bfloat16 by autocast); parameters are kept in at least float32. The shared output matrix is
frozen and cast once. Not here: the loss (``objective.py``) and the optimizer (``loop.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import ExitHead, RidgeStatistics
from exitlm.model.layers import Tap
from exitlm.train.hidden import Row, join_optional, join_rows
from exitlm.train.objective import HeadInput, Teacher
from exitlm.train.precision import padding

TOKENS_STEP = 256


@dataclass(frozen=True)
class HeadBatch:
    """What the losses of a batch read: one input per exit, the gates' log-odds (None without a gate), the teacher. The
    first ``count`` of the N tokens are real; the others pad and must have weight 0."""

    inputs: list[HeadInput]
    gates: list[Tensor | None]
    labels_N: Tensor
    teacher: Teacher | None
    count: int

    def weights(self, value: float, dtype: torch.dtype) -> Tensor:
        """``value`` for every real token and 0 for the padding, ``[N]``."""
        weight_N = torch.zeros(len(self.labels_N), dtype=dtype, device=self.labels_N.device)
        weight_N[: self.count] = value
        return weight_N


class Heads:
    """The exits of ``model`` in ascending order, computing in ``dtype``."""

    def __init__(self, model: EarlyExitModel, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.by_layer: dict[int, ExitHead] = model.exit_heads()
        self.layers = list(self.by_layer)
        self.device = model.device
        self.master = torch.promote_types(model.dtype, torch.float32)
        for head in self.by_layer.values():
            head.to(self.master)
        self.ids: dict[int, Tensor | None] = {}  # equal sets are one tensor: the teacher's part is computed once for it
        for layer, head in self.by_layer.items():
            mine = head.candidate_ids
            same = (x for x in self.ids.values() if x is not None and mine is not None and torch.equal(x, mine))
            self.ids[layer] = next(same, mine)
        self._final = {model.dtype: model.lm_head.weight.detach()}
        self._restricted: dict[tuple[int, torch.dtype], Tensor] = {}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter once, by its name in an adapter."""
        out: dict[str, nn.Parameter] = {}
        seen: set[int] = set()
        for layer, head in self.by_layer.items():
            for name, parameter in head.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    out[f"exits.{layer}.{name}"] = parameter
        return out

    def owner(self, name: str) -> int:
        """The exit that a parameter's name belongs to."""
        return int(name.split(".")[1])

    def final_weight(self, dtype: torch.dtype) -> Tensor:
        """The final head's matrix, cast once."""
        if dtype not in self._final:
            self._final[dtype] = self.model.lm_head.weight.detach().to(dtype)
        return self._final[dtype]

    def matrix(self, layer: int, dtype: torch.dtype) -> Tensor:
        """What the features of an exit are multiplied with, ``[K, D]`` (low rank: ``[K, rank]``)."""
        head = self.by_layer[layer]
        if head.config.output in ("own", "exits"):
            return head.output.weight.to(dtype)
        if head.config.output == "low_rank":
            return head.output_up.weight.to(dtype)
        if head.candidate_ids is None:
            return self.final_weight(dtype)
        key = (layer, dtype)
        if key not in self._restricted:
            self._restricted[key] = self.final_weight(dtype)[head.candidate_ids]
        return self._restricted[key]

    def batch(self, rows: Sequence[Row], dtype: torch.dtype | None = None) -> HeadBatch:
        """The losses' inputs for several rows, all their counted positions in one list of N tokens."""
        dtype = dtype or self.dtype
        inputs: list[HeadInput] = []
        gates: list[Tensor | None] = []
        low = dtype in (torch.bfloat16, torch.float16)
        autocast: Any = torch.autocast(self.device.type, dtype) if low else nullcontext()
        count = sum(len(row.labels_N) for row in rows)
        extra = padding(count, dtype, TOKENS_STEP)
        for layer, head in self.by_layer.items():
            with autocast:
                features, hidden = self._features(head, rows, layer, extra)
                if head.config.output == "low_rank":
                    features = head.output_down(features)
            gates.append(head.gate_logit(hidden) if head.config.gate else None)
            inputs.append(
                HeadInput(features_ND=features.to(dtype), weight_KD=self.matrix(layer, dtype), ids_K=self.ids[layer])
            )
        final = join_optional([row.final_ND for row in rows])
        teacher = None
        if final is not None:
            argmax, lse = (join_optional([getattr(row, name) for row in rows]) for name in ("argmax_N", "lse_N"))
            teacher = Teacher(
                features_ND=_padded(final.to(dtype), extra),
                weight_VD=self.final_weight(dtype),
                argmax_N=None if argmax is None else _padded(argmax, extra),
                lse_N=None if lse is None else _padded(lse, extra),
            )
        labels = _padded(torch.cat([row.labels_N for row in rows]), extra)
        return HeadBatch(inputs, gates, labels, teacher, count)

    def _features(self, head: ExitHead, rows: Sequence[Row], layer: int, extra: int) -> tuple[Tensor, Tensor]:
        """Features ``[N, D]`` and the hidden states ``[N, D]`` that the gate reads, padding included."""
        if head.config.kind != "block":
            tap = self._wide(join_rows(rows, layer), extra)
            return head.features(tap)[0], tap.hidden[0]
        features, hidden = [], []
        for row in rows:
            for tap, counted in zip(row.taps[layer], row.counted, strict=True):
                tap = self._wide(tap)
                context = self.model.context_for(1, tap.hidden.shape[1])
                features.append(head.features(tap, context)[0, -counted:])
                hidden.append(tap.hidden[0, -counted:])
        return _padded(torch.cat(features), extra), _padded(torch.cat(hidden), extra)

    def _wide(self, tap: Tap, extra: int = 0) -> Tap:
        """The tap in the dtype of the parameters, with ``extra`` further positions."""
        return tap.map(lambda tensor_BTD: F.pad(tensor_BTD.to(self.master), (0, 0, 0, extra)))

    def solve_closed_form(self, rows: Iterator[Row], layers: Sequence[int]) -> int:
        """Set the lenses of ``layers`` to the ridge solution over ``rows``; returns the number of tokens used."""
        sums = {layer: RidgeStatistics(self.model.config.hidden_size, self.device) for layer in layers}
        tokens = 0
        with torch.no_grad():
            for row in rows:
                assert row.final_ND is not None
                tokens += len(row.labels_N)
                for layer, statistics in sums.items():
                    hidden = self._wide(join_rows([row], layer)).hidden[0]
                    statistics.add(self.by_layer[layer].unit(hidden), row.final_ND)
            for layer, statistics in sums.items():
                slope, offset = statistics.solve()
                self.by_layer[layer].lens.weight.copy_(slope)
                self.by_layer[layer].lens.bias.copy_(offset)
        return tokens


def _padded(tensor: Tensor, extra: int) -> Tensor:
    """``extra`` zeros behind the first dimension."""
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, extra)) if extra else tensor
