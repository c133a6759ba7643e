"""The head's side of a pipeline: its stages, what they are asked, and what they bring.

```
head process                                     other processes
engine ──submit──> stage 1 (a thread here)
       ──submit──> link ──────────────────────> stage 2
       <─arrivals─ link <────────────────────── stage 2
```
A stage has one pass at a time, and answers in order. Each (stage, pass) stands by itself: hidden states come back to
the head at a stage's end and go out again with the pass that takes them further, so that stages need nothing of each
other, and a stage that is replaced needs nothing but its job. Not here: which rows a pass takes (``engine.py``).
"""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import torch

from exitlm.decode.cache.kv_pool import KVPool
from exitlm.decode.kernels.packed import cache_dtype, packed_model, rounds_exits
from exitlm.decode.kernels.runner import Runner
from exitlm.decode.kernels.share import Share, block_entries, bounds_of
from exitlm.decode.options import EngineConfig
from exitlm.decode.remote.first_stage import FirstStage
from exitlm.decode.remote.frames import BadFrame, Frame, Kind
from exitlm.decode.remote.hello import Refused, heard, refuse
from exitlm.decode.remote.job import Job, Weights, pieces
from exitlm.decode.remote.launch import Launcher
from exitlm.decode.remote.link import Closed, Link, ready, words_of
from exitlm.decode.remote.lost import StageLost
from exitlm.decode.remote.messages import check_answer, of_work, to_brought
from exitlm.decode.remote.split import Speed, cuts_of, given_cuts
from exitlm.decode.remote.stage import facts, seconds
from exitlm.decode.remote.whole import HeadFacts, Whole
from exitlm.decode.remote.worker import Worker
from exitlm.decode.work import Brought, Work
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel
from exitlm.parallel.tensor import check_tensor

_LEAST_MEMORY = 1 << 26  # bytes that a machine has which runs layers
_LOAD = 600.0  # seconds that a stage may take to load its layers
_SLOWER = 3.0  # times as long as so many single rows, and a pass is taken for one that never ends


class _Pool(KVPool):
    """Numbers of blocks whose contents are elsewhere."""

    def bind(self, pipeline: Pipeline) -> None:
        """Where they are."""
        self._pipeline = pipeline

    def clear(self, group: int, blocks: Sequence[int]) -> None:
        """Let every stage overwrite them."""
        if blocks:
            self._pipeline.clear(group, blocks)


