"""Layers rounded by bitsandbytes: numbers by a second route, exact gradients, and no record that affects another."""

import sys

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.package.package_reader import load, read_manifest
from offsite.emulator.package.stored_weight import Pieces, Verbatim
from offsite.emulator.runtime.bitsandbytes_layers import library, may_round, round_weight
from offsite.emulator.runtime.quantized_linear import DequantizingLinear
from offsite.emulator.runtime.stored_model import holding
from offsite.emulator.structure.from_config import empty_model
from offsite.emulator.structure.geometry import Geometry, slot_paths
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.emulator.vetting.vet import vet
from offsite.errors import ConfigError, RangeError, UnknownName, UnsupportedModel
from offsite.privacy.batches import trainable
from offsite.privacy.engines import ENGINES
from offsite.privacy.norms import CLIP_MARGIN
from offsite.privacy.probe import single_gradient
from offsite.task.causal_lm import CausalLM
from offsite.task.checkpoint import load as read_checkpoint
from offsite.task.examples import Examples
from offsite.task.model_folder import document
from offsite.task.packed_format import packed_format

NEEDED = "needs the optional extra: pip install 'offsite[bitsandbytes]'"
KINDS = ("int8", "nf4")
# Dettmers et al. 2023, arXiv 2305.14314, appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes", reason=NEEDED)


def slow_nf4(weight):
    """Returns the nearest of sixteen numbers times the largest of 64, float64, and a mask of weights without a tie."""
    flat = nn.functional.pad(weight.double().flatten(), (0, -weight.numel() % 64)).reshape(-1, 64)
    largest = flat.abs().amax(1, keepdim=True)
    points = torch.tensor(NF4, dtype=torch.float64)
    far, place = (flat / largest).unsqueeze(-1).sub(points).abs().topk(2, largest=False)
    parts = (points[place[..., 0]] * largest, far[..., 1] - far[..., 0] > 1e-6)
    return tuple(part.flatten()[: weight.numel()].reshape(weight.shape) for part in parts)


def slow_int8(weight):
    """Returns multiples of a 127th of each row's largest weight, in float16, and a mask of weights without a tie."""
    half = weight.half().double()
    step = half.abs().amax(1, keepdim=True) / 127
    return (half / step).round() * step, ((half / step).frac().abs() - 0.5).abs() > 1e-4


def rounded(family, folder, kind, recipe=(), **more):
    """Returns a package's emulator with rounded weights in plain layers, the same in stored form, and the rounded."""
    family.build(folder, recipe, **more)
    plain, held = load(folder, dtype=torch.float32), opened(folder, kind)
    forms = {
        path: layer.stored
        for path, layer in held.named_modules()
        if isinstance(layer, DequantizingLinear) and isinstance(layer.stored, Pieces)
    }
    for path, form in forms.items():
        plain.get_submodule(path).weight.data.copy_(form.widened(torch.float32))
    return plain, held, forms


def opened(folder, kind):
    text, facts = (folder / "config.json").read_text(), read_manifest(folder)
    slots, _ = slot_paths(empty_model(text, facts.auto, torch.float32, allocated=False), facts.geometry)
    return load(folder, dtype=torch.float32, hold=holding(kind, AdapterSpec("lora", rank=2, slots=slots)))


@pytest.mark.parametrize(("kind", "slow"), [("nf4", slow_nf4), ("int8", slow_int8)])
def test_the_numbers_by_a_second_route(bnb, make, tmp_path, kind, slow):
    family = make("llama_untied")
    plain, held, forms = rounded(family, tmp_path / "p", kind)
    exact = load(tmp_path / "p", dtype=torch.float32)
    assert len(forms) == 3 * 7  # each dense layer of the middle
    for path in forms:
        before, after = exact.get_submodule(path).weight, plain.get_submodule(path).weight
        right, sure = slow(before)
        assert float(sure.float().mean()) > 0.98
        assert float((after.double() - right)[sure].abs().max()) <= 1e-6 * float(before.abs().max())
        assert not torch.equal(before, after)
        assert torch.equal(held.get_submodule(path).weight, after)


def rounded_layer(layer, kind):
    weight = layer.requires_grad_(False).weight.detach()
    stored = Verbatim(tuple(weight.shape), weight.dtype, weight)
    return DequantizingLinear(layer, round_weight(stored, kind, "layer.weight", turned=False))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_bitsandbytes_own_layers_while_they_train(bnb, kind):
    torch.manual_seed(1)
    # Rows of whole blocks: of others bitsandbytes 0.50.2 itself takes wrong scales on processors with AVX-512.
    layer, inputs = nn.Linear(128, 80), torch.randn(3, 5, 128, requires_grad=True)
    if kind == "nf4":
        theirs = bnb.nn.Linear4bit(128, 80, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4")
    else:
        theirs = bnb.nn.Linear8bitLt(128, 80, has_fp16_weights=False)
    theirs.load_state_dict(layer.state_dict())
    theirs = theirs.to("cpu").train()
    ours = rounded_layer(layer, kind)
    found = [one(inputs) for one in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(one.square().sum(), inputs)[0] for one in found))


