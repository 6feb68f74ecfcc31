"""The promises of every entry of adapter.methods.METHODS on the families that fit; a new entry inherits all tests."""

import copy
import functools
import itertools
import json
import socket

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from offsite.adapter.export import export, load
from offsite.adapter.layout import Layout
from offsite.adapter.methods import METHODS, ON_PARAMETERS, attach, check_task, dummy_tensors, places
from offsite.adapter.methods.bottleneck import Bottleneck
from offsite.adapter.methods.peft_tuners import MOVED, ROUNDED, SAME
from offsite.adapter.refused_methods import REFUSED
from offsite.adapter.side_modules import SIDE_MODULE
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.package.stored_weight import Verbatim
from offsite.emulator.runtime.quantized_linear import can_hold, held_layer
from offsite.errors import ConfigError, UnknownName, UnsupportedModel
from offsite.task.tasks import TASKS
from tests.families import FEW, TOWERS, attach_any, inputs, logits, loss, spec_for, tiny

# Methods that do not take GPT-2's transposed layers.
LINEAR = ("beft", "c3a", "delora", "glora", "hra", "loha", "lokr", "miss", "miss_bat", "oft", "peanut", "road", "shira")
# (method, family) -> the alternative in the message
UNFIT = {("bitfit", "llama"): "norm"} | {(name, "gpt2"): "ffa_lora" for name in (*LINEAR, "supertuning")}
UNFIT |= {("clip_adapter", family): "bottleneck" for family in TOWERS}
UNFIT |= {(method, family): "lora" for method in ("concept_tokens", "ip_adapter") for family in TOWERS}
EXACT = {"ffa_lora", "fed_sb", "ia3", "miss", "miss_bat", "bitfit", "beft", "norm", "masked", "blocks", "head"}
EXACT |= {"fourierft", "waveft", "c3a", "shira", "supertuning", "tinylora"}
PAIRS = [(method, family) for family in TOWERS for method in METHODS if (method, family) not in UNFIT]
PAIRS += [("clip_adapter", "clip"), ("concept_tokens", "pixart"), ("ip_adapter", "pixart")]
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = [  # warnings of peft's own loading; `adapter.inject.quiet` covers our `attach`
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term:UserWarning"),
]
each = pytest.mark.parametrize(("method", "family"), PAIRS)


def attached(method, family, dtype=torch.float32, seed=11):
    return attach_any(tiny(family, dtype), spec_for(method, family, seed))


@functools.lru_cache(maxsize=4)
def shared(method, family, dtype=torch.float32):
    """Returns an adapted model that tests only read."""
    return attached(method, family, dtype)


@functools.cache
def plain(family, dtype=torch.float32):
    """Returns the logits of the model without an adapter."""
    return logits(tiny(family, dtype), family)


def perturb(model, seed=0):
    layout = Layout.of(model)
    start = layout.read(model)
    layout.write(model, start + np.random.default_rng(seed).normal(scale=0.1, size=layout.size))
    return model


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("method", "family"), sorted(UNFIT))
def test_a_model_that_lacks_what_the_method_tunes_is_refused_with_a_way_out(method, family):
    with pytest.raises(UnsupportedModel, match=UNFIT[method, family]):
        attached(method, family)


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_adapter_has_the_effect_that_the_table_says(method, family, dtype):
    found, before = logits(shared(method, family, dtype), family), plain(family, dtype)
    start = METHODS[method].start
    if start == SAME:
        assert torch.equal(found, before)
    elif start == ROUNDED:
        assert (found - before).abs().max() <= 8 * torch.finfo(dtype).eps * before.abs().max()
    else:
        assert start == MOVED
        assert dtype == torch.bfloat16 or not torch.equal(found, before)


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_moved_adapter_has_an_effect_and_the_output_keeps_its_dtype(method, family, dtype):
    moved = logits(perturb(attached(method, family, dtype)), family)
    assert moved.dtype == dtype
    assert torch.isfinite(moved).all()
    assert (moved - plain(family, dtype)).abs().max() > 1e-4


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_the_adapter_is_trainable_inside_its_places_in_float32(method, family, dtype):
    base, spec = tiny(family, dtype), spec_for(method, family)
    before = {id(parameter) for parameter in base.parameters()}
    inside = places(base, spec)
    found = trainable(attach_any(base, spec))
    assert found
    assert all(p.dtype == torch.float32 for p in found.values())
    assert not before & {id(p) for p in found.values()}
    assert all(any(f".{place}." in f".{name}" for place in inside) for name in found)
    if not METHODS[method].shared:
        assert all(any(f".{place}." in f".{name}" for name in found) for place in inside)


