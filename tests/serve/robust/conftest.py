"""Servers that the tests of robustness torment."""

from collections.abc import Callable

import pytest

import exitlm


@pytest.fixture(scope="package")
def model(make_model: Callable[..., exitlm.LLM]) -> exitlm.LLM:
    """A model that decodes eight texts at once."""
    return make_model("float32", quant="none", engine={"max_sequences": 8})
