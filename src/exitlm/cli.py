"""The command line: a dictionary verb -> function, and the parser that fills the functions' parameters.

A verb makes the library calls that a program would make, prints, and returns an exit code. torch is not loaded to parse
or to print help. A mistake of the user is one sentence on stderr and exit code 2; anything else keeps its traceback.
The parser is argparse because its complaints are single sentences and it starts at once.
"""

import argparse
import errno
import io
import json as json_format
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from exitlm import __version__
from exitlm.assignments import given_settings
from exitlm.bench_serve import add_bench_serve, bench_serve
from exitlm.chat.verb import add_chat, chat
from exitlm.decode.remote.lost import PipelineDown
from exitlm.decode.remote.verb import add_stage, stage
from exitlm.errors import AlreadyTold, UserError, nearest
from exitlm.schedules import add_schedule, schedule
from exitlm.serve_verb import add_processes, add_serve, serve

if TYPE_CHECKING:
    from exitlm.decode.generation import GenerationConfig
    from exitlm.llm import LLM


def tune(
    base: str,
    *,
    exits: str | None = None,
    data: Sequence[str] | None = None,
    out: str | None = None,
    steps: int | None = None,
    save_every: int | None = None,
    seed: int | None = None,
    set: Sequence[str] = (),
) -> int:
    """Add exits to a model and tune them; the model itself stays as it is."""
    from exitlm.train import RunConfig, tune

    overrides = [*([] if exits is None else [f"exits.layers={exits}"]), *set]
    start = RunConfig.from_toml(base) if base.endswith(".toml") else base
    tune(start, data=data, out=out, steps=steps, seed=seed, save_every=save_every, overrides=overrides)
    return 0


def train(run: str, *, set: Sequence[str] = (), dry_run: bool = False, tflops: float | None = None) -> int:
    """Train a model with its exits from a run file, over as many processes as torchrun starts."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch, not loaded yet, prints its stack with each warning
    from exitlm.train.run import TRAINING, RunConfig

    if dry_run:
        from exitlm.train.estimate import estimate, show

        show(estimate(RunConfig.from_toml(run, TRAINING).with_overrides(set), tflops=tflops))
        return 0
    from exitlm.train.full import train

    train(run, overrides=set)
    return 0


def generate(
    model: str,
    *,
    prompt: str | None = None,
    prompts: str | None = None,
    out: str | None = None,
    adapter: Sequence[str] | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    quant: str = "auto",
    allow_other_base: bool = False,
    chat: bool = False,
    json: bool = False,
    set: Sequence[str] = (),
    **flags: Any,
) -> int:
    """Write text with as many layers as each token needs; ``flags`` are settings of ``LLM.generate``, or None."""
    if (prompts is None) != (out is None):
        raise UserError("--prompts FILE and --out FILE go together: prompts in, answers out")
    if prompts is not None and json:
        raise UserError("the answers to --prompts are JSON lines already; leave --json out")
    from exitlm.decode.options import EngineConfig

    stages = {name: flags.pop(name) for name in ("pipeline", "tensor") if name in flags}
    settings, engine = given_settings(flags, set)
    engine |= {name: count for name, count in stages.items() if count is not None}
    source = {
        "source": model, "adapter": adapter, "dtype": dtype, "device": device, "quant": quant,
        "allow_other_base": allow_other_base, "engine": EngineConfig.of(engine),
    }  # fmt: skip
    if prompts is not None and out is not None:
        return _answer_file(Path(prompts), Path(out), source, settings, chat)
    assert prompt is not None
    return _answer_prompt(_standard_input() if prompt == "-" else prompt, source, settings, chat, json)


def _standard_input() -> str:
    """The prompt that comes in on standard input, without its last line break."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise UserError("the prompt on standard input is not valid UTF-8 text; give it in that encoding") from None


