"""What a site checks of an emulator and its adapter before any training, because its owner did not make them."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from emulator.activations import activation_checks
from emulator.manifest import Manifest
from emulator.structure import check_structure
from emulator.traps import weight_checks
from emulator.verdict import Check, Limits, Vetting, passed, report


def vet(folder: Path, model: nn.Module, manifest: Manifest, limits: Limits, *, seed: int) -> Vetting:
    blocks = check_structure(folder, model, manifest)
    return report(passed(measure(model, manifest, blocks, limits, seed=seed)))


def measure(model: nn.Module, manifest: Manifest, blocks: tuple[str, ...], limits: Limits, *, seed: int) -> Iterator[Check]:
    generator = torch.Generator().manual_seed(seed)
    yield from weight_checks(model, limits, generator)
    yield from activation_checks(model, manifest, blocks, limits, generator)
