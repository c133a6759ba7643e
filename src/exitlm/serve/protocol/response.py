"""The body of ``POST /v1/responses``. Its items become messages in :mod:`exitlm.serve.response_input`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from exitlm.serve.protocol.fields import MAX_TOP_LOGPROBS, Body, SamplingBody, StreamOptions

LOGPROBS = "message.output_text.logprobs"


class Part(BaseModel):
    """A part of a message or of what a function returned. Only text is read."""

    model_config = ConfigDict(strict=True)
    type: str
    text: str | None = None
    refusal: str | None = None


class Item(BaseModel):
    """One item of the input: a message where ``type`` is missing. Clients send earlier output back with whatever came
    with it: fields that are not listed here have no effect."""

    model_config = ConfigDict(strict=True)
    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class TextOptions(Body):
    """``format``: what the text must look like. ``verbosity`` has no effect."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponseStreamOptions(StreamOptions):
    """None of them has an effect: the last event always tells what the answer took."""

    reasoning_summary_delivery: str | None = None


class ResponseBody(SamplingBody):
    """A conversation to be continued, as items."""

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    n: Literal[1] | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: dict[str, str] | None = None  # the response repeats it
    # These need a server that keeps responses, or shortens what is too long.
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    prompt: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    # These change no text of this server.
    store: bool | None = None
    reasoning: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    client_metadata: dict[str, Any] | None = None
    access_programs: dict[str, Any] | None = None

    @property
    def logprobs(self) -> bool:
        """Whether the answer tells the log-probabilities of its tokens."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    @property
    def functions(self) -> list[dict[str, Any]]:
        """The tools that are functions. Those of other types are OpenAI's own, which models here can't call."""
        return [tool for tool in self.tools or () if tool.get("type", "function") == "function"]
