"""Text as it arrives: whole characters, and stop strings that begin in one token and end in another."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.decode.text import TextStream

SPECIAL = 256


class Bytes:
    """One token per byte; token 256 is special."""

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Bytes that are no UTF-8 become U+FFFD, as in every byte-level tokenizer."""
        assert options["skip_special_tokens"]
        return bytes(i for i in token_ids if i != SPECIAL).decode("utf-8", errors="replace")


class Words:
    """One token per given piece of text, decoded with spaces between words but not in front of the first, as
    SentencePiece tokenizers do."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = list(pieces)

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """The pieces; ``_`` marks a space."""
        return "".join(self.pieces[i] for i in token_ids).replace("_", " ").removeprefix(" ")


def pieces(stream: TextStream, ids: Sequence[int]) -> list[str]:
    """What each token releases, and what the end does."""
    found = []
    for i in ids:
        found.append(stream.push(i))
        if stream.finished:
            return found
    return [*found, stream.flush()]


def test_a_character_is_released_when_it_is_whole() -> None:
    text = "aé€😀z"
    found = pieces(TextStream(Bytes()), text.encode())
    assert found == ["a", "", "é", "", "", "€", "", "", "", "😀", "z", ""]


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(st.text(max_size=20))
def test_any_text_arrives_whole_and_never_with_half_a_character(text: str) -> None:
    found = pieces(TextStream(Bytes()), text.encode())
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


@settings(deadline=None, derandomize=True, database=None, max_examples=300)
@given(st.lists(st.integers(0, 256), max_size=30))
def test_bytes_that_are_no_text_do_not_hold_up_the_rest(ids: list[int]) -> None:
    found = pieces(TextStream(Bytes()), ids)
    assert "".join(found).replace("\ufffd", "") == Bytes().decode(ids, skip_special_tokens=True).replace("\ufffd", "")


def test_a_character_that_is_never_finished_is_flushed() -> None:
    found = pieces(TextStream(Bytes()), [97, 0xF0, 0x9F])
    assert found[:3] == ["a", "", ""]
    assert found[3] == "\ufffd"


def test_special_tokens_have_no_text() -> None:
    assert pieces(TextStream(Bytes()), [97, SPECIAL, 98, SPECIAL]) == ["a", "", "b", "", ""]


def test_spaces_between_words_are_kept() -> None:
    stream = TextStream(Words(["_Hello", "_world", ",", "_you", "_"]))
    assert pieces(stream, [0, 1, 2, 3, 4, 1]) == ["Hello", " world", ",", " you", " ", " world", ""]


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert pieces(TextStream(None), [1, 2, 3]) == ["", "", "", ""]


# ---- stop strings


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello world", ["wor"], "hello "),
        ("hello world", ["xyz"], "hello world"),
        ("hello", ["hello"], ""),
        ("hello", ["o"], "hell"),
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("one END two END", ["END"], "one "),
        ("x stop1 stop2", ["stop2", "stop1"], "x "),
        ("abcd", ["abcde"], "abcd"),
        ("naïve ☃ text", ["☃"], "naïve "),
        ("ab\n\ncd", ["\n\n"], "ab"),
    ],
)
def test_a_stop_string_ends_the_text_in_front_of_it(text: str, stop: list[str], expected: str) -> None:
    for cut in range(1, 7):
        words = [text[at : at + cut] for at in range(0, len(text), cut)]
        for tokenizer, ids in ((Words(words), list(range(len(words)))), (Bytes(), list(text.encode()))):
            stream = TextStream(tokenizer, stop)
            found = pieces(stream, ids)
            assert "".join(found) == expected.replace("_", " ")
            assert stream.finished == (expected != text)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    found = pieces(TextStream(Bytes(), ["END"]), b"an ENTRY, EN")
    assert found == ["a", "n", " ", "", "", "ENT", "R", "Y", ",", " ", "", "", "EN"]


def test_nothing_follows_a_stop_string() -> None:
    stream = TextStream(Bytes(), ["b"])
    assert [stream.push(i) for i in b"abc"] == ["a", "", ""]
    assert stream.flush() == ""
    assert stream.finished


def test_a_stop_string_with_a_character_that_is_cut() -> None:
    stream = TextStream(Bytes(), ["é!"])
    assert "".join(pieces(stream, "cafés é! x".encode())) == "cafés "
    assert stream.finished


@settings(deadline=None, derandomize=True, database=None, max_examples=500)
@given(
    text=st.text("abc ", max_size=25), stop=st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_cut_gives_the_text_in_front_of_the_first_stop_string(text: str, stop: list[str], seed: int) -> None:
    rng, cuts = random.Random(seed), [0]
    while cuts[-1] < len(text):
        cuts.append(cuts[-1] + rng.randint(1, 5))
    words = [text[a:b] for a, b in itertools.pairwise(cuts)]

    class Plain:
        def decode(self, token_ids: Sequence[int], **options: Any) -> str:
            return "".join(words[i] for i in token_ids)

    stream, released = TextStream(Plain(), stop), ""
    found = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    expected = text[: min(found)[1]] if found else text
    for at in range(len(words)):
        released += stream.push(at)
        assert expected.startswith(released)  # nothing is released that is taken back
        if stream.finished:
            break
    released += stream.flush()
    assert released == expected


def test_a_space_at_the_start_of_the_continuation_is_kept() -> None:
    """A tokenizer whose words carry their space drops the first one of a text, but not of a text that goes on."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "▁Once": 1, "▁upon": 2, "▁a": 3}, "<unk>"))
    core.decoder = tokenizers.decoders.Metaspace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    assert "".join(pieces(TextStream(fast), [2, 3])) == "upon a"
    assert "".join(pieces(TextStream(fast, (), [1]), [2, 3])) == " upon a"


def test_a_real_byte_level_tokenizer() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"])
    tokenizer.train_from_iterator(["the quick brown fox", "naïve café"] * 5, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    text = " the naïve 😀 fox , don 't — 日本語"
    ids = [*fast(text)["input_ids"], fast.eos_token_id]
    found = pieces(TextStream(fast), ids)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)
    stream = TextStream(fast, ["😀 f"])
    assert "".join(pieces(stream, ids)) == " the naïve "
