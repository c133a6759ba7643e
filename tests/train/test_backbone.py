"""The frozen backbone by torch and by the native kernels: near each other, and the native one the same to the last bit
whatever runs before it or beside it."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exitlm.decode.kernels.native_model import NativeModel
from exitlm.decode.kernels.packed import packed_model
from exitlm.decode.options import EngineConfig
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel
from exitlm.model.exits import ExitConfig
from exitlm.model.layers import Tap
from exitlm.native import library
from exitlm.train import backbone as module
from exitlm.train.backbone import Backbone, NativeBackbone, TorchBackbone, backbone_of, teacher_summary
from exitlm.train.objective import Scratch
from exitlm.weights.load import load_model
from tests.checkpoints import write_checkpoint
from tests.decode.driver import Driver, make_runner
from tests.decode.models import attach, random_ids, worst
from tests.decode.test_native_model import rounded
from tests.model.families import FAMILIES, native_sizes, tiny_hf_model, tiny_model
from tests.native.cases import needs_native, threads
from tests.weights.gguf_files import write_gguf

FLOAT, ROUNDED = 1e-5, 1e-3
LENGTHS = (3, 40, 1, 33)
LAYERS = (1, 3, 4)
EXITS = [ExitConfig(layer=1, kind="mlp"), ExitConfig(layer=3), ExitConfig(layer=4, kind="block")]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def pieces(lengths: Sequence[int] = LENGTHS, vocab_size: int = 97) -> list[Tensor]:
    return [torch.tensor(random_ids(count, seed, vocab_size)) for seed, count in enumerate(lengths)]


def packed(model: EarlyExitModel, quant: str, keys: str = "float16") -> NativeBackbone:
    """The backbone with matrices in this format."""
    native = packed_model(model, quant, "none", EngineConfig(kv_dtype=keys))
    assert isinstance(native, NativeModel)
    return NativeBackbone(model, native)


def on_grid(model: EarlyExitModel) -> NativeBackbone:
    """The backbone whose matrices are rounded to 8 bits."""
    return packed(model, "q8_0")


def in_floats(model: EarlyExitModel) -> NativeBackbone:
    """The backbone that rounds nothing."""
    return packed(model, "auto", "float32")


def fields(tap: Tap) -> list[Tensor]:
    return [t for t in (tap.hidden, tap.residual, tap.normed) if t is not None]


def alike(one: Sequence[dict[int, Tap]], other: Sequence[dict[int, Tap]]) -> bool:
    pairs = [(a[layer], b[layer]) for a, b in zip(one, other, strict=True) for layer in LAYERS]
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(fields(a), fields(b), strict=True))


def close(found: Backbone, expected: Backbone, tolerance: float, given: Sequence[Tensor]) -> None:
    """All taps of all pieces; the error is a fraction of the largest value of its kind."""
    both = [list(each.taps(given, LAYERS)) for each in (found, expected)]
    for layer in LAYERS:
        mine, theirs = ([fields(taps[layer]) for taps in many] for many in both)
        assert [[t.shape for t in tap] for tap in mine] == [[t.shape for t in tap] for tap in theirs]
        for a, b in zip(zip(*mine, strict=True), zip(*theirs, strict=True), strict=True):
            assert worst(torch.cat(a, 1), torch.cat(b, 1)) <= tolerance, layer


@needs_native
@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_those_of_torch(family: str) -> None:
    """In floats, and with weights and activations on a grid: 15 bits."""
    model = tiny_model(family, torch.float32, **native_sizes(family))
    attach(model, EXITS)
    close(in_floats(model), TorchBackbone(model), FLOAT, pieces())
    close(on_grid(model), TorchBackbone(rounded(model)), ROUNDED, pieces())


@needs_native
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "F16"])
def test_a_files_own_grid_is_run(tmp_path: Path, kind: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    write_gguf(tmp_path / "m.gguf", tiny_hf_model("llama", **sizes), kind=kind)
    model = load_model(tmp_path / "m.gguf", dtype="float32")
    close(packed(model, "auto", "float32"), TorchBackbone(model), ROUNDED, pieces())


@needs_native
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "phi3"])
def test_a_piece_is_the_same_whatever_ran_before_it_or_beside_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in company, behind a larger block, in passes cut anywhere, and on any number of threads."""
    model = tiny_model(family, torch.float32, **native_sizes(family))
    attach(model, EXITS)
    backbone = on_grid(model)
    together = list(backbone.taps(pieces(), LAYERS))
    assert alike(together, [next(on_grid(model).taps([piece], LAYERS)) for piece in pieces()])
    list(backbone.taps(pieces((90, 70, 2)), LAYERS))
    assert alike(together, list(backbone.taps(pieces(), LAYERS)))
    for count in (1, 3):
        with threads(count):
            assert alike(together, list(backbone.taps(pieces(), LAYERS)))
    for rows in (1, 7, 32, 43):
        monkeypatch.setattr(module, "PASS_ROWS", rows)
        assert alike(together, list(backbone.taps(pieces(), LAYERS))), rows
    turned = list(backbone.taps(pieces()[::-1], LAYERS))[::-1]
    assert alike(together, turned)


