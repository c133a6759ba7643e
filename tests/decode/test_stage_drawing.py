"""Pipelined decodes as they are drawn: by hand for simple cases, and the verb that prints them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from exitlm import cli
from exitlm.decode.pricing.stage_drawing import Cell, Decode, decode, drawn, name
from exitlm.errors import UserError


def cells(found: Decode) -> list[tuple[int, float, int, str]]:
    """(stage, when, token, kind) of all that is drawn."""
    return sorted(
        (stage, piece.begin, token, cell.kind)
        for stage, pieces in enumerate(found.stages, 1)
        for piece in pieces
        for cell in piece.cells
        for token in range(cell.first, cell.last + 1)
    )


def test_exits_that_always_fire_start_the_next_token_at_once() -> None:
    found = decode(stages=3, tokens=3, firing=1.0)
    assert found.makespan == 3.0
    assert drawn(found) == ["stage  1 |1* |2* |3* |", "stage  2 ····|1~ |2~ |", "stage  3 ········|1~ |"]
    assert [one for one in cells(found) if one[0] == 1] == [(1, t - 1.0, t, "fired") for t in (1, 2, 3)]


def test_exits_that_never_fire_leave_one_token_at_a_time() -> None:
    found = decode(stages=3, tokens=4, firing=0.0)
    assert found.makespan == 12.0
    assert found.utilisation == pytest.approx(1 / 3)
    assert cells(found) == cells(decode(stages=3, tokens=4, mode="full"))
    assert {kind for *_, kind in cells(found)} == {"new", "final"}


@pytest.mark.parametrize("mode", ["threshold", "lossless"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_every_token_is_given_once(mode: str, sequences: int) -> None:
    found = decode(stages=4, tokens=20, sequences=sequences, mode=mode, firing=0.6, acceptance=0.5, seed=3)
    given: list[tuple[int, int]] = []
    for piece in itertools.chain.from_iterable(found.stages):
        for cell in piece.cells:
            if cell.kind == "final" or (cell.kind == "fired" and mode == "threshold"):
                given += [(cell.key, token) for token in range(cell.first, cell.last + 1) if token <= 20]
    assert sorted(given) == [(key, token) for key in range(sequences) for token in range(1, 21)]


def test_what_follows_a_wrong_draft_is_refused() -> None:
    found = decode(stages=3, tokens=3, mode="lossless", firing=1.0, acceptance=0.0, exits=(1,))
    kinds = {token: [kind for stage, _, t, kind in cells(found) if t == token and stage == 1] for token in (1, 2, 3)}
    assert kinds[1] == ["fired"]
    assert kinds[2] == ["refused", "fired"]
    right = decode(stages=3, tokens=9, mode="lossless", firing=1.0, acceptance=1.0, exits=(1,))
    assert "refused" not in {kind for *_, kind in cells(right)}
    assert right.makespan == 9.0 + 2.0


def test_names_tell_sequences_and_ranges() -> None:
    cell = Cell(key=1, first=2, last=4, kind="fill")
    assert [name(cell), name(cell, 2), name(cell, 30)] == ["2-4", "b2-4", "s1:2-4"]


def test_a_long_decode_is_cut_in_the_middle() -> None:
    lines = drawn(decode(stages=4, tokens=500, firing=0.5))
    assert {len(line) for line in lines} == {240 + len("stage  1 …|")}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["schedule", "--decode", "--pipeline", "4", "--tokens", "8", "--q", "1", "--exits", "1"]
    assert cli.main([*command, "--json", "--png", str(tmp_path / "decode.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["makespan"], found["baseline_makespan"], found["baseline_utilisation"]) == (8.0, 32.0, 0.25)
    assert (tmp_path / "decode.png").stat().st_size > 10_000
    assert cli.main([*command, "--sequences", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("stage ") >= 8
    assert "|a1* " in text
    assert "b8*" in text


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--decode", "--microbatches", "4"], "--microbatches is of training; leave it out"),
        (["--microbatches", "4", "--q", "0.5"], "--q is of --decode; leave it out"),
        ([], "give --microbatches N, those of a training step, or --decode"),
        (["--decode", "--acceptance", "0.5"], "--acceptance is of --mode lossless"),
        (["--decode", "--q", "1.5"], "a chance to fire of 1.5 is not a probability; use 0 to 1"),
        (["--decode", "--exits", "4"], "stage 4 can't have an early exit at its end; use stages 1 to 3"),
        (["--decode", "--exits", "x"], "--exits is 'x', but must be stages such as 1,2"),
        (["--decode", "--mode", "fast"], "mode 'fast' is unknown; use one of threshold, lossless, full"),
        (["--decode", "--tokens", "5000"], "1 sequences of 5000 tokens can't be drawn; use 1 to 4096 tokens in all"),
        (["--decode", "--message", "-1"], "a message can't take -1 passes; use 0 to 100"),
    ],
)
def test_flags_that_are_refused(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schedule", "--pipeline", "4", *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_a_pipeline_has_stages() -> None:
    with pytest.raises(UserError, match="a pipeline of 1 stages can't be drawn; use 2 to 64"):
        decode(stages=1, tokens=3)
