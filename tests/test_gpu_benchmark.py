"""The program for GPU machines, run here on tiny models: every section of it, and what it does when a part fails."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``gpu.py`` as a module, with its neighbours importable."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    specification = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(program: Any, tmp_path: Path) -> None:
    path = tmp_path / "section.json"
    section = program.Section("one", path, torch.device("cpu"), True, 60.0)

    def wrong(found: dict[str, Any]) -> None:
        found["before"] = 1
        raise ValueError("no such kernel")

    assert not section.part("wrong", wrong)
    assert section.part("right", lambda found: section.row("speed", 2.0, "x"))
    assert not section.part("too long", lambda found: pytest.fail("no time for this"), needs=1e6)
    data = json.loads(path.read_text())
    assert data["parts"]["wrong"]["before"] == 1
    assert data["rows"] == [{"section": "one", "what": "speed", "value": 2.0, "unit": "x"}]
    assert [error["part"] for error in data["errors"]] == ["one: wrong", "one: too long"]
    assert "no such kernel" in data["errors"][0]["traceback"]


def test_limits_add_up_to_less_than_eight_minutes(program: Any) -> None:
    assert sum(program.LIMITS.values()) <= program.TOTAL < 480
    assert set(program.LIMITS) == set(program.SECTIONS)


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stderr


@pytest.mark.slow
def test_every_section_on_a_cpu(tmp_path: Path) -> None:
    """In a Python that has torch, transformers, safetensors and numpy alone, as GPU machines may."""
    hidden = ("rich", "tyro", "datasets", "matplotlib", "pytest", "hypothesis", "gguf", "pyarrow", "pandas")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({hidden!r}))\n")
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "PYTHONPATH": str(site)}
    command = [BENCHMARKS / "gpu.sh", "--device", "cpu", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert not found["errors"]
    assert {row["section"] for row in found["rows"]} == set(found["sections"])
    assert len(found["sections"]) == 6


@pytest.mark.gpu
def test_checks_on_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = [BENCHMARKS / "gpu.sh", "--section", "checks"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
