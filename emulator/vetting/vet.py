"""What a site checks of an emulator and its adapter before any training, because its owner did not make them.

Known traps are found, not every possible one: what an update can say about a record is bounded by clip and noise alone.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.adapter.layout import Layout
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.package import auxiliary_file
from offsite.emulator.package.manifest import GIVEN, Manifest
from offsite.emulator.runtime.refresh_state import Frame
from offsite.emulator.structure.geometry import slot_paths
from offsite.emulator.vetting.activation_checks import activation_checks, forward_checks
from offsite.emulator.vetting.limits import Check, Vetting, VettingThresholds, passed, report
from offsite.emulator.vetting.structure_checks import check_structure
from offsite.emulator.vetting.weight_checks import bias_checks, weight_checks


def vet(folder: Path, model: nn.Module, manifest: Manifest, limits: VettingThresholds, *, seed: int) -> Vetting:
    """Returns the report on an emulator in which no known trap was found.

    Args:
      folder: the package, already verified against its manifest.
      model: as `package.load` returned it, on the CPU, before any adapter.
      manifest: of the package.
      limits: the bounds.
      seed: of what is drawn; the site's own secret, so that no trap can hide from the sample.

    Raises:
      UnsupportedModel: the first check that did not pass, with its number, its limit and what it would mean.
    """
    blocks = check_structure(folder, model, manifest)
    given = read_given(folder, model, manifest)
    checks = chain(given_checks(given, limits), measure(model, manifest, blocks, limits, seed=seed))
    return report(passed(checks))


def read_given(folder: Path, model: nn.Module, manifest: Manifest) -> AuxiliaryTensors:
    """Returns the given tensors of a package, which are no more bytes than the slots' own blocks are in float32.

    Args:
      folder: the package, already verified against its manifest.
      model: as `package.load` returned it, before any adapter.
      manifest: of the package.

    Raises:
      RangeError: they are more.
      DigestMismatch, MalformedMessage: as for `given_file.read`.
    """
    return auxiliary_file.read(folder, manifest, most=4 * Slots.of(model, manifest).parameters)


def given_checks(given: AuxiliaryTensors, limits: VettingThresholds) -> Iterator[Check]:
    """Yields the checks of given tensors: as large as a trained adapter's values may be, and no larger."""
    for name, tensor in given.items():
        if tensor.is_floating_point():
            peak = float(tensor.abs().max()) if tensor.numel() else 0.0
            yield Check("given_peak", f"{GIVEN} {name}", peak, limits.adapter_peak, "one value drowns all others")


def measure(
    model: nn.Module, manifest: Manifest, blocks: tuple[str, ...], limits: VettingThresholds, *, seed: int
) -> Iterator[Check]:
    """Yields every check of weights and activations, passed or not; `blocks` as `check_structure` returns them."""
    generator = torch.Generator().manual_seed(seed)
    yield from weight_checks(model, limits, generator)
    yield from activation_checks(model, manifest, blocks, limits, generator)


@dataclass(frozen=True)
class Slots:
    """Where an emulator may carry an adapter.

    Attributes:
      paths: the slots' blocks.
      first: the first block of the tower, a slot or not.
      parameters: of all slots' blocks.
    """

    paths: tuple[str, ...]
    first: str
    parameters: int

    @classmethod
    def of(cls, model: nn.Module, manifest: Manifest) -> "Slots":
        """Returns the slots of an emulator before an adapter is attached to it."""
        paths, tower = slot_paths(model, manifest.geometry)
        sizes = (p.numel() for path in paths for p in model.get_submodule(path).parameters())
        return cls(paths, tower[0], sum(sizes))


def vet_adapter(
    model: nn.Module, spec: AdapterSpec, slots: Slots, limits: VettingThresholds, places: Collection[str]
) -> Vetting:
    """Returns the report on an adapter that stays in its places and is narrow.

    Args:
      model: the emulator with the adapter attached.
      spec: of the adapter.
      slots: of the emulator.
      limits: the bounds.
      places: modules inside of which a spec may train, `adapter.methods.places` of it: its slots, perhaps the head.

    Raises:
      UnsupportedModel: as for `vet`.
    """
    return report(passed(_adapter_checks(model, spec, slots, limits, places)))


def vet_given(model: nn.Module, frame: Frame, limits: VettingThresholds, *, seed: int) -> Vetting:
    """Returns the report on an emulator with given tensors in it: that its blocks still mix and tell apart.

    Args:
      model: the emulator under its own names, with the adapter at its start.
      frame: of the package.
      limits: the bounds.
      seed: of the inputs that are drawn; the site's own secret.

    Raises:
      UnsupportedModel: as for `vet`.
    """
    return report(passed(_running_checks(model, frame, limits, seed)))


def vet_refresh(
    model: nn.Module, frame: Frame, biases: Mapping[str, Tensor], limits: VettingThresholds, *, seed: int
) -> Vetting:
    """Returns the report on an emulator whose biases moved: their size, and that its blocks still mix and tell apart.

    What only a gradient shows was looked at when the package was vetted, and hangs on its matrices.

    Args:
      model: the emulator under its own names, with the moved biases in it and the adapter at its start.
      frame: of the package.
      biases: the moved values, by name.
      limits: the bounds.
      seed: of the inputs that are drawn; the site's own secret.

    Raises:
      UnsupportedModel: as for `vet`.
    """

    def checks() -> Iterator[Check]:
        yield from bias_checks(biases, limits)
        yield from _running_checks(model, frame, limits, seed)

    return report(passed(checks()))


def _running_checks(model: nn.Module, frame: Frame, limits: VettingThresholds, seed: int) -> Iterator[Check]:
    running = tuple(path for path in frame.tower if path not in frame.gone)
    yield from forward_checks(model, running, frame.tower, limits, torch.Generator().manual_seed(seed))


def _adapter_checks(
    model: nn.Module, spec: AdapterSpec, slots: Slots, limits: VettingThresholds, places: Collection[str]
) -> Iterator[Check]:
    strangers = [path for path in spec.slots if path not in slots.paths]
    around = tuple(f".{path}." for path in places)  # peft puts its own names before a model's
    trained = (f".{name}" for name, parameter in model.named_parameters() if parameter.requires_grad)
    strangers += [name[1:] for name in trained if not any(path in name for path in around)]
    yield Check("strange_slots", ", ".join(strangers) or "adapter", len(strangers), 0, "it reads what a slot may not")
    yield Check("rank", "adapter", spec.rank, limits.max_rank, "its gradient holds whole inputs")
    if slots.first in spec.slots:
        # What enters the first block depends on the token alone, so its gradient spans the record's tokens.
        yield Check("first_rank", slots.first, spec.rank, limits.max_first_rank, "its gradient tells tokens apart")
    share = Layout.of(model).size / max(slots.parameters, 1)
    yield Check("adapter_share", "adapter", share, limits.adapter_share, "it is wide enough for a copy")
    peak = max(float(p.detach().abs().max()) for p in model.parameters() if p.requires_grad)
    yield Check("adapter_peak", "adapter", peak, limits.adapter_peak, "one value drowns all others")
