"""What a run needs, before it runs: parameters, memory and work of each pipeline rank, and the time its schedule loses.

Everything is counted from the settings, by formula; no weight is allocated and nothing is measured. Work is the FLOPs
of matrix products (``exitlm.parallel.pipeline.split``), time the simulation of the schedule with each stage's own work
(``schedule.py``), without communication; seconds need a speed that the caller assumes. The formulas for memory are in
``memory.py``. Not here: anything that trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exitlm.errors import UserError
from exitlm.model.config import ModelConfig
from exitlm.parallel.mesh import Layout
from exitlm.parallel.pipeline.schedule import make, simulate
from exitlm.parallel.pipeline.split import Split, make_split, stage_costs
from exitlm.tables import aligned, scaled
from exitlm.train.data import ByteTokenizer
from exitlm.train.initial import has_shape, model_config
from exitlm.train.memory import Memory, MemoryModel
from exitlm.train.run import RunConfig
from exitlm.train.setup import fit, tokenizer_in
from exitlm.weights.checkpoint import open_checkpoint, read_json
from exitlm.weights.source import PACKAGED

_BYTES: Mapping[str, int] = {"auto": 2, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class RankEstimate:
    """One pipeline rank; all its tensor and data ranks are alike. ``layers`` (0-based, a range per stage) and ``exits``
    (1-based) are those it runs, ``parameters`` those of one process before they are sharded over data ranks, and
    ``flops`` the work of one process in a step."""

    layers: tuple[range, ...]
    exits: tuple[int, ...]
    has_embedding: bool
    has_final_head: bool
    head_matrices: int
    parameters: int
    memory: Memory
    flops: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run needs.

    ``parameters`` are those of the model with its exits, each once; the optimizer has ``trained`` of them. A step has
    ``microbatches`` on each data rank, and ``extra`` partial ones in the bubbles of a filled schedule; ``tokens`` and
    ``extra_tokens`` are those of a step, on all ranks. ``makespan`` is a step's time in FLOPs that one process could
    do meanwhile, ``baseline`` the same without filled bubbles, ``utilisation`` the share that is work. ``tflops``: the
    assumed speed of a process, or None.
    """

    layout: Layout
    split: Split
    parameters: int
    trained: int
    steps: int
    microbatch: int
    microbatches: int
    extra: int
    tokens: int
    extra_tokens: int
    makespan: float
    baseline: float
    utilisation: float
    ranks: tuple[RankEstimate, ...]
    tflops: float | None = None

    @property
    def flops(self) -> float:
        """The work of a step, of all processes together."""
        return sum(rank.flops for rank in self.ranks) * self.layout.tensor * self.layout.data

    @property
    def seconds(self) -> float | None:
        """The time of a step at the assumed speed."""
        return None if self.tflops is None else self.makespan / (self.tflops * 1e12)


def estimate(config: RunConfig, *, tflops: float | None = None) -> Estimate:
    """What the run of ``config`` needs. ``tflops``: the speed of one process to assume, in 1e12 FLOPs per second; None
    leaves seconds out. ``auto`` dtypes count as bfloat16.

    Raises:
        UserError: settings that can't work together, or a base whose shape can't be known here.
    """
    config.check()
    if tflops is not None and not 1e-9 <= tflops <= 1e9:
        raise UserError(f"the assumed speed is {tflops} TFLOP/s, but must be a positive number")
    found = fit(config, model_shape(config))
    config, model, exits, layout, split = found.config, found.model, found.exits, found.layout, found.split
    p, t, seq_len = config.parallel, config.train, config.data.seq_len
    frozen, recompute, teacher = found.frozen, found.recompute, found.teacher
    costs, made = found.costs(), found.geometry.schedule
    extra = made.filled_warmup + made.filled_cooldown
    microbatches, tokens = len(made.spans) - extra, t.microbatch * seq_len
    forward, backward = ([flops * tokens / p.tensor for flops in side] for side in found.times(costs))
    timeline = simulate(made, forward, backward)
    plain = simulate(make("1f1b", layout.pipeline, microbatches), forward, backward) if extra else timeline
    memory = MemoryModel(
        model=model,
        exits=exits,
        split=split,
        costs=costs,
        layout=layout,
        tokens=tokens,
        compute=_BYTES[t.dtype],
        master=max(4, _BYTES[t.dtype]),
        backbone=_BYTES[config.model.dtype],
        device="cpu" if config.model.device == "cpu" else "cuda",
        exit_forward=config.objective.exit_forward,
        frozen=frozen,
        recompute=recompute,
        teacher=teacher,
        accumulates=len(made.spans) > 1,
    )
    (whole,) = stage_costs(model, exits, make_split(model, exits, 1, place="end"), frozen=frozen)
    ranks = []
    for rank in range(layout.pipeline):
        mine = layout.stages_of(rank)
        ranks.append(
            RankEstimate(
                layers=tuple(split.layers(stage) for stage in mine),
                exits=tuple(sorted(e for stage in mine for e in split.exits(stage))),
                has_embedding=any(costs[stage].has_embedding for stage in mine),
                has_final_head=any(costs[stage].has_final_head for stage in mine),
                head_matrices=sum(costs[stage].head_matrices for stage in mine),
                parameters=round(sum(memory.per_process(costs[s].parameters, costs[s].whole) for s in mine)),
                memory=memory.of_rank(rank, made),
                flops=sum(event.end - event.start for event in timeline.ranks[rank]),
            )
        )
    return Estimate(
        layout=layout,
        split=split,
        parameters=whole.parameters,
        trained=whole.trained,
        steps=t.steps,
        microbatch=t.microbatch,
        microbatches=microbatches,
        extra=extra,
        tokens=t.global_batch * seq_len,
        extra_tokens=extra * tokens * layout.data,
        makespan=timeline.makespan,
        baseline=plain.makespan,
        utilisation=timeline.utilisation,
        ranks=tuple(ranks),
        tflops=tflops,
    )


