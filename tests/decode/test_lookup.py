"""The n-gram index against a brute-force search through the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.decode.lookup import NgramIndex

TOKENS = st.lists(st.integers(0, 3), max_size=40)


def reference(tokens: list[int], unverified: list[int], count: int, sizes: tuple[int, ...]) -> tuple[list[int], int]:
    """The last place where the longest known n-gram stood in the verified text with a verified token behind it, and
    what follows there, where the copy reads on in what it wrote."""
    text = tokens + unverified
    for n in sizes:
        if count < 1 or len(text) < n:
            continue
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == text[-n:]:
                copy = list(text)
                for i in range(count):
                    copy.append(copy[end + i])
                return copy[len(text) :], n
    return [], 0


@settings(deadline=None, derandomize=True, database=None, max_examples=500)
@given(
    tokens=TOKENS, unverified=st.lists(st.integers(0, 3), max_size=6), count=st.integers(0, 60),
    sizes=st.sampled_from([(4, 3, 2), (2,), (3, 1)]),
)  # fmt: skip
def test_drafts_are_what_a_search_finds(
    tokens: list[int], unverified: list[int], count: int, sizes: tuple[int, ...]
) -> None:
    index = NgramIndex(sizes)
    cut = len(tokens) // 2
    index.extend(tokens[:cut])
    index.extend(tokens[cut:])
    assert index.draft(unverified, count) == reference(tokens, unverified, count, sizes)


def test_a_loop_goes_on() -> None:
    index = NgramIndex()
    index.extend([9, 1, 2, 3, 1, 2, 3])
    assert index.draft([], 8) == ([1, 2, 3, 1, 2, 3, 1, 2], 3)
    assert index.draft([1], 4) == ([2, 3, 1, 2], 4)


def test_the_longest_match_wins_and_then_the_last() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 4, 50, 2, 3, 60, 2, 3, 70, 1, 2, 3])
    assert index.draft([], 1) == ([4], 3)
    index.extend([0, 2, 3])
    assert index.draft([], 1) == ([0], 2)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 1]])
def test_text_that_is_too_short_has_no_drafts(tokens: list[int]) -> None:
    index = NgramIndex()
    index.extend(tokens)
    assert index.draft([], 5) == ([], 0)


def test_drafting_changes_nothing() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 1, 2])
    before = (list(index.tokens), dict(index.after))
    index.draft([3, 1], 9)
    assert (index.tokens, index.after) == before
