"""Pipelined decoding without a model: rows are numbers, passes take the times of a table, exits fire by chance.

What ``exitlm schedule --decode`` draws, and what ``benchmarks/scheduling.py`` and the tests measure. The simulator does
to the policy of stages what the engine does. Like it, it keeps all state in the head: a pass is a request to a stage
and a reply, and each of them takes the latency of a message, except to the first stage, which the head runs itself.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exitlm.decode.pricing.costs import Costs
from exitlm.decode.pricing.scheduler import Limits, Member, Pass
from exitlm.decode.pricing.stages import StageView, Waiting, next_stage_pass

_DEPTH_WEIGHT = 0.01


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one sequence in a pass: positions ``start`` to ``start + rows``.

    fills: how many of them, the oldest, have their tokens already. fired: whether an exit at the pass's end fired for
    the newest. token: whether the newest got its token at the last layer.
    """

    key: int
    start: int
    rows: int
    fills: int
    prompt: bool = False
    fired: bool = False
    token: bool = False


@dataclass(frozen=True, kw_only=True)
class Work:
    """A pass as a stage computed it, from ``begin`` to ``end``."""

    stage: int
    begin: float
    end: float
    first: int
    last: int
    parts: tuple[Part, ...]


@dataclass(kw_only=True)
class Run:
    """Neighbouring rows of a sequence at one boundary, or on their way from it."""

    layer: int
    start: int
    rows: int
    since: float = 0.0
    flying: bool = False


