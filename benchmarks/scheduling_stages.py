"""What pipelined decoding reaches on simulated stages: speed, seconds per token, and the share of time stages compute.

    python benchmarks/scheduling_stages.py [--seeds 2] [--tokens 800] [--jobs 2]

No model and no clock: a pass takes the time of a table (those of ``scheduling.py``), exits fire and drafts are right by
chance, and what runs is chosen by the policy that the engine uses. A stage takes 5 ms for one row, give or take 5%, and
messages what ``MESSAGES`` say. The exits are at the end of the first stage, and with eight stages also at a quarter of
the layers. Speeds are relative to one process that decodes as many sequences plainly; "one process" is S at the best k.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from measure import Claim, Spread, at_least, save, spread, table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tables are shared with the tests

from tests.decode.simulation import CPU, DEAR, GPU, best_predicted, cost_table

from exitlm.decode.pricing.stage_simulation import Steady, expected_depth, pipeline, steady

TABLES = {"cpu": CPU, "gpu": GPU, "dear": DEAR}
STAGES = (2, 4, 8)
SEQUENCES = (1, 2, 4, 8, 16, 64, 256)
MODES = (
    ("full", 0.0, 1.0),
    *(("threshold", q, 1.0) for q in (0.5, 0.7, 0.9)),
    *(("lossless", 0.8, a) for a in (0.4, 0.7)),
)
MESSAGES = {"0": 0.0, "60 us": 0.012, "1 ms": 0.2}  # in passes of one row through a stage, which takes 5 ms
USUAL = "60 us"
Case = tuple[str, int, int, str, float, float, str, int, float]  # of simulate()


def exits(stages: int) -> tuple[int, ...]:
    """The layers with exits, where each stage has one layer."""
    return (1, 2) if stages == 8 else (1,)


def costs_of(name: str, stages: int) -> Any:
    """The table by which a pass of one row through a stage takes 1."""
    return cost_table({rows: time * stages for rows, time in TABLES[name].items()}, stages)


def simulate(case: Case, tokens: int, seed: int) -> Steady:
    """One run of (table, stages, sequences, mode, q, a, message, passes queued at a stage, gather)."""
    name, stages, sequences, mode, firing, right, message, queue, gather = case
    found = pipeline(
        stages, costs_of(name, stages), message=MESSAGES[message], queue=queue, gather=gather, seed=seed, jitter=0.05
    )
    places = exits(stages)
    return steady(
        found, sequences, mode, dict.fromkeys(places, firing), dict.fromkeys(places, right),
        tokens=max(tokens * (3 if sequences == 1 else 1), 20 * sequences),
    )  # fmt: skip


def _simulated(work: tuple[Case, int, int]) -> tuple[Case, Steady]:
    return work[0], simulate(*work)


def cases() -> list[Case]:
    """Every table, P, B and mode at the usual latency; the others, and the options, for one table and P."""
    usual = [
        (name, P, B, *mode, USUAL, 1, 0.0) for name, P, B, mode in itertools.product(TABLES, STAGES, SEQUENCES, MODES)
    ]
    more = [
        (name, 4, B, *mode, message, queue, gather)
        for name, B, mode in itertools.product(("cpu", "gpu"), (1, 8, 64), MODES)
        for message, queue, gather in (("0", 1, 0.0), ("1 ms", 1, 0.0), ("1 ms", 2, 0.0), (USUAL, 1, 0.5))
    ]
    return usual + more


def speeds(case: Case, runs: list[Steady]) -> Spread:
    """The runs' speeds."""
    return spread([run.speed(costs_of(case[0], case[1])) for run in runs])


