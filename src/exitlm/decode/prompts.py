"""What one prompt may be, and its token ids: a text, a list of token ids, or a list of chat messages.

A list of prompts is not a prompt; templates and tokenizers are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exitlm.errors import UserError, nearest, short
from exitlm.values import elements, wholes, wrong
from exitlm.weights.checkpoint import chat_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
_EXPECTED = "a text, a list of token ids (whole numbers) or a list of chat messages"
_FIELDS = ("role", "content")


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None, *, chat: bool, why_no_text: str) -> list[int]:
    """The token ids of a prompt. ``chat`` puts a text into the tokenizer's chat template, as one message of the user;
    messages (``{"role": "user", "content": "Hi"}``) always go there, and the answer of the assistant follows.

    Raises:
        UserError: not a prompt; a text without a tokenizer (``why_no_text`` says why there is none); messages or
            ``chat`` without a template, or with one that refuses them; ``chat`` with token ids; an empty text.
    """
    if isinstance(prompt, str):
        _check_text(prompt, "the prompt")
        messages = [{"role": "user", "content": prompt}] if chat else None
    else:
        items = elements(prompt, "the prompt", _EXPECTED)
        if not any(isinstance(item, Mapping) for item in items):
            if chat:
                raise UserError("chat needs a prompt that is a text or a list of messages, not token ids")
            return wholes(items, "the prompt", _EXPECTED)
        messages = messages_of(items)
    if tokenizer is None:
        raise UserError(f"the prompt must be a list of token ids: {why_no_text}")
    if prompt == "":
        raise UserError("the prompt is empty; give at least one character")
    if messages is None:
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    remedy = "leave chat off" if isinstance(prompt, str) else "give the prompt as a text, or messages that it takes"
    if not tokenizer.chat_template:
        raise UserError(f"this model's tokenizer has no chat template; {remedy.partition(', or')[0]}")
    text = chat_text(tokenizer, messages, answer=True, remedy=remedy)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def messages_of(items: Sequence[Any]) -> list[dict[str, str]]:
    """Chat messages as a template takes them: ``role`` and ``content``, both texts.

    Raises:
        UserError: the message, by its number from 1, and what is wrong with it.
    """
    messages = []
    for number, item in enumerate(items, 1):
        name = f"message {number}"
        if not isinstance(item, Mapping):
            raise wrong(name, item, "a mapping with role and content")
        for key in item:
            if key not in _FIELDS:
                raise UserError(f"{name} has an unknown field {short(key)}{nearest(str(key), _FIELDS)}")
        for key in _FIELDS:
            if key not in item:
                raise UserError(f"{name} has no {key}; write {{'role': 'user', 'content': TEXT}}")
            if not isinstance(item[key], str):
                raise wrong(f"{key} of {name}", item[key], "a text")
            _check_text(item[key], f"{key} of {name}")
        messages.append({key: item[key] for key in _FIELDS})
    return messages


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} is not valid UTF-8 text; give it in that encoding") from None
