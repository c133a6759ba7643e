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
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from exitlm.decode.pricing.costs import Costs

_MEMORY = 24.0  # plain steps over which the gain is averaged
_WINDOW = 64.0  # plain steps that the guard compares
_PRIOR_STEPS = 2.0
_MIN_GAIN = 0.98
_MAX_LOSS = 8.0  # plain steps below that gain at which the guard doesn't wait for the end of its window
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
    def verifies(self) -> bool:
        """Whether its waiting rows are drafts to be verified."""
        return self.mode == "lossless" and not self.prefill

    @property
    def must_go_deep(self) -> bool:
        """Whether rows wait for a deep pass: rows that move, or drafts."""
        return bool(self.waiting) and (self.moving > 0 or self.verifies)

    def at(self, layer: int) -> tuple[int, tuple[float, ...]]:
        """The moving rows that wait at ``layer``, and the worth of the others there that are drafts."""
        before = 0
        for where, rows in self.waiting:
            if where == layer:
                moving = min(max(self.moving - before, 0), rows)
                behind = max(before - self.moving, 0)
                return moving, self.worth[behind : behind + rows - moving] if self.verifies else ()
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
        loss = _MIN_GAIN * window_spent - window_done
        ended = window_done >= _WINDOW
        if done and loss > (0.0 if ended else _MAX_LOSS):  # judged when tokens come, not between their drafts
            longer = min(2 * self.pause, _LONGEST_PAUSE)
            return replace(after, paused=self.pause, pause=longer, window_done=0.0, window_spent=0.0)
        if not ended:
            return replace(after, window_done=window_done, window_spent=window_spent)
        return replace(after, pause=_WINDOW, window_done=0.0, window_spent=0.0)


@dataclass(frozen=True, kw_only=True)
class _State:
    """What the choices of one call depend on. ``deep`` are the sequences whose rows wait for a deep pass; ``second``
    tells the tokens that a second is worth, ``max_wait`` seconds."""

    sequences: Sequence[SequenceView]
    deep: Sequence[SequenceView]
    costs: Costs
    rate: Rate
    limits: Limits
    context: float
    second: float
    max_wait: float

    @property
    def rows_in_flight(self) -> int:
        """Rows that a deep pass over everything would take."""
        return sum(view.moving + len(view.worth) for view in self.deep)

    def span(self, first: int, last: int, rows: float) -> float:
        """Seconds of a pass."""
        return self.costs.span(first, last, rows, self.context)

    def to_end(self, first: int, rows: float) -> float:
        """Seconds of a pass to the end, with the final head."""
        return self.costs.deep(first, rows, self.context)

    def tests(self, layer: int, rows: float) -> float:
        """Seconds of testing rows at a boundary, where a pass ends for it."""
        return self.costs.tests(layer, rows) + self.costs.cut() if layer in self.costs.draft and rows else 0.0

    def price(self, front: int, rows: float, deep_rows: float) -> float:
        """Tokens that it must bring to run ``rows`` new rows up to ``front`` by themselves, and on beside
        ``deep_rows``."""
        later = self.to_end(front, deep_rows + rows) - self.to_end(front, deep_rows)
        return self.second * (self.span(0, front, rows) + later)

    def waits_too_long(self, seconds: float, going: Container[int]) -> bool:
        """Whether a sequence that waits for a deep pass would exceed its bound if ``seconds`` passed without it."""
        limit = self.max_wait * _ROUNDING
        return any(view.key not in going and view.waited + seconds > limit for view in self.deep)


def next_pass(sequences: Sequence[SequenceView], costs: Costs, rate: Rate, limits: Limits) -> Pass | None:
    """The next pass of these sequences, given in order of arrival; None if they have no rows."""
    decoding = max(1, sum(not view.prefill for view in sequences))
    context = sum(view.context for view in sequences) / max(1, len(sequences))
    full = costs.full(decoding, context)
    state = _State(
        sequences=sequences, deep=[view for view in sequences if view.must_go_deep], costs=costs, rate=rate,
        limits=limits, context=context, second=rate.gain * decoding / full, max_wait=limits.max_wait * full,
    )  # fmt: skip
    starts = _starts(state)
    return _start_pass(state, starts) if starts or not state.deep else _deep_pass(state)


