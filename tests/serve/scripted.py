"""A served model that writes scripted ids: in the real engine, by a processor of logits."""

import dataclasses
from typing import Any

from torch import Tensor

from tests.serve.conftest import Served


class Scripted:
    """A served model that writes ``ids``, whatever it is asked; None: what it would."""

    def __init__(self, served: Served) -> None:
        self.served, self.ids = served, None
        intake = served.model.engine.intake
        add = intake.sequence

        def sequence(key: int, prompt: Any, config: Any, *rest: Any) -> Any:
            made = add(key, prompt, config, *rest)
            if self.ids is not None:
                made = add(key, prompt, _with_processor(config, len(prompt), self.ids), *rest)
            return made

        intake.sequence = sequence  # type: ignore[method-assign]


def _with_processor(config: Any, begin: int, ids: list[int]) -> Any:
    def write(before: list[int], logits: Tensor) -> Tensor:
        at = len(before) - begin
        if at < len(ids):
            logits = logits.clone()
            logits[ids[at]] += 1e4
        return logits

    return dataclasses.replace(config, logits_processor=write)
