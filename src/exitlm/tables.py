"""Numbers and tables for a terminal."""

from collections.abc import Sequence


def scaled(number: float) -> str:
    """Three digits and the unit's prefix."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    while abs(number) >= 999.5 and len(prefixes) > 1:
        number, prefixes = number / 1000, prefixes[1:]
    return f"{number:.3g} {prefixes[0]}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, with the cells of a column below each other, at their right ends."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