@each
def test_training_never_writes_the_base_model_and_a_step_lowers_the_loss(method, family):
    base = tiny(family)
    held = list(base.parameters())
    before = [parameter.detach().clone() for parameter in held]
    model = perturb(attach_any(base, spec_for(method, family)))
    first = loss(model, family)
    first.backward()
    found = list(trainable(model).values())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in found)
    length = torch.cat([p.grad.flatten() for p in found]).norm()
    for rate in (0.1, 0.01):  # along the gradient, whatever its length
        with torch.no_grad():
            stepped = perturb(attached(method, family))
            for parameter, like in zip(trainable(stepped).values(), found, strict=True):
                parameter.sub_(like.grad, alpha=float(rate / length))
            lower = bool(loss(stepped, family) < first)
        if lower:
            break
    assert lower
    torch.optim.SGD(found, lr=float(0.1 / length)).step()
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


@each
def test_the_seed_alone_decides_every_initial_value(method, family):
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    first = attached(method, family).state_dict()
    assert torch.equal(state, torch.get_rng_state()), "attach used up the caller's randomness"
    torch.manual_seed(2)
    np.random.seed(2)
    second = attached(method, family).state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@each
def test_emulator_and_full_model_have_the_same_adapter(method, family):
    emulator = tiny(family)
    tower = emulator.get_submodule((TOWERS | FEW)[family])
    for index in (1, 2):
        tower[index] = torch.nn.Identity()  # a middle without parameters
    small, full = attach_any(emulator, spec_for(method, family)), shared(method, family)
    assert Layout.of(small) == Layout.of(full)
    assert Layout.of(small).digest() == Layout.of(attached(method, family, seed=12)).digest()
    there = full.state_dict()
    assert all(torch.equal(tensor, there[name]) for name, tensor in small.state_dict().items())
    # Generated frozen values are in buffers, and not in the state dict.
    frozen = dict(full.named_buffers())
    assert all(
        torch.equal(tensor, frozen[name]) for name, tensor in small.named_buffers() if tensor.is_floating_point()
    )


@each
def test_what_is_frozen_hardly_changes_where_a_machine_rounds_otherwise(method, family):
    base = tiny(family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=generator))
    mine = [shared(method, family), attach_any(base, spec_for(method, family))]
    here, there = (dict(model.named_parameters()) | dict(model.named_buffers()) for model in mine)
    assert set(here) == set(there)
    for name, tensor in here.items():
        if tensor.is_floating_point():
            assert (tensor - there[name]).norm() <= 1e-4 * tensor.norm(), name


@each
def test_the_layout_reads_back_what_it_wrote(method, family):
    model = attached(method, family)
    layout = Layout.of(model)
    vector = np.random.default_rng(3).normal(size=layout.size).astype(np.float32)
    layout.write(model, vector)
    assert np.array_equal(layout.read(model), vector)
    named = layout.named(vector)
    parameters = trainable(model)
    assert list(named) == sorted(parameters)
    assert all(np.array_equal(values, parameters[name].detach().numpy()) for name, values in named.items())


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_export_and_load_give_identical_logits(method, family, dtype, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = perturb(attached(method, family, dtype))
    spec = spec_for(method, family)
    export(model, spec, tmp_path, base="some-owner/some-model", auxiliary=dummy_tensors(tiny(family), spec))
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == files
    loaded = load(tiny(family, dtype), tmp_path)
    assert torch.equal(logits(loaded, family), logits(model, family))
    assert not any(p.requires_grad for p in loaded.parameters())
    if METHODS[method].peft:
        plain_peft = PeftModel.from_pretrained(tiny(family, dtype), str(tmp_path))
        assert torch.equal(logits(plain_peft, family), logits(model, family))


@each
def test_export_is_the_same_bytes_every_time_and_names_the_base_as_told(method, family, tmp_path):
    spec = spec_for(method, family)
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        model, given = perturb(attached(method, family)), dummy_tensors(tiny(family), spec)
        export(model, spec, tmp_path / name, base="owner/model", auxiliary=given)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/model"
    assert ("offsite_method" in config) != METHODS[method].peft
    if METHODS[method].peft:
        assert config["inference_mode"] is True
        assert config["task_type"] == ("CAUSAL_LM" if family in ("llama", "gpt2") else None)


@each
def test_a_deep_copy_has_an_adapter_of_its_own(method, family):
    model = attached(method, family)
    before = logits(model, family)
    twin = perturb(copy.deepcopy(model))
    assert torch.equal(logits(model, family), before)
    assert not torch.equal(logits(twin, family), before)


@each
def test_a_second_adapter_is_refused(method, family):
    with pytest.raises(UnsupportedModel, match="at most one"):
        attach(shared(method, family), spec_for(method, family))


@each
def test_the_mean_of_parameters_is_the_mean_of_effects_exactly_where_the_table_says_so(method, family):
    """Effects are outputs of each adapted layer on fixed random inputs."""
    model = attached(method, family)
    layout = Layout.of(model)
    start = layout.read(model)
    draw = np.random.default_rng(5)
    vectors = [start + draw.normal(scale=0.3, size=layout.size) for _ in range(3)]
    outputs = [_layer_outputs(model, family, layout, vector) for vector in vectors]
    of_mean = _layer_outputs(model, family, layout, np.mean(vectors, axis=0))
    at_start = _layer_outputs(model, family, layout, start)
    gaps = [
        float((torch.stack(layer).mean(0) - mean).norm() / (mean - zero).norm())
        for layer, mean, zero in zip(zip(*outputs, strict=True), of_mean, at_start, strict=True)
    ]
    assert gaps
    assert (max(gaps) < 1e-5) == METHODS[method].exact_mean, gaps
    assert METHODS[method].why


def _layer_outputs(model, family, layout, vector):
    layout.write(model, vector)
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, Bottleneck)) or _carries(m)]
    if not layers:
        return [_first_slot(model, family)]
    generator = torch.Generator().manual_seed(9)
    widths = [_width(layer) for layer in layers]
    with torch.no_grad():
        return [layer(torch.randn(4, width, generator=generator)) for layer, width in zip(layers, widths, strict=True)]


