"""A stage of a pipeline: a process, or in tests a thread, that does what comes over one link to the head.

```
greet -> (probe: how fast is this machine?) -> job, exits -> ready -> pass after pass, in order, until the head ends
```
"""

from __future__ import annotations

import os
import time
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroup

from exitlm.decode.batch import Batch, Part
from exitlm.decode.cache.block_table import BlockTable
from exitlm.decode.kernels.packed import packed_model
from exitlm.decode.kernels.runner import Arrived, Runner
from exitlm.decode.kernels.share import Share
from exitlm.decode.options import EngineConfig
from exitlm.decode.remote.frames import BadFrame, Kind
from exitlm.decode.remote.job import Exits, Job, Weights, weights_of
from exitlm.decode.remote.link import Speaks, frame_of, words_of
from exitlm.decode.remote.messages import of_brought, to_work
from exitlm.decode.remote.worker import Worker
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel
from exitlm.weights.adapter import digest_of_base
from exitlm.weights.load import load_model

_PROBES = 12


class Opens(Protocol):
    """Where a stage has its weights from."""

    def digest(self, source: str) -> str:
        """That of the weights. Raises :class:`UserError` where there are none."""

    def load(self, weights: Weights, layers: range) -> EarlyExitModel:
        """The model with these layers (0-based) at least, without exits."""


class OnDisk:
    """Weights on this machine's disk: at ``source``, or where the head has them."""

    def __init__(self, source: str | None = None) -> None:
        self._source = source

    def digest(self, source: str) -> str:
        """See :class:`Opens`."""
        return digest_of_base(load_model(self._source or source, layers=[1]))

    def load(self, weights: Weights, layers: range) -> EarlyExitModel:
        """See :class:`Opens`."""
        chosen = [layer + 1 for layer in layers]
        return load_model(self._source or weights.source, dtype=weights.dtype, device=weights.device, layers=chosen)


def serve_link(link: Speaks, opens: Opens, group: ProcessGroup | None = None) -> None:
    """Be a stage of the head at the other end of a link that was greeted, until it ends; with a ``group``, one of the
    tensor ranks of a stage (see ``tensor_stage.py``).

    Raises:
        Closed: the head is gone.
        BadFrame: what came is nothing that a head says.
        UserError: what it asks for can't be done here; it was told.
        Exception: what broke a pass off on one of several ranks, after which they are not in step.
    """
    worker: Worker | None = None
    job: Job | None = None
    link.trust()
    while True:
        frame = link.receive()
        if frame.kind == Kind.TEXT:
            words = words_of(frame)
            try:
                if "probe" in words:
                    link.say(**probe(_weights(words["probe"]), opens, group))
                elif "job" in words:
                    job = Job.of(words["job"])
                    begun = time.monotonic()
                    worker = _prepared(link, job, opens, group)
                    link.say(ready={**facts(worker), "seconds": time.monotonic() - begun})
            except (UserError, OSError) as error:
                link.say(refused=str(error))
                raise
        elif worker is None or job is None:
            raise BadFrame("a pass came before a job")
        elif frame.kind == Kind.PASS:
            work = to_work(frame, job.adapters, job.blocks, worker.runner.pool.block_size)
            try:
                answer = of_brought(worker.perform(work), job.adapters)
            except BadFrame:
                raise
            except Exception as error:
                if group is not None:
                    raise
                answer = frame_of({"error": f"{type(error).__name__}: {error}"}, Kind.FAILED)
            link.send(answer)
        elif frame.kind == Kind.CLEAR:
            worker.clear(frame.ints[0] if frame.ints else -1, frame.ints[1:])
        else:
            raise BadFrame("something came that no head says")


def _weights(found: Any) -> Weights:
    try:
        return weights_of(found)
    except (KeyError, TypeError, ValueError) as error:
        raise BadFrame(f"a question came that is none ({error})") from error


def _prepared(link: Speaks, job: Job, opens: Opens, group: ProcessGroup | None) -> Worker:
    """Load what a job asks for."""
    w, threads = job.weights, job.weights.options.threads
    found = opens.digest(w.source)
    if found != w.digest:
        raise UserError(
            f"the weights of this stage have digest {found}, those of the head {w.digest}; give the stage the head's "
            "model: exitlm stage MODEL --join ..."
        )
    if threads is not None:
        torch.set_num_threads(threads)
    model = opens.load(w, job.share.layers)
    exits = Exits(model, job.exits)
    while exits.missing > 0:
        exits.take(link.receive(60.0))
    exits.attach()
    fused = packed_model(model, w.quant, w.compile, w.options, job.share, w.rounds, group)
    return Worker(Runner(fused, w.options, job.blocks))


def facts(worker: Worker) -> dict[str, Any]:
    """What the head has to know of a stage that is ready."""
    fused = worker.runner.fused
    return {
        "quant": fused.quant, "dtype": str(fused.dtype).removeprefix("torch."), "kernels": fused.kernels_name,
        "cache_dtype": str(fused.cache_dtype).removeprefix("torch."), "exact": fused.exact, "note": fused.note,
        "static": fused.static is not None, "process": os.getpid(),
    }  # fmt: skip


# ---- how fast is this machine?


@torch.inference_mode()
def probe(weights: Weights, opens: Opens, group: ProcessGroup | None = None) -> dict[str, Any]:
    """Seconds of a layer and of the final head for one row here, by the best of a few passes of the last layer, and
    bytes of memory."""
    found = opens.digest(weights.source)
    if found != weights.digest:
        raise UserError(
            f"the weights of this stage have digest {found}, those of the head {weights.digest}; give the stage the "
            "head's model: exitlm stage MODEL --join ..."
        )
    if weights.options.threads is not None:
        torch.set_num_threads(weights.options.threads)
    depth = opens.load(weights, range(1)).config.num_hidden_layers
    model = opens.load(weights, range(depth - 1, depth))
    layer, head = seconds(model, weights, group)
    return {"digest": found, "layer": layer, "head": head, "memory": memory()}


def seconds(model: EarlyExitModel, weights: Weights, group: ProcessGroup | None = None) -> tuple[float, float]:
    """Seconds of the last layer of a model and of its final head, for one row; by all ranks of a ``group``."""
    depth = model.config.num_hidden_layers
    share = Share(layers=range(depth - 1, depth), bounds=(0, depth - 1, depth) if depth > 1 else (0, depth))
    fused = packed_model(model, weights.quant, weights.compile, weights.options, share, weights.rounds, group)
    runner = Runner(fused, EngineConfig(kv_bytes=None, block_size=32), blocks=None)
    tables = [BlockTable(allocator, runner.pool.block_size) for allocator in runner.pool.allocators]
    assert all(table.ensure(1) for table in tables)
    slots = tuple(tuple(table.slots(0, 1)) for table in tables)
    batch = Batch.of((Part(0, 1, tuple(0 for _ in tables), slots, slots),))
    hidden_MD = fused.embed([0])
    best = [float("inf")] * 2
    for _ in range(_PROBES):
        begun = time.perf_counter()
        runner.run(share.first, share.last, batch, hidden_MD)
        between = time.perf_counter()
        runner.final_scores(Arrived(hidden_MD, hidden_MD), [0])
        best = [min(best[0], between - begun), min(best[1], time.perf_counter() - between)]
    return best[0], best[1]


def memory() -> int:
    """Bytes of this machine's memory; 0 where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