def test_bitsandbytes_own_8_bit_layer_lets_one_record_move_another(bnb):
    """This is why bitsandbytes' product is not used; if this test fails one day, the product may be used."""
    torch.manual_seed(1)
    layer, inputs = nn.Linear(64, 48), torch.randn(4, 6, 64)
    inputs[3, :, 5] *= 40  # a column of outliers in the last record alone
    theirs = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(layer.state_dict())
    theirs = theirs.to("cpu").eval()
    ours = rounded_layer(layer, "int8").eval()

    def moved(one):
        with torch.no_grad():
            return float((one(inputs)[:3] - one(inputs[:3])).norm() / one(inputs[:3]).norm())

    assert moved(theirs) > 1e-4
    assert moved(ours) < 1e-6


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.02), ("nf4", 0.2)])
def test_every_family_runs_on_what_was_vetted(bnb, family, tmp_path, kind, most):
    """Layers in stored form give the bits of plain layers with rounded weights, forwards and backwards."""
    plain, held, forms = rounded(family, tmp_path / "p", kind)
    exact = load(tmp_path / "p", dtype=torch.float32)
    assert torch.equal(family.run(plain), family.run(held))
    paths, _ = slot_paths(plain, read_manifest(tmp_path / "p").geometry)
    gradients = []
    for model in (plain, held, exact):
        trained = [p for path in paths for p in model.get_submodule(path).parameters()]
        for parameter in trained:
            parameter.requires_grad_(True)
        found = torch.autograd.grad(family.losses(model), trained, allow_unused=True)
        gradients.append(torch.cat([one.flatten() for one in found if one is not None]))
    assert torch.equal(*gradients[:2])
    if forms:
        assert 0 < float((family.run(exact) - family.run(held)).norm() / family.run(exact).norm()) < most
        assert float(torch.cosine_similarity(gradients[1], gradients[2], 0)) > 1 - most


def test_what_stays_as_it_is(bnb, make, tmp_path):
    """Slots, heads, layers in no more bits, and rows of odd length."""
    family = make("llama_untied")
    plain, _, forms = rounded(family, tmp_path / "wide", "nf4", ("narrow:0.35",))
    exact = load(tmp_path / "wide", dtype=torch.float32)
    ends = tuple(f"{path}." for path in Geometry.of(family.model, 2, 1).ends(family.model))
    assert forms
    assert not [path for path in forms if path.startswith(ends) or "lm_head" in path]
    odd = {path for path, module in exact.named_modules() if getattr(module, "in_features", 2) % 2}
    assert len(odd) == 3  # 17 channels
    assert not odd & forms.keys()
    for name, parameter in exact.named_parameters():
        if name.rpartition(".")[0] not in forms:
            assert torch.equal(parameter, plain.get_parameter(name))
    _, coded, none = rounded(family, tmp_path / "coded", "nf4", ("int4:16",))
    assert none == {}
    assert torch.equal(family.run(coded), family.run(load(tmp_path / "coded", dtype=torch.float32)))
    assert rounded(family, tmp_path / "eight", "int8", ("int8:16",))[2] == {}
    assert len(rounded(family, tmp_path / "narrowed", "nf4", ("int8:16",))[2]) == 3 * 7


def test_every_block_of_a_parallel_emulator_stays_as_it_is(bnb, make, tmp_path):
    family = make("llama_untied")
    geometry = Geometry.of(family.model, 1, 1, "parallel")
    write_package(
        family.model,
        EmulatorDesign(geometry, ("int8:16",), "verbatim"),
        Calibration(family.calibrate, family.losses),
        tmp_path,
    )
    assert may_round(load(tmp_path, dtype=torch.float32), read_manifest(tmp_path), "nf4") == frozenset()


