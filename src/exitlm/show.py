"""Depth in the terminal: text whose every token is coloured by the layer it left at, its legend, and tables of figures.

The colours are those of :mod:`exitlm.palette`. This file measures nothing.
"""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text


def token(text: str, layer: int, colours: Mapping[int, str]) -> Text:
    """One token in its layer's colour; the final head's tokens stay in the terminal's own colour."""
    return Text(text, style="" if layer == max(colours) else f"bold {colours[layer]}")


def depth_text(tokens: Iterable[tuple[str, int]], colours: Mapping[int, str]) -> Text:
    """A text, given as (token, exit layer) pairs, in the colours of its depth."""
    return Text().join(token(text, layer, colours) for text, layer in tokens)


def legend(colours: Mapping[int, str]) -> Text:
    """What each colour means, in one line."""
    final = max(colours)
    marks = [
        Text.assemble(("■", colours[layer]), f" layer {layer}" + (" (final head)" if layer == final else ""))
        for layer in sorted(colours)
    ]
    return Text("   ").join(marks)


def table(rows: Sequence[Mapping[str, str]]) -> Table:
    """The rows, all with the first one's keys, as a table: the first column to the left, figures to the right."""
    result = Table()
    for index, name in enumerate(rows[0]):
        result.add_column(name, justify="right" if index else "left")
    for row in rows:
        result.add_row(*row.values())
    return result


def answer(prompt: str, tokens: Iterable[tuple[str, int]], colours: Mapping[int, str]) -> Group:
    """A prompt and the coloured text that answers it."""
    return Group(Text(f"› {prompt}", style="dim"), depth_text(tokens, colours), Text())
