"""What the tests of the page share: a browser, a tab of its own for each test, and the mock server."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser.chromium import Chromium, Tab, find
from tests.browser.mock import Mock


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    binary = find()
    if binary is None:
        pytest.skip("needs Chromium; install Debian's package chromium, or name one in EXITLM_CHROMIUM")
    browser = Chromium(binary, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def new_tab(chromium: Chromium) -> Iterator[Callable[..., Tab]]:
    """Opens tabs; none of them may have had an error of the script or of the page's policy."""
    tabs: list[Tab] = []

    def new(**how: object) -> Tab:
        tabs.append(Tab(chromium, **how))  # type: ignore[arg-type]
        return tabs[-1]

    yield new
    complaints = [complaint for tab in tabs for complaint in tab.complaints]
    for tab in tabs:
        tab.close()
    assert not complaints


@pytest.fixture
def mock() -> Iterator[Mock]:
    server = Mock()
    yield server
    server.close()


@pytest.fixture
def tab(new_tab: Callable[..., Tab], mock: Mock) -> Tab:
    """The page, loaded, with its models."""
    found = new_tab()
    found.goto(mock.url)
    found.wait("document.querySelectorAll('#model option').length")
    return found


@pytest.fixture(scope="session")
def shots() -> Path:
    """Where pictures of the page go."""
    return Path("runs/playground")
