"""The picture of a load run, of whatever became of it."""

from pathlib import Path

import pytest

from exitlm.evaluate.load import LoadRun, load_picture

FIRST = [(0.1 * i, 0.2 + 0.01 * i) for i in range(20)]
WHOLE = [(due, 1.0 + took) for due, took in FIRST]
RUNNING = [(0.0, 1), (0.5, 2), (1.0, 1), (2.0, 0)]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (LoadRun(first=FIRST, whole=WHOLE, gaps=[0.01] * 50 + [2.0], failed=[0.3], running=RUNNING),
         ["whole answer", "first text", "failed", "share of gaps between texts within a time", "p90 10 ms"]),
        (LoadRun(first=[], whole=WHOLE, gaps=[], failed=[], running=RUNNING), ["whole answer"]),
        (LoadRun(first=[], whole=[], gaps=[], failed=[0.0, 1.0], running=RUNNING), ["failed"]),
        (LoadRun(first=[(0.0, 0.0)], whole=[(0.0, 0.0)], gaps=[0.0, 0.0], failed=[], running=[(0.0, 0)]), ["p99 0 ms"]),
    ],
    ids=["streamed", "not streamed", "all failed", "no time"],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_a_run_is_drawn(tmp_path: Path, run: LoadRun, words: list[str]) -> None:
    path = load_picture(tmp_path / "a" / "run.svg", run, title="a title", note="a note")
    picture = path.read_text()
    for word in ["a title", "a note", *words]:
        assert f"<!-- {word} -->" in picture
    assert ("first text" in picture) == bool(run.first)
    assert ("gaps between texts" in picture) == bool(run.gaps)
