"""A skipped block is its input, in the form the model around it expects."""

import copy

import pytest
import torch
from torch import nn

from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.calibration.stream import begin
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.structure.identity_block import output_form, skipped
from offsite.errors import MalformedMessage, UnsupportedModel


class Residual(nn.Module):
    """A block of hidden + gain * x, whose influence is known in closed form."""

    def __init__(self, turn):
        super().__init__()
        self.turn = nn.Parameter(torch.tensor(turn))

    def forward(self, hidden, extra=None):
        cosine, sine = torch.cos(self.turn), torch.sin(self.turn)
        x, y = hidden[..., :1], hidden[..., 1:]
        return torch.cat([cosine * x - sine * y, sine * x + cosine * y], dim=-1)


def by_hand(model, paths, inputs):
    """Cuts the middle out by hooks on the original blocks: a second way to skip."""
    handles = []
    for path in paths:

        def keep_input(module, args, kwargs, output):
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles.append(model.get_submodule(path).register_forward_hook(keep_input, with_kwargs=True))
    with torch.no_grad():
        result = model(**inputs)[0]
    for handle in handles:
        handle.remove()
    return result


def test_skipping_equals_a_hook_that_returns_the_input(family):
    middle = Geometry.of(family.model, 2, 1).middle(family.model)
    expected = by_hand(family.model, middle, family.inputs)
    forms = begin(MemorySource(family.model), middle, (), family.calibrate).forms
    for path in middle:
        family.model.set_submodule(path, skipped(family.model.get_submodule(path), forms[path]))
    assert torch.equal(family.run(family.model), expected)


def test_a_skipped_block_keeps_class_and_attributes_and_has_no_parameters(llama):
    block = llama.model.model.layers[2]
    twin = skipped(block, ("tensor",))
    assert isinstance(twin, type(block))
    assert list(twin.parameters()) == list(twin.buffers()) == list(twin.children()) == []
    assert twin.hidden_size == block.hidden_size
    assert twin.training == block.training
    hidden = torch.randn(1, 3, 32)
    assert twin(hidden) is hidden
    assert copy.deepcopy(twin)(hidden_states=hidden) is hidden


def test_forms():
    block, hidden, extra = Residual(0.1), torch.ones(1, 2), torch.ones(3)
    arguments = {"hidden": hidden, "extra": extra, "mask": None}
    assert output_form(block, arguments, hidden) == ("tensor",)
    assert output_form(block, arguments, (hidden * 2,)) == ("tuple", "hidden")
    assert output_form(block, arguments, (hidden, None, extra, extra * 2)) == (
        "tuple",
        "hidden",
        "none",
        "echo:extra",
        "none",
    )
    for bad in (torch.ones(1, 3), (torch.ones(2, 2),), (), {"hidden": hidden}, None):
        with pytest.raises(UnsupportedModel, match="cannot be skipped"):
            output_form(block, arguments, bad)


def test_echo_returns_the_argument_wherever_it_came_from():
    twin = skipped(Residual(0.1), ("tuple", "hidden", "echo:extra", "none"))
    hidden, extra = torch.ones(1, 2), torch.ones(3)
    for result in (twin(hidden, extra), twin(hidden, extra=extra), twin(extra=extra, hidden=hidden)):
        assert result[0] is hidden
        assert result[1] is extra
        assert result[2] is None
    assert twin(hidden)[1] is None


@pytest.mark.parametrize("form", [(), ("list",), ("tuple",), ("tuple", "none"), ("tuple", "hidden", "import:os")])
def test_unknown_forms_are_refused(form):
    with pytest.raises(MalformedMessage, match="form="):
        skipped(Residual(0.1), form)
