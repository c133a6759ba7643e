"""The decoder as it is run while decoding: the same function as ``exitlm.model`` with fewer, larger operations.

Norm weights are folded into the matrices behind them, q/k/v and gate/up become one matrix each, the rows of q and k are
reordered so that a rotation is one complex product, and every matrix is packed in a weight format. Rows are positions
of any sequences; grouped heads share their keys without copies. Tests compare every family with ``exitlm.model``.

Shapes: M rows, D hidden_size, H heads, Hkv key/value heads, G = H / Hkv, Dh head_dim, S slots.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exitlm.decode.batch import Batch, Part, Run
from exitlm.decode.cache.kv_pool import Entry, KVPool
from exitlm.decode.kernels.formats import GRID_FORMATS, Linear, exit_format, head_format, pack_linear
from exitlm.decode.kernels.graphs import Rotations, StaticRows, static_runner, through_layers
from exitlm.decode.kernels.scores import Scores
from exitlm.decode.kernels.share import Share
from exitlm.model.config import ModelConfig
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import ExitHead, ExitKey
from exitlm.model.layers import MLP, DecoderLayer, RMSNorm, activate
from exitlm.model.rope import rotary_tables


def stream_dtype(model: EarlyExitModel) -> torch.dtype:
    """The dtype of the residual stream and of the cache: the model's on an accelerator and in float64, else float32."""
    weight = model.lm_head.weight
    return weight.dtype if weight.device.type != "cpu" or weight.dtype == torch.float64 else torch.float32


_MOST_VIEWS, _COPIED_KEYS = 4, 512