def _carries(module):
    return hasattr(module, "offsite_bias") or hasattr(module, SIDE_MODULE)


def _first_slot(model, family):
    """Returns the output of the first slot's block, whose input no adapter has changed."""
    found = []
    slot = model.get_submodule(f"{(TOWERS | FEW)[family]}.0")
    handle = slot.register_forward_hook(lambda *call: found.append(call[2]))
    with torch.no_grad():
        model(**inputs(family))
    handle.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


def _width(layer):
    if isinstance(layer, Bottleneck):
        return layer.down.in_features
    inner = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if isinstance(inner, torch.nn.Linear):
        return inner.in_features
    return inner.weight.shape[0]  # the only length of a norm, and the first of GPT-2's transposed layers


def test_the_tables_are_complete():
    assert all(name == method.name for name, method in METHODS.items())
    assert not set(METHODS) & set(REFUSED)
    exact = {name for name, method in METHODS.items() if method.exact_mean}
    assert exact == EXACT
    assert {name for name, method in METHODS.items() if method.start == MOVED} == {
        "soft_prompt",
        "concept_tokens",
        "unilora",
        "vblora",
        "madx",
        "fusion",
    }


def test_a_method_and_a_task_that_need_each_other_are_taken_both_or_neither():
    pairs = {method.name: method.task for method in METHODS.values() if method.task}
    assert pairs == {"ip_adapter": "image_prompt_to_image"}
    for name, task in itertools.product(METHODS, TASKS):
        if name in pairs or task in pairs.values():
            if pairs.get(name) == task:
                check_task(name, task)
            else:
                with pytest.raises(ConfigError, match="only method 'ip_adapter' reads all that records"):
                    check_task(name, task)
        else:
            check_task(name, task)


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_a_method_that_is_not_offered_says_exactly_why(method):
    with pytest.raises(UnsupportedModel) as caught:
        attach(tiny("llama"), spec_for(method, "llama"))
    assert str(caught.value) == f"method={method!r} is not offered: {REFUSED[method]}"


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UnknownName, match="ffa_lora"):
        attach(tiny("llama"), AdapterSpec("ffa_lara", slots=("model.layers.0",)))


@pytest.mark.parametrize(("method", "family"), [(m, f) for m, f in PAIRS if f in ("llama", "gpt2")])
def test_on_layers_with_stored_weights_an_adapter_is_the_same(method, family):
    """Start, output and gradients to the last bit, over weights that exist only while a layer runs."""
    if method in ON_PARAMETERS:
        pytest.skip("its slots stay plain")
    found = []
    for stored in (False, True):
        base, spec = tiny(family, torch.float32), spec_for(method, family, 11)
        for path in spec.slots if stored else ():
            for name, layer in list(base.get_submodule(path).named_modules(prefix=path)):
                if can_hold(layer):
                    weight = layer.weight.detach()
                    base.set_submodule(name, held_layer(layer, Verbatim(tuple(weight.shape), weight.dtype, weight)))
        model = attach_any(base, spec)
        start = Layout.of(model).read(model)
        output = loss(perturb(model), family)
        gradients = torch.autograd.grad(output, list(trainable(model).values()), allow_unused=True)
        found.append((torch.from_numpy(start), output.detach(), *gradients))
    assert all(left is right or torch.equal(left, right) for left, right in zip(*found, strict=True))
