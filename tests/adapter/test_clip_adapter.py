"""CLIP-Adapter: the paper's formula in both projections, and a private run from a package to the full model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from offsite.adapter.export import export, load
from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach, places
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.evaluation.fidelity import gradient_cosine, visiting
from offsite.emulator.package import package_reader
from offsite.emulator.runtime.plug_in import plug
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.emulator.vetting.vet import Slots, vet_adapter
from offsite.errors import ConfigError
from offsite.privacy.probe import choose_engine
from offsite.task.clip_model import ClipClassification
from tests.contracts.test_per_example_gradients import brute_force, by_engine, examples, losses
from tests.families import IMAGES, PROMPTS, logits, spec_for, tiny
from tests.task import pictures

TASK = ClipClassification()
BOTH = (("text", True),)
TOWERS = {"vision_model.encoder.layers": 4, "text_model.encoder.layers": 3}  # -> blocks of the tiny CLIP


def moved(base, spec, scale=0.3):
    model = attach(base, spec)
    layout = Layout.of(model)
    layout.write(model, layout.read(model) + np.random.default_rng(1).normal(scale=scale, size=layout.size))
    return model


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("ratio", [0.2, 0.7])
def test_likelihoods_are_those_of_the_papers_mean_of_two_features(ratio, text):
    """a A(f) + (1 - a) f in float64, from the plain model's features of images and of prompts."""
    model = moved(tiny("clip"), spec_for("clip_adapter", "clip", rank=3, options=(("ratio", ratio), ("text", text))))
    tensors = {name: p.detach().double() for name, p in model.named_parameters()}
    plain = tiny("clip")
    with torch.no_grad():
        found = [plain.get_image_features(IMAGES), plain.get_text_features(PROMPTS)]
        scale = float(plain.logit_scale.exp())
    sides = []
    for feature, path in zip(found, ("visual_projection", "text_projection"), strict=True):
        side = feature.pooler_output.double()
        if path == "visual_projection" or text:
            down, up = (tensors[f"{path}.offsite_update.{part}.weight"] for part in ("down", "up"))
            side = ratio * (side @ down.T).clamp(min=0) @ up.T + (1 - ratio) * side
        sides.append(side / side.norm(dim=1, keepdim=True))
    expected = scale * sides[0] @ sides[1].T
    assert torch.allclose(logits(model, "clip").double(), expected, atol=1e-5)
    assert not torch.allclose(logits(plain, "clip"), logits(model, "clip"), atol=1e-2)


@pytest.mark.parametrize("text", [False, True])
def test_it_trains_its_projections_alone_and_starts_as_the_plain_model(text):
    spec = spec_for("clip_adapter", "clip", rank=3, options=(("text", text),))
    base = tiny("clip")
    inside = places(base, spec)
    assert inside == (("visual_projection", "text_projection") if text else ("visual_projection",))
    model = attach(base, spec)
    assert Layout.of(model).size == len(inside) * 2 * 24 * 3
    assert {name.partition(".offsite_update")[0] for name in Layout.of(model).names} == set(inside)
    assert torch.equal(logits(model, "clip"), logits(tiny("clip"), "clip"))


def test_a_visit_leaves_no_adapter_behind():
    base, spec = tiny("clip"), spec_for("clip_adapter", "clip", options=BOTH)
    before = [(name, id(module), len(module._forward_hooks)) for name, module in base.named_modules()]
    with visiting(base, spec) as adapted:
        assert any("offsite_update" in name for name in Layout.of(adapted).names)
    assert [(name, id(module), len(module._forward_hooks)) for name, module in base.named_modules()] == before


@pytest.mark.parametrize(("options", "engine"), [((), "bookkeeping"), (BOTH, "loop")])
@pytest.mark.parametrize("images", [2, 3])
def test_only_the_loop_tells_examples_apart_behind_the_prompts(options, engine, images):
    """A row of the text projection is a class and not an example, even with as many classes as images."""
    model = moved(tiny("clip"), spec_for("clip_adapter", "clip", options=options)).double()
    batch = examples("clip", torch.float64).select(range(images))

    def among_three(adapted, part):
        return losses(adapted, replace(part, values={**part.values, "input_ids": PROMPTS[:3]}))

    assert choose_engine(model, among_three, batch) == engine


def test_the_loop_is_exact_behind_the_prompts():
    model = moved(tiny("clip"), spec_for("clip_adapter", "clip", options=BOTH)).double()
    batch = examples("clip", torch.float64)
    assert choose_engine(model, losses, batch) == "loop"
    right = brute_force(model, batch)
    assert (by_engine(model, batch, "loop") - right).norm() < 1e-9 * right.norm()


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("options", [(), BOTH])
def test_what_is_learnt_on_an_emulator_of_either_tower_is_learnt_for_the_model(tower, options, tmp_path):
    """The adapter is packaged, vetted, trained, exported and loaded into the full model."""
    pictures.clip_folder(tmp_path)
    full, processor = TASK.load(tmp_path, dtype=torch.float32), TASK.load_processor(tmp_path)
    encode = {"length": pictures.LENGTH, "split": "truncate", "model_config": full.config}
    seen = TASK.encode(processor, pictures.pictures(32, 1), **encode)
    public, geometry = PublicExamples(TASK, seen.select(range(6)), batch=3, gradients=4), Geometry(tower, 1, 1)
    calibration = Calibration(public.run, public.losses)
    manifest = write_package(
        full, EmulatorDesign(geometry, ("int8:16",), "verbatim"), calibration, tmp_path / "p", tokenizer=tmp_path
    )
    emulator = package_reader.load(tmp_path / "p")
    for path in ("visual_projection", "text_projection"):
        assert torch.equal(emulator.get_submodule(path).weight, full.get_submodule(path).weight)
    spec = AdapterSpec("clip_adapter", rank=8, slots=geometry.slots(emulator), options=options)
    assert gradient_cosine(full, emulator, spec, public.losses) > 0.9
    inside, slots = places(emulator, spec), Slots.of(emulator, manifest)
    tuned = attach(emulator, spec)
    vet_adapter(tuned, spec, slots, VettingThresholds(adapter_share=1.0), inside)
    before = TASK.tally(full, seen).loss
    train(tuned, seen)
    export(tuned, spec, tmp_path / "a", base="owner/model")
    plugged = plug(attach(full, spec), Layout.of(tuned), Layout.of(tuned).read(tuned))
    by_file = load(TASK.load(tmp_path, dtype=torch.float32), tmp_path / "a")
    assert TASK.tally(plugged, seen).loss < 0.95 * before
    assert TASK.tally(plugged, seen).loss == pytest.approx(TASK.tally(tuned, seen).loss, rel=0.02)
    assert torch.equal(TASK.losses(by_file, seen), TASK.losses(plugged, seen))


def train(model, seen):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(24):
        optimizer.zero_grad()
        TASK.losses(model, seen.select(range(8 * (step % 4), 8 * (step % 4) + 8))).mean().backward()
        optimizer.step()


def test_targets_and_options_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="leave targets empty"):
        attach(tiny("clip"), spec_for("clip_adapter", "clip", targets=("q_proj",)))
    for options, reason in (((("ratio", 1.0),), "needs a value in 0.01..0.99"), ((("text", 1),), "of type bool")):
        with pytest.raises(ConfigError, match=reason):
            attach(tiny("clip"), spec_for("clip_adapter", "clip", options=options))
