"""A run's settings fitted together, before anything is loaded: model, exits, layout, split, schedule, device, dtypes.

What can't work is refused here, saying what would. Nothing here talks to other processes or reads weights.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from exitlm.errors import UserError
from exitlm.model.config import ModelConfig
from exitlm.model.exits import ExitConfig, check_layers
from exitlm.parallel.mesh import Launch, Layout, stages_per_rank
from exitlm.parallel.pipeline.runner import SPLIT
from exitlm.parallel.pipeline.split import Split, StageCost, make_split, stage_costs
from exitlm.parallel.tensor import check_tensor
from exitlm.train.corpus import check_context, self_tokens
from exitlm.train.data import ByteTokenizer, TextTokenizer, Tokens
from exitlm.train.exits import automatic_candidates, default_layers, exit_configs, needs_final
from exitlm.train.initial import has_shape, model_config
from exitlm.train.metrics import check_trackers
from exitlm.train.plan import Geometry, geometry
from exitlm.train.precision import resolve_dtype
from exitlm.train.run import RunConfig
from exitlm.train.unread import set_back, unread_by_training
from exitlm.weights.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from exitlm.weights.load import device_of


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What settings mean for a model of a known shape: the exits are placed, ``auto`` is replaced, and everything that
    does not depend on the machine is decided. ``teacher``: exits learn from the final head."""

    config: RunConfig
    model: ModelConfig
    layout: Layout
    split: Split
    geometry: Geometry
    teacher: bool

    @property
    def exits(self) -> list[ExitConfig]:
        """The settings of every exit."""
        return exit_configs(self.config)

    @property
    def frozen(self) -> bool:
        """Whether only exits are trained."""
        return self.config.train.parameters == "exits"

    @property
    def recompute(self) -> bool:
        """Whether layers run again for their backward."""
        return self.config.train.recompute == "layers"

    def costs(self, *, recompute: bool | None = None) -> list[StageCost]:
        """What each stage computes and holds; ``recompute`` None is as the settings say."""
        return stage_costs(
            self.model,
            self.exits,
            self.split,
            self.config.data.seq_len,
            frozen=self.frozen,
            recompute=self.recompute if recompute is None else recompute,
            teacher=self.teacher,
        )

    def times(self, costs: Sequence[StageCost], *, useful: bool = False) -> tuple[list[float], list[float]]:
        """FLOPs per token of a forward and of a backward by stage. Deferred heads run in the backward, as do all of a
        frozen model, which sends its hidden states on before. ``useful`` leaves out what is done again."""
        how = self.config.objective.exit_forward
        late, twice = how == "deferred" or self.frozen, how == "checkpoint" and not useful
        return (
            [cost.layer_flops + (not late) * cost.head_flops for cost in costs],
            [cost.backward_flops + (late + twice) * cost.head_flops for cost in costs],
        )


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run on this machine. ``opened`` is the base, None for a new model; ``master`` is the dtype of parameters and
    optimizer, ``compute`` that of the work."""

    fit: Fit
    opened: Checkpoint | None
    tokens: Tokens
    device: torch.device
    compute: torch.dtype
    master: torch.dtype

    @property
    def out(self) -> Path:
        """The run's directory."""
        return Path(self.fit.config.checkpoint.dir)


def resolve(config: RunConfig, launch: Launch) -> Setup:
    """Check a run's settings against each other, and against the number of processes.

    Raises:
        UserError: the first thing that can't work, and what would.
    """
    config.check()
    p = config.parallel
    if self_tokens(config) is not None:
        raise UserError("text that the model writes itself is for exitlm tune on one process; name files in data.files")
    world = p.data * p.tensor * p.pipeline
    if world != launch.world:
        raise UserError(
            f"parallel.data x tensor x pipeline is {p.data} x {p.tensor} x {p.pipeline} = {world}, but there "
            f"{'is 1 process' if launch.world == 1 else f'are {launch.world} processes'}; start "
            f"{world} (torchrun --nproc-per-node {world} -m exitlm ...), or change [parallel]"
        )
    if config.train.parameters == "exits" and not config.model.base:
        raise UserError("train.parameters is 'exits', which are tuned on a model that is there: set model.base")
    config = set_back(config, unread_by_training(config), RunConfig())
    opened, tokens = _opened(config)
    model = opened.model_config if opened is not None else model_config(config, tokens.size, tokens.eos_id)
    device = _device(config.model.device, launch)
    compute = resolve_dtype(config.train.dtype, device, torch.float32)
    name: Any = str(compute).removeprefix("torch.")
    config = replace(
        config,
        model=replace(config.model, base=_from_anywhere(config.model.base)),
        data=replace(config.data, tokenizer=_from_anywhere(config.data.tokenizer)),
        train=replace(config.train, dtype=name),
    )
    found = fit(config, model)
    config = found.config
    if config.train.warmup > config.train.steps:
        warnings.warn(f"train.warmup is cut to the {config.train.steps} steps of the run", stacklevel=2)
    if p.schedule != "filled" and not p.fill_warmup == p.fill_cooldown == "auto":
        warnings.warn(f"parallel.fill_* has no effect on schedule '{p.schedule}'", stacklevel=2)
    if found.frozen and p.pipeline > 1 and p.schedule != "1f1b":
        warnings.warn(
            f"parallel.schedule '{p.schedule}' has no effect on a frozen model: its exits have a pipeline of their own",
            stacklevel=2,
        )
    if any(e.gate for e in found.exits) and config.objective.gate == 0.0:
        warnings.warn("nothing trains the gates of exits.gate; set objective.gate, to 1.0 for example", stacklevel=2)
    if config.objective.candidate_loss and not found.frozen:  # there it is a default of exitlm tune
        warnings.warn(
            "objective.candidate_loss is for exitlm tune on one process, and has no effect here", stacklevel=2
        )
    check_trackers(config.logging)
    return Setup(
        fit=found,
        opened=opened,
        tokens=tokens,
        device=device,
        compute=compute,
        master=torch.promote_types(compute, torch.float32),
    )


