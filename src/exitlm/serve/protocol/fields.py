"""Fields that several kinds of requests share: sampling, streaming, and what exitlm adds.

A field that no server of this kind could honour is refused by name; one that changes no text (who asks, how it is
billed) is taken and has no effect. An unknown field is refused with the nearest known one (see
:mod:`exitlm.serve.protocol.refusals`). JSON types are not converted: ``"1"`` is no number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_STOPS, MAX_TOP_LOGPROBS = 16, 20
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class Body(BaseModel):
    """The body of a request, or an object in it."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    """``include_usage``: a last chunk without choices tells what the answer took. ``include_obfuscation`` has no
    effect."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ExitFields(Body):
    """How deep each token goes, field ``exitlm`` of a request: settings of
    :class:`~exitlm.decode.generation.GenerationConfig` under the same names. ``trace``: the answer says of each token
    where it left, how sure the exits were, and where it came from."""

    mode: Literal["full", "threshold", "lossless"] | None = None
    threshold: float | dict[str, float] | None = None
    rule: str | None = None
    exits: list[int] | None = None
    patience: int | None = None
    exit_layer: int | None = None
    min_exit_tokens: int | None = None
    max_pending: int | None = None
    draft: list[str] | None = None
    max_draft: int | None = None
    adaptive: bool | None = None
    trace: bool = False


class SamplingBody(Body):
    """Which model, and how tokens are chosen. ``top_k``, ``min_p``, ``repetition_penalty``, ``stop_token_ids``,
    ``bad_words`` and ``ignore_eos`` are not OpenAI's, but widely known."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(None, gt=0.0)
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    logit_bias: dict[str, float] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool | None = None
    seed: Seed | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    exitlm: ExitFields | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None

    def sampling(self) -> dict[str, Any]:
        """Settings of a generation that the request names."""
        names = (
            "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "logit_bias", "stop", "stop_token_ids", "bad_words", "ignore_eos", "seed", "n",
        )  # fmt: skip
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k is not None:
            found["top_k"] = max(0, self.top_k)  # -1 is off, to some clients
        return found

    def exit_settings(self) -> dict[str, Any]:
        """Settings of a generation that field ``exitlm`` names."""
        if self.exitlm is None:
            return {}
        found = self.exitlm.model_dump(exclude_none=True, exclude={"trace"})
        if isinstance(found.get("threshold"), dict):  # JSON has no numbers as keys
            found["threshold"] = {int(k) if k.isdecimal() else k: v for k, v in found["threshold"].items()}
        return found

    @property
    def trace(self) -> bool:
        """Whether the answer tells where each token left."""
        return self.exitlm is not None and self.exitlm.trace

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)
