"""The policy of an idle stage: single choices, and what holds for all views and traces."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.decode.pricing.scheduler import Limits, Member, Pass
from exitlm.decode.pricing.stages import StageView, Waiting, next_stage_pass

LIMITS = Limits(max_rows=16, prefill_chunk=8)
KINDS = ("start", "prompt", "must", "draft", "fill")


def wait(key: int, layer: int, kind: str, rows: int = 1, **more: Any) -> Waiting:
    return Waiting(key=key, layer=layer, rows=rows, kind=kind, **more)


def choose(*waiting: Waiting, limits: Limits = LIMITS, **more: Any) -> Pass | None:
    """The pass of a stage of layers 4 to 12."""
    return next_stage_pass(StageView(first=4, last=12, waiting=waiting, **more), limits)


def keys(found: Pass | None) -> list[int]:
    assert found is not None
    return [member.key for member in found.members]


def test_nothing_waits() -> None:
    assert choose() is None


def test_rows_that_must_go_deep_run_to_the_end_of_the_stage() -> None:
    assert choose(wait(1, 4, "must", 3)) == Pass(first=4, last=12, members=(Member(key=1, rows=3),))


@pytest.mark.parametrize(("exits", "last", "tested"), [((6, 12), 6, True), ((12,), 12, True), ((16,), 12, False)])
def test_a_pass_stops_where_its_newest_row_is_tested(exits: tuple[int, ...], last: int, tested: bool) -> None:
    found = choose(wait(1, 4, "must", exits=exits))
    assert found == Pass(first=4, last=last, members=(Member(key=1, rows=1, tested=tested),))


def test_all_members_stop_at_the_nearest_test() -> None:
    found = choose(wait(1, 4, "must"), wait(2, 4, "must", exits=(8,)), wait(3, 4, "must", exits=(6,)))
    assert found is not None
    assert (found.last, [member.tested for member in found.members]) == (6, [False, False, True])


def test_a_pass_stops_at_older_rows_of_its_sequence() -> None:
    found = choose(wait(1, 4, "must", exits=(12,)), wait(1, 8, "fill", 5), wait(2, 6, "fill"))
    assert found is not None
    assert (found.first, found.last, found.members) == (4, 8, (Member(key=1, rows=1),))


def test_the_deepest_rows_that_have_to_go_are_first() -> None:
    found = choose(wait(1, 4, "must"), wait(2, 8, "must"), wait(3, 10, "fill"))
    assert (found and found.first, keys(found)) == (8, [2])


def test_the_longest_waiting_go_first_where_there_is_no_room_for_all() -> None:
    rows = [wait(key, 4, "must", 7, since=float(-key)) for key in range(4)]
    assert keys(choose(*rows)) == [3, 2]


def test_rows_of_one_sequence_stay_together_unless_they_are_too_many() -> None:
    assert keys(choose(wait(1, 4, "must", 10), wait(2, 4, "must", 10), wait(3, 4, "must", 6))) == [1, 3]
    found = choose(wait(1, 4, "must", 40, exits=(8,)))
    assert found is not None
    assert found.members == (Member(key=1, rows=16),)
    assert found.last == 12  # the newest row, which is tested at 8, isn't among them


def test_prompts_go_in_chunks_behind_decoding_rows() -> None:
    found = choose(wait(1, 4, "prompt", 6), wait(2, 4, "prompt", 100), wait(3, 4, "must", 2))
    assert found is not None
    assert [(member.key, member.rows) for member in found.members] == [(3, 2), (1, 6), (2, 2)]


@pytest.mark.parametrize(("coming", "runs"), [(math.inf, True), (0.9, True), (0.8, False), (0.0, False)])
def test_fills_run_by_themselves_only_where_they_delay_nobody(coming: float, runs: bool) -> None:
    assert (choose(wait(1, 4, "fill"), seconds=1.0, coming=coming) is not None) is runs
    assert choose(wait(1, 4, "fill", pressed=True), seconds=1.0, coming=coming) is not None
    half = choose(wait(1, 8, "fill"), seconds=2.0, coming=coming)  # half of the stage
    assert (half is not None) is runs


def test_fills_ride_along_unless_they_would_stop_the_pass() -> None:
    rider, stopped = wait(2, 4, "fill", 3), wait(3, 4, "fill")
    found = choose(wait(1, 4, "must"), rider, stopped, wait(3, 6, "fill"), coming=0.0, seconds=1.0)
    assert (found and found.last, keys(found)) == (12, [1, 2])
    assert keys(choose(wait(1, 4, "must", 14), rider)) == [1]  # no room


@pytest.mark.parametrize(("worth", "coming", "runs"), [(0.6, 0.5, True), (0.4, 0.5, False), (0.4, 0.7, True)])
def test_drafts_run_where_they_are_worth_the_delay(worth: float, coming: float, runs: bool) -> None:
    assert (choose(wait(1, 4, "draft", worth=worth), seconds=1.0, coming=coming) is not None) is runs
    assert choose(wait(1, 4, "draft"), seconds=1.0, coming=0.0) is not None  # a certain row


def test_drafts_ride_along_where_they_are_worth_their_row() -> None:
    rows = (wait(1, 4, "must"), wait(2, 4, "draft", worth=0.3), wait(3, 4, "draft", worth=0.6))
    assert keys(choose(*rows)) == [1, 3, 2]
    assert keys(choose(*rows, seconds=1.0, row=0.5)) == [1, 3]
    assert keys(choose(*rows, seconds=1.0, row=1.0)) == [1]


def test_a_draft_that_is_not_worth_its_row_does_not_start() -> None:
    assert choose(wait(1, 4, "start", worth=0.2), seconds=1.0, row=0.9) is None
    assert keys(choose(wait(1, 4, "start", worth=0.3), seconds=1.0, row=0.9)) == [1]
    assert keys(choose(wait(1, 4, "start", worth=0.2), seconds=1.0, row=0.1)) == [1]


def test_starts_are_spread_over_the_stages() -> None:
    rows = [wait(key, 4, "start") for key in range(8)]
    assert keys(choose(*rows, stages=4, sequences=8)) == [0, 1]
    assert keys(choose(*rows, stages=4, sequences=9)) == [0, 1, 2]
    assert keys(choose(*rows)) == list(range(8))


def test_more_start_together_where_exits_send_them_back() -> None:
    rows = [wait(key, 4, "start") for key in range(8)]
    spread: dict[str, Any] = dict(stages=4, sequences=8, depth=1.6, seconds=1.0)
    assert keys(choose(*rows, **spread, row=0.1)) == [0, 1, 2, 3, 4]
    assert keys(choose(*rows, **spread, row=0.7)) == [0, 1]  # rows are dearer than passes
    draft = wait(9, 8, "draft", worth=0.5)
    assert keys(choose(*rows, draft, **spread, row=0.1)) == [0, 1, 2, 3, 4]
    assert keys(choose(*rows, draft, **spread, row=0.25)) == [0, 1]
    assert keys(choose(*rows, **spread, row=0.25)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("coming", "idle", "runs"), [(0.3, 0.0, False), (0.3, 0.3, True), (0.6, 0.0, True)])
def test_rows_wait_for_others_only_where_it_is_allowed(coming: float, idle: float, runs: bool) -> None:
    gather: dict[str, Any] = dict(coming=coming, idle=idle, seconds=1.0)
    assert choose(wait(1, 4, "must"), **gather, sequences=2) is not None
    assert (choose(wait(1, 4, "must"), **gather, sequences=2, gather=0.5) is not None) is runs
    assert choose(wait(1, 4, "must"), **gather, sequences=1, gather=0.5) is not None  # alone


# -- properties


@st.composite
def views(draw: st.DrawFn) -> StageView:
    """Any view that an engine could make, and many that it couldn't."""
    places = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), unique=True, max_size=12))
    waiting = []
    for key, layer in sorted(places):
        later = st.lists(st.integers(layer + 1, 8), unique=True, max_size=3).map(sorted).map(tuple)
        waiting.append(
            Waiting(
                key=key, layer=layer, rows=draw(st.integers(1, 40)), kind=draw(st.sampled_from(KINDS)),
                exits=draw(later), worth=draw(st.sampled_from((0.01, 0.3, 0.9, 1.0))),
                pressed=draw(st.integers(0, 7)) == 0, since=draw(st.sampled_from((0.0, 1.0, 2.0))),
            )
        )  # fmt: skip
    return StageView(
        first=0, last=4, waiting=tuple(waiting), seconds=draw(st.sampled_from((0.0, 1.0))),
        row=draw(st.sampled_from((0.0, 0.1, 1.0))), coming=draw(st.sampled_from((0.0, 0.5, math.inf))),
        stages=draw(st.integers(1, 4)), sequences=draw(st.integers(0, 8)), depth=draw(st.sampled_from((0.0, 1.5))),
    )  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(views(), st.integers(1, 20), st.integers(1, 8))
