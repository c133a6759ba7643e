"""Tuning with hidden states from the native kernels: near what torch gives, recorded, and gone on with by the same."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from exitlm.errors import UserError
from exitlm.native import library
from exitlm.train import backbone, tune
from exitlm.train import checkpoint as run_files
from tests.checkpoints import VOCAB, write_tokenizer
from tests.model.families import native_sizes, tiny_hf_model
from tests.native.cases import needs_native
from tests.train.test_tune import arguments, killed_until_done, metrics_of, same, stop_after
from tests.weights.gguf_files import write_gguf

pytestmark = needs_native


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of whatever processor this is count as fast."""
    monkeypatch.setattr(backbone, "FAST", (library.load().isa,))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in 4 bits, with a byte tokenizer."""
    place = tmp_path_factory.mktemp("base")
    hf = tiny_hf_model("llama", vocab_size=VOCAB, max_position_embeddings=64, **native_sizes("llama"))
    write_gguf(place / "m.gguf", hf, kind="Q4_1")
    write_tokenizer(place)
    return place / "m.gguf"


def run_of(base: Path, text: Path, out: Path, *settings: str, **over: Any) -> dict[str, Any]:
    """The arguments of a run."""
    return arguments(base, str(text), out, f"data.tokenizer={base.parent}", *settings, **over)


def by_torch(monkeypatch: pytest.MonkeyPatch, call: dict[str, Any]) -> Path:
    with monkeypatch.context() as patch:
        patch.setenv("EXITLM_NATIVE", "0")
        return tune(**call)


def training_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "exits.json").read_text())["training"])


@pytest.mark.parametrize("kinds", ["lens,mlp", "block,norm"])
def test_it_learns_what_torch_learns(
    base: Path, kinds: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = run_of(base, text, tmp_path / "native", f"exits.kind={kinds}", "train.validate_every=4")
    native, torchs = tune(**call), by_torch(monkeypatch, {**call, "out": tmp_path / "torch"})
    assert [training_of(run)["backbone"] for run in (native, torchs)] == ["native", "torch"]
    for mine, its in zip(metrics_of(native), metrics_of(torchs), strict=True):
        assert mine.keys() == its.keys()
        for name, value in mine.items():
            allowed = 0.02 if "agreement" in name else 5e-3 * max(1.0, abs(its[name]))
            assert abs(value - its[name]) <= allowed, name


def test_a_run_goes_on_with_the_same_bits(base: Path, text: Path, tmp_path: Path) -> None:
    call = run_of(base, text, tmp_path / "whole", "exits.kind=mlp,block")
    whole = tune(**call)
    call = {**call, "out": tmp_path / "run"}
    stop_after(3, lambda: tune(**call))
    assert same(whole, tune(**call))
    assert metrics_of(whole) == metrics_of(tmp_path / "run")


def test_killed_runs_end_with_the_same_tensors(base: Path, text: Path, tmp_path: Path) -> None:
    """In forked processes, whose kernels begin with other threads than their parent's."""
    call = run_of(base, text, tmp_path / "whole", save_every=1, steps=20)
    began = time.monotonic()
    whole = tune(**call)
    longest = (time.monotonic() - began) / 2
    for attempt in range(3):  # a quick run may be over before its kill
        out = tmp_path / f"run{attempt}"
        killed_until_done({**call, "out": out}, seed=attempt, kills=2, longest=longest)
        assert same(whole, out)


def test_another_backbone_is_refused(base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = run_of(base, text, tmp_path / "run")
    whole = tune(**{**call, "out": tmp_path / "whole"})
    stop_after(3, lambda: tune(**call))
    assert run_files.newest(tmp_path / "run").meta["backbone"] == "native"
    with pytest.raises(UserError, match=r"hidden states came from the native kernels.*EXITLM_NATIVE=0.*to go on"):
        by_torch(monkeypatch, call)
    assert same(whole, tune(**call))
    by_torch(monkeypatch, call)  # a finished run needs none


@pytest.mark.parametrize("named", [True, False])
def test_what_torch_began_torch_ends(
    named: bool, base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As do runs that name no backbone: there was one only."""
    call = run_of(base, text, tmp_path / "run")
    whole = by_torch(monkeypatch, {**call, "out": tmp_path / "whole"})
    stop_after(3, lambda: by_torch(monkeypatch, call))
    if not named:
        for state in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
            meta = json.loads(state.read_text())
            assert meta.pop("backbone") == "torch"
            state.write_text(json.dumps(meta))
    assert same(whole, tune(**call))
    assert training_of(tmp_path / "run")["backbone"] == "torch"


def test_cross_entropy_runs_the_lower_layers_alone(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("exits.kind=norm", "objective.distill=0", "exits.init=copy")
    call = run_of(base, text, tmp_path / "native", *settings, exits=[1, 2])
    native, torchs = tune(**call), by_torch(monkeypatch, {**call, "out": tmp_path / "torch"})
    assert training_of(native)["backbone"] == "native"
    losses = [[line["loss/2"] for line in metrics_of(run)] for run in (native, torchs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
