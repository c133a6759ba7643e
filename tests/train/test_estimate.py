"""What a run needs: counts equal those of real modules, formulas those of autograd, and the published runs work."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel
from exitlm.model.exits import ExitHead
from exitlm.parallel.pipeline.stage import Stage
from exitlm.train.estimate import Estimate, estimate, model_shape, show
from exitlm.train.exits import exit_configs
from exitlm.train.run import TRAINING, RunConfig

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = sorted(path.name for path in [*CONFIGS.glob("pretrain-*.toml"), *CONFIGS.glob("tune-*b.toml")])
SMALL: dict[str, dict[str, Any]] = {
    "model": {
        "family": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 500,
    },
    "exits": {"layers": [2, 4]},
    "data": {"files": ["corpus.jsonl"], "seq_len": 128},
    "train": {"global_batch": 16, "microbatch": 2, "steps": 10},
}


def run(**sections: dict[str, Any]) -> RunConfig:
    """The small run, changed by sections."""
    tree = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}}
    return RunConfig.from_dict(tree, TRAINING)


def published(name: str, *overrides: str) -> RunConfig:
    return RunConfig.from_toml(CONFIGS / name, TRAINING).with_overrides(overrides)


def real(config: RunConfig) -> EarlyExitModel:
    """The model of a run, without weights."""
    with torch.device("meta"):
        model = EarlyExitModel(model_shape(config))
        for e in exit_configs(config):
            head = ExitHead(e, model.config)
            model._share_output(head, [*model.exit_heads().values()])
            model.exits[str(e.layer)] = head
    return model


def attached(*_: Any) -> Any:
    raise AssertionError


COUNTED = [
    run(),
    run(model={"tie_word_embeddings": True}, parallel={"pipeline": 4}),
    run(exits={"layers": [1, 3, 5, 8], "kind": ["mlp", "block", "lens", "embed"], "output": "exits"}),
    run(
        exits={"output": "own", "kind": "mlp", "place": "end"}, train={"parameters": "exits"}, parallel={"pipeline": 2}
    ),
    run(objective={"distill": 0.5}, parallel={"pipeline": 4, "schedule": "zbv"}),
    published("pretrain-7b.toml"),
    published("tune-13b.toml"),
]


@pytest.mark.parametrize("config", COUNTED, ids=range(len(COUNTED)))
def test_the_counts_are_those_of_the_modules(config: RunConfig) -> None:
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, tensor=1))
    found, model = estimate(config), real(config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    frozen = config.train.parameters == "exits"
    trained = model.exit_parameters() if frozen else model.parameters()
    assert found.trained == sum(p.numel() for p in trained)
    carries = config.objective.distill > 0
    for rank, of_rank in enumerate(found.ranks):
        with torch.device("meta"):
            stages = [
                Stage(model.config, exit_configs(config), found.split, stage, attached, carries=carries)
                for stage in found.layout.stages_of(rank)
            ]
        assert of_rank.parameters == sum(p.numel() for stage in stages for p in stage.parameters())


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_layer_keeps_what_autograd_keeps(kv_heads: int) -> None:
    config = run(model={"num_key_value_heads": kv_heads, "num_hidden_layers": 1}, exits={"layers": [1]})
    model = EarlyExitModel(model_shape(config))
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.randn(2, 128, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.layers["0"](hidden, model.context_for(2, 128))
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert estimate(config).ranks[0].memory.activations == pytest.approx(size, rel=0.05)


def test_how_many_microbatches_wait() -> None:
    def waiting(schedule: str, **more: Any) -> list[int]:
        found = estimate(run(parallel={"pipeline": 4, "schedule": schedule} | more))
        return [rank.memory.waiting for rank in found.ranks]

    assert waiting("1f1b") == [4, 3, 2, 1]
    assert waiting("gpipe") == [8, 8, 8, 8]
    assert waiting("filled") == [5, 4, 2, 1]  # one top microbatch, to stage 1: the first with an exit
    assert waiting("filled", layers_per_stage=[5, 1, 1, 1]) == [6, 4, 2, 1]  # exits on stage 0: both top ones
    assert waiting("filled", fill_warmup=0) == [4, 3, 2, 1]
    assert len(waiting("interleaved", pipeline=2, stages_per_rank=4)) == 2


def test_memory_follows_the_layout() -> None:
    one = estimate(run(train={"dtype": "bfloat16"})).ranks[0]
    two = estimate(run(train={"dtype": "bfloat16"}, parallel={"data": 2})).ranks[0]
    whole = estimate(run(train={"dtype": "bfloat16"}, parallel={"data": 2, "shard": False})).ranks[0]
    assert one.memory.optimizer == 8 * one.parameters
    assert one.memory.gradients == 4 * one.parameters
    assert (two.memory.optimizer, whole.memory.optimizer) == (4 * one.parameters, 8 * one.parameters)
    assert one.memory.weights - two.memory.weights == 2 * one.parameters
    cut = estimate(run(train={"dtype": "bfloat16"}, parallel={"tensor": 2})).ranks[0]
    assert cut.parameters == (one.parameters + (2 * 8 + 3) * 64) / 2  # but for the norms
    assert one.memory.activations / 2 < cut.memory.activations < one.memory.activations
    uncut = estimate(run(train={"dtype": "bfloat16"}, parallel={"tensor": 2, "sequence": False})).ranks[0]
    assert uncut.memory.activations - cut.memory.activations == 8 * 4 * 64 / 2 * 256 * 2
    again = estimate(run(train={"recompute": "layers"}, parallel={"pipeline": 4})).ranks[0]
    kept = estimate(run(parallel={"pipeline": 4})).ranks[0]
    assert again.memory.activations < kept.memory.activations / 3
    assert again.flops == kept.flops * 4 / 3


def test_logits_wait_only_where_exits_are_eager() -> None:
    def of(how: str) -> Estimate:
        return estimate(run(objective={"exit_forward": how}, parallel={"pipeline": 4}))

    eager, twice, deferred = (of(how) for how in ("eager", "checkpoint", "deferred"))
    assert eager.split.owners == {2: 1, 4: 2}
    logits, features = 256 * 500 * 4, 256 * 3 * 64 * 4
    grown = eager.ranks[1].memory.activations - deferred.ranks[1].memory.activations
    assert grown == 3 * (logits + features)
    assert twice.ranks[1].memory.activations == deferred.ranks[1].memory.activations
    assert twice.flops > deferred.flops == eager.flops


def test_time() -> None:
    alone = estimate(run(), tflops=2.0)
    assert alone.utilisation == pytest.approx(1.0)
    assert alone.flops == pytest.approx(alone.makespan)
    assert alone.seconds == pytest.approx(alone.flops / 2e12)
    assert alone.tokens == 16 * 128
    layers = 2 * (8 * (64 * (2 * 64 + 2 * 32) + 3 * 64 * 96) + 3 * 64 * 500) + 8 * 4 * 64 * 129 / 2
    assert alone.flops == pytest.approx(3 * layers * alone.tokens)
    piped = estimate(run(parallel={"pipeline": 4, "data": 2}))
    assert piped.flops == pytest.approx(alone.flops)
    assert piped.microbatches == 4
    assert 0.4 < piped.utilisation < 4 / 7  # 4 microbatches of 4 + 3, and stages that are not quite even
    assert piped.seconds is None


def test_filled_bubbles_enlarge_the_batch() -> None:
    plain = estimate(run(parallel={"pipeline": 4}))
    found = estimate(run(parallel={"pipeline": 4, "schedule": "filled"}))
    assert (found.extra, found.extra_tokens, found.tokens) == (3, 3 * 2 * 128, plain.tokens)
    assert found.baseline == pytest.approx(plain.makespan)
    assert found.makespan == pytest.approx(plain.makespan, rel=0.05)
    assert found.utilisation > plain.utilisation
    assert found.flops > plain.flops


def test_tuning_runs_what_it_must() -> None:
    """A frozen model: only taps wait, optimizer and backward for exits alone, no layer above the last exit."""
    tuned = {"train": {"parameters": "exits"}, "exits": {"output": "own"}, "parallel": {"pipeline": 2}}
    found = estimate(run(**tuned))
    assert found.split.bounds[-1] == 4
    assert [rank.memory.waiting for rank in found.ranks] == [1, 1]
    assert not any(rank.has_final_head for rank in found.ranks)
    head = 64 + 64 * 500
    assert found.trained == 2 * head
    assert [rank.memory.optimizer for rank in found.ranks] == [8 * head, 8 * head]
    taught = estimate(run(**tuned, objective={"distill": 1.0}))
    assert taught.split.bounds[-1] == 8
    assert taught.ranks[-1].has_final_head
    assert [rank.memory.waiting for rank in taught.ranks] == [2, 1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.perf_counter()
    found = estimate(published(name), tflops=100.0)
    show(found)
    assert time.perf_counter() - started < 2.0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[0] in "0123" for line in lines) == found.layout.pipeline == 4
    assert all(rank.memory.total < 80 * 2**30 for rank in found.ranks)
    size = float(name.split("-")[1].removesuffix("b.toml"))
    backbone = found.parameters - (found.trained if name.startswith("tune") else 0)
    assert backbone == pytest.approx(size * 1e9, rel=0.1)
    matrices = [rank.head_matrices for rank in found.ranks]
    assert matrices == ([2, 2, 2, 2] if name.startswith("tune") else [0, 1, 1, 1])
    assert [rank.has_embedding for rank in found.ranks] == [True, False, False, False]
    layers = found.split.bounds[-1]
    assert found.split.bounds == tuple(layers * k // 4 for k in range(5))
    assert found.steps * found.tokens == pytest.approx(
        {"tune": 1.31e9, "pretrain": 302e9 if size == 1.3 else 805e9}[name.split("-")[0]], rel=0.01
    )


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show(estimate(published("pretrain-7b.toml", "parallel.schedule=filled"), tflops=200.0))
    text = capsys.readouterr().out
    assert "6.95 G parameters, 6.95 G of them trained; exits after 8, 16" in text
    assert "64 = data 16 x tensor 1 x pipeline 4; each data rank has 64 x 2 x 2048 tokens a step" in text
    assert "3 partial microbatches on each data rank (197 k tokens, 4.7% of the batch) in the bubbles" in text
    assert "assuming 200 TFLOP/s per process" in text
    show(estimate(published("pretrain-7b.toml")))
    assert "assuming" not in capsys.readouterr().out


def test_the_shape_of_a_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 6,'
        ' "num_attention_heads": 4, "intermediate_size": 96}'
    )
    assert estimate(run(model={"base": str(tmp_path)})).split.bounds == (0, 6)
    assert estimate(run(model={"base": "someone/not-here"})).split.bounds == (0, 8)
    with pytest.raises(UserError, match="is not on this machine; download it, or give its shape"):
        estimate(RunConfig.from_dict({**SMALL, "model": {"base": "someone/not-here"}}, TRAINING))
    assert model_shape(run(model={"vocab_size": 0})).vocab_size == 257


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"parallel": {"data": 3}}, "must be a multiple of train.microbatch x parallel.data"),
        ({"parallel": {"pipeline": 4, "data": 4}}, "fewer than its 4 pipeline ranks"),
        ({"parallel": {"pipeline": 9}}, "use 1 to 8 stages"),
        ({"parallel": {"tensor": 4}}, "must divide num_key_value_heads"),
        ({"exits": {"layers": [9]}}, "exit layer 9 does not exist"),
        ({"model": {"family": "lama"}}, "did you mean 'llama'"),
        ({"model": {"intermediate_size": 0}}, "model.intermediate_size is not set"),
    ],
)
def test_what_cannot_be_is_refused(sections: dict[str, dict[str, Any]], says: str) -> None:
    with pytest.raises(UserError, match=says):
        estimate(run(**sections))


def test_a_speed_must_be_one() -> None:
    for speed in (0.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(UserError, match="must be a positive number"):
            estimate(run(), tflops=speed)