@dataclass(kw_only=True)
class Simulated:
    """One sequence: its mode, how long it is, and for each exit's layer the chance that it fires (``firing``) and that
    its draft is right (``right``, of ``lossless``)."""

    key: int
    mode: str = "threshold"
    length: float = math.inf
    firing: Mapping[int, float] = field(default_factory=dict)
    right: Mapping[int, float] = field(default_factory=dict)
    prompt: int = 0
    arrival: float = 0.0
    max_pending: int = 64
    max_draft: int = 15

    def __post_init__(self) -> None:
        self.runs: list[Run] = []  # oldest, so deepest, first
        self.left = self.prompt  # rows of the prompt that have not entered layer 0
        self.prefill = self.prompt > 0
        self.position = 0  # of the next row to enter
        self.ready = not self.prefill  # whether that row's token is known
        self.since = self.arrival
        self.ahead: tuple[int, ...] = ()  # exits that the newest row has not passed
        self.drafts: list[tuple[float, bool]] = []  # (chance, whether right) of each token behind the first row's
        self.epoch = 0
        self.emitted: list[float] = []  # when each token was sure

    @property
    def pending(self) -> int:
        """Rows between layer 0 and the end."""
        return sum(run.rows for run in self.runs)

    @property
    def pressed(self) -> bool:
        """Whether no further row may start before some have reached the end."""
        return self.pending >= self.max_pending

    def waiting(self) -> list[Waiting]:
        """All rows that wait, as the policy takes them."""
        if len(self.emitted) >= self.length:
            return []
        verifies = self.mode == "lossless" and not self.prefill
        worth = [1.0]
        if verifies:
            worth = list(itertools.accumulate((chance for chance, _ in self.drafts), operator.mul, initial=1.0))
        exits = tuple(sorted(self.firing)) if self.mode != "full" and not self.prefill else ()
        found, row = [], 0
        for run in self.runs:
            newest = run is self.runs[-1] and not self.ready
            if not run.flying:
                kind = "draft" if self.mode == "lossless" else "must" if newest else "fill"
                found.append(
                    Waiting(
                        key=self.key, layer=run.layer, rows=run.rows, kind="prompt" if self.prefill else kind,
                        exits=self.ahead if newest else (), worth=worth[row],
                        pressed=self.pressed and not self.prefill, since=run.since,
                    )
                )  # fmt: skip
            row += run.rows if verifies else 0
        if self.left:
            found.append(Waiting(key=self.key, layer=0, rows=self.left, kind="prompt", since=self.since))
        elif self.ready and not self.pressed and len(self.drafts) < self.max_draft + (row == 0):
            found.append(
                Waiting(key=self.key, layer=0, rows=1, kind="start", exits=exits, worth=worth[row], since=self.since)
            )
        return found

    def depart(self, member: Member, first: int) -> tuple[Run, int]:
        """Send off rows from boundary ``first``; returns them, and how many of them have their tokens."""
        if first == 0:
            run = Run(layer=0, start=self.position, rows=member.rows, flying=True)
            self.position += member.rows
            self.runs.append(run)
            if self.prefill:
                self.left -= member.rows
                return run, 0
            assert self.ready
            self.ready, self.ahead = False, tuple(sorted(self.firing)) if self.mode != "full" else ()
            return run, 0
        index = next(i for i, run in enumerate(self.runs) if run.layer == first and not run.flying)
        run = self.runs[index]
        assert 1 <= member.rows <= run.rows
        if member.rows < run.rows:
            rest = Run(layer=first, start=run.start + member.rows, rows=run.rows - member.rows, since=run.since)
            self.runs.insert(index + 1, rest)
            run.rows = member.rows
        run.flying = True
        newest = run is self.runs[-1] and not self.ready
        return run, 0 if self.prefill or self.mode == "lossless" else run.rows - newest

    def land(self, run: Run, found: Pass, member: Member, clock: float, rng: random.Random) -> bool:
        """Rows arrive at a pass's last boundary; whether an exit fired there for the newest."""
        index = next(i for i, one in enumerate(self.runs) if one is run)
        assert index == 0 or self.runs[index - 1].layer >= found.last, "rows would overtake older ones"
        run.layer, run.since, run.flying = found.last, clock, False
        fired = False
        if member.tested:
            assert run is self.runs[-1]
            assert self.ahead[0] == found.last
            self.ahead = self.ahead[1:]
            fired = rng.random() < self.firing[found.last]
            if fired:
                self._next_row(clock)
                if self.mode == "lossless":
                    chance = self.right[found.last]
                    self.drafts.append((chance, rng.random() < chance))
                else:
                    self.emitted.append(clock)
        assert not self.ahead or run is not self.runs[-1] or self.ready or self.ahead[0] > found.last, "a missed test"
        older = self.runs[index - 1] if index else None
        if older is not None and older.layer == run.layer and not older.flying:
            older.rows += run.rows
            del self.runs[index]
        return fired

    def arrive(self, end: int, clock: float) -> bool:
        """What the last layer, ``end``, gave to the rows that have come there; whether the newest row got its token."""
        if not self.runs or self.runs[0].layer != end:
            return False
        run = self.runs.pop(0)
        newest = not self.runs and not self.ready
        if self.prefill:
            self.prefill = bool(self.runs or self.left)
            if self.prefill:
                return False
        elif self.mode == "lossless":
            return self._verify(run.rows, clock)
        elif not newest:
            return False
        self.emitted.append(clock)
        self._next_row(clock)
        return True

    def _verify(self, rows: int, clock: float) -> bool:
        """The final tokens behind ``rows`` rows: drafts are right, or what follows the first wrong one is dropped."""
        for _ in range(rows):
            self.emitted.append(clock)
            if not self.drafts:
                self._next_row(clock)
                return True
            _, right = self.drafts.pop(0)
            if not right:
                self.position -= self.pending
                self.runs, self.drafts = [], []
                self.epoch += 1
                self._next_row(clock)
                return True
        return False

    def _next_row(self, clock: float) -> None:
        self.ready, self.since = True, clock


@dataclass(kw_only=True)
class _Flight:
    """A pass that was sent to a stage."""

    stage: int
    found: Pass
    rows: list[tuple[Simulated, int, Run, Member, int]]
    begin: float
    end: float
    back: float


Policy = Callable[[StageView, Limits], Pass | None]


