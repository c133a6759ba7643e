"""Which rows an idle stage of a pipeline runs next: a pure function of plain data, without tensors, tokens or a clock.

In one process a pass costs time that others wait for, so the scheduler weighs tokens against seconds
(:mod:`exitlm.decode.pricing.scheduler`). A stage that has nothing to do gives its time away for nothing, unless rows
that matter more arrive while it is busy. So the rules are shorter:

```
next_stage_pass:
  rows that have to go    -> from the deepest boundary that has some, which feeds the next stage
  else drafts, then fills -> if, by their worth, they are worth the time that rows on their way may have to wait
  others at that boundary ride along
```
The method is the second one of EE-LLM (arXiv 2312.04916, section 4): as soon as an exit fires the first stage starts
the next token, while later stages fill the KV cache of the last one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from exitlm.decode.pricing.scheduler import Limits, Member, Pass

_SHARED = 0.25  # of the seconds that a row adds to a pass: a draft starts if it is worth so much of them
_DEAR, _DEAR_WITH_DRAFTS = 2.0, 0.5  # what rows cost over what their pass does; drafts add rows that bring less
_FILL_WORTH = 0.1  # of a token: fills run by themselves where at most a tenth of their pass delays rows on their way


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Rows of one sequence that wait at one boundary of a stage; at most one record for a sequence and boundary.

    kind: ``start``: decoding rows that have not entered layer 0 (the newest certain token, or drafts);
        ``prompt``: rows of a prompt, at any boundary;
        ``must``: rows that have to reach the end before the sequence can go on;
        ``draft``: rows of ``lossless`` that wait to be verified;
        ``fill``: rows of ``threshold`` whose tokens are out: only their keys and values are missing below.
    exits: layers behind ``layer`` at which the newest of these rows is still to be tested, ascending.
    worth: expected tokens of the first of these rows, 1 if it is certain.
    pressed: the sequence has as many pending rows as it may, so these have to go.
    since: when they came here, by any clock: the earliest go first, so that all are served while others come.
    """

    key: int
    layer: int
    rows: int
    kind: str
    exits: tuple[int, ...] = ()
    worth: float = 1.0
    pressed: bool = False
    since: float = 0.0

    @property
    def goes(self) -> bool:
        """Whether these rows have to go: a stage that has such rows runs."""
        return self.pressed or self.kind in ("must", "prompt") or (self.kind != "fill" and self.worth >= 1.0)


