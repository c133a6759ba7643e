"""The typed keywords of a generation: the fields of its configuration, and what a type checker makes of them."""

import os
import typing
from dataclasses import fields
from pathlib import Path

import pytest

from exitlm.decode.generation import GenerationConfig
from exitlm.decode.requests import WHOLE
from exitlm.decode.settings import GenerationSettings

SOURCE = Path(__file__).parents[2] / "src"
PROGRAM = """\
import exitlm
from exitlm import GenerationConfig

llm = exitlm.load("smollm2", adapter=["a", "b"])
llm.generate("Hi", temperature=0.5, stop=["a"], threshold={8: 0.9}, exits=(8, 15))
llm.generate([{"role": "user", "content": "Hi"}], config=GenerationConfig(max_new_tokens=3))
for piece in llm.stream([1, 2], mode="full"):
    print(piece.text)
exitlm.tune("smollm2", exits=[8])
"""
MISTAKES = (
    'llm.generate("Hi", temprature=0.5)',
    'llm.stream("Hi", max_new_token=5)',
    'llm.generate("Hi", max_new_tokens="5")',
    "llm.generate(5)",
    "GenerationConfig(top_q=1)",
    'exitlm.load("smollm2", exits="a")',
    "exitlm.tune(5)",
    "exitlm.lod",
)


def test_they_are_the_fields_of_the_configuration() -> None:
    settings, config = typing.get_type_hints(GenerationSettings), typing.get_type_hints(GenerationConfig)
    assert list(settings) == [field.name for field in fields(GenerationConfig)]
    for name in settings:
        if name in WHOLE:
            assert settings[name] == config[name]
        else:  # with many prompts, a list of one value for each
            own = set(typing.get_args(config[name])) or {config[name]}
            assert own <= set(typing.get_args(settings[name]))
            assert any(typing.get_origin(kind) is list for kind in typing.get_args(settings[name]))
    assert not GenerationSettings.__required_keys__


@pytest.mark.slow
def test_a_type_checker_finds_each_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the mistakes is told of, and nothing of the program before them."""
    from mypy import api

    program, settings = tmp_path / "program.py", tmp_path / "mypy.ini"
    program.write_text(PROGRAM + "\n".join(MISTAKES) + "\n")
    skipped = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "transformers", "numpy", "rich")
    )
    settings.write_text(f"[mypy]\n{skipped}")
    monkeypatch.setenv("MYPYPATH", os.fspath(SOURCE))
    out, problems, _ = api.run(
        ["--config-file", str(settings), "--cache-dir", str(tmp_path), "--no-error-summary", "--follow-imports=silent",
         str(program)]
    )  # fmt: skip
    first = PROGRAM.count("\n") + 1
    lines = dict.fromkeys(int(line.split(":")[1]) for line in out.splitlines() if "error:" in line)
    assert list(lines) == list(range(first, first + len(MISTAKES))), out + problems
