"""The command line: quick help, one sentence per mistake, and the same results as the functions behind the verbs."""

import errno
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import exitlm
from exitlm import cli
from tests.checkpoints import write_checkpoint
from tests.conftest import Run

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = exitlm.load(checkpoint)
    model.add_exits([1, 3], kind="norm")
    return model.save_exits(tmp_path_factory.mktemp("exits") / "adapter")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], *([verb, "--help"] for verb in cli.VERBS)])
def test_help_is_quick_and_loads_no_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from exitlm.cli import main
try:
    main({arguments})
except SystemExit as stop:
    assert not stop.code
loaded = {{"torch", "transformers", "numpy", "rich"}} & set(sys.modules)
assert not loaded, loaded
"""
    started = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert time.perf_counter() - started < 5  # well under one second on an idle machine
    assert exitlm.__version__ in out if "--version" in arguments else "usage: exitlm" in out


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "exitlm", "generat"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown verb 'generat'; did you mean 'generate'? (see exitlm --help)\n"


def test_the_lower_floors_need_no_extras() -> None:
    """model, weights, decode and train import on a machine without rich, datasets, matplotlib, gguf, pyarrow."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"rich", "datasets", "matplotlib", "gguf", "pyarrow", "tensorboard"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import exitlm.decode.engine, exitlm.llm, exitlm.train, exitlm.evaluate.plots
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generate_prints_text(run: Run, checkpoint: Path, adapter: Path) -> None:
    settings = ("generate", checkpoint, "--adapter", adapter, "--prompt", "hello", "--max-new-tokens", 12)
    code, out, err = run(*settings, "--mode", "full")
    assert (code, err) == (0, "")
    model = exitlm.load(checkpoint, adapter=adapter)
    assert out == f"{model.generate('hello', mode='full', max_new_tokens=12).text}\n"


def test_generate_prints_one_json_object(run: Run, checkpoint: Path, adapter: Path) -> None:
    code, out, _ = run(
        "generate", checkpoint, "--adapter", adapter, "--prompt", "hi", "--mode", "threshold", "--threshold", "0",
        "--rule", "probability", "--max-new-tokens", 8, "--dtype", "float64", "--chat", "--json",
    )  # fmt: skip
    found = json.loads(out)
    model = exitlm.load(checkpoint, adapter=adapter, dtype="float64")
    expected = model.generate("hi", chat=True, mode="threshold", threshold=0.0, rule="probability", max_new_tokens=8)
    assert code == 0
    assert set(found) == {"text", "token_ids", "exit_layers", "mode", "stats"}
    assert (found["mode"], found["token_ids"]) == ("threshold", expected.token_ids)
    assert found["exit_layers"] == expected.exit_layers


def test_json_is_valid_even_for_one_token(run: Run, checkpoint: Path) -> None:
    _, out, _ = run("generate", checkpoint, "--prompt", "hi", "--mode", "full", "--max-new-tokens", 1, "--json")
    assert json.loads(out, parse_constant=pytest.fail)["stats"]["tokens"] == 1


def test_every_setting_can_be_reached(run: Run, checkpoint: Path, adapter: Path) -> None:
    """By a flag, by --set, or by both together; texts, lists and mappings included."""
    base = ("generate", checkpoint, "--adapter", adapter, "--prompt", "hi", "--dtype", "float64", "--json")
    model = exitlm.load(checkpoint, adapter=adapter, dtype="float64")
    cases: list[tuple[list[str], dict[str, Any]]] = [
        (["--exits", "3", "--mode", "threshold", "--threshold", "0"], dict(exits=[3], mode="threshold", threshold=0)),
        (["--exits", "1,3", "--set", "rule=fixed", "exit_layer=1", "mode=threshold"],
         dict(exits=[1, 3], rule="fixed", exit_layer=1, mode="threshold")),
        (["--set", 'threshold={"1": 1.0, "3": 0}', "--set", "mode=threshold"],
         dict(threshold={1: 1.0, 3: 0.0}, mode="threshold")),
        (["--temperature", "0.8", "--seed", "3", "--set", "top_k=40", "min_p=.05", "repetition_penalty=1.1"],
         dict(top_k=40, min_p=0.05, repetition_penalty=1.1, temperature=0.8, seed=3)),
        (["--set", "stop_token_ids=5,9", "ignore_eos=true", "max_pending=null"],
         dict(stop_token_ids=[5, 9], ignore_eos=True, max_pending=None)),
        (["--set", "adapter=adapter", "mode=threshold", "threshold=0"],
         dict(adapter="adapter", mode="threshold", threshold=0)),
    ]  # fmt: skip
    for words, settings in cases:
        code, out, err = run(*base, *words, "--max-new-tokens", 9)
        expected = model.generate("hi", max_new_tokens=9, **settings)
        assert (code, json.loads(out)["token_ids"]) == (0, expected.token_ids), (words, err)
        if settings.get("mode") == "threshold":
            assert json.loads(out)["exit_layers"] == expected.exit_layers
            assert json.loads(out)["stats"]["exits"] == expected.stats.exits
    text = model.generate("hi", mode="full", max_new_tokens=9).text
    code, out, _ = run(*base[:-1], "--set", f"stop={json.dumps([text[4:6]])}", "mode=full", "max_new_tokens=9")
    assert (code, out) == (0, f"{text[: text.index(text[4:6])]}\n")