class Rows:
    """What all layers of one pass share: rotations of its rows, where their keys go, and what each part may see."""

    def __init__(self, fused: FusedModel, batch: Batch, pool: KVPool) -> None:
        self.batch, self.parts, self.count = batch, batch.parts, batch.count
        self.pool, self._fused, self._group_of, self._alone = pool, fused, pool.group_of, len(batch.parts) == 1
        self._heads = fused.config.num_attention_heads, fused.config.num_key_value_heads, fused.config.head_dim
        groups, every = range(len(pool.groups)), slice(None)
        self._read = [[_neighbours(part.reads[g], None) for part in batch.parts] for g in groups]
        self._written = [_neighbours(batch.parts[0].writes[g], every) if self._alone else None for g in groups]
        self._scattered: dict[int, Tensor] = {}
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    @functools.cached_property
    def rotations(self) -> Rotations:
        """Rotations of these rows; a static pass has its own."""
        return self._fused.rotations(self.batch)

    def write(self, entry: int, new_M2Kd: Tensor) -> None:
        """Store keys and values of these rows in a cache entry."""
        group = self._group_of[entry]
        place = self._written[group]
        if place is None:
            self.pool.stores[entry].index_copy_(2, self._slots(group), new_M2Kd.permute(1, 2, 0, 3))
        else:
            self.pool.stores[entry][place] = new_M2Kd.permute(1, 2, 0, 3)

    def _slots(self, group: int) -> Tensor:
        """The slots that the rows write, where they are not neighbours."""
        found = self._scattered.get(group)
        if found is None:
            runs = [run for part in self.parts for run in part.writes[group]]
            numbers = [slot for first, count in runs for slot in range(first, first + count)]
            found = self._scattered[group] = torch.tensor(numbers, device=self._fused.device)
        return found

    def attend(self, entry: int, query_MHd: Tensor, window: int | None, scale: float) -> Tensor:
        """Attention of every row over the positions of its own sequence that it may see, ``[M, H * Dh]``."""
        if self._alone:
            place = self._read[self._group_of[entry]][0]
            if self.count > 1 or place is None:
                return self._attend_part(0, entry, query_MHd, self.count, window, scale)
            H, Hkv, Dh = self._heads  # one row: as few operations as can be
            seen, query = self.pool.stores[entry][place], query_MHd.view(1, Hkv, H // Hkv, Dh)
            return F.scaled_dot_product_attention(query, seen[0], seen[1], scale=scale).view(1, H * Dh)
        found, at = [], 0
        for index, part in enumerate(self.parts):
            query = query_MHd[at : at + part.count]
            found.append(self._attend_part(index, entry, query, part.count, window, scale))
            at += part.count
        return torch.cat(found)

    def _attend_part(
        self, index: int, entry: int, query_MHd: Tensor, M: int, window: int | None, scale: float
    ) -> Tensor:
        store_2KSd, (H, Hkv, Dh) = self.pool.stores[entry], self._heads
        G = H // Hkv
        if M == 1:
            query = query_MHd.view(1, Hkv, G, Dh)
        else:
            query = query_MHd.view(M, Hkv, G, Dh).permute(1, 2, 0, 3).reshape(1, Hkv, G * M, Dh)
        mask = None if M == 1 else self._mask(index, window)
        group = self._group_of[entry]
        place = self._read[group][index]
        if place is None:
            out = attend_in_runs(query, store_2KSd, self.parts[index].reads[group], mask, scale)
        else:
            seen = store_2KSd[place]
            out = F.scaled_dot_product_attention(query, seen[0], seen[1], attn_mask=mask, scale=scale)
        return out.view(1, H * Dh) if M == 1 else out.view(H, M, Dh).transpose(0, 1).reshape(M, H * Dh)

    def _mask(self, index: int, window: int | None) -> Tensor | None:
        """The additive mask ``[G * M, keys]`` of a part (None: everything that is read is visible)."""
        if self.parts[index].count == 1:
            return None
        if (index, window) not in self._masks:
            self._masks[index, window] = self._build(self.parts[index], window)
        return self._masks[index, window]

    def _build(self, part: Part, window: int | None) -> Tensor:
        fused = self._fused
        first = 0 if window is None else max(0, part.start + 1 - window)
        query = torch.arange(part.start, part.end, device=fused.device)[:, None]
        key = torch.arange(first, part.end, device=fused.device)[None, :]
        hidden = key > query
        if window is not None:
            hidden = hidden | (key <= query - window)
        mask = torch.zeros(hidden.shape, dtype=fused.dtype, device=fused.device).masked_fill_(hidden, -torch.inf)
        return mask.repeat(fused.groups, 1)


def _neighbours(runs: Sequence[Run], second: slice | None) -> tuple[slice | None, ...] | None:
    """The index ``[:, second, :, run]`` or ``[:, :, run]`` of slots that are one run; None for several."""
    if len(runs) > 1:
        return None
    first, count = runs[0]
    run = slice(first, first + count)
    return (slice(None), second, slice(None), run) if second is None else (slice(None), second, run)


def grown(length: int, least: int = 1024, most: int = 16384) -> int:
    """The next power of two from ``least`` to ``most``; above that the next multiple of ``most``."""
    if length > most:
        return -(-length // most) * most
    return int(max(least, 1 << (length - 1).bit_length()))


def attend_in_runs(
    query_1KQd: Tensor, store_2KSd: Tensor, runs: Sequence[Run], mask_QS: Tensor | None, scale: float
) -> Tensor:
    """Attention over keys that lie in several runs of slots, in order. Few keys, or many runs, are copied together;
    else each run is read where it lies, by plain products."""
    parts = [store_2KSd[:, :, first : first + count] for first, count in runs]
    if len(parts) > _MOST_VIEWS or sum(count for _, count in runs) <= _COPIED_KEYS:
        seen = torch.cat(parts, 2)[:, None]
        return F.scaled_dot_product_attention(query_1KQd, seen[0], seen[1], attn_mask=mask_QS, scale=scale)
    query = query_1KQd[0] * scale
    scores = torch.cat([query @ part[0].transpose(-1, -2) for part in parts], -1)
    if mask_QS is not None:
        scores += mask_QS
    shares = torch.split(torch.softmax(scores, -1), [count for _, count in runs], -1)
    out: Tensor = shares[0] @ parts[0][1]
    for share, part in zip(shares[1:], parts[1:], strict=True):
        out += share @ part[1]
    return out[None]


def unit(x_MD: Tensor, eps: float) -> Tensor:
    """The RMS norm without weights. In float32 on a CPU it takes four small operations instead of seven."""
    if x_MD.dtype == torch.float32 and x_MD.device.type == "cpu":
        D = x_MD.shape[-1]
        length = torch.linalg.vector_norm(x_MD, 2, -1, True)
        root: Tensor = length.mul_(D**-0.5).hypot_(_root(eps))  # hypot(a, b) is the root of a^2 + b^2
        return x_MD / root
    return F.rms_norm(x_MD, (x_MD.shape[-1],), None, eps)


@functools.cache
def _root(eps: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(math.sqrt(eps), device="cpu")


def norm_scale(norm: RMSNorm, dtype: torch.dtype) -> Tensor:
    """The effective weight of a norm; an offset (Gemma's 1 + w) is added before anything is rounded."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (norm.weight.detach().to(wide) + norm.offset).to(dtype)


class Prenorm:
    """The norm in front of a matrix. Its weight is folded into the matrix, but for grid formats (int8, int4), whose
    grid it would distort: there it stays a product."""

    def __init__(self, norm: RMSNorm | None, config: ModelConfig, quant: str, dtype: torch.dtype) -> None:
        self.absent, self.eps = norm is None, config.rms_norm_eps
        self.folded = norm if norm is not None and quant not in GRID_FORMATS else None
        self.scale = None if norm is None or self.folded is not None else norm_scale(norm, dtype)

    def __call__(self, x_MD: Tensor) -> Tensor:
        if self.absent:
            return x_MD
        x_MD = unit(x_MD, self.eps)
        return x_MD if self.scale is None else x_MD.mul_(self.scale)


def _folded(weight: Tensor, prenorm: Prenorm, dtype: torch.dtype) -> Tensor:
    weight, norm = weight.detach(), prenorm.folded
    if norm is None:
        return weight.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (weight.to(wide) * norm_scale(norm, wide)).to(dtype)


def _joined_bias(linears: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor | None:
    if linears[0].bias is None:
        return None
    return torch.cat([linear.bias.detach() for linear in linears]).to(dtype)


def _joined_weight(linears: Sequence[nn.Linear]) -> Tensor:
    weights = [linear.weight.detach() for linear in linears]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def pack_module(linear: nn.Linear, quant: str, dtype: torch.dtype) -> Linear:
    """A linear layer as it is, packed; what the format leaves open has the stream's ``dtype``."""
    return pack_linear(linear.weight.detach().to(dtype), _joined_bias([linear], dtype), quant)


class FusedMLP:
    """down(act(gate(n)) * up(n)) where n is the norm of what comes in (``norm`` None: what comes in)."""

    def __init__(self, mlp: MLP, norm: RMSNorm | None, config: ModelConfig, quant: str, dtype: torch.dtype) -> None:
        self.prenorm = Prenorm(norm, config, quant, dtype)
        parts = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
        joined = _folded(_joined_weight(parts), self.prenorm, dtype)
        self.gate_up = pack_linear(joined, _joined_bias(parts, dtype), quant)
        self.down = pack_module(mlp.down_proj, quant, dtype)
        self.width = config.intermediate_size
        self.activation = config.hidden_act

    def __call__(self, x_MD: Tensor) -> Tensor:
        both = self.gate_up(self.prenorm(x_MD))
        return self.down(activate(self.activation, both[:, : self.width]).mul_(both[:, self.width :]))


class FusedLayer:
    """One decoder layer. ``entry`` is its place in the cache."""

    def __init__(
        self, layer: DecoderLayer, index: int, entry: int, config: ModelConfig, quant: str, dtype: torch.dtype
    ) -> None:
        self.entry, self.dtype = entry, dtype
        H, Hkv, Dh = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.kv_heads, self.head_dim, self.groups = H, Hkv, Dh, H // Hkv
        self.scale, self.eps = config.attention_scale, config.rms_norm_eps
        sliding = config.layer_types[index] == "sliding_attention"
        self.window = config.sliding_window if sliding else None
        local = sliding and config.rope_local is not None
        self.rope = (1 if local else 0) if config.use_rope[index] else None
        rope = config.rope_local if local and config.rope_local is not None else config.rope
        self.rotary = rope.dim
        pre = config.norm_placement in ("pre", "sandwich")
        attention = layer.self_attn
        if config.fused_projections:
            parts = [attention.qkv_proj]
        else:
            parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        order = self._row_order()
        self.prenorm = Prenorm(layer.input_layernorm if pre else None, config, quant, dtype)
        weight, bias = _folded(_joined_weight(parts), self.prenorm, dtype)[order], _joined_bias(parts, dtype)
        self.qkv = pack_linear(weight, None if bias is None else bias[order], quant)
        self.output = pack_module(attention.o_proj, quant, dtype)
        self.qk_norm = config.qk_norm
        wide = torch.float64 if dtype == torch.float64 else torch.float32  # queries and keys are normed in this
        if config.qk_norm == "head":
            q, k = (norm_scale(norm, wide) for norm in (attention.q_norm, attention.k_norm))
            self.qk_scale = torch.cat([q.expand(H, Dh), k.expand(Hkv, Dh)])[:, self._head_order()].contiguous()
        elif config.qk_norm == "full":
            both = torch.cat([norm_scale(norm, wide) for norm in (attention.q_norm, attention.k_norm)])
            self.qk_scale = both[order[: (H + Hkv) * Dh]].contiguous()
        self.mlp_norm: RMSNorm | None = None
        self.attention_post: Tensor | None = None
        self.mlp_post: Tensor | None = None
        if config.norm_placement == "pre":
            self.mlp_norm = layer.post_attention_layernorm
        else:
            self.attention_post = norm_scale(layer.post_attention_layernorm, dtype)
            self.mlp_post = norm_scale(layer.post_feedforward_layernorm, dtype)
            if config.norm_placement == "sandwich":
                self.mlp_norm = layer.pre_feedforward_layernorm
        self.mlp = FusedMLP(layer.mlp, self.mlp_norm, config, quant, dtype)

    def _head_order(self) -> Tensor:
        """Order of a head's dims that puts the two halves of each rotation side by side."""
        half = self.rotary // 2
        pairs = torch.stack([torch.arange(half), torch.arange(half) + half], 1).flatten()
        return torch.cat([pairs, torch.arange(self.rotary, self.head_dim)])

    def _row_order(self) -> Tensor:
        heads = torch.arange(self.heads + self.kv_heads)[:, None] * self.head_dim
        rotated = (heads + self._head_order()).flatten()
        rest = torch.arange(self.kv_heads * self.head_dim) + (self.heads + self.kv_heads) * self.head_dim
        return torch.cat([rotated, rest])

    def project(self, x_MD: Tensor, rotation: Tensor | None) -> Tensor:
        """Rotated queries and keys, and values: ``[M, H + 2 Hkv, Dh]`` in the stream's dtype."""
        H, Hkv, Dh, M = self.heads, self.kv_heads, self.head_dim, len(x_MD)
        qkv = self.qkv(self.prenorm(x_MD))
        wide = torch.float32 if qkv.dtype in (torch.bfloat16, torch.float16) else qkv.dtype
        qkv = qkv.to(wide)
        heads = qkv.view(M, H + 2 * Hkv, Dh)
        if self.qk_norm == "head":
            heads[:, : H + Hkv] = F.rms_norm(heads[:, : H + Hkv], (Dh,), None, self.eps) * self.qk_scale
        elif self.qk_norm == "full":
            cut = H * Dh
            qkv[:, :cut] = unit(qkv[:, :cut], self.eps) * self.qk_scale[:cut]
            qkv[:, cut : cut + Hkv * Dh] = unit(qkv[:, cut : cut + Hkv * Dh], self.eps) * self.qk_scale[cut:]
        if rotation is not None:
            pairs = heads[:, : H + Hkv, : self.rotary].view(M, H + Hkv, self.rotary // 2, 2)
            torch.view_as_complex(pairs).mul_(rotation)
        return heads.to(self.dtype)

    def attend(self, x_MD: Tensor, rows: Rows | StaticRows) -> Tensor:
        """The residual stream after attention, ``[M, D]``; stores keys and values of these rows."""
        H, Hkv, Dh, M = self.heads, self.kv_heads, self.head_dim, rows.count
        heads = self.project(x_MD, None if self.rope is None else rows.rotations[self.rope])
        rows.write(self.entry, heads[:, H:].view(M, 2, Hkv, Dh))
        return self.add_attention(x_MD, rows.attend(self.entry, heads[:, :H], self.window, self.scale))

    def add_attention(self, x_MD: Tensor, out_MD: Tensor) -> Tensor:
        """Project the heads' output and add it to the stream."""
        y = self.output(out_MD)
        if self.attention_post is not None:
            y = F.rms_norm(y.to(self.dtype), (y.shape[-1],), self.attention_post, self.eps)
        return x_MD + y

    def feed_forward(self, residual_MD: Tensor) -> Tensor:
        """The layer's output from the stream after attention."""
        y = self.mlp(residual_MD)
        if self.mlp_post is not None:
            y = F.rms_norm(y.to(self.dtype), (y.shape[-1],), self.mlp_post, self.eps)
        return residual_MD + y


class FusedHead:
    """An exit head: features, logits over its own rows, and the gate's score."""

    def __init__(
        self, fused: FusedModel, key: ExitKey, head: ExitHead, model: EarlyExitModel, entry: int | None
    ) -> None:
        self.config = config = head.config
        quant, dtype = exit_format(fused.quant), fused.dtype
        self.kind, self.key, self.entry = config.kind, key, entry
        self.eps, self.dtype, self.static = fused.config.rms_norm_eps, dtype, fused.static
        self.candidate_ids = head.candidate_ids
        self.candidate_list = None if head.candidate_ids is None else head.candidate_ids.tolist()
        self.norm = norm_scale(head.norm, dtype) if hasattr(head, "norm") else None
        self.mlp: FusedMLP | None = None
        self.mlp_post: Tensor | None = None
        trunk = fused.layers[config.layer - 1]
        if hasattr(head, "mlp"):
            self.mlp = FusedMLP(head.mlp, trunk.mlp_norm if config.kind == "mlp" else None, fused.config, quant, dtype)
        if hasattr(head, "mlp_post_norm"):
            self.mlp_post = norm_scale(head.mlp_post_norm, dtype)
        self.block: FusedLayer | None = None
        if config.kind == "block":
            assert entry is not None
            self.block = FusedLayer(head.block, config.layer - 1, entry, fused.config, quant, dtype)
        if config.kind == "lens":
            self.lens = pack_module(head.lens, quant, dtype)
        self.has_gate = config.gate
        if config.gate:
            self.gate_weight = head.gate.weight.detach()[0].to(torch.promote_types(dtype, torch.float32)).contiguous()
            self.gate_bias = float(head.gate.bias)
        if config.output == "shared" and head.candidate_ids is None:
            self.projections: list[Linear] = [fused.final_head]
        elif config.output == "low_rank":
            self.projections = [pack_module(part, quant, dtype) for part in (head.output_down, head.output_up)]
        elif config.output == "exits":  # one matrix of several heads: packed once
            if id(head.output) not in fused.shared_outputs:
                fused.shared_outputs[id(head.output)] = pack_module(head.output, quant, dtype)
            self.projections = [fused.shared_outputs[id(head.output)]]
        else:
            rows = head.output_weight(model.lm_head.weight).detach().to(dtype)
            self.projections = [pack_linear(rows, None, quant)]

    def gates(self, hidden_TD: Tensor) -> list[float]:
        """The gate's probability for each row: two dot products, no projection. NaN where they are not finite."""
        return gate_scores(hidden_TD, self.gate_weight, self.gate_bias, self.eps)

    def logits(self, hidden_MD: Tensor, residual_MD: Tensor | None, block_MD: Tensor | None) -> Tensor:
        """Logits ``[M, K]`` over the candidates or the vocabulary. ``block_MD`` is what :attr:`block` put out."""
        input_MD = self.input(hidden_MD, residual_MD, block_MD)
        if self.static is not None and len(input_MD) == 1 and not self.static.broken:
            return self.static.head(self, input_MD)
        return self.compute(input_MD)

    def input(self, hidden_MD: Tensor, residual_MD: Tensor | None, block_MD: Tensor | None) -> Tensor:
        """What this kind of head reads: the layer's output, the stream before its MLP (``mlp``) or what :attr:`block`
        put out."""
        input_MD = {"mlp": residual_MD, "block": block_MD}.get(self.kind, hidden_MD)
        assert input_MD is not None
        return input_MD

    def compute(self, input_MD: Tensor) -> Tensor:
        """Logits ``[M, K]`` from what :meth:`input` gave."""
        logits = self.projections[-1](self.features(input_MD))
        return logits if logits.dtype == self.dtype else logits.to(self.dtype)

    def features(self, input_MD: Tensor) -> Tensor:
        """What the last matrix of the head reads, from what :meth:`input` gave."""
        if self.kind == "lens":
            normed = unit(input_MD, self.eps)
            features = self.lens(normed)
            if self.mlp is not None:
                features = features + self.mlp(normed)
        elif self.kind == "embed":
            features = input_MD
        else:
            if self.kind == "mlp":
                assert self.mlp is not None
                branch = self.mlp(input_MD)
                if self.mlp_post is not None:
                    branch = F.rms_norm(branch.to(self.dtype), (branch.shape[-1],), self.mlp_post, self.eps)
                input_MD = input_MD + branch
            assert self.norm is not None
            features = F.rms_norm(input_MD, (input_MD.shape[-1],), self.norm, self.eps)
        for projection in self.projections[:-1]:
            features = projection(features)
        return features

    def token(self, index: int) -> int:
        """The token id of a row of the output matrix."""
        return index if self.candidate_list is None else int(self.candidate_list[index])


def gate_scores(hidden_TD: Tensor, weight_D: Tensor, bias: float, eps: float) -> list[float]:
    """The gate's probability for each row: two dot products, no projection. NaN where they are not finite."""
    if hidden_TD.device.type == "cpu":  # one by one: a row's score does not depend on the others
        logits = []
        for hidden_D in hidden_TD:
            square = float(torch.dot(hidden_D, hidden_D)) / len(hidden_D)
            logits.append(float(torch.dot(hidden_D, weight_D)) / math.sqrt(square + eps) + bias)
    else:  # an accelerator is waited for once
        wide = hidden_TD.to(weight_D.dtype)
        product = F.rms_norm(wide, (wide.shape[-1],), None, eps) @ weight_D
        logits = (product + bias).tolist()
    return [_sigmoid(logit) for logit in logits]


def _sigmoid(x: float) -> float:
    """NaN stays NaN, which ``min`` and ``max`` would make 60."""
    return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, x)))) if math.isfinite(x) else math.nan


