"""Products of packed matrices under every instruction set that this processor has: near float64, bit by bit the same
however many rows and threads take part, and never a number where an activation is none. Sizes that can't be are refused
before anything is read: what must not be read lies where reading would end the process."""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from exitlm.native import abi
from exitlm.native.pack import FORMATS, RAW_TYPES
from tests.native.cases import (
    FLOATS,
    ISAS,
    NOWHERE,
    Packed,
    SmallLayer,
    cols_for,
    forced,
    kernels,
    needs_native,
    random_raw,
    random_rows,
    threads,
    values_of,
)

pytestmark = needs_native
SOME_ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 64)
WAYS = [(type, digits) for type in RAW_TYPES for digits in (2, 1) if digits == 2 or type not in FLOATS]
TOLERANCE = {2: 1e-4, 1: 1.5e-2}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param), threads(1):
        yield request.param


def product(matrix: Packed, x_MK: NDArray[np.float32]) -> NDArray[np.float64]:
    """In float64, ``[M, N]``."""
    found = x_MK.astype(np.float64) @ values_of(matrix.raw).astype(np.float64).T
    return found if matrix.bias is None else found + matrix.bias


def largest(x_MK: NDArray[np.float32], matrix: Packed) -> NDArray[np.float64]:
    """How large the largest product of each row is where signs are random, ``[M]``: two standard deviations. (The
    largest itself may be small by chance.)"""
    return 2 * np.sqrt(x_MK.astype(np.float64) ** 2 @ values_of(matrix.raw).astype(np.float64).T ** 2).max(1)


def test_the_library_approves_of_itself(isa: str) -> None:
    assert kernels().isa == isa
    assert kernels().lib.exitcpu_check() == 0


@pytest.mark.parametrize(("type", "digits"), WAYS)
def test_products_are_near_float64(isa: str, type: str, digits: int) -> None:
    tolerance = 2e-6 if type in FLOATS else TOLERANCE[digits]
    for number, (rows, cols) in enumerate([(50, cols_for(type)[0]), (97, cols_for(type)[1]), (32, cols_for(type)[-1])]):
        bias = random_rows(1, 128)[0, :rows] if number else None
        matrix = Packed(random_raw(type, rows, cols, seed=number), digits, bias)
        for count in (1, 3, 9):
            x = random_rows(count, cols, seed=count)
            exact, found = product(matrix, x), matrix.times(x)
            assert (np.abs(found - exact).max(1) <= tolerance * largest(x, matrix) + 2e-7 * np.abs(exact).max(1)).all()


@pytest.mark.parametrize(("type", "digits"), WAYS)
def test_whole_activations_meet_a_grid_exactly(isa: str, type: str, digits: int) -> None:
    """Activations that are integers with the largest of each group at the end of their range lose nothing: what is left
    is the rounding of float32 sums, far below one step of an activation. A wrong lane, half or sign would be seen."""
    cols, most = cols_for(type)[-1], 127 * 128 if digits == 2 else 127
    matrix = Packed(random_raw(type, 64, cols), digits)
    x = np.random.default_rng(0).integers(-most, most + 1, (9, cols)).astype(np.float32)
    x[:, ::32] = np.where(x[:, ::32] < 0, -most, most)
    exact, found = product(matrix, x), matrix.times(x)
    size = np.abs(x).astype(np.float64) @ np.abs(values_of(matrix.raw)).astype(np.float64).T
    assert (np.abs(found - exact) <= 5e-7 * size).all()


@pytest.mark.parametrize(("type", "digits"), WAYS)
def test_a_row_is_the_same_with_any_neighbours_and_threads(isa: str, type: str, digits: int) -> None:
    """To the last bit, for 1 to 64 rows, at any place among them, with 1, 2, 3 and 8 threads."""
    cols = cols_for(type)[1]
    matrix = Packed(random_raw(type, 200, cols), digits, random_rows(1, 224)[0, :200])
    x = random_rows(64, cols)
    alone = np.concatenate([matrix.times(x[i : i + 1]) for i in range(64)])
    for count in range(2, 65):
        first = 64 - count if count % 3 else 0
        assert np.array_equal(matrix.times(x[first : first + count]), alone[first : first + count]), count
    for number in (2, 3, 8):
        with threads(number):
            for count in SOME_ROWS:
                assert np.array_equal(matrix.times(x[:count]), alone[:count]), (number, count)


