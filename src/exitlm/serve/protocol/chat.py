"""The body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from exitlm.serve.protocol.fields import MAX_TOP_LOGPROBS, Body, SamplingBody


class TextPart(BaseModel):
    """A part of a message's content. Only text is read; ``refusal`` is text of an earlier answer."""

    model_config = ConfigDict(strict=True)
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(BaseModel):
    """What an earlier answer called. ``arguments`` is JSON text."""

    model_config = ConfigDict(strict=True)
    name: str
    arguments: str = ""


class ToolCall(BaseModel):
    """A call of a function in an earlier answer."""

    model_config = ConfigDict(strict=True)
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """A message of a conversation. Clients send earlier answers back with whatever came with them: fields that are not
    listed here have no effect."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class PredictedText(Body):
    """A part of a prediction."""

    type: Literal["text"]
    text: str


class Prediction(Body):
    """What much of the answer is expected to be, such as the file that is edited: a source of drafts."""

    type: Literal["content"]
    content: str | list[PredictedText]

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(SamplingBody):
    """A conversation to be continued."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = None
    prediction: Prediction | None = None
    tools: list[dict[str, Any]] | None = None  # read by exitlm.serve.tools.offer, as tool_choice is
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    # These change no text of this server.
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[Literal["text"]] | None = None
