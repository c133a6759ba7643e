"""From ids to calls: decoding skips special tokens, and what a parser is fed has the markers among them all the same."""

import pytest

from exitlm.serve.tools.deltas import collect
from exitlm.serve.tools.formats import HERMES
from tests.serve.tools.answers import deltas_of
from tests.serve.tools.scripts import SCRIPTS, Script, pieces
from tests.serve.tools.templates import CHATML


@pytest.mark.parametrize("script", SCRIPTS, ids=[f"{one.format.name}-{one.text[:60]}" for one in SCRIPTS])
def test_ids_give_the_answer_of_their_text(script: Script) -> None:
    assert collect(deltas_of(script.format, pieces(script.format, script.tokenizer, script.ids))) == script.answer


def test_scripts_cut_everywhere() -> None:
    """A byte a token, but for markers; at least one script cuts within a character, and one within a marker."""
    long = [one for one in SCRIPTS if len(one.ids) > len(one.text)]
    assert any("ü" in one.text for one in long)
    chatml = next(one for one in SCRIPTS if one.template == CHATML and one.text.startswith("<tool_call>"))
    assert len(set(chatml.ids)) > 5
    assert {one.format.name for one in SCRIPTS} == {"hermes", "described", "llama", "mistral", "mistral_list"}
    assert chatml.format is not HERMES
