"""Pipeline schedules as plain data: who does what in which order, checked for deadlock and timed without a process.

A schedule lists for every rank its actions: forward (F), backward (B), or its two halves for the inputs (I) and the
weights (W) of one microbatch on one stage. ``gpipe``, ``1f1b`` and ``filled`` are made here; ``interleaved``,
``zero_bubble`` and ``zbv`` are those of torch.distributed.pipelining, read for drawing and timing.

``filled`` is 1F1B with bubble filling (EE-LLM, arXiv 2312.04916, section 3.2 and appendix): microbatches that pass only
some of the stages run while these would wait. A *top* one goes forward through the first stages and back from there, in
the warm-up; a *bottom* one goes forward through all stages and back through the last ones only, in the cool-down. They
enlarge the batch and leave the time of a step as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from exitlm.errors import UserError, nearest

Op = Literal["F", "B", "I", "W"]
NAMES = ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "filled", "tuning")
OF_TORCH = ("interleaved", "zero_bubble", "zbv")
# Bounds far above any real run (the largest have some 100 stages and 1,000 microbatches), by what a core needs just
# below them: to make and simulate a schedule of 2**18 pairs of a stage and a microbatch takes 6 s and 200 MB, and to
# make one of torch's with 2**25 = stages x microbatches**2 takes 25 s, growing so. A stage has at least one layer.
MAX_STAGES, _MAX_MICROBATCHES, _MAX_PAIRS = 1 << 10, 1 << 14, 1 << 18
_MAX_MICROBATCHES_OF_TORCH, _MAX_SQUARES_OF_TORCH = 1 << 11, 1 << 25
_MIN_RATIO, _MAX_RATIO = 1e-3, 1e3
_WIDEST, _TALLEST = 240, 64  # columns and lines of text that a schedule is drawn with


@dataclass(frozen=True)
class Action:
    """One piece of work: ``op`` for a microbatch on a stage (0-based)."""

    op: Op
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.op} of microbatch {self.microbatch} on stage {self.stage}"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """``ranks[r]`` are the actions of rank r in order. ``spans[m] = (lo, hi)``: microbatch m goes forward on the stages
    0..hi and back on hi..lo. ``filled_warmup`` and ``filled_cooldown`` count the partial microbatches among them.
    ``independent``: a backward waits for nothing from later stages."""

    name: str
    stages: int
    ranks: tuple[tuple[Action, ...], ...]
    spans: Mapping[int, tuple[int, int]]
    filled_warmup: int = 0
    filled_cooldown: int = 0
    independent: bool = False

    def messages(self) -> tuple[tuple[Action | Message, ...], ...]:
        """The actions of each rank with the messages between them. Whichever rank sends appends the receipt to the
        other one's list, so that both ends of a pair see their messages in one order. One stage per rank.

        Raises:
            ValueError: the ranks wait for each other.
        """
        events = [event for events in simulate(self).ranks for event in events]
        lists: list[list[Action | Message]] = [[] for _ in self.ranks]
        waiting = [iter(actions) for actions in self.ranks]
        for event in sorted(events, key=lambda event: (event.start, event.action.stage)):
            action = event.action
            stage, m = action.stage, action.microbatch
            lists[stage].append(next(waiting[stage]))
            lo, hi = self.spans[m]
            to = None
            if action.op == "F" and stage < hi:
                to = stage + 1
            elif action.op == "B" and stage > lo and not self.independent:
                to = stage - 1
            if to is not None:
                lists[stage].append(Message("send", to, m))
                lists[to].append(Message("receive", stage, m))
        return tuple(map(tuple, lists))


@dataclass(frozen=True)
class Message:
    """What a rank sends to or receives from the stage ``peer``: hidden states of a microbatch from an earlier one,
    their gradient from a later one."""

    kind: Literal["send", "receive"]
    peer: int
    microbatch: int


@dataclass(frozen=True)
class Event:
    """An action with its times."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When everything of a schedule happens: one list of events per rank."""

    schedule: Schedule
    ranks: tuple[tuple[Event, ...], ...] = field(repr=False)

    @property
    def makespan(self) -> float:
        """The time of the last end."""
        return max(event.end for events in self.ranks for event in events)

    @property
    def utilisation(self) -> float:
        """The share of all ranks' time that is work."""
        busy = sum(event.end - event.start for events in self.ranks for event in events)
        return busy / (self.makespan * len(self.ranks))


