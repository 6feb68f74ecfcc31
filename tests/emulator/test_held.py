"""Layers in the package's stored form: equal outputs and gradients to the last bit, in a fraction of the memory."""

import pytest
import torch

from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.package import stored_weight
from offsite.emulator.package.package_reader import load, read_manifest
from offsite.emulator.runtime import quantized_linear
from offsite.emulator.runtime.quantized_linear import (
    DequantizingEmbedding,
    DequantizingLinear,
    bytes_of,
    count_weights,
)
from offsite.emulator.runtime.stored_model import holding
from offsite.emulator.structure.from_config import empty_model
from offsite.emulator.structure.geometry import Geometry, slot_paths
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.emulator.vetting.vet import vet
from offsite.errors import UnsupportedModel
from offsite.privacy.batches import trainable
from offsite.privacy.engines import ENGINES
from offsite.privacy.probe import single_gradient
from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples


def opened(folder, weights, method="lora", dtype=torch.float32):
    """Returns a package's emulator with weights in a form, for an adapter in its slots."""
    text, facts = (folder / "config.json").read_text(), read_manifest(folder)
    slots, _ = slot_paths(empty_model(text, facts.auto, torch.float32, allocated=False), facts.geometry)
    return load(folder, dtype=dtype, hold=holding(weights, AdapterSpec(method, rank=2, slots=slots)))


def both(family, folder, recipe, **more):
    """Returns a package's emulator as it is loaded, and the same with layers in stored form."""
    family.build(folder, recipe, **more)
    return opened(folder, "widened"), opened(folder, "stored")


def layers(model):
    return [module for module in model.modules() if isinstance(module, (DequantizingLinear, DequantizingEmbedding))]


