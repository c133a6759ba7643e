"""How far drafting goes: by what was accepted in this text and by what it costs, never by the clock."""

import itertools

import pytest

from exitlm.decode.drafting import LOOKUP_PRIOR, MAX_DRAFT, Acceptance, DraftPolicy
from exitlm.model.exits import ExitConfig
from tests.decode.models import attach, drafting_model, generate, make_engine, random_ids, some_costs
from tests.decode.test_costs import table
from tests.model.families import tiny_model


def policy(prior: float = 0.7, row: float = 0.05, **options: int | None) -> DraftPolicy:
    """One exit at layer 4 of 10."""
    options = {"max_draft": None, "max_pending": None, **options}
    return DraftPolicy(table(row), {4: prior}, **options)


def test_the_estimate_moves_from_the_prior_to_what_is_seen() -> None:
    source = Acceptance(0.5)
    assert source.rate == 0.5
    for _ in range(200):
        source.observe(3, 3)
    assert source.rate > 0.9
    for _ in range(200):
        source.observe(3, 0)
    assert 0 < source.rate < 0.1


def test_drafts_behind_the_first_refusal_were_not_tried() -> None:
    source = Acceptance(0.5)
    source.observe(8, 2)
    assert (source.tried, source.accepted, source.trials) == (3, 2, 3)
    source = Acceptance(0.5)
    source.observe(8, 8)
    assert (source.tried, source.accepted) == (8, 8)


def test_a_source_that_pays_is_never_paused() -> None:
    source = Acceptance(0.9)
    for position in range(0, 400, 3):
        source.observe(1, 1)
        assert not source.paused(position, pays=True)


def test_a_source_that_does_not_pay_is_tried_paused_and_tried_again() -> None:
    source = Acceptance(0.1)
    drafted = []
    for position in range(1200):
        if not source.paused(position, pays=False):
            drafted.append(position)
            source.observe(1, 0)
    assert drafted[:4] == [0, 1, 2, 3]  # before it may be left alone
    gaps = [b - a for a, b in itertools.pairwise(drafted[3:])]
    assert gaps[0] == 17
    assert gaps[1:5] == [32, 64, 128, 256]
    assert set(gaps[5:]) == {256}


def test_a_source_comes_back_when_it_pays_again() -> None:
    source = Acceptance(0.1, trials=4)
    assert source.paused(10, pays=False)
    assert source.paused(11, pays=False)
    assert not source.paused(12, pays=True)


def test_exits_are_skipped_where_they_do_not_pay() -> None:
    good, bad = policy(), policy()
    for position in range(40):
        good.observe_exit(4, accepted=True)
        bad.observe_exit(4, accepted=False)
        assert good.skipped(position) == frozenset()
        if position < 3:
            assert bad.skipped(position) == frozenset()
    assert bad.skipped(41) == {4}
    good.observe_exit(9, accepted=True)  # an exit of another request: ignored


def test_a_draft_pays_where_its_acceptance_is_worth_its_cost() -> None:
    """rate * full > layers below + head + one more row above."""
    for rate in (0.2, 0.4, 0.6, 0.8):
        found = policy(rate, row=0.2)
        assert found.costs is not None
        found.exits[4].trials = 99
        pays = rate * found.costs.full() > found.costs.draft_cost(4)
        assert (found.skipped(5) == frozenset()) == pays


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("row", [0.0, 0.05, 0.3])
def test_a_chain_of_drafts_ends_where_the_expected_speed_is_highest(rate: float, row: float) -> None:
    """Against the closed form tau / (1 + cost of g drafts), for drafts of one exit (decoding.md, bounds)."""
    found = policy(rate, row=row)
    costs = found.costs
    assert costs is not None
    spent = [costs.full()]
    for g in range(1, 13):
        spent.append(spent[-1] + costs.draft_cost(4, g))
    speeds = [sum(rate**i for i in range(g + 1)) / spent[g] for g in range(13)]
    chain: list[int] = []
    while len(chain) < 12 and 4 not in found.skipped_behind([4, *chain], frozenset()):
        chain.append(4)
    assert len(chain) + 1 == max(1, speeds.index(max(speeds)))  # the first draft is not its affair
    assert found.skipped_behind([], frozenset({4})) == {4}