def _answer_prompt(prompt: str, source: Mapping[str, Any], settings: Mapping[str, Any], chat: bool, json: bool) -> int:
    """Decode one prompt with the model that ``source`` loads; print the text, or one JSON object."""
    import exitlm
    from exitlm.decode.generation import GenerationConfig

    config = GenerationConfig.of(settings)  # refused before the model is loaded
    if config.logprobs and not json:
        warnings.warn("logprobs has no effect without --json or --prompts", stacklevel=2)
    llm = exitlm.load(**source)
    if json:
        from exitlm.prompts_file import as_json

        found = llm.generate(prompt, chat=chat, config=config)
        print(json_format.dumps({**as_json(found), "stats": found.stats.to_json()}))
    elif config.n > 1:
        for number, choice in enumerate(llm.generate(prompt, chat=chat, config=config).choices, 1):
            print(f"[{number}] {choice.text}")
    elif sys.stdout.isatty():
        _print_depth(llm, prompt, chat, config)
    else:
        for piece in llm.stream(prompt, chat=chat, config=config):
            print(piece.text, end="", flush=True)
        print()
    _print_notes(llm)
    return 0


def _answer_file(prompts: Path, out: Path, source: Mapping[str, Any], settings: Mapping[str, Any], chat: bool) -> int:
    """Decode a file of prompts into a file of answers, from where it stopped; print where they are."""
    import exitlm
    from exitlm.decode.generation import GenerationConfig
    from exitlm.prompts_file import answer, answered, read_prompts

    if out.exists() and prompts.exists() and out.samefile(prompts):
        raise UserError(f"{out} is the file of the prompts; choose another file for the answers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a setting that is idle by itself may act with those of a line
        GenerationConfig.of(settings)
    names = [_absolute(name) for name in (source["source"], *(source["adapter"] or ()))]
    model = {"names": names, "dtype": source["dtype"], "quant": source["quant"]}
    lines = read_prompts(prompts, settings, chat=chat, model=model)
    found = answered(out, lines)
    if found.done < len(lines):
        llm = exitlm.load(**source)
        found = answer(llm, lines, out)
        _print_notes(llm)
    print(out)
    if found.failed:
        print(f"error: {found.failed} of {len(lines)} prompts failed; their lines in {out} say why", file=sys.stderr)
    return 1 if found.failed else 0


def _absolute(name: str) -> str:
    """The same name for the same path from wherever it is given; a hub id stays as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _print_notes(llm: "LLM") -> None:
    for note in llm.engine.notes:
        print(f"note: {note}", file=sys.stderr)


def _print_depth(llm: "LLM", prompt: str, chat: bool, config: "GenerationConfig") -> None:
    """Stream to a terminal, every token in the colour of its layer, then the legend and the speed."""
    from rich.console import Console

    from exitlm import show
    from exitlm.decode.generation import mean_depth, speed_of
    from exitlm.palette import palette

    console = Console(highlight=False, soft_wrap=True)
    colours = palette(llm.exit_layers, llm.num_layers)
    trace, started = [], 0.0
    for piece in llm.stream(prompt, chat=chat, config=config):
        started = started or time.perf_counter()
        for token in piece.tokens:
            console.print(show.token(token.text, token.exit_layer, colours), end="")
        trace += piece.tokens
    speed = speed_of(len(trace), time.perf_counter() - started)
    console.print("\n")
    console.print(show.legend(colours))
    if trace:
        console.print(
            f"{len(trace)} token{'s' * (len(trace) != 1)}, {'' if math.isnan(speed) else f'{speed:.1f} tokens/s, '}"
            f"{mean_depth(trace):.1f} of {llm.num_layers} layers on average",
            style="dim",
        )


def inspect(path: str) -> int:
    """Print what a model directory, an exit adapter or a GGUF file holds."""
    from exitlm.weights.inspect import show

    show(path)
    return 0


def export(
    source: str,
    directory: str,
    *,
    adapter: Sequence[str] | None = None,
    dtype: str | None = None,
    allow_other_base: bool = False,
) -> int:
    """Write a model, with its exits beside it, to a directory that transformers loads as it is."""
    import exitlm
    from exitlm.train import RunConfig, model_of_run
    from exitlm.train.trained import is_checkpoint, write_tokenizer
    from exitlm.weights.megatron import import_megatron
    from exitlm.weights.megatron_file import is_megatron

    place = Path(source)
    if is_megatron(place):
        if adapter is not None:
            raise UserError(f"{source} is a Megatron checkpoint: export it without --adapter, then the result with one")
        import_megatron(place, Path(directory), dtype=dtype)
        print(directory)
        return 0
    finished = (place / "exits.json").is_file()
    if adapter is None and (is_checkpoint(place) or ((place / "run.toml").is_file() and not finished)):
        written = exitlm.LLM(model_of_run(place)).export(directory, dtype=dtype)
        write_tokenizer(place, written)
        print(written)
        return 0
    if adapter is None and (place / "run.toml").is_file():
        source, adapter = RunConfig.from_toml(place / "run.toml").model.base, [source]
    llm = exitlm.load(source, adapter=adapter, allow_other_base=allow_other_base)
    print(llm.export(directory, dtype=dtype))
    return 0


def plot(directory: str, *, out: str | None = None) -> int:
    """Draw the curves of a training or tuning run; prints where."""
    from exitlm.evaluate.curves import heads_of, read_metrics, run_curves
    from exitlm.palette import palette

    run = Path(directory)
    metrics = read_metrics(run)
    title = f"{run.resolve().name}, step {int(metrics[-1]['step']):,}"
    print(run_curves(Path(out or run / "curves.png"), metrics, palette(*heads_of(metrics)), title=title))
    return 0


def demo(*, out: str | None = None, quick: bool = False) -> int:
    """Tune exits on SmolLM2-135M, decode with them, and show where every token left."""
    from exitlm.demo import run

    run(Path(out or ("runs/demo-quick" if quick else "runs/demo")), quick=quick)
    return 0


VERBS: dict[str, Callable[..., int]] = {
    "tune": tune,
    "train": train,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "stage": stage,
    "bench-serve": bench_serve,
    "inspect": inspect,
    "export": export,
    "schedule": schedule,
    "plot": plot,
    "demo": demo,
}

# What the system says when a path or a disk is not as it should be; any other OSError is a defect.
_ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG,
                errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ELOOP, errno.EMFILE, errno.ENOMEM)  # fmt: skip
_MODEL = "a directory, a hub id, a .gguf file, or smollm2 for the packaged one"


class _Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and raises its complaints."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the whole command line, and each verb's own."""
    root = _Parser(
        prog="exitlm",
        description="Give an LLM early exits, tune them, and decode with as many layers as each token needs.",
    )
    root.add_argument("--version", action="version", version=f"exitlm {__version__}")
    verbs = root.add_subparsers(dest="verb", metavar="VERB", required=True)
    parsers: dict[str, argparse.ArgumentParser] = {}
    for name, verb in VERBS.items():
        summary = (verb.__doc__ or "").partition("\n")[0].partition(";")[0].rstrip(".")
        parsers[name] = verbs.add_parser(name, help=summary, description=f"{summary}.")

    add = parsers["tune"].add_argument
    add("base", metavar="BASE", help=f"{_MODEL}; or a run file (TOML) that the flags change")
    add("--exits", metavar="LAYERS", help="layers that get an exit, such as 8,15,22 (default: three, evenly placed)")
    add(
        "--data",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="text, JSONL, Parquet or a saved dataset; self:N is N tokens that the model writes (default: self:100000)",
    )
    add("--out", metavar="DIR", help="the run's directory, and the adapter when it is done")
    add("--steps", type=int, metavar="N", help="optimizer steps")
    add("--save-every", type=int, metavar="N", help="steps between checkpoints")
    add("--seed", type=int, metavar="S")

    add = parsers["train"].add_argument
    add("run", metavar="RUN.toml", help="a run file")
    add("--dry-run", action="store_true", help="say what the run needs on every process, and load nothing")
    add("--tflops", type=float, metavar="F", help="the speed of a process to assume in a dry run, in 1e12 FLOP/s")
    for name in ("tune", "train"):
        parsers[name].add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help="any setting of the run file, such as train.global_batch=8",
        )

    add = parsers["generate"].add_argument
    add("model", metavar="MODEL", help=_MODEL)
    group = parsers["generate"].add_mutually_exclusive_group(required=True)
    group.add_argument("--prompt", metavar="TEXT", help="the text to continue; - reads it from standard input")
    group.add_argument("--prompts", metavar="FILE", help="JSON lines: prompt or messages, and any setting; needs --out")
    add("--out", metavar="FILE", help="the answers to --prompts, as JSON lines; it is continued if it is there")
    add("--chat", action="store_true", help="put the prompt into the model's chat template")
    add("--json", action="store_true", help="print one JSON object: text, token_ids, exit_layers, mode, stats")

    add_chat(parsers["chat"], _MODEL)
    for name in ("generate", "chat"):
        add = parsers[name].add_argument
        add("--exits", metavar="LAYERS", help="exits to use, such as 8,15 (default: all, or those with a net speed-up)")
        add("--mode", metavar="M", help="lossless (the full model's text, drafted at exits), threshold, or full")
        add("--threshold", type=float, metavar="T", help="how sure an exit must be, 0 to 1 (default: as tuned)")
        add("--rule", metavar="R", help="probability, margin, entropy, gate, patience, fixed or decay")
        most = "128" if name == "generate" else "1024"
        add("--max-new-tokens", type=int, metavar="N", help=f"(default: {most})")
        add("--temperature", type=float, metavar="T", help="0 takes the most likely token (default)")
        add("--top-p", type=float, metavar="P")
        add("--seed", type=int, metavar="S")
        add("--dtype", default="auto", metavar="D", help="of the weights, such as float32 (default: the checkpoint's)")
        add("--device", default="cpu", metavar="D", help="cpu (default) or cuda")
        add(
            "--quant",
            default="auto",
            metavar="Q",
            help="how weights are packed on a CPU: auto (as they are stored), q8_0, bf16, fp16, none, int8, int4",
        )
        if name == "generate":
            add_processes(parsers[name])
        add(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help="any setting of a generation, such as top_k=40 min_p=.05 stop='[\"END\"]' threshold='{\"8\": 0.9}'",
        )

    add_serve(parsers["serve"], _MODEL)
    add_stage(parsers["stage"], _MODEL)
    for name in ("generate", "chat", "serve", "export"):
        parsers[name].add_argument(
            "--adapter",
            nargs="+",
            action="extend",
            metavar="DIR",
            help="exits that were tuned on this model: one adapter or several (default: those beside the model)",
        )
        parsers[name].add_argument(
            "--allow-other-base", action="store_true", help="take exits that were tuned on other weights"
        )
    parsers["inspect"].add_argument("path", metavar="PATH", help="a model directory, an adapter, or a .gguf file")

    add = parsers["export"].add_argument
    add("source", metavar="SRC", help=f"{_MODEL}; or a tuning run's directory, or one of its checkpoints")
    add("directory", metavar="DIR", help="where to write")
    add("--dtype", metavar="D", help="of the weights written (default: as they are)")

    add_bench_serve(parsers["bench-serve"])

    add_schedule(parsers["schedule"])

    add = parsers["plot"].add_argument
    add("directory", metavar="RUN_DIR", help="the directory of a run, finished or not")
    add("--out", metavar="FILE", help="the picture, .png or .svg (default: curves.png in RUN_DIR)")

    add = parsers["demo"].add_argument
    add("--out", metavar="DIR", help="where the adapter and the pictures go (default: runs/demo)")
    add("--quick", action="store_true", help="a short version: less text, fewer steps, fewer prompts")
    return root, parsers


