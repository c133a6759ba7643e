"""The bodies of ``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from pydantic import Field

from exitlm.serve.protocol.chat import Message
from exitlm.serve.protocol.fields import Body


class TokenizeBody(Body):
    """A text, or a conversation in the model's chat template. ``return_token_strs``: tell each token's text, too."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[int] = Field(max_length=1_000_000)
