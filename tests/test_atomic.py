"""Files and directories put in place whole: crashes, full disks, several writers, locks."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exitlm import UserError
from exitlm.atomic import locked, replace_directory, replace_file

LONG = "n" * 255


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process of these lines, whose stdin and stdout are pipes."""
    text = "import os, sys\nfrom pathlib import Path\nfrom exitlm.atomic import *\n" + code
    return subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def write_directory(path: Path, content: str, *, overwrite: bool = False) -> None:
    with replace_directory(path, overwrite=overwrite) as place:
        (place / "deep").mkdir()
        (place / "deep" / "file").write_text(content)


def fail_file(path: Path, error: BaseException) -> None:
    with replace_file(path) as place:
        place.write_text("half")
        raise error


def fail_directory(path: Path, error: BaseException, *, overwrite: bool = False) -> None:
    with replace_directory(path, overwrite=overwrite) as place:
        (place / "half").touch()
        raise error


def touch(path: Path) -> None:
    with replace_file(path) as place:
        place.touch()


def hold(path: Path, timeout: float) -> None:
    with locked(path, timeout=timeout):
        pass


def content(path: Path) -> str:
    return (path / "deep" / "file").read_text()


@pytest.mark.parametrize("name", ["file", ".hidden", LONG, "ä" * 127, "with space"])
def test_a_file_is_put_in_place_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / "made" / name
    for text in ("old", "new"):
        with replace_file(path) as place:
            assert place.parent == path.parent
            place.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert names(path.parent) == [name]


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        fail_file(path, ZeroDivisionError())
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_writer_that_is_killed_leaves_the_old_content(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "place"
    if kind == "file":
        path.write_text("old")
        code = "with replace_file(Path(sys.argv[1])) as p: p.write_text('half'); os._exit(9)"
    else:
        write_directory(path, "old")
        code = "with replace_directory(Path(sys.argv[1]), overwrite=True) as p: (p / 'deep').mkdir(); os._exit(9)"
    assert run(code, path).wait() == 9
    assert (path.read_text() if kind == "file" else content(path)) == "old"
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["place"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_content_is_on_the_disk_before_its_name(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power failure, a name without its content would be a file of zeros."""
    events: list[str] = []

    def record(name: str, inner: Callable[..., Any], event: Callable[..., str]) -> None:
        monkeypatch.setattr(os, name, lambda *given: (events.append(event(*given)), inner(*given))[1])

    fsync, identity = os.fsync, {}
    record("fsync", fsync, lambda descriptor: f"sync {identity.get(os.fstat(descriptor).st_ino, 'parent')}")
    record("replace", os.replace, lambda *_: "name")
    record("rename", os.rename, lambda *_: "name")
    if kind == "file":
        with replace_file(tmp_path / "x") as place:
            place.write_text("content")
            identity[place.stat().st_ino] = "content"
        assert events == ["sync content", "name", "sync parent"]
    else:
        with replace_directory(tmp_path / "x") as place:
            (place / "file").write_text("content")
            identity[(place / "file").stat().st_ino] = "content"
            identity[place.stat().st_ino] = "directory"
        assert events == ["sync content", "sync directory", "name", "sync parent"]


def test_of_two_writers_a_reader_sees_one_or_the_other(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 200_000
    with replace_file(path) as place:
        place.write_text("a" * size)
    ended = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not ended.is_set():
            text = path.read_text()
            seen.add(text if len(set(text)) > 1 or len(text) != size else "whole")

    def write(letter: str) -> None:
        for _ in range(30):
            with replace_file(path) as place:
                place.write_text(letter * size)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    reader.join()
    assert seen == {"whole"}
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for fail in (fail_file, fail_directory):
        with pytest.raises(
            UserError, match=r"^cannot write .*x: No space left on device; nothing was left half-written"
        ):
            fail(tmp_path / "x", full)
    assert names(tmp_path) == []


def test_errors_that_are_not_of_writing_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replace_file(tmp_path / "file"):
        (tmp_path / "input").read_text()
    with pytest.raises(ConnectionResetError), replace_directory(tmp_path / "directory"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    assert names(tmp_path) == []


def test_places_that_cannot_be_written_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "full" / "x").mkdir(parents=True)
    for write in (touch, lambda path: write_directory(path, "x")):
        with pytest.raises(UserError, match=r"^cannot write .*file/below: .*; nothing was left half-written"):
            write(tmp_path / "file" / "below")
        for nameless in (Path("/"), Path(), tmp_path / ".."):
            with pytest.raises(UserError, match="names no file"):
                write(nameless)
    with pytest.raises(UserError, match=r"cannot write .*full: .*directory"):
        touch(tmp_path / "full")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"file is a file; choose a directory"):
            write_directory(tmp_path / "file", "x", overwrite=overwrite)
    assert names(tmp_path) == ["file", "full"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_directory_is_put_in_place_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / LONG
    write_directory(path, "first")
    with pytest.raises(UserError, match="exists and is not empty; choose another directory or delete it first"):
        write_directory(path, "second")
    assert content(path) == "first"
    write_directory(path, "second", overwrite=True)
    assert content(path) == "second"
    shutil.rmtree(path)
    path.mkdir()
    write_directory(path, "third")  # an empty directory makes room
    assert content(path) == "third"
    assert names(path.parent) == [LONG]


def test_a_directory_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "place"
    write_directory(path, "old")
    with pytest.raises(ZeroDivisionError):
        fail_directory(path, ZeroDivisionError(), overwrite=True)
    assert content(path) == "old"
    assert names(tmp_path) == ["place"]


def test_a_directory_that_cannot_take_the_name_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "place", os.rename
    write_directory(path, "old")

    def refuse(source: Path, destination: Path) -> None:
        if destination == path and source.suffix == ".tmp":
            raise OSError(errno.EACCES, "Permission denied", str(source), None, str(destination))
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match=r"cannot write .*place: Permission denied"):
        write_directory(path, "new", overwrite=True)
    assert content(path) == "old"
    assert names(tmp_path) == ["place"]


def test_of_two_writers_of_a_directory_the_first_wins(tmp_path: Path) -> None:
    path = tmp_path / "place"

    def late() -> None:
        with replace_directory(path) as place:
            (place / "late").touch()
            write_directory(path, "early")

    with pytest.raises(UserError, match="exists and is not empty"):
        late()
    assert content(path) == "early"
    assert names(tmp_path) == ["place"]


def test_writers_that_overwrite_a_directory_leave_one_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "place"
    failures: list[BaseException] = []

    def write(letter: str) -> None:
        try:
            for _ in range(30):
                write_directory(path, letter, overwrite=True)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert not failures
    assert content(path) in {"a", "b", "c"}
    assert names(tmp_path) == ["place"]


def test_one_process_at_a_time_is_let_in(tmp_path: Path) -> None:
    """Four processes count in a file; without the lock, one would write what another has just read."""
    path = tmp_path / "made" / "count"
    code = """
path = Path(sys.argv[1])
for _ in range(50):
    with locked(path):
        seen = int(path.read_text()) if path.exists() else 0
        path.write_text(str(seen + 1))
"""
    processes = [run(code, path) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert path.read_text() == "200"


def test_threads_lock_each_other_out(tmp_path: Path) -> None:
    count = [0]

    def add() -> None:
        for _ in range(50):
            with locked(tmp_path / "x"):
                seen = count[0]
                threading.Event().wait(0)  # another thread's turn
                count[0] = seen + 1

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == [150]


def test_a_held_lock_is_one_sentence_and_dies_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "place"
    holder = run("with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()", path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match=r"^another process writes to .*place; wait for it, or choose another"):
            hold(path, 0)
        with pytest.raises(UserError, match=r"^another process has been writing to .*place for 0\.1 s; wait"):
            hold(path, 0.1)
    finally:
        holder.kill()
        holder.communicate()
    with locked(path, timeout=0):
        assert not path.exists()


def test_a_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(FileNotFoundError), locked(tmp_path / LONG, timeout=0):
            (tmp_path / "absent").read_text()


def test_a_lock_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, sentence in (
        (tmp_path / "file" / "below", r"^cannot lock .*below: .*; choose a place that can be written$"),
        (Path("/"), "^'/' names no file; "),
    ):
        with pytest.raises(UserError, match=sentence):
            hold(path, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="flock")
def test_a_file_system_without_locks_lets_everybody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    entered = 0
    with locked(tmp_path / "x", timeout=0), locked(tmp_path / "x", timeout=0):
        entered += 1
    assert entered == 1
