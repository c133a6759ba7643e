"""Write RESULTS.md from the JSON files under ``results/``: for every table its command, commit, machine and spread.

python benchmarks/report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from measure import RESULTS, Spread, table

INTRODUCTION = """# Measured

Written by `python benchmarks/report.py` from the JSON files in `results/`; no figure here is typed by hand. A cell is
the median with the least and the largest of its repetitions; what is compared was measured alternately in one run, and
a ratio is taken pair by pair. Timings on shared machines are noisy: differences under ten percent mean nothing.
"""


def cell(value: Any) -> Any:
    """A :class:`Spread` that went through JSON, as text."""
    return (
        str(Spread(**value)) if isinstance(value, dict) and set(value) == {"median", "low", "high", "count"} else value
    )


def section(path: Path) -> str:
    """One result file as a section."""
    figures = json.loads(path.read_text())
    machine = figures.pop("machine")
    rows = figures.pop("rows", None)
    lines = [f"## {path.stem}", "", f"`{machine['command']}`, commit {machine['commit']}"]
    where = machine["gpu"] or f"{machine['processor']} ({machine['instructions']}), {machine['threads']} threads"
    lines[-1] += f"; {where}; Python {machine['python']}, torch {machine['torch']}."
    details = [
        f"{name.replace('_', ' ')}: {'; '.join(value) if isinstance(value, list) and name == 'notes' else cell(value)}"
        for name, value in figures.items()
        if value not in (None, [], {}) and not isinstance(cell(value), dict)
    ]
    if details:
        lines += ["", "; ".join(details) + "."]
    if rows:
        lines += ["", table([{name: cell(value) for name, value in row.items()} for row in rows])]
    return "\n".join(lines)


def main() -> None:
    """Write RESULTS.md beside this file."""
    sections = [section(path) for path in sorted(RESULTS.glob("*.json"))]
    (Path(__file__).parent / "RESULTS.md").write_text("\n\n".join([INTRODUCTION.rstrip(), *sections]) + "\n")


if __name__ == "__main__":
    main()
