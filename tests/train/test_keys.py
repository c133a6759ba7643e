"""Every key of every section does something in ``exitlm tune`` on one process, or the run says that it does not.

A key changes what the run writes, or is named in a refusal or a warning (and then changes nothing), or, where it must
not change the result, what it switches is seen to be called.
"""

import functools
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from exitlm.errors import UserError
from exitlm.train import RunConfig, tune
from exitlm.train.hidden import HiddenStates
from exitlm.train.sections import ModelSection

tune_module: Any = sys.modules["exitlm.train.tune"]
SMALL = (
    "exits.layers=[1,3]", "exits.candidates=0", "train.steps=3", "train.global_batch=2", "train.microbatch=2",
    "train.warmup=1", "train.dtype=float32", "data.seq_len=12", "data.validation_sequences=3", "train.validate_every=2",
    "checkpoint.every=1", "train.lr=0.01",
)  # fmt: skip
SELF = ("data.files=self:120", "data.prompts=PROMPTS", "data.self_batch=4", "data.seq_len=40")
GATES = ("exits.gate=true",)
SAMPLED = ("objective.candidate_tokens=20",)

# What changes the files of a run, and the settings under which it does.
RESULT: dict[str, tuple[str, tuple[str, ...]]] = {
    "model.dtype": ("float64", ()),
    "exits.layers": ("[1,2]", ()),
    "exits.kind": ("norm", ()),
    "exits.output": ("own", ()),
    "exits.rank": ("4", ("exits.output=low_rank", "exits.rank=8")),
    "exits.candidates": ("30", ()),
    "exits.init": ("identity", ()),
    "exits.gate": ("true", ()),
    "exits.branch": ("false", ()),
    "objective.weight": ("[1.0,0.5]", ("train.clip=0",)),
    "objective.weight_init": ("0.5", ("objective.warmup_steps=2", "train.clip=0")),
    "objective.warmup_steps": ("2", ("objective.weight_init=0.5", "train.clip=0")),
    "objective.warmup": ("cosine", ("objective.weight_init=0.5", "objective.warmup_steps=3", "train.clip=0")),
    "objective.confidence_weighted": ("true", ()),
    "objective.temperature": ("3.0", ("objective.confidence_weighted=true",)),
    "objective.distill": ("0.5", ()),
    "objective.distill_temperature": ("2.0", ()),
    "objective.gate": ("0.3", (*GATES, "train.clip=0")),
    "objective.candidate_loss": ("false", SAMPLED),
    "objective.candidate_tokens": ("24", SAMPLED),
    "objective.candidate_share": ("0.2", SAMPLED),
    "objective.rotate_exits": ("2", ()),
    "data.files": ("FILE2", ()),
    "data.validation_files": ("FILE2", ()),
    "data.validation_sequences": ("2", ()),
    "data.tokenizer": ("bytes", ()),
    "data.weights": ("[3.0,1.0]", ("data.files=FILE,FILE2",)),
    "data.seq_len": ("16", ()),
    "data.prompts": ("PROMPTS2", SELF),
    "data.self_temperature": ("0.5", SELF),
    "data.self_batch": ("3", SELF),
    "data.self_dtype": ("float64", SELF),
    "train.steps": ("4", ()),
    "train.global_batch": ("4", ()),
    "train.microbatch": ("1", ("objective.candidate_tokens=20",)),
    "train.lr": ("0.02", ()),
    "train.min_lr": ("0.001", ()),
    "train.warmup": ("2", ()),
    "train.schedule": ("constant", ()),
    "train.weight_decay": ("0.5", ()),
    "train.betas": ("[0.8,0.9]", ()),
    "train.eps": ("0.01", ()),
    "train.clip": ("0.001", ()),
    "train.seed": ("1", ()),
    "train.dtype": ("bfloat16", ()),
    "train.validate_every": ("1", ()),
    "checkpoint.dir": ("OTHER", ()),
    "checkpoint.every": ("2", ("checkpoint.keep=9",)),
    "checkpoint.keep": ("1", ()),
    "logging.every": ("3", ("train.validate_every=0",)),
}  # fmt: skip

# What is refused.
REFUSED = {
    "train.parameters": ("all", "train.parameters is 'all', but exitlm tune trains exits alone"),
    "parallel.data": ("2", "parallel.data x tensor x pipeline is 2 x 1 x 1 = 2, but there is 1 process"),
    "parallel.tensor": ("2", "parallel.data x tensor x pipeline is 1 x 2 x 1 = 2, but there is 1 process"),
    "parallel.pipeline": ("2", "parallel.data x tensor x pipeline is 1 x 1 x 2 = 2, but there is 1 process"),
}

