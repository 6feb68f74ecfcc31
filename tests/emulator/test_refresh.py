"""A refresh takes each block's mean error away, moves nothing else, and nothing else can be moved."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import in_slots, is_linear, leaf_names
from offsite.emulator.build.package_writer import EmulatorDesign, write_package
from offsite.emulator.calibration.draft import segment_contexts
from offsite.emulator.calibration.middle import Calibration, Middle
from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.compressors.pairs import pairs_of
from offsite.emulator.package.package_reader import load, read_manifest
from offsite.emulator.package.plan import Plan
from offsite.emulator.runtime.plug_in import plug
from offsite.emulator.runtime.refresh import plain_of, refreshed
from offsite.emulator.runtime.refresh_state import Frame, Refreshable, size_of
from offsite.emulator.structure.ends import PARALLEL
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.vetting.limits import VettingThresholds
from offsite.emulator.vetting.vet import vet_auxiliary, vet_refresh
from offsite.errors import ConfigError, MalformedMessage, RangeError, UnsupportedModel
from tests.emulator.conftest import Family

CENTRED = ("int3:16", "center")


class Opened:
    """A package with its movable biases, and the same random adapter in the emulator and in the full model."""

    def __init__(self, family: Family, folder: Path, recipe: tuple[str, ...], **more: Any) -> None:
        geometry = Geometry.of(family.model, 2, 1, **more)
        write_package(
            family.model, EmulatorDesign(geometry, recipe, "int8"), Calibration(family.calibrate, family.losses), folder
        )
        self.folder, self.manifest = folder, read_manifest(folder)
        self.frame = Frame.of(folder, self.manifest)
        self.plain = load(folder)
        self.biases = Refreshable.of(self.plain, self.manifest, self.frame)
        slots = geometry.slots(family.model)
        targets = tuple(leaf_names(in_slots(family.model, slots, is_linear)))
        spec = AdapterSpec("lora", rank=4, alpha=8.0, slots=slots, targets=targets)
        self.full = attach(copy.deepcopy(family.model), spec)
        self.emulator = attach(self.plain, spec)
        self.layout = Layout.of(self.full)
        self.start = self.layout.read(self.full)
        vector = self.start + np.random.default_rng(4).normal(size=self.layout.size, scale=0.3)
        for model in (self.full, self.emulator):
            plug(model, self.layout, vector.astype(np.float32))

    def refresh(self, family: Family) -> Any:
        return refreshed(self.full, self.emulator, self.frame, self.biases, family.calibrate)


def leaving(family: Family, model: Any, paths: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Returns the outputs of some blocks in one ordinary call, (positions, width)."""
    seen: dict[str, torch.Tensor] = {}

    def watch(path: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            seen[path] = hidden.reshape(-1, hidden.shape[-1]).double()

        return plain_of(model).get_submodule(path).register_forward_hook(hook)

    handles = [watch(path) for path in paths]
    family.run(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("shape", ["sandwich", PARALLEL])
def test_no_other_bias_would_be_better_for_its_block(llama: Family, tmp_path: Path, shape: str) -> None:
    """By brute force: the error of whole models' blocks is a parabola in each bias entry, and stands at its least."""
    opened = Opened(llama, tmp_path / "p", CENTRED, shape=shape)
    middle = opened.frame.tower[2:-1]
    target = leaving(llama, opened.full, middle)

    def errors() -> dict[str, torch.Tensor]:
        """The weighted square error of each entry of the hidden states, by block."""
        found = leaving(llama, opened.emulator, middle)
        return {
            path: ((found[path] - target[path]).square() / target[path].square().mean(1, keepdim=True)).sum(0)
            for path in middle
        }

    first = {path: float(error.sum()) for path, error in errors().items()}
    opened.refresh(llama)
    least = errors()
    assert float(least[middle[0]].sum()) < 0.95 * first[middle[0]]
    for path in middle:
        bias = opened.biases.tensors[f"{path}.mlp.down_proj.bias"]
        for step in (0.01, -0.01):
            bias.data += step
            assert bool((errors()[path] > least[path]).all()), path
            bias.data -= step


def test_a_segment_of_blocks_that_are_gone_is_aligned_to_what_leaves_them(llama: Family, tmp_path: Path) -> None:
    opened = Opened(llama, tmp_path / "p", ("skip@3", *CENTRED))
    assert list(opened.biases.tensors) == [f"model.layers.{place}.mlp.down_proj.bias" for place in (2, 4)]
    opened.refresh(llama)
    for head, end in (("model.layers.2", "model.layers.3"), ("model.layers.4", "model.layers.4")):
        target = leaving(llama, opened.full, (end,))[end]
        error = (target - leaving(llama, opened.emulator, (head,))[head]) / target.square().mean(1, keepdim=True)
        assert error.mean(0).abs().max() < 2e-3 * error.abs().mean()


def test_nothing_but_the_biases_moves_and_they_come_back(llama: Family, tmp_path: Path) -> None:
    opened = Opened(llama, tmp_path / "p", CENTRED)
    before = {name: tensor.clone() for name, tensor in opened.emulator.state_dict().items()}
    moved = opened.refresh(llama)
    changed = [name for name, tensor in opened.emulator.state_dict().items() if not torch.equal(tensor, before[name])]
    assert [name.removeprefix("base_model.model.") for name in changed] == [name for name, _ in moved]
    opened.biases.put(())
    assert all(torch.equal(tensor, before[name]) for name, tensor in opened.emulator.state_dict().items())
    opened.biases.put(moved)
    assert opened.biases.values() == moved


def test_the_same_refresh_twice_gives_the_same_bytes(llama: Family, tmp_path: Path) -> None:
    opened = Opened(llama, tmp_path / "p", CENTRED)
    first = opened.refresh(llama)
    opened.biases.put(())
    assert opened.refresh(llama) == first


def test_biases_that_were_led_astray_are_led_back(llama: Family, tmp_path: Path) -> None:
    """Adds noise to the shipped biases, so that a refresh must help."""
    opened = Opened(llama, tmp_path / "p", ("int8:16", "center"))
    expected = llama.run(opened.full)

    def apart() -> float:
        return float((llama.run(opened.emulator) - expected).norm() / expected.norm())

    near = apart()
    for bias in opened.biases.tensors.values():
        bias.data += torch.randn(bias.shape, generator=torch.Generator().manual_seed(1))
    astray = apart()
    opened.refresh(llama)
    assert apart() < 1.1 * near < 0.5 * astray


def test_both_sides_find_the_biases_that_centering_moved(family: Family, tmp_path: Path) -> None:
    """For every family, the biases that a site finds by structure are those that the build found by trial."""
    geometry = Geometry.of(family.model, 2, 1)
    middle = Middle(MemorySource(family.model), geometry, Calibration(family.calibrate, family.losses))
    try:
        contexts = list(segment_contexts(middle, Plan.whole(middle.blocks, apart=middle.apart), public=True))
        expected = sorted(f"{pairs_of(context)[-1].down}.bias" for context in contexts)
    except UnsupportedModel:
        expected = []
    recipe = ("int8:16", "center") if expected else ("int8:16",)
    opened = Opened(family, tmp_path / "p", recipe)
    assert opened.frame.tower == geometry.blocks(family.model)
    # Gemma's networks end in a norm, behind which no bias could lessen the error, so centering left no bias.
    assert list(opened.biases.tensors) == ([] if family.name == "gemma3" else expected)
    opened.refresh(family)


def test_without_a_bias_there_is_nothing_to_promise(llama: Family, tmp_path: Path) -> None:
    opened = Opened(llama, tmp_path / "p", ("int4:16",))
    with pytest.raises(ConfigError, match='add "center" behind the quantiser'):
        opened.biases.check_any(1, opened.manifest)


def test_a_refresh_is_small_or_refused(llama: Family, tmp_path: Path) -> None:
    opened = Opened(llama, tmp_path / "p", CENTRED)
    opened.biases.check_any(1, opened.manifest)
    moved = opened.refresh(llama)
    assert size_of(moved) <= 0.02 * opened.manifest.package_bytes
    assert size_of(moved) == sum(2 * bias.numel() + len(name) for name, bias in opened.biases.tensors.items())
    files = {name: replace(entry, bytes=entry.bytes // 30) for name, entry in opened.manifest.files.items()}
    with pytest.raises(ConfigError, match="of the package's bytes, but at most 2% are allowed"):
        opened.biases.check_any(1, replace(opened.manifest, files=files))


def test_what_is_not_exactly_the_biases_is_refused(llama: Family, tmp_path: Path) -> None:
    opened = Opened(llama, tmp_path / "p", CENTRED)
    honest = opened.refresh(llama)
    opened.biases.put(())
    before = opened.biases.values()
    (name, values), *rest = honest
    other = ("model.layers.0.mlp.down_proj.weight", values)
    nan = np.array([np.nan], "<f2").tobytes() + values[2:]
    for hostile, error in (
        (rest, MalformedMessage),
        ([*honest, other], MalformedMessage),
        ([other, *rest], MalformedMessage),
        ([*rest, honest[0]], MalformedMessage),
        ([honest[0], *honest], MalformedMessage),
        ([(name, values[2:]), *rest], RangeError),
        ([(name, values + b"\0\0"), *rest], RangeError),
        ([(name, b""), *rest], RangeError),
        ([*rest[:0], (name, nan), *rest], RangeError),
        ([(name, np.array([np.inf], "<f2").tobytes() + values[2:]), *rest], RangeError),
    ):
        with pytest.raises(error, match="refuse it"):
            opened.biases.put(tuple(hostile))
        assert opened.biases.values() == before


@pytest.mark.parametrize(("size", "check"), [(5e3, "weight_peak"), (9e2, "least_|growth|sureness")])
def test_a_bias_that_drowns_all_else_is_found(llama: Family, tmp_path: Path, size: float, check: str) -> None:
    opened = Opened(llama, tmp_path / "p", CENTRED)
    plug(opened.emulator, opened.layout, opened.start)
    honest = opened.biases.read(opened.biases.values())
    limits = VettingThresholds()
    assert vet_refresh(plain_of(opened.emulator), opened.frame, honest, limits, seed=3).measured > len(honest)
    moved = {name: torch.full_like(bias, size) for name, bias in honest.items()}
    for name, bias in opened.biases.tensors.items():
        bias.data.copy_(moved[name])
    with pytest.raises(UnsupportedModel, match=f"vetting ({check})"):
        vet_refresh(plain_of(opened.emulator), opened.frame, moved, limits, seed=3)


def test_an_honest_emulator_without_some_blocks_passes_with_moved_biases(llama: Family, tmp_path: Path) -> None:
    """A block that was left out hands its input on unmixed, as its recipe says; only blocks that run are looked at."""
    opened, limits = Opened(llama, tmp_path / "p", ("skip@3", *CENTRED)), VettingThresholds()
    assert opened.frame.gone == {"model.layers.3"}
    opened.refresh(llama)
    moved = opened.biases.read(opened.biases.values())
    assert any(not torch.equal(moved[name], bias) for name, bias in opened.biases.shipped.items())
    plug(opened.emulator, opened.layout, opened.start)
    plain = plain_of(opened.emulator)
    for vetting in (
        vet_refresh(plain, opened.frame, moved, limits, seed=3),
        vet_auxiliary(plain, opened.frame, limits, seed=3),
    ):
        assert all(check.passed for check in vetting.checks)
    with pytest.raises(UnsupportedModel, match="vetting "):  # as a block that runs it would be a trap
        vet_auxiliary(plain, replace(opened.frame, segments=()), limits, seed=3)
