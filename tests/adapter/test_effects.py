"""Each method's effect by another route: the same change by hand in the plain model's weights."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec

IDS = torch.arange(16).reshape(2, 8)
SLOTS = ("model.layers.0", "model.layers.3")
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")


def llama():
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=97, use_cache=False)).eval()


def gpt2():
    torch.manual_seed(3)
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=97, use_cache=False)).eval()


def moved(base, spec, scale=0.2):
    """Returns an adapted model whose trainable parameters were moved, and all its tensors by name."""
    model = attach(base, spec)
    layout = Layout.of(model)
    layout.write(model, layout.read(model) + np.random.default_rng(1).normal(scale=scale, size=layout.size))
    tensors = {name.removeprefix("base_model.model."): t.detach() for name, t in model.state_dict().items()}
    return model, tensors


def same(model, by_hand):
    with torch.no_grad():
        found, expected, plain = (
            m(input_ids=IDS).logits for m in (model, by_hand, type(by_hand)(by_hand.config).eval())
        )
    assert torch.allclose(found, expected, atol=2e-6)
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("method", ["lora", "ffa_lora"])
def test_lora_adds_the_product_of_its_factors(method):
    spec = AdapterSpec(method, rank=3, alpha=12.0, slots=SLOTS, targets=("q_proj", "down_proj"))
    model, tensors = moved(llama(), spec)
    by_hand = llama()
    for slot in SLOTS:
        for name in (f"{slot}.self_attn.q_proj", f"{slot}.mlp.down_proj"):
            update = tensors[f"{name}.lora_B.default.weight"] @ tensors[f"{name}.lora_A.default.weight"] * (12.0 / 3)
            by_hand.get_submodule(name).weight.data += update
    same(model, by_hand)


@pytest.mark.parametrize("method", ["lora", "ffa_lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factor_a_is_drawn_from_the_seed_in_name_order(method, dtype):
    spec = AdapterSpec(method, rank=3, slots=SLOTS, targets=("v_proj", "q_proj", "down_proj"), seed=99)
    found = {name: p for name, p in attach(llama().to(dtype), spec).named_parameters() if ".lora_A." in name}
    generator = torch.Generator().manual_seed(99)
    assert len(found) == 6
    for name in sorted(found):
        bound = 1 / math.sqrt(found[name].shape[1])
        expected = torch.empty(found[name].shape).uniform_(-bound, bound, generator=generator)
        assert torch.equal(found[name], expected)
        assert found[name].requires_grad == (method == "lora")
    other = dict(attach(llama(), AdapterSpec(method, rank=3, slots=SLOTS, seed=98)).named_parameters())
    assert not any(torch.equal(p, other.get(name, torch.zeros(1))) for name, p in found.items())


def test_ia3_scales_outputs_of_attention_and_inputs_of_feed_forward():
    model, tensors = moved(llama(), AdapterSpec("ia3", slots=SLOTS))
    by_hand = llama()
    for slot in SLOTS:
        for name in (f"{slot}.self_attn.k_proj", f"{slot}.self_attn.v_proj"):
            by_hand.get_submodule(name).weight.data *= tensors[f"{name}.ia3_l.default"].reshape(-1, 1)
        name = f"{slot}.mlp.down_proj"
        by_hand.get_submodule(name).weight.data *= tensors[f"{name}.ia3_l.default"].reshape(1, -1)
    same(model, by_hand)


@pytest.mark.parametrize("rank", [2, 5])
def test_miss_adds_one_block_to_every_shard(rank):
    """Input feature i of a layer is multiplied by row i mod rank, even where the rank does not divide the inputs."""
    model, tensors = moved(llama(), AdapterSpec("miss", rank=rank, slots=SLOTS))
    by_hand = llama()
    for slot in SLOTS:
        for name in (f"{slot}.self_attn.q_proj", f"{slot}.self_attn.v_proj"):
            rows = torch.arange(32) % rank
            by_hand.get_submodule(name).weight.data += tensors[f"{name}.miss_block.default"][rows].T
    same(model, by_hand)


def test_norm_replaces_the_weights_of_every_norm():
    model, tensors = moved(llama(), AdapterSpec("norm", slots=SLOTS))
    by_hand = llama()
    for slot in SLOTS:
        for name in (f"{slot}.input_layernorm", f"{slot}.post_attention_layernorm"):
            by_hand.get_submodule(name).weight.data = tensors[f"{name}.ln_tuning_layers.default.weight"]
    same(model, by_hand)


def test_bitfit_shifts_every_bias():
    slots = ("transformer.h.0", "transformer.h.3")
    model, tensors = moved(gpt2(), AdapterSpec("bitfit", slots=slots))
    by_hand = gpt2()
    shifted = 0
    for name, module in by_hand.named_modules():
        if name.startswith(slots) and getattr(module, "bias", None) is not None:
            module.bias.data += tensors[f"{name}.offsite_bias.shift"]
            shifted += 1
    assert shifted == 2 * 6  # two norms and four dense layers in each block
    same(model, by_hand)


def test_bitfit_can_be_held_to_targets():
    slots = ("transformer.h.0",)
    names = Layout.of(attach(gpt2(), AdapterSpec("bitfit", slots=slots, targets=("ln_1", "mlp.c_proj")))).names
    assert names == ("transformer.h.0.ln_1.offsite_bias.shift", "transformer.h.0.mlp.c_proj.offsite_bias.shift")


def test_a_bottleneck_is_added_behind_the_block():
    model, tensors = moved(llama(), AdapterSpec("bottleneck", rank=4, slots=SLOTS))
    by_hand = llama()
    for slot in SLOTS:
        block = by_hand.get_submodule(slot)

        def forward(hidden, *args, plain=block.forward, path=f"{slot}.offsite_bottleneck", **kwargs):
            output = plain(hidden, *args, **kwargs)
            inner = output @ tensors[f"{path}.down.weight"].T + tensors[f"{path}.down.bias"]
            return output + functional.gelu(inner) @ tensors[f"{path}.up.weight"].T + tensors[f"{path}.up.bias"]

        block.forward = forward
    same(model, by_hand)
    assert Layout.of(model).size == 2 * (32 * 4 + 4 + 4 * 32 + 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_in_half_precision_round_the_trained_weight_and_nothing_else(dtype):
    """By hand: the plain model with its norm weights set to the rounded float32 weights."""
    model, tensors = moved(llama().to(dtype), AdapterSpec("norm", slots=SLOTS))
    by_hand = llama().to(dtype)
    for slot in SLOTS:
        for name in (f"{slot}.input_layernorm", f"{slot}.post_attention_layernorm"):
            by_hand.get_submodule(name).weight.data = tensors[f"{name}.ln_tuning_layers.default.weight"].to(dtype)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, by_hand(input_ids=IDS).logits)
