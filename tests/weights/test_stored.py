"""Matrices as a GGUF file stores them are those of the loaded model, in the loaded order of rows; a parameter that was
changed since, by whatever way, has no stored form."""

from pathlib import Path

import numpy as np
import pytest
import torch

from exitlm.model import EarlyExitModel
from exitlm.weights import load_model
from exitlm.weights.gguf import converted
from exitlm.weights.stored import StoredMatrices
from tests.model.families import tiny_hf_model
from tests.native.cases import values_of
from tests.weights.gguf_files import write_gguf

SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")
UNSEEN = pytest.mark.xfail(strict=True, reason="four rows of each matrix are compared, and this is none of them")
QUERIES = "model.layers.1.self_attn.q_proj.weight"


def written(path: Path, family: str = "llama", kind: str = "Q8_0", **over: object) -> Path:
    write_gguf(path / "m.gguf", tiny_hf_model(family, **{**SIZES, **over}), kind=kind)
    return path / "m.gguf"


def matrices(model: EarlyExitModel) -> dict[str, torch.nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.dim() == 2}


def check(model: EarlyExitModel, kind: str) -> None:
    """Every matrix has a stored form, whose values are the parameter's to the last bit."""
    stored = StoredMatrices(model)
    for name, parameter in matrices(model).items():
        found = stored(name, parameter)
        assert found is not None, name
        assert (found.type, found.count, found.cols) == (kind, *parameter.shape)
        assert np.array_equal(values_of(found), parameter.detach().numpy()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_stored_matrices_are_the_loaded_parameters(tmp_path: Path, family: str, kind: str) -> None:
    """In llama's architecture, rows of q and k lie in pairs in the file; in the others as in the model."""
    over = {"use_sliding_window": False} if family == "qwen2" else {}
    check(load_model(written(tmp_path, family, kind, **over)), kind)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = load_model(written(tmp_path, kind="Q4_1", tie_word_embeddings=True))
    check(model, "Q4_1")
    assert "lm_head.weight" not in matrices(model)
    assert StoredMatrices(model)("lm_head.weight", model.lm_head.weight) is None  # by the name that it has first


def test_heads_in_groups_are_put_in_order_by_their_own_number(tmp_path: Path) -> None:
    check(load_model(written(tmp_path, num_attention_heads=4, num_key_value_heads=1)), "Q8_0")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats(tmp_path: Path, kind: str) -> None:
    """Of a file of halves the model has halves, which need no file."""
    model = load_model(written(tmp_path, kind=kind))
    found = StoredMatrices(model)(QUERIES, matrices(model)[QUERIES])
    if kind == "F32":
        check(model, kind)
    else:
        assert model.dtype != torch.float32
        assert found is None


def test_rows_that_no_type_of_the_kernels_fits_are_floats(tmp_path: Path) -> None:
    """Q5_1 has no layout; a norm is no matrix."""
    model = load_model(written(tmp_path, kind="Q5_1"))
    stored = StoredMatrices(model)
    assert all(stored(name, each) is None for name, each in model.named_parameters())


def test_a_model_of_another_dtype_has_none(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float16", "float64"):
        model = load_model(written(tmp_path), dtype=dtype)
        assert all(StoredMatrices(model)(name, each) is None for name, each in model.named_parameters())


def test_a_model_from_no_file_has_none(tmp_path: Path) -> None:
    path = written(tmp_path)
    plain = load_model(converted(path))
    assert StoredMatrices(plain)(QUERIES, matrices(plain)[QUERIES]) is None
    model = load_model(path)
    model.checkpoint = None
    assert StoredMatrices(model)(QUERIES, matrices(model)[QUERIES]) is None


def test_exits_have_no_stored_form(tmp_path: Path) -> None:
    from exitlm.model.exits import ExitConfig

    model = load_model(written(tmp_path))
    model.add_exits([ExitConfig(layer=1, kind="block", output="own")])
    stored = StoredMatrices(model)
    for name, parameter in matrices(model).items():
        assert (stored(name, parameter) is None) == name.startswith("exits.")


@torch.no_grad()
def test_a_changed_parameter_has_no_stored_form(tmp_path: Path) -> None:
    path = written(tmp_path)

    def fresh() -> EarlyExitModel:
        return load_model(path)

    model = fresh()
    parameter = matrices(model)[QUERIES]
    parameter[17, 3] += 1.0  # torch counts it
    assert StoredMatrices(model)(QUERIES, parameter) is None
    model = fresh()
    matrices(model)[QUERIES].data.mul_(1.5)  # torch does not
    assert StoredMatrices(model)(QUERIES, matrices(model)[QUERIES]) is None
    model = fresh()
    other = torch.nn.Parameter(torch.randn(256, 256))
    model.model.layers["1"].self_attn.q_proj.weight = other
    assert StoredMatrices(model)(QUERIES, other) is None
    model = fresh()
    with torch.inference_mode():
        matrices(model)[QUERIES].add_(1.0)
    assert StoredMatrices(model)(QUERIES, matrices(model)[QUERIES]) is None


@torch.no_grad()
@pytest.mark.parametrize("row", [0, pytest.param(5, marks=UNSEEN), pytest.param(100, marks=UNSEEN), 255])
def test_a_row_that_was_changed_behind_torchs_back_is_not_read_from_the_file(tmp_path: Path, row: int) -> None:
    model = load_model(written(tmp_path))
    parameter = matrices(model)[QUERIES]
    parameter.data[row] += 1.0
    found = StoredMatrices(model)(QUERIES, parameter)
    assert found is None or np.array_equal(values_of(found), parameter.numpy())


def test_a_model_that_was_loaded_in_inference_mode(tmp_path: Path) -> None:
    """Its tensors count no changes."""
    with torch.inference_mode():
        model = load_model(written(tmp_path))
    found = StoredMatrices(model)(QUERIES, matrices(model)[QUERIES])
    assert found is None or np.array_equal(values_of(found), matrices(model)[QUERIES].detach().numpy())


def test_a_file_that_is_gone_leaves_the_loaded_parameters(tmp_path: Path) -> None:
    """The model runs from its conversion."""
    path = written(tmp_path)
    model = load_model(path)
    path.unlink()
    assert StoredMatrices(model)(QUERIES, matrices(model)[QUERIES]) is None
