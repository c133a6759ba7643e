"""The scheduler against closed forms, fixed policies and plain decoding, on a simulated engine; and single choices."""

import dataclasses
import itertools
import random
from typing import Any

import pytest

from exitlm.decode.pricing.costs import Costs
from exitlm.decode.pricing.scheduler import Exit, Limits, Member, Pass, Rate, SequenceView, next_pass
from tests.decode.simulation import (
    CPU,
    GPU,
    TABLES,
    Simulated,
    Simulation,
    best_fixed,
    best_predicted,
    cost_table,
    latencies,
    predicted,
    speed,
    steady,
)

WAIT = 0.25
CASES = [
    (wait, name, B, mode, firing, acceptance)
    for wait, name, B in itertools.product((WAIT, None), TABLES, (1, 2, 4, 8, 64))
    for mode, firings, acceptances in (
        ("threshold", (0.3, 0.5, 0.7, 0.9), (1.0,)),
        ("lossless", (0.5, 0.8, 1.0), (0.3, 0.5, 0.7, 0.9)),
    )
    for firing, acceptance in itertools.product(firings, acceptances)
]


def check_against_the_formula(
    wait: float | None, name: str, sequences: int, mode: str, firing: float, acceptance: float, tokens: int
) -> None:
    """At least 0.95 of S at the best k that the bound allows, 0.98 of plain decoding, and no row waits longer."""
    costs = TABLES[name]
    bound, _ = best_predicted(costs, sequences, firing, acceptance, wait)
    run = steady(costs, sequences, mode, firing, acceptance, tokens=max(tokens, 60 * sequences), wait=wait)
    assert speed(run) >= 0.95 * bound
    assert speed(run) >= 0.98
    if wait is not None:
        assert run.max_wait <= wait * (1 + 1e-6)


@pytest.mark.parametrize("case", CASES[::13], ids=str)
def test_the_formula_is_reached(case: tuple[float | None, str, int, str, float, float]) -> None:
    check_against_the_formula(*case, tokens=2000)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_formula_is_reached_everywhere(case: tuple[float | None, str, int, str, float, float]) -> None:
    check_against_the_formula(*case, tokens=4000)


def test_the_formula_is_that_of_the_design() -> None:
    """Its table of S at the best k, to the two digits that it gives."""
    expected = {"cpu": (1.87, 1.46, 1.17, 1.08, 1.0), "gpu": (2.11, 1.73, 1.50, 1.46, 1.46)}
    for name, values in expected.items():
        found = [best_predicted(TABLES[name], B, 0.7)[0] for B in (1, 2, 4, 8, 64)]
        assert found == pytest.approx(values, abs=0.02)
    assert best_predicted(TABLES["cpu"], 1, 1.0, 0.7)[0] == pytest.approx(1.31, abs=0.005)
    assert predicted(TABLES["cpu"], 8, 1, 0.5) == pytest.approx(1.0)


FIXED = [
    (name, B, *rest)
    for name, B, rest in itertools.product(
        ("cpu", "gpu"), (1, 2, 4, 8, 32), (("threshold", 0.7, 1.0), ("threshold", 0.9, 1.0), ("lossless", 0.8, 0.7),
                                           ("lossless", 1.0, 0.9), ("lossless", 0.5, 0.5)),
    )
]  # fmt: skip


def check_against_fixed_policies(
    name: str, sequences: int, mode: str, firing: float, acceptance: float, most: int
) -> None:
    costs, tokens = TABLES[name], max(2000, 100 * sequences)
    best = best_fixed(costs, sequences, mode, firing, acceptance, tokens, most)
    assert speed(steady(costs, sequences, mode, firing, acceptance, tokens=tokens, wait=None)) >= 0.95 * best


@pytest.mark.parametrize("case", FIXED[3::16], ids=str)
def test_no_fixed_policy_is_much_better(case: tuple[str, int, str, float, float]) -> None:
    check_against_fixed_policies(*case, most=4)


@pytest.mark.slow
@pytest.mark.parametrize("case", FIXED, ids=str)
def test_no_fixed_policy_is_much_better_anywhere(case: tuple[str, int, str, float, float]) -> None:
    check_against_fixed_policies(*case, most=10)


