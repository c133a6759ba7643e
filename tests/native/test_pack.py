"""Packed bytes mean what the stored ones mean: read back by the layouts of exitcpu.h, every value of every type is the
``gguf`` package's, to the last bit; integers of a grid are compared as integers."""

import gguf
import numpy as np
import pytest
import torch

from exitlm.native.pack import (
    FORMATS,
    RAW_TYPES,
    RawMatrix,
    fits,
    format_of,
    pack,
    packed_bytes,
    quantised,
    raw_of,
)
from tests.native.cases import (
    FLOATS,
    SUPERBLOCKS,
    TYPES,
    cols_for,
    kernels,
    needs_native,
    random_raw,
    unpacked,
    values_of,
)

ROWS = (1, 16, 32, 50, 97)


def padded(rows: int) -> int:
    return -(-rows // 32) * 32


def steps_of(raw: RawMatrix) -> np.ndarray:
    """The integers of a grid, from what they stand for: the values of the same blocks with all scales 1, offsets 0."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[raw.type]]
    plain = raw.rows.reshape(raw.count, raw.cols // block, size).copy()
    one, none = (np.array([x], np.float16).view(np.uint8) for x in (1.0, 0.0))
    if raw.type == "Q4_K":
        plain[:, :, :2], plain[:, :, 2:4] = one, none
        plain[:, :, 4:12], plain[:, :, 12:16] = 1, 1  # small scales of 1
    elif raw.type == "Q6_K":
        plain[:, :, 192:208], plain[:, :, 208:] = 1, one
    else:
        plain[:, :, :2] = one
        if raw.type == "Q4_1":
            plain[:, :, 2:4] = none
    found = values_of(RawMatrix(raw.type, plain.reshape(raw.count, -1), raw.cols))
    assert (found == found.round()).all()
    return found.astype(np.int64) + (8 if raw.type == "Q4_0" else 0)


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_grid_keeps_every_integer_and_every_value(type: str, rows: int) -> None:
    for cols in cols_for(type):
        raw = random_raw(type, rows, cols)
        found = unpacked(format_of(type), pack(raw), padded(rows), cols)
        assert found.step is not None
        assert np.array_equal(found.step[:rows], steps_of(raw))
        assert np.array_equal(found.values[:rows].astype(np.float32), values_of(raw))
        assert not found.values[rows:].any()


@pytest.mark.parametrize("type", TYPES)
def test_blocks_that_the_gguf_package_makes(type: str) -> None:
    """Of values as a model has them, with groups that are zero, constant, or hold one large value."""
    rng = np.random.default_rng(5)
    values = rng.normal(0, 0.02, (48, 512)).astype(np.float32)
    values[3], values[4, :256], values[5, 40] = 0.0, 0.5, 9.0
    if type in SUPERBLOCKS:
        raw = random_raw(type, 48, 512, seed=3, spread=0.02)
    else:
        quantity = gguf.quantize(values, gguf.GGMLQuantizationType[type])
        raw = RawMatrix(type, quantity.reshape(48, -1), 512)
    found = unpacked(format_of(type), pack(raw), 64, 512)
    assert np.array_equal(found.values[:48].astype(np.float32), values_of(raw))


@pytest.mark.parametrize("type", FLOATS)
@pytest.mark.parametrize("rows", ROWS)
def test_floats_keep_their_bits(type: str, rows: int) -> None:
    for cols in cols_for(type):
        raw = random_raw(type, rows, cols)
        words = raw.rows.view(f"<u{raw.rows.shape[1] // cols}").copy()
        words[0, :4] = {"F16": (0x7C00, 0x0001, 0x8000, 0xFBFF), "BF16": (0x7F80, 0x0001, 0x8000, 0xFF7F)}.get(
            type, (0x7F800000, 0x00000001, 0x80000000, 0xFF7FFFFF)
        )  # infinity, the smallest number, minus zero, the most negative number
        raw = RawMatrix(type, words.view(np.uint8), cols)
        found = unpacked(format_of(type), pack(raw), padded(rows), cols).values
        expected = values_of(raw)
        assert np.array_equal(found[:rows].astype(np.float32).view(np.uint32), expected.view(np.uint32))
        assert not found[rows:].any()


@pytest.mark.parametrize("type", RAW_TYPES)
def test_rows_are_taken_in_any_order(type: str) -> None:
    cols = cols_for(type)[-1]
    raw, some = random_raw(type, 70, cols), np.array([66, 3, 3, 41, 0])
    assert np.array_equal(values_of(raw.take(some)), values_of(raw)[some])
    found = unpacked(format_of(type), pack(raw.take(slice(5, 44))), 64, cols).values
    assert np.array_equal(found[:39].astype(np.float32), values_of(raw)[5:44])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_torch_matrix_as_it_is(dtype: torch.dtype) -> None:
    """Also one that is a view with other strides."""
    wide = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    for weight in (wide.T, wide.T[3:35], wide[:, :32]):
        raw = raw_of(weight)
        assert (raw.count, raw.cols) == tuple(weight.shape)
        assert np.array_equal(values_of(raw), weight.float().numpy())


def test_quantised_is_what_q8_0_means() -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 40)[:, None]
    weight[7], weight[8, 32:64] = 0.0, 0.0
    raw = quantised(weight)
    assert (raw.type, raw.count, raw.cols) == ("Q8_0", 40, 96)
    found = torch.from_numpy(values_of(raw))
    step = weight.reshape(40, 3, 32).abs().amax(-1) / 127
    error = (found - weight).reshape(40, 3, 32).abs().amax(-1)
    # half a step and, for the largest values, what a half-precision scale is off by; scales below 2^-14 are subnormal
    assert (error <= step * (0.5 + 127 * 2**-11) + 127 * 2**-25).all()
    assert not found[7].any()
    again = quantised(found)
    assert np.array_equal(again.rows, raw.rows)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_quantised_hides_no_damage(value: float) -> None:
    weight = torch.ones(32, 64)
    weight[3, 40] = value
    with np.errstate(invalid="ignore"):
        found = values_of(quantised(weight))
    assert not np.isfinite(found[3, 32:]).all()
    assert np.isfinite(found[[0, 1, 2, 4]]).all()


def test_what_can_be_laid_out() -> None:
    assert all(fits(type, cols) for type in RAW_TYPES for cols in cols_for(type))
    assert not any(fits(type, 33) for type in RAW_TYPES)
    assert not any(fits(type, 32 * 9) for type in SUPERBLOCKS)
    assert not fits("Q2_K", 256)
    with pytest.raises(KeyError):
        format_of("Q5_1")


@needs_native
def test_both_sides_count_the_same_bytes() -> None:
    count = kernels().lib.exitcpu_packed_bytes
    for number, format in enumerate(FORMATS):
        for rows, cols in ((32, 256), (64, 512), (96, 2304)):
            assert count(number, rows, cols) == packed_bytes(format, rows, cols)
        for rows, cols in ((32, 31), (31, 32), (16, 256), (0, 32), (32, 0), (-32, 32), (32, -256)):
            assert count(number, rows, cols) == -1
        for cols in (32, 96, 160):
            expected = -1 if format in ("k4", "k6") else packed_bytes(format, 32, cols)
            assert count(number, 32, cols) == expected
    assert count(len(FORMATS), 32, 256) == count(-1, 32, 256) == -1
