"""A pipelined decode to look at: the work of every stage, as in Figure 5 of EE-LLM (arXiv 2312.04916), and as text.

The policy is the engine's, on simulated stages of one layer each in which rows are free: a pass takes one unit of time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from exitlm.decode.pricing.costs import Costs
from exitlm.decode.pricing.stage_simulation import Simulated, Work, pipeline
from exitlm.errors import UserError

MAX_STAGES, MAX_TOKENS = 64, 4096
MODES = ("threshold", "lossless", "full")
_WIDEST = 240
_FREE_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Rows of one sequence in a pass, by the tokens that they give: ``first`` to ``last``, counted from 1.

    kind: ``new`` (the token isn't known yet), ``fired`` (the exit at the stage's end gave it), ``final`` (the last
    layer did), ``fill`` (known before: only keys and values are computed), ``refused`` (behind a wrong draft).
    """

    key: int
    first: int
    last: int
    kind: str


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A pass on a stage, from ``begin`` to ``end``."""

    begin: float
    end: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Decode:
    """What each stage did until all tokens were there (``makespan``, in passes of a stage)."""

    mode: str
    stages: tuple[tuple[Piece, ...], ...]
    tokens: int
    sequences: int
    makespan: float

    @property
    def utilisation(self) -> float:
        """The share of the time that the stages compute."""
        busy = sum(min(p.end, self.makespan) - min(p.begin, self.makespan) for ones in self.stages for p in ones)
        return busy / self.makespan / len(self.stages)

    @property
    def title(self) -> str:
        """Its mode and figures."""
        rate = self.tokens * self.sequences / self.makespan
        return f"{self.mode}: makespan {self.makespan:g}, {rate:.2g} tokens a pass, utilisation {self.utilisation:.1%}"


def decode(
    *,
    stages: int,
    tokens: int,
    sequences: int = 1,
    mode: str = "threshold",
    exits: Sequence[int] | None = None,
    firing: float = 0.7,
    acceptance: float = 0.7,
    message: float = 0.0,
    seed: int = 0,
) -> Decode:
    """Let ``sequences`` write ``tokens`` tokens each on a pipeline. ``exits`` are the stages, counted from 1, with an
    exit at their end (None: all but the last), each of which fires with chance ``firing``; ``acceptance`` is the chance
    that a draft of ``lossless`` is right; a message takes ``message`` passes.

    Raises:
        UserError: a number out of range, or more than a picture can show.
    """
    if not 2 <= stages <= MAX_STAGES:
        raise UserError(f"a pipeline of {stages} stages can't be drawn; use 2 to {MAX_STAGES}")
    if tokens < 1 or sequences < 1 or tokens * sequences > MAX_TOKENS:
        raise UserError(f"{sequences} sequences of {tokens} tokens can't be drawn; use 1 to {MAX_TOKENS} tokens in all")
    if mode not in MODES:
        raise UserError(f"mode '{mode}' is unknown; use one of {', '.join(MODES)}")
    for name, value in (("chance to fire", firing), ("acceptance", acceptance)):
        if not 0.0 <= value <= 1.0:
            raise UserError(f"a {name} of {value:g} is not a probability; use 0 to 1")
    if not 0.0 <= message <= 100.0:
        raise UserError(f"a message can't take {message:g} passes; use 0 to 100")
    places = range(1, stages) if exits is None else exits
    if wrong := [place for place in places if not 1 <= place < stages]:
        raise UserError(f"stage {wrong[0]} can't have an early exit at its end; use stages 1 to {stages - 1}")
    flat = Costs(
        rows=(1, _FREE_ROWS), layer=((1.0, 1.0),), head=(0.0, 0.0), test={}, draft={}, num_hidden_layers=stages
    )
    found = pipeline(stages, flat, message=message, seed=seed, keep=True)
    ones = [
        Simulated(
            key=key, mode=mode, length=tokens, firing=dict.fromkeys(places, firing),
            right=dict.fromkeys(places, acceptance),
        )
        for key in range(sequences)
    ]  # fmt: skip
    found.run(ones)
    refused = _refused(found.work)
    done = tuple(
        tuple(
            Piece(begin=work.begin, end=work.end, cells=_cells(work, stages, refused, mode))
            for work in sorted(found.work, key=lambda one: one.begin)
            if work.stage == stage
        )
        for stage in range(stages)
    )
    end = max(one.emitted[tokens - 1] for one in ones)
    return Decode(mode=mode, stages=done, tokens=tokens, sequences=sequences, makespan=end)


def _refused(work: Sequence[Work]) -> dict[tuple[int, int], float]:
    """When each (sequence, position) entered the first stage last: what it did before was in vain."""
    return {
        (part.key, part.start + row): one.begin
        for one in sorted(work, key=lambda one: one.begin)
        if one.stage == 0
        for part in one.parts
        for row in range(part.rows)
    }


def _cells(work: Work, end: int, entered: dict[tuple[int, int], float], mode: str) -> tuple[Cell, ...]:
    """What a pass shows: neighbouring rows of one kind together."""
    cells: list[Cell] = []
    for part in work.parts:
        for row in range(part.rows):
            newest, position = row == part.rows - 1, part.start + row
            if work.begin < entered[part.key, position]:
                kind = "refused"
            elif row < part.fills:
                kind = "fill"
            elif part.fired and newest:
                kind = "fired"
            else:
                kind = "final" if work.last == end else "new"
            before = cells[-1] if cells else None
            if before and (before.key, before.kind, before.last) == (part.key, kind, position) and kind != "new":
                cells[-1] = Cell(key=part.key, first=before.first, last=position + 1, kind=kind)
            else:
                cells.append(Cell(key=part.key, first=position + 1, last=position + 1, kind=kind))
    return tuple(cells)


MARKS = {"new": "", "fired": "*", "final": "!", "fill": "~", "refused": "x"}


def name(cell: Cell, sequences: int = 1) -> str:
    """The tokens of a cell, such as ``5`` or ``2-4``, behind the letter of its sequence where there are several."""
    letter = "" if sequences == 1 else chr(ord("a") + cell.key) if sequences <= 26 else f"s{cell.key}:"
    return f"{letter}{cell.first}" if cell.first == cell.last else f"{letter}{cell.first}-{cell.last}"


def drawn(found: Decode) -> list[str]:
    """A line of text per stage; a long decode is cut in the middle, and "…" stands for what is left out."""
    labels = [
        [(piece, " ".join(name(cell, found.sequences) + MARKS[cell.kind] for cell in piece.cells)) for piece in pieces]
        for pieces in found.stages
    ]
    widest = min(24, max(len(label) for pieces in labels for _, label in pieces) + 2)
    length = math.ceil(max(piece.end for pieces in found.stages for piece in pieces) * widest)
    half = _WIDEST // 2
    lines = []
    for stage, pieces in enumerate(labels, 1):
        line = ["·"] * length
        for piece, label in pieces:
            begin, end = round(piece.begin * widest), round(piece.end * widest)
            room = end - begin - 1
            text = label if len(label) <= room else label[: max(0, room - 1)] + "…"
            line[begin:end] = list(f"|{text:<{room}}"[: end - begin])
        text = "".join(line)
        text = text if length <= _WIDEST else f"{text[:half]}…{text[-half:]}"
        lines.append(f"stage {stage:>{max(2, len(str(len(labels))))}} {text}|")
    return lines
