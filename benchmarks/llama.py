"""llama.cpp in a process of its own, which waits while others run: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from exitlm.weights.source import resolve


class Llama:
    """A Python ``program`` run by an interpreter that has llama_cpp, with a model's path and numbers as its arguments.
    It says that it is ready, and then answers questions."""

    def __init__(self, python: str, program: str, model: str, *numbers: int) -> None:
        command = [python, "-c", program, str(resolve(model)), *map(str, numbers)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()

    def ask(self, question: Any) -> Any:
        """The answer to a question, both in JSON."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("llama.cpp failed")
        return line
