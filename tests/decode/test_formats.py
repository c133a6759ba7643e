"""Weight formats against ``F.linear``, each within what its bits allow, and the rule that chooses one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exitlm.decode.engine import Engine
from exitlm.decode.kernels import formats
from exitlm.decode.kernels.formats import (
    FORMATS,
    choose_format,
    four_bit_grid,
    head_format,
    is_four_bit,
    pack_linear,
    resolve_format,
    sixteen_bit_format,
)
from exitlm.errors import UserError
from tests.decode.models import drafting_model, generate, random_ids, some_costs
from tests.model.families import tiny_model

# the error of the result as a share of |x| |w|: rounding of the weights (and of activations, where those are short)
TOLERANCES = {"none": 1e-6, "fp16": 5e-4, "bf16": 1e-2, "int8": 1.5e-2, "int4": 8e-2}


def works(quant: str) -> bool:
    return quant in ("none", "fp16", "bf16") or formats._works(quant)


USABLE = [quant for quant in FORMATS if works(quant)]


def some(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def on_grid(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix as a 4-bit format holds it: groups of 32 with a scale and an offset; every group uses both ends."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 16, (rows, columns // 32, 32), generator=generator).float()
    steps[..., 0], steps[..., 1] = 0.0, 15.0
    scale = torch.rand(rows, columns // 32, 1, generator=generator) + 0.01
    return ((steps - 7.3) * scale).view(rows, columns)


@pytest.mark.parametrize("quant", USABLE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (96, 33), (50, 16), (7, 5)])
def test_the_product(quant: str, bias: bool, inputs: int, outputs: int) -> None:
    weight, offset = some(outputs, inputs, 0), some(1, outputs, 1)[0] if bias else None
    linear = pack_linear(weight, offset, quant)
    for rows in (1, 2, 5, 16, 17):
        x = some(rows, inputs, rows)
        found, expected = linear(x), F.linear(x, weight, offset)
        assert found.shape == expected.shape
        size = x.norm(dim=-1, keepdim=True) * weight.norm(dim=-1)
        if offset is not None:
            size = size + offset.abs()
        assert float(((found.float() - expected).abs() / size).max()) <= TOLERANCES[quant]


@pytest.mark.parametrize("quant", USABLE)
def test_rows_are_independent(quant: str) -> None:
    """Row i of M rows is what the row alone gives, up to the order of a sum (kernels differ between one row and
    several; a bfloat16 result may then be one rounding off). No other row matters, however large."""
    linear = pack_linear(some(96, 64, 0), None, quant)
    x = some(9, 64, 1)
    alone = torch.cat([linear(row[None]) for row in x]).float()
    wild = x.clone()
    wild[4] *= 1e4
    tolerance = {"none": 1e-6, "fp16": 1e-6}.get(quant, 2**-7)
    others = [i for i in range(9) if i != 4]
    for together in (linear(x), linear(wild)):
        worst = (together.float() - alone)[others].abs().amax(-1) / alone[others].abs().amax(-1)
        assert float(worst.max()) <= tolerance


@pytest.mark.parametrize("quant", USABLE)
def test_rows_are_bitwise_independent_of_what_the_other_rows_hold(quant: str) -> None:
    linear = pack_linear(some(96, 64, 0), None, quant)
    x = some(6, 64, 1)
    first = linear(x)
    x[3:] = 50.0
    assert torch.equal(linear(x)[:3], first[:3])


@pytest.mark.skipif("int4" not in USABLE, reason="no int4 kernel on this processor")
def test_int4_loses_nothing_of_a_matrix_on_the_grid() -> None:
    weight, x = on_grid(32, 64), some(3, 64, 5).to(torch.bfloat16).float()
    found = pack_linear(weight, None, "int4")(x).float()
    expected = F.linear(x, weight)
    rough = pack_linear(some(32, 64, 0), None, "int4")(x).float() - F.linear(x, some(32, 64, 0))
    size = x.norm(dim=-1, keepdim=True) * weight.norm(dim=-1)
    assert float(((found - expected).abs() / size).max()) <= 4e-3  # scales and the result are bfloat16
    assert float((rough.abs() / (x.norm(dim=-1, keepdim=True) * some(32, 64, 0).norm(dim=-1))).max()) > 4e-3


def test_what_lies_on_a_four_bit_grid() -> None:
    assert is_four_bit(on_grid(48, 64))
    assert is_four_bit(on_grid(16, 32, seed=3).to(torch.float16).float() * 4)
    assert not is_four_bit(some(48, 64, 0))
    assert not is_four_bit(on_grid(48, 64).double())
    assert not is_four_bit(on_grid(48, 64)[:, :40])  # not in groups of 32
    assert not is_four_bit(on_grid(48, 64)[:40])  # not in blocks of 16
    assert is_four_bit(torch.zeros(16, 32))
    slightly_off = on_grid(48, 64)
    slightly_off[7, 40] += 0.3 * float(four_bit_grid(slightly_off)[0][7, 1])
    assert not is_four_bit(slightly_off)


def test_the_grid_of_a_matrix_gives_it_back() -> None:
    weight = on_grid(16, 96)
    scale, low, steps = four_bit_grid(weight)
    back = steps.round().view(16, 3, 32) * scale[..., None] + low[..., None]
    assert torch.allclose(back.view(16, 96), weight, atol=1e-5)


def test_a_shape_that_int4_cannot_hold_gets_sixteen_bits() -> None:
    for weight in (some(16, 40, 0), some(15, 64, 0)):
        x = some(2, weight.shape[1], 1)
        found = pack_linear(weight, None, "int4")(x).float()
        assert float((found - F.linear(x, weight)).abs().max()) < 0.2


def test_float64_and_accelerators_are_never_packed() -> None:
    assert choose_format([some(16, 32, 0).double()]) == "none"
    assert choose_format([some(16, 32, 0).to("meta")]) == "none"
    assert resolve_format("auto", [some(16, 32, 0).double()]) == "none"
    assert Engine(tiny_model("llama")).quant == "none"


def test_the_default_is_a_rule_about_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid = some(16, 32, 0), on_grid(16, 32)
    monkeypatch.setattr(formats, "has_amx_bf16", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert choose_format([weight]) == choose_format([grid]) == sixteen_bit_format() == "fp16"
    monkeypatch.setattr(formats, "_works", lambda quant: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert choose_format([grid, weight]) == "fp16"  # one matrix that would lose is enough
    assert (choose_format([weight]), choose_format([grid, grid])) == ("fp16", "int4")
    monkeypatch.setattr(formats, "_works", lambda quant: False)
    assert choose_format([grid]) == "fp16"
    monkeypatch.setattr(formats, "has_amx_bf16", lambda: True)
    assert choose_format([weight]) == "bf16"


@pytest.mark.parametrize("quant", USABLE)
def test_logits_are_not_rounded_to_bfloat16(quant: str) -> None:
    """They would tie too often: heads keep float32 results whatever the layers have."""
    assert head_format(quant) == ("none" if quant == "none" else "fp16")
    logits = pack_linear(some(96, 64, 0), None, head_format(quant))(some(2, 64, 1))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_formats_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = some(16, 32, 0)
    with pytest.raises(UserError, match="did you mean 'fp16'"):
        resolve_format("fp15", [weight])
    with pytest.raises(UserError, match="float64"):
        resolve_format("int8", [weight.double()])
    with pytest.raises(UserError, match="meta"):
        resolve_format("fp16", [weight.to("meta")])
    monkeypatch.setattr(formats, "_works", lambda quant: False)
    with pytest.raises(UserError, match="wrongly"):
        resolve_format("int4", [weight])
    assert resolve_format("none", [weight.double()]) == "none"


@pytest.mark.parametrize("quant", USABLE)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "qwen2"])
def test_a_whole_model_in_a_format(quant: str, family: str) -> None:
    """The text is near the unpacked one's: its log-probabilities under the plain model are as the format allows."""
    model = drafting_model(family, dtype=torch.float32)
    engine = Engine(model, quant=quant, costs=some_costs(model))
    out = generate(engine, random_ids(5), max_new_tokens=12, threshold=0.05, ignore_eos=True, logprobs=1)
    assert out.stats.quant == quant
    text = [*random_ids(5), *out.token_ids]
    expected = torch.log_softmax(model.logits(text)[0], -1)
    found = torch.tensor([token.logprob for token in out.trace])
    exact = expected[range(4, 16), out.token_ids]
    assert float((found - exact).abs().max()) <= {"none": 1e-4, "fp16": 1e-2, "bf16": 0.3, "int8": 0.3}.get(quant, 2.0)
