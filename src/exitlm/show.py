"""Depth in the terminal: text whose every token is coloured by the layer it left at, its legend, and tables of figures.

The palette is the one the plots use too. This file measures nothing.
"""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

_RAMP = ("#00a878", "#2a8ff4", "#a45ee5")  # shallow, middle, deep: readable on light and dark, and for the colour-blind
_FINAL = "#8a8f98"


def palette(layers: Iterable[int], final: int) -> dict[int, str]:
    """A colour (``#rrggbb``) for each exit layer from green (shallow) to violet (deep), and grey for the final head."""
    exits = sorted(set(layers) - {final})
    colours = {}
    for rank, layer in enumerate(exits):
        place = rank / max(len(exits) - 1, 1) * (len(_RAMP) - 1)
        low = min(int(place), len(_RAMP) - 2)
        colours[layer] = _blend(_RAMP[low], _RAMP[low + 1], place - low)
    return {**colours, final: _FINAL}


def _blend(first: str, second: str, share: float) -> str:
    channels = [(int(first[i : i + 2], 16), int(second[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in channels)


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
