"""The pages of docs/ are true: their programs run, their tables are the settings, and their links lead somewhere."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from exitlm import Generation, GenerationConfig
from exitlm.decode.generation import Stats
from exitlm.decode.options import EngineConfig
from exitlm.decode.rules import RULES
from tests.checkpoints import write_checkpoint

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def programs(page: str) -> list[str]:
    """The python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def rows(text: str) -> dict[str, list[str]]:
    """Rows of tables whose first cell is one name in backticks: the other cells by that name."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and re.fullmatch(r"`\w+`", cells[0]):
            found[cells[0].strip("`")] = cells[1:]
    return found


def section(page: str, heading: str) -> str:
    """The text under a heading, up to the next one."""
    return (DOCS / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What stands for the model and the sizes of the page: a random model as deep as SmolLM2, and little work."""
    monkeypatch.setenv("EXITLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = write_checkpoint(tmp_path / "model", num_hidden_layers=30, max_position_embeddings=512)
    little = ["data.seq_len=128", "data.validation_sequences=4", "data.self_batch=4"]
    return {
        '"smollm2"': repr(str(model)),
        '"self:100000", steps=500': f'"self:400", steps=2, overrides={little}',
        '"configs/tiny-3d.toml"': repr(str(DOCS.parent / "configs" / "tiny-3d.toml")),
        '"checkpoint.dir=runs/tiny"': '"checkpoint.dir=runs/tiny", "train.steps=2", "train.dtype=float32"',
    }


@pytest.mark.filterwarnings("ignore")
def test_the_programs_of_python_md_run_on_a_small_model(
    small_world: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of the page, as in one session."""
    session: dict[str, Any] = {"__name__": "session"}
    blocks, used = programs("python.md"), set()
    for number, block in enumerate(blocks, 1):
        for old, new in small_world.items():
            used |= {old} if old in block else set()
            block = block.replace(old, new)
        exec(compile(block, f"block {number} of python.md", "exec"), session)
    assert used == set(small_world)
    assert len(blocks) > 15
    assert session["model"].exit_layers == [15, 20, 22]
    assert session["outs"][1].finish_reason == "error"
    assert session["answer"].text in ("yes", "no")
    assert "did you mean 'temperature'" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_programs_of_python_md_run_on_the_real_model(tmp_path: Path) -> None:
    program = "\n".join(programs("python.md"))
    program = program.replace('"configs/', f'"{DOCS.parent}/configs/')
    program = program.replace('"self:100000", steps=500', '"self:20000", steps=100')
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=dict(os.environ), check=True)


@pytest.mark.parametrize("config", [GenerationConfig, EngineConfig])
def test_the_tables_of_settings_are_those_of_the_code(config: type[Any]) -> None:
    """Every field with its default, and none besides."""
    table = rows(section("decoding.md", "13 Settings"))
    other = EngineConfig if config is GenerationConfig else GenerationConfig
    names = [field.name for field in dataclasses.fields(config)]
    assert [name for name in table if name not in {f.name for f in dataclasses.fields(other)}] == names
    made = config()
    for name in names:
        assert ast.literal_eval(table[name][0].strip("`")) == getattr(made, name), name


def test_the_table_of_statistics_is_that_of_the_code() -> None:
    cells = re.findall(r"^\|(.*?)\|", section("python.md", "What comes back"), re.MULTILINE)
    names = set(re.findall(r"`(\w+)`", " ".join(cells))) - {"Generation"}
    known = {field.name for field in dataclasses.fields(Generation)} | set(Stats(mode="full").to_json())
    assert names == known


def test_the_table_of_rules_is_that_of_the_code() -> None:
    assert sorted(set(rows(section("decoding.md", "1 Three modes"))) & set(RULES)) == sorted(RULES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: Path) -> None:
    """Files, and the headings within a page, as GitHub names them."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists(), target
        if anchor and place.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target
