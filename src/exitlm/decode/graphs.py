"""A pass of a few rows with static shapes, and its recording as a CUDA graph.

On a GPU the kernels of a decode step take less time than their launches. Here a pass of M rows through some layers is
made of fixed addresses and shapes alone: rows are padded to 1, 2, 4, 8, 16 or 32, keys to a power of two, positions are
data (keys and values go where they say, and the mask is computed from them). Such a pass is recorded once per segment,
number of rows and number of keys, and then replayed with one launch. Prefills and larger passes stay eager.

``compile`` of :class:`~exitlm.decode.engine.Engine` chooses:

* ``auto``: ``graphs`` on CUDA, else ``none``.
* ``none``: eager everywhere.
* ``graphs``: recorded passes (CUDA only). When recording fails, a warning says why and decoding goes on eagerly.
* ``static``: the same code with static shapes but nothing recorded, on any device: for tests and for finding faults.

Padding repeats the last row: the same values go to the same place, so nothing else of the cache is touched. A recording
holds the addresses of one cache and lives in :attr:`KeyValueCache.graphs`, which is emptied when the cache grows.
Block exits run eagerly. Memory on a GPU: the joined q/k/v and gate/up matrices of the engine are copies beside the
model's own (about two thirds of the layers' bytes); the other matrices are shared with the model.

``benchmarks/gpu.sh`` checks and measures all of this on a GPU in under eight minutes.

Shapes: M rows, padded; R the rows asked for; D hidden_size; S keys, padded; H heads, Hkv key/value heads, G = H / Hkv;
Dh head_dim; C chunks of keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from exitlm.errors import UserError, nearest

if TYPE_CHECKING:
    from exitlm.decode.cache import KeyValueCache
    from exitlm.decode.fused import FusedHead, FusedLayer, Rotations, Rows

COMPILE = ("auto", "none", "graphs", "static")
ROWS = (1, 2, 4, 8, 16, 32)
LEAST_KEYS = 256
CHUNK_KEYS, MOST_CHUNKS = 256, 32
# cuDNN's attention, torch's first choice on Hopper, builds a plan of tens of milliseconds for every length of the text.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def resolve_compile(compile: str, device: torch.device) -> str:
    """Turn the user's ``compile`` into ``none``, ``static`` or ``graphs``, or refuse."""
    if compile not in COMPILE:
        raise UserError(f"compile '{compile}' is unknown; use one of {', '.join(COMPILE)}{nearest(compile, COMPILE)}")
    if compile == "auto":
        return "graphs" if device.type == "cuda" else "none"
    if compile == "graphs" and device.type != "cuda":
        raise UserError(f"compile 'graphs' needs a CUDA device, but the model is on {device}; use compile 'none' there")
    return compile


def row_bucket(count: int) -> int:
    """The number of rows that ``count`` rows are padded to."""
    return next(size for size in ROWS if size >= count)


def key_bucket(end: int, capacity: int) -> int:
    """How many keys a pass looks at whose last position is ``end - 1``: a power of two from 256, or the capacity."""
    size = LEAST_KEYS
    while size < end:
        size *= 2
    return min(size, capacity)