def _from_anywhere(name: str) -> str:
    """A path that the run can be gone on with, and exported, from any directory; other names as they are."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if name not in ("", "bytes") and path.exists() else name


def fit(config: RunConfig, model: ModelConfig) -> Fit:
    """Fit settings to a model.

    Raises:
        UserError: what can't work together.
    """
    check_context(config.data.seq_len, model)
    config = _with_exits(config, model)
    p, t, o = config.parallel, config.train, config.objective
    exits, frozen, teacher = exit_configs(config), t.parameters == "exits", needs_final(config)
    if not config.checkpoint.dir:
        raise UserError("checkpoint.dir is not set: name a directory for the run")
    if 0 < t.spike <= 1:
        raise UserError(f"train.spike is {t.spike:g}, which skips usual steps; give more than 1, or 0 for none")
    if t.seed >= 1 << 32:
        raise UserError(f"train.seed is {t.seed}, but must be less than 2**32")
    check_heads(exits, model)
    ends = [o.weight, o.weight_init] if o.warmup_steps else [o.weight]
    trains_exits = bool(exits) and any(any(w) if isinstance(w, tuple) else w for w in ends)
    trains_gates = o.gate > 0.0 and any(e.gate for e in exits)
    if not (trains_exits or trains_gates or (o.final and not frozen)):
        raise UserError(
            "every head's loss has weight 0, so that nothing is trained; raise objective.weight"
            f"{'' if frozen else ' or objective.final'}"
        )
    if o.rotate_exits > max(1, len(exits)):
        raise UserError(
            f"objective.rotate_exits is {o.rotate_exits}, but there are {len(exits)} exits; use at most that, or 0"
        )
    if teacher and o.exit_forward != "deferred":
        raise UserError(
            f"objective.exit_forward is '{o.exit_forward}', but exits that learn from the final head (distill, gate) "
            "need 'deferred', where its features come back with the gradient"
        )
    for e in exits:
        if e.candidates and e.output != "shared" and p.tensor > 1:
            raise UserError(
                f"exit {e.layer}: candidates with an output matrix of its own need parallel.tensor = 1; use output "
                "'shared', or candidates = 0"
            )
    if frozen and all(e.kind == "embed" and e.output == "shared" and not e.gate for e in exits):
        raise UserError("these exits have nothing to tune (kind 'embed' with a shared matrix); choose another kind")
    if t.compile and (p.tensor > 1 or (p.pipeline > 1 and not frozen and p.schedule in SPLIT)):
        raise UserError(
            "train.compile can't be used with parallel.tensor > 1 or a schedule that splits the backward "
            "(zero_bubble, zbv); set it to false, or use parallel.tensor = 1 and schedule '1f1b'"
        )
    check_tensor(model, exits, p.tensor, p.sequence, config.data.seq_len)
    layout = Layout(
        data=p.data,
        tensor=p.tensor,
        pipeline=p.pipeline,
        sequence=p.sequence and p.tensor > 1,
        shard=p.shard,
        schedule="1f1b" if frozen or p.pipeline == 1 else p.schedule,
        stages_per_rank=1 if frozen else stages_per_rank(p.schedule, p.pipeline, p.stages_per_rank),
    )
    split = make_split(
        model,
        exits,
        layout.stages,
        place=config.exits.place,
        layers_per_stage=p.layers_per_stage,
        depth=max(e.layer for e in exits) if frozen and not teacher else None,
        seq_len=config.data.seq_len,
        frozen=frozen,
        recompute=t.recompute == "layers",
        teacher=teacher,
    )
    cut = geometry(config, layout, split, frozen=frozen, teacher=teacher)
    return Fit(config=config, model=model, layout=layout, split=split, geometry=cut, teacher=teacher)


def _opened(config: RunConfig) -> tuple[Checkpoint | None, Tokens]:
    """The base and the tokenizer."""
    base, name = config.model.base, config.data.tokenizer
    if base and has_shape(config.model) and not Path(base).exists():
        warnings.warn("model.base is used, and the shape in [model] is not", stacklevel=2)
    if not base and not has_shape(config.model):
        raise UserError("there is no model: set model.base, or the shape of a new one (model.hidden_size, ...)")
    opened = open_checkpoint(base) if base else None
    if name == "bytes" or (not name and opened is None):
        return opened, ByteTokenizer()
    found = tokenizer_in(name) if name else opened.tokenizer() if opened is not None else None
    if found is None:
        raise UserError(
            f"{name or base} came without a tokenizer; give one with data.tokenizer (a directory, or 'bytes')"
        )
    return opened, TextTokenizer(found)


def tokenizer_in(name: str) -> Any:
    """The tokenizer of a directory, as ``data.tokenizer`` names it.

    Raises:
        UserError: it is not there, or can't be loaded.
    """
    if not Path(name).exists():
        raise UserError(f"data.tokenizer {name} does not exist; give a directory with a tokenizer, or 'bytes'")
    return load_tokenizer(Path(name))


def _with_exits(config: RunConfig, model: ModelConfig) -> RunConfig:
    """The settings with what the model decides: the exits' places, and what ``auto`` means."""
    depth, t = model.num_hidden_layers, config.train
    layers = config.exits.layers
    if not layers and t.parameters == "exits":
        layers = default_layers(depth)  # a frozen model is there for its exits
    check_layers(layers, depth)
    if list(layers) != sorted(layers):
        raise UserError(f"exits {list(layers)} are not in ascending order; write {sorted(layers)}")
    if not layers:
        lists = {f"exits.{f.name}": getattr(config.exits, f.name) for f in fields(config.exits) if f.name != "layers"}
        lists |= {f"objective.{name}": getattr(config.objective, name) for name in ("weight", "weight_init")}
        for key, many in lists.items():
            if isinstance(many, tuple):
                raise UserError(f"{key} has {len(many)} values for 0 exits; give one value, or name exits.layers")
    inits = config.exits.init if isinstance(config.exits.init, tuple) else (config.exits.init,)
    if "closed_form" in inits:
        raise UserError("exits.init 'closed_form' is for exitlm tune on one process; use 'identity' or 'copy'")
    chosen: Any = tuple("copy" if init == "auto" else init for init in inits)
    given = config.exits.candidates
    many = automatic_candidates(model.vocab_size)
    candidates: Any = tuple(many if n == -1 else n for n in (given if isinstance(given, tuple) else (given,)))
    resolved = replace(
        config,
        exits=replace(
            config.exits,
            layers=tuple(layers),
            init=chosen if isinstance(config.exits.init, tuple) else chosen[0],
            candidates=candidates if isinstance(given, tuple) else candidates[0],
        ),
    )
    resolved.check()
    return resolved


def check_heads(exits: Sequence[ExitConfig], model: ModelConfig) -> None:
    """Refuse heads that do not fit a model.

    Raises:
        UserError: more candidates than tokens, a rank above the hidden size, or one matrix for different candidates.
    """
    for e in exits:
        if e.candidates > model.vocab_size:
            raise UserError(
                f"exit {e.layer}: {e.candidates} candidates, but the vocabulary has {model.vocab_size} tokens; use "
                "fewer"
            )
        if e.output == "low_rank" and e.rank > model.hidden_size:
            raise UserError(
                f"exit {e.layer}: rank {e.rank} exceeds the hidden size {model.hidden_size}; use a smaller one"
            )
    sharing = {e.candidates for e in exits if e.output == "exits"}
    if len(sharing) > 1:
        raise UserError(
            f"exits with output 'exits' share one matrix, but have {sorted(sharing)} candidates; give all the same"
        )


def _device(name: str, launch: Launch) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = device_of(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", launch.local_rank)
        if launch.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"this is process {launch.local_rank} of a node with {torch.cuda.device_count()} GPUs; start one "
                "process per GPU"
            )
        torch.cuda.set_device(device)
    return device
