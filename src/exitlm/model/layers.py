"""The parts of a decoder: norm, MLP, attention, and the layer that joins them, for every supported family.

Families differ by :class:`ModelConfig` alone; there are no subclasses. Submodules carry the names of HF checkpoints.
Not here: the stack, the embedding and the output matrix (``decoder.py``), exits (``exits.py``).

Shapes: B rows, T new positions, S positions seen (past and new), D hidden_size, H heads, KV key/value heads,
Dh head_dim, R rotary dimensions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exitlm.model.config import SLIDING, ModelConfig
from exitlm.model.rope import rotate

CacheKey = int | str
"""A 0-based layer index, or a name for attention outside of the stack (a block exit)."""


class PastProtocol(Protocol):
    """What attention needs of a cache. ``length`` positions are stored; ``update`` gives old and new ones, joined."""

    @property
    def length(self) -> int: ...

    def update(self, key: CacheKey, key_BKTd: Tensor, value_BKTd: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class AttentionContext:
    """What all layers of one pass share.

    ``cos``/``sin`` [B, T, R] rotate; ``local_cos``/``local_sin`` replace them in sliding layers where the model has a
    second RoPE. ``masks`` maps a layer type to a boolean mask [B, 1, T, S] (True: may attend) or to None, which means
    plain causal attention with nothing stored before, or a single new position that sees everything.
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor
    masks: Mapping[str, Tensor | None]
    local_cos: Tensor | None = None
    local_sin: Tensor | None = None


@dataclass(frozen=True)
class Tap:
    """What an exit reads of its layer: the output [B, T, D] and, for ``mlp`` exits, the stream after attention and what
    the layer's own MLP read (None where not asked for)."""

    hidden: Tensor
    residual: Tensor | None = None
    normed: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Tap":
        """The tap with ``change`` made to each tensor that is there."""
        residual, normed = (None if tensor is None else change(tensor) for tensor in (self.residual, self.normed))
        return Tap(change(self.hidden), residual, normed)


LayerParts = tuple[Tensor, Tensor, Tensor]
"""Output, stream after attention, and what the MLP read."""


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last dimension, at least in float32.

    ``in_float32``: multiply by the weight before rounding to the input's dtype (OLMo 2, Gemma), else after (Llama).
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0, in_float32: bool = False) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.in_float32 = in_float32 or offset != 0.0
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))

    def scale(self) -> Tensor:
        """The effective weight: what the normalised input is multiplied with."""
        return self.weight if self.offset == 0.0 else self.offset + self.weight

    def forward(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        if x.dtype not in (torch.float16, torch.bfloat16):
            return F.rms_norm(x, shape, self.scale(), self.eps)
        if self.in_float32:
            return F.rms_norm(x.float(), shape, self.offset + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, shape, None, self.eps) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, offset={self.offset}"


def model_norm(config: ModelConfig, size: int | None = None) -> RMSNorm:
    """A norm of the model's own arithmetic, over ``hidden_size`` unless another size is given."""
    return RMSNorm(size or config.hidden_size, config.rms_norm_eps, config.norm_offset, config.norm_in_float32)


def activate(name: str, x: Tensor) -> Tensor:
    """The MLP's nonlinearity, by the name :class:`ModelConfig` gives it."""
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_pytorch_tanh" else "none")


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)); Phi-3 checkpoints keep gate and up in one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.hidden_act
        self.fused = config.fused_projections
        if self.fused:
            self.gate_up_proj = nn.Linear(size, 2 * inner, bias=bias)
        else:
            self.gate_proj = nn.Linear(size, inner, bias=bias)
            self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        y: Tensor = self.down_proj(activate(self.activation, gate) * up)
        return y


