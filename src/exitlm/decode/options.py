"""Settings of an engine: what it may hold and how it shares its time. Plain data, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exitlm.errors import UserError
from exitlm.values import flag, number, settings_of, whole, wholes

MAX_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine may hold and how it shares its time.

    ``kv_bytes``: memory for keys and values, touched as it is used (None: room for one whole context, and beyond that
    for 16 texts of 2,048 tokens if they fit in a quarter of the memory; of a GPU, at most three quarters of what is
    free). ``block_size``: positions of a block, the unit in which that memory is given out and shared. ``max_rows``:
    rows of one pass. ``max_sequences``: texts decoded together, at most ``max_rows``; others wait. ``prefill_chunk``:
    rows of prompts in one pass. ``prefix_sharing``: texts that begin alike share the keys and values of their
    beginning. ``max_wait``: how long a row that must go deep waits for shallow passes of others, as a share of a full
    pass. ``threads``: processor threads of a pass (None: one for each core); a process has one number.
    ``activation_bits`` (15 or 8): what activations are rounded to where they meet weights on a grid, by the native
    kernels. ``kv_dtype`` (float16 or float32): keys and values of the native kernels.

    Many processes (docs/serving.md): ``pipeline``: stages, each with a run of layers in a process of its own, and
    ``tensor``: processes that share each stage's matrices; ``kv_bytes`` is for all of them. ``layers_per_stage`` (None:
    by what layers take on each machine). ``stages_at``: an address HOST:PORT where the other stages join (None: they
    are started on this machine); beyond this machine that needs ``stage_key_file``, a file with what all must know, and
    ``stage_certificate``, a PEM file with a certificate and its private key. ``stage_timeout``: seconds after which a
    stage that does not answer, or does not come back, is given up.
    """

    kv_bytes: int | None = None
    block_size: int = 32
    max_rows: int = MAX_ROWS
    max_sequences: int = 64
    prefill_chunk: int = MAX_ROWS
    prefix_sharing: bool = True
    max_wait: float = 0.25
    threads: int | None = None
    activation_bits: int = 15
    kv_dtype: str = "float16"
    pipeline: int = 1
    tensor: int = 1
    layers_per_stage: Sequence[int] | None = None
    stages_at: str | None = None
    stage_key_file: str | None = None
    stage_certificate: str | None = None
    stage_timeout: float = 60.0

    def __post_init__(self) -> None:
        found: dict[str, Any] = {"prefix_sharing": flag(self.prefix_sharing, "engine.prefix_sharing")}
        for name in ("block_size", "max_rows", "max_sequences", "prefill_chunk", "pipeline", "tensor"):
            found[name] = whole(getattr(self, name), f"engine.{name}", least=1)
        for name in ("kv_bytes", "threads"):
            if getattr(self, name) is not None:
                found[name] = whole(getattr(self, name), f"engine.{name}", least=1)
        expected = "a number from 0, a share of a full pass"
        found["max_wait"] = number(self.max_wait, "engine.max_wait", expected)
        if not 0.0 <= found["max_wait"] < math.inf:
            raise UserError(f"engine.max_wait is {found['max_wait']}, but must be {expected}")
        for name, known in (("activation_bits", (15, 8)), ("kv_dtype", ("float32", "float16"))):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"engine.{name} is {value!r}, but must be {known[0]} or {known[1]}")
        seconds = "a number of seconds above 0"
        found["stage_timeout"] = number(self.stage_timeout, "engine.stage_timeout", seconds)
        if not 0.0 < found["stage_timeout"] < math.inf:
            raise UserError(f"engine.stage_timeout is {found['stage_timeout']}, but must be {seconds}")
        if self.layers_per_stage is not None:
            counts = tuple(wholes(self.layers_per_stage, "engine.layers_per_stage", "numbers of layers"))
            if len(counts) != found["pipeline"] or min(counts) < 1:
                raise UserError(
                    f"engine.layers_per_stage is {list(counts)}, but must have a number of layers for each of the "
                    f"{found['pipeline']} stages (engine.pipeline)"
                )
            found["layers_per_stage"] = counts
        for name in ("stages_at", "stage_key_file", "stage_certificate"):
            if (value := getattr(self, name)) is not None and found["pipeline"] == found["tensor"] == 1:
                raise UserError(f"engine.{name} is {value!r}, but there is one stage; set engine.pipeline to 2 or more")
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> EngineConfig:
        """From a mapping; an unknown key is refused with the nearest known one."""
        return settings_of(cls, options, "the engine")
