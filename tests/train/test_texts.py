"""The packaged texts: found by name, long enough to train on, and free of what a digital library adds."""

import pytest

from exitlm.errors import UserError
from exitlm.train.texts import packaged


def test_a_packaged_text_is_plain_prose() -> None:
    path = packaged("moby-dick")
    text = path.read_bytes().decode("utf-8")
    assert path.name == "moby-dick.txt"
    assert 200_000 < len(text) < 500_000
    assert text.startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
    assert text.endswith(".\n")
    assert not {"\r", "\t", "\0", "\ufeff"} & set(text)
    assert text.count("\nCHAPTER ") == 48
    assert not any(word in text.lower() for word in ("gutenberg", "ebook", "e-text", "transcriber", "http"))


@pytest.mark.parametrize("name", ["moby-duck", "", "README", "../texts/moby-dick", "moby-dick.txt"])
def test_an_unknown_text_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=r"^there is no packaged text '.*'; the packaged texts are: moby-dick$"):
        packaged(name)
