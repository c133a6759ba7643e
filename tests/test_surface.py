"""The Python surface under wrong values: whatever is given for whichever argument, it works or is one sentence."""

import itertools
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import exitlm
from exitlm import UserError
from exitlm.decode.generation import GenerationConfig
from exitlm.train import RunConfig, model_of_run, train, tune
from tests.checkpoints import VOCAB

IDS = [5, 9, 77, 200, 31]
pytestmark = pytest.mark.usefixtures("cache")
VALUES: list[Any] = [
    None, True, 5, -1, 2**70, 10**400, 1.5, math.nan, math.inf, 1j, "x", "", "a\0b", "\ud800", b"x", [], {}, {"x": 1},
    {1: "x"}, [None], [True], [1.5], ["x"], [[1], [2, 3]], {1, 2}, object(), float, Path("x"), range(3), torch.float32,
    torch.tensor(0.5), torch.tensor(True), torch.tensor([3]), torch.tensor([]), np.int64(3), np.float32(0.5),
    np.array([1, 2]), np.array(["x"]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Paths such as "x" are in a directory of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> exitlm.LLM:
    found = exitlm.load(checkpoint, dtype="float64")
    found.add_exits([1, 3], kind="norm", gate=True)
    return found


def refusals(call: Callable[[Any], object], values: list[Any] = VALUES) -> dict[str, str]:
    """What ``call`` says to each value that it refuses; anything but a UserError of one line is a failure."""
    said: dict[str, str] = {}
    for value in values:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(value)
        except UserError as error:
            said[repr(value)] = str(error)
        except Exception as error:
            raise AssertionError(f"{value!r} raises {type(error).__name__}: {error}") from error
    assert all("\n" not in sentence and len(sentence) < 500 for sentence in said.values()), said
    return said


@pytest.mark.parametrize("mode", ["threshold", "lossless"])
@pytest.mark.parametrize("name", [field.name for field in fields(GenerationConfig)])
def test_settings_of_a_generation(model: exitlm.LLM, name: str, mode: str) -> None:
    others = {"exit_layer": {"rule": "fixed"}, "patience": {"rule": "patience"}, "top_k": {"temperature": 0.5}}
    base: dict[str, Any] = {"max_new_tokens": 4, "mode": mode, **others.get(name, {})}
    said = refusals(lambda value: model.generate("hi", **{**base, name: value}))
    assert len(said) >= 20
    assert all(name.rstrip("s") in sentence for sentence in said.values()), said


def test_no_value_of_another_type_counts_as_a_number_or_a_switch(model: exitlm.LLM) -> None:
    for name, value in (
        ("seed", True), ("logprobs", True), ("threshold", True), ("threshold", "0.5"), ("temperature", True),
        ("temperature", "x"), ("top_k", True), ("threshold", {"1": 0.5}), ("threshold", {True: 0.5}),
        ("adaptive", "no"), ("ignore_eos", 1), ("rule", 5), ("mode", None), ("draft", None), ("stop", 5),
        ("stop_token_ids", "ab"), ("max_new_tokens", 1.5), ("exits", 5), ("exits", torch.tensor(1)),
        ("exit_layer", "x"),
    ):  # fmt: skip
        with pytest.raises(
            UserError, match=rf"{name} is .* \({type(value).__name__}\), but must be|layer in threshold"
        ):
            model.generate("hi", **{name: value})
    with pytest.raises(UserError, match=r"chat is 'yes' \(str\), but must be True or False"):
        model.generate("hi", chat="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "given", "plain"),
    [
        ("max_new_tokens", np.int64(5), 5),
        ("max_new_tokens", torch.tensor(5), 5),
        ("threshold", torch.tensor(0.5), 0.5),
        ("threshold", np.float32(0.5), 0.5),
        ("threshold", 1, 1.0),
        ("threshold", {np.int64(1): torch.tensor(0.0), torch.tensor(3): np.float64(1.0)}, {1: 0.0, 3: 1.0}),
        ("temperature", torch.tensor(0.5), 0.5),
        ("temperature", 2, 2.0),
        ("seed", np.uint64(2**63), 2**63),
        ("exits", torch.tensor([3, 1]), (3, 1)),
        ("exits", range(1, 2), (1,)),
        ("stop_token_ids", np.array([4]), (4,)),
        ("ignore_eos", np.bool_(True), True),
        ("adaptive", torch.tensor(False), False),
        ("stop", "a", ("a",)),
    ],
)
def test_a_scalar_of_another_library_is_the_number_it_holds(
    model: exitlm.LLM, name: str, given: Any, plain: Any
) -> None:
    config = GenerationConfig(**{name: given})
    assert config == GenerationConfig(**{name: plain})
    assert getattr(config, name) == plain
    assert type(getattr(config, name)) is type(plain)
    settings = {"max_new_tokens": 6, "mode": "threshold", "seed": 1, "temperature": 1.0, "rule": "probability"}
    found, expected = (model.generate(IDS, **{**settings, name: value}) for value in (given, plain))
    assert (found.token_ids, found.exit_layers) == (expected.token_ids, expected.exit_layers)


def test_prompts_and_token_ids(model: exitlm.LLM) -> None:
    for call in (
        lambda value: model.generate(value, max_new_tokens=2),
        lambda value: list(model.stream(value, max_new_tokens=2)),
        lambda value: model.generate("hi", chat=value, max_new_tokens=2),
        lambda value: model.stream("hi", chat=value, max_new_tokens=2),
        lambda value: model.generate([{"role": "user", "content": value}], max_new_tokens=2),
        model.encode, model.logits, model.exit_logits,
    ):  # fmt: skip
        said = refusals(call)
        assert {"None", "1.5", "[True]", "[1.5]", "b'x'"} <= said.keys()
    expected, text = model.logits(IDS), model.generate(IDS, max_new_tokens=3).token_ids
    for ids in (tuple(IDS), np.array(IDS), np.array(IDS, dtype=np.uint16), torch.tensor(IDS), list(map(np.int64, IDS))):
        assert torch.equal(model.logits(ids), expected)  # type: ignore[arg-type]
        assert model.generate(ids, max_new_tokens=3).token_ids == text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["layers", "kind", "output", "seed", "candidate_ids", "init", "rank", "gate", "branch", "low-rank"]
)
def test_new_exits(checkpoint: Path, place: Path, name: str) -> None:
    """What is accepted can be saved and loaded, too; what is refused leaves the model as it was."""
    model, output = exitlm.load(checkpoint), "low_rank" if name == "low-rank" else "shared"
    accepted = []

    def add(value: Any) -> None:
        call = {"layers": [2], "output": output, {"low-rank": "rank"}.get(name, name): value}
        try:
            model.add_exits(**call)
        except UserError:
            assert model.exit_layers == []
            raise
        if model.model.exit_heads():
            model.save_exits(place / "adapter")
            again = exitlm.load(checkpoint, adapter=place / "adapter")
            assert again.exit_layers == model.exit_layers
            model.remove_exits(list(model.model.exit_heads()))
            accepted.append(value)

    said = refusals(add, [*VALUES, False, "norm", "own", "random", -(2**63), 2**64 - 1, [2], torch.tensor([1, 3])])
    assert {"<class 'float'>", "b'x'", "{'x': 1}"} <= said.keys()
    assert accepted


kinds, outputs, inits = (st.sampled_from(names.split()) for names in (
    "embed norm mlp block lens", "shared own exits low_rank", "copy random identity closed_form"
))  # fmt: skip


@given(
    exits=st.lists(
        st.fixed_dictionaries(
            {"layers": st.sampled_from([[1], [2], [3], [4], [3, 1], [1, 2, 4]]), "kind": kinds, "output": outputs},
            optional={
                "init": inits,
                "gate": st.sampled_from([False, True, np.bool_(True), torch.tensor(True)]),
                "branch": st.booleans(),
                "rank": st.sampled_from([1, 7, 32, 33, np.int64(4), torch.tensor(2)]),
                "seed": st.integers(-(2**63), 2**64 - 1),
                "candidate_ids": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
            },
        ),
        min_size=1,
        max_size=3,
    ),
    removed=st.integers(1, 4),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_exits_a_model_takes_come_back(
    checkpoint: Path, place: Path, exits: list[dict[str, Any]], removed: int
) -> None:
    model = exitlm.load(checkpoint)
    for one in exits:
        before = list(model.model.exit_heads())
        try:
            model.add_exits(**one)
        except UserError:
            assert list(model.model.exit_heads()) == before
    if removed in model.exit_layers and len(model.model.exit_heads()) > 1:
        model.remove_exits([removed])
    if not model.model.exit_heads():
        return
    again = exitlm.load(checkpoint, adapter=model.save_exits(place / "adapter"))
    ours, theirs = model.model, again.model
    assert [h.config for h in ours.exit_heads().values()] == [h.config for h in theirs.exit_heads().values()]
    tensors, found = ours.exits.state_dict(), theirs.exits.state_dict()
    assert tensors.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in tensors.items())


def test_what_is_loaded_saved_and_removed(model: exitlm.LLM, checkpoint: Path) -> None:
    fresh = (f"exported-{i}" for i in itertools.count())
    calls: dict[str, Callable[[Any], object]] = {
        "the model is": exitlm.load,
        "adapter": lambda value: exitlm.load(checkpoint, adapter=value),
        "dtype": lambda value: exitlm.load(checkpoint, dtype=value),
        "device": lambda value: exitlm.load(checkpoint, device=value),
        "quant": lambda value: exitlm.load(checkpoint, quant=value),
        "allow_other_base": lambda value: exitlm.load(checkpoint, allow_other_base=value),
        "model is": exitlm.LLM,
        "device is": exitlm.load(checkpoint).to,
        "config is": lambda value: model.generate("hi", config=value, max_new_tokens=2),
        "quant is": lambda value: exitlm.LLM(model.model, quant=value),
        "layers": exitlm.load(checkpoint).remove_exits,
        "the directory": model.save_exits,
        "directory": model.export,
        "dtype is": lambda value: model.export(next(fresh), dtype=value),
    }
    for argument, call in calls.items():
        said = refusals(call)
        assert {"nan", "<class 'float'>", "1j"} <= said.keys()
        assert argument in said["1j"]
        assert "(complex)" in said["1j"]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "xla", "hpu", "privateuseone", "cpu:x", "", 5, None])
