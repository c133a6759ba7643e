"""What every benchmark program shares: interleaved timing, medians with their spread, a JSON record of the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Spread:
    """Median, least and largest of a measurement, and how often it was taken."""

    median: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g}-{self.high:.4g})"


def spread(values: list[float]) -> Spread:
    """Summarise repeated measurements."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def interleave(actions: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each action once per round, after one round that does not count; an action returns its own figure."""
    for action in actions.values():
        action()
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            found[name].append(action())
    return found


def ratios(values: list[float], base: list[float]) -> Spread:
    """The ratio to ``base`` round by round: both sides of a pair were measured next to each other."""
    return spread([value / other for value, other in zip(values, base, strict=True)])


def quartiles(values: list[float], base: list[float]) -> str:
    """The quartiles of the ratio to ``base`` round by round: outliers of a shared machine don't move them."""
    pairs = [value / other for value, other in zip(values, base, strict=True)]
    low, _, high = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
    return f"{low:.4g}-{high:.4g}"


Claim = dict[str, Any]


def at_most(claim: str, value: float | Spread, limit: float) -> Claim:
    """A row of claims: it holds where the (median) value is not above the limit."""
    return _claim(claim, value, f"at most {limit:.4g}", lambda x: x <= limit)


def at_least(claim: str, value: float | Spread, limit: float) -> Claim:
    """A row of claims: it holds where the (median) value is not below the limit."""
    return _claim(claim, value, f"at least {limit:.4g}", lambda x: x >= limit)


def within(claim: str, value: float | Spread, goal: float, share: float) -> Claim:
    """A row of claims: it holds where the (median) value is off the goal by no more than a share of it."""
    return _claim(claim, value, f"{goal:g} within {share:.0%}", lambda x: abs(x / goal - 1.0) <= share)


def _claim(claim: str, value: float | Spread, goal: str, good: Callable[[float], bool]) -> Claim:
    holds = good(value.median if isinstance(value, Spread) else value)
    shown = value if isinstance(value, Spread) else f"{value:.4g}"
    return {"claim": claim, "measured": shown, "goal": goal, "holds": "yes" if holds else "NO"}


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def machine() -> dict[str, Any]:
    """Processor, cores, libraries and commit."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((x.split(":", 1)[1].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x), name)
    describe, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, cwd=here).stdout.strip()
    except OSError:
        commit = ""
    return {
        "processor": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "command": " ".join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)]),
    }


def save(name: str, figures: Mapping[str, Any]) -> Path:
    """Write ``results/NAME.json``."""
    directory = Path(os.environ.get("OUT") or RESULTS)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    plain = json.dumps({"machine": machine(), **figures}, indent=1, default=lambda x: asdict(x))
    path.write_text(plain + "\n")
    return path


def table(rows: list[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)