# ---- never below plain decoding


def drawn_times(rng: random.Random) -> dict[int, float]:
    """The time of a pass by rows: some shape that hardware has."""
    rows, slope, tile = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 512), rng.random(), rng.choice((4, 8, 16, 64))
    shapes: list[dict[int, float]] = [
        {n: 1 + slope * (n - 1) for n in rows},
        {n: 1 + slope * ((n - 1) // tile) for n in rows},
        {n: max(1.0, n / tile) for n in rows},
        {n: n**slope for n in rows},
        CPU,
        GPU,
    ]
    return rng.choice(shapes)


MODES = (("lossless",), ("lossless",), ("threshold",), ("full", "lossless"), ("full", "threshold", "lossless"))


def drawn_company(rng: random.Random) -> tuple[Costs, list[dict[str, Any]], float]:
    """A table, sequences that arrive in some pattern, and the share of a pass that the tests of ``threshold`` cost."""
    layers = rng.choice((4, 8))
    costs = cost_table(
        drawn_times(rng), layers, head=rng.choice((0.0, 0.1, 0.25)), test=rng.choice((0.0, 0.0, 0.01, 0.03))
    )
    exits = sorted(rng.sample(range(1, layers), rng.choice((1, 1, 2, 3))))
    modes = rng.choice(MODES)
    pattern, count = rng.choice(("together", "staggered", "random", "burst")), rng.choice((1, 2, 4, 8, 16, 40))
    gap, firing, right = rng.choice((0.3, 3.0, 20.0)), rng.random(), rng.random()
    copied = (rng.random(), 4, rng.random()) if rng.random() < 0.3 else (0.0, 0, 0.0)
    sequences, at = [], 0.0
    for i in range(count):
        if pattern == "staggered":
            at += gap
        elif pattern == "random":
            at += rng.expovariate(1 / gap)
        elif pattern == "burst":
            at = 0.0 if i < count // 2 else 50.0
        sequences.append(
            dict(
                key=i, mode=rng.choice(modes), length=rng.choice((500, 800)), arrival=at,
                prompt=0 if pattern == "together" else rng.choice((0, 5, 40, 300)), prior=rng.choice((0.3, 0.5, 0.7)),
                firing={e: min(1.0, firing * rng.uniform(0.8, 1.2)) for e in exits},
                right={e: min(1.0, right * rng.uniform(0.8, 1.2)) for e in exits},
                copied=copied,
            )
        )  # fmt: skip
    tests = sum(costs.test[e] for e in exits) / costs.full() if "threshold" in modes else 0.0
    return costs, sequences, tests


def check_against_plain(seed: int) -> None:
    """By the time that decoding took, and where all are alike also by latencies from arrival to end."""
    costs, sequences, tests = drawn_company(random.Random(seed))
    ones, plain = ([Simulated(**{**one, **over}) for one in sequences] for over in ({}, {"mode": "full"}))
    run, reference = Simulation(costs, seed=seed), Simulation(costs, seed=seed)
    run.run(ones)
    reference.run(plain)
    assert speed(reference) == pytest.approx(1.0, rel=1e-3)
    assert speed(run) * (1.0 + tests) >= 0.98
    if len({one.mode for one in ones}) == 1:
        assert latencies(plain) / latencies(ones) * (1.0 + tests) >= 0.97
    assert run.max_wait <= WAIT * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_never_below_plain_decoding(seed: int) -> None:
    check_against_plain(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 100))
def test_never_below_plain_decoding_in_any_company(seed: int) -> None:
    check_against_plain(seed)


def endless(count: int, mode: str, firing: float, right: float, **options: Any) -> list[Simulated]:
    return [
        Simulated(key=i, mode=mode, length=10**9, firing={1: firing}, right={1: right}, **options) for i in range(count)
    ]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("refresh", [False, True])
def test_a_table_that_is_wrong_costs_little(count: int, refresh: bool) -> None:
    """It says that rows are free, while each costs a full price: the guard stops drafting for longer and longer."""
    run = Simulation(TABLES["gpu"], device=TABLES["dear"], refresh=refresh)
    run.run(endless(count, "lossless", 1.0, 0.9), 6000 * count)
    assert speed(run) >= 0.97
    assert run.rate.pause > 1000


def test_a_machine_that_is_slower_than_its_table_still_drafts() -> None:
    run = Simulation(TABLES["cpu"], device=dataclasses.replace(TABLES["cpu"], speed=3.0), refresh=True)
    run.run(endless(1, "lossless", 1.0, 0.9), 2000)
    assert speed(run) > 0.95 * best_predicted(TABLES["cpu"], 1, 1.0, 0.9)[0]


def test_copied_drafts_gain_where_they_are_right() -> None:
    for costs, count, least in ((TABLES["cpu"], 1, 1.8), (TABLES["gpu"], 8, 2.8)):
        run = Simulation(costs)
        run.run(endless(count, "lossless", 0.0, 0.0, copied=(0.5, 8, 0.9)), 1000 * count)
        assert speed(run) > least


def test_the_same_inputs_give_the_same_passes() -> None:
    clocks = [steady(TABLES["cpu"], 4, "lossless", 0.8, 0.7, tokens=500, wait=WAIT).clock for _ in range(2)]
    assert clocks[0] == clocks[1]


# ---- prompts


def drafting(value: float, key: int = 0, **options: Any) -> SequenceView:
    """A sequence with one pending certain row behind exit 1, and a draft of this value that is ready."""
    options = {"exits": (Exit(layer=1),), **options}
    return SequenceView(key=key, mode="lossless", ready=(value,), waiting=((1, 1),), worth=(1.0,), **options)


def prompt(rows: int, key: int = 99) -> SequenceView:
    """A prompt whose chunk waits at boundary 1."""
    return SequenceView(key=key, mode="full", prefill=True, prompt=1000, waiting=((1, rows),), moving=rows)


def break_even(views: list[SequenceView], costs: Costs, limits: Limits) -> float:
    """The value from which the draft of the first sequence is started."""
    low, high = 0.0, 2.0
    for _ in range(40):
        value = (low + high) / 2
        found = next_pass([dataclasses.replace(views[0], ready=(value,)), *views[1:]], costs, Rate(), limits)
        assert found is not None
        low, high = (low, value) if found.first == 0 else (value, high)
    return high


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("rows", [1, 7, 60, 190, 400])
def test_a_prompt_moves_a_draft_by_its_price_and_no_more(name: str, rows: int) -> None:
    """The draft's row costs what it adds to a deep pass that the prompt has made larger; plain speed stays the same."""
    costs, limits = TABLES[name], Limits(max_wait=1e9)
    second = 1.0 / costs.full(1)
    moved = break_even([drafting(0.5), prompt(rows)], costs, limits) - break_even([drafting(0.5)], costs, limits)
    price = costs.deep(1, rows + 2) - costs.deep(1, rows + 1) - (costs.deep(1, 2) - costs.deep(1, 1))
    assert moved == pytest.approx(second * price, abs=1e-6)


def test_a_burst_of_prompts_leaves_the_gain_alone() -> None:
    """Decoding is judged by its own rows' time: drafting goes on as if the prompts were not there."""
    rates = []
    for burst in (0, 12):
        run = Simulation(TABLES["gpu"])
        prompts = [Simulated(key=10 + i, mode="full", length=1, prompt=600, arrival=200.0) for i in range(burst)]
        run.run([*endless(4, "lossless", 1.0, 0.7, known=True), *prompts], 3000)
        rates.append((run.rate.gain, run.rate.pause))
    assert rates[1][0] == pytest.approx(rates[0][0], rel=0.05)
    assert rates[1][1] == rates[0][1]


# ---- single choices


def full(key: int, **options: Any) -> SequenceView:
    return SequenceView(key=key, mode="full", **{"ready": (1.0,), **options})


def threshold(key: int, **options: Any) -> SequenceView:
    return SequenceView(key=key, mode="threshold", **{"exits": (Exit(layer=1), Exit(layer=3)), **options})


def plan(*views: SequenceView, costs: Costs = TABLES["cpu"], rate: Rate | None = None, **limits: Any) -> Pass:
    found = next_pass(views, costs, rate or Rate(), Limits(**limits))
    assert found is not None
    return found


def test_full_sequences_go_to_the_end_at_once_and_prompts_join() -> None:
    waiting = SequenceView(key=7, mode="full", prefill=True, prompt=300)
    assert plan(full(1), full(2)) == Pass(first=0, last=4, members=(Member(key=1, rows=1), Member(key=2, rows=1)))
    found = plan(full(1), waiting, dataclasses.replace(waiting, key=8), prefill_chunk=400, max_rows=350)
    assert [(member.key, member.rows) for member in found.members] == [(1, 1), (7, 300), (8, 49)]
    assert next_pass([], TABLES["cpu"], Rate(), Limits()) is None
    assert next_pass([full(1, ready=())], TABLES["cpu"], Rate(), Limits()) is None


def test_rows_beyond_a_pass_take_turns() -> None:
    views = [full(i) for i in range(10)]
    served: list[int] = []
    for _ in range(10):
        found = plan(*views, max_rows=3)
        keys = {member.key for member in found.members}
        assert found.rows == 3
        served += keys
        views = [dataclasses.replace(v, waited=0.0 if v.key in keys else v.waited + 1.0) for v in views]
    assert {served.count(i) for i in range(10)} <= {2, 3, 4}


def test_a_pass_ends_where_something_must_happen() -> None:
    """At an exit that is tested, at rows that come along, and where others wait."""
    assert plan(threshold(1, ready=(1.0,)), full(2)).last == 1
    moving = threshold(1, waiting=((3, 2), (1, 1)), moving=3)
    assert plan(moving) == Pass(first=1, last=3, members=(Member(key=1, rows=1, tested=True),))
    arrived = threshold(1, waiting=((3, 3),), moving=3)
    assert plan(arrived) == Pass(first=3, last=4, members=(Member(key=1, rows=3),))
    other = full(2, ready=(), waiting=((2, 1),), moving=1)
    assert plan(dataclasses.replace(moving, exits=()), other).last == 2
    along = full(2, ready=(), waiting=((1, 1),), moving=1)
    assert plan(moving, along).members == (Member(key=1, rows=1, tested=True), Member(key=2, rows=1))


def test_fired_rows_start_again_unless_a_row_has_waited_too_long() -> None:
    fired = [threshold(i, ready=(1.0,), waiting=((1, 1),)) for i in range(7)]
    row = full(9, ready=(), waiting=((1, 1),), moving=1)
    start = plan(*fired, row)
    assert (start.first, start.last, start.rows) == (0, 1, 7)
    assert all(member.tested for member in start.members)
    late = dataclasses.replace(row, waited=0.1)
    assert plan(*fired, late).first == 1
    assert plan(*fired, late, max_wait=1.0).first == 0
    few = plan(fired[0], *(dataclasses.replace(row, key=20 + i) for i in range(7)))
    assert few.first == 1  # one token is not worth a pass that 8 sequences pay for


def test_pending_rows_of_others_ride_only_where_they_are_free() -> None:
    fired = threshold(1, ready=(1.0,), waiting=((1, 5),))
    row = full(9, ready=(), waiting=((1, 1),), moving=1, waited=1.0)
    assert plan(fired, row, costs=TABLES["cpu"]).rows == 1
    assert plan(fired, row, costs=TABLES["gpu"]).rows == 6
    assert plan(fired, row, costs=TABLES["gpu"], max_rows=4).rows == 4
    full_up = dataclasses.replace(fired, moving=5)  # the cap on pending rows
    assert plan(full_up, row).rows == 6


def test_drafts_are_admitted_by_falling_worth_while_they_pay() -> None:
    one = SequenceView(key=1, mode="lossless", waiting=((1, 4),), worth=(1.0, 0.9, 0.8, 0.01))
    two = SequenceView(key=2, mode="lossless", waiting=((1, 3),), worth=(1.0, 0.5, 0.02))
    assert [member.rows for member in plan(one, two).members] == [3, 2]
    assert [member.rows for member in plan(one, two, costs=TABLES["gpu"]).members] == [4, 3]
    assert [member.rows for member in plan(one, two, costs=TABLES["dear"]).members] == [3, 1]


def test_copied_drafts_start_while_they_pay() -> None:
    view = SequenceView(key=1, mode="lossless", ready=(1.0, 0.9, 0.8, 0.05, 0.04))
    assert plan(view).members == (Member(key=1, rows=3),)
    assert plan(view, costs=TABLES["dear"]).rows == 1
    assert plan(view, costs=TABLES["gpu"]).rows == 5
    assert plan(view, rate=Rate(paused=5.0)).rows == 1


@pytest.mark.parametrize("test", [0.0, 0.1, 0.4])
def test_lossless_tests_where_a_draft_is_expected_to_pay_for_it(test: float) -> None:
    costs = cost_table(CPU, test=test)
    least = costs.span(0, 1, 1) + costs.deep(1, 2) - costs.deep(1, 1)
    for firing, acceptance in itertools.product((0.2, 0.6, 1.0), (0.2, 0.4, 0.6, 0.8, 0.95)):
        exits = (Exit(layer=1, firing=firing, acceptance=acceptance),)
        found = plan(SequenceView(key=1, mode="lossless", ready=(1.0,), exits=exits), costs=costs)
        pays = firing * (acceptance - least) > test and acceptance > least
        assert found.members[0].tested == pays
        assert found.last == (1 if pays else 4)
        assert (
            not plan(
                SequenceView(key=1, mode="lossless", ready=(1.0,), exits=exits), costs=costs, rate=Rate(paused=1.0)
            )
            .members[0]
            .tested
        )


def test_a_draft_is_shared_by_all_who_make_it() -> None:
    """What one sequence of eight can't pay for, all eight can."""
    costs = TABLES["gpu"]
    assert plan(*(drafting(0.6, key) for key in range(8)), costs=costs).rows == 8
    alone = plan(drafting(0.6), *(full(i, ready=(), waiting=((1, 1),), moving=1) for i in range(1, 8)), costs=costs)
    assert alone.first == 1


# ---- the gain and the guard


def test_the_gain_follows_what_was_planned() -> None:
    rate = Rate()
    for _ in range(200):
        rate = rate.observed(expected=1.5, done=1.0, predicted=1.0, measured=1.0)
    assert rate.gain == pytest.approx(1.5, rel=0.01)
    for _ in range(200):
        rate = rate.observed(expected=0.5, done=1.0, predicted=1.0, measured=1.0)
    assert rate.gain == 1.0


def drafting_steps(rate: Rate, steps: int, done: float) -> list[bool]:
    """Whether drafting was on before each step, where drafting brings ``done`` tokens a step."""
    on = []
    for _ in range(steps):
        on.append(rate.drafts)
        tokens = done if rate.drafts else 1.0
        rate = rate.observed(expected=tokens, done=tokens, predicted=1.0, measured=1.0)
    return on


def test_the_guard_stops_what_loses_for_times_that_double() -> None:
    on = drafting_steps(Rate(), 3000, 0.9)
    pauses = [len(list(run)) for drafts, run in itertools.groupby(on) if not drafts]
    assert pauses[:4] == [64, 128, 256, 512]
    losing = [len(list(run)) for drafts, run in itertools.groupby(on) if drafts]
    assert max(losing) <= 110
    assert all(drafting_steps(Rate(), 500, 0.99))
    assert all(drafting_steps(Rate(), 500, 1.2))
    assert drafting_steps(Rate(), 40, 0.0).count(True) == 40  # no tokens yet: not judged
    assert drafting_steps(Rate(), 40, 0.2).count(True) < 15  # what loses much is not watched for long


def test_a_window_that_gains_forgets_earlier_pauses() -> None:
    rate = Rate(pause=1024.0)
    for _ in range(80):
        rate = rate.observed(expected=1.1, done=1.1, predicted=1.0, measured=1.0)
    assert rate.pause == 64.0