class FusedModel:
    """All layers and heads of a model, packed for decoding. ``adapters`` are the names of those that its exits come
    from, ``heads`` the exits by adapter and layer, in the order of :meth:`EarlyExitModel.heads_by_key`."""

    prefers_digests: bool = False
    """Whether what is read of logits is had for less than the logits are."""

    def __init__(self, model: EarlyExitModel, quant: str, compile: str = "none", share: Share | None = None) -> None:
        """``quant`` and ``compile`` are resolved ones (see ``formats.py`` and ``graphs.py``). ``share``: the layers
        that are run here, with the exits at their ends (None: all that the model has)."""
        self.share = share or Share.of(model)
        self.config, self.quant, self.compile = model.config, quant, compile
        self.dtype, self.device = stream_dtype(model), model.lm_head.weight.device
        self.cache_dtype = self.dtype
        self.kernels_name, self.note = "torch", ""
        self.exact = self.dtype == torch.float64  # else a row's last bits may depend on how many run beside it
        self.groups = self.config.num_attention_heads // self.config.num_key_value_heads
        self.static = static_runner(compile, self.config.hidden_size, self.dtype, self.device)
        self.embedding = model.model.embed_tokens.weight.detach()
        self.embedding_scale = float(
            torch.tensor(self.config.embedding_scale, dtype=self.embedding.dtype, device="cpu")
        )
        with torch.no_grad():
            self.layers = {
                i: FusedLayer(model.model.layers[str(i)], i, i, self.config, quant, self.dtype)
                for i in self.share.layers
            }
            self.final_norm = norm_scale(model.model.norm, self.dtype)
            heads = model.heads_by_key()
            own = {key: head for key, head in heads.items() if self.share.has_exit(key[1])}
            if self.share.reads_output(own.values()):
                self.final_head = pack_linear(model.lm_head.weight.detach().to(self.dtype), None, head_format(quant))
            self.adapters = list(model.exit_sets())
            self.shared_outputs: dict[int, Linear] = {}
            self.heads = {
                key: FusedHead(self, key, head, model, self.share.blocks.get(key)) for key, head in own.items()
            }
        self._rotations: dict[bool, Rotations] = {}

    @property
    def original_context(self) -> int | None:
        """The length beyond which a text has other rotations at all its positions (longrope); None: there is none."""
        rope = self.config.rope
        return rope.original_max_position_embeddings if rope.kind == "longrope" else None

    def rotations(self, batch: Batch) -> Rotations:
        """Rotations of the rows of a batch, ``[M, 1, R / 2]`` complex, for the model's RoPE and for its local one where
        it has two."""
        parts = batch.parts
        if len(parts) == 1:
            tables = self.rotation_tables(parts[0].end, parts[0].stretched)
            return [table[parts[0].start : parts[0].end] for table in tables]
        length, stretched = max(part.end for part in parts), [part.stretched for part in parts]
        if not any(stretched) or all(stretched):
            positions = torch.tensor([p for part in parts for p in range(part.start, part.end)], device=self.device)
            return [table[positions] for table in self.rotation_tables(length, stretched[0])]
        both = [self.rotation_tables(length, which) for which in (False, True)]
        return [
            torch.cat([both[part.stretched][i][part.start : part.end] for part in parts]) for i in range(len(both[0]))
        ]

    def rotation_tables(self, length: int, stretched: bool) -> Rotations:
        """Rotations of at least the first ``length`` positions, ``[T, 1, R / 2]`` complex, one table for each RoPE.

        Longrope rotates every position of a text by whether the text is longer than the original context
        (``stretched``); other scalings hold at any length.
        """
        found = self._rotations.get(stretched)
        if found is None or len(found[0]) < length:
            capacity = grown(length)
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            positions = torch.arange(capacity, device=self.device)
            total = self.config.rope.original_max_position_embeddings + 1 if stretched else 0
            found = []
            for rope in (self.config.rope, self.config.rope_local):
                if rope is not None:
                    cos, sin = rotary_tables(rope, positions, wide, total_length=total)
                    half = rope.dim // 2
                    found.append(torch.complex(cos[:, :half], sin[:, :half])[:, None, :].contiguous())
            self._rotations[stretched] = found
        return found

    def entries(self) -> list[Entry]:
        """The cache entries of the whole model: one for every layer, then one for every block exit."""
        return self.share.all_entries(self.config)

    def rows(self, batch: Batch, pool: KVPool) -> Rows:
        """What all layers of a pass share."""
        return Rows(self, batch, pool)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Hidden states ``[M, D]`` of token ids."""
        if len(tokens) == 1:
            hidden = self.embedding[tokens[0]][None].to(self.dtype)
        else:
            hidden = self.embedding.index_select(0, torch.tensor(tokens, device=self.device)).to(self.dtype)
        return hidden * self.embedding_scale if self.embedding_scale != 1.0 else hidden

    def run(self, hidden_MD: Tensor, first: int, last: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Layers ``first`` to ``last - 1``; also returns the residual before the last layer's MLP."""
        layers = [self.layers[i] for i in range(first, last)]
        if self.static is not None and self.static.takes(rows.batch):
            parts = rows.batch.parts
            tables = self.rotation_tables(max(part.end for part in parts), parts[0].stretched)
            return self.static.run(layers, hidden_MD, rows.batch, rows.pool, tables)
        return through_layers(layers, hidden_MD, rows)

    def final_features(self, hidden_MD: Tensor) -> Tensor:
        """What the final matrix reads, ``[M, D]``."""
        return F.rms_norm(hidden_MD, (hidden_MD.shape[-1],), self.final_norm, self.config.rms_norm_eps)

    def final_logits(self, hidden_MD: Tensor) -> Tensor:
        """Logits ``[M, V]`` of the final head, in the stream's dtype."""
        logits = self.final_head(self.final_features(hidden_MD))
        return logits if logits.dtype == self.dtype else logits.to(self.dtype)

    def exit_digest(self, head: FusedHead, input_MD: Tensor) -> Scores:
        """What is read of the logits of an exit; ``input_MD``: see :meth:`FusedHead.input`."""
        return Scores.of(head.compute(input_MD))

    def final_digest(self, hidden_MD: Tensor) -> Scores:
        """What is read of the logits of the final head."""
        return Scores.of(self.final_logits(hidden_MD))
