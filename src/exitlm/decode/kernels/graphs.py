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

Rows are of any sequences: each brings the slot it writes and the blocks it reads, as data. Padding repeats the last
row: the same values go to the same place, so nothing else of the pool is touched. Recordings hold the addresses of one
pool. Block exits run eagerly.

Memory on a GPU: the joined q/k/v and gate/up matrices of the engine are copies beside the model's own (about two thirds
of the layers' bytes); the other matrices are shared with the model.

``benchmarks/gpu.sh`` checks and measures all of this on a GPU in under eight minutes.

Shapes: M rows, padded; R the rows asked for; D hidden_size; S keys, padded; H heads, Hkv key/value heads, G = H / Hkv;
Dh head_dim; C chunks of keys.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from exitlm.decode.batch import Batch
from exitlm.decode.cache.kv_pool import KVPool
from exitlm.errors import UserError, nearest
from exitlm.model.exits import ExitKey

Rotations = list[Tensor]
"""Rotations of positions, ``[T, 1, R / 2]`` complex, for each RoPE of a model."""

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


class LayerLike(Protocol):
    """What a pass needs of a layer; see ``fused.py``."""

    entry: int

    def attend(self, x_MD: Tensor, rows: Any) -> Tensor:
        """The residual stream after attention."""

    def feed_forward(self, residual_MD: Tensor) -> Tensor:
        """The layer's output from the stream after attention."""


class HeadLike(Protocol):
    """What is recorded of an exit head. ``key``: its adapter and layer."""

    key: ExitKey

    def compute(self, input_MD: Tensor) -> Tensor:
        """Logits of what the head reads."""


