"""The formats that models write tool calls in, and which of them a model writes, by its chat template.

A format is data: how calls are laid out, what parser reads them, and how a template wants the history.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exitlm.decode.sampling.grammar import ResponseFormat
from exitlm.serve.tools.deltas import random_call_id
from exitlm.serve.tools.hermes import HermesParser
from exitlm.serve.tools.layout import Layout
from exitlm.serve.tools.llama import LlamaParser
from exitlm.serve.tools.mistral import MistralParser
from exitlm.serve.tools.offer import Tool
from exitlm.serve.tools.parser import Parser


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write calls.

    ``markers``: the texts that a tokenizer may hold as special tokens (see :func:`marker_ids`). ``takes_tools``: the
    model's own template shows tools and calls; without, :func:`~exitlm.serve.tools.rendering.render` describes them
    in a message of the system. ``single_calls``: the template refuses several calls in a message of the history.
    ``short_ids``: the template wants ids of 9 letters and digits.
    """

    name: str
    layout: Layout
    reader: type[Parser]
    takes_tools: bool = True
    single_calls: bool = False
    short_ids: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that open, cut and close calls."""
        return self.reader.markers

    def parser(
        self, new_id: Callable[[], str] = random_call_id, *, names: Collection[str] = (), parallel: bool = True
    ) -> Parser:
        """A parser of one answer.

        ``new_id`` makes the ids of its calls. ``names``: the tools that the request offers; a format without markers
        needs them to tell a call from an answer that is JSON (Llama's), the others take any name. ``parallel``: False
        ends the answer with its first call (:attr:`Parser.finished`).
        """
        return self.reader(new_id, names=names, parallel=parallel)

    def grammar(self, tools: Sequence[Tool], name: str | None = None, parallel: bool = True) -> ResponseFormat:
        """What a request's ``response_format`` becomes when a call is forced: of the tool ``name``, or of any.

        ``parallel``: False for exactly one call. :meth:`parser` reads all that this accepts as calls without text.
        """
        called = [tool for tool in tools if name in (None, tool.name)]
        return self.layout.grammar(called, parallel=parallel, special=self.markers)

    def write(self, calls: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
        """The text of ``calls``, each a name and its arguments, as the grammar lays them out."""
        return self.layout.write(calls)


HERMES = Format(
    name="hermes",
    layout=Layout(
        before_name='<tool_call>\n{"name": ',
        before_arguments=', "arguments": ',
        after="}\n</tool_call>",
        separator="\n",
    ),
    reader=HermesParser,
)
# Hermes's calls for a model whose template knows of none, or writes them in a format that is not read here.
DESCRIBED = Format(name="described", layout=HERMES.layout, reader=HermesParser, takes_tools=False)
LLAMA = Format(
    name="llama",
    layout=Layout(before_name='{"name": ', before_arguments=', "parameters": ', after="}", separator="; "),
    reader=LlamaParser,
    single_calls=True,
)
MISTRAL = Format(
    name="mistral",
    layout=Layout(before_name="[TOOL_CALLS]", quoted=False, before_arguments="[ARGS]", separator=""),
    reader=MistralParser,
    short_ids=True,
)
MISTRAL_LIST = Format(
    name="mistral_list",
    layout=Layout(
        opening="[TOOL_CALLS][",
        before_name='{"name": ',
        before_arguments=', "arguments": ',
        after="}",
        separator=", ",
        closing="]",
    ),
    reader=MistralParser,
    short_ids=True,
)
FORMATS = (HERMES, DESCRIBED, LLAMA, MISTRAL, MISTRAL_LIST)

# Formats that open as Hermes's do and go on otherwise: Qwen3-Coder's and GLM's.
_NOT_HERMES = ("<function=", "<arg_key>")


def detect(template: str | None) -> Format:
    """The format of a model with this chat template; :data:`DESCRIBED` where the template shows none that is known."""
    said = template or ""
    if not _reads_tools(said):
        return DESCRIBED
    if "[TOOL_CALLS]" in said:
        return MISTRAL if "[ARGS]" in said else MISTRAL_LIST
    if "<tool_call>" in said:
        return DESCRIBED if any(mark in said for mark in _NOT_HERMES) else HERMES
    if "<|python_tag|>" in said or ("<|start_header_id|>" in said and '"parameters"' in said):
        return LLAMA
    return DESCRIBED


def _reads_tools(template: str) -> bool:
    """Whether a template's program, and not only its text, speaks of ``tools``."""
    code = "\n".join(re.findall(r"\{[%{](.*?)[%}]\}", template, re.DOTALL))
    names = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "", code, flags=re.DOTALL)
    return re.search(r"(?<![.\w])tools\b", names) is not None


def marker_ids(format: Format, tokenizer: Any) -> dict[int, str]:
    """The markers of ``format`` that are special tokens of a tokenizer of transformers, by id.

    Decoding skips special tokens, so a parser's text is, for each token, ``token.text + marker_ids.get(token.id, "")``.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {index: str(token) for index, token in added if token.special and str(token) in format.markers}
