"""Text that the model writes: equal to plain decoding, the same after any kill, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from exitlm.errors import UserError
from exitlm.train.selftext import (
    Answer,
    Writing,
    as_blocks,
    fitting,
    read_prompts,
    write_answers,
)
from tests.model.families import VOCAB, tiny_model

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14], [15, 16, 17, 18, 19]]


def writing(**over: Any) -> Writing:
    values: dict[str, Any] = dict(
        base="b", prompts="p", seq_len=24, temperature=0.9, batch=3, seed=0, dtype="float64", stop_ids=(2, 3)
    )
    return Writing(**{**values, **over})


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_greedy_answers_are_those_of_one_prompt_at_a_time(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    over: dict[str, Any] = {"temperature": 0.0, "stop_ids": (2, 3, 40, 41, 42, 43, 44, 45, 46)}
    answers = collect(model, tmp_path, None, **over)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = list(prompt)
        while len(ids) < writing().seq_len + 1 and (len(ids) == len(prompt) or ids[-1] not in over["stop_ids"]):
            ids.append(int(model.logits(ids)[0, -1].argmax()))
        assert answer.ids == ids
    assert len({len(answer.ids) - answer.start for answer in answers}) > 1


def test_a_model_whose_logits_are_not_finite_writes_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=3)
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="final logits for new token 1 are not finite"):
        list(write_answers(lambda: model, PROMPTS, writing(), tokens=50, vocab_size=VOCAB, cache=tmp_path))
    assert not any(path.stat().st_size for path in tmp_path.rglob("*.jsonl"))


def collect(
    model: Any, cache: Path, tokens: int | None = 100, stopped: Any = lambda: False, **over: Any
) -> list[Answer]:
    options: dict[str, Any] = {"tokens": tokens, "vocab_size": VOCAB, "cache": cache, "stopped": stopped}
    return list(write_answers(lambda: model, PROMPTS, writing(**over), **options))


def test_a_prompt_that_is_asked_twice_is_answered_twice(model: Any, tmp_path: Path) -> None:
    """And a text does not depend on how many are written together."""
    answers = collect(model, tmp_path, 250)
    by_prompt: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for answer in answers[:-3]:  # the last batch is cut
        by_prompt.setdefault(tuple(answer.ids[: answer.start]), set()).add(tuple(answer.ids))
    assert all(len(texts) > 1 for texts in by_prompt.values())
    assert len(by_prompt) == len(PROMPTS)
    once = collect(model, tmp_path, None, batch=5)
    assert collect(model, tmp_path, None, batch=2) == once


def test_answers_are_kept_extended_and_the_same(model: Any, cache: Path, tmp_path: Path) -> None:
    first = collect(model, cache, 100)
    assert collect(None, cache, 100) == first
    longer = collect(model, cache, 150)
    assert all(b.ids[: len(a.ids)] == a.ids for a, b in zip(first, longer, strict=False))
    whole = writing().batch * (len(first) // writing().batch - 1)  # answers of batches that were not cut
    assert whole > 0
    assert longer[:whole] == first[:whole]
    assert len(longer) > len(first)
    assert collect(model, tmp_path, 150) == longer
    assert sum(len(a.ids) - a.start for a in longer) >= 150
    assert collect(model, cache, 100, seed=1) != first
    assert all(a.ids[: a.start] in PROMPTS for a in longer)


@pytest.mark.parametrize("tokens", [1, 2, 7, 30, 61, 100, 149, 150])
def test_no_more_is_written_than_asked_for(model: Any, cache: Path, tmp_path: Path, tokens: int) -> None:
    """But for the other answers' tokens of the last step; and the same, whatever the cache holds."""
    found = collect(model, cache, tokens)
    assert tokens <= sum(len(a.ids) - a.start for a in found) < tokens + writing().batch
    path = next((cache / "self").glob("*/answers.jsonl"))
    kept = [answer for line in path.read_text().splitlines() for answer in json.loads(line)["rows"]]
    assert [Answer(ids, start) for start, ids in kept] == found
    assert collect(None, cache, tokens) == found
    longer = collect(model, cache, 200)
    assert collect(model, tmp_path, 200) == longer
    assert [path.read_bytes() for path in tmp_path.rglob("*.jsonl")] == [path.read_bytes()]
    assert collect(None, cache, tokens) == found
    fewer = collect(None, cache, max(1, tokens // 2))
    assert all(a.ids == b.ids[: len(a.ids)] for a, b in zip(fewer, found, strict=False))


def test_a_line_behind_a_batch_that_was_cut_is_not_read(model: Any, cache: Path) -> None:
    whole = collect(model, cache, 150)
    path = next((cache / "self").glob("*/answers.jsonl"))
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    cut = json.dumps({**json.loads(lines[0]), "cut": True}).encode() + b"\n"
    path.write_bytes(cut + b"".join(lines[1:]))
    assert collect(model, cache, 150) == whole
    assert path.read_bytes() == before


def test_progress_is_told_at_every_step(model: Any, cache: Path) -> None:
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"vocab_size": VOCAB, "cache": cache, "report": lambda *numbers: told.append(numbers)}
    list(write_answers(lambda: model, PROMPTS, writing(), tokens=100, **options))
    assert told == sorted(told)
    assert told[0] == (writing().batch, 100)
    assert told[-1] == (100, 100)
    assert len(told) > 20
    told.clear()
    list(write_answers(lambda: model, PROMPTS, writing(stop_ids=tuple(range(0, 97, 9))), tokens=None, **options))
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((0, 5), (5, 5))
    assert len(set(told)) > 2  # not all of them end together


def test_each_prompt_once(model: Any, cache: Path) -> None:
    answers = collect(model, cache, None, temperature=0.0)
    assert [a.ids[: a.start] for a in answers] == PROMPTS


@pytest.mark.parametrize("damage", ["torn", "garbage", "skipped", "deep"])
def test_what_a_kill_left_is_cut_off_and_written_again(model: Any, cache: Path, damage: str) -> None:
    whole = collect(model, cache, 150)
    path = next((cache / "self").glob("*/answers.jsonl"))
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    assert len(lines) > 2
    tail = {"torn": lines[1][:-9], "garbage": b"\0\0\0\n", "skipped": lines[2], "deep": b"[" * 100_000 + b"\n"}[damage]
    path.write_bytes(lines[0] + tail)
    assert collect(model, cache, 150) == whole
    assert path.read_bytes() == before


def changed(line: bytes, change: Any) -> Any:
    table = json.loads(line)
    change(table, table["rows"])
    return table


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: [], lambda line: None, lambda line: 5, lambda line: "x", lambda line: {"batch": 1},
        lambda line: {"batch": 1, "rows": 5}, lambda line: {"batch": 1, "rows": [[1]]},
        lambda line: {"batch": 1, "rows": {"a": 1}}, lambda line: {"batch": 1, "rows": []},
        lambda line: changed(line, lambda table, rows: rows.pop()),
        lambda line: changed(line, lambda table, rows: rows.reverse()),
        lambda line: changed(line, lambda table, rows: rows[0].append(1)),
        lambda line: changed(line, lambda table, rows: rows[0][1].append(VOCAB)),
        lambda line: changed(line, lambda table, rows: rows[0][1].append(-1)),
        lambda line: changed(line, lambda table, rows: rows[0][1].append("7")),
        lambda line: changed(line, lambda table, rows: rows[0][1].append(7.0)),
        lambda line: changed(line, lambda table, rows: rows[0][1].append(True)),
        lambda line: changed(line, lambda table, rows: rows[0][1].extend([7] * 99)),
        lambda line: changed(line, lambda table, rows: rows[0].__setitem__(1, "abcdef")),
        lambda line: changed(line, lambda table, rows: rows[0].__setitem__(0, 0)),
        lambda line: changed(line, lambda table, rows: rows[0].__setitem__(0, 99)),
        lambda line: changed(line, lambda table, rows: rows[0].__setitem__(0, -1)),
        lambda line: changed(line, lambda table, rows: rows[0].__setitem__(0, "1")),
        lambda line: changed(line, lambda table, rows: rows[0][1].__setitem__(slice(rows[0][0], None), [])),
    ],
)  # fmt: skip
def test_a_line_of_another_shape_is_cut_off_and_written_again(model: Any, cache: Path, damage: Any) -> None:
    whole = collect(model, cache, 150)
    path = next((cache / "self").glob("*/answers.jsonl"))
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    path.write_bytes(lines[0] + json.dumps(damage(lines[1])).encode() + b"\n" + b"".join(lines[2:]))
    assert collect(model, cache, 150) == whole
    assert path.read_bytes() == before


