"""Checkpoints that processes write together: whole or skipped by all alike, never mixed, and the old ones safe."""

import base64
import errno
import os
import pickle
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from exitlm.errors import UserError
from exitlm.train import checkpoint, sharded
from tests.parallel.launch import launch

WORLD = 2
ROWS = torch.arange(12.0, dtype=torch.float64).reshape(6, 2)


def state(value: float) -> dict[str, torch.Tensor]:
    """A matrix that is cut over the processes, and a vector that all have."""
    mesh = init_device_mesh("cpu", (WORLD,))
    return {"cut": distribute_tensor(ROWS + value, mesh, [Shard(0)]), "whole": torch.full((3,), value)}


def newest(out: Path) -> tuple[int | None, list[str]]:
    """The step of what is found, and the warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = sharded.newest(out)
    return None if found is None else found[1]["step"], [str(w.message) for w in seen if w.category is UserWarning]


def saved(writer: sharded.Writer, step: int) -> list[str]:
    """Save ``step`` and wait; the warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        writer.save(state(step), {"step": step})
        writer.finish()
    return [str(w.message) for w in seen if "was not saved" in str(w.message)]


def left(out: Path) -> list[str]:
    dist.barrier()
    return sorted(path.name.removeprefix("step-0000000") for path in (out / "checkpoints").iterdir())


def flip(place: Path) -> None:
    file = place / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no index": lambda place: (place / ".metadata").unlink(),
    "an index of another": lambda place: (place / ".metadata").write_bytes(b"other"),
    "a part is cut": lambda place: os.truncate(place / "__0_0.distcp", 100),
    "a part is flipped": flip,
    "a part is gone": lambda place: (place / "__1_0.distcp").unlink(),
    "not published": lambda place: (place / "sharded.json").unlink(),
    "half of what was published": lambda place: os.truncate(place / "sharded.json", 50),
    "something else": lambda place: (place / "sharded.json").write_text("[]"),
    "no format": lambda place: (place / "sharded.json").write_text('{"format": null}'),
    "nothing in it": lambda place: (place / "sharded.json").write_text('{"format": 1, "step": 2, "files": {}}'),
}


def damaged(home: Path) -> list[Any]:
    found = []
    for name, damage in DAMAGE.items():
        out = home / name
        writer = sharded.Writer(out, 3, asynchronous=False)
        saved(writer, 1)
        saved(writer, 2)
        if dist.get_rank() == 0:
            damage(out / "checkpoints" / "step-00000002")
            (out / "checkpoints" / ".step-00000003.tmp").mkdir()
            (out / "checkpoints" / ".step-00000003.tmp" / ".metadata").touch()
            (out / "checkpoints" / "step-00000001" / ".DS_Store").touch()
        dist.barrier()
        found.append((name, *newest(out)))
        saved(writer, 2)
        assert newest(out) == (2, [])
    return found


def test_all_skip_a_damaged_one_and_only_the_first_says_so(tmp_path: Path) -> None:
    first, second = launch(WORLD, damaged, tmp_path)
    for name, step, told in first:
        assert step == 1, name
        assert len(told) == 1, name
        assert "step-00000002 is damaged" in told[0]
        assert "going on from the one before it" in told[0]
    assert second == [(name, 1, []) for name in DAMAGE]