def _starts(state: _State) -> dict[int, int]:
    """New rows by sequence: every certain one where nothing waits for a deep pass, else those that are worth a pass of
    their own; and the drafts behind them that are worth their rows."""
    rows = [
        (value, view)
        for view in state.sequences
        if view.moving == 0 and not view.prefill
        for value in view.ready
        if value >= 1.0 or state.rate.drafts
    ]
    rows.sort(key=lambda row: (-row[0], -row[1].waited))
    del rows[state.limits.max_rows :]
    if not rows:
        return {}
    if state.deep:
        front, deep_rows, certain = min(map(_front, state.deep)), state.rows_in_flight, 0
    else:
        front, deep_rows, certain = state.costs.num_hidden_layers, 0, sum(value >= 1.0 for value, _ in rows)
    tested = sum(view.mode == "threshold" for _, view in rows) / len(rows)
    best, count, gain = -math.inf if certain else 0.0, 0, 0.0
    for m, (value, _) in enumerate(rows, 1):
        gain += value
        if m < certain:
            continue
        net = gain - state.price(front, m, deep_rows) - state.second * state.tests(front, tested * m)
        if net > best * _ROUNDING:
            best, count = net, m
    chosen: dict[int, int] = {}
    for _, view in rows[:count]:
        chosen[view.key] = chosen.get(view.key, 0) + 1
    seconds = state.span(0, front, count) + state.tests(front, count)
    return {} if state.waits_too_long(seconds, chosen) else chosen


def _start_pass(state: _State, starts: Mapping[int, int]) -> Pass | None:
    """The pass of new rows: decoding ones, and prompts unless rows outside of this pass wait."""
    members = [(view, starts[view.key]) for view in state.sequences if view.key in starts]
    newest = [(view, view.ready[count - 1]) for view, count in members]
    room = min(state.limits.prefill_chunk, state.limits.max_rows - sum(starts.values()))
    if all(view.key in starts for view in state.deep):
        for view in state.sequences:
            if view.prompt and room > 0 and not view.waiting:
                members.append((view, min(room, view.prompt)))
                room -= members[-1][1]
    if not members:
        return None
    rows = state.rows_in_flight + sum(count for _, count in members)
    return _pass(state, 0, members, _tests(state, 0, newest, rows))


def _deep_pass(state: _State) -> Pass:
    """The pass from the shallowest boundary where rows must go on or drafts are worth it."""
    layers = sorted({layer for view in state.deep for layer, _ in view.waiting})
    must = {layer: sum(_must(view, layer) for view in state.deep) for layer in layers}
    front = next((layer for layer in layers if must[layer]), layers[-1])
    for first in layers[: layers.index(front) + 1]:
        admitted = _admitted(state, first, front, must[front])
        seconds = state.span(first, front, sum(admitted.values()))
        if first == front or (admitted and not state.waits_too_long(seconds, admitted)):
            break
    members, newest, room = [], [], state.limits.max_rows
    for view in sorted(state.deep, key=lambda view: -view.waited):
        rows = min(room, _must(view, first) + admitted.get(view.key, 0))
        if not rows:
            continue
        members.append((view, rows))
        room -= rows
        undecided = not view.ready and not view.prefill and not (view.verifies and view.moving)
        if undecided and view.waiting[-1] == (first, rows):
            newest.append((view, view.worth[-1] if view.worth else 1.0))
    found = _pass(state, first, members, _tests(state, first, newest, state.rows_in_flight))
    return replace(found, members=(*found.members, *_riders(state, first, found.last, found.rows)))


def _front(view: SequenceView) -> int:
    """The shallowest boundary at which the sequence's rows wait."""
    return view.waiting[-1][0]


def _must(view: SequenceView, layer: int) -> int:
    """Rows of the sequence that must go on from ``layer``: moving and certain ones."""
    moving, worth = view.at(layer)
    return moving + sum(value >= 1.0 for value in worth)


def _admitted(state: _State, first: int, front: int, rows: int) -> dict[int, int]:
    """How many drafted rows of each sequence go on from ``first``, to join the ``rows`` rows that must at ``front``:
    by falling worth, as many as are worth their seconds. One at least, where nothing else waits."""
    drafts = [(worth, view.key) for view in state.deep for worth in view.at(first)[1] if worth < 1.0]
    drafts.sort(key=lambda draft: -draft[0])
    best, count, gain = 0.0, 0, 0.0
    base = state.to_end(front, rows)
    for m, (worth, _) in enumerate(drafts, 1):
        gain += worth
        net = gain - state.second * (state.span(first, front, m) + state.to_end(front, rows + m) - base)
        if net > best * _ROUNDING:
            best, count = net, m
    if first == front and not rows:
        count = max(count, 1)
    admitted: dict[int, int] = {}
    for _, key in drafts[:count]:
        admitted[key] = admitted.get(key, 0) + 1
    return admitted


