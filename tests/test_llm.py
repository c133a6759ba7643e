"""The facade: loading, plain tensors, text in and out, exits added and dropped, and every mistake a caller can make."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import exitlm
from exitlm import UserError
from exitlm.decode.kernels.fused import FusedModel
from tests.checkpoints import VOCAB, write_checkpoint
from tests.model.families import tiny_hf_model

IDS = [5, 9, 77, 200, 31]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def model(checkpoint: Path) -> exitlm.LLM:
    return exitlm.load(checkpoint, dtype="float64")


@pytest.fixture
def model_with_exits(model: exitlm.LLM) -> exitlm.LLM:
    model.add_exits([1, 3], kind="norm")
    return model


def test_importing_exitlm_loads_no_torch() -> None:
    code = (
        "import sys, exitlm; assert exitlm.__version__; assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_offers_its_names_before_it_loads_them() -> None:
    """Whatever was imported before: a package and a function are both called train."""
    code = """
import sys, exitlm
assert set(dir(exitlm)) == set(exitlm.__all__) >= {"Generation", "GenerationConfig", "load", "LLM", "train", "tune"}
assert "torch" not in sys.modules
from exitlm.decode.generation import GenerationConfig
assert exitlm.GenerationConfig is GenerationConfig
from exitlm import Generation, UserError, train, tune
import exitlm.train as package
from exitlm.train import RunConfig, train as function
assert exitlm.train is package and package.RunConfig is RunConfig and callable(tune)
for call in (train, exitlm.train, function):
    try:
        call("none.toml")
    except UserError as error:
        assert "none.toml" in str(error)
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'lod'"):
        _ = exitlm.lod


def test_logits_are_those_of_transformers(model: exitlm.LLM) -> None:
    reference = tiny_hf_model("llama", vocab_size=VOCAB, max_position_embeddings=64).double()
    with torch.no_grad():
        expected = reference(torch.tensor([IDS, IDS[::-1]])).logits
    torch.testing.assert_close(
        model.logits([IDS, IDS[::-1]]), expected, rtol=0, atol=1e-5
    )  # transformers keeps some parts in float32
    assert model.logits(IDS).shape == (1, len(IDS), VOCAB)
    assert model.logits(torch.tensor([IDS])).dtype == torch.float64


def test_dtype_auto_is_the_checkpoints(checkpoint: Path) -> None:
    assert exitlm.load(checkpoint).logits(IDS).dtype == torch.float32
    assert exitlm.load(checkpoint, dtype=torch.bfloat16).logits(IDS).dtype == torch.bfloat16


def test_exits_come_and_go(model: exitlm.LLM) -> None:
    assert model.exit_layers == []
    assert model.exit_logits(IDS) == {}
    model.add_exits([1, 3], kind="lens", init="random", output="shared", seed=0)
    model.add_exits([2], kind="norm", gate=True)
    assert model.exit_layers == [1, 2, 3]
    assert {layer: tuple(t.shape) for layer, t in model.exit_logits(IDS).items()} == dict.fromkeys(
        (1, 2, 3), (1, len(IDS), VOCAB)
    )
    model.remove_exits([1])
    assert model.exit_layers == [2, 3]


def test_an_exit_at_the_last_layer_is_no_early_one(model: exitlm.LLM) -> None:
    model.add_exits([1, 4], kind="norm")
    assert model.exit_layers == [1]
    assert list(model.exit_logits(IDS)) == [1]


@pytest.mark.parametrize("layers", [[True], [2.0], ["2"], "2", [None]])
def test_layers_that_are_no_whole_numbers(model: exitlm.LLM, layers: Any) -> None:
    for call in (model.add_exits, model.remove_exits):
        with pytest.raises(UserError, match="whole numbers"):
            call(layers)
    assert model.exit_layers == []
    model.add_exits([np.int64(2)])
    model.add_exits(map(int, "13"))
    assert model.exit_layers == [1, 2, 3]


