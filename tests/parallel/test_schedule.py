"""Schedules as data: whole, free of deadlock, as long as theory says, and drawn."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm import cli
from exitlm.errors import UserError
from exitlm.parallel.pipeline.schedule import (
    NAMES,
    Action,
    Schedule,
    check,
    drawn,
    fill_room,
    filled,
    gpipe,
    make,
    max_microbatches,
    simulate,
)

SHAPES = st.tuples(st.sampled_from(NAMES), st.integers(1, 8), st.integers(1, 4), st.floats(0.5, 4.0))


@settings(deadline=None)  # the first call imports torch
@given(SHAPES)
def test_every_schedule_is_whole_and_comes_to_its_end(shape: tuple[str, int, int, float]) -> None:
    name, pipeline, rounds, ratio = shape
    schedule = make(name, pipeline, pipeline * rounds, ratio=ratio)
    check(schedule)
    timeline = simulate(schedule, 1.0, ratio)
    work = pipeline * rounds * (1.0 + ratio)  # of the full microbatches, on each rank
    assert timeline.makespan >= work - 1e-9
    assert 0.0 < timeline.utilisation <= 1.0 + 1e-9
    assert len(drawn(timeline)) == pipeline


@given(st.integers(1, 16), st.integers(1, 40), st.floats(0.25, 4.0))
def test_one_forward_one_backward_takes_what_theory_says(pipeline: int, microbatches: int, ratio: float) -> None:
    expected = (microbatches + pipeline - 1) * (1.0 + ratio)
    for name in ("gpipe", "1f1b"):
        assert simulate(make(name, pipeline, microbatches), 1.0, ratio).makespan == pytest.approx(expected)


@given(st.integers(1, 16), st.integers(1, 3), st.floats(0.25, 4.0))
def test_filled_bubbles_cost_no_time(pipeline: int, rounds: int, ratio: float) -> None:
    """As many as fit, from P microbatches on, leave the makespan as it is."""
    microbatches = pipeline * rounds
    plain = simulate(make("1f1b", pipeline, microbatches), 1.0, ratio)
    timeline = simulate(make("filled", pipeline, microbatches, ratio=ratio), 1.0, ratio)
    assert timeline.makespan == pytest.approx(plain.makespan)
    assert timeline.utilisation >= plain.utilisation - 1e-9


@pytest.mark.parametrize(
    ("warmup", "cooldown", "utilisation"), [(0, 0, 24 / 33), (2, 0, 0.80), (0, 2, 0.83), (2, 2, 0.90)]
)
def test_the_published_example(warmup: int, cooldown: int, utilisation: float) -> None:
    timeline = simulate(filled(4, 8, warmup, cooldown), 1.0, 2.0)
    assert timeline.makespan == 33.0
    assert timeline.utilisation == pytest.approx(utilisation, abs=0.01)


def test_how_many_fit() -> None:
    assert [fill_room(pipeline, 2.0) for pipeline in (1, 2, 4, 8, 16)] == [0, 0, 2, 4, 10]


def test_a_top_microbatch_reaches_an_exit() -> None:
    for first, tops in ((0, [2, 1, 0]), (1, [2, 1]), (2, [2]), (3, []), (7, [])):
        made = filled(8, 8, 3, 1, first_exit=first)
        check(made)
        assert [hi for lo, hi in made.spans.values() if hi < 7] == tops
        assert (made.filled_warmup, made.filled_cooldown) == (len(tops), 1)
        assert simulate(made).makespan == simulate(make("1f1b", 8, 8)).makespan


def test_one_more_than_fits_takes_longer() -> None:
    for warmup, cooldown in ((3, 0), (0, 3)):
        assert simulate(filled(4, 8, warmup, cooldown), 1.0, 2.0).makespan > 33.0


def test_uneven_stages() -> None:
    """A slow stage sets the pace: the steady state takes its time for every microbatch."""
    timeline = simulate(make("1f1b", 4, 16), [1.0, 1.0, 1.5, 1.0], [2.0, 2.0, 3.0, 2.0])
    assert timeline.makespan >= 16 * 4.5
    assert timeline.makespan <= 16 * 4.5 + 3 * 3.0


def test_what_is_wrong_is_named() -> None:
    whole = gpipe(2, 2)
    check(whole)
    first = whole.ranks[0]
    for ranks, says in (
        ((first[:-1], whole.ranks[1]), "B of microbatch 1 on stage 0 is missing"),
        (((*first, first[0]), whole.ranks[1]), "is there twice"),
        (((*first, Action("F", 0, 7)), whole.ranks[1]), "F of microbatch 7 on stage 0 is too much"),
        ((first, (*whole.ranks[1], Action("B", 0, 5))), "stage 0 is on ranks 0 and 1"),
    ):
        with pytest.raises(ValueError, match=says):
            check(dataclasses.replace(whole, ranks=ranks))


def test_a_deadlock_is_named() -> None:
    ranks = ((Action("F", 0, 0), Action("B", 0, 0)), (Action("B", 1, 0), Action("F", 1, 0)))
    schedule = Schedule(name="wrong", stages=2, ranks=ranks, spans={0: (0, 1)})
    check(schedule)
    with pytest.raises(
        ValueError, match="deadlock: rank 0 at B of microbatch 0 on stage 0, rank 1 at B of microbatch 0"
    ):
        simulate(schedule)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("2f2b", 4, 8), "did you mean '1f1b'"),
        (("1f1b", 0, 8), "at least 1"),
        (("interleaved", 4, 9), "can't run 9 microbatches on 4 ranks"),
        (("1f1b", 4, 100_000_000), "100000000 microbatches are too many for schedule '1f1b' on 4 ranks; use at most"),
        (("tuning", 1, 10**30), "use at most 16384"),
        (("gpipe", 512, 16384), "use at most 512"),
        (("zbv", 2, 1 << 14), "use at most 2048"),
        (("zero_bubble", 256, 2048), "use at most 256"),
        (("1f1b", 10**30, 1), "ranks are too many for schedule '1f1b', which has at most 1024 stages; use fewer"),
        (("interleaved", 1024, 8), "1024 ranks are too many"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, int, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make(*arguments)


def test_more_than_fits_is_refused() -> None:
    with pytest.raises(UserError, match="use 0 to 2"):
        make("filled", 4, 8, fill_warmup=3)
    with pytest.raises(UserError, match="fills no bubbles"):
        make("gpipe", 4, 8, fill_warmup=1)
    with pytest.raises(UserError, match="use 0 to 2"):
        make("filled", 4, 8, fill_cooldown=10**30)


@pytest.mark.parametrize("ratio", [float("nan"), float("inf"), -1.0, 0.0, 1e308, 1e-9])
def test_a_ratio_that_no_model_has_is_refused(ratio: float) -> None:
    for name in ("1f1b", "filled"):
        with pytest.raises(UserError, match=re.escape(f"is {ratio}, but must be a positive number from 0.001 to 1000")):
            make(name, 4, 8, ratio=ratio)


def test_large_runs_are_allowed() -> None:
    for name, pipeline, microbatches in (("1f1b", 16, 8192), ("filled", 128, 1024), ("1f1b", 512, 512)):
        assert max_microbatches(name, pipeline) >= microbatches
    for pipeline, microbatches in ((8, 1024), (64, 512), (256, 256)):
        assert max_microbatches("zbv", 2 * pipeline) >= microbatches
    timeline = simulate(make("1f1b", 64, 512))
    assert timeline.makespan == (512 + 63) * 3.0


def test_a_long_schedule_is_cut_in_the_middle() -> None:
    lines = drawn(simulate(make("1f1b", 100, 200), 1.0, 1000.0))
    assert len(lines) == 65
    assert {len(line) for line in lines if line != "…"} == {240 + len("rank  0 ||…")}
    assert lines[0].startswith("rank  0 |012345")
    assert lines[32] == "…"
    assert lines[33].startswith("rank 68 |")
    assert all(line.count("…") == 1 for line in lines)
    last = lines[-1]
    assert last[len("rank 99 |") :].startswith("·" * 99 + "0[0-----")
    assert last.endswith("·|")
    short = drawn(simulate(make("1f1b", 2, 2)))
    assert short == ["rank  0 |0   1   ········[0------····[1------|", "rank  1 |····0   [0------1   [1------········|"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["schedule", "--pipeline", "4", "--microbatches", "8", "--schedule", "filled"]
    assert cli.main([*command, "--json", "--png", str(tmp_path / "filled.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["makespan"], found["baseline_makespan"]) == (33.0, 33.0)
    assert (found["filled_warmup"], found["filled_cooldown"]) == (2, 2)
    assert found["utilisation"] == pytest.approx(0.90, abs=0.01)
    assert found["baseline_utilisation"] == pytest.approx(0.727, abs=0.001)
    assert (tmp_path / "filled.png").stat().st_size > 10_000
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert text.count("rank ") >= 8
    assert "from 8 to 12" in text
    assert cli.main([*command, "--fill-warmup", "9"]) == 2
    assert "use 0 to 2" in capsys.readouterr().err


def test_a_command_without_bounds_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["schedule", "--pipeline", "8", "--microbatches"]
    assert cli.main([*command, "100000000"]) == 2
    assert "100000000 microbatches are too many for schedule '1f1b' on 8 ranks; use at" in capsys.readouterr().err
    assert cli.main([*command, "1024", "--png", str(tmp_path / "large.png")]) == 2
    captured = capsys.readouterr()
    assert "a picture of 16384 pieces of work on 8 ranks can't be read; use fewer microbatches" in captured.err
    assert (captured.out, list(tmp_path.iterdir())) == ("", [])
    assert cli.main([*command, "1024"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 300