def test_every_pass_keeps_the_rules(stage: StageView, max_rows: int, chunk: int) -> None:
    limits = Limits(max_rows=max_rows, prefill_chunk=chunk)
    found = next_stage_pass(stage, limits)
    assert found == next_stage_pass(stage, limits)
    if found is None:
        assert not any(one.goes for one in stage.waiting)
        drafts = all(one.kind == "start" for one in stage.waiting)
        assert drafts or stage.coming < math.inf
        return
    assert stage.first <= found.first < found.last <= stage.last
    here = {one.key: one for one in stage.waiting if one.layer == found.first}
    members = {member.key: member for member in found.members}
    assert len(members) == len(found.members) > 0
    assert members.keys() <= here.keys()
    if any(one.goes for one in stage.waiting):
        assert any(here[key].goes for key in members)
    assert found.rows <= max_rows
    assert sum(member.rows for member in found.members if here[member.key].kind == "prompt") <= chunk
    for member in found.members:
        one = here[member.key]
        assert 1 <= member.rows <= one.rows
        whole = member.rows == one.rows
        assert whole or one.kind == "prompt" or one.rows > max_rows
        older = [other.layer for other in stage.waiting if other.key == one.key and other.layer > found.first]
        assert all(layer >= found.last for layer in older), "rows would overtake older ones"
        if whole and one.exits:
            assert one.exits[0] >= found.last, "a test was missed"
        assert member.tested == (whole and one.exits[:1] == (found.last,))
    stops = [stage.last]
    for one in stage.waiting:
        stops += [one.layer] * (one.key in members and one.layer > found.first)
    stops += [
        here[key].exits[0] for key, member in members.items() if member.rows == here[key].rows and here[key].exits
    ]
    assert found.last == min(stops), "the pass stops early or late"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(2, 8))