def _riders(state: _State, first: int, last: int, rows: int) -> list[Member]:
    """Pending rows of other sequences that cost nothing in this pass of ``rows`` rows. They have to be computed some
    time, and where rows beyond a number cost their full price, they would cost it later."""
    pending = [
        (dict(view.waiting).get(first, 0), view.key)
        for view in state.sequences
        if not view.must_go_deep and not any(first < layer < last for layer, _ in view.waiting)
    ]
    limit = state.span(first, last, rows) * _ROUNDING
    free, most = 0, min(state.limits.max_rows - rows, sum(count for count, _ in pending))
    while free < most:  # bisection: more rows never cost less
        middle = (free + most + 1) // 2
        free, most = (middle, most) if state.span(first, last, rows + middle) <= limit else (free, middle - 1)
    members = []
    for count, key in sorted(pending, key=lambda one: -one[0]):
        if taken := min(count, free):
            members.append(Member(key=key, rows=taken))
            free -= taken
    return members


def _tests(state: _State, first: int, newest: Iterable[tuple[SequenceView, float]], deep_rows: float) -> dict[int, int]:
    """The boundary behind ``first`` at which each sequence's newest row is tested, whose expected tokens ``newest``
    tells. ``threshold`` tests at all its exits. ``lossless`` tests where it would go on drafting: where the sequences
    that may draft there are together expected to bring more than their shallow pass, rows and tests cost."""
    tests: dict[int, int] = {}
    groups: dict[int, list[tuple[float, float, int]]] = {}
    for view, value in newest:
        ahead = [place for place in view.exits if place.layer > first]
        if view.mode == "threshold" and ahead:
            tests[view.key] = ahead[0].layer
        elif view.mode == "lossless" and state.rate.drafts:
            for place in ahead:
                groups.setdefault(place.layer, []).append((value * place.acceptance, place.firing, view.key))
    for layer in sorted(groups):
        group = [one for one in groups[layer] if one[2] not in tests]
        n = len(group)
        marginal = state.price(layer, n + 1, deep_rows) - state.price(layer, n, deep_rows)
        group = [one for one in group if one[0] * _ROUNDING > marginal]
        if group and _drafting_gain(state, layer, group, deep_rows) > state.second * state.tests(layer, len(group)):
            tests.update((key, layer) for _, _, key in group)
    return tests


def _drafting_gain(state: _State, layer: int, group: Sequence[tuple[float, float, int]], deep_rows: float) -> float:
    """Expected tokens, less the price, of the next drafts of a group: (tokens, chance to fire, key) of each. Those that
    fire start their drafts together if that is worth it and no other sequence waits too long for it."""
    n = len(group)
    tokens, firing = sum(one[0] for one in group) / n, sum(one[1] for one in group) / n
    expected = 0.0
    for rows, chance in _firing_counts(n, firing):
        net = rows * tokens - state.price(layer, rows, deep_rows)
        alone = rows >= len(state.sequences)
        if net > 0.0 and (alone or state.span(0, layer, rows) + state.tests(layer, rows) <= state.max_wait * _ROUNDING):
            expected += chance * net
    return expected


def _firing_counts(rows: int, firing: float) -> list[tuple[float, float]]:
    """How many of ``rows`` rows fire, with the chance of each number: the binomial distribution, or for many rows its
    mean."""
    if rows > _EXACT_ROWS:
        return [(rows * firing, 1.0)]
    return [(j, math.comb(rows, j) * firing**j * (1.0 - firing) ** (rows - j)) for j in range(1, rows + 1)]


def _pass(state: _State, first: int, members: Sequence[tuple[SequenceView, int]], tests: Mapping[int, int]) -> Pass:
    """The pass up to the next boundary where a member is tested, or has rows that come along, or others wait to go
    deep."""
    going = {view.key for view, _ in members}
    stops = [tests[key] for key in going if key in tests]
    for view in (*(view for view, _ in members), *(view for view in state.deep if view.key not in going)):
        stops += [layer for layer, _ in view.waiting if layer > first]
    last = min(stops, default=state.costs.num_hidden_layers)
    return Pass(
        first=first,
        last=last,
        members=tuple(Member(key=view.key, rows=rows, tested=tests.get(view.key) == last) for view, rows in members),
    )
