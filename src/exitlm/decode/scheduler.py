"""Which rows run next: a pure function of plain data. It knows neither tensors nor tokens nor a clock.

Exits and drafts save weight reads, never FLOPs: a row that stops at a boundary is computed further in a later pass,
beside others. So each choice weighs tokens against seconds, and one number, the price of a second, makes them alike:
the tokens that plain decoding of the present sequences gives per second, times what was lately gained over it.

```
next_pass:
  nothing must go deep       -> start every sequence's next row, and a chunk of a prompt
  some next rows are worth more than the shallow pass they need, and no row waits too long for it -> start these
  otherwise                  -> the deep pass: rows that must go to the end, and drafts that are worth their row in it
```
Boundaries are named by their layer: 0 are the embeddings, ``costs.num_hidden_layers`` is the end.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace

from exitlm.decode.costs import Costs

_MEMORY = 24.0  # plain steps over which the gain is averaged
_WINDOW = 64.0  # plain steps that the guard compares
_PRIOR_STEPS = 2.0
_MIN_GAIN = 0.98
_LONGEST_PAUSE = 64 * 64.0
_EXACT_ROWS = 8  # up to so many rows, the number that will fire is taken as random, not as its mean
_ROUNDING = 1.0 + 1e-9


@dataclass(frozen=True, kw_only=True)
class Exit:
    """An exit that a sequence's newest row may be tested at: the chance that it fires, and that such a draft is
    accepted (1 in ``threshold``)."""

    layer: int
    firing: float = 1.0
    acceptance: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SequenceView:
    """What the scheduler sees of a sequence.

    ready: expected tokens of each row that has not entered layer 0, in order: 1 for the newest certain token, for a
        draft the product of the acceptances up to it. Empty while the newest row has not left (nothing fired yet).
    prompt: rows of the prompt that have not entered layer 0 (``prefill`` sequences have these instead of ``ready``).
    waiting: (layer, rows) of the rows that wait at boundaries, deepest (oldest) first.
    moving: how many of the waiting rows, the oldest ones, must go to the end.
    worth: ``lossless`` only: expected tokens of each waiting row behind the moving ones, in order; 1 if certain.
    exits: where the newest row may be tested, shallowest first.
    waited: seconds of the passes that ran without this sequence since its last one.
    """

    key: int
    mode: str
    ready: tuple[float, ...] = ()
    prefill: bool = False
    prompt: int = 0
    waiting: tuple[tuple[int, int], ...] = ()
    moving: int = 0
    worth: tuple[float, ...] = ()
    exits: tuple[Exit, ...] = ()
    context: int = 0
    waited: float = 0.0

    @property
    def is_drafting(self) -> bool:
        """Whether waiting rows are to be verified."""
        return self.mode == "lossless" and not self.prefill

    @property
    def must_go_deep(self) -> bool:
        """Whether rows wait for a deep pass: rows that move, or drafts."""
        return bool(self.waiting) and (self.moving > 0 or self.is_drafting)

    def at(self, layer: int) -> tuple[int, tuple[float, ...]]:
        """The moving rows that wait at ``layer``, and the worth of the others there that are drafts."""
        before = 0
        for where, rows in self.waiting:
            if where == layer:
                moving = min(max(self.moving - before, 0), rows)
                behind = max(before - self.moving, 0)
                return moving, self.worth[behind : behind + rows - moving] if self.is_drafting else ()
            before += rows
        return 0, ()


@dataclass(frozen=True, kw_only=True)
class Member:
    """The ``rows`` oldest rows that a sequence has at a pass's first boundary. ``tested``: whether its newest row is
    tested at the pass's last one."""

    key: int
    rows: int
    tested: bool = False


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Run the members' rows from boundary ``first`` to boundary ``last``."""

    first: int
    last: int
    members: tuple[Member, ...]

    @property
    def rows(self) -> int:
        """Rows of all members."""
        return sum(member.rows for member in self.members)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``max_rows`` of a pass, ``prefill_chunk`` of them of prompts; ``max_wait``: how long a row that must go deep may
    wait for shallow passes of others, as a share of a full pass of all sequences."""

    max_rows: int = 512
    prefill_chunk: int = 256
    max_wait: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What was lately gained over plain decoding, and the guard that stops drafting when it loses.

    Both are sums in steps of plain decoding: ``done`` of the tokens that were emitted, ``spent`` of the seconds they
    took, decayed.
    """

    done: float = _PRIOR_STEPS
    spent: float = _PRIOR_STEPS
    window_done: float = 0.0
    window_spent: float = 0.0
    paused: float = 0.0
    pause: float = _WINDOW

    @property
    def gain(self) -> float:
        """Tokens per second relative to plain decoding, at least 1."""
        return max(1.0, self.done / self.spent)

    @property
    def drafts(self) -> bool:
        """Whether ``lossless`` may draft now."""
        return self.paused <= 0.0

    def observed(self, *, expected: float, done: float, predicted: float, measured: float) -> Rate:
        """The record after a pass, all in steps of plain decoding: tokens per decoding sequence (``done``; ``expected``
        takes for verified rows what they were worth before) and seconds in full passes of all decoding sequences (by
        the clock; ``predicted`` by the table). The gain is of what was planned, since chance would only blur it; the
        guard looks at what came true."""
        keep = math.exp(-predicted / _MEMORY)
        after = replace(self, done=self.done * keep + expected, spent=self.spent * keep + predicted)
        if self.paused > 0.0:
            return replace(after, paused=self.paused - done, window_done=0.0, window_spent=0.0)
        window_done, window_spent = self.window_done + done, self.window_spent + measured
        if window_done < _WINDOW and window_spent < 2 * _WINDOW:
            return replace(after, window_done=window_done, window_spent=window_spent)
        if window_done < _MIN_GAIN * window_spent:
            longer = min(2 * self.pause, _LONGEST_PAUSE)
            return replace(after, paused=self.pause, pause=longer, window_done=0.0, window_spent=0.0)
        return replace(after, pause=_WINDOW, window_done=0.0, window_spent=0.0)


