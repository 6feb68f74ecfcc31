"""Leak elevation: what is taken is the promised share, what comes back stays, and random directions do worse."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from offsite.emulator.calibration.least_squares import position_weights
from offsite.emulator.calibration.middle import Calibration, Middle
from offsite.emulator.calibration.source import MemorySource, ShardSource, Source
from offsite.emulator.compressors import apply, make_plan
from offsite.emulator.compressors.elevate import _means, subtracted
from offsite.emulator.structure.geometry import Geometry
from tests.emulator.conftest import CAUSAL, _causal

IDS = torch.arange(320).reshape(20, 16) * 11 % 61


@pytest.fixture
def model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return _causal(hf.LlamaConfig(**CAUSAL, use_cache=False)).eval().requires_grad_(False)


def losses(model: Any) -> Any:
    for ids in IDS.split(5):
        yield model(input_ids=ids, labels=ids).loss / 4


def middle_of(source: Source) -> Middle:
    return Middle(source, Geometry.of(source.model, 2, 1), Calibration(lambda m: m(input_ids=IDS), losses))


def test_cotangents_are_ordinary_gradients_and_leave_the_model_alone(model: Any) -> None:
    found = middle_of(MemorySource(model)).cotangents
    assert not model.model.layers[3]._forward_hooks
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = torch.zeros(32, 32, dtype=torch.float64)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    for ids in IDS:
        kept: list[Tensor] = []
        handle = model.model.layers[3].register_forward_hook(lambda _, args, output, kept=kept: kept.append(output))
        (gradient,) = torch.autograd.grad(model(input_ids=ids[None], labels=ids[None]).loss / 20, kept)
        handle.remove()
        for state, cotangent in zip(kept[0][0].detach().double(), gradient[0].double(), strict=True):
            scaled = cotangent * state.square().mean().sqrt()
            expected += torch.outer(scaled, scaled) / IDS.numel()
    torch.testing.assert_close(found["model.layers.3"], expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


def test_shards_give_the_same(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    mine, other = (
        middle_of(source).cotangents for source in (MemorySource(model), ShardSource(tmp_path / "m", torch.float32))
    )
    assert list(mine) == list(other) == [f"model.layers.{place}" for place in (2, 3, 4)]
    for path, moments in mine.items():
        torch.testing.assert_close(moments, other[path], rtol=1e-4, atol=1e-5 * float(moments.max()))


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, what enters it with one loud kind of position, the positions' weights and cotangents' moments."""
    draw = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(12, 20, generator=draw), torch.randn(400, 20, generator=draw) + 0.5
    inputs[::40] = 300 * torch.randn(20, generator=draw)
    mixed = torch.randn(12, 12, generator=draw, dtype=torch.float64)
    moments = mixed @ torch.diag(0.5 ** torch.arange(12, dtype=torch.float64)) @ mixed.T
    return weight, inputs, position_weights(inputs), moments


@pytest.mark.parametrize("share", [Fraction(1, 10), Fraction(1, 2), Fraction(9, 10), Fraction(1)])
def test_the_share_goes_the_means_stay_and_the_rest_is_untouched(share: Fraction) -> None:
    weight, inputs, weights, moments = case()
    change = subtracted(weight, inputs, weights, moments, share).double()
    means = _means(inputs, weights)
    assert means.shape == (20, 2)
    torch.testing.assert_close(change @ means, torch.zeros(12, 2, dtype=torch.float64), rtol=0, atol=1e-3)
    # All that may go: what is left of the output when every direction goes.
    whole = subtracted(weight, inputs, weights, moments, Fraction(1)).double()
    directions = torch.linalg.eigh(moments).eigenvectors

    def energies(matrix: Tensor) -> Tensor:
        return (weights.double().unsqueeze(1) * (inputs.double() @ matrix.T @ directions).square()).sum(0)

    before, after = energies(whole), energies(whole - change)
    assert float(1 - after.sum() / before.sum()) == pytest.approx(float(share), abs=1e-4)
    kept = (before - after).abs() < 1e-6 * before
    gone = after < 1e-6 * before
    assert int((~kept & ~gone).sum()) <= 1  # one direction at most is taken in part
    assert not gone[int(gone.sum()) :].any()  # those of least cotangent energy go first
    untouched = directions[:, kept].T @ change  # what comes back along these passes the layer as before
    assert bool((untouched.abs() < 1e-5 * weight.abs().max()).all())


def slots_gradient(first: Tensor, middle: Tensor, last: Tensor, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Loss, and gradient of the first slot, of y = last (1 + middle) first x."""
    first = first.clone().requires_grad_(True)
    states = x @ first.T
    loss = 0.5 * ((states + states @ middle.T) @ last.T - y).square().sum(1).mean()
    (gradient,) = torch.autograd.grad(loss, first)
    return float(loss.detach()), gradient.flatten()


def test_the_slots_gradient_turns_less_than_with_random_directions() -> None:
    """A linear model whose last slot reads some directions a hundred times less than others."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2000, 16, generator=draw)
    first, middle, other = (torch.randn(16, 16, generator=draw) / 4 for _ in range(3))
    scales = torch.logspace(0, -2, 16)
    last = torch.linalg.qr(torch.randn(16, 16, generator=draw))[0] * scales @ torch.linalg.qr(other)[0]
    states = x @ first.T
    teacher = (states + states @ middle.T) @ last.T
    y = teacher + 0.3 * x @ torch.randn(16, 16, generator=draw).T / 4 + 0.05 * torch.randn(2000, 16, generator=draw)
    cotangents = (teacher - y).double() @ last.double()
    loss, full = slots_gradient(first, middle, last, x, y)

    def after(moments: Tensor) -> tuple[float, float]:
        change = subtracted(middle, states, torch.ones(2000), moments, Fraction(1, 2))
        raised, gradient = slots_gradient(first, middle - change, last, x, y)
        return raised - loss, float(torch.nn.functional.cosine_similarity(gradient, full, dim=0))

    raised, cosine = after(cotangents.T @ cotangents / 2000)
    for _ in range(8):
        random = torch.linalg.qr(torch.randn(16, 16, generator=draw, dtype=torch.float64))[0]
        _, turned = after(random @ torch.diag(torch.arange(16, dtype=torch.float64)) @ random.T)
        assert cosine > turned + 0.02, (raised, cosine, turned)
    assert cosine > 0.97


def test_a_model_loses_what_it_wrote_and_nothing_else(model: Any) -> None:
    middle = middle_of(MemorySource(model))
    recipe = ("elevate:0.5@3",)
    changed = [name for span in apply(middle, recipe, make_plan(middle, recipe)) for name in span.changed]
    assert changed == ["model.layers.3.mlp.down_proj.weight"]