@needs_native
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_exits_meet_the_same_rows_when_they_decode(family: str) -> None:
    """Token by token through the cache, in blocks of another size, to each boundary in turn."""
    model = tiny_model(family, torch.float32, **native_sizes(family))
    attach(model, [ExitConfig(layer=1, kind="mlp"), ExitConfig(layer=3)])
    backbone, piece = on_grid(model), pieces((40,))[0]
    taps = next(backbone.taps([piece], LAYERS))
    driver = Driver(make_runner(packed_model(model, "q8_0", "none", EngineConfig())))
    for at, token in enumerate(piece.tolist()):
        for boundary, layer in enumerate(LAYERS, 1):
            arrived = driver.advance([token] if boundary == 1 else [], boundary)
            assert torch.equal(arrived.hidden_MD[0], taps[layer].hidden[0, at]), (layer, at)
            if layer == 1:
                assert torch.equal(arrived.residual_MD[0], fields(taps[layer])[1][0, at])


@needs_native
def test_a_piece_longer_than_the_first_context_has_the_rotations_of_long_ones() -> None:
    scaling = {
        "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 16, "long_factor": [3.0] * 16,
        "factor": 8.0,
    }  # fmt: skip
    over = {**native_sizes("phi3"), "rope_parameters": scaling, "original_max_position_embeddings": 16}
    model = tiny_model("phi3", torch.float32, **over)
    assert model.config.rope.kind == "longrope"
    close(in_floats(model), TorchBackbone(model), FLOAT, pieces((16, 17, 40)))


@needs_native
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_teacher_is_that_of_torch(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "chunk_tokens", lambda _: 8)
    model = tiny_model("qwen3", torch.float32, **native_sizes("qwen3"))
    hidden = torch.randn(21, 64, generator=torch.Generator().manual_seed(0))
    for native, torchs, tolerance in (
        (NativeBackbone(model), TorchBackbone(model), FLOAT),
        (on_grid(model), TorchBackbone(rounded(model)), ROUNDED),
    ):
        features = native.features(hidden)
        found, expected = (b.teacher(features, temperature) for b in (native, torchs))
        assert torch.equal(found.argmax_N, found.best_Nk[:, 0])
        assert found.best_Nk.shape == (21, 16)
        assert worst(found.lse_N, expected.lse_N) <= tolerance
        logits = torchs.model.lm_head(features)
        best = logits.gather(1, found.best_Nk)
        assert (best - logits.topk(16).values).abs().max() <= 2 * tolerance * logits.abs().max()
        parts = [native.teacher(each, temperature) for each in torch.split(features, [1, 13, 7])]
        for name in ("argmax_N", "lse_N", "best_Nk"):
            assert torch.equal(getattr(found, name), torch.cat([getattr(part, name) for part in parts]))


