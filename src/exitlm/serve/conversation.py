"""From a conversation to token ids: messages of OpenAI's shape in the model's chat template."""

from __future__ import annotations

import asyncio
from typing import Any

from exitlm.serve.errors import ApiError
from exitlm.serve.protocol.chat import ChatBody, Message
from exitlm.serve.service import Service
from exitlm.weights.checkpoint import chat_text

_LONG = 8192  # characters of all messages: from here on they are encoded in another thread


async def prompt_of(service: Service, body: ChatBody) -> list[int]:
    """The token ids of a conversation, up to where the answer begins.

    Raises:
        ApiError, UserError: no chat template, messages that it refuses, or content that is no text.
    """
    messages = [template_message(message, number) for number, message in enumerate(body.messages)]
    if sum(len(str(message["content"])) for message in messages) < _LONG:
        return encoded(service, messages)
    return await asyncio.to_thread(encoded, service, messages)


def encoded(service: Service, messages: list[dict[str, Any]]) -> list[int]:
    """The token ids of messages as templates take them, up to where the answer begins."""
    tokenizer = service.tokenizer
    if not tokenizer.chat_template:
        raise ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
    text = chat_text(tokenizer, messages, answer=True, remedy="give messages that it takes, or use /v1/completions")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def template_message(message: Message, number: int) -> dict[str, Any]:
    """A message as chat templates take it: its role and its text."""
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": text_of(message, number)}


def text_of(message: Message, number: int) -> str:
    """The text of a message; parts of it are joined."""
    if message.content is None or isinstance(message.content, str):
        return checked(message.content or "", f"messages.{number}.content")
    found = []
    for at, part in enumerate(message.content):
        name = f"messages.{number}.content.{at}"
        if part.type not in ("text", "refusal"):
            raise ApiError(400, f"{name} is of type '{part.type}', but this model reads text only", param=name)
        found.append(checked((part.text if part.type == "text" else part.refusal) or "", name))
    return "".join(found)


def checked(text: str, name: str) -> str:
    """A text that UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{name} is not valid UTF-8 text; leave out lone surrogates", param=name) from None
    return text
