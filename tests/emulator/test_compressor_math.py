"""Each closed form against its definition, a brute-force optimum or a second, slow way."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import nn

from offsite.emulator.calibration.least_squares import position_weights, ridge, rows
from offsite.emulator.calibration.middle import Calibration, Middle
from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.compressors import apply, make_plan
from offsite.emulator.compressors.gptq import InputMoments, quantize_rows, second_moments
from offsite.emulator.compressors.lowrank import _factors
from offsite.emulator.package import storage
from offsite.emulator.package.quantization_scheme import Scheme
from offsite.emulator.package.quantize import Fine, Quantised, dequantize, quantize
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.structure.replacements import Patch
from offsite.errors import ConfigError, RangeError
from tests.emulator.conftest import CAUSAL, _causal

IDS = torch.arange(320).reshape(20, 16) * 11 % 61


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return _causal(hf.LlamaConfig(**CAUSAL, use_cache=False)).eval().requires_grad_(False)


def middle_of(model, first=2, last=1):
    return Middle(MemorySource(model), Geometry.of(model, first, last), Calibration(lambda m: m(input_ids=IDS)))


def leaving(model, place):
    """Returns a block's output in an ordinary call."""
    seen = []
    handle = model.model.layers[place].register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def emulated(model, recipe):
    middle = middle_of(model)
    for draft in apply(middle, recipe, make_plan(middle, recipe)):
        for path, block in draft.blocks.items():
            model.set_submodule(path, block)
    return model


