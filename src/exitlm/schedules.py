"""``exitlm schedule``: its flags, and the drawing of a training step's schedule or of a pipelined decode.

Nothing heavy is loaded to parse or to print help.
"""

from __future__ import annotations

import argparse
import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exitlm.errors import UserError

if TYPE_CHECKING:
    from exitlm.decode.pricing.stage_drawing import Decode


def schedule(
    *,
    pipeline: int,
    microbatches: int | None = None,
    schedule: str | None = None,
    ratio: float | None = None,
    fill_warmup: int | None = None,
    fill_cooldown: int | None = None,
    decode: bool = False,
    tokens: int | None = None,
    sequences: int | None = None,
    mode: str | None = None,
    exits: str | None = None,
    q: float | None = None,
    acceptance: float | None = None,
    message: float | None = None,
    seed: int | None = None,
    png: str | None = None,
    json: bool = False,
) -> int:
    """Draw a pipeline schedule beside plain 1F1B, or a pipelined decode, and say how busy its ranks are."""
    training = {
        "--microbatches": microbatches, "--schedule": schedule, "--ratio": ratio, "--fill-warmup": fill_warmup,
        "--fill-cooldown": fill_cooldown,
    }  # fmt: skip
    decoding = {
        "--tokens": tokens, "--sequences": sequences, "--mode": mode, "--exits": exits, "--q": q,
        "--acceptance": acceptance, "--message": message, "--seed": seed,
    }  # fmt: skip
    for flag, value in (training if decode else decoding).items():
        if value is not None:
            raise UserError(f"{flag} is of {'training' if decode else '--decode'}; leave it out")
    if decode:
        if acceptance is not None and mode != "lossless":
            raise UserError("--acceptance is of --mode lossless, whose drafts may be wrong; leave it out")
        return _decoding(
            pipeline, tokens=12 if tokens is None else tokens, sequences=1 if sequences is None else sequences,
            mode=mode or "threshold", exits=exits, q=0.7 if q is None else q,
            acceptance=0.7 if acceptance is None else acceptance, message=message or 0.0, seed=seed or 0, png=png,
            json=json,
        )  # fmt: skip
    if microbatches is None:
        raise UserError("give --microbatches N, those of a training step, or --decode (see exitlm schedule --help)")
    return _training(
        schedule or "1f1b", pipeline, microbatches, ratio=2.0 if ratio is None else ratio, fill_warmup=fill_warmup,
        fill_cooldown=fill_cooldown, png=png, json=json,
    )  # fmt: skip


def _training(
    schedule: str,
    pipeline: int,
    microbatches: int,
    *,
    ratio: float,
    fill_warmup: int | None,
    fill_cooldown: int | None,
    png: str | None,
    json: bool,
) -> int:
    from exitlm.parallel.pipeline.schedule import drawn, make, simulate

    made = make(schedule, pipeline, microbatches, ratio=ratio, fill_warmup=fill_warmup, fill_cooldown=fill_cooldown)
    lines = [simulate(made, 1.0, ratio), simulate(make("1f1b", pipeline, microbatches), 1.0, ratio)]
    mine, plain = lines
    figures = {
        "schedule": schedule, "pipeline": pipeline, "microbatches": microbatches, "backward_forward_ratio": ratio,
        "makespan": mine.makespan, "utilisation": mine.utilisation, "baseline_makespan": plain.makespan,
        "baseline_utilisation": plain.utilisation, "filled_warmup": made.filled_warmup,
        "filled_cooldown": made.filled_cooldown,
    }  # fmt: skip
    if png:
        from exitlm.evaluate.plots import timeline_picture

        pictures = [
            (f"{line.schedule.name}: makespan {line.makespan:g}, utilisation {line.utilisation:.1%}",
             [[(e.action.op, e.action.microbatch, e.start, e.end) for e in events] for events in line.ranks])
            for line in (lines if schedule != "1f1b" else lines[:1])
        ]  # fmt: skip
        partial = [m for m, span in made.spans.items() if span != (0, made.stages - 1)]
        timeline_picture(Path(png), pictures, partial=partial)
    if json:
        print(json_format.dumps(figures))
        return 0
    for line in lines if schedule != "1f1b" else lines[:1]:
        print(f"{line.schedule.name}: makespan {line.makespan:g}, utilisation {line.utilisation:.1%}")
        print("\n".join(drawn(line)))
    extra = made.filled_warmup + made.filled_cooldown
    if extra:
        print(
            f"{made.filled_warmup} microbatches more in the warm-up and {made.filled_cooldown} in the cool-down: "
            f"the batch grows from {microbatches} to {microbatches + extra} (some of them partial)"
        )
    print("one unit is a forward of a rank's layers; 3 is microbatch 3 forward, [3 its backward or that of the inputs,")
    print("(3 that of the weights")
    return 0


