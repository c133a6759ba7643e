"""Answers as the ids that a model would write, for a runner that emits scripted ids.

A script has its own tokenizer (one token a byte, and the family's markers as that family has them), so every byte is a
cut: characters, strings and, where they are no tokens, markers come in pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exitlm.decode.text import TextStream
from exitlm.serve.tools.deltas import Answer
from exitlm.serve.tools.formats import HERMES, LLAMA, MISTRAL, MISTRAL_LIST, Format, detect, marker_ids
from tests.serve.tools.templates import CHATML, HERMES_2, LLAMA_3, MISTRAL_3, MISTRAL_13, QWEN, tokenizer_of
from tests.serve.tools.test_parsers import CASES


@dataclass(frozen=True)
class Script:
    """What a model of the chat template ``template`` writes, and what a client should get. The tools are
    ``tests.serve.tools.answers.TOOLS``; ids of calls are ``call_0``, ``call_1``, ..."""

    template: str
    text: str
    answer: Answer

    @property
    def format(self) -> Format:
        """That of the template."""
        return detect(self.template)

    @property
    def tokenizer(self) -> Any:
        """One whose ids are below 300."""
        return tokenizer_of(self.template)

    @property
    def ids(self) -> list[int]:
        """The ids of the text, and the one that ends it."""
        return [*self.tokenizer(self.text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]


_TEMPLATES = {
    HERMES: (QWEN, HERMES_2, CHATML), LLAMA: (LLAMA_3,), MISTRAL: (MISTRAL_13,), MISTRAL_LIST: (MISTRAL_3,),
}  # fmt: skip
SCRIPTS = [Script(template, text, answer) for format, text, answer in CASES for template in _TEMPLATES[format]]


def pieces(format: Format, tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What a parser is fed for each of ``ids``, and at the end: the decoded text, with markers that decoding skips."""
    stream, spelled = TextStream(tokenizer), marker_ids(format, tokenizer)
    return [*(stream.push(token) + spelled.get(token, "") for token in ids), stream.flush()]