def test_devices_that_are_not_there(checkpoint: Path, device: Any) -> None:
    with pytest.raises(UserError, match=r"device .* cpu"):
        exitlm.load(checkpoint, device=device)


@pytest.mark.parametrize(
    "dtype",
    ["float8_e4m3fn", "int8", "int32", "bool", "complex64", torch.float8_e4m3fn, torch.int8, torch.complex64,
     torch.bool, float, np.float32, None, 16],
)  # fmt: skip
def test_dtypes_that_are_not_computed_in(model: exitlm.LLM, checkpoint: Path, place: Path, dtype: Any) -> None:
    with pytest.raises(UserError, match="float64, float32, bfloat16, float16"):
        exitlm.load(checkpoint, dtype=dtype)
    if dtype is not None:  # which is the dtype of the weights
        with pytest.raises(UserError, match="float64, float32, bfloat16, float16"):
            model.export(place / "out", dtype=dtype)
    assert not (place / "out").exists()


def test_runs(checkpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the arguments: a run that could begin does not."""
    begun: list[RunConfig] = []
    monkeypatch.setattr(sys.modules["exitlm.train.tune"]._Run, "run", lambda self: begun.append(self.config))
    usual = {"base": checkpoint, "exits": [2], "data": "self:100", "out": "run", "steps": 3}
    for name in ("base", "exits", "data", "out", "steps", "seed", "save_every", "overrides"):
        begun.clear()
        said = refusals(lambda value, name=name: tune(**{**usual, name: value}))  # type: ignore[misc]
        assert {"1.5", "[None]", "<class 'float'>", "1j", "b'x'"} <= said.keys()
        assert len(said) + len(begun) == len(VALUES)
        for config in begun:
            assert RunConfig.from_text(config.to_toml()) == config
    tune(checkpoint, exits=torch.tensor([1, 3]), data=[Path("a"), "b"], out=Path("o"), steps=np.int64(3), seed=0)  # type: ignore[arg-type]
    assert begun[-1].exits.layers == (1, 3)
    assert begun[-1].data.files == ("a", "b")
    assert begun[-1].train.steps == 3
    for call in (train, model_of_run, RunConfig.from_toml, lambda value: train(RunConfig(), overrides=value)):
        refusals(call)  # type: ignore[arg-type]