# What is warned of by name, and changes nothing.
NAMED: dict[str, tuple[str, tuple[str, ...]]] = {
    **{
        f"model.{name}": (value, ())
        for name, value in {
            "family": "llama", "hidden_size": "64", "num_hidden_layers": "2", "num_attention_heads": "2",
            "num_key_value_heads": "2", "head_dim": "8", "intermediate_size": "32", "vocab_size": "300",
            "max_position_embeddings": "99", "rope_theta": "5000.0", "rms_norm_eps": "1e-4",
            "tie_word_embeddings": "true", "init_std": "0.5", "depth_scaled_init": "false",
        }.items()
    },
    "exits.place": ("end", ()),
    "objective.final": ("0.5", ()),
    "objective.layer_dropout": ("0.5", ()),
    "objective.exit_forward": ("eager", ()),
    "data.across_documents": ("true", ()),
    "train.recompute": ("layers", ()),
    "train.compile": ("true", ()),
    "train.spike": ("3.0", ()),
    "train.patience": ("2", ()),
    "parallel.sequence": ("false", ()),
    "parallel.schedule": ("zbv", ()),
    "parallel.stages_per_rank": ("2", ()),
    "parallel.shard": ("false", ()),
    "parallel.layers_per_stage": ("[4]", ()),
    "parallel.fill_warmup": ("1", ()),
    "parallel.fill_cooldown": ("1", ()),
    "parallel.backward_forward_ratio": ("1.5", ()),
    "parallel.timeout": ("99.0", ()),
    "checkpoint.async": ("false", ()),
}  # fmt: skip

# What must not change the result: what it switches is called.
CALLED = {
    "model.base", "model.device", "train.hidden_cache", "train.hidden_cache_gib", "logging.tensorboard",
    "logging.wandb", "logging.trackio",
}  # fmt: skip

# Keys that only matter under another one: left idle, they are named, too.
IDLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "exits.rank": ("8", ()),
    "exits.branch": ("false", ("exits.kind=norm",)),
    "objective.weight_init": ("0.5", ()),
    "objective.warmup": ("cosine", ()),
    "objective.temperature": ("2.0", ()),
    "objective.distill_temperature": ("2.0", ("objective.distill=0",)),
    "objective.gate": ("0.5", ()),
    "objective.candidate_tokens": ("20", ("objective.candidate_loss=false",)),
    "objective.candidate_share": ("0.5", ()),
    "train.min_lr": ("0.001", ("train.schedule=constant",)),
    "objective.rotate_exits": ("1", ()),
    "data.prompts": ("PROMPTS", ()),
    "data.self_temperature": ("0.5", ()),
    "data.self_batch": ("3", ()),
    "data.self_dtype": ("float64", ()),
    "data.validation_files": ("FILE2", SELF),
    "data.weights": ("[1.0]", SELF),
    "train.hidden_cache_gib": ("1.0", ("train.hidden_cache=none",)),
}


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """What stands for FILE, FILE2, PROMPTS, PROMPTS2 and OTHER."""
    home = tmp_path_factory.mktemp("keys")
    (home / "two.txt").write_text("".join(f"Another text, line {i * 7}, says {i**3}.\n" for i in range(40)))
    (home / "prompts.txt").write_text("".join(f"ask {i}\n" for i in range(15)))
    (home / "others.txt").write_text("".join(f"tell {i * i}\n" for i in range(15)))
    names = {"FILE2": "two.txt", "PROMPTS": "prompts.txt", "PROMPTS2": "others.txt", "OTHER": "other"}
    return {"FILE": text, **{name: home / file for name, file in names.items()}}


def fill(setting: str, places: dict[str, Path]) -> str:
    return re.sub("FILE2|FILE|PROMPTS2|PROMPTS|OTHER", lambda found: str(places[found[0]]), setting)


