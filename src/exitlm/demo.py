"""The main job on a real model: tune exits on SmolLM2-135M, decode in every mode, show where each token left.

Prints the coloured texts and a table, and draws two pictures. It is a program over the public surface; the adapter it
tuned stays in its directory, so that a second run only decodes. The figures are those of one run: ``benchmarks/`` is
where they are measured with care.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console

from exitlm import show
from exitlm.decode.engine import Engine
from exitlm.decode.generation import Generation, GenerationConfig
from exitlm.errors import UserError
from exitlm.evaluate.plots import Point, depth_picture, speed_quality_picture
from exitlm.llm import LLM, load
from exitlm.palette import palette
from exitlm.train import RunConfig, tune
from exitlm.train.precision import native_bfloat16

BASE = "smollm2"
PROMPTS = (  # none of them, nor its topic, is among the prompts whose answers the exits are tuned on
    "Why do cats purr?",
    "Give me five tips for packing a suitcase.",
    "Write a short story about a lighthouse keeper and a storm.",
    "Write a Python function that returns the n-th Fibonacci number.",
)
THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.5)
WANTED_AGREEMENT = 0.9  # the coloured text is the fastest setting that keeps this


@dataclass(kw_only=True)
class Setting:
    """One way to decode, and what all prompts together measured for it."""

    label: str
    mode: str
    threshold: float | None = None
    answers: list[Generation] = field(default_factory=list)
    agreeing: int = 0

    def options(self) -> dict[str, Any]:
        """What ``LLM.generate`` is given."""
        return {"mode": self.mode, **({} if self.threshold is None else {"threshold": self.threshold})}

    @property
    def exit_layers(self) -> list[int]:
        """The exit layer of every token of every answer."""
        return [layer for answer in self.answers for layer in answer.exit_layers]

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, without the prefill (which gives each answer's first token): the median of the prompts."""
        return median(_speed(answer) for answer in self.answers)

    def speed(self, full: Setting) -> float:
        """The median of the prompts' speed ratios to ``full``; both were measured one right after the other."""
        pairs = zip(self.answers, full.answers, strict=True)
        return median(_speed(mine) / _speed(theirs) for mine, theirs in pairs)

    @property
    def mean_layers(self) -> float:
        """The mean exit layer."""
        return mean(self.exit_layers)

    @property
    def agreement(self) -> float:
        """The share of tokens that the full model would have written at the same place."""
        return self.agreeing / len(self.exit_layers)

    @property
    def acceptance(self) -> float | None:
        """The share of drafts that the full model accepted; None where nothing was drafted."""
        drafted = sum(answer.stats.drafted for answer in self.answers)
        return sum(answer.stats.accepted for answer in self.answers) / drafted if drafted else None


def _speed(answer: Generation) -> float:
    seconds: float = answer.stats.decode_seconds
    return max(len(answer.token_ids) - 1, 1) / max(seconds, 1e-9)


def run(out: Path, *, quick: bool = False) -> None:
    """Do it all in the directory ``out``; ``quick`` writes less text, tunes for fewer steps and asks fewer prompts."""
    if find_spec("matplotlib") is None:
        raise UserError("the demo draws pictures with matplotlib; install it with: pip install 'exitlm[plots]'")
    console = Console(highlight=False)
    adapter = out / "adapter"
    console.rule("[bold]1. tune exits on text that the model writes itself", align="left")
    tune(tuning(adapter, quick))
    console.rule("[bold]2. decode", align="left")
    llm = load(BASE, adapter=adapter)
    settings = measure(llm, PROMPTS[:2] if quick else PROMPTS, 32 if quick else 128, console)
    _report(llm, settings, out, console)


def tuning(directory: Path, quick: bool) -> RunConfig:
    """The settings of the demo's tuning run: the defaults where they take minutes, a smaller run elsewhere."""
    settings = [f"model.base={BASE}", "exits.layers=8,15,22", f"checkpoint.dir={json.dumps(str(directory))}"]
    short = ["data.files=self:2000", "train.steps=20", "data.validation_sequences=4"]
    slow = ["data.files=self:20000", "train.steps=150"]  # a processor without bfloat16 takes five times as long
    fast = torch.cuda.is_available() or native_bfloat16(torch.device("cpu"))
    return RunConfig().with_overrides(settings + (short if quick else [] if fast else slow))