@dataclass(frozen=True)
class _Prices:
    """Seconds and what they are worth, for the sequences of one call."""

    costs: Costs
    second: float  # tokens that a second is worth
    context: float

    def span(self, first: int, last: int, rows: float) -> float:
        return self.costs.span(first, last, rows, self.context)

    def deep(self, after: int, rows: float) -> float:
        return self.costs.deep(after, rows, self.context)

    def tests(self, layer: int, rows: float) -> float:
        return self.costs.tests(layer, rows) if layer in self.costs.draft else 0.0

    def step(self, front: int, rows: float, deep_rows: float) -> float:
        """Tokens' worth of running ``rows`` new rows up to ``front`` by themselves, and later beside ``deep_rows``."""
        later = self.deep(front, deep_rows + rows) - self.deep(front, deep_rows)
        return self.second * (self.span(0, front, rows) + later)


def next_pass(sequences: Sequence[SequenceView], costs: Costs, rate: Rate, limits: Limits) -> Pass | None:
    """The next pass of these sequences, given in order of arrival; None if they have no rows."""
    decoding = [view for view in sequences if not view.prefill]
    context = sum(view.context for view in sequences) / max(1, len(sequences))
    full = costs.full(max(1, len(decoding)), context)
    prices = _Prices(costs, rate.gain * max(1, len(decoding)) / full, context)
    deep = [view for view in sequences if view.must_go_deep]
    starts = _starts(sequences, deep, prices, rate, limits.max_rows, limits.max_wait * full)
    if starts or not deep:
        return _start_pass(sequences, deep, starts, prices, rate, limits, limits.max_wait * full)
    return _deep_pass(sequences, deep, prices, rate, limits, limits.max_wait * full)


def _front(view: SequenceView) -> int:
    """The shallowest boundary at which the sequence's rows wait."""
    return view.waiting[-1][0]


def _starts(
    sequences: Sequence[SequenceView],
    deep: Sequence[SequenceView],
    prices: _Prices,
    rate: Rate,
    max_rows: int,
    max_wait: float,
) -> dict[int, int]:
    """Rows to start by sequence: all certain ones where nothing must go deep, else those that are worth a pass of
    their own; and the drafts behind them that are worth their rows."""
    rows = [
        (value, i, view)
        for i, view in enumerate(sequences)
        if view.moving == 0 and not view.prefill
        for value in view.ready
        if value >= 1.0 or rate.drafts
    ]
    rows.sort(key=lambda row: (-row[0], row[1]))
    del rows[max_rows:]
    if not rows:
        return {}
    certain = sum(value >= 1.0 for value, _, _ in rows)
    front, deep_rows = prices.costs.num_hidden_layers, 0
    if deep:
        front, deep_rows, certain = min(map(_front, deep)), _rows_in_flight(deep), 0
    tested = sum(view.mode == "threshold" for _, _, view in rows) / len(rows)
    best, count, gain = -math.inf if certain else 0.0, 0, 0.0
    for m, (value, _, _) in enumerate(rows, 1):
        gain += value
        if m < certain:
            continue
        net = gain - prices.step(front, m, deep_rows) - prices.second * prices.tests(front, tested * m)
        if net > best * _ROUNDING:
            best, count = net, m
    chosen: dict[int, int] = {}
    for _, _, view in rows[:count]:
        chosen[view.key] = chosen.get(view.key, 0) + 1
    seconds = prices.span(0, front, count) + prices.tests(front, count)
    return {} if _too_long(deep, chosen, seconds, max_wait) else chosen


