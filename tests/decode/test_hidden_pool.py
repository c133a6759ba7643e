"""Slots of hidden states: random use against a dictionary."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.decode.cache.hidden_pool import HiddenPool

MOVES = st.lists(st.tuples(st.sampled_from(["take", "take", "write", "give back"]), st.integers(1, 9)), max_size=40)


def new_pool(capacity: int = 4) -> HiddenPool:
    return HiddenPool(3, torch.float64, torch.device("cpu"), capacity)


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(moves=MOVES, random=st.randoms(use_true_random=False))
@torch.inference_mode()
def test_rows_stay_as_they_were_put(moves: list[tuple[str, int]], random: object) -> None:
    """However the pool grows and whichever slots come back, no two rows share a slot."""
    pool, held, number = new_pool(), dict[int, float](), 0.0
    for move, count in moves:
        slots = random.sample(sorted(held), min(count, len(held)))  # type: ignore[attr-defined]
        if move == "take":
            slots = pool.take(count)
            assert len(set(slots)) == count
            assert not held.keys() & set(slots)
        elif move == "give back":
            pool.give_back(slots)
            for slot in slots:
                del held[slot]
        if move != "give back" and slots:
            rows_MD = number + torch.arange(len(slots), dtype=torch.float64)[:, None].expand(-1, 3)
            pool.put(slots, rows_MD)
            held |= {slot: number + i for i, slot in enumerate(slots)}
            number += 100.0
        assert pool.used == len(held)
        for some in (sorted(held), random.sample(sorted(held), len(held)), [*held][:1]):  # type: ignore[attr-defined]
            if some:
                assert pool.get(some).tolist() == [[held[slot]] * 3 for slot in some]
    pool.give_back(list(held))
    assert pool.used == 0
    assert pool.take(len(pool.states_SD)) == list(range(len(pool.states_SD)))


def test_neighbours_are_read_without_a_copy() -> None:
    pool = new_pool(8)
    slots = pool.take(5)
    assert slots == [0, 1, 2, 3, 4]
    assert pool.get(slots[1:4]).data_ptr() == pool.states_SD[1].data_ptr()
    assert pool.get([3, 1, 2]).data_ptr() != pool.states_SD[1].data_ptr()


def test_the_table_grows_only_when_it_is_full() -> None:
    pool = new_pool(4)
    first = pool.take(3)
    pool.put(first, torch.ones(3, 3, dtype=torch.float64))
    pool.take(1)
    assert len(pool.states_SD) == 4
    pool.take(7)
    assert len(pool.states_SD) == 16
    assert pool.get(first).tolist() == [[1.0] * 3] * 3