def attend(query_BHTd: Tensor, key_BKSd: Tensor, value_BKSd: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Grouped-query attention [B, H, T, Dh]; ``mask`` None is causal, or unmasked for a single query."""
    count, grouped = query_BHTd.shape[2], query_BHTd.shape[1] > key_BKSd.shape[1]
    if grouped and mask is not None and query_BHTd.is_cuda:
        return attend_folded(query_BHTd, key_BKSd, value_BKSd, mask, scale)
    return F.scaled_dot_product_attention(
        query_BHTd,
        key_BKSd,
        value_BKSd,
        attn_mask=mask,
        is_causal=mask is None and count > 1,
        scale=scale,
        enable_gqa=grouped,
    )


def attend_folded(query_BHTd: Tensor, key_BKSd: Tensor, value_BKSd: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same with each group of heads folded into the queries: fused CUDA kernels take grouped heads or a mask."""
    rows, heads, count, size = query_BHTd.shape
    groups = heads // key_BKSd.shape[1]
    query = query_BHTd.reshape(rows, heads // groups, groups * count, size)
    folded = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(query, key_BKSd, value_BKSd, attn_mask=folded, scale=scale)
    return out.reshape(rows, heads, count, size)


class Attention(nn.Module):
    """Attention with grouped keys and values, RoPE, and a norm on queries and keys where the family has one."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.scale = config.attention_scale
        self.layer_type = config.layer_types[index]
        self.use_rope = config.use_rope[index]
        self.local_rope = config.rope_local is not None and self.layer_type == SLIDING
        self.fused, self.qk_norm = config.fused_projections, config.qk_norm
        size, wide, narrow = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.fused:
            self.qkv_proj = nn.Linear(size, wide + 2 * narrow, bias=config.qkv_bias)
        else:
            self.q_proj = nn.Linear(size, wide, bias=config.qkv_bias)
            self.k_proj = nn.Linear(size, narrow, bias=config.qkv_bias)
            self.v_proj = nn.Linear(size, narrow, bias=config.qkv_bias)
        self.o_proj = nn.Linear(wide, size, bias=config.o_bias)
        if self.qk_norm is not None:
            self.q_norm = model_norm(config, self.head_dim if self.qk_norm == "head" else wide)
            self.k_norm = model_norm(config, self.head_dim if self.qk_norm == "head" else narrow)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, Dh], keys and values [B, KV, T, Dh], normed but not rotated."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.fused:
            query, key, value = self.qkv_proj(x_BTD).split((wide, narrow, narrow), dim=-1)
        else:
            query, key, value = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value))
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def forward(
        self, x_BTD: Tensor, context: AttentionContext, past: PastProtocol | None = None, key: CacheKey | None = None
    ) -> Tensor:
        queries, keys, values = self.project(x_BTD)
        if self.use_rope:
            cos, sin = context.cos, context.sin
            if self.local_rope and context.local_cos is not None and context.local_sin is not None:
                cos, sin = context.local_cos, context.local_sin
            queries, keys = rotate(queries, cos[:, None], sin[:, None]), rotate(keys, cos[:, None], sin[:, None])
        if past is not None:
            keys, values = past.update(self.index if key is None else key, keys, values)
        out = attend(queries, keys, values, context.masks[self.layer_type], self.scale)
        y: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return y


class DecoderLayer(nn.Module):
    """Attention and MLP with residuals. ``index`` is the 0-based place in the stack; it picks the layer's type."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.placement = config.norm_placement
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        if self.placement != "post":
            self.input_layernorm = model_norm(config)
        self.post_attention_layernorm = model_norm(config)
        if self.placement == "sandwich":
            self.pre_feedforward_layernorm = model_norm(config)
        if self.placement != "pre":
            self.post_feedforward_layernorm = model_norm(config)

    def attend(
        self,
        hidden: Tensor,
        context: AttentionContext,
        past: PastProtocol | None = None,
        *,
        key: CacheKey | None = None,
    ) -> Tensor:
        """The stream after attention, [B, T, D]. ``key`` names the cache entry (default: the layer's index)."""
        x = hidden if self.placement == "post" else self.input_layernorm(hidden)
        y: Tensor = self.self_attn(x, context, past, key)
        if self.placement != "pre":
            y = self.post_attention_layernorm(y)
        return hidden + y

    def mlp_input(self, residual: Tensor) -> Tensor:
        """What this layer's MLP reads of the stream after attention."""
        if self.placement == "post":
            return residual
        norm = self.post_attention_layernorm if self.placement == "pre" else self.pre_feedforward_layernorm
        normed: Tensor = norm(residual)
        return normed

    def mlp_output(self, y: Tensor) -> Tensor:
        """What is added to the stream for the MLP's output ``y``."""
        norm = self.post_mlp_norm()
        if norm is not None:
            y = norm(y)
        return y

    def post_mlp_norm(self) -> RMSNorm | None:
        """The norm behind the MLP, or None where the family has none."""
        return None if self.placement == "pre" else self.post_feedforward_layernorm

    def forward(
        self,
        hidden: Tensor,
        context: AttentionContext,
        past: PastProtocol | None = None,
        *,
        key: CacheKey | None = None,
    ) -> Tensor:
        residual = self.attend(hidden, context, past, key=key)
        return residual + self.mlp_output(self.mlp(self.mlp_input(residual)))

    def parts(self, hidden: Tensor, context: AttentionContext, past: PastProtocol | None = None) -> LayerParts:
        """What :meth:`forward` gives, and what an exit may tap besides: [B, T, D] each."""
        residual = self.attend(hidden, context, past)
        normed = self.mlp_input(residual)
        return residual + self.mlp_output(self.mlp(normed)), residual, normed
