"""Systems other than POSIX ones: what they lack is not needed to decode."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, torch, transformers, safetensors, filelock  # these know what their systems have
for name in ("fcntl", "pwd", "grp", "resource", "termios", "syslog"):
    sys.modules[name] = None
for name in ("fork", "register_at_fork", "sched_getaffinity", "geteuid", "getuid", "mkfifo"):
    if hasattr(os, name):
        delattr(os, name)
import exitlm
from exitlm import cli
from exitlm.weights import export

model, place = sys.argv[1:]
llm = exitlm.load(model)
llm.add_exits([2], kind="norm")
llm.save_exits(place + "/exits")
print(llm.generate([5, 9, 77], max_new_tokens=4, mode="lossless").token_ids)
assert cli.main(["generate", model, "--adapter", place + "/exits", "--prompt", "x", "--max-new-tokens", "2"]) == 0
open(place + "/prompts.jsonl", "w").write('{"prompt": "Call me"}\\n')
assert cli.main(["generate", model, "--prompts", place + "/prompts.jsonl", "--out", place + "/out.jsonl"]) == 0
"""


@pytest.mark.usefixtures("cache")
def test_decoding_needs_no_posix_module(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "exits" / "exits.json").exists()
    assert (tmp_path / "out.jsonl").read_text().count("\n") == 1