class Pipeline:
    """The stages of one engine; see :class:`~exitlm.decode.arrival.Runs`.

    ``free`` are the stages that have nothing to do; ``seconds[s]`` what a pass of one row through stage s takes
    lately (0: unknown), ``row_seconds[s]`` what each further row adds,
    ``computed[s]`` what all of its passes took.
    """

    reads_runs = False

    def __init__(
        self, model: EarlyExitModel, weights: Weights, launcher: Launcher, *, stages: int,
        layers_per_stage: Sequence[int] | None = None, timeout: float = 60.0,
    ) -> None:  # fmt: skip
        """Start the stages but the first, which is this process, and give each its layers of ``model``.

        ``layers_per_stage``: how many each has (None: by what layers take on each machine). ``timeout``: seconds after
        which a stage that does not answer is given up.

        Raises:
            UserError: a stage can't be had.
        """
        self._model, self._launcher, self._timeout = model, launcher, timeout
        self.links: dict[int, Link] = {}
        self._closer = weakref.finalize(self, _close, launcher, self.links)
        self._weights = replace(weights, rounds=rounds_exits(model, weights.quant))
        L, tensor = model.config.num_hidden_layers, weights.options.tensor
        self._heads = model.heads_by_key()
        self._remote = range(int(tensor == 1), stages)  # the first stage is this process, if one is enough for it
        self.seconds, self.row_seconds = [0.0] * stages, [0.0] * stages
        self._memory: dict[int, float] = {}
        self.computed = [0.0] * stages
        self._number, self._asked = 0, dict[int, int]()
        try:
            check_tensor(model.config, [head.config for head in self._heads.values()], tensor, False, 0)
            if layers_per_stage is not None:
                given_cuts(layers_per_stage, stages, L)
            cuts_of([Speed(layer=1.0, head=1.0)] * stages, L, {})
            for number in self._remote:
                self._start_any(number)
            cuts = self._cuts(stages) if layers_per_stage is None else given_cuts(layers_per_stage, stages, L)
            self.bounds = bounds_of(model, cuts)
            self.early = tuple(sorted({layer for _, layer in self._heads if layer < L}))
            ends, blocks = (0, *cuts, L), block_entries(model)
            self.shares = [
                Share(layers=range(ends[i], ends[i + 1]), bounds=self.bounds, blocks=blocks) for i in range(stages)
            ]
            self.pool = self._make_pool()
            for number in self._remote:
                self._send_job(number)
            worker = self._load_first() if tensor == 1 else None
            self.fused = self._whole(self._ready(0) if worker is None else facts(worker))
            for number in range(1, stages):
                self._await_ready(number)
        except (Closed, BadFrame) as error:
            self.close()
            raise UserError(f"a stage could not be made ready: {error}; what it printed says why") from error
        except BaseException:
            self.close()
            raise
        self._thread = None if worker is None else FirstStage(worker, self._weights.options.threads)
        if self._thread is not None:
            weakref.finalize(self, self._thread.end)
        self.pool.bind(self)
        self._head_facts = [
            {name: self.fused.heads[name, at] for name, at in self._heads if at == layer} for layer in self.bounds
        ]
        self._since: dict[int, float] = {}
        self._until: dict[int, float] = {}
        self._sizes: dict[int, tuple[int, float]] = {}
        self._works: dict[int, Work] = {}

    # ---- what the engine knows of it

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.shares)

    @property
    def segments(self) -> int:
        """How many segments the boundaries cut the layers into."""
        return len(self.bounds) - 1

    def head(self, boundary: int, adapter: str | None = None) -> HeadFacts:
        """The head of an adapter's exit at a boundary; of the first adapter that has one there (None)."""
        heads = self._head_facts[boundary]
        return next(iter(heads.values())) if adapter is None else heads[adapter]

    # ---- stages

    def _start_any(self, number: int) -> None:
        """As :meth:`_start`; where one is refused, another one may join.

        Raises:
            UserError: none can.
        """
        while True:
            try:
                self._start(number)
            except (Refused, Closed, BadFrame) as error:
                if not self._launcher.others:
                    raise
                warnings.warn(f"{self.links[number].peer} was refused: {error}", stacklevel=2)
                self._hang_up(number)
            else:
                return

    def _start(self, number: int) -> None:
        """Take a stage that has these weights."""
        link = self.links[number] = self._launcher.start(number)
        link.trust()
        link.say(weights=asdict(self._weights))
        if heard(link, _LOAD).get("accepted") != self._weights.digest:
            raise refuse(link, f"{link.peer} has other weights than this head; give it the same model")

    def _cuts(self, stages: int) -> tuple[int, ...]:
        """Split the layers by what they take on each machine, measured one after the other."""
        L, options = self._model.config.num_hidden_layers, self._weights.options
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if options.tensor > 1:  # the parts of a layer are measured by nobody: by bytes
            config = self._model.config
            wide = 2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
            layer = float(config.hidden_size * (wide + 3 * config.intermediate_size))
            return self._balanced([Speed(layer=layer, head=float(config.hidden_size * config.vocab_size))] * stages)
        layer, head = seconds(self._model, self._weights)
        speeds = [Speed(layer=layer, head=head)]
        for number in range(1, stages):
            link = self.links[number]
            link.say(probe=asdict(self._weights))
            found = heard(link, _LOAD)
            try:
                speeds.append(Speed(layer=_positive(found.get("layer")), head=_positive(found.get("head"))))
                self._memory[number] = _positive(found.get("memory") or 1 << 62, 1 << 63, least=_LEAST_MEMORY)
            except BadFrame as error:
                raise refuse(link, f"{link.peer} says what makes no sense: {error}") from error
        cuts = self._balanced(speeds)
        for number, (start, stop) in enumerate(pairwise((0, *cuts, L))):
            self.seconds[number] = (stop - start) * speeds[number].layer
        return cuts

    def _balanced(self, speeds: Sequence[Speed]) -> tuple[int, ...]:
        """The cuts of the best split."""
        vocab = self._model.config.vocab_size
        exits = {layer: (head.config.candidates or vocab) / vocab for (_, layer), head in self._heads.items()}
        return cuts_of(speeds, self._model.config.num_hidden_layers, exits)

    def _job(self, number: int) -> Job:
        share = self.shares[number]
        exits = [(name, head.config) for (name, layer), head in self._heads.items() if share.has_exit(layer)]
        return Job(
            weights=self._weights, number=number, stages=self.stages, share=share, blocks=self.pool.blocks,
            adapters=list(self._model.exit_sets()), exits=exits,
        )  # fmt: skip

    def _send_job(self, number: int) -> None:
        link, share = self.links[number], self.shares[number]
        link.say(job=self._job(number).to_json())
        heard(link, _LOAD)  # it has these weights
        for piece in pieces({key: head for key, head in self._heads.items() if share.has_exit(key[1])}):
            link.send(piece)

    def _make_pool(self) -> _Pool:
        """Blocks for all stages: as many as one process would have, or the smallest machine has room for."""
        w, config, share = self._weights, self._model.config, self.shares[0]

        def made(options: EngineConfig) -> _Pool:
            return _Pool(
                share.all_entries(config), heads=config.num_key_value_heads, head_dim=config.head_dim,
                dtype=cache_dtype(self._model, w.quant, w.compile, options), device=torch.device(w.device),
                context=config.max_position_embeddings, options=options, held=(),
            )  # fmt: skip

        found = made(w.options)
        if w.options.kv_bytes is None and self._memory:
            entries = len(share.all_entries(config))
            rooms = [m / 4 * entries / len(self.shares[number].entries) for number, m in self._memory.items()]
            if min(rooms) < found.bytes:
                return made(replace(w.options, kv_bytes=int(min(rooms))))
        return found

    def _load_first(self) -> Worker:
        w = self._weights
        fused = packed_model(self._model, w.quant, w.compile, w.options, self.shares[0], w.rounds)
        return Worker(Runner(fused, w.options, self.pool.blocks))

    def _whole(self, first: Mapping[str, Any]) -> Whole:
        return Whole(
            config=self._model.config, quant=first["quant"], dtype=getattr(torch, first["dtype"]),
            cache_dtype=getattr(torch, first["cache_dtype"]), kernels_name=self._kernels(first["kernels"]),
            note=first["note"], exact=first["exact"], adapters=list(self._model.exit_sets()),
            heads={key: HeadFacts.of(head) for key, head in self._heads.items()}, device=torch.device("cpu"),
        )  # fmt: skip

    def _kernels(self, name: str) -> str:
        tensor = self._weights.options.tensor
        return f"{name}, {self.stages} stage{'s' * (self.stages > 1)}" + f" of {tensor} ranks" * (tensor > 1)

    def _await_ready(self, number: int) -> None:
        """A stage has its layers, and computes as the first one does."""
        link, ready = self.links[number], self._ready(number)
        theirs, ours = str(ready.get("kernels", "")), self.fused.kernels_name
        if (theirs[:5], ready.get("quant")) != (ours[:5], self.fused.quant):  # native or torch
            raise refuse(
                link,
                f"{link.peer} runs by {theirs} with quant {ready.get('quant')}, but this head by "
                f"{ours} with {self.fused.quant}, so that texts would differ; give both the same",
            )

    def _ready(self, number: int) -> dict[str, Any]:
        """What a stage says when it has its layers."""
        link = self.links[number]
        ready = heard(link, _LOAD).get("ready")
        if not isinstance(ready, dict):
            raise refuse(link, f"{link.peer} does not say that it is ready")
        return ready

    def restart(self, number: int) -> None:
        """Replace a stage that is lost. Its keys are gone, and so are those of all passes under way.

        Raises:
            UserError: no other can be had.
        """
        self._hang_up(number)
        self._launcher.stop(number)
        try:
            self._start(number)
            self._send_job(number)
            self._await_ready(number)
        except (Closed, BadFrame, Refused) as error:
            self._hang_up(number)
            raise UserError(str(error)) from error

    def _hang_up(self, number: int) -> None:
        link = self.links.pop(number, None)
        if link is not None:
            link.close()
        self._asked.pop(number, None)

    def close(self) -> None:
        """End all stages."""
        self._closer()

    # ---- passes

    @property
    def free(self) -> list[int]:
        """Stages without a pass."""
        return [number for number in range(self.stages) if number not in self._asked]

    @property
    def busy(self) -> bool:
        """Whether a pass is under way."""
        return bool(self._asked)

    def left(self, number: int) -> float:
        """Seconds until a busy stage is done, by its passes so far."""
        rows, part = self._sizes[number]
        taken = (self.seconds[number] + self.row_seconds[number] * (rows - 1)) * part
        return max(0.0, self._since[number] + taken - time.monotonic())

    def submit(self, number: int, work: Work) -> int:
        """Let a stage run a pass; its number.

        Raises:
            StageLost: it can't be reached.
        """
        self._number += 1
        work = replace(work, number=self._number)
        now, expected = time.monotonic(), self.seconds[number] * work.batch.count
        self._asked[number], self._since[number] = work.number, now
        share = self.shares[number]
        layers = self.bounds[work.last] - self.bounds[work.first]
        self._sizes[number], self._works[number] = (work.batch.count, layers / len(share.layers)), work
        here = number == 0 and self._thread is not None
        self._until[number] = math.inf if here else now + max(self._timeout, _SLOWER * expected)
        if number == 0 and self._thread is not None:
            self._thread.submit(work)
            return work.number
        try:
            self.links[number].send(of_work(work, self.fused.adapters), self._timeout)
        except (Closed, KeyError) as error:
            raise self._lost(number, str(error)) from error
        return work.number

    def clear(self, group: int, blocks: Sequence[int]) -> None:
        """Let all stages overwrite blocks; one that is gone has nothing to overwrite."""
        if self._thread is not None:
            self._thread.order((group, blocks))
        for number, link in self.links.items():
            try:
                link.send(Frame(Kind.CLEAR, [group, *blocks]), self._timeout)
            except Closed:
                self._until[number] = 0.0  # it is found to be gone when it is waited for

    def wait(self) -> list[Brought]:
        """What passes have brought, at least one if one is under way.

        Raises:
            StageLost: a stage is gone.
            Exception: what broke a pass off.
        """
        found: list[Brought] = []
        if self._thread is not None:
            if self._thread.has_nothing:  # what it did was lost with an interrupt
                self._asked.pop(0, None)
            try:
                alone = self._thread.start(here=len(self._asked) == 1)
            except BaseException:
                self._asked.pop(0, None)
                raise
            if alone is not None:
                return [self._told(0, alone)]
        while self._asked and not found:
            now, late = time.monotonic(), min(self._until[number] for number in self._asked)
            ends = {link.fileno(): number for number, link in self.links.items()}
            if self._thread is not None:
                ends[self._thread.fileno()] = 0
            left = None if late == math.inf else max(0.0, late - now)
            woken = ready(list(ends), [], left)
            for number in sorted(ends[end] for end in woken):
                found += self._take(number)
            if not woken:
                number = min(self._asked, key=lambda one: self._until[one])
                raise self._lost(number, f"{self.links[number].peer} did not answer in time")
        return found

    def _told(self, number: int, brought: Brought) -> Brought:
        """A stage has done its pass."""
        if self._asked.get(number) != brought.number:
            raise BadFrame("an answer came to a pass that nobody asked for")
        if number in self.links:
            self._check(number, brought)
        del self._asked[number]
        self.computed[number] += brought.seconds
        rows, part = self._sizes.pop(number)
        seconds, one = brought.seconds / part, self.seconds[number]
        if rows == 1 or not one:
            self.seconds[number] = _mean(one, seconds / rows)
        else:
            self.row_seconds[number] = _mean(self.row_seconds[number], max(0.0, seconds - one) / (rows - 1))
        return brought

    def _check(self, number: int, brought: Brought) -> None:
        """Whether a stage answers what it was asked. Raises :class:`BadFrame`."""
        work, share, config = self._works[number], self.shares[number], self.fused.config
        heads = self._head_facts[work.last] if work.last < self.segments else {}
        widths = {name: len(h.candidate_list or ()) or config.vocab_size for name, h in heads.items()}
        leaves = work.last == share.last and not share.ends
        check_answer(work, brought, widths, config.vocab_size, config.hidden_size if leaves else None)

    def tend(self) -> None:
        """Look whether a stage has ended while it had nothing to do. Raises :class:`StageLost`."""
        for number in list(self.links):
            if number not in self._asked and ready([self.links[number].fileno()], [], 0.0):
                self._take(number)

    def _take(self, number: int) -> list[Brought]:
        found: list[Brought] = []
        try:
            while True:
                if number == 0 and self._thread is not None:
                    done = self._thread.poll()
                    if isinstance(done, Exception):
                        self._asked.pop(0, None)
                        raise done
                    if done is None:
                        return found
                    brought = done
                else:
                    frame = self.links[number].poll()
                    if frame is None:
                        return found
                    if frame.kind == Kind.FAILED:
                        self._asked.pop(number, None)
                        raise RuntimeError(f"{self.links[number].peer}: {words_of(frame).get('error')}")
                    if frame.kind != Kind.DONE:
                        raise BadFrame("something else came than what a pass brought")
                    brought = to_brought(frame, self.fused.adapters)
                found.append(self._told(number, brought))
        except (Closed, BadFrame) as error:
            if number not in self.links:  # of this process: a defect
                raise
            raise self._lost(number, str(error)) from error

    def _lost(self, number: int, reason: str) -> StageLost:
        self._hang_up(number)
        return StageLost(number, reason)


def _mean(before: float, now: float) -> float:
    """A running mean, of which nothing is known at first."""
    return 0.7 * before + 0.3 * now if before else now


def _positive(value: Any, most: float = 3600.0, least: float = 1e-9) -> float:
    """A number that a stage says."""
    if isinstance(value, int | float) and least <= value <= most:
        return float(value)
    raise BadFrame(f"{value!r}, where a number from {least:g} to {most:g} has to be")


def _close(launcher: Launcher, links: Mapping[int, Link]) -> None:
    for link in links.values():
        link.close()
    launcher.close()
