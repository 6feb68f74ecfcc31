"""A U-net as a full model: its blocks stand apart, compressors work on it or say why not, no config is hostile."""

import json
from dataclasses import replace

import pytest
import torch

from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration, Middle
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.evaluation.fidelity import gradient_cosine
from offsite.emulator.evaluation.leak import similarity
from offsite.emulator.package import package_reader
from offsite.emulator.runtime.quantized_linear import bytes_of
from offsite.emulator.runtime.refresh_state import Frame, Refreshable
from offsite.emulator.runtime.stored_model import holding
from offsite.emulator.structure.ends import PARALLEL
from offsite.emulator.structure.from_config import empty_model
from offsite.emulator.structure.geometry import Geometry, slot_paths
from offsite.emulator.structure.towers import SCATTERED, find_towers, main_tower
from offsite.emulator.structure.unet_config import check_unet
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.emulator.vetting.vet import vet
from offsite.errors import ConfigError, MalformedMessage, OffsiteError, UnsupportedModel
from tests.task import latents

GEOMETRY = Geometry(SCATTERED, 1, 1)
# As published with Stable Diffusion 1.5.
PUBLISHED = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("unet")
    latents.folder(latents.unet, path)
    return path


@pytest.fixture(scope="module")
def task():
    return latents.TASKS["text_to_image-unet"][0]


@pytest.fixture(scope="module")
def model(folder, task):
    return task.load(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def public(folder, task, model):
    batch = task.encode(
        task.load_processor(folder), latents.latents(6, 0), length=8, split="truncate", model_config=model.config
    )
    return PublicExamples(task, batch, batch=3, gradients=4)


def build(model, public, target, recipe, *, geometry=GEOMETRY, embedding="verbatim"):
    calibration = Calibration(public.run, public.losses)
    manifest = write_package(model, EmulatorDesign(geometry, recipe, embedding), calibration, target)
    return manifest, package_reader.load(target, expected_digest=manifest.digest())


def losses(public, model):
    with torch.no_grad():
        return public.task.losses(model, public.examples)


def test_the_tower_are_the_transformer_blocks_in_the_order_in_which_they_run(model, public):
    tower = main_tower(model)
    assert tower.apart
    assert find_towers(model) == [tower]
    ran = []
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.append(path)) for path in tower.blocks
    ]
    public.task.run(model, public.examples)
    for handle in handles:
        handle.remove()
    assert tuple(ran) == tower.blocks
    assert len(ran) == 4
    assert GEOMETRY.slots(model) == (tower.blocks[0], tower.blocks[-1])
    assert slot_paths(model, GEOMETRY) == (GEOMETRY.slots(model), tower.blocks)


def test_each_block_sees_what_enters_it_in_the_full_model(model, public):
    """Against hooks on the model as it is called."""
    middle = Middle(MemorySource(model), GEOMETRY, Calibration(public.run))
    seen = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.setdefault(path, []).append(args[0])
        )
        for path in middle.tower
    ]
    public.run(model)
    for handle in handles:
        handle.remove()
    widths = set()
    for path in middle.tower:
        found = middle.stream.entering(path, [])
        assert len(found) == 2
        assert all(map(torch.equal, found, seen[path]))
        widths.add(found[0].shape[-1])
    assert widths == {16, 32}
    assert middle.skippable == middle.blocks


RECIPES = ["skip@1", "skip_uniform:0.5", "skip_importance:0.5", "skip_gradient:0.5", "narrow:0.5", "lowrank:0.5"]
RECIPES += ["refit", "patch", "center", "distill:2", "prune:0.25", "prune_2_4"]
RECIPES += ["int8:16", "int4:16", "int3:16", "gptq8:16", "gptq4:16", "gptq3:16"]


@pytest.mark.parametrize("recipe", [*((one,) for one in RECIPES), ("narrow:0.5", "gptq4:16")])
def test_every_compressor_gives_an_emulator_that_is_vetted_and_near(recipe, model, public, tmp_path):
    manifest, emulator = build(model, public, tmp_path / "p", recipe)
    assert vet(tmp_path / "p", emulator, manifest, VettingThresholds(), seed=3).checks
    exact, found = losses(public, model), losses(public, emulator)
    assert torch.isfinite(found).all()
    assert (found - exact).abs().max() < 0.3 * exact.max()
    assert len(manifest.skipped) == (1 if recipe[0].startswith("skip") else 0)


