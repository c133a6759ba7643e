"""A stage of a pipeline: a process, or in tests a thread, that does what comes over one link to the head.

```
greet -> weights: are they here? -> (probe: how fast is this machine?) -> job, exits -> ready
-> pass after pass, in order, until the head ends
```
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from exitlm.decode.batch import Batch, Part
from exitlm.decode.cache.block_table import BlockTable
from exitlm.decode.kernels.formats import NATIVE_FORMATS, resolve_format
from exitlm.decode.kernels.fused import FusedModel
from exitlm.decode.kernels.graphs import resolve_compile
from exitlm.decode.kernels.native_model import NativeModel
from exitlm.decode.kernels.packed import packed_model
from exitlm.decode.kernels.ranks import RankLost
from exitlm.decode.kernels.runner import Arrived, Runner
from exitlm.decode.kernels.share import Share
from exitlm.decode.options import EngineConfig
from exitlm.decode.remote.frames import BadFrame, Frame, Kind
from exitlm.decode.remote.job import Exits, Job, Weights, weights_of
from exitlm.decode.remote.link import Link, words_of
from exitlm.decode.remote.messages import of_brought, to_work
from exitlm.decode.remote.worker import Worker
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel
from exitlm.weights.adapter import digest_of_base
from exitlm.weights.load import load_model
from exitlm.weights.source import resolve

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from exitlm.decode.remote.ranks import Followers

_PROBES = 12


class Opens(Protocol):
    """Where a stage has its weights from."""

    def place(self, source: str) -> str:
        """Where the weights that the head calls ``source`` are here."""

    def digest(self, source: str) -> str:
        """That of the weights. Raises :class:`UserError` where there are none."""

    def load(self, weights: Weights, layers: range) -> EarlyExitModel:
        """The model with these layers (0-based) at least, without exits."""


class OnDisk:
    """Weights on this machine's disk: at ``source``, or where the head has them."""

    def __init__(self, source: str | None = None) -> None:
        self._source = source

    def place(self, source: str) -> str:
        """See :class:`Opens`."""
        return source if self._source is None else str(resolve(self._source))

    def digest(self, source: str) -> str:
        """See :class:`Opens`."""
        return digest_of_base(load_model(self.place(source), layers=[1]))

    def load(self, weights: Weights, layers: range) -> EarlyExitModel:
        """See :class:`Opens`."""
        chosen = [layer + 1 for layer in layers]
        return load_model(self.place(weights.source), dtype=weights.dtype, device=weights.device, layers=chosen)


def serve_link(link: Link, opens: Opens) -> None:
    """Be a stage of the head at the other end of a link that was greeted, until it ends.

    Raises:
        Closed: the head is gone.
        BadFrame: what came is nothing that a head says.
        RankLost: a tensor rank of this stage is gone, or not in step.
        UserError: what it asks for can't be done here; it was told.
    """
    link.trust()
    words = words_of(link.receive())
    if "follow" in words:
        from exitlm.decode.remote.ranks import LOAD, follow, forming  # half a second that others need not spend

        with forming(words["follow"]) as group:
            stage = Stage(link, words_of(link.receive()), opens, group)
            link.say(ready=True)
            link.hear(LOAD)
            follow(group, link, stage.perform)
    try:
        if "weights" in words:
            link.say(accepted=checked_digest(_weights(words["weights"]), opens))
            words = words_of(link.receive())
        if "probe" in words:
            link.say(**probe(_weights(words["probe"]), opens))
            words = words_of(link.receive())
        begun = time.monotonic()
        stage = Stage(link, words, opens, None)
    except (UserError, OSError) as error:
        link.say(refused=str(error))
        raise
    try:
        link.say(ready={**facts(stage.worker), "seconds": time.monotonic() - begun})
        while True:
            answer = stage.perform(stage.next())
            if answer is not None:
                link.send(answer)
            if stage.out_of_step:
                raise RankLost("a pass broke off on the first rank, and no other one knows how far it came")
    finally:
        stage.close()


