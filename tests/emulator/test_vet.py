"""Vetting at a site: honest emulators of every family pass, every crafted one is refused by the check that names it.

A trap is built as a hostile coordinator would build it: the model is changed, packed and loaded like any other.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offsite.adapter.methods import METHODS, attach, dummy_tensors, places
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.source import ShardSource
from offsite.emulator.package.manifest import CONFIG
from offsite.emulator.package.package_reader import load, read_manifest
from offsite.emulator.structure.from_config import config_text, empty_model
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.vetting.activation_checks import Pass, gradient_checks
from offsite.emulator.vetting.limits import Check, VettingThresholds, passed, report
from offsite.emulator.vetting.structure_checks import check_numbers, check_structure
from offsite.emulator.vetting.vet import Slots, vet, vet_adapter
from offsite.errors import MalformedMessage, UnsupportedModel
from tests.emulator.conftest import BUILDERS, Family

RECIPES: tuple[tuple[str, ...], ...] = (
    (),
    ("int4:16",),
    ("skip_uniform:0.34", "int8:16"),
    ("skip_uniform:0.34", "patch", "gptq4:16"),
    ("lowrank:0.7", "center"),
    ("share:0.5", "int8:16"),
    ("prune:0.5",),
    ("prune_2_4",),
)
# A mixture's experts are one stacked tensor: there is no pair of dense layers to narrow or centre.
WITHOUT_PAIRS = {("mixtral", ("lowrank:0.7", "center"))}


def vetted(folder: Path, model: nn.Module | None = None, seed: int = 1) -> Any:
    loaded = load(folder, dtype=torch.float32) if model is None else model
    return vet(folder, loaded, read_manifest(folder), VettingThresholds(), seed=seed)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_honest_emulators_pass(make: Callable[..., Family], name: str, recipe: tuple[str, ...], tmp_path: Path) -> None:
    """Of 23 families, each as it is and under recipes with every kind of part that a manifest can name."""
    if (name, recipe) in WITHOUT_PAIRS:
        pytest.skip("this family refuses the recipe, see test_package.py")
    make(name).build(tmp_path / "p", recipe)
    found = vetted(tmp_path / "p")
    assert found.measured > 50
    assert all(check.passed for check in found.checks)


def test_a_trained_model_passes_whatever_is_drawn(fed: Path, tmp_path: Path) -> None:
    """Two thirds of its words never occurred in training, so their embeddings are alike."""
    from transformers import AutoModelForCausalLM

    full = AutoModelForCausalLM.from_pretrained(fed.parent / "model").eval()
    write_package(full, EmulatorDesign(Geometry.of(full, 1, 1), ("int4:32",), "int8"), None, tmp_path / "p")
    for seed in range(8):
        vetted(tmp_path / "p", seed=seed)


# images beside words, and a model of diffusers


def with_slots_in(family: Family, tower: str, folder: Path) -> Path:
    write_package(family.model, EmulatorDesign(Geometry(tower, 2, 1), (), "verbatim"), None, folder)
    return folder


@pytest.mark.parametrize("tower", ["text_model.encoder.layers", "vision_model.encoder.layers"])
def test_both_towers_of_a_pair_pass(make: Callable[..., Family], tower: str, tmp_path: Path) -> None:
    found = vetted(with_slots_in(make("clip"), tower, tmp_path / "p"))
    assert ("least_context" in {check.name for check in found.checks}) == tower.startswith("text")


@pytest.mark.parametrize(
    ("name", "tower", "layers"),
    [
        ("llava", "model.language_model.layers", ("v_proj", "o_proj")),
        ("clip", "text_model.encoder.layers", ("v_proj", "out_proj")),
    ],
)
def test_words_that_do_not_mix_are_refused_beside_images_too(
    make: Callable[..., Family], name: str, tower: str, layers: tuple[str, ...], tmp_path: Path
) -> None:
    family = make(name)
    with torch.no_grad():
        for block in family.model.get_submodule(tower):
            for layer in layers:
                block.self_attn.get_submodule(layer).weight.mul_(1e-3)
    with pytest.raises(UnsupportedModel, match="vetting least_context"):
        vetted(with_slots_in(family, tower, tmp_path / "p"))


def test_a_tower_that_the_output_does_not_wholly_read_is_refused(make: Callable[..., Family], tmp_path: Path) -> None:
    """LLaVA reads the inputs of its image tower's last block, so an adapter in that block would learn nothing."""
    with pytest.raises(UnsupportedModel, match=r"dead_gradients=1 at model\.vision_tower"):
        vetted(with_slots_in(make("llava"), "model.vision_tower.encoder.layers", tmp_path / "p"))


