"""Files of packed matrices: they come back byte for byte, and one that is cut short, foreign, or damaged anywhere in
its head or table is refused, never believed."""

import multiprocessing
import struct
from pathlib import Path

import numpy as np
import pytest

from exitlm.errors import UserError
from exitlm.native import packfile
from exitlm.native.pack import PAIR, format_of, pack
from exitlm.native.packfile import Damaged, Packed, read, write
from tests.native.cases import cols_for, random_raw

TYPES = ("Q4_1", "Q8_0", "Q4_K", "Q6_K", "BF16", "F32")


def some(seed: int = 0) -> dict[str, Packed]:
    """A matrix of each of some formats, under names as models have them."""
    found = {}
    for i, type in enumerate(TYPES):
        raw = random_raw(type, 40 + 7 * i, cols_for(type)[1], seed)
        rows = -(-raw.count // PAIR) * PAIR
        found[f"model.layers.{i}.self_attn.q_proj.weight[None:None]"] = format_of(type), rows, raw.cols, pack(raw)
    return found


def same(found: dict[str, Packed], expected: dict[str, Packed]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name][:3] == expected[name][:3] and np.array_equal(found[name][3], expected[name][3]) for name in found
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "packed" / "model.bin"
    write(path, some(), "a mark")
    return path


def table_end(content: bytes) -> int:
    head = packfile._HEAD
    return head.size + int(head.unpack_from(content)[2])


def test_matrices_come_back_aligned(file: Path) -> None:
    found, mark = read(file)
    assert mark == "a mark"
    assert same(found, some())
    for *_, packed in found.values():
        assert packed.ctypes.data % 4096 == 0
        assert not packed.flags.writeable
    assert [path.name for path in file.parent.iterdir() if not path.name.endswith(".lock")] == ["model.bin"]


def test_a_file_without_matrices(tmp_path: Path) -> None:
    write(tmp_path / "none.bin", {}, "")
    assert read(tmp_path / "none.bin") == ({}, "")


def test_what_is_mapped_stays_when_the_file_is_replaced(file: Path) -> None:
    found, _ = read(file)
    write(file, some(1), "another")
    assert same(found, some())
    again, mark = read(file)
    assert mark == "another"
    assert same(again, some(1))
    file.unlink()
    assert same(again, some(1))


def test_a_file_that_is_cut_short_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    ends = table_end(whole) - 1, table_end(whole), 4096, len(whole) // 2, len(whole) - 1
    for length in (0, 1, 7, 8, 23, 24, 60, *ends):
        file.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            read(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(Damaged):
        read(file)


@pytest.mark.parametrize("content", [b"", b"GGUF" * 4000, b"\0" * 9000, b"exitpack", b"exitpack" + b"\xff" * 5000])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(Damaged):
        read(tmp_path / "x.bin")


def test_what_is_not_there_or_no_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        read(tmp_path / "absent.bin")
    with pytest.raises(OSError, match="directory"):
        read(tmp_path)


def test_another_layout_is_refused(file: Path) -> None:
    content = bytearray(file.read_bytes())
    struct.pack_into("<I", content, 8, packfile.LAYOUT + 1)
    file.write_bytes(content)
    with pytest.raises(Damaged, match="another layout"):
        read(file)


def test_no_flipped_byte_of_the_head_or_table_is_believed(file: Path) -> None:
    """A number that moved would give one matrix the bytes of another, and wrong text without a word."""
    whole = file.read_bytes()
    for at in range(table_end(whole)):
        content = bytearray(whole)
        content[at] ^= 1 << at % 5
        file.write_bytes(content)
        with pytest.raises(Damaged):
            read(file)


@pytest.mark.parametrize("workers", [2])
def test_processes_that_write_and_read_at_once(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "shared" / "model.bin"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_and_read, args=(path,)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * workers
    found, mark = read(path)
    assert mark == "one mark"
    assert same(found, some())
    assert not [each for each in path.parent.iterdir() if each.suffix == ".tmp"]


def write_and_read(path: Path) -> None:
    expected = some()
    for _ in range(10):
        write(path, expected, "one mark")
        found, mark = read(path)
        assert mark == "one mark"
        assert same(found, expected)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where a directory should be: a system's refusal that a superuser meets, too."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((OSError, UserError)):
        write(tmp_path / "file" / "packed" / "x.bin", some(), "")
