"""A site's checks of an emulator and its adapter before any training, because the site's owner did not make them.

The checks find known traps, not every possible trap: only clip and noise bound what an update can say about a record.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.adapter.layout import Layout
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.package import auxiliary_file
from offsite.emulator.package.manifest import GIVEN, Manifest
from offsite.emulator.runtime.quantized_linear import count_weights
from offsite.emulator.runtime.refresh_state import Frame
from offsite.emulator.structure.geometry import slot_paths
from offsite.emulator.vetting.activation_checks import activation_checks, forward_checks
from offsite.emulator.vetting.draws import decided
from offsite.emulator.vetting.limits import Check, Vetting, VettingThresholds, passed, report
from offsite.emulator.vetting.structure_checks import check_structure
from offsite.emulator.vetting.weight_checks import bias_checks, weight_checks


def vet(folder: Path, model: nn.Module, manifest: Manifest, limits: VettingThresholds, *, seed: int) -> Vetting:
    """Returns the report on an emulator in which no known trap was found.

    Args:
      folder: the package's folder, already verified against its manifest.
      model: the emulator as `package_reader.load` returned it, before any adapter.
      manifest: the package's manifest.
      limits: the thresholds.
      seed: seed of all random draws; the site's own secret, so that no trap can hide from the sample.

    Raises:
      UnsupportedModel: a check does not pass; the message has its number, its limit and its meaning.
    """
    blocks = check_structure(folder, model, manifest)
    auxiliary = read_auxiliary(folder, model, manifest)
    generator = torch.Generator().manual_seed(seed)
    stored = passed(chain(auxiliary_checks(auxiliary, limits), weight_checks(model, limits, generator)))
    return report([*stored, *decided(partial(activation_checks, model, manifest, blocks, limits, generator))])


def read_auxiliary(folder: Path, model: nn.Module, manifest: Manifest) -> AuxiliaryTensors:
    """Returns the auxiliary tensors of a package; they may have as many bytes as the slots' own blocks in float32.

    Args:
      folder: the package's folder, already verified against its manifest.
      model: the emulator as `package_reader.load` returned it, before any adapter.
      manifest: the package's manifest.

    Raises:
      RangeError: the tensors have more bytes.
      DigestMismatch: the file is not the announced one.
      MalformedMessage: the file is not in the safetensors format.
    """
    return auxiliary_file.read(folder, manifest, max_bytes=4 * Slots.of(model, manifest).parameters)


def auxiliary_checks(auxiliary: AuxiliaryTensors, limits: VettingThresholds) -> Iterator[Check]:
    """Yields the checks of auxiliary tensors: their values may be as large as a trained adapter's, and no larger."""
    for name, tensor in auxiliary.items():
        if tensor.is_floating_point():
            peak = float(tensor.abs().max()) if tensor.numel() else 0.0
            yield Check("given_peak", f"{GIVEN} {name}", peak, limits.adapter_peak, "one value drowns all others")


@dataclass(frozen=True)
class Slots:
    """The places where an emulator may carry an adapter.

    Attributes:
      paths: paths of the slots' blocks.
      first: path of the tower's first block, a slot or not.
      parameters: number of parameters in all slots' blocks.
    """

    paths: tuple[str, ...]
    first: str
    parameters: int

    @classmethod
    def of(cls, model: nn.Module, manifest: Manifest) -> "Slots":
        """Returns the slots of an emulator before an adapter is attached to it."""
        paths, tower = slot_paths(model, manifest.geometry)
        return cls(paths, tower[0], sum(count_weights(model.get_submodule(path)) for path in paths))


def vet_adapter(
    model: nn.Module, spec: AdapterSpec, slots: Slots, limits: VettingThresholds, places: Collection[str]
) -> Vetting:
    """Returns the report on an adapter that stays in its places and is narrow.

    Args:
      model: the emulator with the adapter attached.
      spec: spec of the adapter.
      slots: slots of the emulator.
      limits: the thresholds.
      places: paths of the modules inside of which the spec may train, from `adapter.methods.places`: its slots, and for
        some specs the head.

    Raises:
      UnsupportedModel: a check does not pass, as for `vet`.
    """
    return report(passed(_adapter_checks(model, spec, slots, limits, places)))


def vet_auxiliary(model: nn.Module, frame: Frame, limits: VettingThresholds, *, seed: int) -> Vetting:
    """Returns the report on an emulator with auxiliary tensors in it: its blocks still mix, its outputs still differ.

    Args:
      model: the emulator under its own module names, with the adapter at its start.
      frame: the package's frame.
      limits: the thresholds.
      seed: seed of the random inputs; the site's own secret.

    Raises:
      UnsupportedModel: a check does not pass, as for `vet`.
    """
    return report(_running_checks(model, frame, limits, seed))


def vet_refresh(
    model: nn.Module, frame: Frame, biases: Mapping[str, Tensor], limits: VettingThresholds, *, seed: int
) -> Vetting:
    """Returns the report on an emulator whose biases moved: their size, and that blocks mix and outputs differ.

    The checks of gradients are not repeated: they ran when the package was vetted, and depend on its matrices.

    Args:
      model: the emulator under its own module names, with the moved biases in it and the adapter at its start.
      frame: the package's frame.
      biases: moved biases, by name.
      limits: the thresholds.
      seed: seed of the random inputs; the site's own secret.

    Raises:
      UnsupportedModel: a check does not pass, as for `vet`.
    """
    stored = passed(bias_checks(biases, limits))
    return report([*stored, *_running_checks(model, frame, limits, seed)])


def _running_checks(model: nn.Module, frame: Frame, limits: VettingThresholds, seed: int) -> tuple[Check, ...]:
    running = tuple(path for path in frame.tower if path not in frame.gone)
    generator = torch.Generator().manual_seed(seed)
    return decided(partial(forward_checks, model, running, frame.tower, limits, generator))


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
