"""The cost table, what it says of exits, and the file it is kept in."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from exitlm.decode.cache.block_table import BlockTable
from exitlm.decode.kernels.fused import FusedModel
from exitlm.decode.kernels.runner import Runner
from exitlm.decode.pricing import measure_costs
from exitlm.decode.pricing.costs import Costs, choose_drafting
from exitlm.decode.pricing.measure_costs import SIZES, cached, ideal, measure
from exitlm.model import Calibration, EarlyExitModel
from exitlm.model.exits import ExitConfig
from tests.decode.driver import Driver, make_runner
from tests.decode.models import attach, random_ids, worst
from tests.model.families import tiny_model


def table(row: float = 0.0, layers: int = 10, head: float = 3.0, test: float = 0.1, draft: float = 0.5) -> Costs:
    """A layer costs 1 and ``row`` more for each row beyond the first."""
    sizes = (1, 2, 4, 8, 16)
    return Costs(
        rows=sizes, layer=(tuple(1 + row * (m - 1) for m in sizes),), head=tuple(head + m - 1 for m in sizes),
        test=dict.fromkeys(range(1, layers), test), draft=dict.fromkeys(range(1, layers), draft),
        num_hidden_layers=layers,
    )  # fmt: skip


def test_costs_between_and_beyond_the_measured_rows() -> None:
    costs = table(0.5)
    assert [costs.layers(1, m) for m in (1, 2, 3, 4, 6, 16)] == pytest.approx([1, 1.5, 2.0, 2.5, 3.5, 8.5])
    assert costs.layers(3, 32) == pytest.approx(3 * 17.0)
    assert costs.full(2) == pytest.approx(10 * 1.5 + 4)
    assert costs.deep(7, 4) == pytest.approx(3 * 2.5 + 6)
    assert costs.draft_cost(4) == pytest.approx(4 + 0.5 + (6 * 1.5 + 4) - (6 + 3))


def test_costs_by_context() -> None:
    near = table(0.5)
    columns = (*near.layer, tuple(t + m for m, t in zip(near.rows, near.layer[0], strict=True)))
    costs = dataclasses.replace(near, contexts=(100, 300), layer=columns)
    assert [costs.span(2, 5, 2, context) for context in (0, 100, 200, 300, 500)] == pytest.approx(
        [3 * t for t in (1.5, 1.5, 2.5, 3.5, 5.5)]
    )
    assert costs.span(0, 1, 3, 200) == pytest.approx(2.0 + 1.5)
    assert costs.span(0, 1, 32, 300) == pytest.approx(2 * (8.5 + 16))
    assert costs.full(4, 300) == pytest.approx(10 * 6.5 + 6)
    assert costs.span(4, 4, 3) == costs.span(0, 4, 0) == costs.final(0) == 0.0


def test_the_tests_of_many_rows_grow_as_the_final_head() -> None:
    costs = table(test=0.1, draft=0.5)
    assert costs.tests(3) == 0.5
    assert costs.tests(3, 4) == pytest.approx(0.5 * 6 / 3)
    assert costs.tests(3, 4, draft=False) == pytest.approx(0.1 * 6 / 3)


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_passes_refresh_the_table(rows: int, factor: float) -> None:
    """What passes of so many rows take is learnt; the table never falls with rows, and keeps its shape elsewhere."""
    costs, goal = table(0.3), factor * table(0.3).span(0, 10, rows)
    for _ in range(100):
        costs = costs.observed(costs.span(0, 10, rows), goal, rows)
        assert list(costs.layer[0]) == sorted(costs.layer[0])
    assert costs.span(0, 10, rows) == pytest.approx(goal, rel=0.02)


def test_a_slow_machine_changes_all_cells_alike_and_an_interrupted_pass_little() -> None:
    before = table(0.3)
    costs = before.observed(1.0, 1e6, 4)
    assert costs.span(0, 10, 4) < 1.3 * before.span(0, 10, 4)
    for _ in range(200):
        for rows in (1, 2, 4, 8, 16):
            costs = costs.observed(costs.span(0, 10, rows), 2.0 * before.span(0, 10, rows), rows)
    for rows in range(1, 17):
        assert costs.span(0, 10, rows) == pytest.approx(2.0 * before.span(0, 10, rows), rel=0.02)


def test_the_threshold_from_which_drafting_gains_most() -> None:
    costs = table()
    curve = Calibration(scores=(0.2, 0.5, 0.9), coverage=(0.9, 0.6, 0.2), precision=(0.3, 0.9, 0.99))
    gains = [c * (p * costs.full() - costs.draft_cost(4)) for c, p in zip(curve.coverage, curve.precision, strict=True)]
    assert gains.index(max(gains)) == 1
    free, dear = {4: 0.0}, {4: 10 * costs.full()}
    assert choose_drafting(costs, {4: curve}, free) == {4: 0.5}
    assert choose_drafting(costs, {4: curve}, dear) == {}
    never = Calibration(scores=(0.2, 0.9), coverage=(0.9, 0.2), precision=(0.01, 0.02))
    assert choose_drafting(costs, {4: never}, free) == {}


def test_an_exit_that_adds_less_than_its_tests_is_left_out() -> None:
    costs = table()
    curve = Calibration(scores=(0.5,), coverage=(0.6,), precision=(0.9,))
    assert choose_drafting(costs, {2: curve, 4: curve}, {2: 0.01, 4: 0.01}) == {2: 0.5}


def runner_of(model: EarlyExitModel) -> Runner:
    """An eager runner that packs nothing."""
    return make_runner(FusedModel(model, "none"))


def any_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure on a busy machine, too, however long it takes."""
    monkeypatch.setattr(measure_costs, "_MAX_SWITCHES", math.inf)
    monkeypatch.setattr(measure_costs, "_PATIENCE", math.inf)