def measure(llm: LLM, prompts: Sequence[str], tokens: int, console: Console) -> list[Setting]:
    """Decode every prompt in every setting, one prompt after the other, so that all settings see the same machine."""
    settings = [
        Setting(label="full", mode="full"),
        Setting(label="lossless", mode="lossless"),
        Setting(label="threshold", mode="threshold"),
        *(Setting(label=f"threshold {value}", mode="threshold", threshold=value) for value in THRESHOLDS),
    ]
    for setting in settings:
        llm.generate(prompts[0], chat=True, max_new_tokens=8, **setting.options())
    with console.status("") as status:
        for number, prompt in enumerate(prompts, 1):
            ids = llm.encode(prompt, chat=True)
            for setting in settings:
                status.update(f"prompt {number} of {len(prompts)}: {setting.label}")
                answer = llm.generate(ids, max_new_tokens=tokens, **setting.options())
                setting.answers.append(answer)
                full = settings[0].answers[-1].token_ids
                setting.agreeing += agreeing(llm.engine, ids, answer.token_ids, full)
    return settings


def agreeing(engine: Engine, prompt: list[int], answer: list[int], full: list[int]) -> int:
    """How many tokens of ``answer`` are what ``full`` writes after the same text; ``full`` is its own answer."""
    same = next((i for i, (mine, its) in enumerate(zip(answer, full, strict=False)) if mine != its), len(answer))
    if same == len(answer):
        return same
    scored = GenerationConfig(mode="full", max_new_tokens=0, prompt_logprobs=1)
    best = [next(iter(top)) for _, top in engine.generate([*prompt, *answer], scored).prompt_logprobs]
    return same + sum(its == mine for its, mine in zip(best[len(prompt) - 1 + same :], answer[same:], strict=True))


def _report(llm: LLM, settings: list[Setting], out: Path, console: Console) -> None:
    """The coloured answers, the table and the pictures."""
    colours = palette(llm.exit_layers, llm.num_layers)
    full = settings[0]
    by_depth = sorted((s for s in settings if s.threshold is not None), key=lambda s: s.mean_layers)
    chosen = next((s for s in by_depth if s.agreement >= WANTED_AGREEMENT), by_depth[-1])

    console.rule(f"[bold]3. where tokens left ({chosen.label})", align="left")
    answered = list(zip(PROMPTS, chosen.answers, strict=False))
    for prompt, answer in answered:
        console.print(show.answer(prompt, _depths(answer), colours))
    console.print(show.legend(colours))

    console.rule("[bold]4. speed and quality", align="left")
    rows = [_row(setting, full, llm.num_layers) for setting in settings]
    console.print(show.table(rows))
    console.print(
        "threshold without a number is as tuned; speed is against full; layers, the mean of those that tokens left at; "
        "agreement, the tokens that full would have written after the same text; acceptance, the drafts that the full "
        f"model accepted. One run, {len(full.exit_layers)} tokens each.",
        style="dim",
    )
    for note in llm.engine.notes:
        console.print(f"note: {note}", style="dim")

    points = [
        Point(
            label=f"{s.threshold}",
            agreement=s.agreement,
            speed=s.speed(full),
            mode="as tuned" if s.label == "threshold" else s.mode,
        )
        for s in settings
        if s.mode != "threshold" or s.mean_layers < llm.num_layers  # where nothing fired, it is full
    ]
    depths = {setting.label: setting.exit_layers for setting in (chosen, settings[1])}
    prompt, answer = min(answered, key=lambda pair: mean(pair[1].exit_layers))
    layers = f"exits at {', '.join(map(str, llm.exit_layers))} of {llm.num_layers} layers"
    for path in (
        speed_quality_picture(out / "speed-quality.png", points, depths, colours, title=f"SmolLM2-135M, {layers}"),
        depth_picture(out / "depth.png", _depths(answer), colours, title=prompt, note=f"SmolLM2-135M, {chosen.label}"),
    ):
        console.print(f"wrote {path}", soft_wrap=True)


def _depths(answer: Generation) -> list[tuple[str, int]]:
    return [(token.text, token.exit_layer) for token in answer.trace]


def _row(setting: Setting, full: Setting, layers: int) -> dict[str, str]:
    acceptance = setting.acceptance
    return {
        "mode": setting.label,
        "tokens/s": f"{setting.tokens_per_second:.1f}",
        "speed": f"{setting.speed(full):.2f}x",
        f"layers of {layers}": f"{setting.mean_layers:.1f}",
        "agreement": f"{setting.agreement:.1%}",
        "acceptance": "" if acceptance is None else f"{acceptance:.0%}",
    }
