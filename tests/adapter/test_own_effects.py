"""The effects of our own methods by another route: the same change by hand in the plain model."""

import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from offsite.adapter.export import WEIGHTS, export, load
from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError
from tests.families import TOWERS, logits, spec_for, tiny


def moved(base, spec, scale=0.2):
    """Returns an adapted model whose trainable parameters were moved, and all its parameters and buffers by name."""
    model = attach(base, spec)
    layout = Layout.of(model)
    layout.write(model, layout.read(model) + np.random.default_rng(1).normal(scale=scale, size=layout.size))
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return model, {name.removeprefix("base_model.model."): t.detach() for name, t in tensors.items()}


def same(model, by_hand, family):
    found, expected, plain = (logits(m, family) for m in (model, by_hand, tiny(family)))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


def bottleneck(tensors, path, read, act):
    inner = act(read @ tensors[f"{path}.down.weight"].T + tensors[f"{path}.down.bias"])
    return inner @ tensors[f"{path}.up.weight"].T + tensors[f"{path}.up.bias"]


# family -> the last dense layers of attention and of the feed-forward part, and the feed-forward module
SUBLAYERS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj", "mlp"),
    "gpt2": ("attn.c_proj", "mlp.c_proj", "mlp"),
    "bert": ("attention.output.dense", "output.dense", None),
    "vit": ("attention.o_proj", "mlp.fc2", "mlp"),
}


