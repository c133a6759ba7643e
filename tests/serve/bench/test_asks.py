"""The requests of a load run: the packaged prompts and those of a file."""

from pathlib import Path

import pytest

from exitlm.errors import UserError
from exitlm.serve.bench.asks import asks_of, built_in, read_file


def test_packaged_prompts_follow_their_seed_and_are_all_different() -> None:
    found = [line["prompt"] for line in built_in(360, 1)]
    assert found == [line["prompt"] for line in built_in(360, 1)]
    assert found != [line["prompt"] for line in built_in(360, 2)]
    assert len(set(found)) == 360
    lengths = [len(prompt.split()) for prompt in found]
    assert min(lengths) < 12
    assert max(lengths) > 200
    assert len(built_in(1000, 0)) == 1000


def test_a_file_of_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        '\ufeff{"prompt": "a", "id": 3, "max_new_tokens": 5}\n\n'
        '{"messages": [{"role": "user", "content": "b"}], "seed": 1}\n',
        encoding="utf-8",
    )
    lines = read_file(file)
    assert lines == [{"prompt": "a", "max_tokens": 5}, {"messages": [{"role": "user", "content": "b"}], "seed": 1}]
    asks = asks_of(lines, 3, {"max_tokens": 9, "temperature": 0, "stop": None}, "chat")
    assert [ask.index for ask in asks] == [0, 1, 2]
    assert asks[0].body == asks[2].body == {
        "messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "temperature": 0,
    }  # fmt: skip
    assert asks[1].body["max_tokens"] == 9
    assert asks_of([{"prompt": [1, 2]}], 1, {}, "completions")[0].body == {"prompt": [1, 2]}


def test_a_file_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "p.TXT"
    file.write_text("one\r\n\n  two {\n")
    assert read_file(file) == [{"prompt": "one"}, {"prompt": "two {"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"\n \n", "holds no prompt"),
        (b"\xff", "not valid UTF-8"),
        (b'{"prompt": "a"}\nb\n', "line 2 of"),
        (b"[1]", "line 1 of"),
        (b'{"x": 1}', "with prompt or messages"),
        (b'{"prompt": "a", "messages": []}', "with prompt or messages"),
        (b'{"prompt": 3}', "a prompt that is no text"),
        (b'{"messages": "a"}', "messages that are no list"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "p.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_file(file)


def test_prompts_that_an_endpoint_does_not_take() -> None:
    with pytest.raises(UserError, match="--endpoint completions"):
        asks_of([{"prompt": [1]}], 1, {}, "chat")
    with pytest.raises(UserError, match="--endpoint chat"):
        asks_of([{"messages": []}], 1, {}, "completions")
