"""Many prompts in one call: what counts as many, and which settings each of them gets. Decodes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from exitlm.decode.generation import GenerationConfig
from exitlm.errors import UserError
from exitlm.values import unboxed, wrong

WHOLE = ("exits", "stop", "stop_token_ids", "draft", "logit_bias", "bad_words", "response_format", "prediction")
"""Settings that are lists or mappings by nature: they apply whole to each prompt."""


def is_many(prompt: Any) -> bool:
    """Whether this is a list of prompts: of texts, of lists of token ids or of lists of messages. An empty list is an
    empty prompt."""
    found = unboxed(prompt)
    if not isinstance(found, Sequence) or isinstance(found, str | bytes) or not found:
        return False
    first = unboxed(found[0])
    return isinstance(first, Sequence)


def configs_of(config: Any, settings: Mapping[str, Any], count: int | None) -> list[GenerationConfig]:
    """The configuration of each of ``count`` prompts (None: of one that is not in a list).

    ``config`` is one for all or a list of one for each; or else ``settings`` are fields, of which a scalar one may be a
    list of one value for each prompt.
    """
    if config is None:
        return _spread(settings, count)
    found = config if isinstance(config, list | tuple) and count is not None else [config] * (count or 1)
    for one in found:
        if not isinstance(one, GenerationConfig):
            raise wrong("config", one, "a GenerationConfig")
    if settings:
        raise UserError(
            f"settings are given twice, by config and by name ({', '.join(settings)}); change the config with "
            "dataclasses.replace, or leave it out"
        )
    _check_count("config", found, count or 1)
    return list(found)


def _spread(settings: Mapping[str, Any], count: int | None) -> list[GenerationConfig]:
    if count is None:
        return [GenerationConfig.of(settings)]
    scalars = {f.name for f in dataclasses.fields(GenerationConfig)} - set(WHOLE)
    found = {name: unboxed(value) for name, value in settings.items()}
    lists = {name: value for name, value in found.items() if name in scalars and isinstance(value, list | tuple)}
    for name, values in lists.items():
        _check_count(name, values, count)
    shared = {name: value for name, value in found.items() if name not in lists}
    if not lists:
        return [GenerationConfig.of(shared)] * count
    return [GenerationConfig.of({**shared, **{name: v[i] for name, v in lists.items()}}) for i in range(count)]


def _check_count(name: str, values: Sequence[Any], count: int) -> None:
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} values for {count} prompts; give one for each, or one for all")
