"""An engine without a model: rows are numbers, passes take the times of a table, exits fire and drafts are right by
chance.

Not a test: ``test_scheduler.py`` and ``benchmarks/scheduling.py`` import it. It does to the scheduler's views what the
engine does, and keeps the invariants of rows (a row passes the boundaries in order, none overtakes an older one).
"""

from __future__ import annotations

import itertools
import math
import operator
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from exitlm.decode.pricing.acceptance import Acceptance, AcceptanceTable
from exitlm.decode.pricing.costs import Costs
from exitlm.decode.pricing.scheduler import Exit, Limits, Member, Pass, Rate, SequenceView, next_pass

LAYERS = 4


def cost_table(
    times: Mapping[int, float], layers: int = LAYERS, head: float = 0.0, test: float = 0.0, flat_head: bool = False
) -> Costs:
    """A table in which a full pass without the head takes ``times``. ``head`` and ``test`` are shares of such a pass of
    one row; the head grows with rows as layers do."""
    rows, one = tuple(times), times[1]
    return Costs(
        rows=rows, layer=(tuple(t / layers for t in times.values()),),
        head=tuple(head * one if flat_head else head * t for t in times.values()),
        test=dict.fromkeys(range(1, layers), test), draft=dict.fromkeys(range(1, layers), test),
        num_hidden_layers=layers,
    )  # fmt: skip


CPU = {1: 1.0, 2: 1.13, 4: 1.34, 8: 2.0, 16: 3.5}
GPU = {1: 1.0, 200: 1.0, 400: 2.0}
DEAR = {1: 1.0, 2: 2.0}
TABLES = {"cpu": cost_table(CPU), "gpu": cost_table(GPU), "dear": cost_table(DEAR)}


@dataclass(kw_only=True)
class Simulated:
    """One sequence. ``firing`` and ``right`` give the chances at each of its exits."""

    key: int
    mode: str
    length: int
    firing: Mapping[int, float] = field(default_factory=dict)
    right: Mapping[int, float] = field(default_factory=dict)
    prompt: int = 0
    arrival: float = 0.0
    prior: float = 0.5
    max_pending: int = 64
    max_draft: int = 15
    known: bool = False  # the estimates are the chances themselves
    copied: tuple[float, int, float] = (0.0, 0, 0.0)  # chance that a draft is looked up, its tokens, each one's chance

    def __post_init__(self) -> None:
        self.rows: list[int] = []  # the boundary at which each row waits, oldest first
        self.moving = 0
        self.drafts: list[
            tuple[Hashable, float, bool]
        ] = []  # (source, estimate, right): all that are not verified, in order
        self.ready = int(self.prompt == 0)  # rows that have not entered layer 0
        self.left = self.prompt
        self.prefill = self.prompt > 0
        self.emitted = 0
        self.drafted = 0
        self.waited = self.shallow_wait = 0.0
        self.finished: float | None = None
        self.sources = {source: Acceptance(prior=self.prior) for source in (*self.firing, "copied")}

    def odds(self, layer: int, table: AcceptanceTable) -> tuple[float, float]:
        """Chances to plan with: (firing, acceptance)."""
        if self.mode == "threshold" or self.known:
            return self.firing[layer], self.right.get(layer, 1.0)
        return table.inform(layer, self.sources[layer]).odds(self.emitted, len(self.drafts))

    def chain(self) -> list[float]:
        """The worth of each row in play: the product of the acceptances before it."""
        return list(itertools.accumulate((estimate for _, estimate, _ in self.drafts), operator.mul, initial=1.0))

    def view(self, table: AcceptanceTable) -> SequenceView:
        """What the scheduler sees."""
        chain = self.chain()
        lossless = self.mode == "lossless" and not self.prefill
        ready: tuple[float, ...] = ()
        if self.ready:
            ready = tuple(chain[len(self.rows) :]) if lossless else (1.0,)
        room = len(self.drafts) < self.max_draft
        exits = [Exit(layer=e, firing=f, acceptance=a) for e in sorted(self.firing) for f, a in [self.odds(e, table)]]
        waiting: dict[int, int] = {}
        for layer in self.rows:
            waiting[layer] = waiting.get(layer, 0) + 1
        return SequenceView(
            key=self.key, mode=self.mode, ready=ready, prefill=self.prefill, prompt=self.left,
            waiting=tuple(waiting.items()), moving=self.moving,
            worth=tuple(chain[self.moving : len(self.rows)]) if lossless else (),
            exits=tuple(exits) if room and not self.prefill and self.mode != "full" else (), waited=self.waited,
        )  # fmt: skip


