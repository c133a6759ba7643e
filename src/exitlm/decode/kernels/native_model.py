"""A model as the native kernels run it: the surface of :class:`~exitlm.decode.kernels.fused.FusedModel`, in C.

Weights are packed as they are stored (``exitlm.native.pack``), layers of a segment are one call, and a row's result is
the same to the last bit whatever rows ran beside it. What the kernels lack is named by :func:`lacks`; the torch path
takes such a model.

Shapes: M rows, T tested rows, D hidden_size, K rows of an exit's output matrix, V vocab_size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exitlm.decode.batch import Batch
from exitlm.decode.cache.kv_pool import Entry, KVPool
from exitlm.decode.kernels.fused import gate_scores, grown, norm_scale
from exitlm.decode.kernels.scores import Scores
from exitlm.decode.kernels.share import Share
from exitlm.model.config import SLIDING, ModelConfig
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import ExitHead, ExitKey
from exitlm.model.layers import MLP, DecoderLayer, RMSNorm
from exitlm.model.rope import RopeConfig, rotary_tables
from exitlm.native import abi
from exitlm.native.pack import GROUP, PAIR, RawMatrix, fits, format_of, in_turn, pack, quantised, raw_of
from exitlm.native.packfile import Packed

Source = Callable[[str, Tensor], RawMatrix | None]
"""A parameter's matrix as it is stored, by its name; None if it is stored in no other way."""
Store = Callable[[str | None, Callable[[], RawMatrix]], Packed]
"""Packs the matrix that a function makes, or has it already under a key."""


def lacks(config: ModelConfig) -> str | None:
    """The feature of a model that the kernels lack, in words; None if they have all."""
    H, Hkv, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if config.hidden_size % 32 or config.intermediate_size % 32:
        return f"sizes that are no multiples of 32 ({config.hidden_size} and {config.intermediate_size})"
    if Dh not in abi.HEAD_DIMS:
        return f"heads of {Dh} dimensions"
    if H // Hkv > abi.MOST_GROUPED:
        return f"{H // Hkv} heads that share their keys"
    if config.hidden_act not in abi.ACTIVATIONS:
        return f"the activation {config.hidden_act}"
    return None