def test_rows_that_have_to_go_are_never_starved(seed: int, max_rows: int, sequences: int) -> None:
    """A stage in which every sequence that leaves comes back at once, at either boundary and as any kind."""
    rng = random.Random(seed)
    limits = Limits(max_rows=max_rows, prefill_chunk=rng.randint(1, 8))

    def fresh(key: int) -> Waiting:
        return wait(key, 0, rng.choice(("start", "prompt", "must")), rng.randint(1, 6), exits=rng.choice(((), (2,))))

    waiting = {key: fresh(key) for key in range(sequences)}
    for clock in range(300):
        view = StageView(
            first=0, last=4, waiting=tuple(waiting.values()), stages=rng.randint(1, 4), sequences=sequences
        )
        found = next_stage_pass(view, limits)
        assert found is not None
        moved = {member.key: member for member in found.members}
        for key, one in list(waiting.items()):
            if key not in moved:
                continue
            if moved[key].rows < one.rows:  # the others stay, and wait as before
                waiting[key] = replace(one, rows=one.rows - moved[key].rows)
            elif found.last < 4:
                waiting[key] = replace(one, layer=2, kind="must", exits=(), since=clock)
            else:
                waiting[key] = replace(fresh(key), since=clock)
        assert clock - min(one.since for one in waiting.values()) <= 12 * sequences