def chunks(keys: int) -> int:
    """In how many chunks attention over ``keys`` is computed side by side; 1 where it is not cut."""
    count = min(MOST_CHUNKS, keys // CHUNK_KEYS)
    return count if count > 2 and keys % count == 0 else 1


def attention_backends(device: torch.device) -> AbstractContextManager[None]:
    """Keep attention on a GPU to kernels that need no plan per shape."""
    return sdpa_kernel(_BACKENDS) if device.type == "cuda" else nullcontext()


def through_layers(
    layers: Sequence[FusedLayer], hidden_MD: Tensor, rows: Rows | StaticRows, cache: KeyValueCache
) -> tuple[Tensor, Tensor]:
    """Run ``layers``: their output and the residual before the last one's MLP, both ``[M, D]``."""
    residual = hidden_MD
    with attention_backends(hidden_MD.device):
        for layer in layers:
            residual = layer.attend(hidden_MD, rows, cache)
            hidden_MD = layer.feed_forward(residual)
    return hidden_MD, residual


class StaticRows:
    """What all layers of a pass share, as a function of ``positions [M]`` on the device; ``keys`` is S."""

    def __init__(self, tables: Rotations, positions_M: Tensor, keys: int, groups: int, dtype: torch.dtype) -> None:
        self.positions, self.count = positions_M, len(positions_M)
        self.rotations = [
            torch.view_as_complex(torch.view_as_real(table).index_select(0, positions_M)) for table in tables
        ]
        self._keys, self._groups, self._dtype = keys, groups, dtype
        self._masks: dict[int | None, Tensor] = {}

    def write(self, store_2KTd: Tensor, new_M2Kd: Tensor) -> None:
        """Store keys and values at the rows' positions."""
        store_2KTd.index_copy_(2, self.positions, new_M2Kd.permute(1, 2, 0, 3))

    def attend(self, query_1KQd: Tensor, store_2KTd: Tensor, window: int | None, scale: float) -> Tensor:
        """Attention of Q = G * M queries per key head over the first S positions, ``[1, Hkv, Q, Dh]``."""
        mask, seen = self._mask(window), store_2KTd[:, :, : self._keys]
        count = chunks(self._keys)
        if count == 1:
            return F.scaled_dot_product_attention(query_1KQd, seen[0][None], seen[1][None], attn_mask=mask, scale=scale)
        return attend_in_chunks(query_1KQd, seen, mask, scale, count)

    def _mask(self, window: int | None) -> Tensor:
        """Additive ``[G * M, S]``. Hidden keys get a large finite number: a chunk may have no visible key at all."""
        found = self._masks.get(window)
        if found is None:
            key, query = torch.arange(self._keys, device=self.positions.device)[None, :], self.positions[:, None]
            hidden = key > query
            if window is not None:
                hidden = hidden | (key <= query - window)
            low = max(-1e30, torch.finfo(self._dtype).min / 2)
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device).masked_fill_(hidden, low)
            found = self._masks[window] = mask.repeat(self._groups, 1)
        return found


def attend_in_chunks(query_1KQd: Tensor, seen_2KSd: Tensor, mask_QS: Tensor, scale: float, count: int) -> Tensor:
    """Attention with the keys cut into ``count`` chunks that run side by side, joined by their log-sum-exps
    (flash-decoding): a kernel that walks all keys for each head would leave most of a GPU idle with few rows."""
    _, heads, queries, size = query_1KQd.shape
    key_CKsd, value_CKsd = seen_2KSd.view(2, heads, count, -1, size).transpose(1, 2)
    mask_CKQs = mask_QS.view(queries, count, -1).transpose(0, 1)[:, None].expand(-1, heads, -1, -1)
    query_CKQd = query_1KQd.expand(count, -1, -1, -1)
    if query_1KQd.is_cuda and query_1KQd.dtype != torch.float64 and size % 8 == 0:
        out, sums, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query_CKQd, key_CKsd, value_CKsd, mask_CKQs, True, 0.0, False, scale=scale
        )
        sums = sums[..., :queries]
    else:
        scores = query_CKQd @ key_CKsd.transpose(-1, -2) * scale + mask_CKQs
        out, sums = torch.softmax(scores, -1) @ value_CKsd, scores.logsumexp(-1)
    share = torch.softmax(sums, 0)[..., None]
    joined: Tensor = (out * share).sum(0, keepdim=True).to(query_1KQd.dtype)
    return joined


@dataclass(frozen=True)
class Recorded:
    """A recorded pass. ``output`` has a fixed address and is good until the next replay of anything; ``tables`` are the
    rotations it reads."""

    replay: Callable[[], object]
    output: Tensor
    tables: Rotations | None = None


