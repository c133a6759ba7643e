"""Depth as colour: one colour per exit layer, and text in HTML whose every token has its layer's colour.

Plain text in, plain text out. The terminal (:mod:`exitlm.show`) and the plots use the same colours.
"""

from collections.abc import Iterable, Mapping
from html import escape

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


def html(tokens: Iterable[tuple[str, int]], colours: Mapping[int, str]) -> str:
    """A text, given as (token, exit layer) pairs, in the colours of its depth, and below it what each colour means.

    The final head's tokens stay in the page's own colour. Every text is escaped.
    """
    final = max(colours)
    spans = [
        escape(text)
        if layer == final
        else f'<span style="color: {colours[layer]}; font-weight: bold" title="layer {layer}">{escape(text)}</span>'
        for text, layer in tokens
    ]
    marks = [
        f'<span style="color: {colours[layer]}">■</span> layer {layer}{" (final head)" if layer == final else ""}'
        for layer in sorted(colours)
    ]
    return (
        f'<div style="white-space: pre-wrap">{"".join(spans)}</div>'
        f'<div style="font-size: smaller">{"&emsp;".join(marks)}</div>'
    )
