"""A served model that writes scripted ids: in the real engine, by a processor of logits."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

import exitlm
from tests.checkpoints import write_checkpoint
from tests.serve.conftest import Served, serving
from tests.serve.tools.templates import tokenizer_of


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


@contextlib.contextmanager
def scripted_server(template: str, directory: Path) -> Iterator[Scripted]:
    """A server of a tiny model with the tokenizer of a chat template: a byte or a marker is a token."""
    write_checkpoint(directory, tokenizer=False, max_position_embeddings=4096, vocab_size=320, num_hidden_layers=1)
    model = exitlm.load(directory, dtype="float32", quant="none")
    model.tokenizer = tokenizer_of(template)
    with serving(model, defaults={"mode": "full"}) as served:
        yield Scripted(served)


def _with_processor(config: Any, begin: int, ids: list[int]) -> Any:
    def write(before: list[int], logits: Tensor) -> Tensor:
        at = len(before) - begin
        if at < len(ids):
            logits = logits.clone()
            logits[ids[at]] += 1e4
        return logits

    return dataclasses.replace(config, logits_processor=write)
