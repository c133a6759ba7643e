"""How the page looks: contrast in both themes, a ramp that needs no hues, small screens, and pictures to look at."""

from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from tests.browser.chromium import Tab
from tests.browser.colours import DEFICIENCIES, contrast, distance, luminance, oklab, pixels, texts, wanted
from tests.browser.mock import Mock
from tests.browser.steps import TOKEN, ask, mode, tip

pytestmark = pytest.mark.browser
SCHEMES = ["light", "dark"]


@pytest.fixture
def opened(new_tab: Callable[..., Tab], mock: Mock) -> Callable[..., Tab]:
    """Opens the page on a screen of some width in a colour scheme."""

    def open_page(**how: object) -> Tab:
        tab = new_tab(**how)
        tab.goto(mock.url)
        tab.wait("document.querySelectorAll('#model option').length")
        return tab

    return open_page


def everything(tab: Tab) -> None:
    """Bring everything that can be seen onto the page: answers, a comparison, an error, numbers, a tip."""
    tab.js("for (const panel of document.querySelectorAll('details')) panel.open = true")
    ask(tab, "essay")
    mode(tab, "threshold")
    tab.click("#compare")
    ask(tab, "differ")
    ask(tab, "busy")
    tab.click("#numbers")
    tab.js(f"document.querySelectorAll('{TOKEN}')[8].focus()")
    tip(tab)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_texts_have_the_contrast_of_level_aa(opened: Callable[..., Tab], scheme: str) -> None:
    tab = opened(scheme=scheme)
    found = texts(tab)
    everything(tab)
    found += texts(tab)
    assert len(found) > 500
    assert {"::before", "::after", "::placeholder"} <= {
        "::" + text["what"].split("::")[1].split(":")[0] for text in found if "::" in text["what"]
    }
    weak = {
        text["what"]: round(ratio, 2)
        for text in found
        if (ratio := contrast(text["ink"], text["under"])) < wanted(text["size"], text["weight"])
    }
    assert not weak


@pytest.mark.parametrize("scheme", SCHEMES)
def test_edges_and_focus_can_be_seen(opened: Callable[..., Tab], scheme: str) -> None:
    """What is not text: edges of fields, the ring of focus, and marks of difference, 3 to 1 against what is beside."""
    tab = opened(scheme=scheme)
    tab.js(
        "document.body.append(...['edge', 'accent', 'differ', 'bad', 'page', 'surface', 'raised'].map((name) => {"
        " const probe = document.createElement('i'); probe.id = `probe-${name}`;"
        " probe.style.setProperty('color', `var(--${name})`); return probe; }))"
    )
    names = ["edge", "accent", "differ", "bad", "page", "surface", "raised"]
    colours = dict(
        zip(
            names,
            pixels(tab, [f"getComputedStyle(document.querySelector('#probe-{name}')).color" for name in names]),
            strict=True,
        )
    )
    for mark in ("edge", "accent", "differ", "bad"):
        for ground in ("page", "surface", "raised"):
            assert contrast(colours[mark], colours[ground]) >= 3, (mark, ground)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_ramp_of_depth_needs_no_hues(opened: Callable[..., Tab], scheme: str, deficiency: str) -> None:
    """Lightness runs one way from the shallowest exit to the final head, which is nearest to the page itself; any two
    layers can be told apart, whatever an eye lacks."""
    tab = opened(scheme=scheme)
    ask(tab, "essay")
    count = tab.js("document.querySelectorAll('.key').length")
    *ramp, ground = pixels(
        tab,
        [f"getComputedStyle(document.querySelectorAll('.key')[{i}]).backgroundColor" for i in range(count)]
        + ["getComputedStyle(document.querySelector('.answer')).backgroundColor"],
    )
    assert len(ramp) == 4
    lightness = [oklab(colour, deficiency)[0] for colour in [*ramp, ground]]
    steps = [(b - a) * (1 if scheme == "light" else -1) for a, b in pairwise(lightness)]
    assert min(steps[:-1]) > 0.03
    assert steps[-1] > 0
    assert all(distance(a, b, deficiency) > 0.045 for a, b in combinations(ramp, 2))
    assert sorted(map(luminance, ramp), reverse=scheme == "dark") == [luminance(colour) for colour in ramp]


def test_the_theme_follows_the_system_until_it_is_chosen(opened: Callable[..., Tab], mock: Mock) -> None:
    tab = opened(scheme="dark")
    dark = "getComputedStyle(document.body).backgroundColor"
    [system] = pixels(tab, [dark])
    assert luminance(system) < 0.05
    tab.click("#theme")
    assert tab.text("#theme") == "Theme: light"
    [light] = pixels(tab, [dark])
    assert luminance(light) > 0.8
    tab.goto("about:blank")
    tab.goto(mock.url)
    assert tab.text("#theme") == "Theme: light"
    tab.click("#theme")
    tab.prefer("light")
    assert pixels(tab, [dark]) == [system]
    tab.click("#theme")
    assert pixels(tab, [dark]) == [light]


@pytest.mark.parametrize("width", [360, 320, 800])
def test_a_small_screen_needs_no_sideways_scrolling(opened: Callable[..., Tab], width: int) -> None:
    tab = opened(width=width, height=740)
    everything(tab)
    assert tab.js("document.documentElement.scrollWidth") <= width
    boxes = tab.each(
        "body *",
        """(element) => { const { left, right, width } = element.getBoundingClientRect();
            return [element.outerHTML.slice(0, 80), left, right,
                element.checkVisibility() && width && !element.closest(".unseen, .skip")]; }""",
    )
    assert [what for what, left, right, seen in boxes if seen and (left < -0.5 or right > width + 0.5)] == []
    assert tab.js("document.querySelector('#send').getBoundingClientRect().bottom <= innerHeight")
    sizes = tab.each(
        "button, select, summary, .choice label",
        "(e) => [e.outerHTML.slice(0, 60), e.checkVisibility() ? e.getBoundingClientRect().height : 24]",
    )
    assert [what for what, height in sizes if height < 24] == []  # WCAG 2.2, target size


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pictures(opened: Callable[..., Tab], shots: Path, scheme: str) -> None:
    """What README shows and what a person looks at; the test fails where there is nothing to see."""
    tab = opened(scheme=scheme, height=820)
    ask(tab, "essay: what is an early exit?")
    tab.wait(
        "document.querySelectorAll('#live-line').length && document.querySelector('#live-rate').textContent !== '–'"
    )
    tab.hover(f"{TOKEN}[data-layer='9'] .ink", 3)
    tip(tab)
    tab.shot(shots / f"chat-{scheme}.png")
    tab.click("#clear")
    mode(tab, "threshold")
    tab.click("#compare")
    ask(tab, "differ please")
    tab.shot(shots / f"compare-{scheme}.png")
    narrow = opened(scheme=scheme, width=360, height=740)
    ask(narrow, "essay: what is an early exit?")
    narrow.shot(shots / f"narrow-{scheme}.png")
    assert min((shots / f"{name}-{scheme}.png").stat().st_size for name in ("chat", "compare", "narrow")) > 20_000
