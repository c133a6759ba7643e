"""What a run tells while it goes: ``metrics.jsonl`` always, trackers where asked for."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from exitlm.atomic import replace_file
from exitlm.errors import UserError
from exitlm.train.run import RunConfig
from exitlm.train.sections import LoggingSection

# The largest rate of dense bfloat16 products, in FLOP/s, as the makers state it.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


class Tracker(Protocol):
    """Anything that takes numbers by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of one step."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class JsonLines:
    """One JSON object per line with ``step``. A resumed run first drops the lines after the step it goes on from."""

    def __init__(self, path: Path, resume_step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= resume_step]
            with replace_file(path) as fresh:
                fresh.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.file: TextIO = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append and flush one line; what is not finite is null, for JSON knows no NaN."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # torn by a kill


class TensorBoard:
    """Scalars for TensorBoard."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("logging.tensorboard needs 'pip install tensorboard'") from error
        self.writer: Any = SummaryWriter(str(directory))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write each value as a scalar."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self.writer.close()


class Hosted:
    """Weights & Biases, or trackio, which has the same calls."""

    def __init__(self, package: str, project: str, config: RunConfig) -> None:
        try:
            module = __import__(package)
        except ImportError as error:
            raise UserError(f"logging.{package} needs 'pip install {package}'") from error
        self.run: Any = module.init(project=project, config=config.flat())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


def open_trackers(out: Path, config: RunConfig, resume_step: int) -> list[Tracker]:
    """``metrics.jsonl`` and what the settings ask for.

    Raises:
        UserError: a tracker whose package is not installed.
    """
    settings: LoggingSection = config.logging
    trackers: list[Tracker] = [JsonLines(out / "metrics.jsonl", resume_step)]
    if settings.tensorboard:
        trackers.append(TensorBoard(out / "tensorboard"))
    if settings.wandb:
        trackers.append(Hosted("wandb", settings.wandb, config))
    if settings.trackio:
        trackers.append(Hosted("trackio", settings.trackio, config))
    return trackers


def check_trackers(settings: LoggingSection) -> None:
    """Refuse a tracker whose package is not installed, before any work is done."""
    for package in ("tensorboard", "wandb", "trackio"):
        if getattr(settings, package) and find_spec(package) is None:
            raise UserError(f"logging.{package} needs a package that is not installed: pip install 'exitlm[{package}]'")


def step_note(losses: Mapping[int, float], agreement: Mapping[int, float], tokens_per_second: float) -> str:
    """Loss and agreement of each exit, and the speed, for the bar."""
    exits = "  ".join(f"{layer}: {losses[layer]:.2f}/{agreement[layer]:.0%}" for layer in losses)
    return f"exit: loss/agreement  {exits}  {tokens_per_second:,.0f} tok/s"


def peak_flops(device: torch.device) -> float | None:
    """What a GPU could do at most, in FLOP/s; None for one that is not known, and for a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def memory_gib(device: torch.device) -> float:
    """The most memory that this process has held: on its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
