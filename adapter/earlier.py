"""Reads exported bottleneck adapters of earlier jobs as auxiliary tensors of a new adapter."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from offsite.adapter.auxiliary import AuxiliaryTensors
from offsite.adapter.export import own_spec, read
from offsite.adapter.methods.bottleneck import CHILD
from offsite.adapter.methods.frozen_bottleneck import PARTS, frozen_tensor_name
from offsite.adapter.methods.task_head import wants_head
from offsite.errors import ConfigError, DataError

METHOD = "bottleneck"


def earlier_bottlenecks(folders: Sequence[Path | str], slots: Sequence[str]) -> AuxiliaryTensors:
    """Returns the tensors of exported adapters of method "bottleneck", of any rank, numbered in the order of `folders`.

    Args:
      folders: adapter folders that `export.export` wrote.
      slots: the slots of the new adapter, and of each earlier adapter.

    Raises:
      DataError: a folder or a file in it is missing, or is not an adapter.
      ConfigError: an adapter has another method, a trained head, or other slots.
      RangeError: a tensor holds NaN or Inf.
    """
    auxiliary: dict[str, Tensor] = {}
    for number, folder in enumerate(folders):
        tensors = read_bottleneck(folder, slots)
        for slot in slots:
            auxiliary |= {frozen_tensor_name(slot, number, part): tensors[f"{slot}.{CHILD}.{part}"] for part in PARTS}
    return auxiliary


def read_bottleneck(folder: Path | str, slots: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Returns the tensors of one exported adapter by name.

    Args:
      folder: an adapter folder that `export.export` wrote.
      slots: the slots that the adapter must have; None accepts any slots.

    Raises:
      DataError, ConfigError, RangeError: as for `earlier_bottlenecks`.
    """
    name = f"frozen={str(folder)!r}"
    if not Path(folder).is_dir():
        raise DataError(f"{name}: no such folder; give the adapter folder of an earlier job")
    config, tensors = read(Path(folder))
    if config.get("offsite_method") != METHOD:
        other = config.get("offsite_method", config.get("peft_type"))
        raise ConfigError(f"{name}: its method is {other!r}, must be {METHOD!r}; take another adapter")
    spec = own_spec(config)
    if wants_head(spec.options):
        raise ConfigError(
            f"{name}: the adapter has a trained head, which would be lost; take an adapter without a head"
        )
    if slots is not None and set(slots) != set(spec.slots):
        raise ConfigError(
            f"{name}: its slots are {', '.join(spec.slots)}, must be the new adapter's {', '.join(slots)}; set "
            "emulator.first and emulator.last as in the earlier job"
        )
    expected = {f"{slot}.{CHILD}.{part}" for slot in spec.slots for part in PARTS}
    if different := sorted(expected ^ tensors.keys()):
        raise DataError(f"{name}: tensor={different[0]!r} is missing or was added; export the adapter again")
    return tensors
