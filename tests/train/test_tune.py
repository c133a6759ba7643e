"""Whole runs on a tiny checkpoint: the adapter, the frozen base, resuming after kills and signals, bad input."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from exitlm.errors import UserError
from exitlm.model import ExitRecord
from exitlm.train import Interrupted, RunConfig, model_of_run, tune
from exitlm.train.exits import default_layers, needs_final
from exitlm.train.tune import resolve
from exitlm.weights.checkpoint import open_checkpoint
from exitlm.weights.load import load_model
from tests.checkpoints import write_checkpoint

tune_module: Any = sys.modules["exitlm.train.tune"]  # the package's attribute of this name is the function

SMALL = ["train.global_batch=4", "train.microbatch=2", "data.seq_len=24", "train.warmup=2", "train.dtype=float32"]
SELF = ["data.self_batch=4", "data.seq_len=40", "data.validation_sequences=3"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"say {i}\n" for i in range(20)))
    return path


def arguments(base: Path, data: str, out: Path, *overrides: str, **over: Any) -> dict[str, Any]:
    values: dict[str, Any] = dict(base=base, exits=[1, 3], data=data, out=out, steps=8, seed=1, save_every=2)
    return {**values, **over, "overrides": [*SMALL, *overrides]}


def exits_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "exits.safetensors")


def same(a: Path, b: Path) -> bool:
    one, two = exits_of(a), exits_of(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_makes_an_adapter(base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = {f.name: f.read_bytes() for f in base.iterdir()}
    out = tune(**arguments(base, str(text), tmp_path / "run", "train.validate_every=4"))
    assert out == tmp_path / "run"
    said = capsys.readouterr().out
    assert "agreement with the final head" in said
    assert {f.name: f.read_bytes() for f in base.iterdir()} == digest
    table = json.loads((out / "exits.json").read_text())
    records = json.dumps(table)
    for word in ("agreement", "threshold", "rule", "coverage", "precision", "calibration", "data_digest", "versions"):
        assert word in records
    tested = {entry["layer"]: entry["record"]["tested"] for entry in table["exits"]}
    chosen = ", ".join(str(layer) for layer in (1, 3) if tested[layer])
    none = "none, since none has a net speed-up"
    assert said.endswith(f"; tested by default in mode threshold: {chosen or none}\n")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert "validation/agreement/3" in lines[3]
    assert {"loss/1", "agreement/1", "lr", "tokens_per_second"} <= set(lines[0])
    assert RunConfig.from_toml(out / "run.toml").exits.layers == (1, 3)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == [
        "checkpoints", "exits.json", "exits.safetensors", "metrics.jsonl", "run.toml",
    ]  # fmt: skip


def test_the_backbone_is_bit_identical_before_and_after(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        loaded.append(load_model(*args, **options))
        return loaded[-1]

    monkeypatch.setattr(tune_module, "load_model", load)
    tune(**arguments(base, str(text), tmp_path / "run", "exits.kind=mlp,block", "exits.output=own,shared"))
    before = load_model(open_checkpoint(base), dtype=loaded[0].dtype).state_dict()
    after = {name: tensor for name, tensor in loaded[0].state_dict().items() if not name.startswith("exits.")}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_finished_run_says_so_and_changes_nothing(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = arguments(base, str(text), tmp_path / "run", steps=2)
    out = tune(**call)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert tune(**call) == out
    assert "finished run already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


def test_other_settings_in_the_same_directory_are_refused_by_name(base: Path, text: Path, tmp_path: Path) -> None:
    tune(**arguments(base, str(text), tmp_path / "run", steps=2))
    with pytest.raises(UserError, match=r"train\.lr: 0\.002 -> 0\.5"):
        tune(**arguments(base, str(text), tmp_path / "run", "train.lr=0.5", steps=2))
    tune(**arguments(base, str(text), tmp_path / "run", "logging.every=3", steps=2, save_every=9))


def test_changed_data_is_refused(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("some text to learn from, again and again\n" * 20)
    stop_after(3, lambda: tune(**arguments(base, str(data), tmp_path / "run")))
    data.write_text("some other text to learn from, again and again\n" * 20)
    with pytest.raises(UserError, match="data digest changed"):
        tune(**arguments(base, str(data), tmp_path / "run"))


def stop_after(steps: int, call: Callable[[], Any]) -> None:
    """Run until SIGTERM arrives in the given step."""
    original = tune_module.Trainer.step

    def step(self: Any) -> Any:
        if self.done == steps - 1:
            signal.raise_signal(signal.SIGTERM)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_module.Trainer, "step", step)
        with pytest.raises(Interrupted) as stopped:
            call()
    assert stopped.value.code == 0


@pytest.mark.parametrize("cache_kind", ["memory", "disk", "none"])
def test_sigterm_saves_and_the_same_call_goes_on_bit_identically(
    base: Path, text: Path, tmp_path: Path, cache_kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tune(**arguments(base, str(text), tmp_path / "whole"))
    call = arguments(base, str(text), tmp_path / "run", f"train.hidden_cache={cache_kind}", save_every=0)
    stop_after(3, lambda: tune(**call))
    said = capsys.readouterr().out
    assert "stopped by SIGTERM: step 3 of 8 is saved; start the same command again" in said
    assert not (tmp_path / "run" / "exits.json").exists()
    assert not (tmp_path / "run" / ".hidden").exists()
    tune(**call)
    assert "going on from step 3 of 8" in capsys.readouterr().out
    assert same(whole, tmp_path / "run")
    assert metrics_of(whole) == metrics_of(tmp_path / "run")


def stop_while_measuring(count: int, call: Callable[[], Any]) -> None:
    """Run until SIGTERM arrives in the ``count``-th measurement of the exits, before its second row."""
    original, measured = tune_module.evaluate, []

    def evaluate(heads: Any, hidden: Any, settings: Any, report: Any) -> Any:
        measured.append(1)

        def stopping(done: int, total: int) -> None:
            assert done < 2, "the measurement goes on"
            report(done, total)
            if len(measured) == count and done == 1:
                signal.raise_signal(signal.SIGTERM)

        return original(heads, hidden, settings, stopping if len(measured) == count else report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_module, "evaluate", evaluate)
        with pytest.raises(Interrupted):
            call()


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """What was logged, but for the speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize(("count", "step"), [(1, 3), (2, 6), (3, 8)])
def test_sigterm_while_exits_are_measured_ends_at_once_and_loses_nothing(
    base: Path, text: Path, tmp_path: Path, count: int, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice while the run goes, once at its end; the same call then measures what was left."""
    options = ("train.validate_every=3", "data.validation_sequences=4", "data.seq_len=12")
    whole = tune(**arguments(base, str(text), tmp_path / "whole", *options))
    shown = capsys.readouterr().err
    assert "measuring the exits: 0/4" in shown
    assert "measuring the exits: 4/4" in shown
    call = arguments(base, str(text), tmp_path / "run", *options, save_every=0)
    stop_while_measuring(count, lambda: tune(**call))
    said = capsys.readouterr().out
    assert f"stopped by SIGTERM: step {step} of 8 is saved; start the same command again to go on" in said
    assert not (tmp_path / "run" / "exits.json").exists()
    stop_while_measuring(1, lambda: tune(**call))  # and again at the same place
    tune(**call)
    assert same(whole, tmp_path / "run")
    assert metrics_of(whole) == metrics_of(tmp_path / "run")
    assert (
        json.loads((whole / "exits.json").read_text())["exits"]
        == json.loads((tmp_path / "run" / "exits.json").read_text())["exits"]
    )


def killed_until_done(call: dict[str, Any], seed: int, kills: int, longest: float) -> int:
    """Run ``call`` in forked processes that are killed at random instants; returns the number of kills that hit."""
    context = multiprocessing.get_context("fork")
    rng, hits = random.Random(seed), 0
    while True:
        child = context.Process(target=_quietly, args=(call,))
        child.start()
        child.join(rng.uniform(0.0, longest) if hits < kills else 60)
        if child.exitcode is None:
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            hits += 1
            assert hits <= kills, "the run takes too long"
        else:
            assert child.exitcode == 0
            return hits


def _quietly(call: dict[str, Any]) -> None:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        tune(**call)


def test_killed_runs_end_with_the_same_tensors(base: Path, text: Path, tmp_path: Path) -> None:
    call = arguments(base, str(text), tmp_path / "whole", save_every=1, steps=30)
    began = time.monotonic()
    whole = tune(**call)
    longest = (time.monotonic() - began) / 2
    for attempt in range(8):  # a quick run may be over before its kill: try again, with earlier kills
        out = tmp_path / f"run{attempt}"
        hits = killed_until_done({**call, "out": out}, seed=attempt, kills=3, longest=longest / (attempt + 1))
        assert same(whole, out)
        if hits:
            return
    pytest.fail("no kill hit a running process")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_at_random_instants(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Self text, closed form, steps, saves and the adapter: whatever the instant, the end is the same."""
    monkeypatch.setenv("EXITLM_CACHE", str(tmp_path / "one"))
    settings = [*SELF, f"data.prompts={prompts}", "objective.candidate_loss=true", "checkpoint.keep=1"]
    settings += ["exits.candidates=100", "exits.kind=lens,mlp", "train.validate_every=5"]
    call = arguments(base, "self:1500", tmp_path / "whole", *settings, save_every=1, steps=30)
    began = time.monotonic()
    whole = tune(**call)
    longest = time.monotonic() - began
    hits = 0
    for attempt in range(40):
        monkeypatch.setenv("EXITLM_CACHE", str(tmp_path / f"cache{attempt}"))
        out = tmp_path / f"run{attempt}"
        hits += killed_until_done({**call, "out": out}, seed=attempt, kills=8, longest=longest / 3)
        assert same(whole, out)
        assert not [p for p in out.rglob("*") if p.name.startswith(".") and p.name != ".lock"]
        if hits >= 24:
            return
    pytest.fail(f"only {hits} kills hit a running process")


def test_self_text_run_and_its_resume(
    base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = arguments(base, "self:200", tmp_path / "one", *SELF, f"data.prompts={prompts}", steps=3)
    one = tune(**call)
    monkeypatch.setenv("EXITLM_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("exitlm.train.selftext._write_batch", stopping(after=1))
    with pytest.raises(Interrupted):
        tune(**{**call, "out": tmp_path / "two"})
    assert not (tmp_path / "two" / "exits.json").exists()
    monkeypatch.undo()
    monkeypatch.setenv("EXITLM_CACHE", str(tmp_path / "other"))
    assert same(one, tune(**{**call, "out": tmp_path / "two"}))
    table = json.loads((one / "exits.json").read_text())
    assert "self:200" in json.dumps(table)


def stopping(after: int) -> Any:
    """``_write_batch`` that raises SIGTERM while writing batch ``after``."""
    from exitlm.train.selftext import _write_batch

    def write(model: Any, prompts: Any, writing: Any, index: int, *rest: Any) -> Any:
        if index == after:
            signal.raise_signal(signal.SIGTERM)
        return _write_batch(model, prompts, writing, index, *rest)

    return write


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_program_exits_with_0_on_a_signal(base: Path, text: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "exitlm",
        "tune",
        str(base),
        "--exits",
        "1,3",
        "--data",
        str(text),
        "--out",
        str(out),
    ]
    command += ["--steps", "1000000", "--save-every", "0", "--set", *SMALL]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        metrics = out / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        said, complained = process.communicate(timeout=60)
    assert process.returncode == 0, complained
    assert "start the same command again to go on" in said
    assert len(list((out / "checkpoints").iterdir())) >= 1


def test_numbers_that_break_stop_the_run_and_keep_the_checkpoint(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"step \d+: the (loss|gradient) of exit \d is not finite"):
        tune(
            **arguments(base, str(text), tmp_path / "run", "train.lr=1e25", "train.clip=0", "train.warmup=0", steps=50)
        )
    assert not (tmp_path / "run" / "exits.json").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exits": [0, 1]}, "exit layer 0 does not exist: the model has layers 1 to 4"),
        ({"exits": [1, 5]}, "exit layer 5 does not exist"),
        ({"exits": [1, 1]}, "more than once"),
        ({"exits": [3, 1]}, r"ascending order; write \[1, 3\]"),
        ({"data": "absent.txt"}, "absent.txt does not exist"),
        ({"data": "self:none"}, "must be self:N"),
        ({"data": ["self:10", "a.txt"]}, "don't mix"),
        ({"out": None}, "checkpoint.dir is not set"),
        ({"steps": 0}, "train.steps is 0"),
        ({"overrides": ["train.stepz=1"]}, "did you mean 'steps'"),
        ({"overrides": ["exits.kind=lenz"]}, "did you mean 'lens'"),
        ({"overrides": ["data.seq_len=65"]}, "context has 64 positions"),
        ({"overrides": ["data.tokenizer=/nowhere/at/all"]}, "nowhere"),
        ({"overrides": ["exits.candidates=5000"]}, "5000 candidates"),
    ],
)  # fmt: skip
def test_bad_input_leaves_nothing(base: Path, text: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    call: dict[str, Any] = {
        "base": base,
        "data": str(text),
        "out": tmp_path / "run",
        "overrides": SMALL,
        "steps": 2,
        **change,
    }
    with pytest.raises(UserError, match=words):
        tune(**call)
    assert not (tmp_path / "run").exists()


def test_a_chat_template_that_is_broken(base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base, tmp_path / "base")
    (model / "chat_template.jinja").write_text("{% for")
    with pytest.raises(UserError, match=r"chat template can't be used \(.*\); put it right, or name another tokenizer"):
        tune(**arguments(model, "self:100", tmp_path / "run", *SELF))


@pytest.mark.parametrize("content", [b"", b"ab\0cd"])
def test_bad_data_leaves_nothing(base: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.txt"):
        tune(**arguments(base, str(tmp_path / "data.txt"), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_base_without_a_tokenizer_needs_one(text: Path, tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path / "bare", tokenizer=False)
    with pytest.raises(UserError, match=r"without a tokenizer; give one with data\.tokenizer"):
        tune(**arguments(bare, str(text), tmp_path / "run"))
    out = tune(**arguments(bare, str(text), tmp_path / "run", "data.tokenizer=bytes", steps=1))
    assert (out / "exits.json").exists()


def test_a_full_disk_at_the_end_keeps_the_checkpoint(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise UserError("cannot write: No space left on device")

    call = arguments(base, str(text), tmp_path / "run", steps=2)
    monkeypatch.setattr(tune_module, "save_adapter", full)
    with pytest.raises(UserError, match="No space left"):
        tune(**call)
    assert not (tmp_path / "run" / "exits.safetensors").exists()
    monkeypatch.undo()
    assert (tune(**call) / "exits.safetensors").exists()


def test_settings_are_resolved_by_the_model(base: Path) -> None:
    opened = open_checkpoint(base)
    config = resolve(RunConfig(), opened)
    assert config.exits.layers == (1, 2, 3)
    assert "auto" not in (config.train.dtype, config.data.self_dtype, config.model.device)
    assert default_layers(30) == (8, 15, 22)
    assert default_layers(2) == (1,)
    assert default_layers(1) == (1,)
    assert config.exits.candidates == 0
    tests = resolve(RunConfig().with_overrides(["model.dtype=float64"]), opened)
    assert (tests.train.dtype, tests.data.self_dtype) == ("float64", "float64")


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], True),
        (["objective.distill=0"], False),
        (["objective.distill=0", "exits.gate=true"], True),
        (["objective.distill=0", "exits.gate=false", "exits.kind=norm"], False),
        (["objective.distill=0", "objective.gate=0", "exits.init=identity"], False),
    ],
)
@pytest.mark.filterwarnings("ignore:objective.gate has no effect")
def test_the_final_exit_is_run_only_where_it_is_read(base: Path, overrides: list[str], needed: bool) -> None:
    config = resolve(RunConfig().with_overrides(["exits.layers=1,2", *overrides]), open_checkpoint(base))
    assert needs_final(config) == needed


@pytest.mark.parametrize(
    ("records", "says"),
    [
        (
            {8: ExitRecord(agreement=0.25, tested=True), 15: ExitRecord(agreement=0.5, tested=False)},
            "agreement with the final head on held-out text: exit 8: 25.0%, exit 15: 50.0%; "
            "tested by default in mode threshold: 8",
        ),
        ({8: ExitRecord(accuracy=0.25)}, "accuracy on held-out text: exit 8: 25.0%"),
    ],
)
def test_what_a_run_says_in_the_end(records: dict[int, ExitRecord], says: str) -> None:
    assert tune_module._summary(Path("out"), records) == f"out holds the exits; {says}"


def layers_that_run(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The indices of the layers that tuning has run, as it goes."""
    ran: set[int] = set()

    def load(*args: Any, **options: Any) -> Any:
        model = load_model(*args, **options)
        for index, layer in model.model.layers.items():
            layer.register_forward_hook(lambda *_, i=int(index): ran.add(i))
        return model

    monkeypatch.setattr(tune_module, "load_model", load)
    return ran


def test_cross_entropy_alone_never_runs_the_upper_layers(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = layers_that_run(monkeypatch)
    settings = ["objective.distill=0", "exits.gate=false", "exits.kind=norm"]
    out = tune(**arguments(base, str(text), tmp_path / "run", *settings, exits=[1, 2], steps=2))
    assert ran == {0, 1}
    assert "accuracy" in (out / "exits.json").read_text()


def test_a_closed_form_needs_the_upper_layers_only_at_the_start(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = layers_that_run(monkeypatch)
    solve = tune_module._Run._solve

    def solved(self: Any, hidden: Any, stream: Any) -> None:
        solve(self, hidden, stream)
        assert ran == {0, 1, 2, 3}
        ran.clear()

    publish = tune_module._Run._publish

    def published(self: Any, *arguments: Any) -> None:
        assert ran == {0, 1}
        publish(self, *arguments)

    monkeypatch.setattr(tune_module._Run, "_solve", solved)
    monkeypatch.setattr(tune_module._Run, "_publish", published)
    settings = ["objective.distill=0", "train.validate_every=0"]
    out = tune(**arguments(base, str(text), tmp_path / "run", *settings, exits=[1, 2], steps=2))
    assert "calibration" in (out / "exits.json").read_text()  # the held-out text is compared with the final head


def test_a_block_is_copied_from_the_last_layer_whatever_is_run(base: Path, text: Path, tmp_path: Path) -> None:
    settings = ["objective.distill=0", "exits.kind=block"]
    out = tune(**arguments(base, str(text), tmp_path / "run", *settings, exits=[2], steps=1))
    assert (out / "exits.json").is_file()


def test_exits_without_parameters_are_refused(base: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to tune"):
        tune(**arguments(base, str(text), tmp_path / "run", "exits.kind=embed", exits=[2], steps=1))


def test_a_run_and_its_base_may_move_together(base: Path, text: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    shutil.copytree(base, first / "base")
    stop_after(3, lambda: tune(**arguments(first / "base", str(text), first / "run")))
    first.rename(tmp_path / "second")
    with pytest.raises(UserError, match="write its place into model"):
        model_of_run(tmp_path / "second" / "run")
    out = tune(**arguments(tmp_path / "second" / "base", str(text), tmp_path / "second" / "run"))
    whole = tune(**arguments(base, str(text), tmp_path / "whole"))
    assert same(out, whole)
    assert str(tmp_path) not in (out / "exits.json").read_text()


def test_candidates_that_changed_are_refused(base: Path, text: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base, tmp_path / "base")
    call = arguments(model, str(text), tmp_path / "run", "exits.candidates=20")
    stop_after(3, lambda: tune(**call))
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 200, 201]}')
    with pytest.raises(UserError, match="candidates of exit 1"):
        tune(**call)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.device=foo", "device"),
        ("model.device=meta", "device"),
        ("exits.rank=999", "rank 999 exceeds"),
        ("logging.trackio=x", "trackio"),
        ("data.prompts=/no/such/file", "prompts"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, named: str
) -> None:
    monkeypatch.setattr("exitlm.train.metrics.find_spec", lambda name: None)
    settings = [*SELF, "exits.output=low_rank", "exits.rank=4", override]
    with pytest.raises(UserError, match=named):
        tune(**arguments(base, "self:100", tmp_path / "run", *settings, steps=1))
    assert not (tmp_path / "run").exists()


def test_the_exits_of_a_checkpoint(base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint of a finished run holds what its adapter holds; a run that was stopped has its newest."""
    monkeypatch.chdir(base.parent)  # a relative base is found again from anywhere
    settings = ["exits.candidates=20", "exits.output=own,shared"]
    out = tune(**{**arguments(base, str(text), tmp_path / "run", *settings), "base": base.name})
    monkeypatch.chdir(tmp_path)
    finished = exits_of(out)
    found = model_of_run(out / "checkpoints" / "step-00000008").state_dict()
    assert {name: t for name, t in found.items() if name.startswith("exits.")}.keys() == finished.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in finished.items())
    earlier = model_of_run(out / "checkpoints" / "step-00000006").state_dict()
    assert not all(torch.equal(earlier[name], tensor) for name, tensor in finished.items())
    for file in ("exits.json", "exits.safetensors"):
        (out / file).unlink()
    newest = model_of_run(out).state_dict()
    assert all(torch.equal(newest[name], tensor) for name, tensor in finished.items())
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        model_of_run(out)


def test_candidates_come_from_the_training_data(base: Path, text: Path, tmp_path: Path) -> None:
    out = tune(**arguments(base, str(text), tmp_path / "run", "exits.candidates=20", steps=1))
    ids = next(t for name, t in exits_of(out).items() if "candidate_ids" in name).tolist()
    letters = {3 + sorted(__import__("tokenizers").pre_tokenizers.ByteLevel.alphabet()).index(c) for c in "eoi"}
    assert {0, 1, 2} <= set(ids)
    assert letters <= set(ids)
    assert len(ids) == 20