@pytest.mark.parametrize("family", TOWERS)
def test_houlsby_adapters_are_added_behind_both_sublayers(family):
    spec = spec_for("houlsby", family, rank=3)
    model, tensors = moved(tiny(family), spec)
    by_hand = tiny(family)
    for slot in spec.slots:
        for name in SUBLAYERS[family][:2]:
            layer, path = by_hand.get_submodule(f"{slot}.{name}"), f"{slot}.{name}.offsite_bottleneck"

            def forward(hidden, plain=layer.forward, path=path):
                output = plain(hidden)
                return output + bottleneck(tensors, path, output, functional.gelu)

            layer.forward = forward
    same(model, by_hand, family)
    assert Layout.of(model).size == 2 * 2 * (32 * 3 + 3 + 3 * 32 + 32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_a_parallel_adapter_reads_what_the_feed_forward_layer_reads(family):
    spec = spec_for("parallel", family, rank=3, alpha=6.0)
    model, tensors = moved(tiny(family), spec)
    by_hand = tiny(family)
    _, writer, part = SUBLAYERS[family]
    for slot in spec.slots:
        layer, path = by_hand.get_submodule(f"{slot}.{part}"), f"{slot}.{writer}.offsite_bottleneck"

        def forward(hidden, plain=layer.forward, path=path):
            return plain(hidden) + 6.0 / 3 * bottleneck(tensors, path, hidden, functional.relu)

        layer.forward = forward
    same(model, by_hand, family)


def test_a_parallel_adapter_in_bert_reads_the_output_of_attention():
    spec = spec_for("parallel", "bert", rank=3)
    model, tensors = moved(tiny("bert"), spec)
    by_hand = tiny("bert")

    def rewritten(block, path):
        def chunk(hidden):
            update = spec.alpha / 3 * bottleneck(tensors, path, hidden, functional.relu)
            written = block.output.dense(block.intermediate(hidden)) + update
            return block.output.LayerNorm(written + hidden)

        return chunk

    for slot in spec.slots:
        block = by_hand.get_submodule(slot)
        block.feed_forward_chunk = rewritten(block, f"{slot}.output.dense.offsite_bottleneck")
    same(model, by_hand, "bert")


@pytest.mark.parametrize(("family", "target"), [("llama", "up_proj"), ("gpt2", "mlp.c_fc"), ("vit", "fc1")])
def test_the_masked_update_adds_to_the_largest_entries(family, target):
    spec = spec_for("masked", family, targets=(target,), options=(("density", 0.05),))
    model, tensors = moved(tiny(family), spec)
    by_hand = tiny(family)
    layers = [name for name, _ in by_hand.named_modules() if name.endswith(target) and name.startswith(spec.slots)]
    assert len(layers) == 2
    for name in layers:
        weight = by_hand.get_submodule(name).weight.data
        flat = weight.numpy().ravel()
        count = round(0.05 * flat.size)
        largest = sorted(np.argsort(-np.abs(flat), kind="stable")[:count])
        values = tensors[f"{name}.offsite_update.values"].numpy()
        assert values.shape == (count,)
        for place, value in zip(largest, values, strict=True):
            flat[place] += value
    same(model, by_hand, family)


def test_the_mask_takes_the_first_of_equal_entries():
    base = tiny("llama")
    base.model.layers[0].mlp.up_proj.weight.data.fill_(0.5)
    spec = spec_for("masked", "llama", targets=("up_proj",), options=(("density", 0.01),))
    _, tensors = moved(base, spec)
    assert tensors["model.layers.0.mlp.up_proj.offsite_update.places"].tolist() == list(range(15))


@pytest.mark.parametrize(("family", "target"), [("llama", "v_proj"), ("gpt2", "c_attn"), ("bert", "value")])
def test_fed_sb_adds_a_small_matrix_between_orthonormal_factors(family, target):
    spec = spec_for("fed_sb", family, rank=3, alpha=12.0, targets=(target,))
    model, tensors = moved(tiny(family), spec)
    by_hand = tiny(family)
    layers = [name for name, _ in by_hand.named_modules() if name.endswith(target) and name.startswith(spec.slots)]
    assert len(layers) == 2
    for name in layers:
        down, up, matrix = (tensors[f"{name}.offsite_update.{part}"] for part in ("down", "up", "matrix"))
        assert torch.allclose(down @ down.T, torch.eye(3), atol=1e-6)
        assert torch.allclose(up.T @ up, torch.eye(3), atol=1e-6)
        update = 12.0 / 3 * up @ matrix @ down
        weight = by_hand.get_submodule(name).weight
        weight.data += update if isinstance(by_hand.get_submodule(name), torch.nn.Linear) else update.T
    same(model, by_hand, family)
    assert Layout.of(model).size == 2 * 3 * 3


def test_fed_sb_draws_its_factors_as_gram_and_schmidt_would():
    """Against classical Gram-Schmidt in float64, which leaves no sign open: each column keeps its own direction."""
    spec = spec_for("fed_sb", "llama", rank=3, targets=("v_proj",), seed=5)
    _, tensors = moved(tiny("llama"), spec)
    drawn = torch.randn(32, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    columns = []
    for column in drawn.T:
        rest = column - sum((column @ other) * other for other in columns)
        columns.append(rest / rest.norm())
    found = tensors["model.layers.0.self_attn.v_proj.offsite_update.down"]
    assert torch.allclose(found, torch.stack(columns).float(), atol=1e-6)


@pytest.mark.parametrize("family", TOWERS)
def test_blocks_change_every_weight_of_the_slots(family):
    spec = spec_for("blocks", family)
    model, tensors = moved(tiny(family), spec, scale=0.05)
    by_hand = tiny(family)
    changed = 0
    for name, parameter in by_hand.named_parameters():
        if name.startswith(tuple(f"{slot}." for slot in spec.slots)):
            path, _, leaf = name.rpartition(".")
            change = tensors[f"{path}.offsite_update.{leaf}"]
            transposed = isinstance(by_hand.get_submodule(path), Conv1D) and leaf == "weight"
            parameter.data += change.T if transposed else change
            changed += parameter.numel()
    same(model, by_hand, family)
    assert Layout.of(model).size == changed


@pytest.mark.parametrize(("family", "path"), [("bert", "classifier"), ("vit", "classifier"), ("llama", "lm_head")])
def test_the_head_is_changed_beside_its_frozen_self(family, path):
    model, tensors = moved(tiny(family), spec_for("head", family))
    by_hand = tiny(family)
    for name, parameter in by_hand.get_submodule(path).named_parameters():
        parameter.data += tensors[f"{path}.offsite_update.{name}"]
    same(model, by_hand, family)
    assert Layout.of(model).size == sum(p.numel() for p in by_hand.get_submodule(path).parameters())


def test_tinylora_settles_the_signs_of_its_singular_vectors():
    layer = attach(tiny("llama"), spec_for("tinylora", "llama")).base_model.model.model.layers[0].self_attn.q_proj
    up, down = layer.tinylora_B["default"], layer.tinylora_A["default"]
    for column in up.T:
        assert column[column.abs().argmax()] > 0
    u, s, vh = np.linalg.svd(tiny("llama").model.layers[0].self_attn.q_proj.weight.detach().numpy())
    assert np.allclose(up @ down, u[:, :2] * s[:2] @ vh[:2], atol=1e-5)


def test_tinylora_is_loaded_with_the_factors_that_were_stored(tmp_path):
    """A new decomposition on this machine could give other signs."""
    spec = spec_for("tinylora", "llama")
    export(attach(tiny("llama"), spec), spec, tmp_path, base="b")
    tensors = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.tinylora_B"
    tensors[name] *= -1
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    for loaded in (load(tiny("llama"), tmp_path), PeftModel.from_pretrained(tiny("llama"), str(tmp_path))):
        found = loaded.base_model.model.model.layers[0].self_attn.q_proj.tinylora_B["default"]
        assert torch.equal(found, tensors[name])


@pytest.mark.parametrize(("rank", "scale"), [(4, 6.0 / math.sqrt(4)), (1, 6.0)])
def test_rslora_scales_by_the_root_of_the_rank(rank, scale):
    spec = spec_for("rslora", "llama", rank=rank, alpha=6.0)
    model, tensors = moved(tiny("llama"), spec)
    by_hand = tiny("llama")
    for slot in spec.slots:
        for name in (f"{slot}.self_attn.q_proj", f"{slot}.self_attn.v_proj"):
            up, down = (tensors[f"{name}.lora_{factor}.default.weight"] for factor in "BA")
            by_hand.get_submodule(name).weight.data += scale * up @ down
    same(model, by_hand, "llama")


def test_masked_and_supertuning_are_the_same_numbers():
    """Against peft's own implementation of the choice by magnitude, filled with our values."""
    target = ("q_proj",)
    ours, _ = moved(tiny("llama"), spec_for("masked", "llama", targets=target, options=(("density", 0.25),)))
    theirs = attach(tiny("llama"), spec_for("supertuning", "llama", targets=target, options=(("sparsity", 0.75),)))
    for slot in (0, 3):
        mine = ours.model.layers[slot].self_attn.q_proj.offsite_update
        layer = theirs.base_model.model.model.layers[slot].self_attn.q_proj
        indices = layer.supertuning_indices["default"].long()
        dense = torch.zeros(32 * 32).scatter(0, mine.places, mine.values.detach())
        layer.supertuning_values["default"].data = dense[indices]
        assert set(indices.tolist()) == set(mine.places.tolist())
    assert torch.allclose(logits(ours, "llama"), logits(theirs, "llama"), atol=1e-6)


def test_an_adapter_method_without_targets_refuses_them():
    for method in ("bottleneck", "houlsby", "parallel", "soft_prompt", "head"):
        with pytest.raises(ConfigError, match="leave targets empty"):
            attach(tiny("llama"), AdapterSpec(method, slots=("model.layers.0",), targets=("q_proj",)))