@dataclass(kw_only=True)
class Pipeline:
    """Runs sequences over stages. ``cuts`` are the boundaries 0, ... , L between which the stages lie; ``costs`` tells
    seconds of passes, ``message`` those of a request or reply; ``queue``: passes that may be at a stage at once.
    ``jitter``: pass times are off by up to this share, which the policy doesn't foresee."""

    cuts: Sequence[int]
    costs: Costs
    message: float = 0.0
    limits: Limits = field(default_factory=lambda: Limits(max_rows=4096))
    seed: int = 0
    jitter: float = 0.0
    queue: int = 1
    gather: float = 0.0
    policy: Policy = next_stage_pass
    keep: bool = False  # the work, to be drawn

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.clock = 0.0
        self.stages = len(self.cuts) - 1
        self.busy = [0.0] * self.stages
        self.work: list[Work] = []
        self.tokens = self.passes = self.rows = 0
        self.depth = float(self.stages)
        self._idle: list[float | None] = [None] * self.stages
        self._flights: list[list[_Flight]] = [[] for _ in range(self.stages)]
        self._here: list[dict[int, list[Waiting]]] = [{} for _ in range(self.stages)]
        self._back: list[tuple[float, int, _Flight]] = []
        self._places: dict[int, set[int]] = {}  # the stages at which each sequence's rows wait
        self._stage_of = [bisect.bisect_right(self.cuts, layer) - 1 for layer in range(self.cuts[-1])]
        self._decoding: set[int] = set()
        self._number = itertools.count()

    def run(self, sequences: Sequence[Simulated], tokens: float = math.inf) -> None:
        """Until all have ended, or further ``tokens`` were emitted; may be called again to go on."""
        goal = self.tokens + tokens
        coming = sorted((one for one in sequences if one.arrival > self.clock), key=lambda one: one.arrival)
        for one in sequences:
            if one.arrival <= self.clock:
                self._look(one)
        by_key = {one.key: one for one in sequences}
        while self.tokens < goal:
            self._submit(by_key)
            while coming and (not self._back or coming[0].arrival <= self._back[0][0]):
                self.clock = max(self.clock, coming[0].arrival)
                self._look(coming.pop(0))
                self._submit(by_key)
            if not self._back:
                assert not any(self._here), "rows wait, but no stage runs"
                return
            self._complete(heapq.heappop(self._back)[2])

    def _look(self, one: Simulated) -> None:
        """Note where the rows of a sequence wait."""
        if one.prefill or len(one.emitted) >= one.length:
            self._decoding.discard(one.key)
        else:
            self._decoding.add(one.key)
        for stage in self._places.pop(one.key, ()):
            del self._here[stage][one.key]
        for waiting in one.waiting():
            stage = self._stage_of[waiting.layer]
            self._here[stage].setdefault(one.key, []).append(waiting)
            self._places.setdefault(one.key, set()).add(stage)

    def _submit(self, by_key: Mapping[int, Simulated]) -> None:
        """Give work to each stage that takes some."""
        moved = True
        while moved:
            moved = False
            for stage in range(self.stages):
                if len(self._flights[stage]) >= (self.queue if stage else 1) or not self._here[stage]:
                    continue
                found = self.policy(self._view(stage, len(self._decoding)), self.limits)
                if found is not None:
                    self._send(stage, found, by_key)
                    self._idle[stage] = None
                    moved = True
                elif self._idle[stage] is None and any(one.goes for rows in self._here[stage].values() for one in rows):
                    self._idle[stage] = self.clock

    def _seconds(self, first: int, last: int, rows: int) -> float:
        return self.costs.span(first, last, rows)

    def _view(self, stage: int, decoding: int) -> StageView:
        first, last = self.cuts[stage], self.cuts[stage + 1]
        short = {  # their younger rows would overtake the older ones, which stop on the way
            one.key for flight in self._flights[stage] if flight.found.last < last for one, *_ in flight.rows
        }
        here = {key: rows for key, rows in self._here[stage].items() if key not in short}
        one = self._seconds(first, last, 1)
        typical = max(1, decoding // self.stages)
        row = self._seconds(first, last, typical + 1) - self._seconds(first, last, typical)
        return StageView(
            first=first, last=last, waiting=tuple(itertools.chain.from_iterable(here[key] for key in sorted(here))),
            seconds=one + (2 * self.message if stage else 0.0), row=row, coming=self._coming(stage),
            stages=self.stages, sequences=decoding, depth=self.depth, gather=self.gather,
            idle=0.0 if (since := self._idle[stage]) is None else self.clock - since,
        )  # fmt: skip

    def _coming(self, stage: int) -> float:
        """Seconds until rows may arrive: from the stage before, or for the first stage a token from any other."""
        if stage == 0:
            flights = [
                flight
                for later in self._flights[1:]
                for flight in later
                if flight.found.last == self.cuts[-1] or any(member.tested for member in flight.found.members)
            ]
        else:
            flights = self._flights[stage - 1]
        found = math.inf
        for flight in flights:
            more = 0.0
            if stage and flight.found.last < self.cuts[stage]:  # it ends within the stage before: another has to follow
                more = self._seconds(flight.found.last, self.cuts[stage], 1)
            found = min(found, max(0.0, flight.back - self.clock) + more)
        return found

    def _send(self, stage: int, found: Pass, by_key: Mapping[int, Simulated]) -> None:
        seconds = self._seconds(found.first, found.last, found.rows)
        seconds *= 1.0 + self.jitter * (2.0 * self.rng.random() - 1.0) if self.jitter else 1.0
        message = self.message if stage else 0.0
        begin = max([self.clock + message, *(flight.end for flight in self._flights[stage])])
        rows = []
        for member in found.members:
            one = by_key[member.key]
            run, fills = one.depart(member, found.first)
            rows.append((one, one.epoch, run, member, fills))
            self._look(one)
        end = begin + seconds
        flight = _Flight(stage=stage, found=found, rows=rows, begin=begin, end=end, back=end + message)
        self._flights[stage].append(flight)
        heapq.heappush(self._back, (flight.back, next(self._number), flight))
        self.busy[stage] += seconds
        self.passes += 1
        self.rows += found.rows

    def _complete(self, flight: _Flight) -> None:
        self.clock = flight.back
        self._flights[flight.stage].remove(flight)
        parts = []
        for one, epoch, run, member, fills in flight.rows:
            start, rows, prompt = run.start, run.rows, one.prefill
            fired = token = False
            if epoch == one.epoch and len(one.emitted) < one.length:
                before = len(one.emitted)
                fired = one.land(run, flight.found, member, self.clock, self.rng)
                token = one.arrive(self.cuts[-1], self.clock)
                self.tokens += len(one.emitted) - before
                if fired or token:
                    self.depth += _DEPTH_WEIGHT * (flight.stage + 1 - self.depth)
                self._look(one)
            parts.append(
                Part(key=one.key, start=start, rows=rows, fills=fills, prompt=prompt, fired=fired, token=token)
            )
        if self.keep:
            found = flight.found
            self.work.append(
                Work(
                    stage=flight.stage, begin=flight.begin, end=flight.end, first=found.first, last=found.last,
                    parts=tuple(parts),
                )
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Steady:
    """What a pipeline did while sequences without end ran: tokens per second in all (``rate``), the share of the time
    that each stage computed (``busy``), rows of a pass on average, and seconds between two tokens of one sequence:
    on average, and which 99 of 100 don't exceed."""

    sequences: int
    rate: float
    busy: tuple[float, ...]
    rows: float
    latency: float
    tail: float

    def speed(self, costs: Costs) -> float:
        """Tokens per second relative to one process that decodes as many sequences plainly."""
        return self.rate * costs.full(self.sequences) / self.sequences


def pipeline(stages: int, costs: Costs, *, layers: int | None = None, **options: Any) -> Pipeline:
    """A pipeline whose stages have equally many of the layers (by default all that ``costs`` knows)."""
    layers = layers or costs.num_hidden_layers
    return Pipeline(cuts=[layers * stage // stages for stage in range(stages + 1)], costs=costs, **options)


def expected_depth(firing: Mapping[int, float], layers: int) -> float:
    """The share of the layers that a token passes until it is known, on average. One over it is the speed of a single
    sequence in ``threshold``, where messages and rows cost nothing: 1 / (f + (1 - f)(1 - q)) for one exit."""
    depth, left, before = 0.0, 1.0, 0
    for layer in sorted(firing):
        depth += left * (layer - before)
        left, before = left * (1.0 - firing[layer]), layer
    return (depth + left * (layers - before)) / layers


def steady(
    found: Pipeline,
    sequences: int,
    mode: str,
    firing: Mapping[int, float],
    right: Mapping[int, float] | None = None,
    *,
    tokens: int,
) -> Steady:
    """Run sequences without end through an idle pipeline: half of ``tokens`` unseen, then as many measured."""
    ones = [Simulated(key=key, mode=mode, firing=firing, right=right or {}) for key in range(sequences)]
    found.run(ones, tokens // 2)
    clock, done, rows, passes, busy = found.clock, found.tokens, found.rows, found.passes, list(found.busy)
    before = [len(one.emitted) for one in ones]
    found.run(ones, tokens - tokens // 2)
    seconds = found.clock - clock
    gaps = sorted(
        late - soon
        for one, count in zip(ones, before, strict=True)
        for soon, late in itertools.pairwise(one.emitted[max(0, count - 1) :])
    )
    return Steady(
        sequences=sequences, rate=(found.tokens - done) / seconds,
        busy=tuple((now - then) / seconds for now, then in zip(found.busy, busy, strict=True)),
        rows=(found.rows - rows) / (found.passes - passes), latency=sequences * seconds / (found.tokens - done),
        tail=gaps[int(0.99 * len(gaps))] if gaps else math.nan,
    )  # fmt: skip
