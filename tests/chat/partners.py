"""Partners whose replies a test writes down. Not a test."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

from exitlm.chat.conversation import Message
from exitlm.chat.partner import Facts, Part, Taken
from exitlm.errors import UserError

WHOLE = Taken(ended="stop", tokens=2, tokens_per_second=10.0, mean_layers=3.0, mode="lossless", exact=True)


class Scripted:
    """Says the parts of ``script`` in each reply. ``"^C"`` among them is the user's interrupt; an error is raised. With
    ``raises``, to stop raises KeyboardInterrupt, as where a connection is read."""

    def __init__(self, script: Sequence[str | Exception | Taken], *, raises: bool = False) -> None:
        self.script, self.raises = script, raises
        self.facts = Facts(name="scripted", num_layers=4, exit_layers=[2], context=100, mode="lossless", exact=True)
        self.settings: dict[str, Any] = {}
        self.asked: list[list[Message]] = []
        self.closed = 0
        self.told: list[str] = []
        self._stopped = False

    def change(self, name: str, value: Any) -> None:
        if name not in ("mode", "threshold", "temperature", "seed", "top_p"):
            raise UserError(f"no setting {name}")
        if value is None:
            self.settings.pop(name, None)
        else:
            self.settings[name] = value

    def reply(self, messages: Sequence[Message]) -> Iterator[Part | Taken]:
        self.asked.append(list(messages))
        self._stopped = False
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Taken):
                    yield step
                elif step == "^C":
                    signal.raise_signal(signal.SIGINT)
                else:
                    yield Part(text=step, tokens=[(step, 2)])
                if self._stopped:
                    return
        finally:
            self.closed += 1

    def stop(self) -> None:
        if self.raises:
            raise KeyboardInterrupt
        self._stopped = True

    def notes(self) -> Sequence[str]:
        return self.told
