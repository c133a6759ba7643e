"""What the scheduler reaches on a simulated device, beside S(B, k), the closed form for fixed rounds.

    python benchmarks/scheduling.py [--seeds 3] [--tokens 4000] [--layer 1] [--picture scheduling.svg]

No model and no clock: a pass takes the time of a table (this kind of CPU in 4 bits; a GPU, flat up to 200 rows; one
where every row costs a full price), exits fire and drafts are right by chance. Speeds are relative to plain decoding of
as many sequences. ``S`` is at the best k, within the wait bound (a quarter of a full pass) or without one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from measure import Spread, at_least, save, spread, table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the simulator is shared with the tests

from tests.decode.simulation import LAYERS, TABLES, best_predicted, speed, steady

SEQUENCES = (1, 2, 4, 8, 64)
MODES = (("threshold", (0.3, 0.5, 0.7, 0.9), (1.0,)), ("lossless", (0.5, 0.8, 1.0), (0.3, 0.5, 0.7, 0.9)))
BOUNDS = {"a quarter": 0.25, "none": None}


def measure(seeds: int, tokens: int, layer: int) -> list[dict[str, Any]]:
    """One row for each table, bound, mode, chance to fire and acceptance."""
    rows = []
    for name, costs in TABLES.items():
        for bound, wait in BOUNDS.items():
            for mode, firings, acceptances in MODES:
                for firing, acceptance in ((q, a) for q in firings for a in acceptances):
                    row: dict[str, Any] = {"table": name, "wait": bound, "mode": mode, "q": firing, "a": acceptance}
                    for B in SEQUENCES:
                        S, k = best_predicted(costs, B, firing, acceptance, wait, layer)
                        found = [
                            speed(
                                steady(costs, B, mode, firing, acceptance, tokens=max(tokens, 60 * B), wait=wait,
                                       seed=seed, layer=layer)
                            )
                            for seed in range(seeds)
                        ]  # fmt: skip
                        row[f"B={B}"] = spread(found)
                        row[f"S, k at {B}"] = f"{S:.3f}, {k}"
                        row[f"of S at {B}"] = round(row[f"B={B}"].median / S, 3)
                    rows.append(row)
                    print(" ".join(str(value) for value in row.values()), flush=True)
    return rows


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the design promises, by the worst case."""
    reached = spread([row[f"of S at {B}"] for row in rows for B in SEQUENCES])
    plain = spread([row[f"B={B}"].median for row in rows for B in SEQUENCES])
    return [
        at_least("share of S at the best k, in the worst case", reached.low, 0.95),
        at_least("speed relative to plain decoding, in the worst case", plain.low, 0.98),
    ]


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Speed by the number of sequences: lines are S, dots are what was reached."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = [mode for mode, _, _ in MODES]
    figure, axes = plt.subplots(len(modes), len(TABLES), figsize=(11, 6), sharex=True, sharey="row", squeeze=False)
    for i, mode in enumerate(modes):
        for j, name in enumerate(TABLES):
            axis = axes[i][j]
            shown = [row for row in rows if (row["table"], row["mode"], row["wait"]) == (name, mode, "a quarter")]
            shown = [row for row in shown if mode == "threshold" or row["q"] == 0.8]
            for color, row in enumerate(shown):
                label = f"q = {row['q']}" if mode == "threshold" else f"a = {row['a']}"
                bound = [float(row[f"S, k at {B}"].split(",")[0]) for B in SEQUENCES]
                axis.plot(SEQUENCES, bound, color=f"C{color}", label=label)
                medians = [value.median for B in SEQUENCES if isinstance(value := row[f"B={B}"], Spread)]
                axis.plot(SEQUENCES, medians, "o", color=f"C{color}")
            axis.set(xscale="log", xticks=SEQUENCES, xticklabels=SEQUENCES, title=f"{mode}, {name}")
            axis.axhline(1.0, color="gray", linewidth=0.5)
        axes[i][0].set_ylabel("speed, plain = 1")
        axes[i][0].legend()
    for axis in axes[-1]:
        axis.set_xlabel("sequences")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Simulate and write ``results/scheduling.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--layer", type=int, default=1, choices=range(1, LAYERS), help=f"the exit's, of {LAYERS}")
    parser.add_argument("--picture", default=None)
    given = parser.parse_args()
    rows = measure(given.seeds, given.tokens, given.layer)
    promised = claims(rows)
    print(table(promised))
    print(save("scheduling", {"rows": rows, "claims": promised}))
    if given.picture:
        draw(rows, given.picture)


if __name__ == "__main__":
    main()
