"""Where entries come from: keys that are pressed, and pipes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from exitlm.chat import keyboard
from exitlm.chat.entries import Command, Said
from exitlm.chat.history import read_history
from exitlm.chat.keyboard import Pipe, Terminal
from exitlm.errors import UserError

Keys = list[str | type[BaseException]]
TerminalOf = Callable[..., Terminal]


@pytest.fixture
def shown() -> list[str]:
    return []


@pytest.fixture
def prompts() -> list[str]:
    return []


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: list[str], prompts: list[str]) -> TerminalOf:
    """A terminal at which a list of lines and of interrupts is typed."""

    def typed(keys: Keys, history: str | None = "h") -> Terminal:
        rest = iter(keys)

        def read(prompt: str = "") -> str:
            prompts.append(prompt)
            key = next(rest, EOFError)
            if isinstance(key, str):
                return key
            raise key

        monkeypatch.setattr("builtins.input", read)
        return Terminal(None if history is None else tmp_path / history, ["/mode"], shown.append)

    return typed


def test_entries_are_read_and_kept(terminal: TerminalOf, tmp_path: Path, prompts: list[str]) -> None:
    keys = terminal(["hello", "", "a \\", "b", "/mode full"])
    assert [keys.read() for _ in range(4)] == [Said("hello"), None, Said("a \nb"), Command("mode", "full")]
    with pytest.raises(EOFError):
        keys.read()
    assert read_history(tmp_path / "h") == ["hello", "a \\\nb", "/mode full"]
    assert prompts == ["> ", "> ", "> ", ". ", "> ", "> "]


def test_the_second_interrupt_leaves(terminal: TerminalOf, shown: list[str]) -> None:
    with pytest.raises(EOFError):
        terminal([KeyboardInterrupt, KeyboardInterrupt]).read()
    assert "Ctrl-C again leaves" in shown[0]
    keys = terminal([KeyboardInterrupt, "hello", KeyboardInterrupt, "again", KeyboardInterrupt, KeyboardInterrupt])
    assert [keys.read(), keys.read()] == [Said("hello"), Said("again")]
    with pytest.raises(EOFError):
        keys.read()


def test_an_interrupt_drops_an_entry_that_has_begun(terminal: TerminalOf, tmp_path: Path) -> None:
    keys = terminal(['"""one', KeyboardInterrupt, "two"])
    assert keys.read() is None
    assert keys.read() == Said("two")
    assert read_history(tmp_path / "h") == ["two"]


def test_the_history_can_be_off(terminal: TerminalOf, tmp_path: Path) -> None:
    assert terminal(["hello"], None).read() == Said("hello")
    assert list(tmp_path.iterdir()) == []


def test_readline_has_the_history_and_completes_commands(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    found = keyboard._readline(["/mode", "/model", "/quit"], ["one", "two\nlines"])
    assert found is readline
    assert [readline.get_history_item(i) for i in (1, 2)] == ["one", "two\nlines"]
    complete = readline.get_completer()
    assert [complete("/mo", i) for i in range(3)] == ["/mode ", "/model ", None]
    readline.clear_history()


def test_without_readline_lines_are_read_all_the_same(terminal: TerminalOf, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "readline", None)
    assert terminal(["hello"]).read() == Said("hello")


def test_a_pipe() -> None:
    pipe = Pipe(io.BytesIO('one\r\n\n/mode full\n"""two\n"""\nlast ö'.encode()))
    assert [pipe.read() for _ in range(5)] == [Said("one"), None, Command("mode", "full"), Said("two"), Said("last ö")]
    with pytest.raises(EOFError):
        pipe.read()


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\n", "not valid UTF-8"), (b'"""one', "within an entry"), (b"one\\\n", "within an")]
)
def test_a_broken_pipe_is_one_sentence(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pipe(io.BytesIO(content)).read()