def test_weights_are_not_shared_between_blocks_of_different_widths(model, public, tmp_path):
    with pytest.raises(UnsupportedModel, match="differ in width"):
        build(model, public, tmp_path / "p", ("share:0.5",))


def test_rounding_with_care_errs_less_than_rounding_and_a_patch_less_than_nothing(model, public, tmp_path):
    """The error is that of the second block's output, for the block's inputs in the full model."""
    middle = Middle(MemorySource(model), GEOMETRY, Calibration(public.run))
    path = middle.blocks[0]
    entering = middle.stream.entering(path, [])
    wanted = torch.cat(middle.stream.run(model.get_submodule(path), path, entering))
    errors = {}
    for recipe in (("int3:16",), ("gptq3:16",), ("skip@1",), ("skip@1", "patch")):
        _, emulator = build(model, public, tmp_path / "-".join(recipe), recipe)
        found = torch.cat(middle.stream.run(emulator.get_submodule(path), path, entering))
        errors[recipe] = float((found - wanted).square().mean())
    assert errors["gptq3:16",] < errors["int3:16",]
    assert errors["skip@1", "patch"] < 0.5 * errors["skip@1",]


def test_what_stands_around_the_blocks_is_stored_as_the_tables_of_others_are(model, public, tmp_path):
    plain, _ = build(model, public, tmp_path / "plain", ("int8:16",))
    manifest, emulator = build(model, public, tmp_path / "p", ("int8:16",), embedding="int8:32")
    inside = tuple(f"{path}." for path in main_tower(model).blocks)
    around = {name for name, p in model.named_parameters() if p.dim() >= 2 and not name.startswith(inside)}
    rounded = {name for name, how in manifest.storage.items() if how == "int8:32"}
    assert {"conv_in.weight", "mid_block.resnets.0.conv1.weight", "time_embedding.linear_1.weight"} <= rounded <= around
    assert sum(model.get_parameter(name).numel() for name in around - rounded) < 0.01 * sum(
        model.get_parameter(name).numel() for name in around
    )
    assert manifest.package_bytes < 0.5 * plain.package_bytes  # the weights are float32
    assert vet(tmp_path / "p", emulator, manifest, VettingThresholds(), seed=3).checks
    exact = losses(public, model)
    assert (losses(public, emulator) - exact).abs().max() < 0.05 * exact.max()
    for name, tensor in model.state_dict().items():
        if name.startswith((inside[0], inside[-1])):
            assert torch.equal(emulator.state_dict()[name], tensor)


def test_a_parallel_emulator_carries_adapters_in_every_block(model, public, tmp_path):
    geometry = replace(GEOMETRY, first=0, last=0, shape=PARALLEL)
    manifest, emulator = build(model, public, tmp_path / "p", ("gptq4:16", "center"), geometry=geometry)
    assert slot_paths(emulator, geometry)[0] == main_tower(model).blocks
    assert vet(tmp_path / "p", emulator, manifest, VettingThresholds(), seed=3).checks


def test_held_as_stored_it_computes_the_same(model, public, tmp_path):
    _, emulator = build(model, public, tmp_path / "p", ("int8:16",))
    spec = AdapterSpec("lora", rank=4, targets=latents.LEAVES, slots=GEOMETRY.slots(model))
    held = package_reader.load(tmp_path / "p", hold=holding("stored", spec))
    assert bytes_of(held) < bytes_of(emulator)
    assert torch.equal(losses(public, held), losses(public, emulator))