@dataclass(frozen=True, kw_only=True)
class StageView:
    """What the policy sees of a stage. Each field but the first three may be left out where it isn't known.

    first, last: the boundaries between which its layers lie.
    waiting: in order of the sequences' arrival; all boundaries from ``first`` on, below ``last``.
    seconds: of a pass of one row through the whole stage, by the passes so far; 0: unknown.
    row: seconds that each further row adds to that.
    coming: seconds until rows may arrive from the stage before (for the first stage: tokens from others); ``inf``:
        none are on their way.
    stages, sequences: how many stages the pipeline has, and how many sequences decode now, wherever their rows are.
    depth: stages that a row passes, on average, until the next one of its sequence starts; 0: all.
    gather: rows that have to go wait for those that are coming up to this share of what a pass costs for any number
        of rows; 0: never. Where rows are nearly free, .5 gains a tenth or more with many sequences.
    idle: seconds that they have waited so.
    """

    first: int
    last: int
    waiting: tuple[Waiting, ...]
    seconds: float = 0.0
    row: float = 0.0
    coming: float = math.inf
    stages: int = 1
    sequences: int = 0
    depth: float = 0.0
    gather: float = 0.0
    idle: float = 0.0

    @property
    def fixed(self) -> float:
        """Seconds that a pass through the whole stage costs for any number of rows."""
        return max(0.0, self.seconds - self.row)

    @property
    def group(self) -> int:
        """Sequences that may start in one pass, so that the others keep the other stages busy.

        An equal share for each stage where its rows cost much more than the pass itself. Where they cost less, as many
        as are at the first stage at a time: exits that fire send them back to it. 0: any number.
        """
        drafts = any(one.kind in ("start", "draft") and not one.goes for one in self.waiting)
        share = -(-self.sequences // self.stages)
        if self.depth and share * self.row < (_DEAR_WITH_DRAFTS if drafts else _DEAR) * self.fixed:
            return max(share, math.ceil(self.sequences / self.depth))
        return share


def next_stage_pass(stage: StageView, limits: Limits) -> Pass | None:
    """The next pass of an idle stage; None if nothing waits, or what does had better wait for the rows that come.

    Unless ``stage.gather`` allows it, rows that have to go never wait.

    All rows of a sequence at the pass's first boundary go together, except those of prompts, which go in chunks, and
    more than ``limits.max_rows``: of these the oldest go. The pass ends at the next boundary where a member is tested
    or has older rows, at the latest at the stage's end. Rows that have to go never wait at a deeper boundary.
    """
    waiting = [one for one in stage.waiting if one.goes or one.kind != "start" or _worth_a_start(stage, one)]
    if not waiting:
        return None
    best = max(waiting, key=lambda one: (_worth(one), one.layer))
    here = [one for one in waiting if one.layer == best.layer]
    older: dict[int, int] = {}  # by sequence the next boundary at which it has rows
    for one in stage.waiting:
        if one.layer > best.layer:
            older[one.key] = min(one.layer, older.get(one.key, stage.last))
    members = _members(stage, best, here, limits)
    stops = [older.get(one.key, stage.last) for one, _ in members]
    stops += [layer for one, rows in members for layer in _tests(one, rows)]
    last = min(stage.last, *stops)
    share = (last - best.layer) / (stage.last - stage.first)
    if _may_wait(stage, best, share, sum(rows for _, rows in members)):
        return None
    fills = [one for one in here if one.kind == "fill"]
    riders = [one for one in fills if min(older.get(one.key, last), *_tests(one, one.rows), last) == last]
    members += _fitting(riders, members, limits)
    return Pass(
        first=best.layer,
        last=last,
        members=tuple(Member(key=one.key, rows=rows, tested=last in _tests(one, rows)) for one, rows in members),
    )


def _worth_a_start(stage: StageView, draft: Waiting) -> bool:
    """Whether a draft is worth its row, which it doesn't cost where it runs by itself and delays nobody."""
    return draft.worth * stage.seconds >= _SHARED * stage.row


def _may_wait(stage: StageView, best: Waiting, share: float, rows: int) -> bool:
    """Whether a pass of ``rows`` such rows through that share of the stage had better wait for the rows that are
    coming: these would have to wait for its end, for nothing if the pass turns out not to have been needed."""
    if best.goes:
        return stage.sequences > 1 and stage.idle + stage.coming < stage.gather * stage.fixed * share
    if best.kind == "fill":  # what fills cost by row, they cost later, too
        return stage.coming < (1.0 - _FILL_WORTH) * stage.fixed * share
    return stage.coming < (1.0 - best.worth) * (stage.seconds + stage.row * (rows - 1)) * share


def _worth(one: Waiting) -> float:
    """Tokens that are lost if the rows don't run now: 1 where they have to go."""
    if one.goes:
        return 1.0
    return _FILL_WORTH if one.kind == "fill" else one.worth


def _members(stage: StageView, best: Waiting, here: Sequence[Waiting], limits: Limits) -> list[tuple[Waiting, int]]:
    """Who goes with ``best``, and how many rows: those that are worth as much, longest waiting first, then drafts by
    falling worth, while one is worth more than what the seconds of its rows bring otherwise."""
    alike = [one for one in here if _worth(one) >= _worth(best)]
    alike.sort(key=lambda one: (one.since, one.kind == "prompt"))  # else in order of arrival
    drafts = [one for one in here if _worth(one) < _worth(best) and one.kind != "fill"]
    drafts.sort(key=lambda one: -_worth(one))
    starts = stage.group or len(here)
    room, prompts = limits.max_rows, min(limits.prefill_chunk, limits.max_rows)
    members: list[tuple[Waiting, int]] = []
    tokens, count = 0.0, 0
    for one in (*alike, *drafts):
        rows = one.rows if members else min(one.rows, room)
        if one.kind == "prompt":
            rows = min(one.rows, room, prompts)
        if not 0 < rows <= room or (one.kind == "start" and not starts):
            continue
        seconds = stage.seconds + stage.row * (count - 1)
        if _worth(one) < _worth(best) and _worth(one) * seconds < tokens * stage.row * rows:
            continue
        members.append((one, rows))
        room, count, tokens = room - rows, count + rows, tokens + _worth(one)
        prompts -= rows if one.kind == "prompt" else 0
        starts -= one.kind == "start"
    return members


def _tests(one: Waiting, rows: int) -> tuple[int, ...]:
    """Where the newest of the ``rows`` rows that go is tested: nowhere if the newest of all doesn't go."""
    return one.exits[:1] if rows == one.rows else ()


def _fitting(
    fills: Sequence[Waiting], members: Sequence[tuple[Waiting, int]], limits: Limits
) -> list[tuple[Waiting, int]]:
    """Those for which the pass has room, longest waiting first."""
    keys = {one.key for one, _ in members}
    room = limits.max_rows - sum(rows for _, rows in members)
    riders = []
    for one in sorted(fills, key=lambda one: one.since):
        if one.key not in keys and one.rows <= room:
            riders.append((one, one.rows))
            room -= one.rows
    return riders