def _decoding(
    pipeline: int,
    *,
    tokens: int,
    sequences: int,
    mode: str,
    exits: str | None,
    q: float,
    acceptance: float,
    message: float,
    seed: int,
    png: str | None,
    json: bool,
) -> int:
    from exitlm.decode.pricing.stage_drawing import decode, drawn

    stages = None if exits is None else _stages(exits)
    found = [
        decode(
            stages=pipeline, tokens=tokens, sequences=sequences, mode=name, exits=stages, firing=q,
            acceptance=acceptance, message=message, seed=seed,
        )
        for name in dict.fromkeys((mode, "full"))
    ]  # fmt: skip
    mine, plain = found[0], found[-1]
    figures = {
        "mode": mode, "pipeline": pipeline, "tokens": tokens, "sequences": sequences, "q": q, "seed": seed,
        "makespan": mine.makespan, "utilisation": mine.utilisation, "baseline_makespan": plain.makespan,
        "baseline_utilisation": plain.utilisation,
    }  # fmt: skip
    if png:
        _picture(Path(png), found)
    if json:
        print(json_format.dumps(figures))
        return 0
    for one in found:
        print(one.title)
        print("\n".join(drawn(one)))
    print(
        "one unit is a pass of a stage; 3 computes token 3, 3* an exit at the stage's end gave it, 3! the last layer,"
    )
    print("3~ it was known: keys and values only" + (", 3x is behind a wrong draft" if mode == "lossless" else ""))
    return 0


def _stages(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise UserError(f"--exits is '{words}', but must be stages such as 1,2") from None


def _picture(path: Path, found: Sequence[Decode]) -> None:
    from exitlm.decode.pricing.stage_drawing import name
    from exitlm.evaluate.plots import decode_picture

    decode_picture(
        path,
        [
            (
                one.title,
                [
                    [(p.begin, p.end, [(name(cell, one.sequences), cell.kind) for cell in p.cells]) for p in pieces]
                    for pieces in one.stages
                ],
            )
            for one in found
        ],
    )


def add_schedule(parser: argparse.ArgumentParser) -> None:
    """The flags of ``schedule``."""
    add = parser.add_argument
    add("--pipeline", type=int, required=True, metavar="P", help="ranks of the pipeline, or stages of --decode")
    add("--microbatches", type=int, metavar="N", help="microbatches of a training step")
    add(
        "--schedule",
        metavar="S",
        help="1f1b (default), gpipe, interleaved, zero_bubble, zbv, filled, or tuning (exits on a frozen model)",
    )
    add("--ratio", type=float, metavar="R", help="time of a backward over that of a forward (default: 2)")
    add("--fill-warmup", type=int, metavar="N", help="extra microbatches in the warm-up (default: as many as fit)")
    add("--fill-cooldown", type=int, metavar="N", help="extra microbatches in the cool-down (default: as many as fit)")
    add("--decode", action="store_true", help="draw a pipelined decode instead, whose exits fire by chance")
    add("--tokens", type=int, metavar="N", help="tokens of each sequence (default: 12)")
    add("--sequences", type=int, metavar="B", help="sequences that are decoded together (default: 1)")
    add("--mode", metavar="M", help="threshold (default), lossless, or full")
    add("--exits", metavar="STAGES", help="stages with an exit at their end, such as 1,2 (default: all but the last)")
    add("--q", type=float, metavar="Q", help="chance that an exit fires (default: 0.7)")
    add("--acceptance", type=float, metavar="A", help="chance that a draft of lossless is right (default: 0.7)")
    add("--message", type=float, metavar="T", help="time of a message, in passes of a stage (default: 0)")
    add("--seed", type=int, metavar="S", help="decides which exits fire (default: 0)")
    add("--png", metavar="FILE", help="draw it there, too")
    add("--json", action="store_true", help="print one JSON object with makespan and utilisation of both")
