"""``exitlm plot``: the picture of a tiny tuning run, and one sentence for what is no run."""

import functools
import json
import sys
from pathlib import Path

import pytest

from exitlm.train import tune
from tests.checkpoints import write_checkpoint
from tests.conftest import Run

LINES = "".join(json.dumps({"step": s, "loss/2": 3 / s, "loss/4": 2 / s, "lr": 0.1}) + "\n" for s in range(1, 6))


@pytest.fixture
def run(run: Run) -> Run:
    """Run ``exitlm plot`` in this process."""
    return functools.partial(run, "plot")


def test_a_tuning_run_is_drawn_into_its_directory(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXITLM_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(50)))
    settings = ["data.seq_len=24", "train.global_batch=4", "train.microbatch=2", "train.validate_every=2"]
    out = tmp_path / "run"
    base = write_checkpoint(tmp_path / "base")
    tune(base, exits=[1, 3], data=str(text), out=out, steps=4, overrides=[*settings, "train.dtype=float32"])
    capsys.readouterr()
    assert run(out) == (0, f"{out / 'curves.png'}\n", "")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert run(out, "--out", tmp_path / "a" / "b.svg") == (0, f"{tmp_path / 'a' / 'b.svg'}\n", "")
    picture = (tmp_path / "a" / "b.svg").read_text()
    for word in ("run, step 4", "layer 1", "layer 3", "agreement with the final head", "on held-out text"):
        assert f"<!-- {word} -->" in picture


def test_a_torn_last_line_is_skipped(run: Run, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(LINES + '{"step": 6, "loss/2": 0.')
    assert run(tmp_path, "--out", tmp_path / "c.svg")[0] == 0
    assert ", step 5 -->" in (tmp_path / "c.svg").read_text()


@pytest.mark.parametrize(
    ("metrics", "arguments", "message"),
    [
        (None, ["TMP/none"], "there is no directory TMP/none"),
        (None, ["TMP"], "TMP holds no metrics.jsonl"),
        ("", ["TMP"], "holds no step with a finite loss"),
        ('{"step": 1, "loss/2', ["TMP"], "holds no step with a finite loss"),
        (LINES, ["TMP/metrics.jsonl"], "there is no directory TMP/metrics.jsonl"),
        (LINES, ["TMP", "--out", "TMP/c.txt"], "let its name end in .png, .svg or .pdf"),
        (LINES, ["TMP", "--out", "TMP/metrics.jsonl/c.png"], "TMP/metrics.jsonl is a file"),
        (LINES, ["TMP", "--ou", "c.png"], "did you mean '--out'"),
        (LINES, [], "RUN_DIR"),
    ],
)
def test_a_mistake_is_one_sentence(
    run: Run, tmp_path: Path, metrics: str | None, arguments: list[str], message: str
) -> None:
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*(word.replace("TMP", str(tmp_path)) for word in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message.replace("TMP", str(tmp_path)) in err
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_one_sentence_says_so(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text(LINES)
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = run(tmp_path)
    assert (code, out) == (2, "")
    assert err == "error: pictures need matplotlib; install it with: pip install 'exitlm[plots]'\n"
