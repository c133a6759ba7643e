"""Models with exits that are cut over tensor ranks, drawn at random and compared with the whole ones. Not a test.

:func:`compare` is what the processes of a launch run: each of them has both the whole model and its part of it.
"""

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from exitlm.decode.kernels.fused import FusedModel
from exitlm.decode.kernels.runner import Runner
from exitlm.decode.kernels.scores import Scores
from exitlm.decode.kernels.tensor_model import TensorModel
from exitlm.model import EarlyExitModel, ModelConfig
from exitlm.model.exits import ExitConfig
from tests.decode.driver import Driver, make_runner
from tests.decode.models import attach, random_ids, worst
from tests.model.families import FAMILIES, convert, tiny_hf_config, tiny_hf_model, tiny_model
from tests.model.test_parity import random_config
from tests.parallel.launch import launch

TOLERANCE = 1e-12
KINDS = ("embed", "norm", "mlp", "block", "lens")
OUTPUTS = ("shared", "own", "exits", "low_rank")


def cuttable() -> tuple[str, ...]:
    """The families that training cuts."""
    configs = {family: ModelConfig.from_hf(tiny_hf_config(family).to_dict()) for family in FAMILIES}
    return tuple(name for name, c in configs.items() if c.qk_norm != "full" and not c.fused_projections)


@dataclass(frozen=True, kw_only=True)
class TensorCase:
    """A model and its exits, and more exits of a second adapter. ``settings`` are those of ``tiny_hf_config``."""

    family: str
    exits: tuple[ExitConfig, ...]
    more: tuple[ExitConfig, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    quant: str = "none"
    compile: str = "none"
    dtype: torch.dtype = torch.float64
    tolerance: float = TOLERANCE
    length: int = 17

    def model(self) -> EarlyExitModel:
        """The whole model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = convert(tiny_hf_model(self.family, self.seed, **self.settings), torch.float64)
        attach(made, self.exits, self.seed)
        if self.more:
            other = attach(tiny_model("llama", **sizes_of(made.config)), self.more, self.seed + 1)
            made.add_adapters({"second": other.exit_heads()})
        return made.to(self.dtype)


def sizes_of(config: ModelConfig) -> dict[str, Any]:
    """Settings of a model whose exits fit ``config``."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


def drawn(seed: int, ranks: int) -> TensorCase:
    """A random family, random sizes that so many ranks can share, and random exits."""
    rng = random.Random(f"tensor {seed} {ranks}")
    family = rng.choice(cuttable())
    while True:
        settings = random_config(family, rng, 17)
        if all(settings[name] % ranks == 0 for name in ("num_key_value_heads", "intermediate_size")):
            break
    settings["vocab_size"] = rng.choice((97, 98, 100, 101))
    depth = settings["num_hidden_layers"]
    shared_candidates = rng.choice((0, 17, 40))
    exits = [
        ExitConfig(
            layer=layer,
            kind=(kind := rng.choice(KINDS)),
            output=(output := rng.choice(OUTPUTS)),
            rank=5,
            candidates=shared_candidates if output == "exits" else rng.choice((0, 0, 3, 17, 40)),
            gate=rng.random() < 0.4,
            branch=kind == "lens" and rng.random() < 0.4,
            init=rng.choice(("copy", "random")),
        )
        for layer in sorted(rng.sample(range(1, depth + 1), rng.randint(1, depth)))
    ]
    return TensorCase(
        family=family, exits=tuple(exits), settings=settings, seed=seed, compile=rng.choice(("none", "none", "static"))
    )


def read(scores: Scores) -> Tensor:
    """Best row, finiteness and largest probability of every row, ``[M, 3]``."""
    likely = scores.probability or torch.softmax(scores.logits_MK.double(), -1).amax(-1).tolist()
    return torch.tensor([scores.best, scores.finite, likely], dtype=torch.float64).T


@torch.no_grad()
def passes(runner: Runner, ids: Sequence[int]) -> dict[str, Any]:
    """All that a runner finds in passes of one and of several rows that stop at every boundary: exit and final logits,
    the scores' best rows, gates, hidden states, and at last keys and values by entry."""
    driver, found, at = Driver(runner, total=len(ids)), dict[str, Any](), 4
    driver.prefill(ids[:at])
    for size in (1, 5, 1, len(ids) - at - 7):
        driver.enter(ids[at : at + size])
        at += size
        for boundary in range(1, runner.segments):
            arrived = driver.advance([], boundary)
            found[f"hidden at {boundary} of {at}"] = arrived.hidden_MD
            for adapter, layer in runner.fused.heads:
                if layer != runner.bounds[boundary]:
                    continue
                name, head = f"{adapter} {layer} at {at}", runner.head(boundary, adapter)
                scores = runner.exit_scores(boundary, arrived, range(size), adapter)
                found[f"logits of {name}"] = scores.logits_MK
                found[f"digest of {name}"] = read(
                    runner.exit_scores(boundary, arrived, range(size), adapter, logits=False)
                )
                found[f"tokens of {name}"] = [head.token(best) for best in scores.best]
                found[f"newest of {name}"] = runner.exit_logits(boundary, arrived, [size - 1], adapter)
                if head.has_gate:
                    found[f"gates of {name}"] = torch.tensor(runner.gates(boundary, arrived, range(size), adapter))
        arrived = driver.advance([])
        found[f"final logits of {at}"] = runner.final_logits(arrived, range(size))
        final = runner.final_scores(arrived, range(size))
        found[f"final tokens of {at}"] = final.best
        found[f"final digest of {at}"] = read(runner.final_scores(arrived, range(size), logits=False))
    never = {head.entry for (_, layer), head in runner.fused.heads.items() if layer == runner.bounds[-1]}
    for entry in set(range(len(runner.fused.entries()))) - never:  # an exit at the last layer is none while decoding
        found[f"keys and values of {entry}"] = driver.stored(entry)
    return found


def compare(cases: Sequence[TensorCase]) -> list[str]:
    """What differs between the whole model and its parts, in words; run by every process."""
    warnings.simplefilter("ignore")
    rank, wrong, group = dist.get_rank(), [], dist.group.WORLD
    assert group is not None
    for case in cases:
        model, ids = case.model(), random_ids(case.length, case.seed)
        whole = make_runner(FusedModel(model, case.quant, case.compile), 64)
        part = make_runner(TensorModel(model, case.quant, case.compile, group=group), 64)
        expected, found = passes(whole, ids), passes(part, ids)
        heads = part.pool.stores[0].shape[1]
        assert heads * dist.get_world_size() == whole.pool.stores[0].shape[1]
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            got = found[name]
            if not isinstance(value, Tensor):
                if value != got:
                    wrong.append(f"rank {rank} of {case}: {name}: {got} and not {value}")
                continue
            if name.startswith("keys"):
                value = value[:, rank * heads : (rank + 1) * heads]
            if got.shape != value.shape or got.dtype != value.dtype:
                wrong.append(f"rank {rank} of {case}: {name} is {got.dtype} {tuple(got.shape)}")
            elif (error := worst(got, value)) > case.tolerance:
                wrong.append(f"rank {rank} of {case}: {name}: {error:.1e}")
    return wrong


def run_cases(ranks: int, cases: Sequence[TensorCase]) -> None:
    """Compare all cases in one launch.

    Raises:
        AssertionError: what differs, and in which case.
    """
    wrong = sorted({what for out in launch(ranks, compare, cases) for what in out})
    assert not wrong, "\n".join(wrong[:20])