class NativeRows:
    """The rows of a pass for the kernels. What they point to lives here."""

    def __init__(self, model: NativeModel, batch: Batch, pool: KVPool) -> None:
        parts, size = batch.parts, pool.block_size
        self.batch, self.count = batch, batch.count
        groups, longest = len(pool.groups), max(part.end for part in parts)
        width = -(-longest // size)
        numbers = np.empty((3, len(parts)), np.int32)
        blocks = np.zeros((groups, len(parts), width), np.int32)
        for i, part in enumerate(parts):
            numbers[:, i] = part.start, part.count, part.stretched
            for group in range(groups):
                held = part.blocks(group, size)
                blocks[group, i, : len(held)] = held
        tables, positions = model.rotations(longest, any(part.stretched for part in parts))
        self.kept = numbers, blocks, tables
        address = numbers.ctypes.data
        self.c = abi.CBatch(
            batch.count, len(parts), groups, size, width, positions, address, address + 4 * len(parts),
            address + 8 * len(parts), blocks.ctypes.data, tables.ctypes.data,
        )  # fmt: skip


class _Unlike(Exception):
    """Two matrices can't lie in turn."""


class _Parts:
    """Packs matrices and norms, and keeps them."""

    def __init__(self, model: EarlyExitModel, source: Source, digits: int, store: Store, rounds: bool) -> None:
        self.model, self.source, self.digits, self.store, self.rounds = model, source, digits, store, rounds
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        for (_, layer), head in model.heads_by_key().items():  # some are no part of the model's parameters
            for name, parameter in head.named_parameters(f"exits.{layer}"):
                self.names.setdefault(id(parameter), name)
        self.kept: list[Any] = []
        self.shared: dict[int, abi.Matrix] = {}
        self.bytes = 0

    def keep_floats(self, values: Tensor) -> int:
        """The address of a float32 copy."""
        held = values.detach().to(torch.float32).contiguous().clone()
        self.kept.append(held)
        return held.data_ptr()

    def norm(self, norm: RMSNorm | None) -> int | None:
        """The address of a norm's effective weight."""
        return None if norm is None else self.keep_floats(norm_scale(norm, torch.float32))

    def matrix(self, key: str | None, make: Callable[[], RawMatrix], bias: int | None = None) -> abi.Matrix:
        """Pack a matrix; under ``key`` it is kept for other processes, too. ``bias``: an address."""
        format, rows, cols, packed = self.store(key, make)
        self.kept.append(packed)
        self.bytes += len(packed)
        return abi.matrix(packed, format, rows, cols, self.digits, bias)

    def raw(self, parameter: nn.Parameter | Tensor) -> RawMatrix:
        """A parameter as it is stored, if it can be laid out so; else as floats. Of an exit's own matrices, which come
        as floats, those beside a backbone on grids are rounded to 8 bits: a test must cost little."""
        name = self.names.get(id(parameter), "")
        found = self.source(name, parameter) if name else None
        if found is not None and fits(found.type, found.cols):
            return found
        if name.startswith("exits.") and self.rounds and parameter.shape[1] % GROUP == 0:
            return quantised(parameter)
        return raw_of(parameter)

    def key(self, linear: nn.Linear, rows: slice) -> str | None:
        """The name under which some rows are kept for other processes; None for those of an exit."""
        name = self.names.get(id(linear.weight), "")
        return None if name.startswith("exits.") or not name else f"{name}[{rows.start}:{rows.stop}]"

    def bias(self, linear: nn.Linear, rows: slice, count: int) -> int | None:
        """The address of ``count`` floats, some of a layer's biases and then zeros; None without."""
        if linear.bias is None:
            return None
        some = linear.bias.detach()[rows].float()
        return self.keep_floats(torch.cat([some, torch.zeros(count - len(some))]))

    def linear(self, linear: nn.Linear, rows: slice = slice(None)) -> abi.Matrix:
        """Pack a linear layer, or some of its rows."""
        count = len(linear.weight[rows])
        bias = self.bias(linear, rows, count + -count % PAIR)
        return self.matrix(self.key(linear, rows), lambda: self.raw(linear.weight).take(rows), bias)

    def layer(self, layer: DecoderLayer, index: int) -> abi.Layer:
        """A decoder layer; its cache is bound later."""
        config, attention = self.model.config, layer.self_attn
        H, Hkv, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        found = abi.Layer()
        if config.fused_projections:
            ends = H * Dh, (H + Hkv) * Dh, (H + 2 * Hkv) * Dh
            cuts = slice(0, ends[0]), slice(ends[0], ends[1]), slice(ends[1], ends[2])
            found.queries, found.keys, found.values = (self.linear(attention.qkv_proj, cut) for cut in cuts)
        else:
            parts = attention.q_proj, attention.k_proj, attention.v_proj
            found.queries, found.keys, found.values = (self.linear(part) for part in parts)
        found.out = self.linear(attention.o_proj)
        found.gate, found.up, found.down = self.mlp(layer.mlp)
        sliding = config.layer_types[index] == SLIDING
        rope = config.rope_local if sliding and config.rope_local is not None else config.rope
        found.rotation = int(sliding and config.rope_local is not None) if config.use_rope[index] else -1
        found.rotary, found.window = rope.dim, (config.sliding_window or 0) if sliding else 0
        found.qk_norm = abi.QK_NORMS.index(config.qk_norm)
        if config.qk_norm is not None:
            found.norm_queries, found.norm_keys = self.norm(attention.q_norm), self.norm(attention.k_norm)
        found.activation = abi.ACTIVATIONS.index(config.hidden_act)
        if config.norm_placement != "post":
            found.norm_attention = self.norm(layer.input_layernorm)
        found.norm_mlp = self.norm(mlp_norm(layer, config))
        if config.norm_placement != "pre":
            found.post_attention = self.norm(layer.post_attention_layernorm)
            found.post_mlp = self.norm(layer.post_feedforward_layernorm)
        return found

    def mlp(self, mlp: MLP) -> tuple[abi.Matrix, abi.Matrix, abi.Matrix]:
        """Gate, up and down; gate and up, which are read together, lie together where they are of one type."""
        inner = self.model.config.intermediate_size
        if hasattr(mlp, "gate_up_proj"):
            parts = [(mlp.gate_up_proj, slice(0, inner)), (mlp.gate_up_proj, slice(inner, 2 * inner))]
        else:
            parts = [(mlp.gate_proj, slice(None)), (mlp.up_proj, slice(None))]

        def both() -> RawMatrix:
            gate, up = (self.raw(linear.weight).take(cut) for linear, cut in parts)
            if gate.type != up.type:
                raise _Unlike
            return in_turn(gate, up)

        keys = [self.key(linear, cut) for linear, cut in parts]
        try:
            found = self.matrix(None if keys[0] is None else f"{keys[0]} and {keys[1]}", both)
        except _Unlike:
            return self.linear(*parts[0]), self.linear(*parts[1]), self.linear(mlp.down_proj)
        gate, up = (abi.twin(found, i, self.bias(*part, inner)) for i, part in enumerate(parts))
        return gate, up, self.linear(mlp.down_proj)


def mlp_norm(layer: DecoderLayer, config: ModelConfig) -> RMSNorm | None:
    """The norm in front of a layer's MLP."""
    if config.norm_placement == "post":
        return None
    pre = config.norm_placement == "pre"
    return layer.post_attention_layernorm if pre else layer.pre_feedforward_layernorm


class NativeHead:
    """An exit head, or the final one (``head`` None)."""

    def __init__(self, native: NativeModel, parts: _Parts, key: ExitKey, head: ExitHead | None) -> None:
        """``key``: its adapter and layer."""
        self.native, self._parts, self.key = native, parts, key
        model, found = parts.model, abi.Head()
        self.kind = "final" if head is None else head.config.kind
        self.block: NativeBlock | None = None
        self.candidate_ids = None if head is None else head.candidate_ids
        self.candidate_list = None if self.candidate_ids is None else self.candidate_ids.tolist()
        self.has_gate = head is not None and head.config.gate
        if head is None:
            found.norm, found.first = parts.norm(model.model.norm), native.output
            self.width = model.config.vocab_size
        else:
            self.config = head.config
            self._of_exit(found, head)
        found.width, self.c = self.width, found

    def _of_exit(self, found: abi.Head, head: ExitHead) -> None:
        parts, config, model = self._parts, head.config, self._parts.model
        trunk = model.model.layers[str(config.layer - 1)]
        found.activation = abi.ACTIVATIONS.index(model.config.hidden_act)
        if hasattr(head, "mlp"):
            found.gate, found.up, found.down = parts.mlp(head.mlp)
            found.adds = int(config.kind == "mlp")
        if config.kind == "mlp":
            found.norm_mlp = parts.norm(mlp_norm(trunk, model.config))
        if hasattr(head, "mlp_post_norm"):
            found.post_mlp = parts.norm(head.mlp_post_norm)
        if config.kind == "lens":
            found.unit, found.lens = 1, parts.linear(head.lens)
        if hasattr(head, "norm"):
            found.norm = parts.norm(head.norm)
        if config.kind == "block":
            self.block = NativeBlock(self.native, parts.layer(head.block, config.layer - 1))
        if self.has_gate:
            self.gate_weight = head.gate.weight.detach()[0].float().contiguous()
            self.gate_bias = float(head.gate.bias.detach())
        if config.output == "shared" and head.candidate_ids is None:
            found.first, self.width = self.native.output, model.config.vocab_size
        elif config.output == "shared":
            assert head.candidate_ids is not None
            ids = head.candidate_ids.numpy()
            found.first = parts.matrix(None, lambda: parts.raw(model.lm_head.weight).take(ids))
            self.width = len(ids)
        elif config.output == "low_rank":
            down, up = head.output_down.weight.detach().float(), head.output_up.weight.detach().float()
            more = -len(down) % 32
            found.first = parts.matrix(None, lambda: raw_of(down))
            found.second = parts.matrix(None, lambda: raw_of(torch.nn.functional.pad(up, (0, more))))
            self.width = len(up)
        else:  # own, or one of several heads
            if id(head.output) not in parts.shared:
                parts.shared[id(head.output)] = parts.linear(head.output)
            found.first, self.width = parts.shared[id(head.output)], len(head.output.weight)

    def scores(self, input_MD: Tensor, mass: bool = False) -> Scores:
        """Logits ``[M, K]`` with the best token of each row."""
        M, rows = len(input_MD), self.c.second.rows or self.c.first.rows
        input_MD = input_MD.contiguous()
        logits_MK, numbers = torch.empty(M, rows), np.empty((3, M), np.float32)
        address = numbers.ctypes.data
        self.native.kernels.head(
            self.native.shape, self.c, M, input_MD.data_ptr(), logits_MK.data_ptr(), address, address + 4 * M,
            address + 8 * M if mass else None,
        )  # fmt: skip
        best = numbers[0].view(np.int32).tolist()
        finite = [at >= 0 for at in best]
        probability = (1.0 / numbers[2]).tolist() if mass else None
        return Scores(logits_MK[:, : self.width], best, finite, probability)

    def logits(self, hidden_MD: Tensor, residual_MD: Tensor | None, block_MD: Tensor | None) -> Tensor:
        """Logits ``[M, K]`` over the candidates or the vocabulary."""
        return self.scores(self.input(hidden_MD, residual_MD, block_MD)).logits_MK

    def input(self, hidden_MD: Tensor, residual_MD: Tensor | None, block_MD: Tensor | None) -> Tensor:
        """What this kind of head reads."""
        found = {"mlp": residual_MD, "block": block_MD}.get(self.kind, hidden_MD)
        assert found is not None
        return found

    def gates(self, hidden_TD: Tensor) -> list[float]:
        """The gate's probability for each row."""
        return gate_scores(hidden_TD, self.gate_weight, self.gate_bias, self.native.config.rms_norm_eps)

    def token(self, index: int) -> int:
        """The token id of a row of the output matrix."""
        return index if self.candidate_list is None else int(self.candidate_list[index])


class NativeBlock:
    """The block of an exit: a layer whose attention runs with every row, and whose MLP only when the exit is tested."""

    def __init__(self, native: NativeModel, layer: abi.Layer) -> None:
        self.native, self.layer = native, (abi.Layer * 1)(layer)

    def attend(self, hidden_MD: Tensor, rows: NativeRows) -> Tensor:
        """The stream after attention, ``[M, D]``; stores keys and values of these rows."""
        return self.native.through(self.layer, 0, 1, abi.PART_ATTENTION, hidden_MD, rows)[0]

    def feed_forward(self, residual_TD: Tensor) -> Tensor:
        """The block's output from the stream after attention."""
        rows = self.native.loose_rows(len(residual_TD))
        return self.native.through(self.layer, 0, 1, abi.PART_MLP, residual_TD, rows)[0]


class NativeModel:
    """All layers and heads of a model, packed for the native kernels."""

    static, note, exact = None, "", True
    """Every row is computed alike, whatever runs beside it."""

    def __init__(
        self,
        model: EarlyExitModel,
        kernels: abi.Kernels,
        source: Source,
        *,
        quant: str = "stored",
        digits: int = 2,
        half_cache: bool = False,
        store: Store | None = None,
        share: Share | None = None,
        rounds: bool = False,
    ) -> None:
        """``digits`` of 7 bits hold an activation that meets a grid. ``half_cache``: keys and values in float16.
        ``store`` keeps packed matrices (default: in memory). ``share``: the layers that are run here, with the exits at
        their ends (None: all that the model has). ``rounds``: the exits' own matrices are rounded to 8 bits."""
        self.share = share or Share.of(model)
        self.config, self.kernels, self.quant = model.config, kernels, quant
        self.compile = self.kernels_name = f"native {kernels.isa}"
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.cache_dtype = torch.float16 if half_cache else torch.float32
        config = self.config
        self.shape = abi.Shape(
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
            config.intermediate_size, int(half_cache), config.rms_norm_eps, config.attention_scale,
        )  # fmt: skip
        self.embedding = model.model.embed_tokens.weight.detach()
        self.embedding_scale = float(torch.tensor(config.embedding_scale, dtype=self.embedding.dtype, device="cpu"))
        self._parts = parts = _Parts(model, source, digits, store or Packer(), rounds)
        own = self.share.layers
        self.layers = (abi.Layer * len(own))(*(parts.layer(model.model.layers[str(i)], i) for i in own))
        chosen = {key: head for key, head in model.heads_by_key().items() if self.share.has_exit(key[1])}
        if self.share.reads_output(chosen.values()):
            self.output = parts.linear(model.lm_head)
            self.final = NativeHead(self, parts, ("", config.num_hidden_layers), None)
        self.adapters = list(model.exit_sets())
        self.heads = {key: NativeHead(self, parts, key, head) for key, head in chosen.items()}
        self._tables: dict[bool, list[Tensor]] = {}
        self._pool: KVPool | None = None

    @property
    def original_context(self) -> int | None:
        """The length beyond which a text has other rotations at all its positions (longrope); None: there is none."""
        rope = self.config.rope
        return rope.original_max_position_embeddings if rope.kind == "longrope" else None

    def entries(self) -> list[Entry]:
        """The cache entries of the whole model: one for every layer, then one for every block exit."""
        return self.share.all_entries(self.config)

    def bind(self, pool: KVPool) -> None:
        """Tell the layers where their keys and values lie."""
        layers = dict(zip(self.share.layers, self.layers, strict=True))
        layers |= {
            self.share.blocks[key]: head.block.layer[0] for key, head in self.heads.items() if head.block is not None
        }
        for entry, layer in layers.items():
            store = pool.stores[entry]
            layer.cache, layer.slots, layer.group = store.data_ptr(), store.shape[2], pool.group_of[entry]
        self._pool = pool

    def rows(self, batch: Batch, pool: KVPool) -> NativeRows:
        """The rows of a pass."""
        if self._pool is not pool:
            self.bind(pool)
        return NativeRows(self, batch, pool)

    def loose_rows(self, count: int) -> Any:
        """Rows that meet no cache."""
        return _Loose(count)

    def rotations(self, length: int, stretched: bool) -> tuple[NDArray[np.uintp], int]:
        """Addresses of the tables of rotations, ``[variant, which]``, and how many positions each has."""
        needed = (False, True) if stretched and self.original_context is not None else (False,)
        for variant in needed:
            if variant not in self._tables or len(self._tables[variant][0]) < length:
                self._tables[variant] = [self._table(rope, grown(length), variant) for rope in self._ropes()]
        found = []
        for variant in (False, True):
            tables = self._tables.get(variant) or self._tables[False]
            found += [tables[0].data_ptr(), tables[-1].data_ptr()]
        return abi.addresses(found), min(len(self._tables[variant][0]) for variant in needed)

    def _ropes(self) -> list[RopeConfig]:
        return [rope for rope in (self.config.rope, self.config.rope_local) if rope is not None]

    def _table(self, rope: RopeConfig, length: int, stretched: bool) -> Tensor:
        total = self.config.rope.original_max_position_embeddings + 1 if stretched else 0
        cos, sin = rotary_tables(rope, torch.arange(length), torch.float32, total_length=total)
        half = rope.dim // 2
        return torch.cat([cos[:, :half], sin[:, :half]], 1).contiguous()

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Hidden states ``[M, D]`` of token ids."""
        if self.embedding.dtype == torch.float32:  # a copy of rows costs numpy less than torch
            hidden = torch.from_numpy(self.embedding.numpy()[tokens])
        else:
            hidden = self.embedding.index_select(0, torch.tensor(tokens)).to(torch.float32)
        return hidden * self.embedding_scale if self.embedding_scale != 1.0 else hidden

    def run(self, hidden_MD: Tensor, first: int, last: int, rows: NativeRows) -> tuple[Tensor, Tensor]:
        """Layers ``first`` to ``last - 1``; also returns the residual before the last layer's MLP."""
        return self.through(self.layers, first - self.share.layers[0], last - first, abi.PART_ALL, hidden_MD, rows)

    def through(
        self, layers: ctypes.Array[abi.Layer], first: int, count: int, part: int, hidden_MD: Tensor, rows: Any
    ) -> tuple[Tensor, Tensor]:
        """Some layers, or a part of one."""
        hidden_MD = hidden_MD.contiguous().clone()
        residual_MD = torch.empty_like(hidden_MD)
        at = ctypes.addressof(layers) + first * ctypes.sizeof(abi.Layer)
        self.kernels.layers(
            self.shape, at, count, part, rows.c, hidden_MD.data_ptr(),
            residual_MD.data_ptr() if part == abi.PART_ALL else None,
        )  # fmt: skip
        return hidden_MD, residual_MD

    def final_logits(self, hidden_MD: Tensor) -> Tensor:
        """Logits ``[M, V]`` of the final head."""
        return self.final.scores(hidden_MD).logits_MK


class _Loose:
    """Rows without positions, for a part of a layer that asks for none."""

    def __init__(self, count: int) -> None:
        self._numbers = np.array([[0], [count], [0]], np.int32)
        self._blocks = np.zeros(1, np.int32)
        at = self._numbers.ctypes.data
        self.c = abi.CBatch(count, 1, 1, count, 1, count, at, at + 4, at + 8, self._blocks.ctypes.data, None)


class Packer:
    """Packs matrices in memory, many beside each other: large pieces can lie in large pages, which read faster."""

    PIECE = 1 << 25

    def __init__(self) -> None:
        self._piece, self._used = np.empty(0, np.uint8), 0

    def __call__(self, key: str | None, make: Callable[[], RawMatrix]) -> Packed:
        """See :data:`Store`."""
        raw = make()
        packed = pack(raw)
        start = self._used + -(self._piece.ctypes.data + self._used) % 64
        if start + len(packed) > len(self._piece):
            self._piece = np.empty(max(self.PIECE, len(packed) + 64), np.uint8)
            start = -self._piece.ctypes.data % 64
        held = self._piece[start : start + len(packed)]
        held[:] = packed
        self._used = start + len(packed)
        return format_of(raw.type), raw.count + -raw.count % PAIR, raw.cols, held