def make(
    name: str,
    pipeline: int,
    microbatches: int,
    *,
    ratio: float = 2.0,
    fill_warmup: int | None = None,
    fill_cooldown: int | None = None,
    first_exit: int = 0,
    stages_per_rank: int = 2,
) -> Schedule:
    """The schedule ``name`` for ``pipeline`` ranks. ``ratio`` is the time of a backward over that of a forward;
    ``fill_warmup`` and ``fill_cooldown`` (``filled`` only) None are as many as fit, and ``first_exit`` is the first
    stage with an exit; ``stages_per_rank`` is for ``interleaved`` and ``zero_bubble``.

    Raises:
        UserError: an unknown name, numbers out of range, or a combination that the schedule does not know.
    """
    if name not in NAMES:
        raise UserError(f"schedule '{name}' is unknown; use one of {', '.join(NAMES)}{nearest(name, NAMES)}")
    if pipeline < 1 or microbatches < 1:
        raise UserError(f"{pipeline} ranks and {microbatches} microbatches make no schedule; use at least 1 of each")
    if not _MIN_RATIO <= ratio <= _MAX_RATIO:
        raise UserError(
            f"the ratio of backward to forward time is {ratio}, but must be a positive number from {_MIN_RATIO:g} to "
            f"{_MAX_RATIO:g}"
        )
    per_rank = {"interleaved": stages_per_rank, "zero_bubble": stages_per_rank, "zbv": 2}.get(name, 1)
    if pipeline * per_rank > MAX_STAGES:
        raise UserError(
            f"{pipeline} ranks are too many for schedule '{name}', which has at most {MAX_STAGES} stages; use fewer"
        )
    most = max_microbatches(name, pipeline * per_rank)
    if microbatches > most:
        raise UserError(
            f"{microbatches} microbatches are too many for schedule '{name}' on {pipeline} ranks; use at most {most}"
        )
    if name != "filled":
        if fill_warmup or fill_cooldown:
            raise UserError(f"schedule '{name}' fills no bubbles; use schedule 'filled'")
        if name == "tuning":
            return tuning(pipeline, microbatches)
        if name in ("gpipe", "1f1b"):
            return gpipe(pipeline, microbatches) if name == "gpipe" else filled(pipeline, microbatches, 0, 0, name=name)
        return of_torch(name, pipeline, microbatches, stages_per_rank)
    room = fill_room(pipeline, ratio)
    counts = [room if count is None else count for count in (fill_warmup, fill_cooldown)]
    for what, count in zip(("warm-up", "cool-down"), counts, strict=True):
        if not 0 <= count <= room:
            raise UserError(
                f"{count} extra microbatches don't fit into the {what} of {pipeline} ranks at a ratio of {ratio:g}; "
                f"use 0 to {room}"
            )
    return filled(pipeline, microbatches, *counts, first_exit=first_exit)