def through_layers(layers: Sequence[LayerLike], hidden_MD: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
    """Run ``layers``: their output and the residual before the last one's MLP, both ``[M, D]``."""
    residual = hidden_MD
    with attention_backends(hidden_MD.device):
        for layer in layers:
            residual = layer.attend(hidden_MD, rows)
            hidden_MD = layer.feed_forward(residual)
    return hidden_MD, residual


class StaticRows:
    """What all layers of a pass share, as a function of ``numbers`` on the device alone; ``keys`` is S.

    For each row and group of cache entries, ``numbers`` holds the row's position, the slot that it writes and the
    blocks of the positions that it may see. Rows of one sequence (``alone``) gather its keys once.
    """

    def __init__(
        self, pool: KVPool, tables: Rotations, numbers_MGN: Tensor, keys: int, dtype: torch.dtype, alone: bool
    ) -> None:
        self.pool, self.count, self._dtype, self._keys = pool, len(numbers_MGN), dtype, keys
        self._numbers_MGN, self._alone = numbers_MGN, alone and self.count > 1
        self.positions = numbers_MGN[:, 0, 0]
        self.rotations = [
            torch.view_as_complex(torch.view_as_real(table).index_select(0, self.positions)) for table in tables
        ]
        self._reads: dict[int, Tensor] = {}
        self._masks: dict[int | None, Tensor] = {}

    def write(self, entry: int, new_M2Kd: Tensor) -> None:
        """Store keys and values at the rows' slots."""
        slots_M = self._numbers_MGN[:, self.pool.group_of[entry], 1]
        self.pool.stores[entry].index_copy_(2, slots_M, new_M2Kd.permute(1, 2, 0, 3))

    def attend(self, entry: int, query_MHd: Tensor, window: int | None, scale: float) -> Tensor:
        """Attention of every row over the first S positions of its own sequence, ``[M, H * Dh]``. B is M here, or 1 for
        rows of one sequence, which are then queries as grouped heads are."""
        store_2KSd = self.pool.stores[entry]
        (M, H, Dh), Hkv = query_MHd.shape, store_2KSd.shape[1]
        read_BS, mask_BGS = self._read(self.pool.group_of[entry]), self._mask(window, H // Hkv)
        seen = store_2KSd.index_select(2, read_BS.flatten()).view(2, Hkv, -1, self._keys, Dh).transpose(1, 2)
        query, count = query_MHd.view(M, Hkv, H // Hkv, Dh), chunks(self._keys)
        if self._alone:
            query = query.permute(1, 2, 0, 3).reshape(1, Hkv, -1, Dh)
        if count == 1:
            out = F.scaled_dot_product_attention(query, seen[0], seen[1], attn_mask=mask_BGS[:, None], scale=scale)
        else:
            out = attend_in_chunks(query, seen, mask_BGS, scale, count)
        return (out.view(H, M, Dh).transpose(0, 1) if self._alone else out).reshape(M, H * Dh)

    def _read(self, group: int) -> Tensor:
        """Slots ``[B, S]`` of the first S positions of each sequence."""
        found = self._reads.get(group)
        if found is None:
            size = self.pool.block_size
            rows = self._numbers_MGN[:1] if self._alone else self._numbers_MGN
            blocks = rows[:, group, 2 : 2 + -(-self._keys // size)]
            offset = torch.arange(size, device=blocks.device)
            found = self._reads[group] = (blocks[:, :, None] * size + offset).flatten(1)[:, : self._keys]
        return found

    def _mask(self, window: int | None, groups: int) -> Tensor:
        """Additive ``[M, G, S]``, or ``[1, G * M, S]`` for rows of one sequence. Hidden keys get a large finite number:
        a chunk may have no visible key at all."""
        found = self._masks.get(window)
        if found is None:
            key, query = torch.arange(self._keys, device=self.positions.device)[None, :], self.positions[:, None]
            hidden = key > query
            if window is not None:
                hidden = hidden | (key <= query - window)
            low = max(-1e30, torch.finfo(self._dtype).min / 2)
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=hidden.device).masked_fill_(hidden, low)
            mask = mask.repeat(groups, 1)[None] if self._alone else mask[:, None].expand(-1, groups, -1)
            found = self._masks[window] = mask
        return found


def attend_in_chunks(query_MKGd: Tensor, seen_2MKSd: Tensor, mask_MGS: Tensor, scale: float, count: int) -> Tensor:
    """Attention ``[M, Hkv, G, Dh]`` with the keys cut into ``count`` chunks that run side by side, joined by their
    log-sum-exps (flash-decoding): a kernel that walks all keys for each head would leave most of a GPU idle with few
    rows."""
    M, heads, groups, size = query_MKGd.shape
    keys = mask_MGS.shape[-1] // count
    chunked = seen_2MKSd.reshape(2, M, heads, count, keys, size).transpose(2, 3).flatten(1, 2)
    mask_NKGs = mask_MGS.reshape(M, groups, count, keys).transpose(1, 2).flatten(0, 1)[:, None]
    mask_NKGs = mask_NKGs.expand(-1, heads, -1, -1)
    query_NKGd = query_MKGd.repeat_interleave(count, 0)
    if query_MKGd.is_cuda and query_MKGd.dtype != torch.float64 and size % 8 == 0:
        out, sums, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query_NKGd, chunked[0], chunked[1], mask_NKGs, True, 0.0, False, scale=scale
        )
        sums = sums[..., :groups]
    else:
        scores = query_NKGd @ chunked[0].transpose(-1, -2) * scale + mask_NKGs
        out, sums = torch.softmax(scores, -1) @ chunked[1], scores.logsumexp(-1)
    share = torch.softmax(sums.reshape(M, count, heads, groups), 1)[..., None]
    joined: Tensor = (out.reshape(M, count, heads, groups, size) * share).sum(1).to(query_MKGd.dtype)
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
    numbers_MGN: Tensor


@dataclass
class StaticRunner:
    """Runs passes of few rows with static shapes; ``record`` None runs them as they are."""

    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    record: Callable[[Callable[[], Tensor]], Recorded] | None
    broken: bool = False
    _pool: KVPool | None = None
    _input_1D: Tensor | None = None
    _buffers: dict[int, _Buffers] = field(default_factory=dict)
    _heads: dict[ExitKey, Recorded] = field(default_factory=dict)
    _passes: dict[tuple[int, ...], Recorded] = field(default_factory=dict)

    def takes(self, batch: Batch) -> bool:
        """Whether a pass of these rows runs here: few, and with the same rotations."""
        same = len({part.stretched for part in batch.parts}) == 1
        return batch.count <= ROWS[-1] and same and not self.broken

    def run(
        self, layers: Sequence[LayerLike], hidden_RD: Tensor, batch: Batch, pool: KVPool, tables: Rotations
    ) -> tuple[Tensor, Tensor]:
        """As :func:`through_layers`; ``tables`` hold the rotations of all positions."""
        if pool is not self._pool:  # recordings and buffers are of one pool
            self._pool, self._buffers, self._passes = pool, {}, {}
        bucket, keys = row_bucket(batch.count), key_bucket(max(part.end for part in batch.parts), pool.longest)
        buffers, alone = self._fill(bucket, keys, hidden_RD, batch, pool), len(batch.parts) == 1

        def body() -> Tensor:
            rows = StaticRows(pool, tables, buffers.numbers_MGN, keys, self.dtype, alone)
            return torch.stack(through_layers(layers, buffers.hidden_MD, rows))

        if self.record is None:
            hidden, residual = body()[:, : batch.count]
            return hidden, residual
        key = (layers[0].entry, layers[-1].entry, bucket, keys, alone, batch.parts[0].stretched)
        found = self._passes.get(key)
        if found is None or found.tables is not tables:
            try:
                found = self.record(body)
            except RuntimeError as error:
                self._give_up(error)
                hidden, residual = body()[:, : batch.count]
                return hidden, residual
            found = self._passes[key] = Recorded(found.replay, found.output, tables)
        found.replay()
        hidden, residual = found.output[:, : batch.count].clone()
        return hidden, residual

    def head(self, head: HeadLike, input_1D: Tensor) -> Tensor:
        """Logits ``[1, K]`` of an exit for one row of what its head reads."""
        if self._input_1D is None:
            with torch.inference_mode(False):  # written in and out of inference mode
                self._input_1D = torch.zeros(1, self.hidden_size, dtype=self.dtype, device=self.device)
        buffer = self._input_1D
        buffer.copy_(input_1D)
        if self.record is None:
            return head.compute(buffer)
        found = self._heads.get(head.key)
        if found is None:
            try:
                found = self._heads[head.key] = self.record(lambda: head.compute(buffer))
            except RuntimeError as error:
                self._give_up(error)
                return head.compute(input_1D)
        found.replay()
        return found.output.clone()

    def _fill(self, bucket: int, keys: int, hidden_RD: Tensor, batch: Batch, pool: KVPool) -> _Buffers:
        """Put rows, positions, slots and the blocks of ``keys`` positions into the inputs for ``bucket`` rows; the last
        row is repeated."""
        buffers = self._of(bucket, pool)
        buffers.hidden_MD[: batch.count].copy_(hidden_RD)
        if batch.count < bucket:
            buffers.hidden_MD[batch.count :].copy_(hidden_RD[-1:])
        size, groups = pool.block_size, range(len(pool.groups))
        width = 2 + -(-keys // size)
        numbers, line = array("q"), array("q")
        for part in batch.parts:
            slots = [[n for first, count in part.writes[g] for n in range(first, first + count)] for g in groups]
            blocks = [array("q", part.blocks(g, size)) for g in groups]
            for known in blocks:
                known.extend([0] * (width - 2 - len(known)))
            for i in range(part.count):
                line = array("q")
                for g in groups:
                    line.extend((part.start + i, slots[g][i]))
                    line.extend(blocks[g])
                numbers.extend(line)
        numbers.extend(line * (bucket - batch.count))
        filled = torch.frombuffer(numbers, dtype=torch.long).view(bucket, len(groups), width)
        buffers.numbers_MGN[:, :, :width].copy_(filled)
        return buffers

    def _of(self, bucket: int, pool: KVPool) -> _Buffers:
        found = self._buffers.get(bucket)
        if found is None:
            width = 2 + -(-pool.longest // pool.block_size)
            with torch.inference_mode(False):  # written in and out of inference mode
                hidden = torch.zeros(bucket, self.hidden_size, dtype=self.dtype, device=self.device)
                numbers = torch.zeros(bucket, len(pool.groups), width, dtype=torch.long, device=self.device)
                found = self._buffers[bucket] = _Buffers(hidden, numbers)
        return found

    def _give_up(self, error: RuntimeError) -> None:
        self.broken = True
        warnings.warn(f"CUDA graphs could not be recorded, decoding goes on without them: {error}", stacklevel=4)


def static_runner(compile: str, hidden_size: int, dtype: torch.dtype, device: torch.device) -> StaticRunner | None:
    """The runner for a resolved ``compile``, None for ``none``."""
    if compile == "none":
        return None
    return StaticRunner(hidden_size, dtype, device, CudaRecorder(device) if compile == "graphs" else None)
