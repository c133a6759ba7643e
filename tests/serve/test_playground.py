"""The page as a file: it needs nothing else, allows no other script, and ships with the package."""

import base64
import hashlib
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import exitlm.serve.playground as playground
from exitlm.serve.playground import page, page_headers


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of those that hold code."""

    CDATA_CONTENT_ELEMENTS = ("script", "style")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.code: list[tuple[str, str]] = []
        self.feed(page().decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.code.append((self.cdata_elem, data))


def policy() -> dict[str, list[str]]:
    """The page's policy: the sources of each kind of content."""
    parts = page_headers()["Content-Security-Policy"].split("; ")
    return {name: sources for name, *sources in map(str.split, parts)}


def test_the_policy_allows_the_pages_own_code_and_no_other() -> None:
    code = Elements().code
    assert [name for name, _ in code] == ["style", "script"]
    for name, text in code:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy()[f"{name}-src"] == [f"'sha256-{digest}'"]
    assert policy()["default-src"] == ["'none'"]
    assert policy()["connect-src"] == ["'self'"]
    assert not any("unsafe" in source for sources in policy().values() for source in sources)


def test_the_page_needs_nothing_else() -> None:
    """No address but that of its icon, which it brings along, and no attribute that is code."""
    for tag, attributes in Elements().found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href", "action", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith(("data:image/svg+xml,", "#")), tag
    text = page().decode()
    assert set(re.findall(r"https?://[^\"'\s)]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "@import" not in text
    assert "url(" not in text


def test_text_never_becomes_markup() -> None:
    code = dict(Elements().code)["script"]
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
    ):
        assert sink not in code


def test_every_element_that_the_script_names_is_there() -> None:
    elements = Elements()
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = set(re.findall(r'\$\("([\w-]+)"\)', dict(elements.code)["script"]))
    assert len(named) > 20
    assert named <= set(ids)
    labelled = {attributes.get("for") for tag, attributes in elements.found if tag == "label"} - {None}
    described = {
        attributes[name] for _, attributes in elements.found for name in attributes if name.startswith("aria-d")
    }
    assert labelled | described <= set(ids)
    for tag, attributes in elements.found:  # a placeholder is no label
        if tag in ("select", "textarea") or (tag == "input" and attributes["type"] not in ("radio", "checkbox")):
            assert attributes["id"] in labelled


def test_the_page_ships_with_the_package() -> None:
    """Where the package's code goes, the page goes: it lies in it, and no setting of the build leaves it out."""
    file = Path(playground.__file__).with_name("index.html")
    assert file.read_bytes() == page()
    build = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]
    assert build["wheel"]["packages"] == ["src/exitlm"]
    assert not [pattern for pattern in build["wheel"]["exclude"] if "html" in pattern or "serve" in pattern]
    assert "src" in build["sdist"]["include"]
