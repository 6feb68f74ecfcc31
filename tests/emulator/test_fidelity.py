"""The gate: 1 for the model itself, low for an emptied one, and no trace on either model."""

import copy

import pytest
import torch
from torch.nn import functional

from offsite.adapter.methods import METHODS, attach, dummy_tensors
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.evaluation.fidelity import check_gate, gradient_cosine, visiting
from offsite.emulator.package.package_reader import load
from offsite.emulator.structure.geometry import Geometry
from offsite.errors import ConfigError, DigestMismatch, RangeError, UnsupportedModel

UNFIT = ("bitfit", "clip_adapter", "concept_tokens", "ip_adapter")
IDS = (torch.arange(66).reshape(6, 11) ** 2 * 7) % 61


def mean_loss(model, ids=IDS):
    return functional.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def in_chunks(model):
    for ids in IDS.split(2):
        yield mean_loss(model, ids) / 3


@pytest.fixture
def spec(llama):
    return AdapterSpec(slots=Geometry.of(llama.model, 1, 1).slots(llama.model))


@pytest.fixture
def emulate(llama, tmp_path):
    def emulator(*recipe, embedding="verbatim"):
        directory = tmp_path / "-".join(("p", *recipe)).replace(":", "_")
        write_package(
            llama.model,
            EmulatorDesign(Geometry.of(llama.model, 1, 1), recipe, embedding),
            Calibration(llama.calibrate),
            directory,
        )
        return load(directory)

    return emulator


def by_hand(model, spec):
    """Computes the definition by an ordinary backward pass on a copy, at the adapter's own start."""
    adapted = attach(copy.deepcopy(model), spec)
    mean_loss(adapted).backward()
    return torch.cat([p.grad.flatten().double() for _, p in sorted(adapted.named_parameters()) if p.grad is not None])


def test_identity_is_one(llama, spec, emulate):
    assert gradient_cosine(llama.model, emulate(), spec, mean_loss) == pytest.approx(1, abs=1e-12)


def test_less_is_lower(llama, spec, emulate):
    recipes = ("int8:16", "int4:16", "skip_uniform:0.5", "skip_uniform:1")
    cosines = [gradient_cosine(llama.model, emulate(recipe), spec, mean_loss) for recipe in recipes]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] > 0.99
    assert cosines[3] < 0.9


def test_ffa_lora_agrees_with_plain_backward(llama, spec, emulate):
    # the perturbation is 1e-3, so the two definitions agree to about that
    emulator = emulate("skip_uniform:0.5")
    slow = functional.cosine_similarity(by_hand(llama.model, spec), by_hand(emulator, spec), dim=0)
    assert gradient_cosine(llama.model, emulator, spec, mean_loss) == pytest.approx(float(slow), abs=5e-3)


def test_chunks_give_the_same(llama, spec, emulate):
    emulator = emulate("int4:16")
    whole, chunked = (gradient_cosine(llama.model, emulator, spec, losses) for losses in (mean_loss, in_chunks))
    assert chunked == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_leaves_both_models_as_they_were(llama, spec, emulate, method):
    spec = AdapterSpec(method=method, slots=spec.slots, targets=("q_proj", "v_proj") if method == "bitfit" else ())
    emulator = emulate("int4:16")
    given = {} if method == "bitfit" else dummy_tensors(llama.model, spec)
    models = (llama.model, emulator.train())
    llama.model.model.embed_tokens.weight.requires_grad_(True)
    before = [_picture(model) for model in models]
    try:
        assert gradient_cosine(*models, spec, mean_loss, given) > 0.5
    except UnsupportedModel:
        assert method in UNFIT  # a Llama has no biases, and is neither CLIP nor a denoiser
    for model, picture in zip(models, before, strict=True):
        now = _picture(model)
        assert now[:3] == picture[:3]
        assert all(torch.equal(now[3][name], tensor) for name, tensor in picture[3].items())
    gradient_cosine(*models, AdapterSpec(slots=spec.slots), mean_loss)


def _picture(model):
    modules = [
        (name, id(module), module.training, len(module._forward_hooks)) for name, module in model.named_modules()
    ]
    parameters = [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return modules, parameters, set(vars(model)), {name: t.clone() for name, t in model.state_dict().items()}


def test_a_failing_loss_leaves_no_trace_either(llama, spec):
    before = _picture(llama.model)
    with pytest.raises(ZeroDivisionError), visiting(llama.model, spec):
        raise ZeroDivisionError
    assert _picture(llama.model)[:3] == before[:3]


def test_global_generator_is_left_alone(llama, spec, emulate):
    emulator, state = emulate(), torch.get_rng_state()
    gradient_cosine(llama.model, emulator, spec, mean_loss)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_models(make, tmp_path):
    family = make("llama_tied", torch.bfloat16)
    geometry = Geometry.of(family.model, 1, 1)
    write_package(family.model, EmulatorDesign(geometry, ("int8:16",), "verbatim"), None, tmp_path / "p")
    spec = AdapterSpec(slots=geometry.slots(family.model))
    assert gradient_cosine(family.model, load(tmp_path / "p"), spec, mean_loss) > 0.9


def test_another_adapter_layout_is_refused(llama, make, spec):
    with pytest.raises((DigestMismatch, UnsupportedModel)):
        gradient_cosine(llama.model, make("gpt2").model, spec, mean_loss)
    wide = make("qwen3")
    wide.model.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 32)
    with pytest.raises(DigestMismatch, match="the emulator's adapter must be the full model's"):
        gradient_cosine(wide.model, llama.model, AdapterSpec(slots=spec.slots, method="norm"), mean_loss)


@pytest.mark.parametrize("factor", [0.0, torch.nan])
def test_gradients_that_say_nothing_are_refused(llama, spec, factor):
    with pytest.raises(RangeError, match="gradient_norm="):
        gradient_cosine(llama.model, llama.model, spec, lambda model: mean_loss(model) * factor)


def test_gate():
    check_gate(0.8, 0.8)
    check_gate(1.0, 0.8)
    with pytest.raises(
        ConfigError, match=r"gradient_cosine=0\.16: below the floor 0\.8.*int4 instead of skip, or int8$"
    ):
        check_gate(0.16, 0.8)
    with pytest.raises(ConfigError, match="below the floor"):
        check_gate(float("nan"), -1)
    with pytest.raises(ConfigError, match=r"floor=1\.5"):
        check_gate(1.0, 1.5)
    with pytest.raises(ConfigError, match="floor=nan"):
        check_gate(1.0, float("nan"))