def gradients(family, model, facts):
    """Returns the gradients of all slots' parameters; those of the first slot pass through the whole middle."""
    paths, _ = slot_paths(model, facts.geometry)
    trained = [p for path in paths for p in model.get_submodule(path).parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    found = torch.autograd.grad(family.losses(model), trained, allow_unused=True)
    return [torch.zeros(()) if one is None else one for one in found]


def test_outputs_and_gradients_are_the_same_bits_in_every_family(family, tmp_path):
    """The plain model's slots are trained whole, so that gradients reach every layer of the middle."""
    family.build(tmp_path / "p", ("int4:16",), "int8")
    plain, held = (opened(tmp_path / "p", weights, "blocks") for weights in ("widened", "stored"))
    facts = read_manifest(tmp_path / "p")
    found, right = (vetted(tmp_path / "p", model, facts) for model in (held, plain))
    assert [(name, where, pytest.approx(value, rel=1e-4)) for name, where, value in right] == found
    assert torch.equal(family.run(plain), family.run(held))
    for right, found in zip(gradients(family, plain, facts), gradients(family, held, facts), strict=True):
        assert torch.equal(right, found)
    assert (bytes_of(held) < bytes_of(plain)) == bool(layers(held))
    assert count_weights(held) == count_weights(plain)


@pytest.mark.parametrize(
    "recipe", [("int8:16",), ("int3:8",), ("int4:32/6",), ("lowrank:0.5",), ("narrow:0.5", "int4:16")]
)
def test_every_storage_is_widened_to_what_loading_gives(make, tmp_path, recipe):
    family = make("llama_untied")
    plain, held = both(family, tmp_path / "p", recipe)
    assert torch.equal(family.run(plain), family.run(held))


@pytest.mark.parametrize("recipe", [("int8:16",), ("int3:8",), ("int4:10",), ("int4:32/6",), ("prune:0.5",)])
def test_some_rows_are_the_rows_of_the_whole(make, tmp_path, recipe):
    _, held = both(make("llama_untied"), tmp_path / "p", recipe)
    for layer in layers(held):
        whole, count = layer.stored.widened(torch.float32), layer.stored.shape[0]
        index = torch.tensor([count - 1, 0, 3, 3])
        assert torch.equal(layer.stored.rows(index), whole[index])
        assert torch.equal(layer.stored.rows(slice(8, count - 1)), whole[8 : count - 1])


def test_a_large_head_is_used_some_rows_at_a_time(make, tmp_path, monkeypatch):
    """The losses are the plain model's but for rounding, and no more than a block of the head is widened at once."""
    family = make("llama_tied")
    plain, held = both(family, tmp_path / "p", ("int4:16",), embedding="int8")
    assert held.lm_head.stored is held.model.embed_tokens.stored
    right = losses(plain, examples())
    assert torch.equal(losses(held, examples()), right)
    monkeypatch.setattr(quantized_linear, "LARGE", 64)
    monkeypatch.setattr(stored_weight, "BLOCK", 16 * held.lm_head.in_features)
    widest = []
    rows = stored_weight.Codes.rows
    monkeypatch.setattr(
        stored_weight.Codes, "rows", lambda self, index, *room: widest.append(index) or rows(self, index, *room)
    )
    torch.testing.assert_close(losses(held, examples()), right)
    of_head = [index for index in widest if isinstance(index, slice)]
    assert of_head
    assert max(index.stop - index.start for index in of_head) <= 16
    states = torch.randn(2, 3, held.lm_head.in_features, requires_grad=True)
    for mine, other in zip(
        *(
            [head(states), *torch.autograd.grad(head(states).square().sum(), states)]
            for head in (held.lm_head, plain.lm_head)
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_sixteen_bits_are_held_as_such_and_four_take_a_seventh(make, tmp_path):
    half = make("gpt2", torch.bfloat16)
    plain, held = both(half, tmp_path / "half", ())
    assert {type(layer.stored) for layer in layers(held)} == {stored_weight.Verbatim}
    assert {layer.stored.values.dtype for layer in layers(held)} == {torch.bfloat16}
    assert torch.equal(half.run(plain), half.run(held))
    saved = {id(layer.stored): 2 * layer.stored.values.numel() for layer in layers(held)}  # table and head are one
    assert bytes_of(plain) - bytes_of(held) == sum(saved.values())
    _, coded = both(make("llama_untied"), tmp_path / "coded", ("int4:16",))
    for layer in layers(coded):
        assert layer.stored.size < layer.weight.numel() * 4 / 4.5


def test_places_of_an_adapter_that_is_built_of_weights_stay_as_they_are(make, tmp_path):
    make("llama_tied", torch.bfloat16).build(tmp_path / "p", ("int4:16",), embedding="int8")
    plain = opened(tmp_path / "p", "widened")
    ends = Geometry.of(plain, 2, 1).ends(plain)
    for method, wide in (("lora", False), ("blocks", True)):
        held = opened(tmp_path / "p", "stored", method)
        inside = [m for path in ends for m in held.get_submodule(path).modules()]
        assert any(isinstance(module, DequantizingLinear) for module in inside) != wide
    with_head = AdapterSpec("lora", rank=2, slots=ends, options=(("head", True),))
    held = load(tmp_path / "p", dtype=torch.float32, hold=holding("stored", with_head))
    assert not isinstance(held.lm_head, DequantizingLinear)
    assert not isinstance(held.model.embed_tokens, DequantizingEmbedding)


def test_a_backward_pass_keeps_no_widened_weight(make, tmp_path):
    """Autograd saves no tensor of a weight's size and shape between forward and backward."""
    family = make("llama_untied")
    family.build(tmp_path / "p", ("int4:16",))
    held = opened(tmp_path / "p", "stored", "blocks")
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
        model = opened(tmp_path / "p", "stored" if held else "widened")
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
        with ENGINES[engine](adapted) as running:
            rows.append([single_gradient(adapted, losses, examples(), running, row) for row in range(3)])
    for plain, found in zip(*rows, strict=True):
        assert all(torch.equal(plain[name], found[name]) for name in plain)


def vetted(folder, model, facts):
    """Returns the numbers of a vetting, or the check that refuses."""
    try:
        checks = vet(folder, model, facts, VettingThresholds(), seed=3).checks
    except UnsupportedModel as refusal:
        return [(str(refusal).partition("=")[0], "", 0.0)]
    return [(check.name, check.where, check.value) for check in checks]


def examples():
    ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(4))
    return Examples(ids, (torch.arange(9) < torch.tensor([9, 4, 7])[:, None]).long())


def losses(model, batch):
    return CausalLM().losses(model, batch)
