"""A cache directory for every test, and a tiny checkpoint and a text for all of them."""

from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where shards and self text go."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EXITLM_CACHE", str(place))
    return place


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers with a byte tokenizer and a chat template."""
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2,500 characters of text."""
    lines = [f"Line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(50)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(lines))
    return path
