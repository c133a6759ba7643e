"""docs/serving.md and the files of deploy/ are true: settings, endpoints, metrics and fields are those of the code."""

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from exitlm import cli
from exitlm.serve.app import routes
from exitlm.serve.config import SECTIONS, ServeConfig
from exitlm.serve.metrics import Metrics
from exitlm.serve.protocol.fields import ExitFields
from exitlm.serve.service import State

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
TOML = (ROOT / "deploy" / "serve.toml").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
CONSOLE = "".join(block for language, block in BLOCKS if language == "console").replace("\\\n", " ")
COMMANDS = [line[2:] for line in CONSOLE.splitlines() if line.startswith("$ exitlm ")]
# What the file can't give as a value, because the default is None, or what needs a model.
WITHOUT_DEFAULT = {
    "source",
    "name",
    "api_key_file",
    "new_tokens",
    "kv_bytes",
    "threads",
    "most",
    "ongoing",
    "target",
    "gpus",
    "layers_per_stage",
    "stages_at",
    "stage_key_file",
    "stage_certificate",
}


def section(number: int) -> str:
    """The text of a numbered section."""
    return PAGE.split(f"\n## {number} ")[1].split("\n## ")[0]


def first_cells(number: int) -> list[str]:
    """What the tables of a section name in backticks in their first column."""
    rows = [line.split("|")[1] for line in section(number).splitlines() if line.startswith("|")]
    return [name for cell in rows for name in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "defaults"])
def test_the_file_of_settings_has_every_key_with_its_default(name: str) -> None:
    config = ServeConfig.of(tomllib.loads(TOML))
    text = TOML.split(f"\n[{name}]")[1].split("\n[")[0]
    keys = re.findall(r"^(?:# )?(\w+) = ", text, re.MULTILINE)
    settings = getattr(config, name)
    fields = {field.name: field for field in dataclasses.fields(settings)}
    assert keys == list(fields)
    for key, field in fields.items():
        if key not in WITHOUT_DEFAULT:
            assert (
                list(getattr(settings, key)) == [] if field.default == () else getattr(settings, key) == field.default
            )
            assert re.search(rf"^{key} = ", text, re.MULTILINE), key


def test_every_comment_of_the_file_is_a_setting_that_can_be_taken() -> None:
    live = re.sub(r"^# (\w+ = )", r"\1", TOML, flags=re.MULTILINE).replace('api_key_file = "keys"', "")
    live = live.replace("\npipeline = 1 ", "\npipeline = 2 ")
    config = ServeConfig.of(tomllib.loads(live))
    assert config.limits.new_tokens == 4096
    assert set(config.defaults) == {"mode", "threshold", "temperature", "top_p"}


def test_the_page_names_every_setting_of_the_server() -> None:
    named = set(first_cells(16))
    for name in ("model", "http", "limits", "replicas"):
        section_of = type(getattr(ServeConfig.of({"model": {"source": "x"}}), name))
        assert {field.name for field in dataclasses.fields(section_of)} <= named


def test_the_table_of_endpoints_is_that_of_the_application() -> None:
    rows = [cell.split() for cell in first_cells(3)]
    documented = {(method, path.replace("NAME", "{name:path}")) for method, path in rows}
    app = routes(State(ServeConfig.of({"model": {"source": "x"}})))
    kept = "/v1/responses/{path:path}"  # says that nothing is kept
    known = {(method, route.path) for route in app.routes for method in route.methods - {"HEAD"} if route.path != kept}  # type: ignore[attr-defined]
    assert documented <= known
    assert known <= documented


def test_the_table_of_metrics_is_that_of_the_server() -> None:
    documented = {cell.split("{")[0] for cell in first_cells(15)}
    metrics = Metrics()
    found = {family.name for family in text_string_to_metric_families(metrics.text().decode())}
    source = (ROOT / "src" / "exitlm" / "serve" / "metrics.py").read_text(encoding="utf-8")
    engine = set(re.findall(r'_(?:gauge|counter|labelled)\(\s*"(\w+)"', source))  # those that need an engine
    names = {name.removeprefix("exitlm:") for name in found} | engine
    assert {name.removesuffix("_total") for name in documented} == names


def test_the_table_of_exit_fields_is_that_of_requests() -> None:
    assert set(first_cells(8)) == set(ExitFields.model_fields)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_parser_knows_the_command(command: str) -> None:
    verb, values = cli._parse(shlex.split(command)[1:])
    assert verb in ("serve", "stage", "chat", "bench-serve")
    assert values


def test_programs_compile() -> None:
    programs = [block for language, block in BLOCKS if language == "python"]
    assert len(programs) == 6
    for program in programs:
        compile(program, "serving.md", "exec")


def test_the_example_of_sizing_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    found = dict(re.findall(r"^```(python|text)\n(.*?)^```$", section(24), re.MULTILINE | re.DOTALL))
    exec(compile(found["python"], "serving.md", "exec"), {})
    assert capsys.readouterr().out == found["text"]
    assert "| 8 | 583 |" in section(23)


def test_the_unit_and_the_image_wait_for_the_drain() -> None:
    drain = ServeConfig.of({"model": {"source": "x"}}).limits.drain
    unit = (ROOT / "deploy" / "exitlm.service").read_text(encoding="utf-8")
    image = (ROOT / "deploy" / "Containerfile").read_text(encoding="utf-8")
    assert int(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) > drain
    assert int(re.findall(r"--stop-timeout (\d+)", image)[0]) > drain
    assert re.search(r"^USER [1-9]\d*$", image, re.MULTILINE)