def _rows_in_flight(sequences: Iterable[SequenceView]) -> int:
    """Rows that a deep pass over everything would take."""
    return sum(view.moving + len(view.worth) for view in sequences)


def _too_long(deep: Sequence[SequenceView], going: Container[int], seconds: float, max_wait: float) -> bool:
    """Whether a sequence that waits for a deep pass would have waited too long after ``seconds`` more without it."""
    return any(view.key not in going and view.waited + seconds > max_wait * _ROUNDING for view in deep)


def _start_pass(
    sequences: Sequence[SequenceView],
    deep: Sequence[SequenceView],
    starts: dict[int, int],
    prices: _Prices,
    rate: Rate,
    limits: Limits,
    max_wait: float,
) -> Pass | None:
    """The pass of new rows: decoding ones, and prompts unless rows outside of this pass wait."""
    members = [(view, starts[view.key]) for view in sequences if view.key in starts]
    room = min(limits.prefill_chunk, limits.max_rows - sum(starts.values()))
    if all(view.key in starts for view in deep):
        for view in sequences:
            if view.prompt and room > 0 and not view.waiting:
                members.append((view, min(room, view.prompt)))
                room -= members[-1][1]
    if not members:
        return None
    rows = _rows_in_flight(deep) + sum(count for _, count in members)
    newest = [(view, view.ready[count - 1]) for view, count in members if not view.prefill]
    return _pass(0, members, _tests(0, newest, prices, rate, rows, max_wait, len(sequences)), deep, prices)


def _deep_pass(
    sequences: Sequence[SequenceView],
    deep: Sequence[SequenceView],
    prices: _Prices,
    rate: Rate,
    limits: Limits,
    max_wait: float,
) -> Pass:
    """The pass from the shallowest boundary where rows must go on or drafts are worth it."""
    layers = sorted({layer for view in deep for layer, _ in view.waiting})
    must = {layer: sum(_must(view, layer) for view in deep) for layer in layers}
    front = next((layer for layer in layers if must[layer]), layers[-1])
    for first in layers[: layers.index(front) + 1]:
        admitted = _admitted(deep, first, front, must[front], prices)
        seconds = prices.span(first, front, sum(admitted.values()))
        if first == front or (admitted and not _too_long(deep, admitted, seconds, max_wait)):
            break
    members, room = [], limits.max_rows
    for view in deep:
        rows = min(room, _must(view, first) + admitted.get(view.key, 0))
        if rows:
            members.append((view, rows))
            room -= rows
    newest = []
    for view, rows in members:
        is_last = _front(view) == first and rows == view.waiting[-1][1]
        if is_last and not view.ready and not view.prefill and not (view.is_drafting and view.moving):
            newest.append((view, view.worth[-1] if view.worth else 1.0))
    tests = _tests(first, newest, prices, rate, _rows_in_flight(deep), max_wait, len(sequences))
    found = _pass(first, members, tests, deep, prices)
    if found.last < prices.costs.num_hidden_layers:
        return found
    return replace(found, members=(*found.members, *_riders(sequences, deep, first, found.rows, room, prices)))


def _admitted(
    deep: Sequence[SequenceView], first: int, front: int, rows: int, prices: _Prices
) -> dict[int, int]:
    """How many drafted rows of each sequence go on from ``first``, to join the ``rows`` rows that must at ``front``:
    by falling worth, as many as are worth their seconds. One at least, where nothing else waits."""
    drafts = [(worth, i, view.key) for i, view in enumerate(deep) for worth in view.at(first)[1] if worth < 1.0]
    drafts.sort(key=lambda draft: (-draft[0], draft[1]))
    best, count, gain = 0.0, 0, 0.0
    base = prices.deep(front, rows)
    for m, (worth, _, _) in enumerate(drafts, 1):
        gain += worth
        net = gain - prices.second * (prices.span(first, front, m) + prices.deep(front, rows + m) - base)
        if net > best * _ROUNDING:
            best, count = net, m
    if first == front and not rows:
        count = max(count, 1)
    admitted: dict[int, int] = {}
    for _, _, key in drafts[:count]:
        admitted[key] = admitted.get(key, 0) + 1
    return admitted


