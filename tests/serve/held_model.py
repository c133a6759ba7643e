"""A loader for replicas whose texts stop, or become slow, after some tokens while a file says so, so that a test may
kill one in between. Not a test."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor

import exitlm
from exitlm.llm import served
from exitlm.serve.config import ServeConfig

LOADER = f"{__name__}:load"
VARIABLE = "EXITLM_TEST_HOLD"  # the path of the file
FREE_TOKENS = 8
STOP, SLOW = "stop", "slow"  # no text of the engine goes on; each token of each text takes some time


def load(config: ServeConfig) -> exitlm.LLM:
    """The model of the settings, held as the variable says."""
    model, file = served(config), Path(os.environ[VARIABLE])
    intake = model.engine.intake
    add = intake.sequence

    def sequence(key: int, prompt: Any, config: Any, *rest: Any) -> Any:
        begin = len(prompt)
        if not _read(file):
            return add(key, prompt, config, *rest)

        def wait(before: list[int], logits: Tensor) -> Tensor:
            while len(before) - begin >= FREE_TOKENS and (held := _read(file)):
                time.sleep(0.02)
                if held == SLOW:
                    break
            return logits

        return add(key, prompt, dataclasses.replace(config, logits_processor=wait), *rest)

    intake.sequence = sequence  # type: ignore[method-assign]
    return model


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""