def test_a_prompt_that_is_no_text(model: exitlm.LLM) -> None:
    with pytest.raises(UserError, match="UTF-8"):
        model.generate("\ud800")


def test_a_chat_template_that_is_broken(model: exitlm.LLM) -> None:
    assert model.tokenizer is not None
    model.tokenizer.chat_template = "{% for"
    with pytest.raises(UserError, match="chat template can't be used"):
        model.generate("hi", chat=True)


def test_the_engine_follows_the_exits(model: exitlm.LLM) -> None:
    """Exits that are added after a generation take part in the next one."""
    with pytest.raises(UserError, match="exitlm tune"):
        model.generate(IDS, mode="threshold", threshold=0.0, max_new_tokens=4)
    model.add_exits([2], kind="norm")
    out = model.generate(IDS, mode="threshold", threshold=0.0, max_new_tokens=4, ignore_eos=True)
    assert out.exit_layers == [4, 2, 2, 2]


def test_candidates_restrict_an_exit(model: exitlm.LLM) -> None:
    model.add_exits([2], kind="norm", candidate_ids=[7, 3, 9])
    logits = model.exit_logits(IDS)[2]
    assert torch.isfinite(logits[0, 0]).nonzero().flatten().tolist() == [3, 7, 9]


def test_exits_stay_while_texts_are_decoded(model_with_exits: exitlm.LLM) -> None:
    pieces = model_with_exits.stream(IDS, mode="full", max_new_tokens=4)
    next(pieces)
    for change in (model_with_exits.add_exits, model_with_exits.remove_exits):
        with pytest.raises(UserError, match="can't be changed while texts are decoded"):
            change(model_with_exits.exit_layers[:1])
    pieces.close()  # type: ignore[attr-defined]
    model_with_exits.remove_exits(model_with_exits.exit_layers[:1])


