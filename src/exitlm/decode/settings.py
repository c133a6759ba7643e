"""The settings of a generation as the keywords of ``generate`` and ``stream``, for type checkers and editors.

The fields are those of :class:`~exitlm.decode.generation.GenerationConfig`, which holds their defaults, what they mean
and their checks; a test keeps the two alike.
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict


class GenerationSettings(TypedDict, total=False):
    """Any of the fields of :class:`~exitlm.decode.generation.GenerationConfig`."""

    max_new_tokens: int
    mode: str
    rule: str | None
    threshold: float | Mapping[int, float] | Sequence[float] | None
    exits: Sequence[int] | None
    patience: int
    exit_layer: int | None
    max_pending: int | None
    min_exit_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    draft: Sequence[str]
    max_draft: int | None
    adaptive: bool
