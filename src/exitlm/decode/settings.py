"""The settings of a generation as the keywords of ``generate`` and ``stream``, for type checkers and editors.

The fields are those of :class:`~exitlm.decode.generation.GenerationConfig`, which holds their defaults, what they mean
and their checks; a test keeps the two alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from exitlm.decode.sampling.sampler import LogitsProcessor


class GenerationSettings(TypedDict, total=False):
    """Any of the fields of :class:`~exitlm.decode.generation.GenerationConfig`; with a list of prompts, a scalar one
    may be a list of one value for each."""

    max_new_tokens: int | list[int]
    mode: str | list[str]
    rule: str | list[str] | list[str | None] | None
    threshold: float | Mapping[int, float] | list[float] | list[float | Mapping[int, float] | None] | None
    exits: Sequence[int] | None
    adapter: str | list[str] | list[str | None] | None
    patience: int | list[int]
    exit_layer: int | list[int] | list[int | None] | None
    max_pending: int | list[int] | list[int | None] | None
    min_exit_tokens: int | list[int]
    temperature: float | list[float]
    top_k: int | list[int]
    top_p: float | list[float]
    min_p: float | list[float]
    repetition_penalty: float | list[float]
    presence_penalty: float | list[float]
    frequency_penalty: float | list[float]
    logit_bias: Mapping[int, float]
    bad_words: Sequence[str | Sequence[int]]
    logits_processor: LogitsProcessor | list[LogitsProcessor] | list[LogitsProcessor | None] | None
    response_format: Any
    seed: int | list[int] | list[int | None] | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool | list[bool]
    logprobs: int | list[int]
    prompt_logprobs: int | list[int] | list[int | None] | None
    n: int | list[int]
    draft: Sequence[str]
    max_draft: int | list[int] | list[int | None] | None
    prediction: str | Sequence[int] | None
    adaptive: bool | list[bool]
