"""Depth as colour: one colour per layer, and HTML that shows any text as it is."""

import html as escapes
import re

from hypothesis import given
from hypothesis import strategies as st

from exitlm.palette import html, palette


def test_the_palette_has_one_colour_per_layer() -> None:
    colours = palette([8, 15, 22, 30], 30)
    assert list(colours) == [8, 15, 22, 30]
    assert len(set(colours.values())) == 4
    assert palette([], 4).keys() == {4}
    assert len(set(palette(range(1, 8), 8).values())) == 8


@given(st.lists(st.tuples(st.text(), st.sampled_from([2, 5, 9]))))
def test_html_is_the_text_and_nothing_else(tokens: list[tuple[str, int]]) -> None:
    colours = palette([2, 5], 9)
    body, legend = re.fullmatch(r"<div[^>]*>(.*)</div>(<div.*</div>)", html(tokens, colours), re.DOTALL).groups()  # type: ignore[union-attr]
    assert escapes.unescape(re.sub(r"</?span[^>]*>", "", body)) == "".join(text for text, _ in tokens)
    assert body.count("<") == 2 * sum(layer != 9 for _, layer in tokens)
    assert body.count(colours[2]) >= sum(layer == 2 for _, layer in tokens)
    assert re.findall(r"layer \d+", legend) == ["layer 2", "layer 5", "layer 9"]


def test_html_escapes_markup() -> None:
    found = html([("<script>", 2), ("\"&'", 9)], palette([2], 9))
    assert "<script" not in found
    assert "&lt;script&gt;</span>&quot;&amp;&#x27;" in found