def test_gate_and_likeness_tell_a_near_emulator_from_a_far_one(model, public, tmp_path):
    middle = Middle(MemorySource(model), GEOMETRY, Calibration(public.run))
    spec = AdapterSpec("lora", rank=4, alpha=8.0, targets=latents.LEAVES, slots=GEOMETRY.slots(model))
    cosines, alike = [], []
    for recipe in ((), ("int3:16",), ("skip_uniform:1.0",)):
        _, emulator = build(model, public, tmp_path / ("p" + "".join(recipe)), recipe)
        cosines.append(gradient_cosine(model, emulator, spec, public.losses))
        alike.append(min(similarity(middle, emulator).values()))
    assert cosines[0] == pytest.approx(1)
    assert alike[0] == pytest.approx(1)
    assert cosines[0] > cosines[1] > cosines[2]
    assert alike[0] > alike[1] > alike[2]


def test_between_rounds_nothing_is_aligned(model, public, tmp_path):
    manifest, emulator = build(model, public, tmp_path / "p", ("int8:16", "center"))
    frame = Frame.of(tmp_path / "p", manifest)
    with pytest.raises(ConfigError, match=r"set emulator\.refresh = 0"):
        Refreshable.of(emulator, manifest, frame).check_any(1, manifest)


def test_the_published_configurations_are_known():
    check_unet(PUBLISHED)
    second = {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True, "cross_attention_dim": 1024}
    check_unet({**PUBLISHED, **second, "dual_cross_attention": False, "num_class_embeds": None, "sample_size": 96})


STRANGE = [
    {"addition_embed_type": "text_time"},  # Stable Diffusion XL, whose inputs include sizes
    {"class_embed_type": "timestep"},
    {"encoder_hid_dim_type": "image_proj"},
    {"only_cross_attention": True},
    {"only_cross_attention": [True, False, True, False]},
    {"mid_block_scale_factor": True},
    {"mid_block_scale_factor": 1e30},
    {"conv_in_kernel": 99},
    {"time_embedding_dim": 1 << 30},
    {"attention_type": "gated"},
]
HOSTILE = [
    {"block_out_channels": [1 << 20] * 4},
    {"block_out_channels": [320] * 1000},
    {"block_out_channels": 320},
    {"block_out_channels": [320, [640], 1280, 1280]},
    {"block_out_channels": []},
    {"block_out_channels": [320, 640]},
    {"layers_per_block": 10**9},
    {"layers_per_block": [2, 2, 2]},
    {"layers_per_block": True},
    {"transformer_layers_per_block": [[1, 1], [1, 1], [1, 1], [1, 1]]},
    {"transformer_layers_per_block": 10**6},
    {"cross_attention_dim": [768, 768, 768, 768]},
    {"cross_attention_dim": 1 << 26},
    {"attention_head_dim": 0},
    {"attention_head_dim": {"a": 1}},
    {"sample_size": [64, 64]},
    {"sample_size": 257},
    {"sample_size": 256, "block_out_channels": [2048, 2048, 2048, 2048]},
    {"sample_size": None},
    {"down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"]},
    {"down_block_types": "CrossAttnDownBlock2D"},
    {"mid_block_type": None},
    {"up_block_types": [1, 2, 3, 4]},
    {"dropout": 0.9},
    {"dropout": float("nan")},
    {"norm_eps": 1.0},
    {"act_fn": "relu"},
    {"in_channels": 4.0},
]


@pytest.mark.parametrize(
    ("changes", "error"),
    [(one, UnsupportedModel) for one in STRANGE] + [(one, MalformedMessage) for one in HOSTILE],
    ids=str,
)
def test_a_configuration_of_another_kind_or_size_is_refused_before_anything_is_made(changes, error):
    with pytest.raises(error, match="config "):
        check_unet({**PUBLISHED, **changes})


@pytest.mark.parametrize(
    "changes", [{"norm_num_groups": 7}, {"attention_head_dim": 5}, {"no_such": 1}, {"dropout": []}]
)
def test_what_the_class_refuses_is_one_line(changes, folder):
    document = {**json.loads((folder / "config.json").read_text()), **changes}
    with pytest.raises(OffsiteError, match="refuse"):
        empty_model(
            json.dumps({key: one for key, one in document.items() if key != "_name_or_path"}),
            "diffusion",
            torch.float32,
        )