def max_microbatches(name: str, stages: int) -> int:
    """How many microbatches the schedule ``name`` is made for on up to ``MAX_STAGES`` stages."""
    if name in OF_TORCH:
        return min(_MAX_MICROBATCHES_OF_TORCH, math.isqrt(_MAX_SQUARES_OF_TORCH // stages))
    return min(_MAX_MICROBATCHES, _MAX_PAIRS // stages)


def fill_room(pipeline: int, ratio: float) -> int:
    """How many partial microbatches fit into the warm-up, and as many into the cool-down: ``(P - 1) r / (1 + r)``."""
    return math.floor((pipeline - 1) * ratio / (1.0 + ratio) + 1e-9)


def gpipe(pipeline: int, microbatches: int) -> Schedule:
    """All forwards, then all backwards."""
    ranks = [[Action(op, r, m) for op in ("F", "B") for m in range(microbatches)] for r in range(pipeline)]
    spans = dict.fromkeys(range(microbatches), (0, pipeline - 1))
    return Schedule(name="gpipe", stages=pipeline, ranks=tuple(map(tuple, ranks)), spans=spans)


def tuning(pipeline: int, microbatches: int) -> Schedule:
    """Exits on a frozen model: a stage sends its hidden states on, then does the forward and backward of its exits."""
    ranks = [[Action(op, r, m) for m in range(microbatches) for op in ("F", "B")] for r in range(pipeline)]
    spans = dict.fromkeys(range(microbatches), (0, pipeline - 1))
    return Schedule(name="tuning", stages=pipeline, ranks=tuple(map(tuple, ranks)), spans=spans, independent=True)


def filled(
    pipeline: int, microbatches: int, warmup: int, cooldown: int, *, first_exit: int = 0, name: str = "filled"
) -> Schedule:
    """1F1B with ``warmup`` top and ``cooldown`` bottom microbatches (0 and 0: plain 1F1B).

    Ids: the full ones first, then the bottom ones, then the top ones. The i-th top one reaches stage
    ``warmup - 1 - i``, and is left out if that is before ``first_exit``: it would meet no loss. The i-th bottom one
    goes back through the last ``cooldown - i`` stages.
    """
    P, passing = pipeline, microbatches + cooldown  # those that go forward through every stage
    spans = dict.fromkeys(range(microbatches), (0, P - 1))
    spans |= {microbatches + i: (P - cooldown + i, P - 1) for i in range(cooldown)}
    warmup = max(0, warmup - first_exit)
    spans |= {passing + i: (0, first_exit + warmup - 1 - i) for i in range(warmup)}
    ranks: list[list[Action]] = []
    for r in range(P):
        ahead = min(passing, P - r)
        tops = [m for m in range(passing, passing + warmup) if r <= spans[m][1]]
        actions = [Action("F", r, m) for m in (*range(ahead), *tops)]
        actions += [Action("B", r, m) for m in reversed(tops)]
        for m in range(passing):
            if r >= spans[m][0]:
                actions.append(Action("B", r, m))
            if m + ahead < passing:
                actions.append(Action("F", r, m + ahead))
        ranks.append(actions)
    return Schedule(
        name=name, stages=P, ranks=tuple(map(tuple, ranks)), spans=spans, filled_warmup=warmup, filled_cooldown=cooldown
    )


class _Stage:
    """What torch's schedules ask of a stage when they only order the work."""

    def __init__(self, index: int, stages: int, pipeline: int) -> None:
        import torch

        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, stages, pipeline, 0
        self.is_first, self.is_last, self.has_backward = index == 0, index == stages - 1, True
        self.group, self.device, self.submod = None, torch.device("cpu"), torch.nn.Identity()
        self.stage_index_to_group_rank: Any = None


def of_torch(name: str, pipeline: int, microbatches: int, stages_per_rank: int = 2) -> Schedule:
    """A schedule of torch.distributed.pipelining with several stages per rank."""
    from torch.distributed.pipelining import schedules

    kinds: dict[str, Callable[..., Any]] = {
        "interleaved": schedules.ScheduleInterleaved1F1B,
        "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
        "zbv": schedules.ScheduleZBVZeroBubble,
    }
    stages = pipeline * (2 if name == "zbv" else stages_per_rank)
    mine = (0, stages - 1) if name == "zbv" else range(0, stages, pipeline)
    try:
        order = kinds[name](
            [_Stage(index, stages, pipeline) for index in mine],
            n_microbatches=microbatches,
            loss_fn=lambda output, target: output,
            scale_grads=False,
        ).pipeline_order
    except ValueError as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(
            f"schedule '{name}' can't run {microbatches} microbatches on {pipeline} ranks ({reason})"
        ) from error
    ops: dict[str, Op] = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    ranks = tuple(
        tuple(
            Action(ops[action.computation_type.name], action.stage_index, action.microbatch_index)
            for action in order[r]
            if action is not None
        )
        for r in range(pipeline)
    )
    spans = dict.fromkeys(range(microbatches), (0, stages - 1))
    return Schedule(name=name, stages=stages, ranks=ranks, spans=spans)


def check(schedule: Schedule) -> None:
    """Every microbatch goes forward and back exactly where its span says, each stage on one rank.

    Raises:
        ValueError: the first thing that is missing, twice, or in a wrong place.
    """
    owner: dict[int, int] = {}
    seen: set[Action] = set()
    for rank, actions in enumerate(schedule.ranks):
        for action in actions:
            if action in seen:
                raise ValueError(f"{action} is there twice")
            if owner.setdefault(action.stage, rank) != rank:
                raise ValueError(f"stage {action.stage} is on ranks {owner[action.stage]} and {rank}")
            seen.add(action)
    expected: set[Action] = set()
    for m, (lo, hi) in schedule.spans.items():
        expected |= {Action("F", stage, m) for stage in range(hi + 1)}
        for stage in range(lo, hi + 1):
            whole = Action("B", stage, m)
            halves = {Action("I", stage, m), Action("W", stage, m)}
            expected |= halves if halves & seen else {whole}
    if wrong := sorted(map(str, expected ^ seen)):
        raise ValueError(f"{wrong[0]} is {'missing' if wrong[0] in set(map(str, expected - seen)) else 'too much'}")


def simulate(
    schedule: Schedule, forward: float | Sequence[float] = 1.0, backward: float | Sequence[float] = 2.0
) -> Timeline:
    """When each action runs if every rank does the next one as soon as what it needs is there; messages take no time.

    ``forward`` and ``backward`` are the times of a rank's part of the model, or one per stage; several stages of a rank
    share its part. I and W take half of a backward each.

    Raises:
        ValueError: the ranks wait for each other, and for what.
    """
    share = len(schedule.ranks) / schedule.stages
    f, b = (
        [float(t) * share] * schedule.stages if isinstance(t, int | float) else list(map(float, t))
        for t in (forward, backward)
    )
    takes: dict[Op, Callable[[int], float]] = {
        "F": lambda s: f[s], "B": lambda s: b[s], "I": lambda s: b[s] / 2, "W": lambda s: b[s] / 2,
    }  # fmt: skip
    ended: dict[Action, float] = {}
    clock = [0.0] * len(schedule.ranks)
    events: list[list[Event]] = [[] for _ in schedule.ranks]
    moved = True
    while moved:
        moved = False
        for r, actions in enumerate(schedule.ranks):
            while len(events[r]) < len(actions):
                action = actions[len(events[r])]
                needed = _needs(action, schedule, ended)
                if needed is None:
                    break
                start = max(clock[r], needed)
                clock[r] = ended[action] = start + takes[action.op](action.stage)
                events[r].append(Event(action, start, clock[r]))
                moved = True
    stuck = [
        f"rank {r} at {actions[len(events[r])]}"
        for r, actions in enumerate(schedule.ranks)
        if len(events[r]) < len(actions)
    ]
    if stuck:
        raise ValueError(f"the schedule '{schedule.name}' is a deadlock: {', '.join(stuck)}")
    return Timeline(schedule=schedule, ranks=tuple(map(tuple, events)))


def _needs(action: Action, schedule: Schedule, ended: Mapping[Action, float]) -> float | None:
    """When everything that ``action`` waits for has ended; None if something has not."""
    s, m = action.stage, action.microbatch
    if action.op == "F":
        return 0.0 if s == 0 else ended.get(Action("F", s - 1, m))
    if action.op == "W":
        return ended.get(Action("I", s, m))
    own = ended.get(Action("F", s, m))
    if s == schedule.spans[m][1] or own is None or schedule.independent:
        return own
    behind = ended.get(Action("B", s + 1, m), ended.get(Action("I", s + 1, m)))
    return None if behind is None else max(own, behind)


def drawn(timeline: Timeline, columns: int = 100) -> list[str]:
    """A line of text per rank: forwards as the microbatch's number, backwards in brackets, waiting as dots.

    ``columns`` are those of a short schedule. A long one is cut in the middle, and so are many ranks: "…" stands for
    what is left out.
    """
    unit = min(event.end - event.start for events in timeline.ranks for event in events)
    scale = max(1.0, min(4.0 / unit, columns / timeline.makespan))
    ranks, length, half = len(timeline.ranks), math.ceil(timeline.makespan * scale), _WIDEST // 2
    parts = [range(length)] if length <= _WIDEST else [range(half), range(length - half, length)]
    lines = []
    for rank, events in enumerate(timeline.ranks):
        if ranks > _TALLEST and _TALLEST // 2 <= rank < ranks - _TALLEST // 2:
            if rank == _TALLEST // 2:
                lines.append("…")
            continue
        drawings = [_drawn_part(events, scale, part) for part in parts]
        lines.append(f"rank {rank:>{max(2, len(str(ranks - 1)))}} |{'…'.join(drawings)}|")
    return lines


def _drawn_part(events: Sequence[Event], scale: float, part: range) -> str:
    """The columns ``part`` of a rank's line."""
    line = ["·"] * len(part)
    for event in events:
        first = round(event.start * scale)
        width = max(1, round(event.end * scale) - first)
        begin, end = max(first, part.start), min(first + width, part.stop)
        if begin < end:
            op, number = event.action.op, str(event.action.microbatch)
            text = number if op == "F" else f"[{number}" if op in "BI" else f"({number}"
            text = text[:width].ljust(width, "-" if op != "F" else " ")
            line[begin - part.start : end - part.start] = text[begin - first : end - first]
    return "".join(line)
