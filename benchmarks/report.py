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
a ratio is taken pair by pair. Timings on shared machines are noisy: differences under ten percent mean nothing. Where
something was claimed beforehand, the claim stands below its table with what was measured; "NO" is a claim that missed.
"""


def cell(value: Any) -> Any:
    """A :class:`Spread` that went through JSON, as text."""
    return (
        str(Spread(**value)) if isinstance(value, dict) and set(value) == {"median", "low", "high", "count"} else value
    )


def is_table(value: Any) -> bool:
    """Rows, as :func:`measure.table` takes them."""
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def section(path: Path) -> str:
    """One result file as a section."""
    figures = json.loads(path.read_text())
    machine = figures.pop("machine")
    lists = {name: figures.pop(name) for name in list(figures) if is_table(figures[name]) and name != "errors"}
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
    for name, rows in lists.items():
        if name != "rows":
            lines += ["", f"{name[:1].upper()}{name[1:]}:"]
        lines += ["", table([{key: cell(value) for key, value in row.items()} for row in rows])]
    return "\n".join(lines)


def main() -> None:
    """Write RESULTS.md beside this file."""
    sections = [section(path) for path in sorted(RESULTS.glob("*.json"))]
    (Path(__file__).parent / "RESULTS.md").write_text("\n\n".join([INTRODUCTION.rstrip(), *sections]) + "\n")


if __name__ == "__main__":
    main()
