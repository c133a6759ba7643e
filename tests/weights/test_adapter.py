"""Exit adapters: what is saved is what is attached, and nothing else ever is."""

import json
import multiprocessing
import os
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exitlm import atomic
from exitlm.errors import UserError
from exitlm.model import EarlyExitModel, ExitConfig, ExitRecord
from exitlm.weights import attach, export, load_model, read_adapter, save_adapter
from exitlm.weights.adapter import plain
from exitlm.weights.tensorfile import digest_of_file
from tests.model.families import tiny_hf_model

IDS = torch.tensor([[5, 17, 3, 88, 41, 9, 60, 2, 2, 71, 30, 11]])
FREQUENT = torch.tensor([88, 3, 17, 2, 5, 60, 9, 41])
EVERY_KIND = [
    ExitConfig(layer=1, kind="lens", branch=True, gate=True, candidates=8, init="random"),
    ExitConfig(layer=2, kind="mlp", output="own"),
    ExitConfig(layer=3, kind="block", output="low_rank", rank=5, gate=True),
    ExitConfig(layer=4, kind="norm", output="own"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny_hf_model("llama").save_pretrained(directory)
    return directory


def noisy(model: EarlyExitModel, seed: int = 0) -> EarlyExitModel:
    """Give every tensor of the exits a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.exit_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def with_exits(base: Path, configs: list[ExitConfig], seed: int = 0) -> EarlyExitModel:
    model = load_model(base)
    model.add_exits(configs, seed=seed, candidate_ids=FREQUENT)
    return noisy(model, seed)


def saved(base: Path, directory: Path, layers: tuple[int, ...] = (1, 3), seed: int = 0) -> Path:
    save_adapter(directory, with_exits(base, [ExitConfig(layer=layer, gate=True) for layer in layers], seed))
    return directory


def assert_same_exits(left: EarlyExitModel, right: EarlyExitModel) -> None:
    ours, theirs = left.exits.state_dict(), right.exits.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    left_logits, right_logits = left.exit_logits(IDS), right.exit_logits(IDS)
    assert list(left_logits) == list(right_logits)
    for layer, logits in left_logits.items():
        assert torch.equal(logits, right_logits[layer])


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


# --- round trips ----------------------------------------------------------------------------------------------------


def test_every_kind_comes_back(base: Path, tmp_path: Path) -> None:
    model = with_exits(base, EVERY_KIND)
    extra = {"history": (1, 2), "bad": float("nan")}
    record = ExitRecord(threshold=0.9, agreement=np.float32(0.5), tested=False, extra=extra)
    model.exits["2"].record = record
    save_adapter(tmp_path / "a", model, training={"steps": 3, "seconds": torch.tensor(1.5)})
    again = load_model(base)
    attach(again, [tmp_path / "a"])
    assert [head.config for head in again.exit_heads().values()] == EVERY_KIND
    assert_same_exits(model, again)
    training = {"steps": 3, "seconds": 1.5}
    assert again.exits["2"].record == ExitRecord(
        threshold=0.9,
        agreement=0.5,
        tested=False,
        extra={"history": [1, 2], "bad": None},
        training=training,
    )
    assert again.exits["1"].record == ExitRecord(training=training)
    # and once more: the record of the training stays with the exits
    save_adapter(tmp_path / "b", again)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert read_adapter(tmp_path / "b").meta["training"] == training
    assert sorted(os.listdir(tmp_path / "b")) == ["exits.json", "exits.safetensors"]


def test_a_table_of_an_earlier_version_keeps_every_byte(base: Path, tmp_path: Path) -> None:
    """Nothing in it says which exits are tested; merged adapters of two runs keep each record of training."""
    adapter = saved(base, tmp_path / "old")
    curve = {"scores": [0.0, 0.5], "coverage": [1.0, 0.25], "precision": [0.5, 0.96]}
    measured = {"agreement": 0.5, "loss": 1.25, "tokens": 512, "rule": "gate", "threshold": 0.5, "coverage": 0.25}
    exits = json.loads((adapter / "exits.json").read_text())["exits"]
    exits[0]["record"] = {**measured, "precision": 0.96, "calibration": curve, "training": {"steps": 3}}
    exits[1]["record"] = {"accuracy": 0.5, "loss": 2.0, "training": {"steps": 4}}
    path = adapter / "exits.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"exits": exits}, indent=2))
    model = load_model(base)
    attach(model, [adapter])
    found = model.exits["1"].record
    assert (found.threshold, found.tested, found.training) == (0.5, None, {"steps": 3})
    save_adapter(tmp_path / "again", model)
    assert files_of(tmp_path / "again") == files_of(adapter)


def test_a_shared_matrix_is_saved_once_and_stays_shared(base: Path, tmp_path: Path) -> None:
    configs = [ExitConfig(layer=layer, kind="norm", output="exits") for layer in (1, 2, 4)]
    model = with_exits(base, configs)
    save_adapter(tmp_path, model)
    assert [name for name in load_file(tmp_path / "exits.safetensors") if "output" in name] == ["exits.1.output.weight"]
    again = load_model(base)
    attach(again, [tmp_path])
    assert again.exits["1"].output is again.exits["2"].output is again.exits["4"].output
    assert_same_exits(model, again)


def test_adding_dropping_and_own_copies(base: Path, tmp_path: Path) -> None:
    model = with_exits(base, [ExitConfig(layer=3, kind="norm"), ExitConfig(layer=1, candidates=8)])
    kept = model.exit_logits(IDS)
    save_adapter(tmp_path, model)
    again = load_model(base)
    attach(again, [tmp_path])
    again.add_exits([ExitConfig(layer=2)], seed=4)
    again.remove_exits([3])
    again.own_outputs([1])
    save_adapter(tmp_path, again)  # in place
    third = load_model(base)
    attach(third, [tmp_path])
    assert list(third.exit_heads()) == [1, 2]
    assert third.exits["1"].config.output == "own"
    assert_same_exits(again, third)
    logits = third.exit_logits(IDS)[1]
    assert torch.allclose(logits[..., FREQUENT], kept[1][..., FREQUENT], atol=1e-6)


def test_merging_adapters_of_one_base(base: Path, tmp_path: Path) -> None:
    left, right = saved(base, tmp_path / "l", (1, 3)), saved(base, tmp_path / "r", (2,), seed=1)
    model = load_model(base)
    attach(model, [right, left])
    assert list(model.exit_heads()) == [1, 2, 3]
    save_adapter(tmp_path / "merged", model)
    again = load_model(base)
    attach(again, [tmp_path / "merged"])
    assert_same_exits(model, again)
    for directory, layers in ((left, (1, 3)), (right, (2,))):
        alone = load_model(base)
        attach(alone, [directory])
        for layer in layers:
            assert torch.equal(alone.exit_logits(IDS)[layer], again.exit_logits(IDS)[layer])


def test_matrices_shared_in_two_adapters_stay_two(base: Path, tmp_path: Path) -> None:
    for name, layers, seed in (("l", (1, 3), 0), ("r", (2, 4), 1)):
        configs = [ExitConfig(layer=layer, kind="norm", output="exits") for layer in layers]
        save_adapter(tmp_path / name, with_exits(base, configs, seed))
    model = load_model(base)
    attach(model, [tmp_path / "l", tmp_path / "r"])
    save_adapter(tmp_path / "both", model)
    again = load_model(base)
    attach(again, [tmp_path / "both"])
    assert again.exits["1"].output is again.exits["3"].output is not again.exits["2"].output
    assert again.exits["2"].output is again.exits["4"].output
    assert_same_exits(model, again)


def test_the_dtype_is_the_models(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path)
    for dtype in (torch.bfloat16, torch.float64):
        model = load_model(base, dtype=dtype)
        attach(model, [tmp_path])
        assert {parameter.dtype for parameter in model.exit_parameters()} == {dtype}
        assert model.exit_logits(IDS)[1].dtype == dtype


def test_candidate_ids_come_back(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path, with_exits(base, [ExitConfig(layer=1, candidates=8)]))
    model = load_model(base)
    attach(model, [tmp_path])
    ids = model.exits["1"].candidate_ids
    assert ids is not None
    assert ids.tolist() == sorted(FREQUENT.tolist())


def test_a_model_in_memory_has_a_digest_too(tmp_path: Path) -> None:
    from tests.model.families import tiny_model

    model = tiny_model("qwen3")
    model.add_exits([ExitConfig(layer=2)])
    save_adapter(tmp_path, model)
    same = tiny_model("qwen3")
    attach(same, [tmp_path])
    assert_same_exits(model, same)
    with pytest.raises(UserError, match="tuned on other weights"):
        attach(tiny_model("qwen3", seed=1), [tmp_path])


def test_plain_data() -> None:
    value = {1: np.int64(3), "t": torch.tensor([1.0, float("inf")]), "p": Path("x"), "s": {2}, "o": torch.float32}
    assert plain(value) == {"1": 3, "t": [1.0, None], "p": "x", "s": [2], "o": "torch.float32"}


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(base: Path, *adapters: Path, **options: Any) -> str:
    model = load_model(base)
    with pytest.raises(UserError) as caught:
        attach(model, adapters, **options)
    assert not model.exit_heads()  # nothing was attached, not even of the good ones
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(directory: Path, change: Any) -> None:
    """Change the tensors and give the table the digest that fits."""
    tensors = load_file(directory / "exits.safetensors")
    change(tensors)
    save_file(tensors, directory / "exits.safetensors")
    table(directory, tensors_sha256=digest_of_file(directory / "exits.safetensors"))


def table(directory: Path, **changes: Any) -> None:
    path = directory / "exits.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_base_needs_a_flag(base: Path, tmp_path: Path) -> None:
    tiny_hf_model("llama", seed=1).save_pretrained(tmp_path / "other")
    adapter = saved(base, tmp_path / "a")
    message = refused(tmp_path / "other", adapter)
    assert load_model(base).checkpoint.digest() in message
    assert load_model(tmp_path / "other").checkpoint.digest() in message
    model = load_model(tmp_path / "other")
    attach(model, [adapter], allow_other_base=True)
    assert list(model.exit_heads()) == [1, 3]
    tiny_hf_model("llama", hidden_size=64).save_pretrained(tmp_path / "wider")
    assert "does not fit" in refused(tmp_path / "wider", adapter, allow_other_base=True)
    tiny_hf_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "shorter")
    assert "layer 3" in refused(tmp_path / "shorter", adapter, allow_other_base=True)


def test_damage_is_seen(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "a")
    weights = adapter / "exits.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.write_bytes(raw)
    assert "is damaged: its SHA-256 is" in refused(base, adapter)
    weights.write_bytes(raw[:100])
    assert "is damaged" in refused(base, adapter)
    weights.unlink()
    assert "lacks exits.safetensors" in refused(base, adapter)
    (adapter / "exits.json").write_text("{")
    weights.write_bytes(raw)
    assert "exits.json is truncated or damaged" in refused(base, adapter)


def test_a_newer_version_and_another_format(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path)
    table(adapter, version=2)
    assert "format version 2, this exitlm reads up to 1; update exitlm" in refused(base, adapter)
    for version in (True, "1", None):
        table(adapter, version=version)
        assert "not the table of an exit adapter" in refused(base, adapter)
    table(adapter, version=1, format="peft")
    assert "not the table of an exit adapter" in refused(base, adapter)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "exits.1/../../x",
        "lm_head.weight",
        "exits.9.gate.bias",
        "exits.01.gate.bias",
        "exits.1.",
        "exits.1..x",
        f"exits.{'9' * 5000}.x",
    ],
)
def test_names_that_are_no_exits(base: Path, tmp_path: Path, name: str) -> None:
    adapter = saved(base, tmp_path)
    edit(adapter, lambda tensors: tensors.update({name: torch.zeros(1)}))
    assert "do not trust this file" in refused(base, adapter)


def test_tensors_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path)
    edit(adapter, lambda tensors: tensors.update({"exits.1.other.weight": torch.zeros(1)}))
    assert "'exits.1.other.weight' that its exits do not have" in refused(base, adapter)
    edit(adapter, lambda tensors: tensors.pop("exits.1.other.weight"))
    edit(adapter, lambda tensors: tensors.update({"exits.1.gate.bias": torch.zeros(2)}))
    assert "does not fit" in refused(base, adapter)
    edit(adapter, lambda tensors: tensors.update({"exits.1.gate.bias": torch.zeros(1, dtype=torch.int64)}))
    assert "does not fit" in refused(base, adapter)
    edit(adapter, lambda tensors: tensors.pop("exits.1.gate.bias"))
    assert "lacks the tensor 'exits.1.gate.bias'" in refused(base, adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["exits.1.lens.weight", "exits.3.gate.bias"])
def test_tensors_that_are_not_finite_are_neither_saved_nor_attached(
    base: Path, tmp_path: Path, name: str, value: float
) -> None:
    adapter = saved(base, tmp_path)
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    model = load_model(base)
    attach(model, [adapter])
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    with pytest.raises(UserError, match=f"tensor '{name}' holds NaN or infinity in float32, and nothing was written"):
        save_adapter(adapter, model)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    with pytest.raises(UserError, match="NaN or infinity"):
        save_adapter(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()
    edit(adapter, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    assert f"tensor '{name}' holds NaN or infinity; tune the exits again" in refused(base, adapter)


def test_a_dtype_too_narrow_for_an_exit_is_named(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path)
    edit(adapter, lambda tensors: tensors["exits.1.lens.bias"][:1].fill_(1e5))
    attach(load_model(base), [adapter])
    model = load_model(base, dtype="float16")
    with pytest.raises(UserError, match=r"'exits.1.lens.bias' holds NaN or infinity in float16; load .* 'float32'"):
        attach(model, [adapter])
    assert not model.exit_heads()


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5, 6, 97], [-1, 1, 2, 3, 4, 5, 6, 7], [1, 1, 2, 3, 4, 5, 6, 7]])
def test_candidates_beyond_the_vocabulary(base: Path, tmp_path: Path, ids: list[int]) -> None:
    save_adapter(tmp_path, with_exits(base, [ExitConfig(layer=1, candidates=8)]))
    edit(tmp_path, lambda tensors: tensors.update({"exits.1.candidate_ids": torch.tensor(ids)}))
    assert "candidate ids must rise" in refused(base, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 0}, "layer 0 does not exist"),
        ({"layer": 3}, "more than once"),
        ({"layer": "1"}, "wrong types"),
        ({"layer": True}, "wrong types"),
        ({"layer": 77}, "do not trust this file"),
        ({"kind": "lense"}, "did you mean 'lens'"),
        ({"outputs": "own"}, "unknown exit setting 'outputs'; did you mean 'output'?"),
        ({"record": [1]}, "wrong types"),
        ({"candidates": 10**9}, "the vocabulary has 97"),
        ({"output": "low_rank", "rank": 10**15}, "rank 1000000000000000 exceeds the hidden size"),
        ({"output_from": 3}, "takes its output matrix"),
        ({"output_from": [1]}, "output_from"),
        ({"gate": "no"}, "wrong types"),
        ({"record": {"threshold": "abc"}}, "malformed"),
        ({"record": {"threshold": 7}}, "malformed"),
        ({"record": {"coverage": None}}, "malformed"),
        ({"record": {"calibration": [1]}}, "malformed"),
        ({"record": {"tested": 1}}, "the record of exit 1 is malformed: tested is 1 (int), but must be True or False"),
        ({"record": {"calibration": {"scores": [0.5]}}}, "malformed"),
        ({"record": {"calibration": {"scores": [0.5], "coverage": [0.5, 0.5], "precision": [1.0]}}}, "malformed"),
    ],
)
def test_settings_that_are_wrong(base: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    adapter = saved(base, tmp_path)
    exits = json.loads((adapter / "exits.json").read_text())["exits"]
    exits[0] |= change
    table(adapter, exits=exits)
    assert message in refused(base, adapter)


def test_tables_that_are_incomplete(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path)
    for change in (
        {"base": {}},
        {"exits": []},
        {"exits": [3]},
        {"exits": [{"kind": "lens"}]},
        {"tensors_sha256": None},
        {"training": [1]},
    ):
        text = (adapter / "exits.json").read_text()
        table(adapter, **change)
        assert "truncated or damaged" in refused(base, adapter)
        (adapter / "exits.json").write_text(text)


def test_the_directory_of_another_model_stays_as_it_is(base: Path, tmp_path: Path) -> None:
    """The exits would be taken for that model's, which then could not be loaded."""
    model = with_exits(base, [ExitConfig(layer=1)])
    tiny_hf_model("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny_hf_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    half = load_model(base, dtype="bfloat16")
    export(half, tmp_path / "rounded")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "weights").mkdir()
    shutil.copy(base / "model.safetensors", tmp_path / "weights")
    for name in ("other", "rounded", "broken", "weights"):
        before = files_of(tmp_path / name)
        with pytest.raises(UserError, match=r"holds a model .* that is not the base of these exits.*; choose another"):
            save_adapter(tmp_path / name, model)
        assert files_of(tmp_path / name) == before
    load_model(tmp_path / "other")
    for copy in (tmp_path / "sharded", shutil.copytree(base, tmp_path / "copy")):  # the base is the base wherever it is
        save_adapter(copy, model)
        again = load_model(copy)
        attach(again, [copy])
        assert_same_exits(model, again)


def test_two_adapters_may_have_an_exit_at_a_layer(base: Path, tmp_path: Path) -> None:
    left, right = saved(base, tmp_path / "l", (1, 3)), saved(base, tmp_path / "r", (2, 3), seed=1)
    for order in ((left, right), (right, left)):
        model, alone = load_model(base), {}
        attach(model, order)
        for directory in order:
            alone[directory.name] = load_model(base)
            attach(alone[directory.name], [directory])
        assert {name: list(heads) for name, heads in model.exit_sets().items()} == {
            directory.name: list(alone[directory.name].exit_heads()) for directory in order
        }
        for name, heads in model.exit_sets().items():
            for layer, head in heads.items():
                expected = alone[name].exits[str(layer)].state_dict()
                assert all(torch.equal(tensor, expected[key]) for key, tensor in head.state_dict().items())
        first = order[0].name
        assert list(model.exit_heads()) == [1, 2, 3]
        assert model.exits["3"] is model.exit_sets()[first][3]
        assert list(model.heads_by_key())[2:] == [(order[0].name, 3), (order[1].name, 3)]
        with pytest.raises(UserError, match=r"'[lr]' and '[lr]' both have an exit at layer 3.*one a layer.*adapter="):
            save_adapter(tmp_path / "both", model)
        with pytest.raises(UserError, match="both have an exit at layer 3"):
            export(model, tmp_path / "exported")
        with pytest.raises(UserError, match=r"no adapter 'lr'.*there are: [lr], [lr]"):
            save_adapter(tmp_path / "both", model, adapter="lr")
        assert not (tmp_path / "both").exists()
        assert not (tmp_path / "exported").exists()
        for name in ("l", "r"):
            save_adapter(tmp_path / "again" / name, model, adapter=name)
            again = load_model(base)
            attach(again, [tmp_path / "again" / name])
            assert_same_exits(again, alone[name])


def test_exits_that_a_model_has_stand_before_those_of_adapters(base: Path, tmp_path: Path) -> None:
    model = with_exits(base, [ExitConfig(layer=1)], seed=5)
    own = model.exits["1"]
    attach(model, [saved(base, tmp_path / "l", (1, 3))])
    assert {name: list(heads) for name, heads in model.exit_sets().items()} == {"exits": [1], "l": [1, 3]}
    assert model.exits["1"] is own
    assert model.exit_sets()["l"][1] is not own


def test_adapters_are_called_by_their_directories(base: Path, tmp_path: Path) -> None:
    for place in ("one/exits", "two/exits", "a:b"):
        saved(base, tmp_path / place, (1,))
    model = load_model(base)
    attach(model, [tmp_path / "a:b", tmp_path / "one" / "exits"])
    assert list(model.exit_sets()) == ["a-b", "exits"]
    message = refused(base, tmp_path / "one" / "exits", tmp_path / "two" / "exits")
    assert "both be called 'exits'" in message
    assert "rename one" in message
    assert "both be called 'a-b'" in refused(base, tmp_path / "a:b", tmp_path / "a:b")
    with pytest.raises(UserError, match="would be called 'exits', as are exits that the model has already; rename"):
        attach(with_exits(base, [ExitConfig(layer=2)]), [tmp_path / "one" / "exits"])


def test_exits_of_all_adapters_go_where_the_model_goes(base: Path, tmp_path: Path) -> None:
    """Also those that are not in its state dict; and copies stay copies."""
    model = load_model(base)
    attach(model, [saved(base, tmp_path / "l", (1, 3)), saved(base, tmp_path / "r", (3,), seed=1)])
    names = list(model.state_dict())
    assert len(names) == len(set(names))
    hidden = model.exit_sets()["r"][3]
    assert not any(parameter is hidden.lens.weight for parameter in model.parameters())
    model.checkpoint = None  # an open file has no copy
    copied = deepcopy(model).to(torch.float64)
    assert copied.exit_sets()["r"][3] is not hidden
    assert copied.exits["3"] is copied.exit_sets()["l"][3]
    assert {head.lens.weight.dtype for head in copied.heads_by_key().values()} == {torch.float64}
    assert {head.lens.weight.dtype for head in model.heads_by_key().values()} == {torch.float32}
    assert torch.equal(copied.exit_sets()["r"][3].lens.weight.float(), hidden.lens.weight)
    model.remove_exits([3])
    assert {name: list(heads) for name, heads in model.exit_sets().items()} == {"l": [1]}
    model.add_exits([ExitConfig(layer=3)])
    assert {name: list(heads) for name, heads in model.exit_sets().items()} == {"exits": [3], "l": [1]}


def test_what_is_no_adapter(base: Path, tmp_path: Path) -> None:
    assert "there is no adapter directory" in refused(base, tmp_path / "nothing")
    assert "is not an exit adapter" in refused(base, base)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "is a run and holds no exits by itself" in refused(base, tmp_path / "run")
    with pytest.raises(UserError, match="no exits to save"):
        save_adapter(tmp_path / "new", load_model(base))
    assert not (tmp_path / "new").exists()


# --- saving: whole or not at all --------------------------------------------------------------------------------------


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("at", ["write_tensors", "sync"])
@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_leaves_everything_as_it_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, before: bool
) -> None:
    directory = tmp_path / "deep" / "adapter"
    if before:
        saved(base, directory)
        (directory / "metrics.jsonl").write_text("kept")
    old = files_of(directory) if before else None
    model = with_exits(base, [ExitConfig(layer=2)])
    with monkeypatch.context() as patch:
        patch.setattr(
            f"exitlm.{'weights.adapter.write_tensors' if at == 'write_tensors' else 'atomic._sync'}", disk_full
        )
        with pytest.raises(UserError, match="No space left on device; nothing was left half-written"):
            save_adapter(directory, model)
    assert (files_of(directory) if before else None) == old
    assert directory.exists() == before


def test_a_full_disk_while_the_bytes_are_written(base: Path, tmp_path: Path) -> None:
    """A real one: the device that is always full."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    from exitlm.weights.tensorfile import Written, write_tensors

    tensor = Written("x", torch.float32, (1000000,), lambda: torch.zeros(1000000))
    with pytest.raises(UserError, match="No space left"), atomic.replace_file(tmp_path / "x"):
        write_tensors(Path("/dev/full"), [tensor], {})
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = with_exits(base, [ExitConfig(layer=2)])
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write"):
            save_adapter(directory, model)


@pytest.mark.parametrize("step", range(8))
def test_death_between_any_two_steps_leaves_one_whole_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Fork before the save and let the child die at its n-th change of the directory: old or new, never a mixture."""
    monkeypatch.setenv("EXITLM_CACHE", str(base / "config.json"))  # no digest is kept there: that would be a step, too
    old, new = with_exits(base, [ExitConfig(layer=1)]), with_exits(base, [ExitConfig(layer=2)], seed=1)
    save_adapter(tmp_path, old)
    child = os.fork()
    if child == 0:
        count = 0
        replace = os.replace

        def dying(*args: Any) -> None:
            nonlocal count
            if count == step:
                os._exit(0)
            count += 1
            if count == step:
                replace(*args)
                os._exit(0)
            replace(*args)
            count += 1

        os.replace = dying
        try:
            save_adapter(tmp_path, new)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    found = load_model(base)
    attach(found, [tmp_path])
    assert_same_exits(found, old if list(found.exit_heads()) == [1] else new)
    assert list(found.exit_heads()) == ([1] if step < 3 else [2])
    save_adapter(tmp_path, old)  # and it can be written again
    again = load_model(base)
    attach(again, [tmp_path])
    assert_same_exits(again, old)
    assert not (tmp_path / "exits.json.new").exists()


def _write(base: Path, directory: Path, seed: int) -> None:
    model = with_exits(base, [ExitConfig(layer=seed)], seed)
    for _ in range(15):
        save_adapter(directory, model)


def test_two_writers_and_a_reader(base: Path, tmp_path: Path) -> None:
    """Whoever reads while two processes write finds the one adapter or the other."""
    save_adapter(tmp_path, with_exits(base, [ExitConfig(layer=1)], 1))
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(base, tmp_path, seed)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers) or not reads:
        adapter = read_adapter(tmp_path)
        assert {config.layer for config in adapter.exits} == {int(name.split(".")[1]) for name in adapter.tensors}
        reads += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(os.listdir(tmp_path)) == ["exits.json", "exits.safetensors"]


def test_a_writer_that_never_ends_is_named(tmp_path: Path) -> None:
    second = atomic.locked(tmp_path, timeout=0.1)
    with atomic.locked(tmp_path), pytest.raises(UserError, match="another process has been writing"), second:
        pass


def test_an_adapter_can_be_read_where_nothing_can_be_written(base: Path, tmp_path: Path) -> None:
    adapter = saved(base, tmp_path / "a")
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    copy.chmod(0o555)
    try:
        model = load_model(base)
        attach(model, [copy])
    finally:
        copy.chmod(0o755)
    assert list(model.exit_heads()) == [1, 3]
