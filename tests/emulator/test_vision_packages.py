"""Models that look at or make images, from a model's folder to a package and back, with the task that trains them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.middle import Calibration
from offsite.emulator.calibration.public_examples import PublicExamples
from offsite.emulator.package import package_reader
from offsite.emulator.runtime.plug_in import plug
from offsite.emulator.structure.from_config import AUTO
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.emulator.vetting.vet import vet
from tests.task import latents, pictures

CASES: dict[str, tuple[Any, Any, tuple[str, ...], list[str], Any]] = {
    name: (task, write, targets, [tower], pictures.pictures)
    for name, (task, write, targets, tower) in pictures.TASKS.items()
}
CASES |= {
    name: (task, lambda path, make=make: latents.folder(make, path), targets, [latents.TOWERS[name]], latents.latents)
    for name, (task, make, targets) in latents.TASKS.items()
}
TEXT_TOWER = ("text_model.encoder.layers", 1, 1)  # of CLIP, the smaller one
IMAGE_TOWER = ("model.vision_tower.encoder.layers", 1, 1)  # of LLaVA
SECOND = {"clip_classification": TEXT_TOWER, "image_text": IMAGE_TOWER}
LENGTH = pictures.LENGTH
RECIPES = [("skip_importance:0.5", "int4:16"), ("prune:0.25",), ("int8:16",), ("narrow:0.75",)]


class Opened:
    """A task with its full model and public examples."""

    def __init__(self, name: str, folder: Path) -> None:
        self.task, write, self.targets, (self.tower,), records = CASES[name]
        self.folder, self.records = folder, records
        folder.mkdir()
        write(folder)
        self.model = self.task.load(folder, dtype=torch.float32)
        self.batch = self.encode(folder, self.model, 6, 0)

    def encode(self, folder: Path, model: Any, count: int, seed: int) -> Any:
        return self.task.encode(
            self.task.load_processor(folder),
            self.records(count, seed),
            length=LENGTH,
            split="truncate",
            model_config=model.config,
        )

    def build(self, target: Path, recipe: tuple[str, ...], geometry: Geometry) -> Any:
        public = PublicExamples(self.task, self.batch, batch=3, gradients=4)
        calibration = Calibration(public.run, public.losses)
        return write_package(
            self.model, EmulatorDesign(geometry, recipe, "verbatim"), calibration, target, tokenizer=self.folder
        )

    def geometry(self) -> Geometry:
        return Geometry(self.tower, 1, 1)


@pytest.fixture(params=sorted(CASES))
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    return Opened(request.param, tmp_path / "model")


def test_a_package_without_compression_is_the_model_and_its_processor(opened: Opened, tmp_path: Path) -> None:
    """Losses are equal bit for bit, from the package alone: a site has nothing else."""
    manifest = opened.build(tmp_path / "p", (), opened.geometry())
    assert manifest.auto == opened.task.kind
    assert opened.task.kind in AUTO
    emulator = package_reader.load(tmp_path / "p", expected_digest=manifest.digest())
    assert vet(tmp_path / "p", emulator, manifest, VettingThresholds(), seed=1).checks
    batch = opened.encode(tmp_path / "p", emulator, 6, 0)
    with torch.no_grad():
        assert torch.equal(opened.task.losses(emulator, batch), opened.task.losses(opened.model, opened.batch))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_compressed_package_has_losses_near_the_models(
    opened: Opened, recipe: tuple[str, ...], tmp_path: Path
) -> None:
    opened.build(tmp_path / "p", recipe, opened.geometry())
    emulator = package_reader.load(tmp_path / "p")
    with torch.no_grad():
        found = opened.task.losses(emulator, opened.encode(tmp_path / "p", emulator, 6, 0))
        exact = opened.task.losses(opened.model, opened.batch)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, exact)
    assert (found - exact).abs().max() < 0.5 * exact.max()


@pytest.mark.parametrize("step", ["skip_importance:1.0", "skip_gradient:0.5"])
@pytest.mark.parametrize("name", sorted(SECOND))
def test_the_other_tower_can_be_the_one_that_is_compressed(name: str, step: str, tmp_path: Path) -> None:
    opened = Opened(name, tmp_path / "model")
    opened.tower = SECOND[name][0]
    opened.build(tmp_path / "p", (step,), opened.geometry())
    emulator = package_reader.load(tmp_path / "p")
    with torch.no_grad():
        found = opened.task.losses(emulator, opened.batch)
    assert torch.isfinite(found).all()


def test_what_an_adapter_learns_on_an_emulator_helps_the_model(opened: Opened, tmp_path: Path) -> None:
    opened.build(tmp_path / "p", ("int8:16",), opened.geometry())
    emulator = package_reader.load(tmp_path / "p")
    slots = opened.geometry().slots(emulator)
    spec = AdapterSpec(method="lora", rank=4, alpha=8.0, targets=opened.targets, slots=slots)
    tuned, full = attach(emulator, spec), attach(opened.model, spec)
    seen, unseen = (opened.encode(tmp_path / "p", tuned, count, seed) for count, seed in ((32, 1), (24, 2)))
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=2e-2)
    before = opened.task.tally(full, unseen).loss
    for step in range(24):
        optimizer.zero_grad()
        opened.task.losses(tuned, seen.select(range(8 * (step % 4), 8 * (step % 4) + 8))).mean().backward()
        optimizer.step()
    layout = Layout.of(tuned)
    plug(full, layout, layout.read(tuned))
    assert opened.task.tally(full, unseen).loss < 0.95 * before