@pytest.mark.parametrize(("type", "digits"), WAYS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_activation_that_is_not_finite_shows(isa: str, type: str, digits: int, value: float) -> None:
    """In every output of its row, and in no other row."""
    cols = cols_for(type)[1]
    matrix, x = Packed(random_raw(type, 40, cols), digits), random_rows(6, cols)
    expected = matrix.times(x)
    for row, at in ((0, 0), (2, 31), (5, cols - 1), (3, 47)):
        broken = x.copy()
        broken[row, at] = value
        found = matrix.times(broken)
        assert not np.isfinite(found[row]).any()
        others = np.arange(6) != row
        assert np.array_equal(found[others], expected[others])
    both = x.copy()
    both[1, 4], both[1, 40] = np.inf, -np.inf
    assert not np.isfinite(matrix.times(both)[1]).any()


@pytest.mark.parametrize(("type", "digits"), WAYS)
def test_rows_of_nothing_and_of_next_to_nothing(isa: str, type: str, digits: int) -> None:
    """Zeros give the bias; numbers too small for the inverse of their step, and denormal ones, give about nothing, and
    do not disturb the other groups of their row."""
    cols = cols_for(type)[1]
    bias = random_rows(1, 64)[0, :40]
    matrix, plain = Packed(random_raw(type, 40, cols), digits, bias), Packed(random_raw(type, 40, cols), digits)
    zeros = np.zeros((3, cols), np.float32)
    assert np.array_equal(matrix.times(zeros), np.tile(bias, (3, 1)))
    tolerance = 2e-6 if type in FLOATS else TOLERANCE[digits]
    for size in (1e-42, 1e-39, 1e-37, 1e-35, 3e-34, 1e-31):
        tiny = (np.sign(random_rows(5, cols)) * size).astype(np.float32)
        assert np.abs(plain.times(tiny)).max() <= 10 * cols * size
        mixed = random_rows(5, cols)
        mixed[:, 32:64] = tiny[:, 32:64]
        assert (np.abs(plain.times(mixed) - product(plain, mixed)).max(1) <= tolerance * largest(mixed, plain)).all()
    large = random_rows(2, cols) * np.float32(1e30)
    assert (np.abs(plain.times(large) - product(plain, large)).max(1) <= tolerance * largest(large, plain)).all()


# ---- what is refused


BAD_MATRICES = [
    *[("format", value) for value in (-1, len(FORMATS), 1 << 30)],
    *[("digits", value) for value in (-1, 0, 3)],
    *[("rows", value) for value in (-32, 0, 16, 33)],
    *[("cols", value) for value in (-32, 0, 16, 33)],
    *[("data", value) for value in (0, NOWHERE + 1, NOWHERE + 32)],
    *[("stride", value) for value in (-64, 32, 64, (1 << 62) + 1)],
]


@pytest.mark.parametrize(("name", "value"), BAD_MATRICES)
def test_a_matrix_that_cannot_be_is_refused(name: str, value: int) -> None:
    lib, x, out = kernels().lib, random_rows(1, 64), np.full(64, 7.0, np.float32)
    for format in range(len(FORMATS)):
        matrix = abi.Matrix(NOWHERE, None, 32, 256 if FORMATS[format] in ("k4", "k6") else 64, format, 2)
        setattr(matrix, name, value)
        assert lib.exitcpu_matmul(ctypes.byref(matrix), 1, x.ctypes.data, out.ctypes.data) == 2
        assert (out == 7.0).all()


@pytest.mark.parametrize("format", ["k4", "k6"])
def test_blocks_of_256_that_do_not_fit_are_refused(format: str) -> None:
    matrix, x, out = abi.Matrix(NOWHERE, None, 32, 288, FORMATS.index(format), 2), random_rows(1, 288), np.empty(32)
    assert kernels().lib.exitcpu_matmul(ctypes.byref(matrix), 1, x.ctypes.data, out.ctypes.data) == 2


def test_a_product_of_nothing_is_refused() -> None:
    matrix, x = Packed(random_raw("Q8_0", 32, 64)), random_rows(1, 64)
    lib, c = kernels().lib, ctypes.byref(matrix.c)
    for rows in (0, -1):
        assert lib.exitcpu_matmul(c, rows, x.ctypes.data, x.ctypes.data) == 2
    assert lib.exitcpu_matmul(None, 1, x.ctypes.data, x.ctypes.data) == 2
    assert lib.exitcpu_matmul(c, 1, None, x.ctypes.data) == 2
    assert lib.exitcpu_matmul(c, 1, x.ctypes.data, None) == 2
    with pytest.raises(RuntimeError, match="a matrix does not fit"):
        matrix.times(np.empty((0, 64), np.float32))


def test_a_product_beyond_all_memory_is_an_error() -> None:
    """Before anything is read."""
    most = (1 << 31) - 32
    matrix, lib = abi.Matrix(NOWHERE, None, 32, most, FORMATS.index("f32"), 2), kernels().lib
    with pytest.raises(RuntimeError, match="there is too little memory"):
        abi._checked(lib.exitcpu_matmul(ctypes.byref(matrix), most, NOWHERE, NOWHERE))
    assert np.isfinite(Packed(random_raw("F32", 32, 64)).times(random_rows(3, 64))).all()


def test_threads_that_cannot_be_are_refused() -> None:
    for count in (0, -1, 1025):
        with pytest.raises(RuntimeError, match="refuse"):
            kernels().threads(count)


def set_in(owner: str, name: str, value: Any) -> Callable[[SmallLayer], None]:
    return lambda small: setattr(getattr(small, owner), name, value)


def set_at(owner: str, index: Any, value: int) -> Callable[[SmallLayer], None]:
    def change(small: SmallLayer) -> None:
        getattr(small, owner)[index] = value

    return change


def right_but_for_2_32(small: SmallLayer) -> None:
    """Products of these wrap to those of the small layer, in 32 bits."""
    small.shape.heads, small.shape.kv_heads = small.HEADS + (1 << 28), small.KV + (1 << 27)


def set_matrix(matrix: str, name: str, value: int) -> Callable[[SmallLayer], None]:
    return lambda small: setattr(getattr(small.layer, matrix), name, value)


SHAPES = [
    *[("head_dim", value) for value in (40, 0, -32, 16, 224, 288)],
    *[("heads", value) for value in (0, -4, 3, 5)],
    *[("kv_heads", value) for value in (0, -2, 3)],
    *[("hidden", value) for value in (0, -64, 48)],
    *[("inner", value) for value in (0, -96, 40)],
]
BAD_LAYERS: list[tuple[str, Callable[[SmallLayer], None]]] = [
    *[(f"shape.{name}={value}", set_in("shape", name, value)) for name, value in SHAPES],
    *[(f"layer.window={value}", set_in("layer", "window", value)) for value in (-1, -(1 << 31))],
    *[(f"layer.rotation={value}", set_in("layer", "rotation", value)) for value in (2, 7, -2)],
    *[(f"layer.rotary={value}", set_in("layer", "rotary", value)) for value in (0, -2, 31, 34, 64)],
    *[(f"layer.group={value}", set_in("layer", "group", value)) for value in (-1, 1)],
    *[(f"layer.slots={value}", set_in("layer", "slots", value)) for value in (-1, 0, 23, 1 << 54, (1 << 63) - 1)],
    *[(f"layer.qk_norm={value}", set_in("layer", "qk_norm", value)) for value in (-1, 3)],
    *[(f"layer.activation={value}", set_in("layer", "activation", value)) for value in (-1, 3)],
    ("layer.cache=0", set_in("layer", "cache", None)),
    ("heads that wrap", right_but_for_2_32),
    *[(f"rows={value}", set_in("batch", "rows", value)) for value in (0, -1, 2, 4)],
    *[(f"parts={value}", set_in("batch", "parts", value)) for value in (0, -1, 1)],
    *[(f"groups={value}", set_in("batch", "groups", value)) for value in (0, -1)],
    *[(f"block_size={value}", set_in("batch", "block_size", value)) for value in (0, -4, 2)],
    *[(f"width={value}", set_in("batch", "width", value)) for value in (0, -2, 1)],
    *[(f"positions={value}", set_in("batch", "positions", value)) for value in (0, -1, 4)],
    *[(f"start={value}", set_at("starts", 0, value)) for value in (-1, 7, (1 << 31) - 1)],
    *[(f"count={value}", set_at("counts", 1, value)) for value in (0, -1, 9, (1 << 31) - 1)],
    *[(f"variant={value}", set_at("variants", 1, value)) for value in (-1, 2)],
    *[(f"block={value}", set_at("blocks", (0, 1), value)) for value in (-1, 8, (1 << 31) - 1)],
    ("an earlier block", set_at("blocks", (0, 0), 8)),
    ("part", lambda small: setattr(small, "part", 3)),
    ("part below", lambda small: setattr(small, "part", -1)),
    ("no layers", lambda small: setattr(small, "count", 0)),
    *[
        (f"{matrix}.{name}={value}", set_matrix(matrix, name, value))
        for matrix in ("queries", "keys", "values", "out", "gate", "up", "down")
        for name, value in [("rows", 32), ("rows", 256), ("cols", 32), ("digits", 1), ("format", 9), ("data", None)]
    ],
]
NULLS = ("starts", "counts", "variants", "blocks", "rotations")


def test_the_small_layer_is_good() -> None:
    """Else all that follows would be refused for another reason."""
    found = SmallLayer().run()
    assert np.isfinite(found).all()
    assert not np.array_equal(found, SmallLayer().hidden)


@pytest.mark.parametrize("change", [change for _, change in BAD_LAYERS], ids=[name for name, _ in BAD_LAYERS])
def test_a_layer_or_batch_that_cannot_be_is_refused(change: Callable[[SmallLayer], None]) -> None:
    small = SmallLayer(unreadable=True)
    change(small)
    with pytest.raises(RuntimeError, match="refuse a call"):
        small.run()


@pytest.mark.parametrize("name", NULLS)
def test_a_batch_that_lacks_a_table_is_refused(name: str) -> None:
    small = SmallLayer(unreadable=True)
    setattr(small.batch, name, None)
    with pytest.raises(RuntimeError, match="refuse a call"):
        small.run()


def test_what_a_part_of_a_layer_does_not_need_may_be_absent() -> None:
    small = SmallLayer()
    small.part, small.layer.cache, small.layer.queries.data, small.batch.blocks = abi.PART_MLP, None, None, None
    small.batch.rotations = None
    assert np.isfinite(small.run()).all()
    small = SmallLayer()
    small.part, small.layer.gate.data = abi.PART_ATTENTION, None
    assert np.isfinite(small.run()).all()
    small = SmallLayer()
    small.layer.rotation, small.layer.rotary, small.batch.rotations = -1, 0, None
    assert np.isfinite(small.run()).all()


def test_a_window_does_not_read_the_blocks_before_it() -> None:
    """Their numbers may be anything: the cache has given these blocks away."""
    small = SmallLayer()
    small.starts[0], small.layer.window = 4, 1
    small.counts[0] = 2
    expected = small.run()
    small.blocks[0, 0] = -5
    assert np.array_equal(small.run(), expected)


HEADS: list[tuple[str, Callable[[abi.Head], None]]] = [
    ("width 0", lambda head: setattr(head, "width", 0)),
    ("width -1", lambda head: setattr(head, "width", -1)),
    ("more tokens than rows", lambda head: setattr(head, "width", 97)),
    ("no output", lambda head: setattr(head.first, "data", None)),
    ("cols", lambda head: setattr(head.first, "cols", 96)),
    ("format", lambda head: setattr(head.first, "format", 7)),
    ("digits", lambda head: setattr(head.first, "digits", 0)),
    ("lens", lambda head: setattr(head, "lens", abi.Matrix(NOWHERE, None, 32, 64, 1, 2))),
    ("lens of other digits", lambda head: setattr(head, "lens", abi.Matrix(NOWHERE, None, 64, 64, 1, 1))),
    ("second", lambda head: setattr(head, "second", abi.Matrix(NOWHERE, None, 64, 64, 1, 2))),
    ("a gate alone", lambda head: setattr(head, "gate", abi.Matrix(NOWHERE, None, 96, 64, 1, 2))),
]


def through(head: abi.Head, small: SmallLayer) -> None:
    out, best, top = np.zeros((3, 96), np.float32), np.zeros(3, np.int32), np.zeros(3, np.float32)
    kernels().head(
        small.shape, head, 3, small.hidden.ctypes.data, out.ctypes.data, best.ctypes.data, top.ctypes.data, None
    )


@pytest.mark.parametrize("change", [change for _, change in HEADS], ids=[name for name, _ in HEADS])
def test_a_head_that_cannot_be_is_refused(change: Callable[[abi.Head], None]) -> None:
    head, small = abi.Head(), SmallLayer()
    head.first, head.width = abi.Matrix(NOWHERE, None, 96, 64, 1, 2), 90
    change(head)
    with pytest.raises(RuntimeError, match="refuse a call"):
        through(head, small)


@pytest.mark.parametrize(("adds", "activation"), [(0, 0), (1, 3), (1, -1)])
def test_an_mlp_of_a_head_needs_a_sum_and_an_activation(adds: int, activation: int) -> None:
    """Without a lens there is only the input that it can be added to."""
    head, small = abi.Head(), SmallLayer()
    head.first, head.width, head.adds, head.activation = abi.Matrix(NOWHERE, None, 96, 64, 1, 2), 90, adds, activation
    head.gate = head.up = abi.Matrix(NOWHERE, None, 96, 64, 1, 2)
    head.down = abi.Matrix(NOWHERE, None, 64, 96, 1, 2)
    with pytest.raises(RuntimeError, match="refuse a call"):
        through(head, small)