@needs_native
def test_rows_that_hold_no_numbers_change_no_others() -> None:
    model = tiny_model("llama", torch.float32, **native_sizes("llama"))
    backbone, features = on_grid(model), torch.randn(5, 64)
    expected = backbone.teacher(features, 1.0)
    features[2] = torch.nan
    found = backbone.teacher(features, 1.0)
    others = [0, 1, 3, 4]
    assert int(found.argmax_N[2]) == 0
    assert torch.equal(found.argmax_N[others], expected.argmax_N[others])
    assert torch.equal(found.lse_N[others], expected.lse_N[others])


def test_a_summary_by_torch_in_chunks() -> None:
    x, w = torch.randn(10, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    found = teacher_summary(x, w, 2.0, Scratch(3, x.device))
    logits = x @ w.T
    assert torch.equal(found.argmax_N, logits.argmax(-1))
    assert found.best_Nk.shape == (10, 16)
    torch.testing.assert_close(found.lse_N, (logits / 2).logsumexp(-1))


@needs_native
def test_a_model_without_its_upper_layers_runs_and_is_not_kept(tmp_path: Path, cache: Path) -> None:
    base = write_checkpoint(tmp_path / "base", **native_sizes("llama"))
    low, whole = load_model(base, layers=[1, 2]), load_model(base)
    part = in_floats(low)
    assert not (cache / "packed").exists()
    full = in_floats(whole)
    assert len(list((cache / "packed").glob("*.bin"))) == 1
    found, expected = (next(each.taps(pieces((20,)), (1, 2))) for each in (part, full))
    assert torch.equal(found[2].hidden, expected[2].hidden)
    close_to = next(TorchBackbone(whole).taps(pieces((20,)), (1, 2)))
    assert worst(found[2].hidden, close_to[2].hidden) <= FLOAT


def gguf(place: Path, kind: str, dtype: str = "float32") -> EarlyExitModel:
    """A model of a file whose matrices are of this kind."""
    write_gguf(place / f"{kind}.gguf", tiny_hf_model("llama", **native_sizes("llama")), kind=kind)
    return load_model(place / f"{kind}.gguf", dtype=dtype)


@needs_native
@pytest.mark.parametrize(
    ("kind", "dtype", "isa", "native"),
    [
        ("Q4_1", "float32", "avx512vnni", True),
        ("Q8_0", "float32", "avxvnni", True),
        ("Q4_1", "float32", "avx2", False),
        ("Q4_1", "bfloat16", "avx512vnni", False),
        ("F16", "float32", "avx512vnni", False),
    ],
)
def test_the_faster_one_runs(
    kind: str, dtype: str, isa: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = library.load()
    monkeypatch.setattr(library, "load", lambda: dataclasses.replace(loaded, isa=isa))
    model = gguf(tmp_path, kind, dtype)
    assert backbone_of(model).kernels == ("native" if native else "torch")
    assert backbone_of(model, "native").kernels == "native"
    assert backbone_of(model, "torch").kernels == "torch"


@needs_native
def test_what_the_kernels_lack_runs_by_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FAST", (library.load().isa,))
    assert isinstance(backbone_of(gguf(tmp_path, "Q4_1")), NativeBackbone)
    assert isinstance(backbone_of(tiny_model("llama", torch.float32)), TorchBackbone)  # heads of 12 dimensions
    changed = gguf(tmp_path, "Q4_0")
    changed.model.layers["0"].self_attn.q_proj.weight.add_(1.0)
    assert isinstance(backbone_of(changed), TorchBackbone)
    monkeypatch.setenv("EXITLM_NATIVE", "0")
    assert isinstance(backbone_of(gguf(tmp_path, "Q4_1")), TorchBackbone)
    with pytest.raises(UserError, match=r"hidden states came from the native kernels.*EXITLM_NATIVE=0"):
        backbone_of(gguf(tmp_path, "Q4_1"), "native")