class Stage:
    """Layers that are ready, with the other tensor ranks where there are some."""

    def __init__(self, link: Link, words: dict[str, Any], opens: Opens, group: ProcessGroup | None) -> None:
        """``words``: the job. ``group``: where this is one of the other ranks, that of all."""
        self._link, self._job = link, Job.of(words.get("job", {}))
        self._followers: Followers | None = None
        self._follows, self.out_of_step = group is not None, False
        share, place = self._job.share, self._job.number * self._job.weights.options.tensor
        rank = 0 if group is None else group.rank()
        w = replace(self._job.weights, device=device_for(self._job.weights.device, place + rank))
        link.say(accepted=True)
        if w.options.threads is not None:
            torch.set_num_threads(w.options.threads)
        if w.options.tensor > 1 and group is None:
            from exitlm.decode.remote.ranks import Followers

            self._followers = Followers(w.options.tensor, torch.device(w.device))
            group = self._followers.group
            own = {**words["job"]["weights"], "source": opens.place(w.source)}  # which need not be where the head's are
            self._followers.say({"job": {**words["job"], "weights": own}})
        try:
            model = opens.load(w, share.layers)
            exits = Exits(model, self._job.exits)
            while exits.missing > 0:
                piece = link.receive(60.0)
                exits.take(piece)
                if self._followers is not None:
                    self._followers.tell(piece)
            exits.attach()
            self.worker = Worker(Runner(_packed(model, w, share, group), w.options, self._job.blocks))
            if self._followers is not None:
                self._followers.await_ready()
        except BaseException:
            self.close()
            raise

    def next(self) -> Frame:
        """What the head asks for next. Raises :class:`Closed` when it is gone."""
        if self._followers is None:
            return self._link.receive()
        frame = self._followers.receive(self._link)
        self._followers.hand_on(frame)
        return frame

    def perform(self, frame: Frame) -> Frame | None:
        """Do what a frame asks for; the answer, if there is one."""
        job, worker = self._job, self.worker
        if frame.kind == Kind.CLEAR:
            worker.clear(frame.ints[0] if frame.ints else -1, frame.ints[1:])
            return None
        if frame.kind != Kind.PASS:
            raise BadFrame("something came that no head says")
        work = to_work(frame, job.adapters, job.blocks, worker.runner.pool.block_size)
        try:
            return of_brought(worker.perform(work), job.adapters)
        except (BadFrame, RankLost):
            raise
        except Exception as error:
            if self._follows:
                raise
            self.out_of_step = self._followers is not None  # their next sum would be one of another pass
            text = np.frombuffer(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode(), np.uint8)
            return Frame(Kind.FAILED, tensors=[torch.from_numpy(text.copy())])

    def close(self) -> None:
        """End the other ranks."""
        if self._followers is not None:
            self._followers.close()


def device_for(device: str, place: int) -> str:
    """The device of a process: of several GPUs each takes its own, in turn."""
    if torch.device(device).type != "cuda" or torch.cuda.device_count() < 2:
        return device
    return f"cuda:{place % torch.cuda.device_count()}"


def _packed(model: EarlyExitModel, w: Weights, share: Share, group: ProcessGroup | None) -> FusedModel | NativeModel:
    """The layers of a stage as they are run, or this rank's part of them."""
    if group is None:
        return packed_model(model, w.quant, w.compile, w.options, share, w.rounds)
    if w.quant in NATIVE_FORMATS:
        raise UserError(f"quant '{w.quant}' is a format of the native kernels, which tensor ranks lack; use 'auto'")
    from exitlm.decode.kernels.tensor_model import TensorModel

    matrices = [weight.detach() for weight in model.model.layers.parameters() if weight.dim() == 2]
    format, way = resolve_format(w.quant, matrices), resolve_compile(w.compile, model.device)
    return TensorModel(model, format, way, share, group=group)


def _weights(found: Any) -> Weights:
    try:
        return weights_of(found)
    except (KeyError, TypeError, ValueError) as error:
        raise BadFrame(f"a question came that is none ({error})") from error


def checked_digest(weights: Weights, opens: Opens) -> str:
    """The digest of the weights here. Raises :class:`UserError` if it is not that of the head's."""
    found = opens.digest(weights.source)
    if found != weights.digest:
        raise UserError(
            f"the weights of this stage have digest {found}, those of the head {weights.digest}; give the stage the "
            "head's model: exitlm stage MODEL --join ..."
        )
    return found


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
def probe(weights: Weights, opens: Opens) -> dict[str, Any]:
    """Seconds of a layer and of the final head for one row here, by the best of a few passes of the last layer, and
    bytes of memory."""
    if weights.options.threads is not None:
        torch.set_num_threads(weights.options.threads)
    depth = opens.load(weights, range(1)).config.num_hidden_layers
    model = opens.load(weights, range(depth - 1, depth))
    layer, head = seconds(model, weights)
    return {"layer": layer, "head": head, "memory": memory()}


def seconds(model: EarlyExitModel, weights: Weights) -> tuple[float, float]:
    """Seconds of the last layer of a model and of its final head, for one row."""
    depth = model.config.num_hidden_layers
    share = Share(layers=range(depth - 1, depth), bounds=(0, depth - 1, depth) if depth > 1 else (0, depth))
    fused = packed_model(model, weights.quant, weights.compile, weights.options, share, weights.rounds)
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