def test_ridge_is_weighted_least_squares():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(200, 6, generator=generator), torch.randn(200, 3, generator=generator)
    y = x @ torch.randn(6, 3, generator=generator) + 2 + noise
    w = torch.rand(200, generator=generator) + 0.1
    matrix, bias = ridge(x, y, w, 1e-12)
    root = w.sqrt().unsqueeze(1).double()
    design = torch.cat([x.double(), torch.ones(200, 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(root * design, root * y.double()).solution
    torch.testing.assert_close(torch.cat([matrix.T, bias.unsqueeze(0)]), expected.float(), rtol=1e-5, atol=1e-5)


def test_a_loud_position_counts_no_more_than_the_others():
    target = torch.ones(4, 8)
    target[0] *= 1000
    weights = position_weights(target)
    assert float(weights[0] * target[0].square().mean()) == pytest.approx(float(weights[1]), rel=1e-5)


def test_a_patch_is_the_best_linear_map(model):
    entering, leaving_both = leaving(model, 2), leaving(model, 4)
    weights = position_weights(leaving_both).sqrt().unsqueeze(1)
    emulator = emulated(model, ("skip@3-4", "patch"))
    patch = emulator.model.layers[3].patch
    assert isinstance(patch, Patch)
    mine = (weights * (patch(entering) - leaving_both)).square().sum()
    design = torch.cat([entering, torch.ones(len(entering), 1)], dim=1)
    solution = torch.linalg.lstsq((weights * design).double(), (weights * leaving_both).double()).solution
    best = (weights * (design.double() @ solution - leaving_both)).square().sum()
    nothing = (weights * (entering - leaving_both)).square().sum()
    assert best <= mine < 1.01 * best < nothing


def test_refit_brings_a_segment_nearer_to_its_target(model):
    target = leaving(model, 4)
    weights = position_weights(target).unsqueeze(1)

    def error(emulator):
        return float((weights * (leaving(emulator, 4) - target).square()).mean())

    plain = error(emulated(copy.deepcopy(model), ("skip@4",)))
    assert error(emulated(copy.deepcopy(model), ("skip@4", "refit"))) < 0.9 * plain


def test_distillation_brings_a_segment_nearer_and_never_further(model):
    target = leaving(model, 4)
    weights = position_weights(target).unsqueeze(1)

    def error(*recipe):
        emulator = emulated(copy.deepcopy(model), recipe)
        assert not any(parameter.requires_grad for parameter in emulator.parameters())
        return float((weights * (leaving(emulator, 4) - target).square()).mean())

    plain = error("skip@4")
    assert error("skip@4", "distill:60") < 0.95 * plain
    assert error("skip@4", "distill:1") <= plain


def test_centering_takes_the_mean_error_away_and_leaves_the_codes(model):
    target = leaving(model, 4)
    weights = position_weights(target).unsqueeze(1)

    def apart(emulator):
        error = leaving(emulator, 4) - target
        return (weights * error).sum(0) / weights.sum()

    plain, centred = (emulated(copy.deepcopy(model), recipe) for recipe in (("int3:16",), ("int3:16", "center")))
    assert apart(centred).norm() < 1e-2 * apart(plain).norm()
    assert torch.equal(plain.model.layers[2].mlp.down_proj.weight, centred.model.layers[2].mlp.down_proj.weight)


def test_refit_behind_a_patch_is_refused(model):
    with pytest.raises(ConfigError, match="write patch last"):
        emulated(model, ("skip@4", "patch", "refit"))


def test_narrowing_loses_nothing_where_channels_are_copies(model):
    for layer in model.model.layers:
        half = layer.mlp.gate_proj.weight.shape[0] // 2
        for name in ("gate_proj", "up_proj"):
            weight = getattr(layer.mlp, name).weight
            weight[half:] = weight[:half]
    expected = leaving(model, 5)
    emulator = emulated(model, ("narrow:0.75",))
    assert emulator.model.layers[2].mlp.gate_proj.out_features == 36
    torch.testing.assert_close(leaving(emulator, 5), expected, rtol=2e-2, atol=2e-2)


def test_low_rank_is_the_best_of_its_rank_on_what_enters():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(500, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    inputs = inputs / inputs.square().mean(1, keepdim=True).sqrt()  # so that every position counts alike
    weight = torch.randn(9, 12, generator=generator)
    up, down = _factors(weight, inputs, 4)
    outputs = inputs @ weight.T
    mine = (inputs @ (up @ down).T - outputs).square().sum()
    best = torch.linalg.svdvals(outputs)[4:].square().sum()  # Eckart-Young: no map of rank 4 does better
    left, values, right = torch.linalg.svd(weight)
    blind = (inputs @ (left[:, :4] * values[:4] @ right[:4]).T - outputs).square().sum()
    assert best * 0.999 <= mine <= best * 1.01 < blind


def slowly(weight, moments, low, step, bits):
    """GPTQ by its definition: after each input the rest is moved by the optimal brain surgeon's formula."""
    rest, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    inverse = torch.linalg.inv(moments)
    for i in sorted(range(weight.shape[1]), key=lambda i: -float(moments[i, i])):
        code = ((rest[:, i] - low[:, i]) / step[:, i]).round().clamp(0, 2**bits - 1)
        codes[:, i] = code
        error = (rest[:, i] - (low[:, i] + step[:, i] * code)) / inverse[i, i]
        rest -= torch.outer(error, inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # this input is done; a 1 keeps later divisions harmless
    return codes


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("scheme", [Scheme(3, 8), Scheme(4, 8), Scheme(4, 8, fine=True)], ids=str)
def test_gptq_equals_its_definition_and_beats_rounding(scheme, turned):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(300, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight = torch.randn(16, 24, generator=generator)
    moments = second_moments(inputs)

    def as_stored(matrix):
        return matrix.T.contiguous() if turned else matrix

    def back(codes):
        return as_stored(dequantize(codes, tuple(as_stored(weight).shape), scheme))

    found = quantize_rows(weight, InputMoments.of(moments), scheme, turned=turned)
    mine, rounded = back(found), back(quantize(as_stored(weight), scheme))
    grid = found.grid(tuple(as_stored(weight).shape), scheme)
    low, step = (as_stored(one.repeat_interleave(8, dim=1).double()) for one in (grid.minima, grid.scales))
    codes = ((mine - low) / step).round()
    assert (codes == slowly(weight, moments, low, step, scheme.bits)).double().mean() > 0.97  # ties in other precisions
    scaled = inputs / inputs.square().mean(1, keepdim=True).sqrt()

    def damage(other):
        return (scaled @ (other - weight).T).square().sum()

    assert damage(mine) < 0.8 * damage(rounded)


def test_gptq_without_correlations_is_rounding_on_a_grid_that_is_no_worse():
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    weight[0, 3], weight[0, 4] = 6.0, -6.0  # outliers that are worth cutting, since their input is small
    moments = torch.diag(torch.rand(16, dtype=torch.float64) + 0.5)
    moments[3, 3] = moments[4, 4] = 1e-3
    scheme = Scheme(4, 8)
    for turned in (False, True):
        stored = weight.T.contiguous() if turned else weight
        mine, covering = (
            quantize_rows(weight, InputMoments.of(moments), scheme, turned=turned),
            quantize(stored, scheme),
        )
        values = dequantize(mine, tuple(stored.shape), scheme)
        low, steps = (
            one.float().repeat_interleave(8, dim=1)[:, : stored.shape[1]] for one in (mine.minima, mine.scales)
        )
        nearest = low + ((stored - low) / steps).round().clamp(0, 15) * steps
        torch.testing.assert_close(values, nearest)
        weights = moments.diagonal().float()

        def error(other, turned=turned, weights=weights):
            return (weights * ((other.T if turned else other) - weight).square()).sum()

        assert error(values) <= error(dequantize(covering, tuple(stored.shape), scheme))
        assert turned or mine.scales[0, 0] < covering.scales[0, 0]


def test_fine_grids_find_again_what_was_made_on_one():
    """A matrix on a fine grid comes back exactly, and any other matrix with less error than with covering grids."""
    generator = torch.Generator().manual_seed(7)
    scheme, entering = Scheme(4, 8, fine=True), InputMoments.of(torch.eye(24, dtype=torch.float64))
    codes = torch.randint(0, 16, (16, 24), generator=generator, dtype=torch.uint8)
    codes.reshape(16, 3, 8)[..., :2] = torch.tensor([0, 15], dtype=torch.uint8)  # each group uses its whole grid
    fine = Fine(
        torch.randint(20, 64, (16, 3), generator=generator, dtype=torch.uint8),
        torch.randint(20, 64, (16, 3), generator=generator, dtype=torch.uint8),
        torch.tensor([0.25, 0.5]).expand(16, 2).to(torch.float16).contiguous(),
    )
    fine.scales[:, 0], fine.minima[:, 0] = 63, 63  # the largest code of a row determines the row's unit
    stored = Quantised.of(codes.reshape(-1), fine.grid(), 4)
    weight = dequantize(stored, (16, 24), scheme)
    assert torch.equal(dequantize(quantize_rows(weight, entering, scheme), (16, 24), scheme), weight)
    other = torch.randn(16, 24, generator=generator)
    mine, covering = quantize_rows(other, entering, scheme), quantize(other, scheme)
    mine, covering = (dequantize(one, (16, 24), scheme) for one in (mine, covering))
    assert (mine - other).square().sum() < (covering - other).square().sum()


@pytest.mark.parametrize("scheme", [Scheme(4, 8), Scheme(4, 8, fine=True)], ids=str)
@pytest.mark.parametrize("where", ["weight", "sizes"])
def test_what_cannot_be_rounded_is_refused(scheme, where):
    """Tiny weights must not become zeros."""
    entering, weight = InputMoments.of(torch.eye(16, dtype=torch.float64)), torch.ones(4, 16)
    weight[1, ::2] = -1
    if where == "weight":
        weight[1, 3] = torch.inf
    else:
        entering = replace(entering, sizes=torch.full((16,), torch.inf))
    with pytest.raises(RangeError, match="verbatim"):
        quantize_rows(weight + 0.3 * torch.arange(16), entering, scheme)


@pytest.mark.parametrize("size", [1e-6, 1e-5, 1.0, 3e3])
def test_fine_grids_hold_weights_of_any_size(size):
    """Rows of zeros come back as well."""
    scheme, entering = Scheme(4, 8, fine=True), InputMoments.of(torch.eye(16, dtype=torch.float64))
    weight = size * torch.randn(4, 16, generator=torch.Generator().manual_seed(8))
    weight[2] = 0
    found = dequantize(quantize_rows(weight, entering, scheme), (4, 16), scheme)
    assert (found - weight).norm() < 0.2 * weight.norm()
    assert not found[2].any()


def test_two_of_each_four_are_zero_and_the_larger_ones_stay(model):
    before = model.model.layers[3].mlp.up_proj.weight.clone()
    weight = emulated(model, ("prune_2_4",)).model.layers[3].mlp.up_proj.weight
    assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    kept = weight != 0
    assert torch.equal(weight[kept], before[kept])


def test_sparse_storage_is_exact_and_checked():
    tensor = torch.tensor([[0.0, 1.5, -2.0], [0.0, 0.0, 4.0], [8.0, 0.0, 0.25]])
    pieces = storage.encode("t", tensor, storage.SPARSE)
    assert pieces["t#places"].tolist() == [0b01100110, 0b1]
    assert torch.equal(storage.decode("t", storage.SPARSE, pieces, (3, 3)), tensor)
    with pytest.raises(RangeError, match="do not belong"):
        storage.decode("t", storage.SPARSE, pieces, (3, 9))
    with pytest.raises(RangeError, match="values for"):
        storage.decode("t", storage.SPARSE, pieces | {"t#values": torch.ones(3, dtype=torch.float16)}, (3, 3))


def test_shared_blocks_run_on_one_set_of_weights(model):
    emulator = emulated(model, ("share:1",))
    layers = emulator.model.layers
    assert layers[3].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    assert layers[4].self_attn.q_proj.weight is layers[2].self_attn.q_proj.weight
    assert layers[3].self_attn.layer_idx == 3
    assert isinstance(layers[3], nn.Module)
    assert len(rows([torch.ones(2, 3, 4)])) == 6