def test_few_functions_lie_between_generate_and_the_packed_layers(
    model: exitlm.LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains: set[tuple[str, ...]] = set()
    package, plain = str(Path(exitlm.__file__).parent), FusedModel.run

    def run(*arguments: Any) -> Any:
        frame, names = sys._getframe(1), ["FusedModel.run"]
        while frame.f_code.co_qualname != "LLM.generate":
            frame = frame.f_back
            if frame.f_code.co_filename.startswith(package):
                names.append(frame.f_code.co_qualname)
        chains.add(tuple(names[::-1]))
        return plain(*arguments)

    monkeypatch.setattr(FusedModel, "run", run)
    model.generate(IDS, mode="full", max_new_tokens=2)
    model.generate([IDS, IDS], mode="full", max_new_tokens=2)
    assert len(chains) == 2
    assert max(map(len, chains)) <= 8, chains


def test_generate_takes_text_or_ids(model_with_exits: exitlm.LLM) -> None:
    settings = {"max_new_tokens": 6, "ignore_eos": True, "mode": "full"}
    by_text = model_with_exits.generate("hello", **settings)
    by_ids = model_with_exits.generate(model_with_exits.encode("hello"), **settings)
    assert by_text.token_ids == by_ids.token_ids
    assert by_text.text == model_with_exits.tokenizer.decode(by_text.token_ids, skip_special_tokens=True)
    assert len(by_text.exit_layers) == len(by_text.token_ids) == 6


@pytest.mark.parametrize("mode", ["full", "threshold", "lossless"])
def test_a_stream_is_the_generation_in_pieces(model_with_exits: exitlm.LLM, mode: str) -> None:
    settings = {"max_new_tokens": 12, "ignore_eos": True, "mode": mode, "threshold": 0.1}
    whole = model_with_exits.generate("hello", **settings)
    pieces = list(model_with_exits.stream("hello", **settings))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [i for piece in pieces for i in piece.token_ids] == whole.token_ids
    assert [layer for piece in pieces for layer in piece.exit_layers] == whole.exit_layers


def test_lossless_is_full_and_chat_uses_the_template(model_with_exits: exitlm.LLM) -> None:
    settings = {"chat": True, "max_new_tokens": 16, "ignore_eos": True}
    full = model_with_exits.generate("hi", mode="full", **settings)
    assert model_with_exits.generate("hi", mode="lossless", threshold=0.0, **settings).token_ids == full.token_ids
    assert model_with_exits.encode("hi", chat=True) == [1, *model_with_exits.encode("hi\n")]


def test_messages_are_one_prompt(model: exitlm.LLM) -> None:
    message, settings = {"role": "user", "content": "hi"}, {"max_new_tokens": 6, "mode": "full"}
    expected = model.generate("hi", chat=True, **settings)
    assert model.generate([message], **settings).token_ids == expected.token_ids
    assert "".join(piece.text for piece in model.stream([message], **settings)) == expected.text
    assert model.encode([message, message]) == [*model.encode([message]), *model.encode([message])]
    with pytest.raises(UserError, match="message 1 has no role"):
        model.generate([{"content": "hi"}])


def test_a_configuration_stands_for_its_settings(model: exitlm.LLM) -> None:
    settings = {"max_new_tokens": 6, "mode": "full", "temperature": 1.0, "seed": 3}
    config, expected = exitlm.GenerationConfig(**settings), model.generate("hi", **settings)
    assert model.generate("hi", config=config).token_ids == expected.token_ids
    assert [i for piece in model.stream("hi", config=config) for i in piece.token_ids] == expected.token_ids
    for call in (model.generate, model.stream):
        with pytest.raises(UserError, match=r"given twice, by config and by name \(seed, mode\); .* or leave it out"):
            call("hi", config=config, seed=3, mode="full")
        with pytest.raises(UserError, match=r"config is \{'seed': 3\} \(dict\), but must be a GenerationConfig"):
            call("hi", config={"seed": 3})


def test_the_model_in_one_line(model: exitlm.LLM, checkpoint: Path) -> None:
    assert repr(model) == "<LLM llama, 4 layers, no exits, float64 on cpu, quant auto>"
    model.add_exits([1, 3], kind="norm")
    model.generate(IDS, max_new_tokens=1)
    assert repr(model) == "<LLM llama, 4 layers, exits [1, 3], float64 on cpu, quant none>"  # what auto has chosen
    half = exitlm.load(checkpoint, dtype="bfloat16", quant="bf16")
    assert repr(half) == "<LLM llama, 4 layers, no exits, bfloat16 on cpu, quant bf16>"


def test_a_model_moves_and_packs_its_weights_again(model_with_exits: exitlm.LLM) -> None:
    settings = {"max_new_tokens": 6, "mode": "threshold", "threshold": 0.5}
    before, engine = model_with_exits.generate("hi", **settings), model_with_exits.engine
    assert model_with_exits.to("cpu") is model_with_exits
    assert model_with_exits.engine is not engine
    assert model_with_exits.generate("hi", **settings).token_ids == before.token_ids
    engine = model_with_exits.engine
    for device in ("gpu", "meta", "cuda:99", 5, None):
        with pytest.raises(UserError, match=r"device .* cpu"):
            model_with_exits.to(device)
        assert model_with_exits.engine is engine
    assert model_with_exits.model.device.type == "cpu"


def test_an_adapter_round_trip(model_with_exits: exitlm.LLM, checkpoint: Path, tmp_path: Path) -> None:
    expected = model_with_exits.exit_logits(IDS)
    model_with_exits.save_exits(tmp_path / "adapter")
    again = exitlm.load(checkpoint, adapter=tmp_path / "adapter", dtype="float64")
    for layer, logits in again.exit_logits(IDS).items():
        torch.testing.assert_close(logits, expected[layer], rtol=0, atol=0)


def test_two_adapters_of_one_base(checkpoint: Path, tmp_path: Path) -> None:
    for layer in (1, 3):
        one = exitlm.load(checkpoint)
        one.add_exits([layer], kind="norm")
        one.save_exits(tmp_path / str(layer))
    assert exitlm.load(checkpoint, adapter=[tmp_path / "3", tmp_path / "1"]).exit_layers == [1, 3]


def test_two_adapters_that_share_a_layer(checkpoint: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mode": "threshold", "threshold": 0.0, "max_new_tokens": 9, "ignore_eos": True}
    alone = {}
    for seed, name in enumerate(("a", "b")):
        one = exitlm.load(checkpoint, dtype="float64")
        one.add_exits([1, 2 + seed], kind="norm", output="own", init="random", seed=seed)
        alone[name] = one.generate("hello", **settings).token_ids
        one.save_exits(tmp_path / name)
    model = exitlm.load(checkpoint, adapter=[tmp_path / "b", tmp_path / "a"], dtype="float64")
    assert model.adapters == {"b": [1, 3], "a": [1, 2]}
    assert model.exit_layers == [1, 2, 3]
    outs = model.generate(["hello"] * 3, adapter=["a", "b", None], **settings)
    assert [out.token_ids for out in outs] == [alone["a"], alone["b"], alone["b"]]
    assert alone["a"] != alone["b"]
    with pytest.raises(UserError, match=r"no adapter 'c' \(it has: b, a\)"):
        model.generate("hello", adapter="c")
    for write in (model.save_exits, model.export):
        with pytest.raises(UserError, match="both have an exit at layer 1"):
            write(tmp_path / "both")
    again = exitlm.load(checkpoint, adapter=model.save_exits(tmp_path / "c", adapter="a"), dtype="float64")
    assert again.adapters == {"c": [1, 2]}
    assert again.generate("hello", adapter="c", **settings).token_ids == alone["a"]
    model.remove_exits([1])
    model.add_exits([1])
    assert model.adapters == {"exits": [1], "b": [3], "a": [2]}
    assert model.save_exits(tmp_path / "merged") == tmp_path / "merged"


def test_an_adapter_of_another_base_is_refused(model_with_exits: exitlm.LLM, checkpoint: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    model_with_exits.save_exits(tmp_path / "adapter")
    with pytest.raises(UserError):
        exitlm.load(other, adapter=tmp_path / "adapter")
    assert exitlm.load(other, adapter=tmp_path / "adapter", allow_other_base=True).exit_layers == [1, 3]


def test_an_exported_directory_brings_its_exits(model_with_exits: exitlm.LLM, tmp_path: Path) -> None:
    where = model_with_exits.export(tmp_path / "out")
    reference = transformers.AutoModelForCausalLM.from_pretrained(where)
    assert reference.dtype == torch.float64
    again = exitlm.load(where)
    assert again.exit_layers == [1, 3]
    with torch.no_grad():
        torch.testing.assert_close(again.logits(IDS), reference(torch.tensor([IDS])).logits, rtol=0, atol=1e-5)
    assert again.generate("x", max_new_tokens=3, mode="full").text is not None


def test_without_a_tokenizer_only_text_is_refused(tmp_path: Path) -> None:
    model = exitlm.load(write_checkpoint(tmp_path / "bare", tokenizer=False))
    out = model.generate(IDS, max_new_tokens=3, mode="full", ignore_eos=True)
    assert (out.text, len(out.token_ids)) == (None, 3)
    with pytest.raises(UserError, match="without a tokenizer"):
        model.generate("hello")


def test_a_tokenizer_without_a_template_refuses_chat(checkpoint: Path, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        exitlm.load(plain).generate("hi", chat=True)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ("x" * 65, {}, "65 tokens"),
        ([1.5], {}, "list of token ids"),
        ([VOCAB], {}, f"{VOCAB}"),
        ([-1], {}, "-1"),
        ([1], {"chat": True}, "chat"),
        ("x", {"mode": "lossles"}, "did you mean 'lossless'"),
        ("x", {"rule": "entrpy"}, "did you mean 'entropy'"),
        ("x", {"treshold": 0.5}, "did you mean 'threshold'"),
        ("x", {"mode": "threshold", "threshold": 1.5}, "1.5"),
        ("x", {"mode": "threshold", "threshold": float("nan")}, "nan"),
        ("x", {"temperature": -1.0}, "temperature"),
        ("x", {"exits": [2]}, "no exit at layer 2"),
    ],
)
def test_mistakes_in_generate(
    model_with_exits: exitlm.LLM, prompt: str | list[int], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        model_with_exits.generate(prompt, **settings)
    with pytest.raises(UserError, match=message):
        model_with_exits.stream(prompt, **settings)


@pytest.mark.parametrize(
    ("layers", "settings", "message"),
    [
        ([0], {}, "0"),
        ([5], {}, "5"),
        ([2, 2], {}, "2"),
        ([1], {}, "exit already"),
        ([2], {"kind": "len"}, "did you mean 'lens'"),
        ([2], {"output": "shard"}, "did you mean 'shared'"),
        ([2], {"gat": True}, "did you mean 'gate'"),
        ([2], {"candidate_ids": [VOCAB]}, f"0..{VOCAB - 1}"),
    ],
)
def test_mistakes_in_add_exits(
    model_with_exits: exitlm.LLM, layers: list[int], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        model_with_exits.add_exits(layers, **settings)
    assert model_with_exits.exit_layers == [1, 3]


def test_mistakes_in_load(checkpoint: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    unsupported = write_checkpoint(tmp_path / "unsupported")
    config = json.loads((unsupported / "config.json").read_text())
    (unsupported / "config.json").write_text(json.dumps({**config, "model_type": "mamba", "architectures": ["Mamba"]}))
    for wrong in (empty, unsupported, tmp_path / "missing.gguf"):
        with pytest.raises(UserError):
            exitlm.load(wrong)
    with pytest.raises(UserError):
        exitlm.load(checkpoint, adapter=empty)
    with pytest.raises(UserError, match="float31"):
        exitlm.load(checkpoint, dtype="float31")
    with pytest.raises(UserError, match="int3"):
        exitlm.load(checkpoint, quant="int3").generate("x")


# ---- lists of prompts

SHORT: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True, "mode": "full"}
MODES = ("full", "threshold", "lossless")


def test_a_list_in_and_a_list_out(model_with_exits: exitlm.LLM) -> None:
    prompts: list[Any] = ["hello", "Why do cats purr?", IDS, "hello"]
    for mode in MODES:
        settings = {**SHORT, "mode": mode, "threshold": 0.1}
        alone = [model_with_exits.generate(prompt, **settings) for prompt in prompts]
        for many in (prompts, tuple(prompts)):
            outs = model_with_exits.generate(many, **settings)
            assert isinstance(outs, list)
            assert [out.token_ids for out in outs] == [out.token_ids for out in alone]
            assert [out.text for out in outs] == [out.text for out in alone]
    (one,) = model_with_exits.generate(["hello"], **SHORT)
    assert one.token_ids == model_with_exits.generate("hello", **SHORT).token_ids


def test_prompts_of_token_ids_in_any_form(model: exitlm.LLM) -> None:
    expected = model.generate(IDS, **SHORT).token_ids
    rows = [IDS, IDS]
    for many in (rows, torch.tensor(rows), np.array(rows), [torch.tensor(IDS), np.array(IDS)], [tuple(IDS), "hello"]):
        assert model.generate(many, **SHORT)[0].token_ids == expected


def test_a_list_of_conversations(model: exitlm.LLM) -> None:
    one = [{"role": "user", "content": "hi"}]
    two = [*one, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "well?"}]
    outs = model.generate([one, two, "hi"], chat=True, **SHORT)
    assert [out.token_ids for out in outs] == [model.generate(c, **SHORT).token_ids for c in (one, two, one)]
    assert model.generate([one, two], **SHORT)[1].token_ids == outs[1].token_ids


def test_a_setting_for_each_prompt(model_with_exits: exitlm.LLM) -> None:
    settings: dict[str, Any] = {
        "mode": list(MODES), "max_new_tokens": (3, 5, 7), "temperature": [0.0, 1.0, 1.0], "seed": [1, 2, 3],
        "threshold": [None, 0.0, 0.1], "logprobs": [0, 2, 0], "ignore_eos": True, "stop": ["zzz"], "exits": [1, 3],
    }  # fmt: skip
    prompts = ["hello", "you", "there"]
    outs = model_with_exits.generate(prompts, **settings)
    lists = {name for name in settings if name not in ("ignore_eos", "stop", "exits")}
    for i, (prompt, out) in enumerate(zip(prompts, outs, strict=True)):
        own = {name: value[i] if name in lists else value for name, value in settings.items()}
        its = model_with_exits.generate(prompt, **own)
        assert out.token_ids == its.token_ids
        assert out.stats.mode == MODES[i]
        assert len(out.token_ids) == (3, 5, 7)[i]
        assert bool(out.trace[0].top_logprobs) == (i == 1)
        assert out.exit_layers == its.exit_layers
    pieces = list(model_with_exits.stream(prompts, **settings))
    assert [[t for p in pieces if p.index == i for t in p.token_ids] for i in range(3)] == [o.token_ids for o in outs]


def test_a_configuration_for_each_prompt(model: exitlm.LLM) -> None:
    configs = [exitlm.GenerationConfig(mode="full", max_new_tokens=n, ignore_eos=True) for n in (2, 4)]
    assert [len(out.token_ids) for out in model.generate(["a", "b"], config=configs)] == [2, 4]
    assert [len(out.token_ids) for out in model.generate(["a", "b"], config=configs[1])] == [4, 4]
    with pytest.raises(UserError, match="config has 2 values for 3 prompts; give one for each, or one for all"):
        model.generate(["a", "b", "c"], config=configs)
    with pytest.raises(UserError, match="must be a GenerationConfig"):
        model.generate("a", config=configs)
    with pytest.raises(UserError, match="must be a GenerationConfig"):
        model.generate(["a", "b"], config=[configs[0], {"seed": 3}])
    with pytest.raises(UserError, match="given twice"):
        model.generate(["a", "b"], config=configs, seed=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": ["full"]}, "mode has 1 values for 2 prompts; give one for each, or one for all"),
        ({"seed": [1, 2, 3]}, "seed has 3 values for 2 prompts"),
        ({"temperature": []}, "temperature has 0 values for 2 prompts"),
        ({"temperature": [0.5, -1.0]}, "temperature"),
        ({"mode": ["full", "lossles"]}, "did you mean 'lossless'"),
        ({"treshold": [0.5, 0.5]}, "did you mean 'threshold'"),
    ],
)
def test_settings_that_do_not_fit_a_list(model: exitlm.LLM, settings: dict[str, Any], message: str) -> None:
    for call in (model.generate, model.stream):
        with pytest.raises(UserError, match=message):
            call(["a", "b"], **settings)
    with pytest.raises(UserError):
        model.generate("a", seed=[1, 2])


def test_one_bad_prompt_fails_by_its_index(model: exitlm.LLM) -> None:
    bad: list[tuple[Any, str]] = [
        ("", "prompt is empty"), ([], "prompt is empty"), ([VOCAB], f"{VOCAB}"), ([1.5], "list of token ids"),
        ("\ud800", "UTF-8"), ("x" * 65, "65 tokens"), (None, "the prompt"), (5, "the prompt"),
        ([{"content": "hi"}], "message 1 has no role"),
    ]  # fmt: skip
    expected = model.generate("hello", **SHORT).token_ids
    for prompt, message in bad:
        for at in (1, 2):
            prompts = ["hello", "hello"]
            prompts.insert(at, prompt)
            outs = model.generate(prompts, **SHORT)
            assert [out.finish_reason == "error" for out in outs] == [i == at for i in range(3)]
            assert message in str(outs[at].error)
            assert all(out.token_ids == expected for i, out in enumerate(outs) if i != at)
            errors = {piece.index: piece.error for piece in model.stream(prompts, **SHORT) if piece.error is not None}
            assert list(errors) == [at]
            assert message in str(errors[at])


def test_a_list_whose_first_prompt_is_bad(model: exitlm.LLM) -> None:
    outs = model.generate(["", "hello"], **SHORT)
    assert [out.error is None for out in outs] == [False, True]
    outs = model.generate([[], IDS], **SHORT)
    assert [out.error is None for out in outs] == [False, True]


def test_chat_with_a_prompt_of_token_ids_in_a_list(model: exitlm.LLM) -> None:
    outs = model.generate(["hi", IDS], chat=True, **SHORT)
    assert outs[0].error is None
    assert "chat needs a prompt that is a text" in str(outs[1].error)


def test_choices_of_a_list(model_with_exits: exitlm.LLM) -> None:
    settings = {**SHORT, "temperature": 1.0, "seed": 4}
    outs = model_with_exits.generate(["a", "b"], n=[3, 1], **settings)
    assert [len(out.choices) for out in outs] == [3, 0]
    assert outs[0].token_ids == model_with_exits.generate("a", **settings).token_ids
    assert len({tuple(choice.token_ids) for choice in outs[0].choices}) == 3
    texts: dict[tuple[int, int], str] = {}
    for piece in model_with_exits.stream(["a", "b"], n=[3, 1], **settings):
        texts[piece.index, piece.choice] = texts.get((piece.index, piece.choice), "") + piece.text
    assert texts == {
        **{(0, i): choice.text for i, choice in enumerate(outs[0].choices)}, (1, 0): outs[1].text,
    }  # fmt: skip
    with pytest.warns(UserWarning, match="n has no effect without a temperature above 0"):
        model_with_exits.generate(["a", "b"], n=2, **SHORT)


def test_a_generation_within_a_stream_of_a_list(model_with_exits: exitlm.LLM) -> None:
    settings = {**SHORT, "mode": "threshold", "threshold": 0.1}
    expected = [out.token_ids for out in model_with_exits.generate(["a", "b"], **settings)]
    found: dict[int, list[int]] = {0: [], 1: []}
    for piece in model_with_exits.stream(["a", "b"], **settings):
        found[piece.index] += piece.token_ids
        assert model_with_exits.generate("b", **settings).token_ids == expected[1]
    assert list(found.values()) == expected


def test_engine_settings_of_a_model(checkpoint: Path) -> None:
    small = exitlm.load(checkpoint, engine={"max_sequences": 2, "block_size": 4})
    assert (small.engine.options.max_sequences, small.engine.options.block_size) == (2, 4)
    assert len(small.generate(["a", "b", "c", "d"], **SHORT)) == 4
    assert small.generate("hello there", **SHORT).stats.shared_tokens == 0
    assert small.generate("hello there", **SHORT).stats.shared_tokens == 8
    for engine, message in (
        ({"max_sequence": 2}, "did you mean 'max_sequences'"),
        (5, "engine is 5"),
        ({"block_size": 0}, "0"),
    ):
        with pytest.raises(UserError, match=message):
            exitlm.load(checkpoint, engine=engine)


def test_a_prompt_longer_than_the_memory_names_the_least(checkpoint: Path) -> None:
    tiny = exitlm.load(checkpoint, engine={"kv_bytes": 1 << 13, "block_size": 4})
    with pytest.raises(UserError, match=r"engine.kv_bytes holds \d+; shorten them, or set it to \d+ or more") as e:
        tiny.generate("x" * 40, **SHORT)
    least = int(str(e.value).split()[-3])
    outs = tiny.generate(["x" * 40, "x"], **{**SHORT, "max_new_tokens": 1})
    assert [out.error is None for out in outs] == [False, True]
    enough = exitlm.load(checkpoint, engine={"kv_bytes": least, "block_size": 4})
    assert len(enough.generate("x" * 40, **SHORT).token_ids) == 8