def tables(found: dict[Case, list[Steady]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by table, P and mode with a column for each B: speed, busy, latency; then what messages and options do."""
    made: dict[str, list[dict[str, Any]]] = {"speed": [], "busy": [], "latency": [], "messages": []}
    for name, P, (mode, q, a) in itertools.product(TABLES, STAGES, MODES):
        head = {"table": name, "P": P, "mode": mode, "q": q, "a": a}
        lines: dict[str, dict[str, Any]] = {part: dict(head) for part in ("speed", "busy", "latency")}
        for B in SEQUENCES:
            case: Case = (name, P, B, mode, q, a, USUAL, 1, 0.0)
            runs = found[case]
            lines["speed"][f"B={B}"] = speeds(case, runs)
            if B in (1, 8, 64) and P < 8:
                S = best_predicted(costs_of(name, P), B, q, a, None, 1)[0] if q else 1.0
                lines["speed"][f"one process, {B}"] = round(S, 3)
            elif B in (1, 8, 64):
                lines["speed"][f"one process, {B}"] = ""
            busy = [sum(run.busy) / P for run in runs]
            most = [max(run.busy) for run in runs]
            lines["busy"][f"B={B}"] = f"{spread(busy).median:.2f}, busiest {spread(most).median:.2f}"
            mean, tail = spread([run.latency for run in runs]), spread([run.tail for run in runs])
            lines["latency"][f"B={B}"] = f"{mean.median:.3g}, 99%: {tail.median:.3g}"
        for part, line in lines.items():
            made[part].append(line)
    for name, (mode, q, a), B in itertools.product(("cpu", "gpu"), MODES, (1, 8, 64)):
        line: dict[str, Any] = {"table": name, "P": 4, "mode": mode, "q": q, "a": a, "B": B}
        for title, options in (
            ("no latency", ("0", 1, 0.0)), ("60 us", (USUAL, 1, 0.0)), ("60 us, gather .5", (USUAL, 1, 0.5)),
            ("1 ms", ("1 ms", 1, 0.0)), ("1 ms, a second pass queued", ("1 ms", 2, 0.0)),
        ):  # fmt: skip
            case = (name, 4, B, mode, q, a, *options)
            line[title] = speeds(case, found[case])
        made["messages"].append(line)
    return made


def one_sequence(found: dict[Case, list[Steady]]) -> list[dict[str, Any]]:
    """A single sequence in ``threshold``, the formula, and the most that the first stage allows EE-LLM's method."""
    rows = []
    for P, (mode, q, a) in itertools.product(STAGES, MODES):
        if mode == "threshold":
            case: Case = ("cpu", P, 1, mode, q, a, USUAL, 1, 0.0)
            speed, bound = speeds(case, found[case]), 1.0 / expected_depth(dict.fromkeys(exits(P), q), P)
            rows.append(
                {"P": P, "q": q, "speed": speed, "formula": round(bound, 3), "share": round(speed.median / bound, 3),
                 "EE-LLM's method at most": P}
            )  # fmt: skip
    return rows


def within_a_stage(seeds: int, tokens: int) -> list[dict[str, Any]]:
    """The same on two stages of four layers each with an exit behind the first layer, whose pending rows share the
    other three."""
    rows = []
    for name, q in itertools.product(("cpu", "gpu"), (0.7, 0.9, 0.95)):
        costs = cost_table({rows: 2 * time for rows, time in TABLES[name].items()}, 8)
        found = [
            steady(pipeline(2, costs, message=MESSAGES[USUAL], seed=seed, jitter=0.05), 1, "threshold", {1: q},
                   tokens=3 * tokens).speed(costs)
            for seed in range(seeds)
        ]  # fmt: skip
        bound = 1.0 / expected_depth({1: q}, 8)
        rows.append({"table": name, "P": 2, "q": q, "speed": spread(found), "formula": round(bound, 3)})
    return rows


def claims(found: dict[Case, list[Steady]], alone: list[dict[str, Any]]) -> list[Claim]:
    """What the issue and the design promise, by the worst case."""
    usual = {case[:6]: runs for case, runs in found.items() if case[6:] == (USUAL, 1, 0.0)}
    full = [
        spread([sum(run.busy) / P for run in runs]).median
        for (_, P, B, mode, _, _), runs in usual.items()
        if P == 4 and B >= 8 and mode == "full"
    ]
    busiest = [
        spread([max(run.busy) for run in runs]).median
        for (_, P, B, _, _, _), runs in usual.items()
        if P == 4 and B >= 8
    ]
    groups, kept = [], []
    for (name, P, B, mode, _, _), runs in usual.items():
        costs, rate = costs_of(name, P), spread([run.rate for run in runs]).median
        if mode == "full":
            share = -(-B // P)
            groups.append(rate * (costs.full(share) if B >= P else costs.full(1)) / (share * min(B, P)))
        else:
            kept.append(rate / spread([run.rate for run in usual[name, P, B, "full", 0.0, 1.0]]).median)
    alone_least = min(row["share"] for row in alone)
    return [
        at_least("one sequence in threshold: share of the formula, worst case", alone_least, 0.9),
        at_least("P = 4, 8 sequences or more, full: share of time that stages compute, worst case", min(full), 0.9),
        at_least("the same of the busiest stage, in every mode", min(busiest), 0.9),
        at_least("full: share of T(B) / T(B / P), worst case", min(groups), 0.9),
        at_least("threshold and lossless: speed relative to full on as many stages, worst case", min(kept), 0.98),
    ]


def main() -> None:
    """Simulate and write ``results/scheduling-stages.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=800)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    work = [(case, given.tokens, seed) for case in cases() for seed in range(given.seeds)]
    found: dict[Case, list[Steady]] = {}
    with multiprocessing.Pool(given.jobs) as pool:
        for case, run in pool.imap_unordered(_simulated, work):
            found.setdefault(case, []).append(run)
    alone = one_sequence(found)
    promised = claims(found, alone)
    print(table(alone))
    print(table(promised))
    notes = [
        "speed: relative to one process that decodes as many sequences plainly, which is S = 1",
        "latency: between two tokens of a sequence, in passes of one row through a stage: mean, and 99 of 100",
    ]
    within = within_a_stage(given.seeds, given.tokens)
    made = {"one sequence": alone, "an exit within the first stage": within, **tables(found), "claims": promised}
    print(save("scheduling-stages", {"notes": notes, **made}))


if __name__ == "__main__":
    main()
