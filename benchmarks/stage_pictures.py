"""Draw the pictures of pipelined decoding in docs/: from the policy on simulated stages, and from what it reached.

    python benchmarks/stage_pictures.py

The second picture reads ``results/scheduling-stages.json``, which ``scheduling_stages.py`` writes.
"""

from __future__ import annotations

import json

import numpy as np
from drawing import BLUE, GREEN, OUT, RED, VIOLET, shrink
from measure import RESULTS

from exitlm.cli import main as command
from exitlm.decode.pricing.stage_simulation import expected_depth
from exitlm.evaluate.plots import BAND, GREY, new_figure, save_figure

COLOURS = {2: VIOLET, 4: BLUE, 8: GREEN}
ASKED = "schedule --decode --pipeline 4 --tokens 12 --q 0.7 --seed 0 --json --png"


def reached() -> None:
    """One sequence over q, beside the formula and what the first stage allows; many sequences on four stages."""
    found = json.loads((RESULTS / "scheduling-stages.json").read_text())
    figure = new_figure((11.0, 4.1))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    shares = np.linspace(0.0, 1.0, 101)
    for stages, colour in COLOURS.items():
        exits = (1, 2) if stages == 8 else (1,)
        bound = [1.0 / expected_depth(dict.fromkeys(exits, float(q)), stages) for q in shares]
        left.plot(shares, bound, color=colour, linewidth=2, label=f"P = {stages}" + ", two exits" * (stages == 8))
        left.axhline(stages, color=colour, linewidth=1, linestyle=":")
        dots = [row for row in found["one sequence"] if row["P"] == stages]
        left.plot([row["q"] for row in dots], [row["speed"]["median"] for row in dots], "o", color=colour, markersize=6)
    left.set(
        xlabel="q, how often an exit fires", ylabel="speed against full, one sequence", xlim=(0, 1), ylim=(0.9, 9.9)
    )
    left.set_title("threshold: line 1 / (expected depth), dotted P", fontsize=10)
    left.legend(frameon=False, fontsize=9, loc="upper left")
    sizes = [1, 2, 4, 8, 16, 64, 256]
    for name, line in (("cpu", "-"), ("gpu", "--")):
        for mode, q, a, colour in (
            ("full", 0.0, 1.0, GREY), ("threshold", 0.7, 1.0, BLUE), ("threshold", 0.9, 1.0, GREEN),
            ("lossless", 0.8, 0.7, RED),
        ):  # fmt: skip
            key = (name, 4, mode, q, a)
            row = next(r for r in found["speed"] if (r["table"], r["P"], r["mode"], r["q"], r["a"]) == key)
            chances = {"full": "", "threshold": f", q = {q}", "lossless": f", q = {q}, a = {a}"}[mode]
            speeds = [row[f"B={size}"]["median"] for size in sizes]
            label = f"{mode}{chances}" if name == "cpu" else None
            right.plot(sizes, speeds, line, marker="o", markersize=4, color=colour, linewidth=2, label=label)
    right.set_xscale("log", base=2)
    right.set_xticks(sizes, [str(size) for size in sizes])
    right.set(xlabel="B, sequences decoded together", ylabel="tokens per second, one process = 1", ylim=(0.7, 5.4))
    right.axhline(4.0, color=GREY, linewidth=1, linestyle=":")
    right.set_title("P = 4; line: CPU, 4 bits; dashed: flat to 200 rows", fontsize=10)
    right.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    for axes in (left, right):
        axes.grid(color=BAND)
        axes.set_axisbelow(True)
    figure.tight_layout()
    save_figure(figure, OUT / "decoding-stages.png")


def main() -> None:
    """Write the pictures."""
    assert command([*ASKED.split(), str(OUT / "decoding-pipeline.png")]) == 0
    reached()
    for path in ("decoding-pipeline", "decoding-stages"):
        shrink(OUT / f"{path}.png")


if __name__ == "__main__":
    main()
