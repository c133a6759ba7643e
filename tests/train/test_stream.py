"""The stream of rows: every token once per epoch, the same rows for everyone, and weights that are met."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.errors import UserError
from exitlm.train.data import Blocks, ByteTokenizer, hold_out, load_blocks, pack
from exitlm.train.stream import IGNORED, PERIOD, Batch, Stream, permuted, turns

T = 12
GOLDEN = [
    (1, 1),
    (0, 2),
    (0, 1),
    (1, 2),
    (0, 0),
    (0, 4),
    (1, 0),
    (0, 3),
    (0, 2),
    (1, 0),
    (0, 1),
    (0, 3),
    (0, 0),
    (1, 2),
    (0, 4),
    (1, 1),
]
GOLDEN_WEIGHTED = [(0, 4), (1, 2), (0, 2), (0, 1), (1, 1), (0, 3)]
LENGTHS = st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=8), min_size=1, max_size=3)


def blocks_of(lengths: list[int], begin: int = 0, firsts: int = 0) -> Blocks:
    """Documents of these lengths; every token is another number. ``firsts``: from which position a piece counts."""
    offsets = np.cumsum([0, *lengths])
    segments, bounds = pack(offsets, T)
    segments[:, 2] = np.minimum(firsts, segments[:, 1] - segments[:, 0] - 2)
    whole = np.insert(segments, 0, 0, axis=1)
    return Blocks([np.arange(begin, begin + offsets[-1], dtype=np.uint32)], whole, bounds, f"{lengths} {begin}")


def sources_of(lengths: list[list[int]], firsts: int = 0) -> list[Blocks]:
    return [blocks_of(many, 1000 * i, firsts) for i, many in enumerate(lengths)]


def tensors(batch: Batch) -> torch.Tensor:
    return torch.stack([batch.ids_BT, batch.labels_BT, batch.documents_BT])


def labels(batch: Batch) -> list[int]:
    return batch.labels_BT[batch.labels_BT != IGNORED].tolist()


@given(lengths=LENGTHS, seed=st.integers(-3, 1 << 70), epoch=st.integers(0, 5), shuffle=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_token_but_the_first_of_a_document_is_a_label_once_per_epoch(
    lengths: list[list[int]], seed: int, epoch: int, shuffle: bool
) -> None:
    stream = Stream(sources_of(lengths), seq_len=T, seed=seed, shuffle=shuffle)
    n = len(stream)
    batch = stream.batch(range(epoch * n, (epoch + 1) * n))
    begins = [np.cumsum([1000 * i, *many]).tolist() for i, many in enumerate(lengths)]
    wanted = [t for ends in begins for a, b in itertools.pairwise(ends) for t in range(a + 1, b)]
    assert sorted(labels(batch)) == wanted
    if not shuffle:
        assert labels(batch) == wanted


@given(lengths=LENGTHS, firsts=st.integers(0, 4), seed=st.integers(0, 9), start=st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_rows_hold_pieces_padding_and_next_tokens(lengths: list[list[int]], firsts: int, seed: int, start: int) -> None:
    stream = Stream(sources_of(lengths, firsts), seq_len=T, seed=seed)
    rows = range(start, start + 5)
    batch = stream.batch(rows)
    assert batch.ids_BT.shape == batch.labels_BT.shape == batch.documents_BT.shape == (5, T)
    assert batch.ids_BT.dtype == batch.labels_BT.dtype == batch.documents_BT.dtype == torch.int64
    assert stream.valid(rows) == int((batch.labels_BT != IGNORED).sum())
    for b, (source, block) in enumerate(stream.places(rows)):
        pieces = stream.sources[source][block]
        for number, piece in enumerate(pieces):
            inside = batch.documents_BT[b] == number
            assert torch.equal(batch.ids_BT[b, inside], piece.ids[:-1])
            expected = piece.ids[1:].clone()
            expected[: piece.first] = IGNORED
            assert torch.equal(batch.labels_BT[b, inside], expected)
        padding = batch.documents_BT[b] == len(pieces)
        assert (batch.labels_BT[b, padding] == IGNORED).all()
        assert (batch.documents_BT[b].diff() >= 0).all()
        assert int(padding.sum()) == T - sum(len(piece.ids) - 1 for piece in pieces)


@given(data=st.data(), lengths=LENGTHS, weighted=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_partition_of_rows_is_the_whole_batch(data: Any, lengths: list[list[int]], weighted: bool) -> None:
    weights = [1.0 + i for i in range(len(lengths))] if weighted else []
    streams = [Stream(sources_of(lengths), seq_len=T, seed=7, weights=weights) for _ in range(2)]
    start, size = data.draw(st.integers(0, 10**9)), data.draw(st.integers(1, 16))
    rank_of = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    whole = tensors(streams[0].batch(range(start, start + size)))
    for rank in set(rank_of):
        mine = [i for i in range(size) if rank_of[i] == rank]
        assert torch.equal(tensors(streams[1].batch([start + i for i in mine])), whole[:, mine])
    ranks = {rank: [start + i for i in range(size) if rank_of[i] == rank] for rank in set(rank_of)}
    total = sum(streams[1].valid(rows) for rows in ranks.values())
    assert total == streams[0].valid(range(start, start + size)) == int((whole[1] != IGNORED).sum())


def test_seed_and_epoch_choose_the_order_and_nothing_else() -> None:
    sources = sources_of([[30] * 20, [25] * 20])
    one, two = (Stream(sources, seq_len=T, seed=seed) for seed in (1, 2))
    n = len(one)
    epochs = [one.places(range(e * n, (e + 1) * n)) for e in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    assert one.places(range(n)) != two.places(range(n))
    assert sorted(one.places(range(n))) == sorted(two.places(range(n)))
    assert one.digest == two.digest
    assert Stream(sources, seq_len=T, seed=1).places(range(2 * n)) == one.places(range(2 * n))
    assert Stream(sources, seq_len=T, seed=1, shuffle=False).places(range(n)) == sorted(one.places(range(n)))


def test_the_order_stays_what_it_was() -> None:
    stream = Stream(sources_of([[13] * 5, [13] * 3]), seq_len=T, seed=0)
    assert stream.places(range(16)) == GOLDEN
    assert Stream(stream.sources, seq_len=T, seed=0, weights=(2, 1)).places(range(6)) == GOLDEN_WEIGHTED


def test_digest_names_data_weights_and_length() -> None:
    sources = sources_of([[30] * 3, [25] * 4])
    digests = {
        Stream(sources, seq_len=T, seed=0).digest,
        Stream(sources[::-1], seq_len=T, seed=0).digest,
        Stream(sources, seq_len=T + 1, seed=0).digest,
        Stream(sources, seq_len=T, seed=0, weights=(1, 1)).digest,
        Stream(sources, seq_len=T, seed=0, weights=(1, 2)).digest,
    }
    assert len(digests) == 5
    assert Stream(sources, seq_len=T, seed=0, weights=(2, 2)).digest in digests


@given(weights=st.lists(st.floats(0.05, 20.0), min_size=1, max_size=9), zero=st.booleans())
@settings(max_examples=30, deadline=None)
def test_weights_are_met_within_a_row_per_period_and_about_so_at_any_time(weights: list[float], zero: bool) -> None:
    weights = [*weights, 0.0] if zero else weights
    quotas, source, nth = turns(weights)
    shares = np.array(weights) / sum(weights)
    assert quotas.sum() == len(source) == PERIOD
    assert (abs(quotas - shares * PERIOD) < 1).all()
    for i, share in enumerate(shares):
        mine = source == i
        assert np.array_equal(nth[mine], np.arange(quotas[i]))
        off = np.cumsum(mine) - np.arange(1, PERIOD + 1) * quotas[i] / PERIOD
        assert abs(off).max(initial=0) <= 1 + share * len(weights) / 2


def test_weighted_sources_go_through_epochs_of_their_own() -> None:
    sources = sources_of([[13] * 7, [13] * 50, [13] * 3])
    stream = Stream(sources, seq_len=T, seed=3, weights=(0.5, 0.25, 0.0))
    places = stream.places(range(PERIOD - 60, PERIOD + 60))
    assert Counter(source for source, _ in places) == {0: 80, 1: 40}
    period = stream.places(range(PERIOD))
    for source, size in ((0, 7), (1, 50)):
        drawn = [block for which, block in period if which == source]
        for epoch in range(100):
            assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert drawn[:size] != drawn[size : 2 * size]
    in_order = Stream(sources, seq_len=T, seed=3, weights=(0, 0, 1), shuffle=False)
    assert in_order.places(range(7)) == [(2, i % 3) for i in range(7)]


def test_a_weight_that_would_never_be_met_is_refused() -> None:
    with pytest.raises(UserError, match="comes less than once in 72000 rows"):
        turns((1.0, 1e-6))


@given(count=st.one_of(st.integers(1, 300), st.integers(1000, 5000)), key=st.integers(0, (1 << 64) - 1))
@settings(max_examples=150, deadline=None)
def test_a_shuffle_is_a_permutation(count: int, key: int) -> None:
    found = permuted(np.arange(count), np.full(count, count), np.full(count, key, dtype=np.uint64))
    assert np.array_equal(np.sort(found), np.arange(count))


@pytest.mark.parametrize("count", [2**20, 2**20 + 1, 10**12, 2**52 + 1])
def test_a_shuffle_of_many_needs_no_more_than_of_few(count: int) -> None:
    places = np.array([0, 1, 2, count // 2, count - 1])
    found = permuted(places, np.full(5, count), np.full(5, 11, dtype=np.uint64))
    assert len(set(found.tolist())) == 5
    assert ((found >= 0) & (found < count)).all()
    alone = [permuted(places[i : i + 1], np.array([count]), np.array([11], dtype=np.uint64)) for i in range(5)]
    assert found.tolist() == np.concatenate(alone).tolist()


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_all_orders_of_few_come_about_equally_often(count: int) -> None:
    draws = 6000
    keys = np.repeat(np.arange(draws, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), count)
    found = permuted(np.tile(np.arange(count), draws), np.full(draws * count, count), keys).reshape(draws, count)
    orders = Counter(map(tuple, found.tolist()))
    assert len(orders) == len(list(itertools.permutations(range(count))))
    assert min(orders.values()) > 0.6 * draws / len(orders)


def test_files_to_rows(tmp_path: Path, cache: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i} {"x" * i}"}}\n' for i in range(30)))
    sources = [
        load_blocks([str(tmp_path / name)], ByteTokenizer(), vocab_size=257, seq_len=T, cache=cache)
        for name in ("a.jsonl", "b.jsonl")
    ]
    train, held = hold_out(sources[0], 3, seed=0)
    stream = Stream([train, sources[1]], seq_len=T, seed=0)
    assert len(stream) == len(train) + len(sources[1])
    found = labels(stream.batch(range(len(stream)))) + labels(Stream([held], seq_len=T, seed=0).batch(range(len(held))))
    assert len(found) == sum(source.total_targets() for source in sources)
    empty = stream.batch([])
    assert empty.ids_BT.shape == (0, T)
    assert stream.valid([]) == 0
