"""The frozen backbone as tuning runs it: from the pieces of a block to what exits and objective read of them.

Two of them, chosen once for a run by :func:`backbone_of`: the torch model, a piece at a time, and the native kernels,
all pieces of a block as the rows of a pass. The native one reads the weights as they are stored, as decoding does, so
that exits are tuned on the hidden states that they will meet there. A result is a function of the piece alone: nothing
that ran before it or beside it changes a bit.

Hundreds of rows at once are bound by multiplications, not by memory as decoding is. So the kernels are for matrices on
a grid, on processors that multiply and add bytes in one instruction (VNNI): they do it about twice as fast as torch
does with floats. Elsewhere torch is as fast or faster, also where the kernels decode.

Shapes: T positions of a piece, N positions of several pieces that count, M rows of a pass, D hidden_size, V vocab_size,
k of the teacher's best ids.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exitlm.decode.batch import Batch, Part
from exitlm.decode.cache.kv_pool import KVPool
from exitlm.decode.kernels.native_model import NativeModel
from exitlm.decode.kernels.packed import packed_model, why_not_native
from exitlm.decode.options import EngineConfig
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.layers import DecoderLayer, Tap
from exitlm.native import abi, library
from exitlm.native.pack import GRIDS, fits, format_of
from exitlm.train.objective import Scratch, chunk_tokens
from exitlm.train.precision import padding
from exitlm.weights.stored import StoredMatrices

BEST = 16
LENGTH_STEP = 64
PASS_ROWS = 512
"""Rows of one pass of the native kernels."""
TORCH, NATIVE = "torch", "native"
FAST = ("avx512vnni", "avxvnni")
"""Instruction sets by which the kernels run many rows faster than torch, as measured for the first."""


@dataclass(frozen=True)
class TeacherSummary:
    """The final head's ``argmax_N``, ``lse_N`` (log-sum-exp of logits / temperature) and best ids ``best_Nk``."""

    argmax_N: Tensor
    lse_N: Tensor
    best_Nk: Tensor


class Backbone(Protocol):
    """A model of ``depth`` layers whose weights stay as they are. ``kernels`` says who computes: torch or native."""

    kernels: str
    device: torch.device
    depth: int

    def taps(self, pieces: Sequence[Tensor], layers: Collection[int]) -> Iterator[dict[int, Tap]]:
        """The taps ``[1, T, D]`` of each piece (ids ``[T]``, of a text of its own) after ``layers`` (1-based)."""
        ...

    def features(self, hidden_ND: Tensor) -> Tensor:
        """What the final head reads, ``[N, D]``, of the last layer's output."""
        ...

    def teacher(self, features_ND: Tensor, temperature: float) -> TeacherSummary:
        """What the final head makes of these features."""
        ...


def backbone_of(model: EarlyExitModel, kernels: str | None = None) -> Backbone:
    """The backbone of a model: by the native kernels where they can run it and are the faster ones, else by torch; or
    by the ``kernels`` with which a run began.

    Raises:
        UserError: it began with the native kernels, which can't run the model here.
    """
    reason = why_not_native(model.config, model.device, model.dtype)
    if kernels == NATIVE and reason is not None:
        raise UserError(
            f"this run's hidden states came from the native kernels, which can't run here ({reason}); put that right "
            "to go on, or choose another directory"
        )
    if kernels is None:
        faster = reason is None and library.load().isa in FAST and _lies_on_a_grid(model)
        kernels = NATIVE if faster else TORCH
    return NativeBackbone(model) if kernels == NATIVE else TorchBackbone(model)


def _lies_on_a_grid(model: EarlyExitModel) -> bool:
    """Whether the first layer's matrices are on grids in the model's file: the others are stored alike."""
    stored = StoredMatrices(model)
    parameters = ((name, each) for name, each in model.named_parameters() if name.startswith("model.layers.0."))
    found = [stored(name, each) for name, each in parameters if each.dim() == 2]
    return all(raw is not None and fits(raw.type, raw.cols) and format_of(raw.type) in GRIDS for raw in found)


