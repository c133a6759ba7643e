"""README.md is true: every command in it is known to the parser, and the slow set runs them all on the real model."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exitlm import cli

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
COMMANDS = [line[2:] for language, block in BLOCKS if language == "console" for line in block.splitlines()]
PROGRAMS = [block for language, block in BLOCKS if language == "python"]


def test_every_block_is_a_command_or_a_program() -> None:
    assert {language for language, _ in BLOCKS} == {"console", "python"}
    assert [command.split()[0] for command in COMMANDS] == ["make"] + ["exitlm"] * (len(COMMANDS) - 1)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("exitlm ")])
def test_the_parser_knows_the_command(command: str) -> None:
    verb, values = cli._parse(shlex.split(command)[1:])
    assert verb in cli.VERBS
    assert values


def test_the_makefile_knows_the_target() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{COMMANDS[0].split()[1]}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_program_compiles(program: str) -> None:
    compile(program, "README.md", "exec")


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (README.parent / target).is_file(), target


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_commands_and_programs_run(tmp_path: Path) -> None:
    """In the order of the page, as a reader would, in one directory. A server runs until all is done."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with contextlib.ExitStack() as stack:
        for command in map(shlex.split, COMMANDS[1:]):
            if command[1] == "serve":
                stack.enter_context(serving(command, cwd=tmp_path, env=environment))
            else:
                subprocess.run(command, cwd=tmp_path, env=environment, check=True)
        for program in PROGRAMS:
            subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)


@contextlib.contextmanager
def serving(command: list[str], **options: Any) -> Iterator[None]:
    """A server that is ready; in the end it gets a signal, and must exit as if nothing were wrong."""
    with subprocess.Popen(command, **options) as process:
        try:
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen("http://localhost:8000/health", timeout=10):
                    break
                assert process.poll() is None
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
        assert process.wait(60) == 0