def rebuilt(document: dict[str, Any]) -> nn.Module:
    check_numbers(document)
    return empty_model(json.dumps(document), "diffusion", torch.float32)


DIFFUSION: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"_class_name": "UNet2DModel"}, UnsupportedModel, "must be DiTTransformer2DModel"),
    ({"sample_size": 1 << 20}, MalformedMessage, "positions"),
    ({"patch_size": 0}, MalformedMessage, "at least 1"),
    ({"sample_size": True}, MalformedMessage, "at least 1"),
    ({"num_layers": [6]}, MalformedMessage, "one plain value"),
    ({"num_layers": "six"}, MalformedMessage, "DiTTransformer2DModel refuses its arguments"),
    ({"norm_type": "layer_norm"}, MalformedMessage, "DiTTransformer2DModel refuses its arguments"),
    ({"num_embeds_ada_norm": 1 << 40}, MalformedMessage, "no honest model has over"),
    ({"processor": "evil"}, MalformedMessage, "no such argument"),
    ({"_name_or_path": "/home/owner"}, MalformedMessage, "no key may be one of auto_map"),
    ({"dropout": 0.99}, UnsupportedModel, "config dropout"),
    ({"norm_eps": 1e6}, UnsupportedModel, "config norm_eps"),
    ({"activation_fn": "linear"}, UnsupportedModel, "config activation_fn"),
]


@pytest.mark.parametrize(
    ("change", "error", "match"), DIFFUSION, ids=lambda one: "-".join(one) if type(one) is dict else ""
)
def test_a_configuration_of_diffusers_is_read_with_the_same_care(
    make: Callable[..., Family], change: dict[str, Any], error: type[Exception], match: str
) -> None:
    document = json.loads(config_text(make("dit").model)) | change
    with pytest.raises(error, match=match):
        rebuilt(document)


def test_a_folder_of_diffusers_is_not_read_block_by_block(make: Callable[..., Family], tmp_path: Path) -> None:
    make("dit").model.save_pretrained(tmp_path / "m")
    with pytest.raises(UnsupportedModel, match="load it with from_pretrained"):
        ShardSource(tmp_path / "m", torch.float32)


# traps in the weights


def _slot(model: Any) -> Any:
    return model.model.layers[0]


def _identity(model: Any) -> None:
    """Hands each feature of the record on as it is."""
    weight = _slot(model).self_attn.o_proj.weight
    weight.copy_(torch.eye(len(weight)))


def _permutation(model: Any) -> None:
    """The identity in disguise."""
    weight = _slot(model).self_attn.q_proj.weight
    weight.copy_(torch.eye(len(weight))[torch.randperm(len(weight), generator=torch.Generator().manual_seed(3))])


def _scaled_permutation(model: Any) -> None:
    """A permutation with signs and sizes, so that no entry is 1."""
    _permutation(model)
    weight = _slot(model).self_attn.q_proj.weight
    weight.mul_(torch.linspace(-2, 2, len(weight))[:, None])


def _bins(model: Any) -> None:
    """Every row points one way, so that rows sort records by one number (Robbing the Fed, LOKI)."""
    weight = _slot(model).mlp.up_proj.weight
    weight.copy_(weight[:1].expand_as(weight) * torch.linspace(0.5, 2, len(weight))[:, None])


