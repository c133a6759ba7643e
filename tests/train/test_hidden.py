"""The frozen backbone's outputs: what is run, what is kept, and that keeping changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exitlm.model.exits import ExitConfig
from exitlm.train.backbone import TorchBackbone
from exitlm.train.data import Blocks
from exitlm.train.hidden import HiddenStates, Row, Wanted
from tests.model.families import tiny_model


@pytest.fixture
def blocks() -> Blocks:
    """Two blocks: pieces of 6 and 3 positions, and one of 8 of which the last 5 count."""
    ids = np.arange(3, 40, dtype=np.uint16)
    segments = np.array([[0, 0, 7, 0], [0, 7, 11, 0], [0, 11, 20, 3]], dtype=np.int64)
    return Blocks([ids], segments, np.array([0, 2, 3], dtype=np.int64), "d")


def states(
    model: Any, blocks: Blocks, tmp_path: Path, keep: str = "memory", limit: float = 1e9, **over: Any
) -> HiddenStates:
    wanted = Wanted(**{"exits": (1, 2), **over})
    return HiddenStates(TorchBackbone(model), blocks, wanted, keep=keep, limit=limit, home=tmp_path / "hidden")


def test_rows_are_the_models_taps(blocks: Blocks, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.add_exits([ExitConfig(layer=2, kind="mlp")])
    row = states(model, blocks, tmp_path, teacher=True).row(0)
    parts = [model.taps(s.ids[None, :-1], [1, 2, 4]) for s in blocks[0]]
    assert torch.equal(row.taps[1][0].hidden, torch.cat([p[1].hidden for p in parts], 1))
    assert torch.equal(row.taps[2][0].normed, torch.cat([p[2].normed for p in parts], 1))
    assert row.taps[1][0].normed is None
    logits = model.lm_head(model.final_features(torch.cat([p[4].hidden[0] for p in parts])))
    assert row.argmax_N is not None
    assert row.best_Nk is not None
    assert torch.equal(row.argmax_N, logits.argmax(-1))
    assert torch.equal(row.best_Nk, logits.topk(16).indices)
    torch.testing.assert_close(row.lse_N, logits.logsumexp(-1))
    assert row.labels_N.tolist() == [*range(4, 10), *range(11, 14)]


def test_only_positions_that_count_are_kept_but_for_attention(blocks: Blocks, tmp_path: Path) -> None:
    model = tiny_model("llama")
    row = states(model, blocks, tmp_path, whole=frozenset({2})).row(1)
    assert row.taps[1][0].hidden.shape[1] == 5
    assert row.taps[2][0].hidden.shape[1] == 8
    assert row.counted == (5,)


def test_no_layer_above_the_deepest_exit_runs_unless_asked(blocks: Blocks, tmp_path: Path) -> None:
    model = tiny_model("llama")
    ran: list[int] = []
    for index, layer in model.model.layers.items():
        layer.register_forward_hook(lambda *_, i=int(index): ran.append(i))
    states(model, blocks, tmp_path, final=False).row(1)
    assert sorted(ran) == [0, 1]
    ran.clear()
    states(model, blocks, tmp_path, final=True).row(1)
    assert sorted(ran) == [0, 1, 2, 3]


@pytest.mark.parametrize("keep", ["memory", "disk", "none"])
def test_the_cache_changes_nothing(blocks: Blocks, tmp_path: Path, keep: str) -> None:
    model = tiny_model("llama")
    hidden = states(model, blocks, tmp_path, keep, whole=frozenset({1}), teacher=True)
    first = [hidden.row(i).tensors() for i in (0, 1)]
    again = [hidden.row(i).tensors() for i in (0, 1)]
    for a, b in zip(first, again, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert hidden.computed == (4 if keep == "none" else 2)
    hidden.close()
    assert not (tmp_path / "hidden").exists()


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_the_cache_is_bounded(blocks: Blocks, tmp_path: Path, keep: str) -> None:
    model = tiny_model("llama")
    size = states(model, blocks, tmp_path).row(0).nbytes()
    hidden = states(model, blocks, tmp_path, keep, limit=size)
    for i in (0, 1, 0, 1):
        hidden.row(i)
    assert hidden.computed == 3
    assert hidden.bytes <= size


def test_a_full_disk_only_costs_time(blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    hidden = states(tiny_model("llama"), blocks, tmp_path, "disk")
    monkeypatch.setattr("exitlm.train.hidden.save_file", full)
    with pytest.warns(UserWarning, match="computed again"):
        hidden.row(0)
    hidden.row(0)
    assert hidden.computed == 2


def test_rows_survive_a_file(blocks: Blocks, tmp_path: Path) -> None:
    row = states(tiny_model("llama"), blocks, tmp_path, whole=frozenset({2})).row(0)
    back = Row.from_tensors(row.tensors())
    assert back.counted == row.counted
    assert len(back.taps[2]) == 2
    assert row.nbytes() == sum(t.nbytes for t in row.tensors().values())


def test_low_precision_rounds_shapes_up_and_cuts_results_back(blocks: Blocks, tmp_path: Path) -> None:
    wide, narrow = tiny_model("llama"), tiny_model("llama").to(torch.bfloat16)
    seen: set[int] = set()
    narrow.model.layers["0"].register_forward_hook(lambda _, inputs, __: seen.add(inputs[0].shape[1]))
    rows = [states(m, blocks, tmp_path, teacher=True).row(0).tensors() for m in (wide, narrow)]
    assert seen == {64}
    assert {n: t.shape for n, t in rows[0].items()} == {n: t.shape for n, t in rows[1].items()}
    a, b = (row["tap.2.0.hidden"].double() for row in rows)
    assert (a - b).abs().max() < 0.05 * a.abs().max()
