"""Quantisation against its definition: the bound, the packing by brute force, the edges of fp16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.quantize import Quantised, dequantize, pack, quantize, stored_bytes, unpack
from errors import ConfigError, RangeError

SHAPES = [(3, 64), (1, 1), (2, 130), (5, 63), (4, 65), (3, 7, 11), (2, 3, 4, 5), (7, 128)]


def random(shape, seed=0, scale=0.05):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def slowly(weight, bits, group):
    """The definition, one weight at a time in Python: the nearest point of the stored grid."""
    quantised = quantize(weight, bits, group)
    rows, columns = weight.shape[0], weight[0].numel()
    result = []
    for row in range(rows):
        for column in range(columns):
            low, step = (float(t[row, column // group]) for t in (quantised.minima, quantised.scales))
            points = [low + step * code for code in range(2**bits)]
            wanted = float(weight.reshape(rows, -1)[row, column])
            result.append(min((abs(point - wanted), point) for point in points)[1])
    return torch.tensor(result, dtype=torch.float64).reshape(weight.shape)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [2, 32, 64])
def test_error_is_at_most_half_a_scale(shape, bits, group):
    weight = random(shape)
    quantised = quantize(weight, bits, group)
    back = dequantize(quantised, shape, bits, group)
    columns = weight[0].numel()
    half = quantised.scales.double().repeat_interleave(group, dim=1)[:, :columns].reshape(shape) / 2
    assert back.shape == weight.shape
    assert back.dtype == torch.float32
    # the one fp32 rounding of the final sum is all that comes on top
    assert ((back.double() - weight.double()).abs() <= half * (1 + 1e-6) + 1e-8).all()
    assert stored_bytes(shape, bits, group) == sum(
        t.numel() * t.element_size() for t in (quantised.codes, quantised.scales, quantised.minima)
    )


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(2, 130), (4, 65), (2, 3, 5)])
def test_every_code_is_the_nearest_point_of_the_grid(shape, bits):
    weight = random(shape, seed=3)
    back = dequantize(quantize(weight, bits, 64), shape, bits, 64)
    slow = slowly(weight, bits, 64)
    assert ((back.double() - weight.double()).abs() <= (slow - weight.double()).abs() + 1e-8).all()


@given(st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=80), st.sampled_from([4, 8]))
@settings(deadline=None, max_examples=150)
def test_bound_holds_for_any_numbers(values, bits):
    weight = torch.tensor([values], dtype=torch.float32)
    try:
        quantised = quantize(weight, bits, 16)
    except RangeError:
        assert weight.max() - weight.min() > 60000  # a group as wide as fp16 itself
        return
    error = (dequantize(quantised, weight.shape, bits, 16).double() - weight.double()).abs()
    half = quantised.scales.double().repeat_interleave(16, dim=1)[:, : len(values)] / 2
    assert (error <= half * (1 + 1e-6) + weight.double().abs().max() * 2**-23).all()


def test_packing_is_exact_for_every_byte():
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack(unpack(everything, 512, 4), 4), everything)
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8).reshape(-1)
    assert torch.equal(unpack(pack(pairs, 4), 512, 4), pairs)
    assert [int(byte) for byte in pack(pairs, 4)] == [low | high << 4 for low in range(16) for high in range(16)]


def test_three_bits_are_eight_codes_in_three_bytes():
    codes = [5, 0, 7, 1, 2, 6, 3, 4]
    number = sum(code << (3 * i) for i, code in enumerate(codes))
    assert bytes(pack(torch.tensor(codes, dtype=torch.uint8), 3).tolist()) == number.to_bytes(3, "little")
    for count in (0, 1, 7, 8, 9, 64, 65):
        some = torch.arange(count, dtype=torch.uint8) % 8
        packed = pack(some, 3)
        assert packed.numel() == 3 * ((count + 7) // 8)
        assert torch.equal(unpack(packed, count, 3), some)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 65])
def test_odd_counts_end_with_a_zero_half(count):
    codes = torch.arange(count, dtype=torch.uint8) % 16
    packed = pack(codes, 4)
    assert packed.numel() == (count + 1) // 2
    assert torch.equal(unpack(packed, count, 4), codes)
    if count % 2:
        assert int(packed[-1]) >> 4 == 0


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 0.1, -0.3, 1e-9, -1e-9, 6e4])
def test_constant_groups(bits, value):
    weight = torch.full((2, 70), value)
    back = dequantize(quantize(weight, bits, 64), (2, 70), bits, 64)
    representable = float(torch.tensor(value, dtype=torch.float16)) == float(torch.tensor(value))
    assert torch.equal(back, weight) if representable else ((back - weight).abs() <= 2**-11 * abs(value) + 6e-8).all()


def test_the_padding_of_a_last_group_moves_nothing():
    weight = random((3, 70), seed=5)
    whole, tail = quantize(weight, 8, 64), quantize(weight[:, 64:].contiguous(), 8, 64)
    assert torch.equal(whole.scales[:, 1:], tail.scales)
    assert torch.equal(whole.minima[:, 1:], tail.minima)
    assert torch.equal(whole.codes.reshape(3, 70)[:, 64:], tail.codes.reshape(3, 6))


def test_groups_are_independent():
    weight = random((1, 128), seed=6)
    other = weight.clone()
    other[:, 64:] *= 100
    left, right = (dequantize(quantize(w, 4, 64), (1, 128), 4, 64) for w in (weight, other))
    assert torch.equal(left[:, :64], right[:, :64])


def test_int4_at_64_costs_four_and_a_half_bits():
    assert stored_bytes((576, 1536), 4, 64) * 8 / (576 * 1536) == 4.5
    assert stored_bytes((576, 1536), 8, 64) * 8 / (576 * 1536) == 8.5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e6, -1e6])
def test_what_does_not_fit_is_refused(bad):
    weight = random((2, 8))
    weight[1, 3] = bad
    with pytest.raises(RangeError, match="verbatim"):
        quantize(weight, 4, 4)


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (16, 64), (4, 1), (4, 0), (8, -2)])
def test_unknown_bits_or_group(bits, group):
    with pytest.raises(ConfigError, match=f"bits={bits} group={group}"):
        quantize(random((2, 8)), bits, group)


def test_pieces_of_another_shape_are_refused():
    quantised = quantize(random((4, 64)), 4, 64)
    with pytest.raises(RangeError, match="do not belong"):
        dequantize(quantised, (4, 63), 4, 64)
    with pytest.raises(RangeError, match="do not belong"):
        dequantize(Quantised(quantised.codes, quantised.scales.float(), quantised.minima), (4, 64), 4, 64)
