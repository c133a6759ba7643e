"""A model as the native kernels run it: near ``exitlm.model`` for every family and sort of exit, and the same to the
last bit however passes are cut, wherever blocks lie, whoever shares them, and on any number of threads."""

import copy
import dataclasses
import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exitlm.decode.kernels.native_model import NativeModel, lacks
from exitlm.decode.kernels.packed import why_not_native
from exitlm.model import EarlyExitModel, ModelConfig
from exitlm.model.exits import ExitConfig
from exitlm.native.pack import quantised
from tests.decode.arithmetic import GRID, NATIVE, STORED, Arithmetic, native_model, param
from tests.decode.driver import Driver, make_runner
from tests.decode.models import attach, random_ids, worst
from tests.decode.test_fused import company, compare_heads, every_head, passes
from tests.model.families import FAMILIES, convert, native_sizes, tiny_hf_config, tiny_hf_model, tiny_model
from tests.model.test_parity import Sizes, random_config
from tests.native.cases import ISAS, forced, needs_native, threads, values_of

pytestmark = needs_native
FLOAT, ROUNDED, ROUNDED_8 = 1e-5, 1e-3, 5e-2
FACTORED = 5e-3
"""Five directions of 64 hold little of what is projected on them, and as much of its rounding as any others."""
KERNEL_SIZES = Sizes(stream=(32, 64), head=(32, 64, 96), inner=(64, 160), phi3=32)
THREE = [ExitConfig(layer=e, kind=kind) for e, kind in enumerate(("block", "lens", "mlp"), 1)]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def rounded(model: EarlyExitModel) -> EarlyExitModel:
    """A float32 model whose matrices are those that quant q8_0 stands for; the embedding is none of them."""
    found = copy.deepcopy(model)
    if found.config.tie_word_embeddings:
        found.lm_head.weight = nn.Parameter(found.lm_head.weight.detach().clone())
    for name, parameter in found.named_parameters():
        factored = "output_down" in name or "output_up" in name or ".gate." in name
        if parameter.dim() == 2 and not factored and "embed_tokens" not in name:
            parameter.copy_(torch.from_numpy(values_of(quantised(parameter))))
    return found


def alike(runs: list[Tensor]) -> bool:
    return all(torch.equal(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_final_logits(family: str) -> None:
    model, ids = native_model(family), random_ids(24)
    runs = passes(model, ids, STORED.pack)
    assert alike(runs)
    assert worst(runs[0], model.logits(ids)[0]) <= FLOAT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "quant"),
    [(torch.bfloat16, "stored"), (torch.float16, "stored"), (torch.float32, "bf16"), (torch.float32, "fp16")],
)
def test_half_precision_weights_meet_float32_activations(family: str, dtype: torch.dtype, quant: str) -> None:
    model = attach(tiny_model(family, torch.float32, **native_sizes(family)), THREE).to(dtype)
    ids = random_ids(12)
    runs = passes(model, ids, Arithmetic("", dtype, quant, 0.0).pack)
    assert alike(runs)
    wide = copy.deepcopy(model).float()
    if quant != "stored":
        halved = torch.bfloat16 if quant == "bf16" else torch.float16
        if wide.config.tie_word_embeddings:
            wide.lm_head.weight = nn.Parameter(wide.lm_head.weight.detach().clone())
        for name, parameter in wide.named_parameters():
            if parameter.dim() == 2 and "embed_tokens" not in name:
                parameter.copy_(parameter.to(halved))
    scale = float(torch.tensor(wide.config.embedding_scale, dtype=dtype))  # rounded as the embedding is
    wide.config = dataclasses.replace(wide.config, embedding_scale=scale)
    assert worst(runs[0], wide.logits(ids)[0]) <= FLOAT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("digits", "tolerance"), [(15, ROUNDED), (8, ROUNDED_8)])
