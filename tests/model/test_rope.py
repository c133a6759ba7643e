"""Rotary tables against a reference of a few lines, and the promises that decoding relies on."""

import math

import pytest
import torch

from exitlm.model import RopeConfig
from exitlm.model.rope import inverse_frequencies, rotary_tables, rotate

LONG = RopeConfig(
    theta=10_000.0,
    dim=4,
    kind="longrope",
    short_factor=(1.0, 1.5),
    long_factor=(2.0, 3.0),
    original_max_position_embeddings=6,
    attention_factor=1.25,
)
SHORT = [1.0, 1 / (1.5 * 10_000.0**0.5)]


def test_frequencies_are_the_published_formulas() -> None:
    plain = RopeConfig(theta=100.0, dim=8)
    expected = [100.0 ** (-2 * i / 8) for i in range(4)]
    assert inverse_frequencies(plain, torch.float64) == pytest.approx(expected, rel=1e-14)
    linear = RopeConfig(theta=100.0, dim=8, kind="linear", factor=4.0)
    assert inverse_frequencies(linear, torch.float64) == pytest.approx([f / 4 for f in expected], rel=1e-14)
    assert inverse_frequencies(LONG, torch.float64) == pytest.approx(SHORT, rel=1e-14)
    assert inverse_frequencies(LONG, torch.float64, True) == pytest.approx([1 / 2, 1 / 300], rel=1e-14)


def test_llama3_keeps_high_divides_low_and_blends_between() -> None:
    rope = RopeConfig(
        theta=500_000.0,
        dim=64,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    found = inverse_frequencies(rope, torch.float64)
    plain = inverse_frequencies(RopeConfig(theta=500_000.0, dim=64), torch.float64)
    for new, old in zip(found, plain, strict=True):
        wavelength = 2 * math.pi / old
        if wavelength < 8192 / 4:
            assert new == old
        elif wavelength > 8192:
            assert new == pytest.approx(old / 8)
        else:
            blend = (8192 / wavelength - 1) / 3
            assert new == pytest.approx(blend * old + (1 - blend) * old / 8)


def test_longrope_switches_by_total_length() -> None:
    positions = torch.arange(9)
    cos, sin = rotary_tables(LONG, positions[:6], torch.float64)
    short = positions[:6, None] * torch.tensor(SHORT, dtype=torch.float64)
    assert torch.allclose(cos, torch.cat([short, short], -1).cos() * 1.25, atol=1e-15)
    assert torch.allclose(sin, torch.cat([short, short], -1).sin() * 1.25, atol=1e-15)
    assert not torch.allclose(rotary_tables(LONG, positions, torch.float64)[0][:6], cos)
    assert torch.equal(rotary_tables(LONG, positions, torch.float64, total_length=6)[0][:6], cos)


def test_longrope_by_position_does_not_depend_on_the_other_tokens() -> None:
    positions = torch.arange(9)[None]
    together = rotary_tables(LONG, positions, torch.float64, total_length=positions + 1)
    for index in range(9):
        alone = rotary_tables(LONG, positions[:, index : index + 1], torch.float64)
        assert torch.equal(together[0][:, index : index + 1], alone[0])
        assert torch.equal(together[1][:, index : index + 1], alone[1])


@pytest.mark.parametrize("size", [4, 6])
def test_rotation_is_relative_and_leaves_the_rest_alone(size: int) -> None:
    rope = RopeConfig(theta=50.0, dim=4)
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, size, dtype=torch.float64)

    def score(at: int, before: int) -> float:
        (cos, sin), (cos_k, sin_k) = (rotary_tables(rope, torch.tensor([[p]]), torch.float64) for p in (at, before))
        return float((rotate(query, cos[:, None], sin[:, None]) * rotate(key, cos_k[:, None], sin_k[:, None])).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-12)
    cos, sin = rotary_tables(rope, torch.tensor([[7]]), torch.float32)
    turned = rotate(query.float(), cos[:, None], sin[:, None])
    assert turned.dtype == torch.float32
    assert torch.equal(turned[..., 4:], query.float()[..., 4:])
    assert turned.norm() == pytest.approx(float(query.norm()), rel=1e-6)


def test_a_surrounding_meta_device_does_not_reach_the_frequencies() -> None:
    with torch.device("meta"):
        assert inverse_frequencies(RopeConfig(theta=77.0, dim=4), torch.float32)[0] == 1.0
