"""The choice of left-out blocks, against each measure by a second way."""

import pytest
import torch

from offsite.emulator.calibration.gradients import SlotGradients
from offsite.emulator.calibration.middle import Calibration, Middle
from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.compressors import make_plan
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import OffsiteError, UnsupportedModel
from tests.emulator.conftest import CAUSAL, IDS, _causal, hf


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return (
            _causal(hf.LlamaConfig(**{**CAUSAL, "num_hidden_layers": 8}, use_cache=False)).eval().requires_grad_(False)
        )


def losses(model):
    for ids in IDS.split(1):
        yield model(input_ids=ids, labels=ids).loss / 2


def middle_of(model, first=2, last=2):
    public = Calibration(lambda m: m(input_ids=IDS), losses)
    return Middle(MemorySource(model), Geometry.of(model, first, last), public)


def silence(model, *places):
    """Zero output projections: such a block returns its input."""
    for place in places:
        model.model.layers[place].self_attn.o_proj.weight.zero_()
        model.model.layers[place].mlp.down_proj.weight.zero_()


@pytest.mark.parametrize(("share", "chosen"), [("0.25", [4]), ("0.5", [3, 5]), ("1", [2, 3, 4, 5]), ("0.01", [4])])
def test_uniform_skips_are_spaced_evenly(model, share, chosen):
    plan = make_plan(middle_of(model), (f"skip_uniform:{share}",))
    assert list(plan.skipped) == [f"model.layers.{index}" for index in chosen]


@pytest.mark.parametrize("name", ["skip_importance", "skip_gradient"])
def test_blocks_that_do_nothing_go_first(model, name):
    silence(model, 3, 4)
    assert make_plan(middle_of(model), (f"{name}:0.5",)).skipped == ("model.layers.3", "model.layers.4")


def test_damage_is_the_cosine_of_ordinary_gradients(model):
    middle = middle_of(model)
    ends = [p for path in (0, 1, 6, 7) for p in model.model.layers[path].parameters() if p.dim() > 1]

    def gradient():
        for parameter in ends:
            parameter.requires_grad_(True)
        found = torch.autograd.grad(sum(losses(model)), ends)
        for parameter in ends:
            parameter.requires_grad_(False)
        return torch.cat([piece.flatten() for piece in found])

    full = gradient()
    damage = SlotGradients(middle).damage(("model.layers.3",))
    layers = model.model.layers
    kept, layers[3].forward = layers[3].forward, lambda hidden, *a, **k: hidden
    less = gradient()
    layers[3].forward = kept
    assert damage == pytest.approx(1 - torch.nn.functional.cosine_similarity(full, less, dim=0).item(), abs=1e-5)


def test_greedy_choice_is_the_best_single_block(model):
    middle = middle_of(model)
    gradients = SlotGradients(middle)
    best = min(middle.blocks, key=lambda path: gradients.damage((path,)))
    assert make_plan(middle, ("skip_gradient:0.25",)).skipped == (best,)


def test_a_block_the_others_depend_on_is_never_skipped(model):
    model.model.layers[3].add_module("table", torch.nn.Embedding(2, 2))
    middle = middle_of(model, 1, 1)
    assert make_plan(middle, ("skip_uniform:1",)).kept == ("model.layers.3",)
    with pytest.raises(UnsupportedModel, match=r"skip@3: block model.layers.3 has a tensor"):
        make_plan(middle, ("skip@3",))


def test_a_second_skip_takes_of_what_is_left(model):
    middle = middle_of(model)
    assert len(make_plan(middle, ("skip_uniform:0.5", "skip_importance:0.5")).kept) == 1
    with pytest.raises(OffsiteError, match="no block of the middle is left"):
        make_plan(middle, ("skip_uniform:1", "skip_uniform:1"))
