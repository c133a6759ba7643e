"""Estimates of how often drafts are right, and when a source that was left alone is tried again."""

import itertools

import pytest

from exitlm.decode.pricing.acceptance import Acceptance, AcceptanceTable


def test_the_estimate_moves_from_the_prior_to_what_is_seen() -> None:
    source = Acceptance(prior=0.5)
    assert source.rate == 0.5
    for position in range(300):
        source = source.after_drafts(position, 3, 3)
    assert source.rate > 0.9
    for position in range(300, 600):
        source = source.after_drafts(position, 3, 0)
    assert 0 < source.rate < 0.1


def test_drafts_behind_the_first_refusal_were_not_tried() -> None:
    refused, right = (Acceptance(prior=0.5).after_drafts(9, 8, accepted) for accepted in (2, 8))
    assert (refused.drafted, refused.accepted, refused.trials) == (3, 2, 3)
    assert (right.drafted, right.accepted, right.trials) == (8, 8, 8)


def test_the_chance_that_a_test_fires_is_learnt() -> None:
    source = Acceptance(prior=0.5, firing_prior=0.9)
    for position in range(400):
        source = source.after_test(position, fired=position % 4 == 0)
    assert source.firing == pytest.approx(0.25, abs=0.05)


def test_first_drafts_are_judged_kindly_while_little_was_tried() -> None:
    source = Acceptance(prior=0.5)
    gains = []
    for position in range(1, 200):
        source = source.after_drafts(position, 1, position % 2)
        gains.append(source.odds(position)[1] - source.rate)
        assert source.odds(position, drafts=1)[1] == source.rate
    assert gains[0] > 0.15
    assert all(later < earlier for earlier, later in itertools.pairwise(gains[::2]))


def test_a_source_that_is_left_alone_is_tried_after_pauses_that_double() -> None:
    source, probes = Acceptance(prior=0.1), []
    for position in range(2000):
        if source.odds(position)[1] > 0.9:
            probes.append(position)
            source = source.after_drafts(position, 1, 0)
    gaps = [b - a for a, b in itertools.pairwise([0, *probes])]
    assert gaps[:5] == [16, 32, 64, 128, 256]
    assert set(gaps[5:]) == {256}


def test_a_probe_that_is_accepted_halves_the_pause_and_one_that_does_not_fire_doubles_it() -> None:
    source = Acceptance(prior=0.1, pause=128)
    assert source.is_probe(128)
    assert source.after_drafts(128, 1, 1).pause == 64
    assert source.after_test(128, fired=False).pause == 256
    assert source.after_test(128, fired=True) == source.after_test(5, fired=True)
    assert source.after_drafts(5, 1, 0).pause == 128  # no probe
    assert source.odds(128, drafts=1) == (source.firing, source.rate)  # one draft tells enough


def test_a_table_tells_new_sequences_what_others_saw() -> None:
    table = AcceptanceTable(stored={("exit", 8): 0.7})
    assert table.prior(("exit", 8))[0] == pytest.approx(0.7)
    assert table.prior(("lookup", 3), 0.4)[0] == pytest.approx(0.4)
    for _ in range(300):
        table = table.observed(("exit", 8), 2, 0)
    rate, weight = table.prior(("exit", 8))
    assert rate < 0.1
    assert weight > table.prior(("lookup", 3))[1]
    source = table.inform(("exit", 8), Acceptance(prior=0.9, drafted=5.0, accepted=1.0))
    assert (source.prior, source.drafted) == (rate, 5.0)
    assert source.rate < 0.2