def _must(view: SequenceView, layer: int) -> int:
    """Rows of the sequence that must go on from ``layer``: moving and certain ones."""
    moving, worth = view.at(layer)
    return moving + sum(value >= 1.0 for value in worth)


def _riders(
    sequences: Sequence[SequenceView], deep: Sequence[SequenceView], first: int, rows: int, room: int, prices: _Prices
) -> list[Member]:
    """Pending rows of other sequences that cost nothing in this pass to the end: they have to be computed some time."""
    going = {view.key for view in deep}
    pending = [
        (view.waiting[0][1], view.key)
        for view in sequences
        if view.key not in going and len(view.waiting) == 1 and view.waiting[0][0] == first
    ]
    limit, members = prices.span(first, prices.costs.num_hidden_layers, rows) * _ROUNDING, []
    for count, key in sorted(pending, key=lambda one: (-one[0], one[1])):
        if count <= room and prices.span(first, prices.costs.num_hidden_layers, rows + count) <= limit:
            members.append(Member(key=key, rows=count))
            rows, room = rows + count, room - count
    return members


def _tests(
    first: int,
    newest: Iterable[tuple[SequenceView, float]],
    prices: _Prices,
    rate: Rate,
    deep_rows: float,
    max_wait: float,
    sequences: int,
) -> dict[int, int]:
    """The boundary behind ``first`` at which each sequence's newest row is tested. ``newest`` tells the expected tokens
    of that row. ``threshold`` tests at all its exits; ``lossless`` where a draft is expected to be worth more than it
    costs, the test included, with all sequences that would draft there together."""
    tests: dict[int, int] = {}
    groups: dict[int, list[tuple[float, SequenceView, Exit]]] = {}
    for view, value in newest:
        for place in view.exits:
            if place.layer <= first:
                continue
            if view.mode == "threshold":
                tests[view.key] = place.layer
                break
            if view.mode == "lossless" and rate.drafts:
                groups.setdefault(place.layer, []).append((value * place.acceptance, view, place))
    for layer in sorted(groups):
        group = [(value, view, place) for value, view, place in groups[layer] if view.key not in tests]
        group.sort(key=lambda one: -one[0])
        marginal = prices.step(layer, len(group) + 1, deep_rows) - prices.step(layer, len(group), deep_rows)
        while group and group[-1][0] <= marginal * (1.0 - 1e-9):
            group.pop()
        if not group:
            continue
        n = len(group)
        value, firing = sum(one[0] for one in group) / n, sum(one[2].firing for one in group) / n
        expected = 0.0
        for j, chance in _firing_counts(n, firing):
            net = j * value - prices.step(layer, j, deep_rows)
            if net > 0.0 and (j >= sequences or prices.span(0, layer, j) + prices.tests(layer, j) <= max_wait * _ROUNDING):
                expected += chance * net
        if expected > prices.second * prices.tests(layer, n):
            tests.update((view.key, layer) for _, view, _ in group)
    return tests


def _firing_counts(rows: int, firing: float) -> list[tuple[float, float]]:
    """How many of ``rows`` rows fire, with the chance of each number: the binomial distribution, or for many rows its
    mean."""
    if rows > _EXACT_ROWS:
        return [(rows * firing, 1.0)]
    return [(j, math.comb(rows, j) * firing**j * (1.0 - firing) ** (rows - j)) for j in range(1, rows + 1)]


def _pass(
    first: int,
    members: Sequence[tuple[SequenceView, int]],
    tests: dict[int, int],
    deep: Sequence[SequenceView],
    prices: _Prices,
) -> Pass:
    """The pass up to the next boundary where a member is tested, or has rows that come along, or others wait to go
    deep."""
    last = prices.costs.num_hidden_layers
    keys = {view.key for view, _ in members}
    for view, _ in members:
        if view.key in tests:
            last = min(last, tests[view.key])
        for layer, _ in view.waiting:
            if first < layer < last:
                last = layer
    for view in deep:
        if view.key not in keys:
            last = min([last, *(layer for layer, _ in view.waiting if layer > first)])
    return Pass(
        first=first,
        last=last,
        members=tuple(Member(key=view.key, rows=rows, tested=tests.get(view.key) == last) for view, rows in members),
    )
