"""What every entry of adapter.METHODS promises, over a Llama and a GPT-2; a new entry inherits all of it."""

import copy
import json
import socket
from collections import Counter

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adapter.bottleneck import Bottleneck
from adapter.export import export, load
from adapter.layout import Layout
from adapter.methods import METHODS, attach
from adapter.spec import AdapterSpec
from errors import UnknownName, UnsupportedModel

IDS = torch.arange(24).reshape(3, 8) % 97
TOWERS = {"llama": "model.layers", "gpt2": "transformer.h"}
REFUSED = {("bitfit", "llama"): "norm", ("miss", "gpt2"): "ffa_lora"}  # -> the way out that the message names
PAIRS = [(method, family) for family in TOWERS for method in METHODS if (method, family) not in REFUSED]
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
each = pytest.mark.parametrize(("method", "family"), PAIRS)


def tiny(family, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if family == "llama":
            config = LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=97,
                use_cache=False,
            )
            model = LlamaForCausalLM(config)
        else:
            config = GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=97, n_positions=32, use_cache=False)
            config.bos_token_id = config.eos_token_id = 0
            model = GPT2LMHeadModel(config)
        for name, parameter in model.named_parameters():  # no weight at its trivial initial value
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
    return model.to(dtype).eval()


def spec_for(method, family, seed=11):
    return AdapterSpec(method, slots=(f"{TOWERS[family]}.0", f"{TOWERS[family]}.3"), seed=seed)


def attached(method, family, dtype=torch.float32, seed=11):
    return attach(tiny(family, dtype), spec_for(method, family, seed))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def perturb(model, seed=0):
    layout = Layout.of(model)
    start = layout.read(model)
    layout.write(model, start + np.random.default_rng(seed).normal(scale=0.1, size=layout.size))
    return model


@pytest.mark.parametrize(("method", "family"), sorted(REFUSED))
def test_a_model_that_lacks_what_the_method_tunes_is_refused_with_a_way_out(method, family):
    with pytest.raises(UnsupportedModel, match=REFUSED[method, family]):
        attached(method, family)


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_new_adapter_has_no_effect_at_all(method, family, dtype):
    assert torch.equal(logits(attached(method, family, dtype)), logits(tiny(family, dtype)))


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_moved_adapter_has_an_effect_and_the_output_keeps_its_dtype(method, family, dtype):
    moved = logits(perturb(attached(method, family, dtype)))
    assert moved.dtype == dtype
    assert torch.isfinite(moved).all()
    assert (moved - logits(tiny(family, dtype))).abs().max() > 1e-3


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_the_adapter_is_trainable_inside_the_slots_in_float32(method, family, dtype):
    base = tiny(family, dtype)
    before = {id(parameter) for parameter in base.parameters()}
    model = attach(base, spec_for(method, family))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(p.dtype == torch.float32 for p in trainable.values())
    assert not before & {id(p) for p in trainable.values()}
    slots = spec_for(method, family).slots
    assert all(any(f".{slot}." in f".{name}" for slot in slots) for name in trainable)
    assert all(any(f".{slot}." in f".{name}" for name in trainable) for slot in slots)


@each
def test_training_never_writes_the_base_model(method, family):
    base = tiny(family)
    held = list(base.parameters())
    before = [parameter.detach().clone() for parameter in held]
    perturb(attach(base, spec_for(method, family)))
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


@each
def test_every_trainable_parameter_gets_a_gradient_and_a_step_lowers_the_loss(method, family):
    model = perturb(attached(method, family))

    def loss():
        return torch.nn.functional.cross_entropy(
            model(input_ids=IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
        )

    first = loss()
    first.backward()
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)
    length = torch.cat([p.grad.flatten() for p in trainable]).norm()
    torch.optim.SGD(trainable, lr=float(0.1 / length)).step()  # 0.1 along the gradient, however small that is
    assert loss() < first


@each
def test_the_seed_alone_decides_every_initial_value(method, family):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = attached(method, family).state_dict()
    assert torch.equal(state, torch.get_rng_state()), "attach used up the caller's randomness"
    torch.manual_seed(2)
    second = attached(method, family).state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@each