def _some_bins(model: Any) -> None:
    """A tenth of the rows is enough for an attack."""
    weight = _slot(model).mlp.up_proj.weight
    count = max(len(weight) // 8, 4)
    weight[:count] = weight[:1] * torch.linspace(0.5, 2, count)[:, None]


def _latch(model: Any) -> None:
    """One row a thousand times as large keeps a single record (Privacy Backdoors)."""
    _slot(model).mlp.up_proj.weight[3] *= 1e3


def _drowned(model: Any) -> None:
    """One weight is huge."""
    model.model.layers[2].mlp.down_proj.weight[0, 0] = 1e5


def _dead_block(model: Any) -> None:
    """A block of the middle that hands its input on, without saying so (PEFTLeak)."""
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.2.{name}").weight.mul_(1e-9)


def _quiet_block(model: Any) -> None:
    """An identity block whose single weights look honest by their size, but whose outputs vanish."""
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.2.{name}").weight.mul_(2e-4)


def _saturated(model: Any) -> None:
    """Activations become a code of the input."""
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.1.{name}").weight.mul_(1e4)


def _one_hot_words(model: Any) -> None:
    """The gradient of the first layer spells the record out."""
    table = model.get_input_embeddings().weight
    table.zero_()
    table[torch.arange(len(table)), torch.arange(len(table)) % table.shape[1]] = 1.0


def _marked_word(model: Any) -> None:
    """One word drowns all others in every layer it passes."""
    model.get_input_embeddings().weight[5] *= 1e3


def _same_words(model: Any) -> None:
    """All words but one look the same, so that a record with this word is seen."""
    table = model.get_input_embeddings().weight
    table[1:] = table[1:2] * torch.linspace(0.9, 1.1, len(table) - 1)[:, None]


def _drowning_words(model: Any) -> None:
    """Embeddings so large that no block changes its input: a hidden identity."""
    model.get_input_embeddings().weight.mul_(1e5)


def _gate(model: Any) -> None:
    """A norm that lets four features pass."""
    _slot(model).input_layernorm.weight[4:] = 0.0


def _amplifier(model: Any) -> None:
    """A norm that blows one feature up."""
    _slot(model).post_attention_layernorm.weight[0] = 1e4


def _no_context(model: Any) -> None:
    """Attention is switched off in every block, so each token stands alone in its gradient."""
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.mul_(1e-3)
        layer.self_attn.o_proj.weight.mul_(1e-3)


def _sparse(model: Any) -> None:
    """Rows that read one feature each, among honest ones."""
    weight = _slot(model).mlp.gate_proj.weight
    weight[::2] = 0.0
    weight[torch.arange(0, len(weight), 2), torch.arange(0, len(weight), 2) % weight.shape[1]] = 1.0


def _sure(model: Any) -> None:
    """Outputs that are sure of noise, so that the gradient is one token's copy."""
    model.lm_head.weight.mul_(1e3)


TRAPS: dict[Callable[[Any], None], tuple[str, ...]] = {
    _identity: ("one_hot", "zeros"),
    _permutation: ("one_hot", "zeros"),
    _scaled_permutation: ("one_hot", "zeros"),
    _bins: ("crowd",),
    _some_bins: ("crowd",),
    _latch: ("outlier",),
    _drowned: ("weight_peak",),
    _dead_block: ("least_rms",),
    _quiet_block: ("least_change",),
    _saturated: ("weight_peak", "matrix_rms"),
    _one_hot_words: ("table_one_hot",),
    _marked_word: ("table_outlier",),
    _same_words: ("token_crowd",),
    _drowning_words: ("weight_peak", "table_rms"),
    _gate: ("closed_gains",),
    _amplifier: ("weight_peak", "gain"),
    _no_context: ("least_context",),
    _sparse: ("one_hot",),
    _sure: ("weight_peak", "matrix_rms", "table_rms", "sureness"),
}


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__.strip("_"))
def test_a_trap_in_the_weights_is_refused(
    make: Callable[..., Family], trap: Callable[[Any], None], tmp_path: Path
) -> None:
    family = make("llama_untied")
    with torch.no_grad():
        trap(family.model)
    family.build(tmp_path / "p")
    with pytest.raises(UnsupportedModel, match="do not train on this emulator") as refused:
        vetted(tmp_path / "p")
    assert str(refused.value).split()[1].split("=")[0] in TRAPS[trap], refused.value


# traps in the structure


@pytest.fixture
def honest(llama: Family, tmp_path: Path) -> tuple[Path, Any]:
    llama.build(tmp_path / "p", ("skip_uniform:0.34",))
    return tmp_path / "p", load(tmp_path / "p", dtype=torch.float32)