def model_shape(config: RunConfig) -> ModelConfig:
    """The shape of the model of a run: that of the base where it is on this machine, else what the shape keys say.

    Raises:
        UserError: neither is there, or a key is wrong.
    """
    m = config.model
    found = _base(m.base) if m.base else None
    if found is None and m.base and not has_shape(m):
        raise UserError(
            f"model.base '{m.base}' is not on this machine; download it, or give its shape beside it (model.family, "
            "model.hidden_size, ...) for a dry run"
        )
    return found or model_config(config, _vocab_size(config))


def _base(name: str) -> ModelConfig | None:
    """The configuration of a directory, a .gguf file, a packaged model, or a hub id that was downloaded before."""
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelConfig.from_hf(read_json(path / "config.json"))
    if name in PACKAGED or path.exists():
        return open_checkpoint(name).model_config
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return ModelConfig.from_hf(read_json(Path(cached))) if isinstance(cached, str) else None


def _vocab_size(config: RunConfig) -> int:
    """That of the tokenizer, or what the settings say where it is not on this machine."""
    name, said = config.data.tokenizer, config.model.vocab_size
    if name in ("", "bytes"):
        return ByteTokenizer.size
    return said if said and not Path(name).exists() else len(tokenizer_in(name))


# ---- in words


def show(estimate: Estimate) -> None:
    """Print it: what the run is, and a line for each pipeline rank."""
    e, layout = estimate, estimate.layout
    exits = ", ".join(map(str, e.split.owners)) or "no layer"
    ranks = f"data {layout.data} x tensor {layout.tensor} x pipeline {layout.pipeline}"
    length = e.tokens // (e.microbatches * e.microbatch * layout.data)
    print(f"model  {scaled(e.parameters)} parameters, {scaled(e.trained)} of them trained; exits after {exits}")
    batch = f"{e.microbatches} x {e.microbatch} x {length} tokens a step"
    print(f"ranks  {layout.world} = {ranks}; each data rank has {batch}")
    print(f"step   {scaled(e.tokens)} tokens, {scaled(e.flops)}FLOP")
    if e.extra:
        more = f"{scaled(e.extra_tokens)} tokens, {e.extra_tokens / e.tokens:.1%} of the batch"
        print(f"       and {e.extra} partial microbatches on each data rank ({more}) in the bubbles")
    print(f"run    {e.steps} steps, {scaled(e.steps * e.tokens)} tokens, {scaled(e.steps * e.flops)}FLOP")
    longer = f"; filling makes it {e.makespan / e.baseline - 1:.1%} longer" if e.extra else ""
    print(f"time   {scaled(e.makespan)}FLOP per process and step, {1 - e.utilisation:.1%} of it bubbles{longer}")
    if e.tflops is not None and e.seconds is not None:
        speed = f"{e.seconds:.3g} s per step, {scaled(e.tokens / e.seconds)} tokens/s"
        print(f"       assuming {e.tflops:g} TFLOP/s per process: {speed}, {e.seconds * e.steps / 3600:.3g} hours")
    rows = [["rank", "layers", "exits", "V x D", "parameters", "FLOP", "waiting", *_KINDS, "GiB"]]
    rows += [[str(index), *_row(rank)] for index, rank in enumerate(e.ranks)]
    print("\n".join(aligned(rows)))
    print(
        "V x D: matrices of embedding (in) and heads (out); parameters: of one process, before sharding; waiting: the"
    )
    print("most microbatches that wait for their backward; weights to GiB: memory of one process, by formula")


_KINDS = ("weights", "gradients", "AdamW", "activations", "heads")


def _row(rank: RankEstimate) -> list[str]:
    m = rank.memory
    sizes = (m.weights, m.gradients, m.optimizer, m.activations, m.heads, m.total)
    return [
        " ".join(f"{layers.start + 1}-{layers.stop}" for layers in rank.layers),
        " ".join(map(str, rank.exits)) or "-",
        " + ".join(["in"] * rank.has_embedding + [f"{rank.head_matrices} out"] * (rank.head_matrices > 0)),
        scaled(rank.parameters),
        scaled(rank.flops),
        str(m.waiting),
        *(f"{size / 2**30:.2f}" for size in sizes),
    ]