def run(base: Path, out: Path, places: dict[str, Path], settings: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """What a run writes, but for times and places, and the warnings it gives."""
    config = RunConfig().with_overrides(
        [f"model.base={base}", f"checkpoint.dir={out}", f"data.files={places['FILE']}", *SMALL]
        + [fill(setting, places) for setting in settings]
    )
    cache = out.parent / "cache"
    with warnings.catch_warnings(record=True) as warned, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setenv("EXITLM_CACHE", str(cache))
        made = tune(config)
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    table = json.loads((made / "exits.json").read_text())
    files = {
        "exits": {name: tensor.tolist() for name, tensor in load_file(made / "exits.safetensors").items()},
        "records": [entry["record"] for entry in table["exits"]],
        "checkpoints": sorted(place.name for place in (made / "checkpoints").iterdir()),
        "metrics": [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines],
        "place": made.name,
        "written as": sorted(place.name for place in cache.glob("self/*")),  # a digest of how, the dtype included
        "dtype": table["training"]["config"]["model"]["dtype"],
    }
    return files, [str(warning.message) for warning in warned]


@pytest.fixture(scope="session")
def usual(base: Path, places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The run that a change is compared with, once for each set of settings."""

    @functools.cache
    def usual(settings: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
        return run(base, tmp_path_factory.mktemp("usual") / "run", places, settings)

    return usual


def test_every_key_is_walked() -> None:
    known = set(RunConfig().flat())
    assert RESULT.keys() | REFUSED.keys() | NAMED.keys() | CALLED == known
    assert not RESULT.keys() & (REFUSED.keys() | NAMED.keys())
    assert {f"model.{name}" for name in vars(ModelSection()) if name not in ("base", "dtype", "device")} <= NAMED.keys()


@pytest.mark.parametrize("key", RESULT)
def test_a_key_that_acts_changes_what_is_written(
    key: str, base: Path, places: dict[str, Path], tmp_path: Path, usual: Callable[..., Any]
) -> None:
    value, settings = RESULT[key]
    after, warned = run(base, tmp_path / "run", places, (*settings, f"{key}={value}"))
    assert not [sentence for sentence in warned if sentence.startswith(key)]
    assert after != usual(settings)[0]


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_cannot_be_is_refused(key: str, base: Path, places: dict[str, Path], tmp_path: Path) -> None:
    value, says = REFUSED[key]
    with pytest.raises(UserError, match=re.escape(says)):
        run(base, tmp_path / "run", places, (f"{key}={value}",))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("key", "value", "settings"), [(key, *case) for key, case in [*NAMED.items(), *IDLE.items()]])
def test_a_key_that_does_not_act_is_named(
    key: str, value: str, settings: tuple[str, ...], base: Path, places: dict[str, Path], tmp_path: Path,
    usual: Callable[..., Any],
) -> None:  # fmt: skip
    after, warned = run(base, tmp_path / "run", places, (*settings, f"{key}={value}"))
    (sentence,) = warned
    assert sentence.startswith(f"{key} has no effect here: ")
    assert after == usual(settings)[0]
    assert RunConfig.from_toml(tmp_path / "run" / "run.toml").flat()[key] == RunConfig().flat()[key]
    run(base, tmp_path / "run", places, settings)  # the same run without it: nothing to do, and nothing to refuse


@pytest.mark.parametrize(
    "settings", [(), SELF, ("exits.kind=norm", "objective.distill=0")], ids=["files", "self", "norm"]
)
def test_the_run_file_that_a_run_leaves_names_nothing(
    base: Path, places: dict[str, Path], tmp_path: Path, settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(base, out, places, settings)[1] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune(RunConfig.from_toml(out / "run.toml"))
    assert "is a finished run already; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keep", "gib", "kept"),
    [("memory", 4.0, True), ("disk", 4.0, True), ("none", 4.0, False), ("memory", 0.0, False)],
)
def test_the_cache_of_hidden_states_is_as_it_is_set(
    keep: str, gib: float, kept: bool, base: Path, places: dict[str, Path], tmp_path: Path,
    usual: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    closed: list[tuple[str, bool]] = []
    close = HiddenStates.close

    def watched(states: HiddenStates) -> None:
        closed.append((states.keep, bool(states.held) and states.computed > 0))
        close(states)

    monkeypatch.setattr(HiddenStates, "close", watched)
    settings = (f"train.hidden_cache={keep}", "train.steps=30")
    after, _ = run(
        base, tmp_path / "run", places, (*settings, *((f"train.hidden_cache_gib={gib}",) if gib < 4 else ()))
    )
    assert closed == [(keep, kept)] * 2
    assert after == usual(("train.steps=30",))[0]


def test_the_base_and_the_device_are_those_that_are_set(
    base: Path, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    load = tune_module.load_model

    def watched(opened: Any, *, device: Any, **options: Any) -> Any:
        asked.append((opened.name, device))
        return load(opened, device="cpu", **options)

    monkeypatch.setattr(tune_module, "load_model", watched)
    run(base, tmp_path / "run", places, ("model.device=cpu",))
    assert asked == [(base.name, "cpu")]
    with pytest.raises(UserError, match="device 'gpu' can't be used"):
        run(base, tmp_path / "other", places, ("model.device=gpu",))
    with pytest.raises(UserError, match="there is no model '/nowhere'"):
        run(base, tmp_path / "other", places, ("model.base=/nowhere",))


@pytest.mark.parametrize(("key", "value"), [("tensorboard", "true"), ("wandb", "project"), ("trackio", "project")])
def test_a_tracker_that_is_asked_for_gets_every_step(
    key: str, value: str, base: Path, places: dict[str, Path], tmp_path: Path,
    usual: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from exitlm.train import metrics

    steps: list[int] = []

    class Fake:
        def __init__(self, *asked: Any) -> None:
            assert asked == ((tmp_path / "run" / "tensorboard",) if key == "tensorboard" else (key, value, asked[-1]))

        def log(self, step: int, values: Any) -> None:
            steps.append(step)

        def close(self) -> None:
            steps.append(-1)

    monkeypatch.setattr(metrics, "TensorBoard" if key == "tensorboard" else "Hosted", Fake)
    monkeypatch.setattr(metrics, "find_spec", lambda _: True)
    after, _ = run(base, tmp_path / "run", places, (f"logging.{key}={value}",))
    assert steps == [1, 2, 3, -1]
    assert after == usual(())[0]
