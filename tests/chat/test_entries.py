"""From typed lines to entries, and what of them is kept between chats."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitlm.chat import history
from exitlm.chat.entries import Command, Said, read_entry
from exitlm.chat.history import append_history, history_file, read_history


def reader(lines: list[str]) -> Callable[[bool], str]:
    """Gives these lines, then the end."""
    rest: Iterator[str] = iter(lines)

    def read(begun: bool) -> str:
        line = next(rest, None)
        if line is None:
            raise EOFError
        return line

    return read


@pytest.mark.parametrize(
    ("lines", "entry"),
    [
        (["hello"], Said("hello")),
        (["  hello  "], Said("hello")),
        ([""], None),
        (["   "], None),
        (["one \\", "two"], Said("one \ntwo")),
        (["one\\", "\\", "three"], Said("one\n\nthree")),
        (["one \\\ntwo"], Said("one \ntwo")),  # from the history, at once
        (['"""one', "two", '"""'], Said("one\ntwo")),
        (['"""', "/mode full", "  two  ", '"""'], Said("/mode full\n  two  ")),
        (['"""one"""'], Said("one")),
        (['"""one\ntwo"""'], Said("one\ntwo")),
        (['say """this"""'], Said('say """this"""')),
        (["/mode full"], Command("mode", "full")),
        (["  /mode   full "], Command("mode", "full")),
        (["/help"], Command("help", "")),
        (["/"], Command("", "")),
        (["//etc/passwd"], Said("/etc/passwd")),
        (['/system """one', 'two"""'], Command("system", "one\ntwo")),
        (["/system one \\", "two"], Command("system", "one \ntwo")),
        (['/system say """'], Command("system", 'say """')),
        (["what is 1/2?"], Said("what is 1/2?")),
    ],
)
def test_entries(lines: list[str], entry: Said | Command | None) -> None:
    assert read_entry(reader(lines)) == entry


@pytest.mark.parametrize("lines", [[], ["one\\"], ['"""one', "two"]])
def test_the_end_comes_too_soon(lines: list[str]) -> None:
    with pytest.raises(EOFError):
        read_entry(reader(lines))


@given(st.text(st.characters(exclude_characters='\r\n"\\', exclude_categories=["Cs"])))
def test_quotes_hold_any_text(text: str) -> None:
    found = read_entry(reader(['"""', *text.split("\n"), '"""']))
    assert found == Said(text.strip("\n"))


def test_the_history_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "state" / "chat_history"
    entries = ["one", "two\nlines", "drei\u2028 ö", "\ud800"]
    assert read_history(path) == []
    for entry in entries:
        append_history(path, entry)
    assert read_history(path) == [*entries[:3], "?"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_open_file_is_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "chat_history"
    path.write_text('not json\n"old"\n3\n\n"')
    path.chmod(0o644)
    assert read_history(path) == ["old"]
    path.write_text('"old"\n')
    append_history(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_history(path) == ["old", "new"]


def test_a_long_history_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST", 3)
    path = tmp_path / "chat_history"
    for number in range(10):
        append_history(path, str(number))
    assert read_history(path) == ["7", "8", "9"]
    assert path.read_text().splitlines() == ['"7"', '"8"', '"9"']
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_place_that_can_t_be_written_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    append_history(tmp_path / "file" / "chat_history", "one")
    append_history(tmp_path, "one")
    assert read_history(tmp_path) == []
    assert (tmp_path / "file").read_text() == "x"


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "exitlm" / "chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / ".local" / "state" / "exitlm" / "chat_history"
