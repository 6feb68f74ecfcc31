"""Layers in the package's stored form: equal outputs and gradients to the last bit, in a fraction of the memory."""

import pytest
import torch

from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.package.package_reader import load, read_manifest
from offsite.emulator.runtime.quantized_linear import DequantizingLinear, replace_linears
from offsite.emulator.structure.geometry import Geometry, slot_paths
from offsite.privacy.batches import trainable
from offsite.privacy.engines import ENGINES
from offsite.privacy.probe import single_gradient
from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples


def both(family, folder, recipe, **more):
    """Returns a package's emulator as it is loaded, the same with layers in stored form, and the bytes saved."""
    family.build(folder, recipe, **more)
    plain, held = (load(folder, dtype=torch.float32) for _ in range(2))
    return plain, held, replace_linears(held, folder, read_manifest(folder))


def layers(model):
    return [module for module in model.modules() if isinstance(module, DequantizingLinear)]


def gradients(family, model, facts):
    """Returns the gradients of all slots' parameters; those of the first slot pass through the whole middle."""
    paths, _ = slot_paths(model, facts.geometry)
    trained = [p for path in paths for p in model.get_submodule(path).parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    found = torch.autograd.grad(family.losses(model), trained, allow_unused=True)
    return [torch.zeros(()) if one is None else one for one in found]


def test_outputs_and_gradients_are_the_same_bits_in_every_family(family, tmp_path):
    plain, held, saved = both(family, tmp_path / "p", ("int4:16",))
    facts = read_manifest(tmp_path / "p")
    assert torch.equal(family.run(plain), family.run(held))
    for right, found in zip(gradients(family, plain, facts), gradients(family, held, facts), strict=True):
        assert torch.equal(right, found)
    assert (saved > 0) == bool(layers(held))


@pytest.mark.parametrize(
    "recipe", [("int8:16",), ("int3:8",), ("int4:32/6",), ("lowrank:0.5",), ("narrow:0.5", "int4:16")]
)
def test_every_storage_is_widened_to_what_loading_gives(make, tmp_path, recipe):
    family = make("llama_untied")
    plain, held, _ = both(family, tmp_path / "p", recipe)
    assert torch.equal(family.run(plain), family.run(held))


def test_sixteen_bits_are_held_as_such_and_four_take_a_seventh(make, tmp_path):
    half = make("gpt2", torch.bfloat16)
    plain, held, saved = both(half, tmp_path / "half", ())
    assert layers(held)
    assert {piece.dtype for layer in layers(held) for piece in layer.buffers()} == {torch.bfloat16}
    assert torch.equal(half.run(plain), half.run(held))
    assert saved == sum(2 * piece.numel() for layer in layers(held) for piece in layer.buffers())
    _, coded, _ = both(make("llama_untied"), tmp_path / "coded", ("int4:16",))
    for layer in layers(coded):
        assert sum(p.numel() * p.element_size() for p in layer.buffers()) < layer.weight.numel() * 4 / 4.5


def test_slots_tables_and_shared_layers_stay_as_they_are(make, tmp_path):
    plain, held, _ = both(make("llama_tied"), tmp_path / "p", ("int4:16",), embedding="int8")
    ends = Geometry.of(plain, 2, 1).ends(plain)
    assert not any(isinstance(m, DequantizingLinear) for path in ends for m in held.get_submodule(path).modules())
    assert not isinstance(held.lm_head, DequantizingLinear)


def test_a_backward_pass_keeps_no_widened_weight(make, tmp_path):
    """Autograd saves no tensor of a weight's size and shape between forward and backward."""
    family = make("llama_untied")
    _, held, _ = both(family, tmp_path / "p", ("int4:16",))
    gradients(family, held, read_manifest(tmp_path / "p"))  # the slots require gradients now
    shapes = {tuple(layer.weight.shape) for layer in layers(held)} | {
        tuple(layer.weight.shape)[::-1] for layer in layers(held)
    }
    inside = [False]
    saved = []
    for layer in layers(held):
        layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
        layer.register_forward_hook(lambda *_: inside.__setitem__(0, False))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.shape) if inside[0] else None, t)[1], lambda t: t
    ):
        family.losses(held)
    assert not [shape for shape in saved if tuple(shape) in shapes]


@pytest.mark.parametrize("engine", ["bookkeeping", "hooks", "slot", "loop"])
@pytest.mark.parametrize("storage", ["int8:16", "int4:16"])
def test_an_adapter_on_held_layers_has_the_gradients_of_one_on_plain_layers(make, tmp_path, engine, storage):
    """A parallel emulator carries adapters in every block, also on top of 8-bit and 4-bit layers."""
    family = make("llama_untied")
    geometry = Geometry.of(family.model, 1, 1, "parallel")
    write_package(
        family.model,
        EmulatorDesign(geometry, (storage,), "verbatim"),
        Calibration(family.calibrate, family.losses),
        tmp_path / "p",
    )
    rows = []
    for held in (False, True):
        model = load(tmp_path / "p", dtype=torch.float32)
        if held:
            replace_linears(model, tmp_path / "p", read_manifest(tmp_path / "p"))
        paths, _ = slot_paths(model, geometry)
        adapted = attach(model, AdapterSpec("lora", rank=2, targets=("q_proj", "down_proj"), slots=paths))
        under = [
            m
            for name, m in adapted.named_modules()
            if isinstance(m, DequantizingLinear) and name.endswith("base_layer")
        ]
        assert bool(under) == held
        with torch.no_grad():
            for parameter in trainable(adapted).values():
                parameter.add_(0.05)
        with ENGINES[engine](adapted) as opened:
            rows.append([single_gradient(adapted, losses, examples(), opened, row) for row in range(3)])
    for plain, found in zip(*rows, strict=True):
        assert all(torch.equal(plain[name], found[name]) for name in plain)


def examples():
    ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(4))
    return Examples(ids, (torch.arange(9) < torch.tensor([9, 4, 7])[:, None]).long())


def losses(model, batch):
    return CausalLM().losses(model, batch)
