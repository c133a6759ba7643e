"""Frames: what is sent comes out as it went in, and what is no frame is refused before it can do harm."""

import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.decode.remote.frames import HEADER, MAGIC, BadFrame, Frame, Kind, decode, encode, read_header

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
INT64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Small tensors of any shape, dtype and layout."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) * 50
    found = values.to(draw(st.sampled_from(DTYPES)))
    return found.transpose(0, 1) if found.dim() > 1 and draw(st.booleans()) else found


def sent(frame: Frame) -> bytes:
    """The bytes of a frame."""
    return b"".join(bytes(piece) for piece in encode(frame))


def taken(data: bytes, limit: int = 1 << 20) -> Frame:
    """The frame in some bytes."""
    size = read_header(data[: HEADER.size], limit)
    return decode(size, bytearray(data[HEADER.size :]))


@given(
    st.sampled_from(Kind),
    st.lists(INT64, max_size=9),
    st.lists(st.floats(), max_size=5),
    st.lists(tensors(), max_size=4),
)
@settings(deadline=None)
def test_a_frame_comes_out_as_it_went_in(
    kind: Kind, ints: list[int], floats: list[float], parts: list[torch.Tensor]
) -> None:
    found = taken(sent(Frame(kind, ints, floats, parts)))
    assert (found.kind, list(found.ints)) == (kind, ints)
    assert struct.pack(f"{len(floats)}d", *found.floats) == struct.pack(f"{len(floats)}d", *floats)  # NaN, too
    assert len(found.tensors) == len(parts)
    for mine, theirs in zip(parts, found.tensors, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(*(each.flatten().contiguous().view(torch.uint8) for each in (mine, theirs)))


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size + 64))
def test_garbage_is_no_frame(data: bytes) -> None:
    with pytest.raises(BadFrame):
        taken(b"x" + data[1:])


def test_a_frame_of_four_gigabytes_is_refused_before_a_byte_of_it_is_read() -> None:
    header = HEADER.pack(MAGIC, Kind.PASS, 0, 0, 0, 4 << 30)
    with pytest.raises(BadFrame, match="4294967296 bytes"):
        read_header(header, 1 << 30)


@pytest.mark.parametrize("seed", range(200))
def test_a_frame_that_was_changed_is_refused_or_still_a_frame(seed: int) -> None:
    rng = random.Random(seed)
    frame = Frame(Kind.DONE, [1, 2, 3], [0.5], [torch.randn(3, 4), torch.ones(2, dtype=torch.int64)])
    data = bytearray(sent(frame))
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        found = taken(bytes(data))
    except BadFrame:
        return
    assert sum(tensor.numel() * tensor.element_size() for tensor in found.tensors) <= len(data)


@pytest.mark.parametrize("cut", [1, 8, 40])
def test_parts_that_do_not_fit_are_refused(cut: int) -> None:
    data = bytearray(sent(Frame(Kind.DONE, [1, 2, 3], [0.5], [torch.randn(3, 4)])))
    magic, kind, ints, floats, tensors_, payload = HEADER.unpack(data[: HEADER.size])
    data[: HEADER.size] = HEADER.pack(magic, kind, ints, floats, tensors_, payload - cut)
    with pytest.raises(BadFrame):
        taken(bytes(data[: len(data) - cut]))
