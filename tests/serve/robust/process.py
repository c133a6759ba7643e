"""``exitlm serve`` as a process of its own. Not a test."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.serve.robust.clients import wait_for


@dataclass
class Process:
    """A server; ``log`` are the lines that it has written so far."""

    process: subprocess.Popen[str]
    url: str = ""
    log: list[str] = field(default_factory=list)

    def read_log(self) -> None:
        """Take lines as they come, so that the pipe never fills."""
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)


@contextlib.contextmanager
def process(model: Path, *settings: str, flags: Sequence[str] = ()) -> Iterator[Process]:
    """Serve a model until the end of the block."""
    environment = {name: value for name, value in os.environ.items() if name != "EXITLM_API_KEY"}
    command = [sys.executable, "-m", "exitlm", "serve", str(model), "--name", "tiny", "--port", "0", *flags]
    with subprocess.Popen(
        [*command, *(["--set", *settings] if settings else [])], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment,
    ) as begun:  # fmt: skip
        found = Process(begun)
        reader = threading.Thread(target=found.read_log)
        reader.start()
        try:
            assert begun.stdout is not None
            line = begun.stdout.readline()
            address = re.search(r"http://\S+", line)
            assert address, line
            found.url = address[0]
            with httpx.Client(base_url=found.url, timeout=60) as http:
                wait_for(lambda: http.get("/health").status_code == 200, "the server is ready")
            yield found
        finally:
            begun.kill()
            begun.wait()
            reader.join()