def _hook(folder: Path, model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def _replaced_forward(folder: Path, model: Any) -> None:
    model.model.layers[0].forward = lambda *a, **k: a[0]


def _other_class(folder: Path, model: Any) -> None:
    model.model.layers[0].mlp = nn.Identity()


def _more_modules(folder: Path, model: Any) -> None:
    model.model.layers[0].probe = nn.Linear(32, 32)


def _trainable(folder: Path, model: Any) -> None:
    model.lm_head.weight.requires_grad_(True)


def _training_mode(folder: Path, model: Any) -> None:
    model.model.layers[1].train()


def _not_finite(folder: Path, model: Any) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")


def _buffer(folder: Path, model: Any) -> None:
    model.model.rotary_emb.inv_freq.zero_()


def _code(folder: Path, model: Any) -> None:
    (folder / "modeling_trap.py").write_text("import os\n")


def _pickle(folder: Path, model: Any) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _linear_blocks(folder: Path, model: Any) -> None:
    _change_config(folder, hidden_act="linear")


def _huge_dropout(folder: Path, model: Any) -> None:
    _change_config(folder, attention_dropout=0.99)


def _flat_norms(folder: Path, model: Any) -> None:
    _change_config(folder, rms_norm_eps=1e6)


def _change_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


STRUCTURES = {
    _hook: "hooked in",
    _replaced_forward: "hooked in",
    _other_class: "vetting module",
    _more_modules: "vetting module",
    _trainable: "trainable before",
    _training_mode: "evaluation mode",
    _not_finite: "must be finite",
    _buffer: "vetting buffer",
    _code: "only weights, configuration and tokenizer",
    _pickle: "only weights, configuration and tokenizer",
    _linear_blocks: "a linear block copies",
    _huge_dropout: "attention_dropout",
    _flat_norms: "rms_norm_eps",
}


@pytest.mark.parametrize("trap", STRUCTURES, ids=lambda trap: trap.__name__.strip("_"))
def test_a_trap_in_the_structure_is_refused(honest: tuple[Path, Any], trap: Callable[[Path, Any], None]) -> None:
    """Most of these cannot come out of `package.load`; vetting does not rely on that."""
    folder, model = honest
    check_structure(folder, model, read_manifest(folder))
    trap(folder, model)
    with pytest.raises(UnsupportedModel, match=STRUCTURES[trap]):
        vetted(folder, model)


def test_a_slots_block_that_is_left_out_is_refused(honest: tuple[Path, Any]) -> None:
    import dataclasses

    folder, model = honest
    manifest = read_manifest(folder)
    lied = dataclasses.replace(manifest, skipped=manifest.skipped | {"model.layers.0": ("tensor",)})
    with pytest.raises(MalformedMessage, match="not a block of the middle"):
        vet(folder, model, lied, VettingThresholds(), seed=1)


# the adapter


def adapted(honest: tuple[Path, Any], **spec: Any) -> tuple[Any, AdapterSpec, Slots, tuple[str, ...]]:
    folder, model = honest
    slots = Slots.of(model, read_manifest(folder))
    chosen = AdapterSpec(**{"slots": slots.paths, "targets": ("v_proj",)} | spec)
    where = places(model, chosen)
    return attach(model, chosen, dummy_tensors(model, chosen)), chosen, slots, where


def test_a_narrow_adapter_passes(honest: tuple[Path, Any]) -> None:
    for facts in ({"rank": 2}, {"method": "ia3", "targets": ()}, {"rank": 2, "options": (("head", True),)}):
        fresh = (honest[0], load(honest[0], dtype=torch.float32))
        model, chosen, slots, where = adapted(fresh, **facts)
        vet_adapter(model, chosen, slots, VettingThresholds(adapter_share=1.0), where)


UNFIT = {"bitfit", "clip_adapter", "concept_tokens", "ip_adapter"}  # of a Llama


@pytest.mark.parametrize("method", sorted(set(METHODS) - UNFIT))
def test_every_method_trains_in_its_places_alone(honest: tuple[Path, Any], method: str) -> None:
    fresh = (honest[0], load(honest[0], dtype=torch.float32))
    model, chosen, slots, where = adapted(fresh, method=method, rank=2, targets=())
    vet_adapter(model, chosen, slots, VettingThresholds(adapter_share=20.0, adapter_peak=1e6), where)


@pytest.mark.parametrize("stranger", ["model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"])
def test_what_trains_outside_its_places_is_refused(honest: tuple[Path, Any], stranger: str) -> None:
    model, chosen, slots, where = adapted((honest[0], load(honest[0], dtype=torch.float32)), rank=2)
    found = [parameter for name, parameter in model.named_parameters() if name.endswith(stranger)]
    found[0].requires_grad_(True)
    with pytest.raises(UnsupportedModel, match="strange_slots=1"):
        vet_adapter(model, chosen, slots, VettingThresholds(adapter_share=20.0), where)


@pytest.mark.parametrize(
    ("spec", "limits", "check"),
    [
        ({"rank": 17}, VettingThresholds(), "rank=17"),
        ({"rank": 9}, VettingThresholds(), "first_rank=9"),
        ({"rank": 9}, VettingThresholds.for_owner(17, 0.25), "first_rank=9"),
        ({"slots": ("model.layers.2",), "rank": 2}, VettingThresholds(), "strange_slots=1"),
        ({"method": "lora", "targets": (), "rank": 8}, VettingThresholds(adapter_share=0.01), "adapter_share"),
    ],
)
def test_a_wide_adapter_is_refused(
    honest: tuple[Path, Any], spec: dict[str, Any], limits: VettingThresholds, check: str
) -> None:
    model, chosen, slots, where = adapted(honest, **spec)
    with pytest.raises(UnsupportedModel, match=f"vetting {check}"):
        vet_adapter(model, chosen, slots, limits, where)


def test_the_rank_of_a_later_block_may_be_higher(honest: tuple[Path, Any]) -> None:
    last = Slots.of(honest[1], read_manifest(honest[0])).paths[-1:]
    model, chosen, slots, where = adapted(honest, rank=9, slots=last)
    vet_adapter(model, chosen, slots, VettingThresholds(adapter_share=1.0), where)


# the verdict


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("least", [True, False])
def test_a_number_that_is_not_finite_never_passes(value: float, least: bool) -> None:
    check = Check("name", "where", value, 0.0, "why", least=least)
    with pytest.raises(UnsupportedModel, match="vetting name="):
        list(passed([check]))


def test_the_report_keeps_the_number_nearest_to_its_limit() -> None:
    checks = [Check("a", "x", 1.0, 10.0, ""), Check("a", "y", 9.0, 10.0, ""), Check("b", "z", 5.0, 1.0, "", least=True)]
    found = report(passed(checks))
    assert found.measured == 3
    assert {check.name: check.where for check in found.checks} == {"a": "y", "b": "z"}
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["measured"] == 3


def test_vetting_leaves_no_trace(honest: tuple[Path, Any]) -> None:
    """A vetting leaves no hook, mode or gradient behind, whether it passes or refuses."""
    folder, model = honest
    vetted(folder, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(1e-3)
    with pytest.raises(UnsupportedModel) as refused:
        vet(folder, model, read_manifest(folder), VettingThresholds(least_change=1e9), seed=1)
    assert "least_change" in str(refused.value)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.layers.0.self_attn.v_proj.weight"}


def test_hooks_of_transformers_do_not_stay(make: Callable[..., Family], tmp_path: Path) -> None:
    """LLaVA asks for hidden states, and transformers adds hooks for good: a second vetting would refuse."""
    make("llava").build(tmp_path / "p")
    model = load(tmp_path / "p")
    assert vetted(tmp_path / "p", model).to_dict() == vetted(tmp_path / "p", model).to_dict()


# checks of a single layer's inputs and gradients


def seen(**changed: torch.Tensor) -> Pass:
    draw = torch.Generator().manual_seed(2)
    both = {name: torch.randn(8, 32, 48, generator=draw) for name in ("inputs", "gradients")}
    return Pass("layer", **(both | changed))


def failed(layer: Pass) -> set[str]:
    return {check.name for check in gradient_checks([layer], VettingThresholds(), everywhere=True) if not check.passed}


def test_mixed_inputs_and_gradients_pass() -> None:
    assert failed(seen()) == set()


def test_gradients_that_copy_an_input_are_told_apart() -> None:
    one_hot = torch.eye(48)[torch.arange(8 * 32) % 48].reshape(8, 32, 48)
    assert "least_mixed_inputs" in failed(seen(inputs=one_hot))
    assert "least_mixed_gradients" in failed(seen(gradients=one_hot))
    assert "dead_gradients" in failed(seen(gradients=torch.zeros(8, 32, 48)))
    assert "dead_gradients" in failed(seen(gradients=torch.full((8, 32, 48), torch.nan)))
    loud = torch.randn(8, 32, 48, generator=torch.Generator().manual_seed(3))
    loud[:, 5] *= 1e4  # one token of each example makes up its whole gradient
    assert "token_share" in failed(seen(inputs=loud))


def test_rows_that_hold_one_token_each_are_told_from_a_loud_token() -> None:
    bins = torch.zeros(8 * 32, 48)
    bins[torch.arange(48) * 5, torch.arange(48)] = 1.0  # each row of the gradient comes from one token alone
    assert {"single_rows", "single_in_example"} <= failed(seen(gradients=bins.reshape(8, 32, 48)))
    copies = torch.zeros(8, 32, 48)
    copies[:, 3] = 1.0  # every row keeps one token of each record: few tokens, but nothing else
    assert "single_in_example" in failed(seen(gradients=copies))
    loud = seen().gradients.clone()
    loud[2, 5] *= 1e4  # an honest model does this with an odd token now and then
    assert failed(seen(gradients=loud)) == set()
