"""Block by block is the same as all at once, and leaves no trace."""

import pytest
import torch
from torch import nn

from offsite.emulator.calibration.middle import Calibration, Middle
from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.calibration.stream import begin, influence, private
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.structure.towers import main_tower
from offsite.errors import ConfigError, UnsupportedModel
from tests.emulator.test_skip import Residual


def middle_of(family):
    return Middle(MemorySource(family.model), Geometry.of(family.model, 1, 1), Calibration(family.calibrate))


def hidden_by_hooks(family, blocks):
    """Returns each block's output in one ordinary call: the second way."""
    seen = {}

    def hook(path):
        def keep(module, args, output):
            seen[path] = output if isinstance(output, torch.Tensor) else output[0]

        return keep

    handles = [family.model.get_submodule(path).register_forward_hook(hook(path)) for path in blocks]
    family.run(family.model)
    for handle in handles:
        handle.remove()
    return seen


def test_block_by_block_equals_one_call_of_the_model(family):
    middle = middle_of(family)
    expected = hidden_by_hooks(family, middle.tower)
    hidden = middle.stream.inputs
    for path in middle.tower:
        hidden = middle.stream.run(private(family.model.get_submodule(path)), path, hidden)
        assert len(hidden) == 1
        torch.testing.assert_close(hidden[0], expected[path].float(), rtol=1e-5, atol=1e-5)


def test_streaming_leaves_no_trace(family):
    before = family.run(family.model)
    middle = middle_of(family)
    assert len(middle.influences) == len(middle.blocks)
    assert all("forward" not in vars(module) for module in family.model.modules())
    assert torch.equal(family.run(family.model), before)


def test_influence_is_one_minus_cosine():
    for turn in (0.0, 0.3, 1.2, 3.0):
        hidden = [torch.randn(5, 7, 2)]
        after = [Residual(turn)(states).detach() for states in hidden]
        assert influence(hidden, after) == pytest.approx(1 - torch.cos(torch.tensor(turn)).item(), abs=1e-5)


def test_calls_are_weighted_by_their_positions():
    short, long = torch.ones(1, 1, 2), torch.ones(1, 9, 2)
    assert influence([short, long], [-short, long]) == pytest.approx(2 / 10)


def test_several_calls_are_kept_apart(llama):
    def twice(model):
        model(input_ids=torch.tensor([[1, 2, 3]]))
        model(input_ids=torch.tensor([[4, 5, 6, 7], [1, 2, 3, 4]]))

    stream = begin(MemorySource(llama.model), main_tower(llama.model).blocks, (), twice)
    assert [tuple(states.shape) for states in stream.inputs] == [(1, 3, 32), (2, 4, 32)]
    for path, calls in stream.calls.items():
        assert len(calls) == 2, path


def test_examples_that_are_missing_or_miss_a_block():
    model = nn.Sequential(Residual(0.1), Residual(0.2))
    with pytest.raises(ConfigError, match="calibration=None"):
        begin(MemorySource(model), ("0", "1"), (), None)
    with pytest.raises(UnsupportedModel, match="block=1: the public examples never call it"):
        begin(MemorySource(model), ("0", "1"), (), lambda m: m[0](torch.ones(1, 2)))