def test_bytes(bnb, make, tmp_path):
    """4 bits and a float32 for 64 weights, 8 bits and a float32 for each output."""
    for kind in KINDS:
        _, held, forms = rounded(make("gpt2"), tmp_path / kind, kind)
        assert forms
        for path, form in forms.items():
            layer = held.get_submodule(path)
            n, out = layer.in_features * layer.out_features, layer.out_features
            assert form.size == (n // 2 + 4 * -(-n // 64) if kind == "nf4" else n + 4 * out)


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("kind", KINDS)
def test_each_engine_by_brute_force(bnb, make, tmp_path, engine, kind):
    """Each gradient equals autograd's for that example over plain layers, and moves the sum by at most the bound."""
    plain, held, _ = rounded(make("llama_untied"), tmp_path, kind)
    paths, _ = slot_paths(plain, read_manifest(tmp_path).geometry)
    spec = AdapterSpec("lora", rank=2, targets=("q_proj", "down_proj"), slots=paths)
    plain, held = adapted(plain, spec), adapted(held, spec)
    batch, rows = examples(), range(3)
    right = []
    for row in rows:
        parts = torch.autograd.grad(losses(plain, batch.select([row]))[0], list(trainable(plain).values()))
        right.append(torch.cat([part.flatten() for part in parts]))
    with ENGINES[engine](held) as opened:
        for row in rows:
            found = torch.cat([p.flatten() for p in single_gradient(held, losses, batch, opened, row).values()])
            assert float((found - right[row]).norm() / right[row].norm()) < 1e-5
    bound = float(torch.stack(right).norm(dim=1).median()) / 2
    whole = clipped(held, engine, batch, bound)
    for row in rows:
        rest = clipped(held, engine, batch.select([other for other in rows if other != row]), bound)
        assert float((whole - rest).norm()) <= bound * (1 + 1e-6)


def clipped(model, engine, batch, bound):
    with ENGINES[engine](model) as opened:
        opened.add(losses, batch, lambda norms, _: (bound * (1 - CLIP_MARGIN) / norms).clamp(max=1.0))
        return torch.cat([parameter.summed_grad.flatten() for parameter in trainable(model).values()])


def adapted(model, spec):
    model = attach(model, spec)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def examples():
    ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(4))
    return Examples(ids, (torch.arange(9) < torch.tensor([9, 4, 7])[:, None]).long())


def losses(model, batch):
    return CausalLM().losses(model, batch)


def test_the_rounded_model_is_vetted(bnb, make, tmp_path):
    """A model is honest until it is rounded: small weights beside large weights become zeros, and vetting refuses."""
    family = make("llama_untied")
    with torch.no_grad():
        layer = family.model.model.layers[3].mlp.down_proj  # 48 inputs
        sizes = torch.where(torch.arange(48) % 3 == 0, 0.3, 0.01)
        layer.weight.copy_(torch.randn(32, 48, generator=torch.Generator().manual_seed(5)).sign() * sizes)
    family.build(tmp_path)
    facts = read_manifest(tmp_path)
    vet(tmp_path, load(tmp_path, dtype=torch.float32), facts, VettingThresholds(), seed=1)
    with pytest.raises(UnsupportedModel, match=r"one_hot.*layers\.3\.mlp\.down_proj"):
        vet(tmp_path, opened(tmp_path, "nf4"), facts, VettingThresholds(), seed=1)


def test_refusals(bnb, make, tmp_path, monkeypatch):
    family = make("llama_untied")
    with torch.no_grad():
        family.model.model.layers[3].mlp.down_proj.weight[0, 0] = 1e5  # float16 ends at 65504
    family.build(tmp_path / "p")
    with pytest.raises(RangeError, match=r"weights='int8': .*layers\.3\.mlp\.down_proj"):
        opened(tmp_path / "p", "int8")
    with pytest.raises(UnknownName, match="nf4"):
        opened(tmp_path / "p", "nf5")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="kernels"):
        library()


def test_without_the_extra_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'offsite\[bitsandbytes\]'"):
        library()


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, True),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}, True),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"}, True),
        ({"load_in_8bit": True}, False),
    ],
    ids=str,
)
def test_a_checkpoint_of_the_library_is_read_as_the_library_widens_it(bnb, tmp_path, settings, exact):
    """The library's own dequantisation is the second route; for 8 bits it has a constant in place of 1 / 127."""
    torch.manual_seed(0)
    # Rows of whole blocks: with a row of 96, the library's own kernel for CPUs mixes blocks up (0.50.2).
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50)).save_pretrained(tmp_path / "plain")
    theirs = LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float16, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "packed")
    ours = read_checkpoint(tmp_path / "packed", dtype=torch.float16, kind="causal_lm")
    dense = theirs.dequantize(torch.float16).state_dict()
    assert ours.state_dict().keys() == dense.keys()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, dense[name].half(), rtol=0 if exact else 2**-10, atol=0)
    assert "widened to float16 (bitsandbytes" in packed_format(tmp_path, document(tmp_path / "packed")).sentence