def test_measured_costs_are_positive_and_never_fall_with_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    any_time_counts(monkeypatch)
    model = attach(tiny_model("llama"), [ExitConfig(layer=1, gate=True), ExitConfig(layer=2, kind="block")])
    found = measure(runner_of(model))
    assert found.num_hidden_layers == 4
    assert found.rows == SIZES
    assert all(list(column) == sorted(column) for column in found.layer)
    assert all(near <= far for near, far in zip(*found.layer, strict=True))
    assert list(found.head) == sorted(found.head)
    assert min(*found.layer[0], *found.head, *found.test.values(), *found.draft.values()) > 0
    assert set(found.test) == set(found.draft) == {1, 2}
    assert found.draft[2] > found.layer[0][0]  # a block costs a layer


def test_measuring_leaves_nothing_behind_that_decoding_could_see() -> None:
    """The blocks that it borrows are free again, and those of a sequence are left alone."""
    runner, text = runner_of(tiny_model("mistral")), random_ids(20)
    driver, reference = Driver(runner), Driver(runner_of(tiny_model("mistral")))
    driver.advance(text[:19])
    used = [allocator.used for allocator in runner.pool.allocators]
    measure(runner)
    assert [allocator.used for allocator in runner.pool.allocators] == used
    reference.advance(text[:19])
    assert worst(driver.advance(text[19:]).hidden_MD, reference.advance(text[19:]).hidden_MD) <= 1e-12


def test_a_full_pool_gives_a_guess_and_loses_no_block() -> None:
    runner = runner_of(tiny_model("llama"))
    (allocator,) = runner.pool.allocators
    table = BlockTable(allocator, runner.pool.block_size)
    assert table.ensure(runner.pool.capacity - 100)
    used = allocator.used
    found = measure(runner)
    assert (found.origin, found.steady) == (measure_costs.NO_ROOM, False)
    assert allocator.used == used
    assert measure_costs.deviation(runner, found) == (1.0, 1.0)


def test_ideal_costs_count_bytes() -> None:
    model = attach(tiny_model("llama"), [ExitConfig(layer=1), ExitConfig(layer=2, candidates=9, output="own")])
    found = ideal(FusedModel(model, "none"))
    layer = 4 * 32 * 4 * 12 + 3 * 32 * 48
    assert found.head[0] == pytest.approx(32 * 97 / layer)
    assert found.draft[2] == pytest.approx(32 * 9 / layer)
    assert found.full(1) == found.full(9)