class TorchBackbone:
    """The model itself, in its own dtype, on its own device."""

    kernels = TORCH

    def __init__(self, model: EarlyExitModel) -> None:
        self.model, self.device, self.depth = model, model.device, model.config.num_hidden_layers
        self._scratch = Scratch(chunk_tokens(model.config.vocab_size), model.device)

    @torch.no_grad()
    def taps(self, pieces: Sequence[Tensor], layers: Collection[int]) -> Iterator[dict[int, Tap]]:
        """See :class:`Backbone`."""
        for ids in pieces:
            count = len(ids)  # what is padded behind it has no effect on the positions before
            padded = F.pad(ids.to(self.device), (0, padding(count, self.model.dtype, LENGTH_STEP)))
            found = self.model.taps(padded[None], layers)
            yield {layer: cut_tap(tap, 0, count) for layer, tap in found.items()}

    @torch.no_grad()
    def features(self, hidden_ND: Tensor) -> Tensor:
        """See :class:`Backbone`."""
        return self.model.final_features(hidden_ND)

    @torch.no_grad()
    def teacher(self, features_ND: Tensor, temperature: float) -> TeacherSummary:
        """See :class:`Backbone`."""
        return teacher_summary(features_ND, self.model.lm_head.weight, temperature, self._scratch)


def teacher_summary(final_ND: Tensor, weight_VD: Tensor, temperature: float, scratch: Scratch) -> TeacherSummary:
    """The summary by torch, ``scratch.chunk`` rows at a time."""
    wide = torch.promote_types(final_ND.dtype, torch.float32)
    argmax, lse, best = [], [], []
    count, vocab = len(final_ND), len(weight_VD)
    rows = F.pad(final_ND, (0, 0, 0, padding(count, final_ND.dtype, scratch.chunk)))
    for part in torch.split(rows, scratch.chunk):
        logits = scratch.product("teacher", part, weight_VD, wide)
        top = logits.topk(min(BEST, vocab), -1)
        argmax.append(top.indices[:, 0])
        best.append(top.indices)
        p = torch.softmax(logits.div_(temperature), -1, out=scratch.get("p", len(part), vocab, wide))
        lse.append(top.values[:, 0] / temperature - p.amax(-1).log())
    return TeacherSummary(*(torch.cat(many)[:count].clone() for many in (argmax, lse, best)))