def _parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The verb and its function's arguments; an unknown word is refused with the nearest known one."""
    root, parsers = _parsers()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        raise UserError(f"unknown verb '{arguments[0]}'{nearest(arguments[0], VERBS)} (see exitlm --help)")
    found, unknown = root.parse_known_args(arguments)
    values = vars(found)
    verb = values.pop("verb")
    if unknown:
        flags = re.findall(r"--[a-z-]+", parsers[verb].format_usage())
        raise UserError(
            f"unknown argument '{unknown[0]}'{nearest(unknown[0].partition('=')[0], flags)} (see exitlm {verb} --help)"
        )
    return verb, values


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: that of this process) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal's encoding may lack characters of the text
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        verb = ""
        try:
            verb, values = _parse(sys.argv[1:] if arguments is None else arguments)
            return VERBS[verb](**values)
        except AlreadyTold:
            return 2
        except UserError as error:
            # torchrun gives all processes of a node the same words
            alike = not verb and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
            return 2 if alike else _refuse(str(error))
        except PipelineDown as error:
            return _refuse(str(error))
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output went away; leave quietly, as other programs do
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 141
            if error.errno not in _ENVIRONMENT:
                raise
            return _refuse(f"{error.strerror}{f': {error.filename}' if error.filename else ''}")
        except KeyboardInterrupt:
            return 130


def _refuse(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line, without the place in the source that raised it."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