@pytest.mark.parametrize("n", LOOKUP_PRIOR)
def test_the_length_of_a_copied_draft_maximises_the_expected_speed(n: int) -> None:
    for accepted in range(0, 60, 4):
        for row in (0.01, 0.1, 1.0):
            found = policy(row=row)
            for _ in range(accepted):
                found.observe_lookup(n, 5, 5)
            rate, costs = found.lookups[n].rate, found.costs
            assert costs is not None
            speeds = [sum(rate**i for i in range(k + 1)) / costs.full(2 + k) for k in range(MAX_DRAFT + 1)]
            best = speeds.index(max(speeds))
            assert found.lookup_length(n, 2, 100, 7) == max(1, best)  # one before it may be left alone


def test_copied_drafts_grow_with_their_success_and_end_with_their_failure() -> None:
    found = policy()
    lengths = []
    for position in range(30):
        lengths.append(found.lookup_length(3, 1, 100, position))
        found.observe_lookup(3, lengths[-1], lengths[-1])
    assert lengths[-1] == MAX_DRAFT
    for position in range(30, 200):
        lengths.append(found.lookup_length(3, 1, 100, position))
        found.observe_lookup(3, lengths[-1], 0)
    end = lengths.index(0)  # the first pause
    assert lengths[30:end] == sorted(lengths[30:end], reverse=True)
    assert set(lengths[end:]) == {0, 1}


@pytest.mark.parametrize("room", [0, 1, 3])
def test_limits(room: int) -> None:
    for found in (policy(), DraftPolicy(None, {4: 0.7}, None, None)):
        assert found.lookup_length(4, 1, room, 0) <= room
    assert policy(max_draft=2).lookup_length(4, 1, 100, 0) <= 2
    assert policy(max_draft=0).lookup_length(4, 1, 100, 0) == 0
    assert policy(max_draft=5, max_pending=3).exit_limit == 3
    assert policy(max_draft=2, max_pending=3).exit_limit == 2
    assert policy().exit_limit == MAX_DRAFT


def test_without_costs_every_draft_is_taken() -> None:
    found = DraftPolicy(None, {4: 0.1}, None, None)
    assert found.skipped_behind([4] * 9, frozenset()) == frozenset()
    for position in range(50):
        found.observe_exit(4, accepted=False)
        found.observe_lookup(2, 9, 0)
        assert found.skipped(position) == frozenset()
        assert found.lookup_length(2, 1, 100, position) == MAX_DRAFT


def test_drafting_falls_back_to_plain_decoding_where_it_is_always_wrong() -> None:
    model = attach(tiny_model("llama"), [ExitConfig(layer=3, init="random", kind="norm", output="own")])
    engine = make_engine(model)
    settings = {"max_new_tokens": 100, "threshold": 0.0, "draft": "exits", "ignore_eos": True}
    wasteful = generate(engine, random_ids(5), adaptive=False, **settings)
    careful = generate(engine, random_ids(5), **settings)
    assert careful.token_ids == wasteful.token_ids
    assert wasteful.stats.acceptance < 0.1
    assert 4 <= careful.stats.drafted < wasteful.stats.drafted / 10
    assert careful.stats.layer_rows < 1.2 * 99 * 4


def test_drafting_goes_on_where_it_is_right() -> None:
    engine = make_engine(drafting_model("llama"), costs=some_costs(drafting_model("llama"), row=0.0))
    settings = {"max_new_tokens": 60, "threshold": 0.3, "exits": [3], "ignore_eos": True, "draft": "exits"}
    free = generate(engine, random_ids(5), adaptive=False, **settings)
    careful = generate(engine, random_ids(5), **settings)
    assert careful.stats.accepted > free.stats.accepted / 2 > 5
    assert careful.stats.layer_rows <= free.stats.layer_rows


def test_the_same_request_makes_the_same_choices() -> None:
    outcomes = []
    for _ in range(2):
        engine = make_engine(drafting_model("qwen3"))
        out = generate(engine, random_ids(6) * 3, max_new_tokens=60, threshold=0.05, ignore_eos=True)
        outcomes.append((out.token_ids, out.exit_layers, out.stats.drafted, out.stats.rounds))
    assert outcomes[0] == outcomes[1]