class NativeBackbone:
    """The model as the native kernels run it, whatever exits it has: layers, and the final head's scores."""

    kernels = NATIVE

    def __init__(self, model: EarlyExitModel, native: NativeModel | None = None) -> None:
        """``native``: the packed model (default: packed here, or taken from the user's cache)."""
        if native is None:
            packed = packed_model(model, "auto", "auto", EngineConfig())
            assert isinstance(packed, NativeModel), "the native kernels do not run here"
            native = packed
        self.model, self.device, self.native, self.depth = model, model.device, native, native.config.num_hidden_layers
        self._head = abi.Head(first=native.output, width=model.config.vocab_size)  # the norm is in the features
        self._scratch = Scratch(chunk_tokens(native.output.rows), model.device)
        self._pool = _pool_for(native, 1)

    @torch.no_grad()
    def taps(self, pieces: Sequence[Tensor], layers: Collection[int]) -> Iterator[dict[int, Tap]]:
        """See :class:`Backbone`. A piece is a sequence of its own in the pass, with blocks of its own."""
        size = self._pool.block_size
        blocks = [-(-len(ids) // size) for ids in pieces]
        if sum(blocks) > min(self._pool.blocks):
            self._pool = _pool_for(self.native, sum(blocks))
        firsts = [size * sum(blocks[:i]) for i in range(len(pieces))]
        found: list[dict[int, list[Tap]]] = [{layer: [] for layer in layers} for _ in pieces]
        for stretches in _passes([len(ids) for ids in pieces], PASS_ROWS):
            self._run(stretches, pieces, firsts, found)
        for each in found:
            yield {layer: join_taps(taps) for layer, taps in each.items()}

    def _run(
        self,
        stretches: Sequence[tuple[int, int, int]],
        pieces: Sequence[Tensor],
        firsts: Sequence[int],
        found: Sequence[dict[int, list[Tap]]],
    ) -> None:
        """One pass: positions ``start`` to ``stop - 1`` of some pieces, whose slots begin at ``firsts``."""
        parts = tuple(self._part(start, stop, firsts[i], len(pieces[i])) for i, start, stop in stretches)
        rows = self.native.rows(Batch.of(parts), self._pool)
        ids = torch.cat([pieces[i][start:stop] for i, start, stop in stretches])
        hidden_MD, at = self.native.embed(ids.tolist()), 0
        for layer in sorted(found[0]):
            hidden_MD, residual_MD = self.native.run(hidden_MD, at, layer, rows)
            tap, at, begin = self._tap(layer, hidden_MD[None], residual_MD[None]), layer, 0
            for i, start, stop in stretches:
                found[i][layer].append(cut_tap(tap, begin, begin + stop - start))
                begin += stop - start

    def _part(self, start: int, stop: int, first: int, length: int) -> Part:
        """Positions of a piece of this ``length`` whose slots begin at ``first``, in every group."""
        groups, original = len(self._pool.groups), self.native.original_context
        reads, writes = ((first, stop),), ((first + start, stop - start),)
        stretched = original is not None and length > original
        return Part(start, stop - start, (0,) * groups, (reads,) * groups, (writes,) * groups, stretched)

    def _tap(self, layer: int, hidden_1MD: Tensor, residual_1MD: Tensor) -> Tap:
        """What an exit reads after a layer: more than the stream only where it has the MLP's input."""
        head = self.model.exit_heads().get(layer)
        if head is None or head.config.kind != "mlp":
            return Tap(hidden_1MD)
        trunk = self.model.model.layers[str(layer - 1)]
        assert isinstance(trunk, DecoderLayer)
        return Tap(hidden_1MD, residual_1MD, trunk.mlp_input(residual_1MD))

    @torch.no_grad()
    def features(self, hidden_ND: Tensor) -> Tensor:
        """See :class:`Backbone`."""
        return self.model.final_features(hidden_ND)

    @torch.no_grad()
    def teacher(self, features_ND: Tensor, temperature: float) -> TeacherSummary:
        """See :class:`Backbone`. ``argmax_N`` is 0 in rows that hold no numbers."""
        argmax, lse, best = [], [], []
        vocab = self.model.config.vocab_size
        for part in torch.split(features_ND.contiguous(), self._scratch.chunk):
            n = len(part)
            logits = self._scratch.get("teacher", n, self.native.output.rows, torch.float32)
            found, numbers = np.empty(n, np.int32), np.empty((2, n), np.float32)
            self.native.kernels.head(
                self.native.shape, self._head, n, part.data_ptr(), logits.data_ptr(), found.ctypes.data,
                numbers.ctypes.data, numbers.ctypes.data + 4 * n,
            )  # fmt: skip
            logits = logits[:, :vocab]
            argmax.append(torch.from_numpy(found).long().clamp_(min=0))
            best.append(logits.topk(min(BEST, vocab), -1).indices)
            top, mass = torch.from_numpy(numbers)
            lse.append(top + mass.log() if temperature == 1.0 else torch.logsumexp(logits.div_(temperature), -1))
        return TeacherSummary(torch.cat(argmax), torch.cat(lse), torch.cat(best))


def _pool_for(native: NativeModel, blocks: int) -> KVPool:
    """Keys and values for so many blocks in every layer, whatever its window."""
    config, size = native.config, EngineConfig().block_size
    position = 2 * config.num_key_value_heads * config.head_dim * native.cache_dtype.itemsize
    entries = native.entries()
    return KVPool(
        entries, heads=config.num_key_value_heads, head_dim=config.head_dim, dtype=native.cache_dtype,
        device=native.device, context=blocks * size,
        options=EngineConfig(block_size=size, kv_bytes=len(entries) * blocks * size * position, max_sequences=blocks),
    )  # fmt: skip


def _passes(lengths: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut pieces of these lengths into passes of at most ``most`` rows: ``(piece, start, stop)`` of each."""
    taken: list[tuple[int, int, int]] = []
    room = most
    for piece, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            taken.append((piece, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield taken
                taken, room = [], most
    if taken:
        yield taken


def cut_tap(tap: Tap, first: int, stop: int) -> Tap:
    """Positions ``first`` to ``stop - 1`` of a tap, as views."""
    return tap.map(lambda tensor_BTD: tensor_BTD[:, first:stop])


def join_taps(taps: Sequence[Tap]) -> Tap:
    """Taps behind each other, ``[1, sum of T, D]``."""
    if len(taps) == 1:
        return taps[0]
    residual = [tap.residual for tap in taps if tap.residual is not None]
    normed = [tap.normed for tap in taps if tap.normed is not None]
    return Tap(
        torch.cat([tap.hidden for tap in taps], 1),
        torch.cat(residual, 1) if residual else None,
        torch.cat(normed, 1) if normed else None,
    )