def test_stopping_keeps_what_was_written(model: Any, cache: Path) -> None:
    calls = iter(range(1000))
    part = collect(model, cache, 150, stopped=lambda: next(calls) > 30)
    whole = collect(model, cache, 150)
    assert 0 < len(part) < len(whole)
    assert whole[: len(part)] == part


def test_only_answers_count_in_the_loss() -> None:
    blocks = as_blocks([Answer([1, 2, 3, 4, 5], 3), Answer([6, 7], 1)])
    assert len(blocks) == 2
    assert blocks.targets(0) == 2
    assert blocks[0][0].first == 2
    assert blocks.counts(10).nonzero().flatten().tolist() == [4, 5, 7]


def test_packaged_prompts_are_varied_and_disjoint() -> None:
    train, held = read_prompts("", 40)
    assert len(set(train)) == len(train) >= 300
    assert len(set(held)) == len(held) == 40
    assert not set(train) & set(held)
    assert any("\n" in p for p in train)


def test_given_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(20)) + "\nprompt 3\n")
    train, held = read_prompts(str(tmp_path / "p.txt"), 3)
    assert len(held) == 3
    assert sorted(train + held) == sorted(f"prompt {i}" for i in range(20))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"a\n{i}"}) + "\n" for i in range(3)))
    train, held = read_prompts(str(tmp_path / "p.jsonl"), 3)
    assert (len(train), len(held)) == (2, 1)
    assert "a\n0" in train + held


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("one.txt", b"just one\n", "at least 2"),
        ("bad.jsonl", b"{}\n{}\n", '"prompt"'),
        ("worse.jsonl", b"{\n", "not a JSON object"),
        ("latin.txt", b"\xe9\n", "not UTF-8"),
    ],
)
def test_bad_prompts_are_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_prompts(str(tmp_path / name), 3)


def test_missing_and_long_prompts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(str(tmp_path / "absent.txt"), 3)
    assert fitting([[1] * 5, [1] * 100], 40) == [[1] * 5]
    with pytest.raises(UserError, match=r"raise data\.seq_len"):
        fitting([[1] * 100], 40)