@dataclass
class Simulation:
    """Runs sequences to their ends. ``device`` takes the time of passes, ``costs`` is what the scheduler believes."""

    costs: Costs
    limits: Limits = field(default_factory=Limits)
    device: Costs | None = None
    seed: int = 0
    plan: Callable[[Sequence[SequenceView], Costs, Rate, Limits], Pass | None] = next_pass
    refresh: bool = False
    stored: Mapping[Hashable, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.clock = self.busy = self.decode_seconds = 0.0
        self.rate = Rate()
        self.table = AcceptanceTable(stored=self.stored)
        self.tokens = 0
        self.max_wait = 0.0
        self.passes = self.arrived = 0
        self.plain_seconds = 0.0

    def run(self, sequences: Sequence[Simulated], max_tokens: int = 10**9) -> None:
        """Until all have ended, or ``max_tokens`` were emitted."""
        todo = sorted(sequences, key=lambda one: (one.arrival, one.key))
        while self.tokens < max_tokens:
            present = [one for one in todo if one.arrival <= self.clock and one.finished is None]
            if not present:
                coming = [one.arrival for one in todo if one.finished is None]
                if not coming:
                    return
                self.clock = min(coming)
                continue
            views = [one.view(self.table) for one in present]
            found = self.plan(views, self.costs, self.rate, self.limits)
            assert found is not None, "rows but no pass"
            self.execute(present, views, found)

    def execute(self, present: Sequence[Simulated], views: Sequence[SequenceView], found: Pass) -> None:
        """One pass."""
        by_key = {one.key: one for one in present}
        device = self.device or self.costs
        end = device.num_hidden_layers
        decoding = [one for one in present if not one.prefill]
        B = max(1, len(decoding))
        full = self.costs.full(B)
        rows = sum(member.rows for member in found.members)
        heads = self.final_rows(found, by_key) if found.last == end else 0
        tested = sum(member.tested for member in found.members)

        def seconds_by(costs: Costs, count: int) -> float:
            time = costs.span(found.first, found.last, count) + costs.final(heads)
            return time + (costs.tests(found.last, tested) if tested else 0.0)

        seconds = seconds_by(device, rows)
        decode_rows = sum(member.rows for member in found.members if not by_key[member.key].prefill)
        self.clock += seconds
        self.busy += seconds
        self.passes += 1
        members = {member.key: member for member in found.members}
        for one, view in zip(present, views, strict=True):
            if one.key in members:
                one.waited = one.shallow_wait = 0.0
            elif view.must_go_deep:
                one.waited += seconds
                if found.first == 0:
                    one.shallow_wait += seconds
                    self.max_wait = max(self.max_wait, one.shallow_wait / device.full(B))
        emitted, expected = 0, 0.0
        for member in found.members:
            one = by_key[member.key]
            was_prefill = one.prefill
            before, chain = one.emitted, one.chain()
            self.move(one, member, found, end)
            if not was_prefill:
                emitted += one.emitted - before
                arrived = one.mode == "lossless" and found.last == end
                expected += sum(chain[: self.arrived]) if arrived else one.emitted - before
            if one.emitted >= one.length and one.finished is None:
                one.finished = self.clock
        self.tokens += emitted
        if decode_rows:
            predicted = seconds_by(self.costs, decode_rows)
            measured = seconds * predicted / seconds_by(self.costs, rows)
            self.decode_seconds += measured
            self.plain_seconds += emitted * device.full(B) / B
            self.rate = self.rate.observed(
                expected=expected / B, done=emitted / B, predicted=predicted / full, measured=measured / full
            )
            if self.refresh:
                self.costs = self.costs.observed(seconds_by(self.costs, rows), seconds, rows)

    def final_rows(self, found: Pass, by_key: Mapping[int, Simulated]) -> int:
        """Rows whose final logits are needed."""
        total = 0
        for member in found.members:
            one = by_key[member.key]
            if one.mode == "lossless" and not one.prefill:
                total += member.rows
            elif found.first == 0:
                total += 1 if not one.prefill or member.rows == one.left else 0
            elif one.moving and not one.ready:
                total += 1
        return total

    def move(self, one: Simulated, member: Member, found: Pass, end: int) -> None:
        """Take a member's rows to the pass's last boundary, and do what happens there."""
        first, last = found.first, found.last
        if first == 0:
            assert not one.rows or one.rows[-1] >= last
            if one.prefill:
                assert member.rows <= one.left
                one.left -= member.rows
                one.moving += member.rows
            else:
                assert 1 <= member.rows <= one.ready
                one.ready = 0
                del one.drafts[max(0, len(one.rows) + member.rows - 1) :]  # copied ones that were not taken
                if one.mode != "lossless" and not (member.tested and one.mode == "threshold"):
                    one.moving = len(one.rows) + 1
            one.rows += [last] * member.rows
        else:
            at = one.rows.index(first)
            assert one.rows[at : at + member.rows] == [first] * member.rows
            assert at == 0 or one.rows[at - 1] >= last, "rows would overtake older ones"
            one.rows[at : at + member.rows] = [last] * member.rows
            if one.moving or one.mode == "lossless":
                one.moving = max(one.moving, at + member.rows)
        if member.tested:
            assert one.rows[-1] == last
            assert one.ready == 0
            self.test(one, last)
        if last == end:
            self.arrive(one, end)

    def test(self, one: Simulated, layer: int) -> None:
        """The newest row at an exit."""
        fired = self.rng.random() < one.firing[layer]
        if one.mode == "lossless":
            source = one.sources[layer]
            if fired:
                one.drafts.append((layer, one.odds(layer, self.table)[1], self.rng.random() < one.right[layer]))
                one.drafted += 1
                one.ready, one.moving = 1, 0
            one.sources[layer] = source.after_test(one.emitted, fired)
        elif fired:
            one.emitted += 1
            one.ready = 1
            one.moving = len(one.rows) if len(one.rows) >= one.max_pending else 0
        else:
            one.moving = len(one.rows)

    def next_token(self, one: Simulated) -> None:
        """A certain token is ready, perhaps with a copied draft behind it."""
        one.ready = 1
        found, length, right = one.copied
        if one.mode == "lossless" and self.rng.random() < found:
            source = self.table.inform("copied", one.sources["copied"])
            for i in range(length):
                estimate = right if one.known else source.odds(one.emitted, i)[1]
                one.drafts.append(("copied", estimate, self.rng.random() < right))
            one.ready += length

    def arrive(self, one: Simulated, end: int) -> None:
        """Rows that have passed all layers."""
        count = self.arrived = sum(layer == end for layer in one.rows)
        assert one.rows[:count] == [end] * count
        everything = count == len(one.rows)
        if one.prefill:
            del one.rows[:count]
            one.moving -= count
            if one.left == 0 and not one.rows:
                one.prefill = False
                one.emitted += 1
                self.next_token(one)
            return
        if one.mode != "lossless":
            del one.rows[:count]
            one.moving = max(0, one.moving - count)
            if everything and not one.ready:
                one.emitted += 1
                one.ready = 1
            return
        for i in range(count):
            one.emitted += 1
            if i < len(one.drafts):
                layer, _, right = one.drafts[i]
                one.sources[layer] = one.sources[layer].after_drafts(one.emitted, 1, int(right))
                self.table = self.table.observed(layer, 1, int(right))
                if not right:
                    one.rows, one.drafts, one.moving = [], [], 0
                    self.next_token(one)
                    return
        del one.rows[:count]
        del one.drafts[:count]
        one.moving = max(0, one.moving - count)
        if not one.rows:
            one.drafts = []
            self.next_token(one)
        assert len(one.drafts) >= len(one.rows) - 1, "a row without a token"


def gain(tau: float, seconds: float, costs: Costs, sequences: int) -> float:
    """Speed relative to plain decoding of rounds that emit ``tau`` tokens a sequence in ``seconds``."""
    return tau * costs.full(sequences) / seconds


def predicted(costs: Costs, sequences: int, k: int, firing: float, acceptance: float = 1.0, layer: int = 1) -> float:
    """S(B, k) of the design: at most ``k`` shallow steps, then a deep pass over all that is pending."""
    B = sequences
    tau = sum((firing * acceptance) ** i for i in range(k))
    seconds, rows = 0.0, 0.0
    for i in range(k):
        active = 1.0 if firing**i == 1.0 else -math.expm1(B * math.log1p(-(firing**i)))
        seconds += active * costs.span(0, layer, B * firing**i / active)
        rows += B * firing**i
    return gain(tau, seconds + costs.deep(layer, rows), costs, B)


def best_predicted(
    costs: Costs, sequences: int, firing: float, acceptance: float = 1.0, wait: float | None = None, layer: int = 1
) -> tuple[float, int]:
    """The largest S(B, k) and its k, of all that the wait bound allows (None: any)."""
    most = 40
    if wait is not None and sequences > 1:
        shallow = costs.span(0, layer, sequences)
        most = 1 + int(wait * costs.full(sequences) / shallow + 1e-9)
    return max((predicted(costs, sequences, k, firing, acceptance, layer), k) for k in range(1, most + 1))


def steady(
    costs: Costs,
    sequences: int,
    mode: str,
    firing: float,
    acceptance: float = 1.0,
    *,
    tokens: int,
    wait: float | None,
    seed: int = 0,
    layer: int = 1,
    **options: object,
) -> Simulation:
    """Sequences without end, all there from the start; see ``speed``."""
    limits = Limits(max_rows=4096, max_wait=float("inf") if wait is None else wait)
    run = Simulation(costs, limits, seed=seed)
    ones = [
        Simulated(key=i, mode=mode, length=10**9, firing={layer: firing}, right={layer: acceptance}, **options)
        for i in range(sequences)
    ]
    if mode == "threshold":  # pending rows are a debt: begin to count where as many are left as in the end
        run.run(ones, tokens // 2)
        run.plain_seconds = run.decode_seconds = 0.0
        tokens += run.tokens
    run.run(ones, tokens)
    return run


def speed(run: Simulation) -> float:
    """Tokens per second of decoding relative to plain decoding of the same sequences."""
    return run.plain_seconds / run.decode_seconds


def latencies(sequences: Sequence[Simulated]) -> float:
    """The seconds that the sequences took in all, from their arrivals to their ends."""
    return sum((one.finished or math.inf) - one.arrival for one in sequences)


def fixed_plan(k: int, layer: int = 1) -> Callable[[Sequence[SequenceView], Costs, Rate, Limits], Pass]:
    """The fixed policy of the design's formula for sequences in step with one exit: at most ``k`` shallow steps, then
    one deep pass over everything that is pending."""

    def plan(views: Sequence[SequenceView], costs: Costs, rate: Rate, limits: Limits) -> Pass:
        end = costs.num_hidden_layers
        pending = {view.key: sum(rows for _, rows in view.waiting) for view in views}
        starting = [view for view in views if view.ready and not view.moving and pending[view.key] < k]
        if starting:
            last = layer if k > 1 else end
            members = [
                Member(key=v.key, rows=1, tested=k > 1 and (v.mode == "threshold" or pending[v.key] < k - 1))
                for v in starting
            ]
            return Pass(first=0, last=last, members=tuple(members))
        return Pass(first=layer, last=end, members=tuple(Member(key=k, rows=n) for k, n in pending.items() if n))

    return plan


def best_fixed(
    costs: Costs, sequences: int, mode: str, firing: float, acceptance: float, tokens: int, most: int
) -> float:
    """The speed of the best fixed policy with at most ``most`` shallow steps, by trying them all."""
    found = []
    for k in range(1, most + 1):
        run = Simulation(costs, Limits(max_rows=4096), plan=fixed_plan(k))
        run.run(
            [
                Simulated(key=i, mode=mode, length=10**9, firing={1: firing}, right={1: acceptance}, known=True)
                for i in range(sequences)
            ],
            tokens,
        )
        found.append(speed(run))
    return max(found)
