"""Quantisation against its definition: the bound, the packing by brute force, the edges of fp16."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offsite.emulator.package.bit_packing import pack, unpack
from offsite.emulator.package.quantization_scheme import Scheme
from offsite.emulator.package.quantize import dequantize, quantize
from offsite.errors import ConfigError, RangeError

SHAPES = [(3, 64), (1, 1), (2, 130), (5, 63), (4, 65), (3, 7, 11), (2, 3, 4, 5), (7, 128)]


SCHEMES = [Scheme(bits, group) for bits in (3, 4, 8) for group in (2, 32, 64)]
SCHEMES += [Scheme(bits, group, fine=True) for bits in (3, 4) for group in (2, 32)]


def random(shape, seed=0, scale=0.05):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def slowly(weight, scheme):
    """The definition, one weight at a time in Python: the nearest point of the stored grid."""
    grid = quantize(weight, scheme).grid(tuple(weight.shape), scheme)
    rows, columns = weight.shape[0], weight[0].numel()
    result = []
    for row in range(rows):
        for column in range(columns):
            low, step = (float(t[row, column // scheme.group]) for t in (grid.minima, grid.scales))
            points = [low + step * code for code in range(2**scheme.bits)]
            wanted = float(weight.reshape(rows, -1)[row, column])
            result.append(min((abs(point - wanted), point) for point in points)[1])
    return torch.tensor(result, dtype=torch.float64).reshape(weight.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_error_is_at_most_half_a_scale(shape, scheme):
    weight = random(shape)
    quantised = quantize(weight, scheme)
    back = dequantize(quantised, shape, scheme)
    columns = weight[0].numel()
    scales = quantised.grid(shape, scheme).scales
    half = scales.double().repeat_interleave(scheme.group, dim=1)[:, :columns].reshape(shape) / 2
    assert back.shape == weight.shape
    assert back.dtype == torch.float32
    # the one fp32 rounding of the final sum is all that comes on top
    assert ((back.double() - weight.double()).abs() <= half * (1 + 1e-6) + 1e-8).all()
    assert scheme.stored_bytes(shape) == sum(t.numel() * t.element_size() for t in quantised.pieces)
    assert len(quantised.pieces) == len(scheme.pieces)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(2, 130), (4, 65), (2, 3, 5)])
def test_every_code_is_the_nearest_point_of_the_grid(shape, scheme):
    weight = random(shape, seed=3)
    back = dequantize(quantize(weight, scheme), shape, scheme)
    slow = slowly(weight, scheme)
    assert ((back.double() - weight.double()).abs() <= (slow - weight.double()).abs() + 1e-8).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_fine_grids_of_rows_on_one_side_of_zero(sign):
    weight = sign * random((3, 64), seed=4).abs() + sign
    scheme = Scheme(4, 16, fine=True)
    quantised = quantize(weight, scheme)
    half = quantised.grid((3, 64), scheme).scales.max() / 2
    assert ((dequantize(quantised, (3, 64), scheme) - weight).abs() <= half * (1 + 1e-6)).all()
    assert torch.equal(dequantize(quantize(torch.zeros(3, 64), scheme), (3, 64), scheme), torch.zeros(3, 64))


def test_fine_scales_cost_less_than_halves():
    assert Scheme(4, 32, fine=True).stored_bytes((576, 1536)) * 8 / (576 * 1536) == 4 + 12 / 32 + 32 / 1536
    assert Scheme(4, 32).stored_bytes((576, 1536)) * 8 / (576 * 1536) == 5


def test_spellings():
    for scheme in SCHEMES:
        name, _, argument = str(scheme).partition(":")
        assert Scheme.of(name, argument) == scheme
    for name, argument in (
        ("int4", "32/8"),
        ("int4", "/6"),
        ("int5", "32"),
        ("int8", "32/6"),
        ("int4", "1"),
        ("int4", ""),
    ):
        assert Scheme.of(name, argument) is None


@given(st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=80), st.sampled_from([4, 8]))
@settings(deadline=None, max_examples=150)
def test_bound_holds_for_any_numbers(values, bits):
    weight = torch.tensor([values], dtype=torch.float32)
    try:
        quantised = quantize(weight, Scheme(bits, 16))
    except RangeError:
        assert weight.max() - weight.min() > 60000  # a group as wide as fp16 itself
        return
    error = (dequantize(quantised, weight.shape, Scheme(bits, 16)).double() - weight.double()).abs()
    half = quantised.scales.double().repeat_interleave(16, dim=1)[:, : len(values)] / 2
    assert (error <= half * (1 + 1e-6) + weight.double().abs().max() * 2**-23).all()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 64])
def test_six_bits_are_four_codes_in_three_bytes(count):
    some = torch.arange(count, dtype=torch.uint8) * 11 % 64
    packed = pack(some, 6)
    number = sum(int(code) << (6 * i) for i, code in enumerate(some))
    assert bytes(packed.tolist()) == number.to_bytes(3 * ((count + 3) // 4), "little")
    assert torch.equal(unpack(packed, count, 6), some)


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
    back = dequantize(quantize(weight, Scheme(bits, 64)), (2, 70), Scheme(bits, 64))
    representable = float(torch.tensor(value, dtype=torch.float16)) == float(torch.tensor(value))
    assert torch.equal(back, weight) if representable else ((back - weight).abs() <= 2**-11 * abs(value) + 6e-8).all()


def test_the_padding_of_a_last_group_moves_nothing():
    weight = random((3, 70), seed=5)
    whole, tail = quantize(weight, Scheme(8, 64)), quantize(weight[:, 64:].contiguous(), Scheme(8, 64))
    assert torch.equal(whole.scales[:, 1:], tail.scales)
    assert torch.equal(whole.minima[:, 1:], tail.minima)
    assert torch.equal(whole.codes.reshape(3, 70)[:, 64:], tail.codes.reshape(3, 6))


def test_groups_are_independent():
    weight = random((1, 128), seed=6)
    other = weight.clone()
    other[:, 64:] *= 100
    left, right = (dequantize(quantize(w, Scheme(4, 64)), (1, 128), Scheme(4, 64)) for w in (weight, other))
    assert torch.equal(left[:, :64], right[:, :64])


def test_int4_at_64_costs_four_and_a_half_bits():
    assert Scheme(4, 64).stored_bytes((576, 1536)) * 8 / (576 * 1536) == 4.5
    assert Scheme(8, 64).stored_bytes((576, 1536)) * 8 / (576 * 1536) == 8.5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e6, -1e6])
def test_what_does_not_fit_is_refused(bad):
    weight = random((2, 8))
    weight[1, 3] = bad
    with pytest.raises(RangeError, match="verbatim"):
        quantize(weight, Scheme(4, 4))


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (16, 64), (4, 1), (4, 0), (8, -2), (4, 2**20)])
def test_unknown_bits_or_group(bits, group):
    with pytest.raises(ConfigError, match=f"bits={bits} group={group}"):
        Scheme(bits, group)


@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(4, 32, fine=True)], ids=str)
def test_pieces_of_another_shape_are_refused(scheme):
    quantised = quantize(random((4, 64)), scheme)
    for shape, other in (
        ((4, 63), quantised),
        ((4, 64), replace(quantised, scales=quantised.scales.float())),
        ((4, 64), replace(quantised, minima=quantised.minima[:-1])),
        ((4, 64), replace(quantised, spans=None if scheme.fine else torch.zeros(4, 2, dtype=torch.float16))),
    ):
        with pytest.raises(RangeError, match="do not belong"):
            dequantize(other, shape, scheme)
