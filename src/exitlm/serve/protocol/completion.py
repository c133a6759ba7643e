"""The body of ``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from exitlm.serve.protocol.fields import MAX_TOP_LOGPROBS, SamplingBody

DEFAULT_MAX_TOKENS = 16


class CompletionBody(SamplingBody):
    """Texts, or lists of token ids, to be continued. ``echo``: the answer begins with the prompt, and ``logprobs`` tell
    of its tokens too. ``response_format`` is not OpenAI's here."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    response_format: dict[str, Any] | None = None
    best_of: int | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more prompts; none where a list of them is empty."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]
