"""From ids to calls: decoding skips special tokens, and yet what a parser is fed has the markers among them."""

import pytest

from exitlm.serve.tools.deltas import collect
from tests.serve.tools.answers import deltas_of
from tests.serve.tools.scripts import SCRIPTS, Script, pieces
from tests.serve.tools.templates import CHATML


@pytest.mark.parametrize("script", SCRIPTS, ids=[f"{one.format.name}-{one.text[:60]}" for one in SCRIPTS])
def test_ids_give_the_answer_of_their_text(script: Script) -> None:
    assert collect(deltas_of(script.format, pieces(script.format, script.tokenizer, script.ids))) == script.answer


def test_scripts_cut_characters_and_markers() -> None:
    """Every family is there, and where markers are no tokens they come a letter at a time."""
    assert {one.format.name for one in SCRIPTS} == {"hermes", "described", "llama", "mistral", "mistral_list"}
    for one in SCRIPTS:
        shown = pieces(one.format, one.tokenizer, one.ids)
        assert "".join(shown) == one.text
        assert ("<tool_call>" in shown) <= (one.template != CHATML)
    assert any("<tool_call>" in pieces(one.format, one.tokenizer, one.ids) for one in SCRIPTS)
    assert any("[ARGS]" in pieces(one.format, one.tokenizer, one.ids) for one in SCRIPTS)
    assert any("ü" in one.text for one in SCRIPTS)