def test_emulator_and_full_model_share_one_layout(method, family):
    emulator = tiny(family)
    tower = emulator.get_submodule(TOWERS[family])
    for index in (1, 2):
        tower[index] = torch.nn.Identity()  # a middle without any parameter or name
    mine = Layout.of(attach(emulator, spec_for(method, family)))
    assert mine == Layout.of(attached(method, family))
    assert mine.digest() == Layout.of(attached(method, family, seed=12)).digest()


@each
def test_the_layout_reads_back_what_it_wrote(method, family):
    model = attached(method, family)
    layout = Layout.of(model)
    vector = np.random.default_rng(3).normal(size=layout.size).astype(np.float32)
    layout.write(model, vector)
    assert np.array_equal(layout.read(model), vector)
    named = layout.named(vector)
    parameters = dict(model.named_parameters())
    assert list(named) == sorted(name for name, p in parameters.items() if p.requires_grad)
    assert all(np.array_equal(values, parameters[name].detach().numpy()) for name, values in named.items())


@each
@pytest.mark.parametrize("dtype", DTYPES)
def test_export_and_load_give_identical_logits(method, family, dtype, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = perturb(attached(method, family, dtype))
    export(model, spec_for(method, family), tmp_path, base="some-owner/some-model")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = load(tiny(family, dtype), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    if METHODS[method].peft:
        plain_peft = PeftModel.from_pretrained(tiny(family, dtype), str(tmp_path))
        assert (logits(plain_peft) - logits(model)).abs().max() == 0


@each
def test_export_is_the_same_bytes_every_time_and_names_the_base_as_told(method, family, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        export(perturb(attached(method, family)), spec_for(method, family), tmp_path / name, base="owner/model")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/model"
    assert ("offsite_method" in config) != METHODS[method].peft
    if METHODS[method].peft:
        assert config["inference_mode"] is True
        assert config["task_type"] == "CAUSAL_LM"


@each
def test_a_deep_copy_has_an_adapter_of_its_own(method, family):
    model = attached(method, family)
    twin = perturb(copy.deepcopy(model))
    assert torch.equal(logits(model), logits(tiny(family)))
    assert not torch.equal(logits(twin), logits(model))


@each
def test_a_second_adapter_is_refused(method, family):
    model = attached(method, family)
    with pytest.raises(UnsupportedModel, match="at most one"):
        attach(model, spec_for(method, family))


@each
def test_the_mean_of_parameters_is_the_mean_of_effects_exactly_where_the_table_says_so(method, family):
    """Effects are measured from outside: outputs of each adapted layer on fixed random inputs."""
    model = attached(method, family)
    layout = Layout.of(model)
    start = layout.read(model)
    draw = np.random.default_rng(5)
    vectors = [start + draw.normal(scale=0.3, size=layout.size) for _ in range(3)]
    outputs = [_layer_outputs(model, layout, vector) for vector in vectors]
    of_mean = _layer_outputs(model, layout, np.mean(vectors, axis=0))
    plain = _layer_outputs(model, layout, start)
    gaps = [
        float((torch.stack(layer).mean(0) - mean).norm() / (mean - zero).norm())
        for layer, mean, zero in zip(zip(*outputs, strict=True), of_mean, plain, strict=True)
    ]
    assert (max(gaps) < 1e-5) == METHODS[method].exact_mean, gaps
    assert METHODS[method].why


def _layer_outputs(model, layout, vector):
    layout.write(model, vector)
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, Bottleneck)) or hasattr(m, "offsite_bias")]
    generator = torch.Generator().manual_seed(9)
    widths = [_width(layer) for layer in layers]
    with torch.no_grad():
        return [layer(torch.randn(4, width, generator=generator)) for layer, width in zip(layers, widths, strict=True)]


def _width(layer):
    if isinstance(layer, Bottleneck):
        return layer.down.in_features
    plain = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if isinstance(plain, torch.nn.Linear):
        return plain.in_features
    return plain.weight.shape[0]  # a norm's only length; the first of GPT-2's transposed layers


def test_the_table_is_complete():
    assert set(METHODS) == {"lora", "ffa_lora", "ia3", "miss", "bitfit", "norm", "bottleneck"}
    assert all(name == method.name for name, method in METHODS.items())
    assert Counter(method.exact_mean for method in METHODS.values()) == {True: 5, False: 2}


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(UnknownName, match="ffa_lora"):
        attach(tiny("llama"), AdapterSpec("ffa_lara", slots=("model.layers.0",)))