@pytest.mark.filterwarnings("default")
def test_log_probabilities_are_printed_with_json(run: Run, checkpoint: Path) -> None:
    command = ("generate", checkpoint, "--prompt", "hi", "--set", "mode=full", "max_new_tokens=3", "logprobs=2")
    _, out, err = run(*command, "--json")
    expected = exitlm.load(checkpoint).generate("hi", mode="full", max_new_tokens=3, logprobs=2)
    found = json.loads(out)["logprobs"]
    assert [token["logprob"] for token in found] == [token.logprob for token in expected.trace]
    assert [len(token["top"]) for token in found] == [2, 2, 2]
    assert err == ""
    assert run(*command)[2] == "warning: logprobs has no effect without --json or --prompts\n"


def test_a_prompt_from_standard_input(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("generate", checkpoint, "--mode", "full", "--max-new-tokens", 3, "--prompt")
    expected = run(*command, "two\nlines")
    for given in (b"two\nlines", b"two\nlines\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert run(*command, "-") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert run(*command, "-") == (
        2, "", "error: the prompt on standard input is not valid UTF-8 text; give it in that encoding\n",
    )  # fmt: skip


def test_sampling_repeats_with_its_seed(run: Run, checkpoint: Path) -> None:
    settings = (
        "generate",
        checkpoint,
        "--prompt",
        "hi",
        "--temperature",
        "1.5",
        "--top-p",
        "0.9",
        "--max-new-tokens",
        9,
    )
    first, second, third = (run(*settings, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == second != third


def test_a_terminal_gets_colours_and_a_legend(
    run: Run, checkpoint: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    settings = ("generate", checkpoint, "--adapter", adapter, "--prompt", "hi", "--max-new-tokens", 9)
    code, out, _ = run(*settings, "--mode", "threshold", "--threshold", "0")
    assert code == 0
    assert "\x1b[1;38;2;0;168;120m" in out  # the colour of the shallowest exit
    assert "layer 1" in out
    assert "(final head)" in out
    assert "tokens/s" in out


def test_tune_then_generate_then_export(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    out = tmp_path / "run"
    command = (
        "tune", checkpoint, "--exits", "1,3", "--data", text, "--out", out, "--steps", 3, "--save-every", 2,
        "--seed", 7, "--set", "data.seq_len=16", "train.global_batch=4", "--set", "train.microbatch=2",
        "data.validation_sequences=4",
    )  # fmt: skip
    assert run(*command)[0] == 0
    saved = {name: (out / name).stat().st_mtime_ns for name in ("exits.safetensors", "exits.json")}
    assert (out / "metrics.jsonl").is_file()

    assert run(*command)[0] == 0  # a finished run says so and changes nothing
    assert {name: (out / name).stat().st_mtime_ns for name in saved} == saved

    code, found, _ = run("generate", checkpoint, "--adapter", out, "--prompt", "the", "--max-new-tokens", 4, "--json")
    assert (code, json.loads(found)["mode"]) == (0, "lossless")

    assert run("export", checkpoint, tmp_path / "exported", "--adapter", out)[0] == 0
    step = next((out / "checkpoints").iterdir())
    for source, place in ((out, "of the run"), (step, "of the step")):
        assert run("export", source, tmp_path / place) == (0, f"{tmp_path / place}\n", "")
        assert exitlm.load(tmp_path / place).exit_layers == [1, 3]
    ids = torch.tensor([[4, 8, 15]])
    with torch.no_grad():
        before, after = (
            transformers.AutoModelForCausalLM.from_pretrained(path)(ids).logits
            for path in (checkpoint, tmp_path / "exported")
        )
    assert torch.equal(before, after)
    assert exitlm.load(tmp_path / "exported").exit_layers == [1, 3]
    for path in (out, tmp_path / "exported", checkpoint):
        code, found, _ = run("inspect", path)
        assert code == 0
        assert found.strip()


def test_a_run_file_is_changed_by_flags(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven\n" * 100)
    settings = tmp_path / "run.toml"
    settings.write_text(
        f'[model]\nbase = "{checkpoint}"\n[exits]\nlayers = [2]\n[data]\nfiles = ["{text}"]\nseq_len = 16\n'
        "validation_sequences = 4\n[train]\nsteps = 1\nglobal_batch = 2\nmicrobatch = 2\n"
    )
    assert run("tune", settings, "--out", tmp_path / "run", "--exits", "1")[0] == 0
    assert exitlm.load(checkpoint, adapter=tmp_path / "run").exit_layers == [1]


MISTAKES: list[tuple[list[str], str]] = [
    ([], "VERB"),
    (["tun"], "did you mean 'tune'"),
    (["generate", "MODEL"], "--prompt"),
    (["generate", "MODEL", "--prompt", "x", "--treshold", "0.5"], "did you mean '--threshold'"),
    (["generate", "MODEL", "--prompt", "x", "--seed", "q"], "--seed"),
    (["generate", "MODEL", "--prompt", "x", "--threshold", "nan", "--mode", "threshold"], "nan"),
    (["generate", "MODEL", "--prompt", "x", "--threshold", "2", "--mode", "threshold"], "2"),
    (["generate", "MODEL", "--prompt", "x", "--mode", "fast"], "mode 'fast' is unknown"),
    (["generate", "MODEL", "--prompt", "x", "--rule", "gates"], "did you mean 'gate'"),
    (["generate", "MODEL", "--prompt", "x", "--mode", "threshold"], "exitlm tune"),
    (["generate", "MODEL", "--prompt", ""], "empty"),
    (["generate", "MODEL", "--prompt", "x" * 99], "99 tokens"),
    (["generate", "MODEL", "--prompt", "x", "--adapter", "TMP/none"], "none"),
    (["generate", "MODEL", "--prompt", "x", "--exits", "runs/a"], "exits is 'runs/a', but must be layers such as 8,15"),
    (["generate", "MODEL", "--prompt", "x", "--exits", ""], "--exits is '', but must be layers such as 8,15"),
    (["generate", "MODEL", "--prompt", "x", "--exits", "1,1"], "name a layer more than once"),
    (["generate", "MODEL", "--prompt", "x", "--exits", "2"], "the model has no exit at layer 2"),
    (["generate", "MODEL", "--prompt", "x", "--set", "tempreature=1"], "did you mean 'temperature'"),
    (["generate", "MODEL", "--prompt", "x", "--set", "top_k"], "'top_k' is not a setting; write KEY=VALUE"),
    (["generate", "MODEL", "--prompt", "x", "--set", "ignore_eos=maybe"], "ignore_eos is 'maybe' (str)"),
    (["generate", "MODEL", "--prompt", "x", "--set", 'threshold={"8": 2}'], "threshold of exit 8 is 2"),
    (["generate", "MODEL", "--prompt", "x", "--seed", "1", "--set", "seed=2"], "seed is given twice, by --seed and"),
    (["generate", "MODEL", "--prompt", "x", "--max-new-tokens", "1", "--set", "max_new_tokens=2"], "--max-new-tokens"),
    (
        ["generate", "MODEL", "--prompt", "x", "--set", "engine.max_row=8"],
        "the engine has no setting 'max_row'; did you mean 'max_rows'",
    ),
    (["export", "MODEL", "TMP/out", "--exits", "x"], "unknown argument '--exits'"),
    (["generate", "TMP/none", "--prompt", "x"], "none"),
    (["generate", "TMP/" + "n" * 300, "--prompt", "x"], "File name too long"),
    (["generate", "", "--prompt", "x"], "name is empty"),
    (["generate", "MODEL", "--prompt", "x", "--device", "meta"], "meta"),
    (["generate", "TMP", "--prompt", "x"], "TMP"),
    (["generate", "MODEL", "--prompt", "x", "--quant", "int5"], "int5"),
    (["generate", "MODEL", "--prompt", "x", "--dtype", "float8"], "float8"),
    (["generate", "MODEL", "--prompt", "x", "--dtype", "float8_e4m3fn"], "float64, float32, bfloat16, float16"),
    (["generate", "MODEL", "--prompt", "x", "--device", "gpu"], "device 'gpu' can't be used"),
    (["export", "MODEL", "TMP/out", "--dtype", "float8_e4m3fn"], "float64, float32, bfloat16, float16"),
    (["inspect", "TMP/none"], "none"),
    (["inspect", "TMP"], "TMP"),
    (["export", "TMP/none", "TMP/out"], "none"),
    (["tune", "MODEL", "--exits", "1"], ""),
    (["tune", "MODEL", "--exits", "9", "--data", "TEXT", "--out", "TMP/out"], "9"),
    (["tune", "MODEL", "--exits", "1,1", "--data", "TEXT", "--out", "TMP/out"], "1"),
    (["tune", "MODEL", "--exits", "1,x", "--data", "TEXT", "--out", "TMP/out"], "whole number"),
    (["tune", "MODEL", "--exits", "1", "--data", "TMP/none.txt", "--out", "TMP/out"], "none.txt"),
    (["tune", "MODEL", "--exits", "1", "--data", "EMPTY", "--out", "TMP/out", "--set", "data.seq_len=16"], "empty"),
    (["tune", "MODEL", "--exits", "1", "--data", "BINARY", "--out", "TMP/out", "--set", "data.seq_len=16"], "binary"),
    (["tune", "MODEL", "--exits", "1", "--out", "TMP/out", "--set", "train.stps=3"], "did you mean 'steps'"),
    (["tune", "MODEL", "--exits", "1", "--out", "TMP/out", "--set", "steps=3"], "steps=3"),
    (["tune", "MODEL", "--exits", "1", "--data", "TEXT", "--out", "TEXT"], "File exists; choose another directory"),
    (["tune", "MODEL", "--out", "TMP/out", "--set", "train.dtype=float8_e4m3fn"], "one of auto, float64, float32"),
    (["tune", "MODEL", "--out", "TMP/out", "--set", "train.lr=1e300"], "train.lr is 1e+300, but must be at most 1e+30"),
    (["tune", "TMP/none.toml", "--out", "TMP/out"], "none.toml"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_sentence(
    run: Run, checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "text.txt").write_text("some words to learn from\n" * 100)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 8)
    before = sorted(tmp_path.rglob("*"))
    places = {
        "MODEL": checkpoint, "TMP": tmp_path, "TEXT": tmp_path / "text.txt", "EMPTY": tmp_path / "empty.txt",
        "BINARY": tmp_path / "binary.txt",
    }  # fmt: skip
    for name, path in places.items():
        arguments = [word.replace(name, str(path)) if word.startswith(name) else word for word in arguments]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message.replace("TMP", str(tmp_path)) in err
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


@pytest.mark.filterwarnings("default")
def test_a_warning_is_said_once(run: Run, checkpoint: Path) -> None:
    code, _, err = run("generate", checkpoint, "--prompt", "x", "--top-p", 0.5, "--max-new-tokens", 2, "--mode", "full")
    assert (code, err) == (0, "warning: top_p has no effect without a temperature above 0\n")


def test_exits_of_another_base_need_the_flag(run: Run, adapter: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    command = ("generate", other, "--adapter", adapter, "--prompt", "x", "--max-new-tokens", 2)
    code, _, err = run(*command)
    assert code == 2
    assert "--allow-other-base" in err
    assert run(*command, "--allow-other-base")[0] == 0
    assert run("export", other, tmp_path / "out", "--adapter", adapter, "--allow-other-base")[0] == 0


def test_an_interrupt_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: str) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "inspect", interrupted)
    assert run("inspect", "x") == (130, "", "")


def test_a_full_disk_is_a_sentence_and_a_bug_is_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> int:
        raise OSError(errno.ENOSPC if path == "full" else errno.EBADF, "No space left on device", "some/file")

    monkeypatch.setitem(cli.VERBS, "inspect", fail)
    assert run("inspect", "full") == (2, "", "error: No space left on device: some/file\n")
    with pytest.raises(OSError, match="No space"):
        run("inspect", "bug")


def test_a_warning_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def warn(path: str) -> int:
        warnings.warn("mind\nthis", stacklevel=1)
        return 0

    monkeypatch.setitem(cli.VERBS, "inspect", warn)
    assert run("inspect", "x") == (0, "", "warning: mind this\n")