class Machine:
    """Stands in for the clock: ``rounds`` gives the times of every part in each round of measuring (then the last one),
    and ``passes`` the time of those by which a kept table is checked, as a multiple of what it says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *rounds: list[float], passes: tuple[float, float] = (1.0, 1.0)):
        self.rounds, self.passes, self.timed = list(rounds), passes, 0
        monkeypatch.setattr(measure_costs, "_PATIENCE", math.inf)  # a busy machine must not end it
        monkeypatch.setattr(measure_costs, "_MAX_PASS", math.inf)
        monkeypatch.setattr(measure_costs, "_MAX_PASS", math.inf)
        monkeypatch.setattr(measure_costs, "_seconds", self.seconds)
        monkeypatch.setattr(measure_costs, "deviation", lambda *_: self.passes)

    def seconds(self, action: Any, before: Any, device: Any) -> list[float]:
        """The times of one part."""
        before()
        action()
        self.timed += 1
        return self.rounds[min((self.timed - 1) // self.parts, len(self.rounds) - 1)]

    parts = 2 * len(SIZES) + 2  # of a model with one exit, and the second context


QUIET, BUSY = [1.0, 1.1, 1.05, 1.0, 1.02], [1.5, 9.0, 2.0, 40.0, 3.0]


def some_runner(**exit_settings: Any) -> Runner:
    """A runner with one exit."""
    return runner_of(attach(tiny_model("llama"), [ExitConfig(**{"layer": 1, **exit_settings})]))


def test_a_quiet_machine_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, QUIET)
    found = measure(some_runner())
    assert machine.timed == 2 * machine.parts
    assert found.spread == pytest.approx(0.02)
    assert found.steady
    assert found.origin == "measured"
    assert (found.full(), found.head[0]) == pytest.approx((2.0, 1.0))


def test_a_busy_moment_is_measured_over(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, BUSY, BUSY, QUIET)
    found = measure(some_runner())
    assert machine.timed == 3 * machine.parts
    assert found.steady
    assert found.head[0] == 1.0


def test_a_busy_machine_is_not_measured_for_ever_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, BUSY)
    found = measure(some_runner())
    assert machine.timed == 4 * machine.parts
    assert found.spread == pytest.approx(1.0)
    assert not found.steady
    assert found.head[0] == 1.5


@pytest.mark.parametrize("wrong", ["twice", "once"])
def test_a_part_that_was_slow_all_the_time_is_seen(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """In one of two rounds; or in both, where one row takes longer than two."""
    runner, timed = some_runner(), 0

    def seconds(action: Any, before: Any, device: Any) -> list[float]:
        nonlocal timed
        timed += 1
        first, second = timed == 1, (timed - 1) % Machine.parts == 0
        return [9.0] * 3 if first or (second and wrong == "twice") else [1.0] * 3

    monkeypatch.setattr(measure_costs, "_MAX_PASS", math.inf)
    monkeypatch.setattr(measure_costs, "_seconds", seconds)
    found = measure(runner)
    assert found.steady == (wrong == "once")
    assert timed == (2 if wrong == "once" else 4) * Machine.parts
    assert found.full() == (2.0 if wrong == "once" else 10.0)


def test_what_a_busy_machine_gave_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, BUSY)
    runner = some_runner()
    assert not cached(runner, tmp_path).steady
    assert not (tmp_path / "costs").exists()
    machine.rounds = [QUIET]
    assert cached(runner, tmp_path).origin == "measured"
    assert cached(runner, tmp_path).origin == "kept"


@pytest.mark.parametrize("passes", [(0.2, 0.9), (0.3, 0.3), (2.5, 2.6), (1.0, 1.6)])
def test_a_kept_table_that_passes_deviate_from_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: tuple[float, float]
) -> None:
    machine = Machine(monkeypatch, QUIET)
    runner = some_runner()
    before = cached(runner, tmp_path)
    machine.passes = (0.8, 1.15)
    assert cached(runner, tmp_path) == dataclasses.replace(before, origin="kept")
    machine.passes, machine.rounds = passes, [BUSY]
    busy = cached(runner, tmp_path)  # a busy machine says nothing against a table of a quiet one
    origin = f"kept, though passes take {passes[0]:.2f} to {passes[1]:.2f} times as long as was kept"
    assert busy == dataclasses.replace(before, origin=origin)
    machine.rounds = [[0.5] * 5]
    again = cached(runner, tmp_path)
    assert again.head[0] == 0.5
    assert again.origin == (
        f"measured again, since passes take {passes[0]:.2f} to {passes[1]:.2f} times as long as was kept"
    )
    machine.passes = (1.0, 1.0)
    assert cached(runner, tmp_path) == dataclasses.replace(again, origin="kept")


def test_deviation_is_that_of_the_fastest_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, times = some_runner(), iter([[0.5, 9.0], [], [0.25, 0.3]])
    kept = dataclasses.replace(table(layers=4), layer=((0.25,) * 5,), head=(1.0,) * 5)
    monkeypatch.setattr(measure_costs, "_seconds", lambda *_: next(times))
    assert measure_costs.deviation(runner, kept) == (0.25, 0.5)
    monkeypatch.setattr(measure_costs, "_seconds", lambda *_: [])
    assert measure_costs.deviation(runner, kept) == (1.0, 1.0)  # a busy machine says nothing


def test_times_in_which_the_processor_was_taken_away_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = iter([0, 0, 5, 5, 6, 20, 21, 21])  # before and after each run: none, none, one, one

    monkeypatch.setattr(measure_costs, "_switches", lambda: next(switches))
    found = measure_costs._seconds(lambda: None, lambda: None, torch.device("cpu"))
    assert len(found) == 2  # of four runs the first warms up, and one was interrupted


def test_a_machine_without_a_quiet_pass_gives_a_guess_that_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_costs, "_seconds", lambda *_: [])
    found = cached(some_runner(), tmp_path)
    assert (found.origin, found.steady, found.spread) == ("guessed", False, math.inf)
    assert found.layer == ideal(some_runner().fused).layer
    assert not (tmp_path / "costs").exists()


def test_costs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(tiny_model("llama"), [ExitConfig(layer=1)])
    measured = []

    def count(runner: Runner) -> Costs:
        measured.append(runner)
        return measure(runner)

    Machine(monkeypatch, QUIET)
    monkeypatch.setattr(measure_costs, "measure", count)
    first = cached(runner_of(model), tmp_path)
    assert cached(runner_of(model), tmp_path) == dataclasses.replace(first, origin="kept")
    assert len(measured) == 1
    (path,) = (tmp_path / "costs").iterdir()
    assert json.loads(path.read_text()).keys() == dataclasses.asdict(first).keys()
    whole = json.loads(path.read_text())
    changes: tuple[dict[str, Any], ...] = (
        {"test": []}, {"draft": None}, {"layer": [[1.0]]}, {"head": []}, {"rows": ["a"]}, {"contexts": [1, 2]},
        {"test": {"2": 1.0}},
        {"draft": {"1": math.nan}}, {"spread": 0.5}, {"spread": None}, {"layer": [[10**400] * len(first.rows)] * 2},
        {"layer": [[0.0] * len(first.rows)] * 2}, {"head": [-1.0] * len(first.rows)},
    )  # fmt: skip
    damages = [
        "",
        "[]",
        '{"rows": 1}',
        path.read_text()[:-40],
        "\x00",
        "[" * 100_000,
        *(json.dumps({**whole, **c}) for c in changes),
    ]
    for damage in damages:
        path.write_text(damage)
        assert all(0 < value < math.inf for value in cached(runner_of(model), tmp_path).layer[0])
    assert len(measured) == 1 + len(damages)
    before = len(measured)
    for change in ({"layer": 2}, {"gate": True}, {"output": "low_rank", "rank": 4}, {"kind": "block"}):
        attach(model, [ExitConfig(**{"layer": 1, **change})])
        cached(runner_of(model), tmp_path)
    assert len(measured) == before + 4


def test_a_directory_that_cannot_be_written_only_means_measuring_again(tmp_path: Path) -> None:
    (tmp_path / "costs").write_text("a file where the directory should be")
    assert cached(runner_of(tiny_model("llama")), tmp_path).layer[0][0] > 0