class CudaRecorder:
    """Records functions of fixed addresses as CUDA graphs on one stream and in one memory pool of its own.

    Nothing else uses the stream, so that cuBLAS's workspace for it lies in the pool and stays there as long as any of
    these graphs: torch frees workspaces by stream when a graph is destroyed (pytorch issue 193402).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, body: Callable[[], Tensor]) -> Recorded:
        """Run ``body`` once as it is (libraries allocate on first use), then record it."""
        # outside of inference mode: state that torch makes on the first capture must not be bound to it
        with torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad():
            body()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                output = body()
        return Recorded(graph.replay, output)


@dataclass
class _Buffers:
    """The inputs of all passes with one number of rows."""

    hidden_MD: Tensor
    positions_M: Tensor


@dataclass
class StaticRunner:
    """Runs passes of few rows with static shapes; ``record`` None runs them as they are."""

    groups: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    record: Callable[[Callable[[], Tensor]], Recorded] | None
    broken: bool = False
    _buffers: dict[int, _Buffers] = field(default_factory=dict)
    _heads: dict[int, Recorded] = field(default_factory=dict)
    _count_up: Tensor | None = None

    def takes(self, rows: int) -> bool:
        """Whether a pass of this many rows runs here."""
        return rows <= ROWS[-1] and not self.broken

    def run(
        self, layers: Sequence[FusedLayer], hidden_RD: Tensor, rows: Rows, cache: KeyValueCache
    ) -> tuple[Tensor, Tensor]:
        """As :func:`through_layers`."""
        bucket, keys = row_bucket(rows.count), key_bucket(rows.end, cache.capacity)
        buffers = self._fill(bucket, hidden_RD, rows, cache.capacity)

        def body() -> Tensor:
            static = StaticRows(rows.tables, buffers.positions_M, keys, self.groups, self.dtype)
            return torch.stack(through_layers(layers, buffers.hidden_MD, static, cache))

        if self.record is None:
            hidden, residual = body()[:, : rows.count]
            return hidden, residual
        key = (layers[0].entry, layers[-1].entry, bucket, keys)
        found = cache.graphs.get(key)
        if found is None or found.tables is not rows.tables:
            try:
                found = self.record(body)
            except RuntimeError as error:
                self._give_up(error)
                return through_layers(layers, hidden_RD, rows, cache)
            found = cache.graphs[key] = Recorded(found.replay, found.output, rows.tables)
        found.replay()
        hidden, residual = found.output[:, : rows.count].clone()
        return hidden, residual

    def head(self, head: FusedHead, input_1D: Tensor) -> Tensor:
        """Logits ``[1, K]`` of an exit for one row of what its head reads."""
        buffer = self._of(1).hidden_MD
        buffer.copy_(input_1D)
        if self.record is None:
            return head.compute(buffer)
        found = self._heads.get(head.layer)
        if found is None:
            try:
                found = self._heads[head.layer] = self.record(lambda: head.compute(buffer))
            except RuntimeError as error:
                self._give_up(error)
                return head.compute(input_1D)
        found.replay()
        return found.output.clone()

    def _fill(self, bucket: int, hidden_RD: Tensor, rows: Rows, capacity: int) -> _Buffers:
        """Put rows and positions into the inputs for ``bucket`` rows; the last row is repeated."""
        buffers = self._of(bucket)
        buffers.hidden_MD[: rows.count].copy_(hidden_RD)
        if rows.count < bucket:
            buffers.hidden_MD[rows.count :].copy_(hidden_RD[-1:])
        if self._count_up is None or len(self._count_up) < capacity + bucket:
            with torch.inference_mode(False):
                self._count_up = torch.arange(capacity + ROWS[-1], device=self.device)
        positions = self._count_up[rows.start : rows.start + bucket]
        torch.clamp(positions, max=rows.end - 1, out=buffers.positions_M)
        return buffers

    def _of(self, bucket: int) -> _Buffers:
        found = self._buffers.get(bucket)
        if found is None:
            with torch.inference_mode(False):  # written in and out of inference mode
                hidden = torch.zeros(bucket, self.hidden_size, dtype=self.dtype, device=self.device)
                found = _Buffers(hidden, torch.zeros(bucket, dtype=torch.long, device=self.device))
            self._buffers[bucket] = found
        return found

    def _give_up(self, error: RuntimeError) -> None:
        self.broken = True
        warnings.warn(f"CUDA graphs could not be recorded, decoding goes on without them: {error}", stacklevel=4)


def static_runner(
    compile: str, groups: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> StaticRunner | None:
    """The runner for a resolved ``compile``, None for ``none``."""
    if compile == "none":
        return None
    return StaticRunner(groups, hidden_size, dtype, device, CudaRecorder(device) if compile == "graphs" else None)
