"""Files to blocks: every token predicted once, the cache, the order, and what is refused."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.errors import UserError
from exitlm.train.data import (
    ByteTokenizer,
    TextTokenizer,
    batch_indices,
    documents,
    expand,
    hold_out,
    load_blocks,
    pack,
    tokenise,
    tokenise_all,
)
from exitlm.weights.checkpoint import open_checkpoint

BYTES = ByteTokenizer()


def blocks_of(files: list[str], cache: Path, seq_len: int = 16, **over: Any) -> Any:
    return load_blocks(
        files, over.pop("tokens", BYTES), vocab_size=over.pop("vocab_size", 257), seq_len=seq_len, cache=cache
    )


@given(lengths=st.lists(st.integers(0, 70), min_size=1, max_size=30), seq_len=st.integers(2, 40))
@settings(max_examples=200, deadline=None)
def test_packing_predicts_every_token_but_the_first_of_a_document_once(lengths: list[int], seq_len: int) -> None:
    offsets = np.cumsum([0, *lengths])
    segments, bounds = pack(offsets, seq_len)
    predicted = [t for start, stop, _ in segments.tolist() for t in range(start + 1, stop)]
    wanted = [t for a, b in itertools.pairwise(offsets) for t in range(a + 1, b)]
    assert predicted == wanted
    starts = set(offsets.tolist())
    for a, b in itertools.pairwise(bounds):
        sizes = [stop - start - 1 for start, stop, _ in segments[a:b].tolist()]
        assert 0 < sum(sizes) <= seq_len
    assert all(not starts & set(range(start + 1, stop)) for start, stop, _ in segments.tolist())
    assert bounds[-1] == len(segments)


def test_text_file_to_blocks_and_back(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("héllo wörld, this is a text\nof two lines\n")
    blocks = blocks_of([str(path)], cache)
    joined = [int(blocks[0][0].ids[0])]
    for i in range(len(blocks)):
        for segment in blocks[i]:
            assert segment.ids[0] == joined[-1]
            joined += segment.ids[1:].tolist()
    assert bytes(joined[:-1]).decode() == path.read_text()
    assert joined[-1] == 256
    assert blocks.total_targets() == len(joined) - 1 == sum(blocks.targets(i) for i in range(len(blocks)))
    counts = blocks.counts(257)
    assert counts.sum() == len(joined) - 1
    assert counts[256] == 1


def test_all_formats_give_the_same_documents(tmp_path: Path, cache: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = ["first document", "the second one", "ünïcode"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts) + "\n\n")
    data = datasets.Dataset.from_dict({"text": texts})
    data.to_parquet(str(tmp_path / "a.parquet"))
    data.save_to_disk(str(tmp_path / "set"))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "dict"))
    for name in ("a.jsonl", "a.parquet", "set", "dict"):
        found = [text for text, end in documents(tmp_path / name, BYTES) if end]
        assert found == texts, name
    one, two = (blocks_of([str(tmp_path / n)], cache) for n in ("a.jsonl", "a.parquet"))
    assert one.digest == two.digest


def test_messages_become_a_chat(tmp_path: Path, base: Path) -> None:
    tokens = TextTokenizer(open_checkpoint(base).tokenizer())
    path = tmp_path / "chat.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]})
    )
    assert list(documents(path, tokens)) == [("<s>hi\n<s>yo\n", True)]
    assert tokens.encode_batch(["<s>hi"]) == [[1, *tokens.encode_batch(["hi"])[0]]]
    assert tokens.prompt("hi") == tokens.encode_batch(["<s>hi\n"])[0]


def test_long_text_is_cut_at_line_ends_and_stays_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitlm.train.data.PIECE_CHARS", 20)
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line number {i}\n" for i in range(9)))
    pieces = list(documents(path, BYTES))
    assert len(pieces) > 3
    assert "".join(p for p, _ in pieces) == path.read_text()
    assert [end for _, end in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(p.endswith("\n") for p, _ in pieces[:-1])


def test_beginning_of_text_token_begins_every_document_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exitlm.train.data.PIECE_CHARS", 20)
    tokens = ByteTokenizer()
    tokens.prefix = [255]
    path = tmp_path / "long.txt"
    path.write_text("one line of text here\nanother line of text here\n")
    ids, offsets, _ = tokenise(path, tokens, vocab_size=257, cache=cache)
    assert ids[:].tolist() == [255, *path.read_bytes(), 256]
    assert offsets.tolist() == [0, len(ids)]


def test_shards_are_cached_by_content(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text to be tokenised")
    first = blocks_of([str(path)], cache)
    monkeypatch.setattr(ByteTokenizer, "arrays", lambda self, texts: pytest.fail("tokenised again"))
    assert blocks_of([str(path)], cache).digest == first.digest
    monkeypatch.undo()
    path.write_text("some other text")
    assert blocks_of([str(path)], cache).digest != first.digest
    assert not list((cache / "tokens").glob(".*"))


@given(rows=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("prefix", [[], [200, 201]])
def test_shard_is_all_documents_one_after_the_other(
    rows: list[str], prefix: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tokens = ByteTokenizer()
    tokens.prefix = prefix
    home = tmp_path_factory.mktemp("rows")
    (home / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    wanted = [[*prefix, *row.encode(), 256] if row else [] for row in rows]
    if not any(wanted):
        return
    ids, offsets, _ = tokenise(home / "a.jsonl", tokens, vocab_size=257, cache=home)
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())] == wanted


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=60, deadline=None)
def test_encoding_is_that_of_transformers(base: Path, text: str) -> None:
    tokenizer = open_checkpoint(base).tokenizer()
    texts = [text, f"<s>{text}</s>"]
    wanted = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokens = TextTokenizer(tokenizer)
    assert tokens.encode_batch(texts) == wanted
    assert [ids.tolist() for ids in tokens.arrays(texts)] == wanted


def test_a_tokenizer_that_works_in_python_is_asked_itself(base: Path) -> None:
    tokenizer = open_checkpoint(base).tokenizer()
    encode = type(tokenizer)._encode_plus

    class Shouting(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, text: Any, **rest: Any) -> Any:
            return encode(self, text.upper() if isinstance(text, str) else [t.upper() for t in text], **rest)

    plain = TextTokenizer(tokenizer).encode_batch(["ABC"])
    tokenizer.__class__ = Shouting
    assert TextTokenizer(tokenizer).encode_batch(["abc"]) == plain


@pytest.mark.parametrize("cores", [1, 3])
def test_many_files_at_once_give_the_same_shards(
    tmp_path: Path, cache: Path, base: Path, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    paths = [tmp_path / f"{i}.txt" for i in range(12)]
    for i, path in enumerate(paths):
        path.write_text(f"file {i % 11} counts words\n" * (i % 11 + 1) * 20)
    for tokens in (BYTES, TextTokenizer(open_checkpoint(base).tokenizer())):
        alone = [tokenise(path, tokens, vocab_size=300, cache=tmp_path / "alone") for path in paths]
        found = tokenise_all(paths, tokens, vocab_size=300, cache=cache)
        assert [digest for _, _, digest in found] == [digest for _, _, digest in alone]
        assert [shard[:].tolist() for shard, _, _ in found] == [shard[:].tolist() for shard, _, _ in alone]


def test_the_first_error_ends_all_and_leaves_nothing_half(tmp_path: Path, cache: Path) -> None:
    paths = [tmp_path / f"{i}.txt" for i in range(9)]
    for i, path in enumerate(paths):
        path.write_bytes(b"binary\0" if i == 4 else b"text" * 1000)
    with pytest.raises(UserError, match=r"4\.txt is a binary file"):
        tokenise_all(paths, BYTES, vocab_size=257, cache=cache)
    assert not list((cache / "tokens").glob(".*"))


def test_files_that_stay_as_they_are_are_read_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exitlm.weights.store._SETTLED_SECONDS", -1.0)
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first = blocks_of([str(path)], cache)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
        assert blocks_of([str(path)], cache).digest == first.digest
    path.write_text("same size")
    assert blocks_of([str(path)], cache).digest != first.digest


def test_globs_are_sorted_and_names_keep_their_order(tmp_path: Path) -> None:
    names = ["b", "a", "c", "a10", "a9", "[x]"]
    for name in names:
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "z.txt").write_text("z")
    paths = [str(tmp_path / f"{name}.txt") for name in names]
    assert [str(p) for p in expand(paths)] == paths
    assert [str(p) for p in expand([str(tmp_path / "*.txt")])] == sorted(paths)
    assert [p.name for p in expand([str(tmp_path / "**" / "[a-z].txt")])] == ["a.txt", "b.txt", "c.txt", "z.txt"]


def test_files_that_cannot_be_read(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt is a pipe or a device"):
        expand([str(tmp_path / "*.txt")])
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        expand(["x" * 300])
    (tmp_path / "gone.md").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match=r"gone\.md does not exist"):
        expand([str(tmp_path / "*.md")])
    secret = tmp_path / "secret.log"
    secret.write_text("text")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"secret\.log cannot be read: Permission denied"):
        blocks_of([str(secret)], cache)


def test_a_globbed_list_keeps_its_order(tmp_path: Path, cache: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(name * 20)
    blocks = blocks_of([str(tmp_path / "*.txt")], cache, seq_len=64)
    assert blocks[0][0].ids[0] == ord("a")
    assert len(blocks.shards) == 2


def test_order_is_a_function_of_the_step_and_visits_all(cache: Path) -> None:
    visited = [i for step in range(10) for i in batch_indices(7, step, 3, seed=5)]
    for epoch in range(4):
        assert sorted(visited[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert visited[:7] != visited[7:14]
    assert batch_indices(7, 4, 3, seed=5) == visited[12:15]
    assert batch_indices(7, 4, 3, seed=6) != visited[12:15]


def test_held_out_blocks_are_disjoint(text: Path, cache: Path) -> None:
    blocks = blocks_of([str(text)], cache)
    train, held = hold_out(blocks, 5, seed=0)
    assert len(held) == 5
    assert len(train) + len(held) == len(blocks)
    spans = [{tuple(s) for s in part.segments.tolist()} for part in (train, held)]
    assert not spans[0] & spans[1]
    assert train.digest != held.digest


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "is empty"),
        ("binary.txt", b"abc\0def", "binary"),
        ("latin.txt", b"caf\xe9", "binary"),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', "line 2: not a JSON object"),
        ("other.jsonl", b'{"body": "a"}\n', 'line 1: expected a "text" field'),
        ("list.jsonl", b"[1]\n", 'expected a "text" field'),
        ("roles.jsonl", b'{"messages": [{"role": "user"}]}\n', '"content"'),
        ("bad.parquet", b"PAR1 no", "not a Parquet file"),
        ("one.txt", b"", "empty"),
    ],
)
def test_bad_files_are_refused_and_leave_nothing(
    tmp_path: Path, cache: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        blocks_of([str(path)], cache)
    home = cache / "tokens"
    assert not home.exists() or not list(home.iterdir())


def test_missing_files_and_directories(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        blocks_of([str(tmp_path / "absent.txt")], cache)
    with pytest.raises(UserError, match="does not exist"):
        blocks_of([str(tmp_path / "*.none")], cache)
    with pytest.raises(UserError, match="no Hugging Face dataset"):
        blocks_of([str(tmp_path)], cache)


def test_parquet_without_a_text_column(tmp_path: Path, cache: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"body": ["a"]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="it has: body"):
        blocks_of([str(tmp_path / "a.parquet")], cache)


def test_tokenizer_beyond_the_vocabulary(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_text("zzz")
    with pytest.raises(UserError, match="token id 122, but the model's vocabulary has 97"):
        blocks_of([str(tmp_path / "a.txt")], cache, tokens=NoEnd(), vocab_size=97)


class NoEnd(ByteTokenizer):
    """Bytes without an end of text."""

    eos_id = None