def test_final_logits_of_weights_on_a_grid(family: str, digits: int, tolerance: float) -> None:
    model, ids = native_model(family), random_ids(24)
    runs = passes(model, ids, Arithmetic("", torch.float32, "q8_0", 0.0, activation_bits=digits).pack)
    assert alike(runs)
    assert worst(runs[0], rounded(model).logits(ids)[0]) <= tolerance


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 40))])
@pytest.mark.parametrize("family", FAMILIES)
def test_final_logits_on_random_configurations(family: str, seed: int) -> None:
    """Grouped heads, windows, partial rotary, scaled RoPE, biases, tied or not, activations, layers without RoPE."""
    rng = random.Random(f"native {family} {seed}")
    config = random_config(family, rng, 14, KERNEL_SIZES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = convert(tiny_hf_model(family, seed, **config))
    assert lacks(model.config) is None
    ids = random_ids(14, seed)
    for arithmetic, reference, tolerance in ((STORED, model, FLOAT), (GRID, rounded(model), ROUNDED)):
        runs = passes(model, ids, arithmetic.pack)
        assert alike(runs), config
        assert worst(runs[0], reference.logits(ids)[0]) <= tolerance, config


def some_heads(family: str, every: int) -> Iterator[tuple[EarlyExitModel, int]]:
    """A share of all sorts of exits on a family's model, another one for each family."""
    for number, configs in list(enumerate(every_head()))[FAMILIES.index(family) % every :: every]:
        yield attach(copy.deepcopy(native_model(family)), configs, seed=number), number


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_every_head(family: str, every: int) -> None:
    for model, number in some_heads(family, every):
        compare_heads(model, random_ids(10, number), STORED.pack, FLOAT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_every_head_on_a_grid(family: str, every: int) -> None:
    for model, number in some_heads(family, every):
        factored = any(head.config.output == "low_rank" for head in model.exit_heads().values())
        compare_heads(model, random_ids(10, number), GRID.pack, FACTORED if factored else ROUNDED, rounded(model))


def test_heads_that_share_a_matrix_are_packed_once() -> None:
    model = copy.deepcopy(native_model("llama"))
    attach(model, [ExitConfig(layer=layer, output="exits") for layer in (1, 2)])
    model.add_exits([ExitConfig(layer=3, output="own")])
    heads = {layer: head for (_, layer), head in STORED.pack(model).heads.items()}
    assert heads[1].c.first.data == heads[2].c.first.data  # type: ignore[union-attr]
    assert heads[3].c.first.data != heads[1].c.first.data  # type: ignore[union-attr]


# ---- to the last bit


@pytest.mark.parametrize("seeds", [1, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arithmetic", [param(each) for each in NATIVE])
def test_rows_of_several_sequences_are_those_of_each_alone(arithmetic: Arithmetic, family: str, seeds: int) -> None:
    """Logits of every exit and of the end, keys and values, whoever shares the passes and wherever blocks lie."""
    model = attach(copy.deepcopy(native_model(family)), THREE)
    for seed in range(seeds):
        for scatter, leave_windows in ((0, True), (1, False), (2, True)):
            assert all(map(torch.equal, *company(model, scatter, leave_windows, seed, make=arithmetic.pack)))


@pytest.mark.parametrize("scatter", [1, 30, 60])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_many_keys_in_scattered_blocks(family: str, scatter: int) -> None:
    model = tiny_model(family, torch.float32, max_position_embeddings=1024, **native_sizes(family))
    attach(model, [ExitConfig(layer=2, kind="block")])
    assert all(map(torch.equal, *company(model, scatter, False, 0, (540, 700), STORED.pack)))


def everything(model: EarlyExitModel, arithmetic: Arithmetic, ids: list[int], block_size: int = 8) -> list[Tensor]:
    """Logits of every exit and of the end, and all keys and values, after one pass over each segment."""
    runner = make_runner(arithmetic.pack(model), 2 * len(ids) + 64, block_size)
    driver, found = Driver(runner), []
    driver.enter(ids)
    for boundary in range(1, runner.segments):
        arrived = driver.advance([], boundary)
        found.append(runner.exit_logits(boundary, arrived, range(len(ids))).clone())
    found.append(runner.final_logits(driver.advance([]), range(len(ids))))
    return found + [driver.stored(entry) for entry in range(len(runner.pool.stores))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arithmetic", [param(each) for each in NATIVE])
def test_segments_cut_at_any_exits_are_the_whole(arithmetic: Arithmetic, family: str) -> None:
    """Whatever exits cut the layers: the final logits and the layers' keys and values are those without any."""
    model, ids = copy.deepcopy(native_model(family)), random_ids(21)
    L = model.config.num_hidden_layers
    whole = everything(attach(model, []), arithmetic, ids)
    for layers in ((1,), (2,), (3,), (1, 3), (1, 2, 3), (4,)):
        kinds = ("block", "lens", "mlp", "norm")
        attach(model, [ExitConfig(layer=layer, kind=kinds[layer - 1]) for layer in layers])
        found = everything(model, arithmetic, ids)[len([layer for layer in layers if layer < L]) :]
        assert all(map(torch.equal, found[: len(whole)], whole))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("arithmetic", "count"), [param(STORED, 2), param(GRID, 3), *(param(each, 9, slow=True) for each in NATIVE)]
)
def test_any_number_of_threads(arithmetic: Arithmetic, family: str, count: int) -> None:
    """More than there are cores, too."""
    model, ids = attach(copy.deepcopy(native_model(family)), THREE), random_ids(19)
    alone = everything(model, arithmetic, ids)
    pack = arithmetic.pack

    class Several:
        @staticmethod
        def pack(model: EarlyExitModel) -> Any:
            found = pack(model)
            assert isinstance(found, NativeModel)
            found.kernels.threads(count)
            return found

    with threads(count):
        assert all(map(torch.equal, everything(model, Several(), ids), alone))  # type: ignore[arg-type]
        together = company(model, 1, False, 3, make=Several.pack)
    assert all(map(torch.equal, *together))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_instruction_set(isa: str, family: str) -> None:
    model, ids = attach(copy.deepcopy(native_model(family)), THREE), random_ids(13)
    with forced(isa):
        for arithmetic, reference, tolerance in ((STORED, model, FLOAT), (GRID, rounded(model), ROUNDED)):
            assert STORED.pack(model).compile == f"native {isa}"
            runs = passes(model, ids, arithmetic.pack)
            assert alike(runs)
            assert worst(runs[0], reference.logits(ids)[0]) <= tolerance
            compare_heads(model, ids, arithmetic.pack, tolerance, reference)
        for arithmetic in NATIVE[1:]:
            assert all(map(torch.equal, *company(model, 1, True, 0, make=arithmetic.pack)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 192, 256])
def test_every_width_of_a_head(isa: str, head_dim: int) -> None:
    model, ids = tiny_model("llama", torch.float32, **{**native_sizes("llama"), "head_dim": head_dim}), random_ids(40)
    with forced(isa):
        for kv_dtype, tolerance in (("float32", FLOAT), ("float16", 2e-3)):
            runs = passes(model, ids, Arithmetic("", torch.float32, "stored", 0.0, kv_dtype=kv_dtype).pack)
            assert alike(runs)
            assert worst(runs[0], model.logits(ids)[0]) <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_precision_cache(family: str) -> None:
    """Near the float32 one, half as large, and in its pool there are halves."""
    model, ids = attach(copy.deepcopy(native_model(family)), THREE), random_ids(40)
    half = Arithmetic("", torch.float32, "stored", 0.0, kv_dtype="float16")
    narrow, wide = everything(model, half, ids), everything(model, STORED, ids)
    for found, expected in zip(narrow, wide, strict=True):
        assert worst(found.float(), expected) <= 2e-3
    assert {found.dtype for found in narrow[4:]} == {torch.float16}
    assert torch.equal(narrow[4], wide[4].half())  # of the first layer: what it reads is the same
    assert alike(passes(model, ids, half.pack))


def test_blocks_of_any_size() -> None:
    """The size of blocks decides no bit of the logits, with and without windows."""
    for family in ("llama", "mistral", "gemma3_text"):
        model, ids = attach(copy.deepcopy(native_model(family)), THREE), random_ids(41)
        expected = everything(model, STORED, ids, 32)
        for size in (1, 2, 3, 5, 8, 64):
            assert all(map(torch.equal, everything(model, STORED, ids, size), expected)), (family, size)


def test_more_threads_than_cores() -> None:
    model, ids = attach(copy.deepcopy(native_model("llama")), THREE), random_ids(19)
    alone = everything(model, GRID, ids)
    runner = make_runner(GRID.pack(model), 512)
    with threads(4 * (os.cpu_count() or 1) + 1):
        for _ in range(20):
            driver = Driver(runner)
            found = runner.final_logits(driver.advance(ids), range(len(ids)))
            assert torch.equal(found, alone[3])
            driver.release()


def test_a_forked_process_decodes_the_same() -> None:
    """After the pool of its parent ran, whose threads it has not; and the parent goes on."""
    model, ids = attach(copy.deepcopy(native_model("llama")), THREE), random_ids(19)
    with threads(3):
        native = STORED.pack(model)
        assert isinstance(native, NativeModel)
        native.kernels.threads(3)
        runner = make_runner(native)
        before = runner.final_logits(Driver(runner).advance(ids), range(len(ids)))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                found = runner.final_logits(Driver(runner).advance(ids), range(len(ids)))
                os.write(write, b"same" if torch.equal(found, before) else b"other")
                status = 0
            finally:
                os._exit(status)
        os.close(write)
        with os.fdopen(read, "rb") as answer:
            assert answer.read() == b"same"
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(runner.final_logits(Driver(runner).advance(ids), range(len(ids))), before)


# ---- rotations


def test_texts_on_both_sides_of_a_longropes_length_share_passes() -> None:
    settings = {
        "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 16, "long_factor": [2.5] * 16,
        "original_max_position_embeddings": 12, "factor": 4.0,
    }  # fmt: skip
    model = tiny_model("llama", torch.float32, rope_parameters=settings, **native_sizes("llama"))
    runner = make_runner(STORED.pack(model))
    for ids in (random_ids(9), random_ids(20)):
        found = runner.final_logits(Driver(runner, total=len(ids)).advance(ids), range(len(ids)))
        assert worst(found, model.logits(ids)[0]) <= FLOAT


def test_tables_of_rotations_are_as_long_as_the_longest_row_needs() -> None:
    """A text beyond a longrope's length has tables of its own, which may be shorter than what the others need."""
    settings = {
        "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 16, "long_factor": [2.5] * 16,
        "original_max_position_embeddings": 1500, "factor": 4.0,
    }  # fmt: skip
    over: dict[str, Any] = {**native_sizes("llama"), "max_position_embeddings": 4096, "num_hidden_layers": 1}
    model = tiny_model("llama", torch.float32, rope_parameters=settings, **over)
    runner = make_runner(STORED.pack(model), 8192)
    Driver(runner, total=1600).advance(random_ids(5))  # the first rows of a long prompt
    short = Driver(runner, total=1400)
    short.prefill(random_ids(1400), 512)
    assert short.filled == [1400]


# ---- what they lack


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"head_dim": 40}, "heads of 40 dimensions"),
        ({"hidden_size": 80}, "no multiples of 32"),
        ({"intermediate_size": 100}, "no multiples of 32"),
        ({"hidden_size": 2080, "num_attention_heads": 65, "num_key_value_heads": 1}, "65 heads that share"),
    ],
)
def test_what_the_kernels_lack_is_named(over: dict[str, Any], words: str) -> None:
    hf = tiny_hf_config("llama", **{**native_sizes("llama"), **over})
    found = lacks(ModelConfig.from_hf(hf.to_dict()))
    assert found is not None
    assert words in found


def test_why_a_model_runs_by_torch() -> None:
    config, cpu = native_model("llama").config, torch.device("cpu")
    assert why_not_native(config, cpu, torch.float32) is None
    for quant, compile, words in (("none", "auto", "a format of torch"), ("auto", "graphs", "a way of torch")):
        assert words in str(why_not_native(config, cpu, torch.float32, quant, compile))
    assert "float64" in str(why_not_native(config, cpu, torch.float64))
    assert "on meta" in str(why_not_native(config, torch.device("meta"), torch.float32))
    assert "they lack" in str(why_not_native(tiny_model("llama").config, cpu, torch.float32))
