"""exitlm of some checkout in a process of its own: it is told over pipes what to decode, so that two take turns.

Both sides are asked through what they have in common: ``exitlm.load`` and ``LLM.stream``. The time of a turn is the
wall time until its tokens are there, by the reader's clock, not by the engine's own figures.

    python benchmarks/checkout.py SRC MODEL [ADAPTER]     (what batching.py starts)
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_PAUSE = 0.02  # seconds before a turn, in which the other side's threads stop spinning


class Checkout:
    """The process of a checkout, seen from outside. ``commit`` is what git says of it."""

    def __init__(self, directory: Path, model: str, adapter: str | None) -> None:
        source = str(directory.resolve() / "src")
        describe = ["git", "describe", "--always", "--dirty"]
        self.commit = subprocess.run(describe, capture_output=True, text=True, cwd=directory).stdout.strip()
        command = [sys.executable, __file__, source, model, *([adapter] if adapter else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        found = self._answer()["from"]
        if not found.startswith(source):
            self.end()
            raise SystemExit(f"{source} has no exitlm; the process took the one in {found}")

    def begin(self, ids: Sequence[int], count: int) -> list[int]:
        """Begin a text of ``count`` tokens, greedily, in ``full``; its first tokens."""
        tokens: list[int] = self._ask({"ids": list(ids), "count": count})["tokens"]
        return tokens

    def turn(self, count: int) -> tuple[float, list[int]]:
        """Seconds per token of the next ``count`` tokens, and these."""
        found = self._ask({"count": count})
        return found["seconds"] / len(found["tokens"]), found["tokens"]

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a checkout's process ended with code {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


def serve(source: str, model: str, adapter: str | None) -> None:
    """Be the process: decode as the lines of stdin say, until they end."""
    sys.path.insert(0, source)
    import exitlm

    name = "adapter" if "adapter" in inspect.signature(exitlm.load).parameters else "exits"
    llm = exitlm.load(model, **({name: adapter} if adapter else {}))
    _say({"from": exitlm.__file__})
    pieces: Iterator[Any] = iter(())
    for line in sys.stdin:
        order = json.loads(line)
        if "ids" in order:
            del pieces  # ends the text before
            pieces = iter(llm.stream(order["ids"], mode="full", max_new_tokens=order["count"], ignore_eos=True))
            _say({"tokens": next(pieces).token_ids})
            continue
        time.sleep(_PAUSE)
        tokens: list[int] = []
        begin = time.perf_counter()
        while len(tokens) < order["count"]:
            tokens += next(pieces).token_ids
        _say({"seconds": time.perf_counter() - begin, "tokens": tokens})


def _say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:3], sys.argv[3] if len(sys.argv) > 3 else None)