def kept(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    writer = sharded.Writer(home / "two", 2, asynchronous=True)
    for step in range(4):
        saved(writer, step)
    found["two"] = left(home / "two"), writer.saved

    writer = sharded.Writer(home / "one", 1, asynchronous=False)
    saved(writer, 6)
    if dist.get_rank() == 0:
        flip(home / "one/checkpoints/step-00000006")
    dist.barrier()
    with pytest.raises(UserError) as refused:
        newest(home / "one")
    found["none is whole"] = str(refused.value), left(home / "one")
    saved(writer, 4)
    found["one"] = left(home / "one"), newest(home / "one")[0]

    writer = sharded.Writer(home / "changed", 3, asynchronous=True)
    tensors = state(1.0)
    writer.save(tensors, {"step": 1})
    for tensor in tensors.values():
        tensor.mul_(0.0)
    writer.finish()
    again = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    sharded.load(home / "changed/checkpoints/step-00000001", again)
    found["changed"] = all(torch.equal(again[name], tensor) for name, tensor in state(1.0).items())
    return found


def test_what_is_kept(tmp_path: Path) -> None:
    for found in launch(WORLD, kept, tmp_path):
        assert found["two"] == (["2", "3"], 3)
        told, names = found["none is whole"]
        assert "step-00000006 is damaged (the digest of __1_0.distcp is wrong), and no other is whole; restore" in told
        assert names == ["6"]
        assert found["one"] == (["4"], 4)  # not the damaged one, though its step is later
        assert found["changed"]


class Evil:
    """A pickle that makes a directory when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


def test_nothing_that_an_index_names_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, made = tmp_path / "run", tmp_path / "made"
    launch(WORLD, lambda: saved(sharded.Writer(out, 3, asynchronous=False), 1))
    place = out / "checkpoints" / "step-00000001"
    for evil in (Evil(made), [Evil(made)], getattr, os.system, checkpoint.claim):
        (place / ".metadata").write_bytes(pickle.dumps(evil))
        with pytest.raises(pickle.UnpicklingError, match=r"is no index|no part of an index"):
            sharded.Reader(place).read_metadata()
        with pytest.raises(UserError, match="can't be read as a checkpoint of this model"):
            sharded.load(place, {"whole": torch.zeros(3)}, alone=True)
    (tmp_path / "evil_module.py").write_text(f"import os\nos.mkdir({str(made)!r})\nthing = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    (place / ".metadata").write_bytes(b"cevil_module\nthing\n.")
    with pytest.raises(pickle.UnpicklingError, match=r"names evil_module.thing, which is no part of an index"):
        sharded.Reader(place).read_metadata()
    assert not made.exists()


# The index of one matrix "a" [2, 3], saved in /tmp/exits-run, as versions of Python pickle it.
INDEXES = {
    "3.11 and 3.12": (
        "eNp9Us9v0zAUzkjbAFslpG0HjhwQ24FQ4I6ExkBVla7adkWWE7801lI72M7UTZrEDgMh+Yb5f3l2fw0h6Kn+8vn78Z6/dn49jaPws8+NVEWV"
        "Mq6N4nlrgKVFBcVFI7kw6QwMZdRQZx9mq78/3eGtu3EHdlcbaoAwXhiyJt44u0VdFdn9cxBaqjPUp1P4+/bjRskGlOGgPf3Jgj7ZgIF5YLsh"
        "oLNJWUtq3r5B3O4uQmtQnNb8mhouhbPbZAqG1PRKtsaz+ksWFmPA3J07dT/QaY9kxxn5eHKavT8nx+Ojkw/D8Sfkj6LAMC63Hc2vwa2tO2f+"
        "iIwHo/hb0LG9omrFhXafffa9I3/4Z9NElqUGgzWfjaJRtFToeo+ArVXbnLa5tjtNTYUARZYDrZIquXOI64XDGo9sf+U2FAzmG8u4/CLwnu3y"
        "gI8i21uE+CNDm9sX/11/yWvQV9rAzNkdsiw4FKXcOPUV1Dj/SyANNZWnkQEZBMGicdU7b12DmOK37LAX6q1q+DfjS2zfm9w94U0Owhnu3+vX"
        "PHf20URqPp94O9zy1itnYzNrEIc5N/qlaoX77iecaIqx/N1YClxngg+I+fPYJjPJWuyG+8MhJJegdHhC3dfpIB0glv4G4Jw8Lw=="
    ),
    "3.11.2": (  # members of enums by getattr
        "eNp9Ustu00AUdcnDhTYSUkF8QUW7wAT4AhpKG0V5KEmXaDS2x/GozozxXFdppUqwaBHS7Hr5X+44ryIEXnnOnDnn3Me3+q/zmld99hB0EaVB"
        "LA0UMixBxEGUiugy11JBMBfAYw4c7W5//fuAx9/xFo/sgQEOgsUyArYh3qLd4Zh69uVUKKOLCenzmfj79bO80LkoQArj6M+X9NEWrJhHtlEF"
        "ROsnmebw4T3h9mAZ2ohC8kzecJBaod1jMwEs49e6BMdqrVhUWCxivMMx/rS7YSkzkMqQItE5QEFcCvCC9U/77PNw3P84ZaeDzvBTd3DmZF5N"
        "h+POOesMB9Pu2cXwYrIi4b0TBAxt3cgbgZuk9Yk7PmDvSa92X9naZpSW6tLgl8qp4w7/bIyvk8QIoK4c9ryet1JoOI8K26iWIS9DY/fzjCsl"
        "Crbqf+qn/h0SbpYOG9yzrbVbV8VisbWsJV8VvbMNWeE9zzaXIf7IUIb29X+3JZGZMNcGxBztPlsV2FWJ3jq1CpHRuK4EyzmkjsbarF0JRjmm"
        "J846E2pGd/3jZlXeugy3Yq6IvUedeyS8zcFkTMN1+pkM0T4daSMXI2dH09x5i7YG85xwsZBg3hSlwh+uw77hFMu9rWlF4/Rp32J3Hlh/ruOS"
        "aqP5URP8K1GYauMa74J20CYs+A0muU5N"
    ),
    "3.13": (  # paths from pathlib._local
        "eNp9Us9v0zAUzkjbAFvRpI0LJy6I7UAocOaAxkBVla7adkWWk7w01lI72M7UTZoEh4GQ3o3H/4ud/hpCkJP9+cv349lfOr+ehEH74TOrdFbG"
        "uTBWi7SxkMdZCdlFrYS08Qwsz7nlhPeT1fInHX6lGzrAPWO5BZaLzLI18YZwi1MZ4ONzkEbpM6fPp/D33w9rrWrQVoDx9N0FfbIBW+YBdtuA"
        "hFFRKW7fvHY47i1CG9CCV+KaW6Ek4TabgmUVv1KN9az+kuWK5ZDTLZ3SD+e0z5LjhH04OU3enbPj8dHJ++H4o+OPgpZhKcWOEddA5S52zvzC"
        "nd0bhd9aBexlZSMvDH3yqfeP/OafHSNVFAasK/h0FIyCpULXq7fYWrVJeZMa3KkrLiVothxlGZXRLTncLBzWeID9ldtQ5jDfWIbFZ+n+w65o"
        "8VGAvUWIPzI0KT7/78UXogJzZSzMCHfYsuBQFmrj1NdQuclfAqu5LT2NDdigFcxqKt966wrk1J0lh7223qqGfy2+xPadyd0R3uRgIid85PUr"
        "kcasUhmvCB9MlBHziXd117z1kjC0s9rhMBfWvNCNpO9+0JHhLp2XCJUEt3cvKPf7MUYzlTeuortGN4voErRp31D3VTyIBw6LfwMspjv+"
    ),
}


@pytest.mark.parametrize("version", INDEXES)
def test_an_index_of_another_python_is_read(version: str, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(zlib.decompress(base64.b64decode(INDEXES[version])))
    found = sharded.Reader(tmp_path).read_metadata()
    matrix: Any = found.state_dict_metadata["a"]
    assert (matrix.size, matrix.properties.dtype) == ((2, 3), torch.float32)
    assert (matrix.properties.layout, matrix.properties.memory_format) == (torch.strided, torch.contiguous_format)
    assert [(index.fqn, info.relative_path) for index, info in found.storage_data.items()] == [("a", "__0_0.distcp")]
    assert found.storage_meta is not None
    assert found.storage_meta.checkpoint_id == Path("/tmp/exits-run")


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    (tmp_path / "sharded.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match=r"was written by a newer version of exitlm .format 99.; update exitlm"):
        sharded.read_meta(tmp_path)


class Full(sharded.Storage):
    """A disk that takes nothing."""

    def write_data(self, *_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(home: Path) -> list[Any]:
    found: list[Any] = []
    for asynchronous in (True, False):
        for ranks in ([1], [0, 1]):
            out = home / f"{asynchronous}-{ranks}"
            writer = sharded.Writer(out, 3, asynchronous)
            saved(writer, 1)
            with pytest.MonkeyPatch.context() as patch:
                if dist.get_rank() in ranks:
                    patch.setattr(sharded, "Storage", Full)
                told = saved(writer, 2)
            found.append((told, left(out), newest(out)[0], writer.saved))
            assert saved(writer, 3) == []
            assert newest(out) == (3, [])
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(Path, "mkdir", Full.write_data)
        found.append((saved(writer, 4), left(out), newest(out)[0], writer.saved))
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(sharded, "_digests", Full.write_data)
        found.append((saved(writer, 5), left(out), newest(out)[0], writer.saved))
    return found


def test_a_full_disk_costs_one_checkpoint_and_is_told_once(tmp_path: Path) -> None:
    first, second = launch(WORLD, failing, tmp_path)
    for told, names, step, done in first:
        assert len(told) == 1
        assert "(No space left on device); the run goes on, and the checkpoints before are untouched" in told[0]
        assert str(step) == names[-1]
        assert done == step
    assert [step for _, _, step, _ in first] == [1] * 4 + [3] * 2
    assert second == [([], *rest) for _, *rest in first]


def read_back(home: Path) -> str:
    writer = sharded.Writer(home, 3, asynchronous=False)
    saved(writer, 1)
    place = home / "checkpoints/step-00000001"
    for lacking in ({"more": torch.zeros(1)}, {"whole": torch.zeros(4)}):
        with pytest.raises(UserError, match="can't be read as a checkpoint of this model"):
            sharded.load(place, lacking)
    return str(place)


def test_one_process_reads_what_two_wrote_in_silence(tmp_path: Path) -> None:
    place = Path(launch(WORLD, read_back, tmp_path)[0])
    found = {"cut": torch.zeros(6, 2, dtype=torch.float64), "whole": torch.zeros(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharded.load(place, found, alone=True)
    assert torch.equal(found["cut"], ROWS + 1.0)
    assert torch.equal(found["whole"], torch.full((3,), 1.0))
    assert sharded.read_meta(place)["step"] == 1
    assert checkpoint.list_checkpoints(tmp_path) == [place]
