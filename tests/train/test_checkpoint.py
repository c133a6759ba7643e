"""The run's directory: the lock, the settings, checkpoints that are whole or skipped."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import exitlm
from exitlm.errors import UserError
from exitlm.train import checkpoint, sharded, tune
from exitlm.train.run import RunConfig
from tests.checkpoints import write_checkpoint
from tests.train.test_tune import arguments, tune_module


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"exits.1.lens.weight": torch.full((3, 3), value), "optimizer.step.exits.1.lens.weight": torch.tensor(value)}


def save(out: Path, step: int, keep: int = 3) -> Path:
    return checkpoint.save(out, tensors(step), {"step": step, "seconds": 1.0}, keep)


def test_the_newest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for step in (0, 5, 10):
        save(tmp_path, step, keep=2)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 10
    assert torch.equal(found.tensors["exits.1.lens.weight"], torch.full((3, 3), 10.0))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000005", "step-00000010"]


def test_what_may_be_whole_is_not_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where all are damaged, nor where the system does not let one be read."""
    for step in (1, 2):
        (save(tmp_path, step) / "state.safetensors").unlink()
    with (
        pytest.warns(UserWarning, match="step-00000002 is damaged"),
        pytest.raises(UserError, match=r"step-00000001 is damaged .*, and no other is whole; restore one, or delete"),
    ):
        checkpoint.newest(tmp_path)
    save(tmp_path, 3)

    sharded_one = tmp_path / "checkpoints" / "step-00000004"
    sharded_one.mkdir()
    (sharded_one / "sharded.json").write_text('{"format": 1, "files": {"x": [0, ""]}}')
    (sharded_one / "x").touch()

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    for step, read in ((3, checkpoint.read), (4, sharded.read_meta)):
        with pytest.raises(UserError, match=rf"step-0000000{step} can't be read \(Permission denied\); put that right"):
            read(tmp_path / "checkpoints" / f"step-0000000{step}")


@pytest.mark.parametrize("damage", ["flip", "cut", "no meta", "no tensors", "format"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    place = save(tmp_path, 2)
    data, meta = place / "state.safetensors", place / "state.json"
    if damage == "flip":
        raw = bytearray(data.read_bytes())
        raw[-1] ^= 1
        data.write_bytes(raw)
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:-5])
    elif damage == "no meta":
        meta.unlink()
    elif damage == "no tensors":
        data.unlink()
    else:
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 0}))
    with pytest.warns(UserWarning, match="step-00000002 is damaged"):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    save(tmp_path, 2)
    again = checkpoint.newest(tmp_path)
    assert again is not None
    assert again.step == 2


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    """A real limit of the operating system, in a process of its own: files may have 100 bytes."""
    save(tmp_path, 1)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            save(tmp_path, 2)
        except UserError as error:
            theirs.send(str(error))
        except BaseException as error:
            theirs.send(repr(error))

    child = context.Process(target=fill)
    child.start()
    assert "nothing was left half-written" in ours.recv()
    child.join()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    home = tmp_path / "checkpoints"
    for name in (".step-00000002.99-ab.tmp", ".old-step-00000000-7"):
        (home / name).mkdir()
    (tmp_path / ".metrics.jsonl.9-ab.tmp").write_text("x")
    checkpoint.clean(tmp_path)
    assert [p.name for p in home.iterdir()] == ["step-00000001"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_two_processes_cannot_own_one_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def hold() -> None:
        with checkpoint.exclusive(tmp_path / "run"):
            theirs.send(1)
            theirs.recv()

    child = context.Process(target=hold)
    child.start()
    assert ours.recv() == 1
    with pytest.raises(UserError, match="another run is writing"), checkpoint.exclusive(tmp_path / "run"):
        pass
    assert child.pid is not None
    os.kill(child.pid, 9)
    child.join()
    with checkpoint.exclusive(tmp_path / "run"):
        pass


def test_settings_of_a_run_are_kept_and_compared(tmp_path: Path) -> None:
    config = RunConfig().with_overrides(["train.lr=0.5"])
    checkpoint.claim(tmp_path, config)
    checkpoint.claim(tmp_path, config.with_overrides(["checkpoint.keep=9"]))
    checkpoint.claim(tmp_path, config.with_overrides(["train.lr=0.75"]))  # nothing depends on it yet
    assert RunConfig.from_toml(tmp_path / "run.toml").train.lr == 0.75
    checkpoint.claim(tmp_path, config)
    save(tmp_path, 0)
    with pytest.raises(UserError, match=r"train.lr: 0.5 -> 0.25"):
        checkpoint.claim(tmp_path, config.with_overrides(["train.lr=0.25"]))


def test_an_adapter_that_no_run_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "exits.json").write_text("{}")
    with pytest.raises(UserError, match="holds an exit adapter already"):
        checkpoint.claim(tmp_path, RunConfig())


def test_other_data_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint.check_same(tmp_path, {"data_digest": "a"}, {"data_digest": "a"})
    with pytest.raises(UserError, match="the data digest changed"):
        checkpoint.check_same(tmp_path, {"data_digest": "a"}, {"data_digest": "b"})


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), checkpoint.exclusive(tmp_path / "file"):
        pass


def test_places_that_are_taken_stay_as_they_are(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model, a file, the file of a model, an adapter, another run: refused before any work."""

    def files() -> dict[Path, bytes]:
        found = (path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.read_bytes() for path in found}

    write_checkpoint(tmp_path / "other", seed=1)
    (tmp_path / "file").write_text("a note")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    model = exitlm.load(base)
    model.add_exits([2])
    model.save_exits(tmp_path / "adapter")
    tune(**arguments(base, str(text), tmp_path / "run", steps=1))
    before = files()
    monkeypatch.setattr(tune_module, "open_tokens", lambda *_: pytest.fail("it began"))
    for name, words in (
        ("other", "other holds a model .* that is not the base of these exits"),
        ("file", "the run cannot write to .*file: File exists; choose another directory"),
        ("model.gguf", r"the run cannot write to .*model\.gguf: File exists; choose another directory"),
        ("file/run", "the run cannot write to .*: Not a directory; choose another directory"),
        ("adapter", "adapter holds an exit adapter already; choose another directory"),
        ("run", "run holds a run with other settings .*train.steps: 1 -> 2"),
    ):
        with pytest.raises(UserError, match=words):
            tune(**arguments(base, str(text), tmp_path / name, steps=2))
        assert files() == before
    assert exitlm.load(tmp_path / "other").exit_layers == []


def test_a_directory_without_permission(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, **_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"the run cannot write to .*run: Permission denied; choose another directory"):
        tune(**arguments(base, str(text), tmp_path / "run"))


def test_exits_beside_their_own_base(base: Path, text: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "own")
    tune(**arguments(own, str(text), own, steps=1))
    assert exitlm.load(own).exit_layers == [1, 3]
