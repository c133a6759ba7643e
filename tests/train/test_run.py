"""The run file: what it accepts, what it refuses and how, and that it survives being written and read."""

import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exitlm.errors import UserError
from exitlm.train.run import TRAINING, RunConfig, differences
from exitlm.train.sections import ExitsSection

TOML = """
[model]
base = "smollm2"
[exits]
layers = [8, 15]
kind = ["lens", "norm"]
gate = false
[objective]
weight = [0.25, 1]
[data]
files = "a.txt"
[train]
lr = 1e-4
"""


def test_reads_a_run_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    config = RunConfig.from_toml(path)
    assert config.exits.layers == (8, 15)
    assert config.exits.kind == ("lens", "norm")
    assert config.exits.of("kind", 1) == "norm"
    assert config.exits.of("gate", 1) is False
    assert config.objective.weight == (0.25, 1.0)
    assert config.data.files == ("a.txt",)
    config.check()


def test_round_trip_keeps_every_setting() -> None:
    config = RunConfig.from_text(TOML).with_overrides(['data.prompts=a "quoted" \\ name', "train.betas=[0.8, 0.99]"])
    assert RunConfig.from_text(config.to_toml()) == config
    assert RunConfig.from_text(RunConfig().to_toml()) == RunConfig()


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("train.steps=7", "train", "steps", 7),
        ("train.lr=1", "train", "lr", 1.0),
        ("train.lr = 3e-4", "train", "lr", 3e-4),
        ("exits.layers=8,15,22", "exits", "layers", (8, 15, 22)),
        ("exits.layers=8", "exits", "layers", (8,)),
        ("exits.kind=norm", "exits", "kind", "norm"),
        ("exits.kind=norm,lens", "exits", "kind", ("norm", "lens")),
        ('data.files=["a.txt", "b.txt"]', "data", "files", ("a.txt", "b.txt")),
        ("data.files=self:100", "data", "files", ("self:100",)),
        ("objective.confidence_weighted=true", "objective", "confidence_weighted", True),
        ("model.base=/a/b=c", "model", "base", "/a/b=c"),
    ],
)
def test_overrides(override: str, section: str, name: str, value: Any) -> None:
    config = RunConfig().with_overrides([override])
    assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=7", ["unknown key 'train.step'", "did you mean 'steps'"]),
        ("trian.steps=7", ["unknown section 'trian'", "did you mean 'train'"]),
        ("steps=7", ["section.key=value"]),
        ("train.steps", ["section.key=value"]),
        ("train.steps=7.5", ["train.steps", "a whole number"]),
        ("train.steps=true", ["train.steps", "a whole number"]),
        ("exits.gate=1", ["exits.gate", "true or false"]),
        ("exits.kind=nrom", ["exits.kind", "norm"]),
        ("train.dtype=float23", ["train.dtype", "did you mean 'float32'"]),
        ("train.betas=[0.9]", ["train.betas", "2 of each a number"]),
        ("model.base=5", ["model.base", "a string"]),
        (f"train.steps={10**30}", ["train.steps is 1000000000000000000000000000000, but a whole number must fit into"]),
        (f"train.lr={10**400}", ["train.lr is 10000", "fit into 64 bits"]),
        (f"train.steps=0x{'f' * 9000}", ["train.steps is a number of thousands of digits", "fit into 64 bits"]),
        (f"train.steps={'9' * 9000}", ["train.steps is ", "a whole number"]),
    ],
)
def test_refuses_unknown_keys_and_wrong_types(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        RunConfig().with_overrides([override])
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[modle]\nbase = 1", ["unknown section 'modle'", "model"]),
        ("train = 3", ["'train' is a section"]),
        ("[train]\nsteps = ", ["not valid TOML"]),
        ("[train]\nsteps = " + "9" * 9000, ["run file is not valid TOML: Exceeds the limit"]),
        ("[train]\nsteps = " + "[" * 9000, ["run file is not valid TOML"]),
        ("[exits]\nkind = [1]", ["exits.kind"]),
    ],
)
def test_refuses_malformed_files(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        RunConfig.from_text(text)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_missing_and_binary_run_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        RunConfig.from_toml(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        RunConfig.from_toml(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("train.steps=0", "train.steps"),
        ("train.lr=nan", "train.lr"),
        ("train.lr=-1e-3", "train.lr"),
        ("objective.distill=1.5", "objective.distill"),
        ("objective.distill_temperature=0", "distill_temperature"),
        ("objective.weight=[1, nan]", "objective.weight"),
        ("train.microbatch=3", "multiple of train.microbatch"),
        ("train.betas=[0.9, 1.0]", "train.betas"),
        ("data.files=[]", "data.files"),
        ("data.seq_len=1", "data.seq_len"),
        ("checkpoint.keep=0", "checkpoint.keep"),
    ],
)
def test_refuses_values_that_cannot_work(override: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        RunConfig().with_overrides([override]).check()


def test_values_per_exit_must_fit_the_exits() -> None:
    config = RunConfig().with_overrides(["exits.layers=1,2,3", "exits.kind=norm,lens"])
    with pytest.raises(UserError, match=r"exits\.kind has 2 values for 3 exits"):
        config.check()


def test_differences_ignore_what_changes_no_result() -> None:
    config = RunConfig()
    free = ["checkpoint.every=7", "logging.tensorboard=true", "train.hidden_cache=disk", "checkpoint.dir=elsewhere"]
    assert differences(config, config.with_overrides(free)) == []
    assert differences(config, config.with_overrides(["train.lr=0.5"])) == ["train.lr: 0.002 -> 0.5"]


CONFIGS = Path(__file__).parents[2] / "configs"
TUNING = {"model", "exits", "objective", "data", "train", "checkpoint", "logging"}


def test_the_commented_run_file_of_tuning_gives_every_default() -> None:
    path = CONFIGS / "tune-smollm2.toml"
    tree = tomllib.loads(path.read_text())
    assert set(tree) == TUNING
    own = {"model.base", "exits.layers", "checkpoint.dir"}
    assert {d.split(":")[0] for d in differences(RunConfig(), RunConfig.from_toml(path))} <= own


def test_a_tree_begins_with_the_given_defaults() -> None:
    config = RunConfig.from_dict({"train": {"steps": 3}}, TRAINING)
    assert (config.train.steps, config.train.parameters, config.exits.kind) == (3, "all", "norm")
    assert RunConfig.from_text(config.to_toml()) == config


def test_async_is_a_key_though_python_keeps_the_word() -> None:
    config = RunConfig.from_text("[checkpoint]\nasync = false")
    assert config.checkpoint.async_ is False
    assert "async = false" in config.to_toml()


def set_to(key: str, value: Any) -> RunConfig:
    """The usual settings with ``key`` as it stands in a run file, checked."""
    section, name = key.split(".")
    config = RunConfig.from_dict({"data": {"files": ["a"]}}) if section != "data" else RunConfig()
    found = RunConfig.from_dict({section: {name: value}}, config)
    found.check()
    return found


@pytest.mark.parametrize("key", list(RunConfig().flat()))
def test_every_key_takes_its_type_or_says_so(key: str) -> None:
    said: list[str] = []
    for value in (None, True, 5, -1, 2**70, 10**400, math.nan, 1j, "x", "\ud800", b"x", [], {}, [None], object(), float,
                  torch.tensor(0.5), np.int64(3), np.array([1, 2]), Path("x")):  # fmt: skip
        try:
            found = set_to(key, value)
        except UserError as error:
            said.append(str(error))
        else:
            assert RunConfig.from_text(found.to_toml()) == found
    assert said
    assert all(key in sentence or "global_batch" in sentence for sentence in said)


def test_settings_made_in_python_get_the_types_of_a_run_file() -> None:
    for usual in (RunConfig(), TRAINING):
        assert usual.typed() == usual
    made = RunConfig(train=replace(RunConfig().train, steps=np.int64(5), lr=1), exits=ExitsSection(layers=[2, 3]))  # type: ignore[arg-type]
    found = made.typed()
    assert (type(found.train.steps), found.train.lr, found.exits.layers) == (int, 1.0, (2, 3))
    for wrong in (RunConfig(train=5), RunConfig(train=replace(RunConfig().train, steps="5"))):  # type: ignore[arg-type]
        with pytest.raises(UserError, match="train"):
            wrong.typed()
