"""Which format a model writes, by its template, and which of its markers decoding would skip."""

from types import SimpleNamespace
from typing import Any

import pytest

from exitlm.serve.tools.formats import DESCRIBED, HERMES, LLAMA, MISTRAL, MISTRAL_LIST, Format, detect, marker_ids
from exitlm.serve.tools.rendering import template_of
from tests.serve.tools.templates import CHATML, HERMES_2, LLAMA_3, MISTRAL_3, MISTRAL_13, QWEN, tokenizer_of


@pytest.mark.parametrize(
    ("template", "format"),
    [
        (QWEN, HERMES),
        (HERMES_2, HERMES),
        (LLAMA_3, LLAMA),
        (MISTRAL_3, MISTRAL_LIST),
        (MISTRAL_13, MISTRAL),
        (CHATML, DESCRIBED),
        (None, DESCRIBED),
        ("", DESCRIBED),
        ("{{ tools }}<tool_call>\n<function=name>", DESCRIBED),
        ("{{ tools }}<tool_call>name<arg_key>", DESCRIBED),
        ("{{ tools }}<TOOLCALL>[]</TOOLCALL>", DESCRIBED),
        ("{{ tools }}<|python_tag|>", LLAMA),
        ("<tool_call> [TOOL_CALLS] <|python_tag|>", DESCRIBED),
        ("<tools></tools><tool_call>{{ 'no \\' tools' + \"or tools\" }}{{ message.tools }}{{ xml_tools }}", DESCRIBED),
        ("<tool_call>{%- if 'a' != \"}\" and tools -%}{% endif %}", HERMES),
    ],
)
def test_detection(template: str | None, format: Format) -> None:
    assert detect(template) is format


def test_the_template_with_tools_counts_where_there_are_several() -> None:
    tokenizer = tokenizer_of(QWEN)
    assert template_of(tokenizer) == QWEN

    several: list[tuple[Any, str | None]] = [
        ({"default": CHATML, "tool_use": HERMES_2}, HERMES_2),
        ({"default": CHATML}, CHATML),
        ({"other": CHATML}, None),
        (None, None),
    ]
    for templates, chosen in several:
        assert template_of(SimpleNamespace(chat_template=templates)) == chosen


@pytest.mark.parametrize(
    ("template", "skipped"),
    [(QWEN, set()), (LLAMA_3, {"<|python_tag|>"}), (MISTRAL_13, {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"})],
)
def test_markers_that_decoding_skips(template: str, skipped: set[str]) -> None:
    """Together with what decoding shows, they are the whole text."""
    tokenizer, format = tokenizer_of(template), detect(template)
    spelled = marker_ids(format, tokenizer)
    assert set(spelled.values()) == skipped
    for marker in format.markers:
        ids = tokenizer(f"a{marker}b", add_special_tokens=False)["input_ids"]
        shown = [tokenizer.decode([index], skip_special_tokens=True) + spelled.get(index, "") for index in ids]
        assert "".join(shown) == f"a{marker}b"
