"""Settings that a program does not read: each is named to the user and set back, so that a run's file holds what acted.

A key that would change nothing must not look as if it had, nor keep a run from being resumed. What a program can't work
with is refused elsewhere (``run.py``, ``tune.py``, ``setup.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import fields, replace

from exitlm.train.corpus import self_tokens
from exitlm.train.exits import exit_configs
from exitlm.train.run import RunConfig
from exitlm.train.sections import ModelSection, ParallelSection

_OF_ANY_BASE = ("base", "dtype", "device")
_LAYOUT = ("data", "tensor", "pipeline")
_OF_SELF_TEXT = ("prompts", "self_temperature", "self_batch", "self_dtype")
_OF_CACHE = ("hidden_cache", "hidden_cache_gib")
_OF_SAMPLING = ("candidate_tokens", "candidate_share")


def set_back(config: RunConfig, unread: dict[str, str], defaults: RunConfig) -> RunConfig:
    """``config`` with the keys of ``unread`` (key: why) as in ``defaults``; one that differs is warned of by name."""
    before, plain = config.flat(), defaults.flat()
    for key, why in unread.items():
        if before[key] != plain[key]:
            warnings.warn(f"{key} has no effect here: {why}", stacklevel=3)
            section, name = key.split(".")
            field = name if hasattr(getattr(config, section), name) else f"{name}_"
            value = getattr(getattr(defaults, section), field)
            config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config


def unread_by_training(config: RunConfig) -> dict[str, str]:
    """The keys that runs over processes, and those with all parameters, do not read, and why."""
    found = {f"data.{name}": "the data are files, not self:N" for name in _OF_SELF_TEXT}
    found |= {f"train.{name}": "hidden states are kept by exitlm tune on one process" for name in _OF_CACHE}
    found |= {f"objective.{name}": "only exitlm tune on one process samples the vocabulary" for name in _OF_SAMPLING}
    if config.train.parameters == "exits":
        found["objective.final"] = "the final head is not trained"
        found["objective.layer_dropout"] = "the layers are not trained"
        found["train.recompute"] = "nothing goes back through the layers of a frozen model"
    return found


def unread_by_tuning(config: RunConfig, vocab_size: int) -> dict[str, str]:
    """The keys that tuning exits on one process does not read, and why. The exits' layers are known by now."""
    o = config.objective
    exits = exit_configs(config)
    found: dict[str, str] = {}

    def add(section: str, names: Iterable[str], why: str) -> None:
        found.update({f"{section}.{name}": why for name in names})

    add(
        "model", [f.name for f in fields(ModelSection) if f.name not in _OF_ANY_BASE], "the base has a shape of its own"
    )
    add("parallel", [f.name for f in fields(ParallelSection) if f.name not in _LAYOUT], "there is one process")
    add("exits", ["place"], "one process has no stages to place exits on")
    if all(x.output != "low_rank" for x in exits):
        add("exits", ["rank"], "no exit has exits.output = 'low_rank'")
    if all(x.kind != "lens" for x in exits):
        add("exits", ["branch"], "no exit has exits.kind = 'lens'")
    add("objective", ["final"], "the final head is not trained")
    add("objective", ["layer_dropout"], "the layers are not trained")
    add("objective", ["exit_forward"], "an exit's logits are always computed where its loss is")
    if not o.warmup_steps:
        add("objective", ["weight_init", "warmup"], "objective.warmup_steps is 0")
    if not o.confidence_weighted:
        add("objective", ["temperature"], "objective.confidence_weighted is off")
    if not o.distill:
        add("objective", ["distill_temperature"], "objective.distill is 0")
    if not any(x.gate for x in exits):
        add("objective", ["gate"], "no exit has a gate (exits.gate)")
    if not o.candidate_loss:
        add("objective", _OF_SAMPLING, "objective.candidate_loss is off")
    elif all(x.candidates for x in exits):
        add("objective", _OF_SAMPLING, "every exit has candidates (exits.candidates), which are never sampled")
    elif vocab_size <= 2 * o.candidate_tokens:
        add("objective", ["candidate_share"], f"a vocabulary of {vocab_size} tokens is not sampled")
    add("data", ["across_documents"], "every document is a sequence of its own in exitlm tune on one process")
    if self_tokens(config) is None:
        add("data", _OF_SELF_TEXT, "the data are files, not self:N")
    else:
        add("data", ["validation_files"], "self text is validated by answers to held-out prompts")
        add("data", ["weights"], "self text is one source")
    add("train", ["recompute"], "nothing goes back through the layers of a frozen model")
    add("train", ["compile"], "exitlm tune on one process runs the model as it is")
    add("train", ["spike", "patience"], "exitlm tune on one process skips no step, and stops at a gradient that is not "
        "finite")  # fmt: skip
    add("checkpoint", ["async"], "checkpoints of exits are small, and written at once")
    if config.train.hidden_cache == "none":
        add("train", ["hidden_cache_gib"], "train.hidden_cache is 'none'")
    if config.train.schedule == "constant":
        add("train", ["min_lr"], "train.schedule is 'constant'")
    if o.rotate_exits == 1:
        add("objective", ["rotate_exits"], "every exit is trained in every step, as with 0")
    return found
