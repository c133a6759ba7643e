"""What a sequence may draft, and what it learns of its sources."""

import pytest

from exitlm.decode.pricing.acceptance import AcceptanceTable
from exitlm.decode.pricing.drafting import MAX_DRAFT, Drafting


def test_limits() -> None:
    assert (Drafting({}, adaptive=True).limit, Drafting({}, adaptive=True).exit_limit) == (MAX_DRAFT, MAX_DRAFT)
    capped = Drafting({}, adaptive=True, max_draft=6, max_pending=2)
    assert (capped.limit, capped.exit_limit) == (6, 2)
    assert Drafting({}, adaptive=True, max_draft=1, max_pending=4).exit_limit == 1


def test_a_source_begins_with_what_tuning_found_and_follows_what_is_verified() -> None:
    drafting, table = Drafting({8: (0.3, 0.8)}, adaptive=True), AcceptanceTable()
    firing, right = drafting.odds(8, table, 0, 1)
    assert (firing, right) == pytest.approx((0.3, 0.8))
    for position in range(40):
        drafting.tested(8, position, True)
        drafting.verified(8, position, False)
    assert drafting.odds(8, table, 40, 1)[0] > 0.8
    assert drafting.odds(8, table, 40, 1)[1] < 0.2
    for position in range(40, 120):
        drafting.verified(8, position, True)
    assert drafting.odds(8, table, 120, 1)[1] > 0.7


def test_a_source_that_is_none_of_its_own_is_not_counted() -> None:
    drafting = Drafting({}, adaptive=True)
    before = dict(drafting.sources)
    drafting.verified("grammar", 3, True)
    assert drafting.sources == before
    assert set(before) == {("lookup", n) for n in (2, 3, 4)}
