"""Applies a manifest to the model that a configuration gives: leaves blocks out, shares weights, puts parts in."""

from collections.abc import Mapping

import torch
from torch import nn

from offsite.adapter.targets import hidden_size
from offsite.emulator.package.manifest import Manifest
from offsite.emulator.structure.identity_block import skipped
from offsite.emulator.structure.replacements import PATCH, build_module, check_fits
from offsite.errors import MalformedMessage
from offsite.task.device import device_of


def apply_manifest(model: nn.Module, manifest: Manifest, dtype: torch.dtype) -> None:
    """Turns an empty full model into the empty emulator of a manifest, in place.

    Args:
      model: the empty full model that the package's configuration gives.
      manifest: the package's manifest.
      dtype: floating dtype of the parts, which lie on the model's device.

    Raises:
      MalformedMessage: a change is outside the middle, or no compressor makes such a change.
    """
    middle = manifest.geometry.middle(model)
    _check_middle(manifest, middle)
    owners = {path.rpartition(".")[0] for path in manifest.parts if path.endswith(f".{PATCH}")}
    widths = {path: hidden_size(model.get_submodule(path)) for path in owners & manifest.skipped.keys()}
    for path, form in manifest.skipped.items():
        model.set_submodule(path, skipped(model.get_submodule(path), form))
    modules, device = dict(model.named_modules()), device_of(model)
    for path, spec in manifest.parts.items():
        owner = path.rpartition(".")[0]
        patched = owner in manifest.skipped and path == f"{owner}.{PATCH}"
        if not patched and path not in modules:
            raise MalformedMessage(f"part={path!r} stands where the model has nothing; refuse this package")
        check_fits(path, spec, None if patched else modules[path], widths.get(owner, 0))
        model.set_submodule(path, build_module(spec).to(device, dtype))
    for path, owner in manifest.shared.items():
        tie_weights(model.get_submodule(path), model.get_submodule(owner), path)


def tie_weights(block: nn.Module, owner: nn.Module, path: str) -> None:
    """Makes a block run on another block's weights: its parameters become the other's very objects.

    Args:
      block: the block to change; its own attributes stay, such as its kind of attention.
      owner: the block whose weights the changed block runs on.
      path: the changed block's path, for the message.

    Raises:
      MalformedMessage: the two blocks do not have the same parameters.
    """
    theirs, mine = dict(owner.named_modules()), dict(block.named_modules())
    for name, module in theirs.items():
        own = mine.get(name)
        if own is None or type(own) is not type(module) or own._parameters.keys() != module._parameters.keys():
            raise MalformedMessage(f"shared={path!r}: its structure is not the owner's; refuse this package")
        for leaf, parameter in module._parameters.items():
            other = own._parameters[leaf]
            if (parameter is None) != (other is None) or (
                parameter is not None and other is not None and parameter.shape != other.shape
            ):
                raise MalformedMessage(f"shared={path!r}: {name}.{leaf} has another shape; refuse this package")
            own._parameters[leaf] = parameter


def _check_middle(manifest: Manifest, middle: tuple[str, ...]) -> None:
    inside = tuple(f"{path}." for path in middle)
    for what, paths in (("skipped", manifest.skipped), ("shared", manifest.shared), ("owner", _owners(manifest))):
        if wrong := sorted(set(paths) - set(middle)):
            raise MalformedMessage(f"{what}={wrong[0]!r} is not a block of the middle; refuse this package")
    if wrong := sorted(path for path in manifest.parts if not path.startswith(inside)):
        raise MalformedMessage(f"part={wrong[0]!r} is not in a block of the middle; refuse this package")
    tangled = (manifest.shared.keys() & _owners(manifest).keys()) | (manifest.shared.keys() & manifest.skipped.keys())
    if tangled or _owners(manifest).keys() & manifest.skipped.keys():
        raise MalformedMessage("shared: an owner must be a block that has weights of its own; refuse this package")


def _owners(manifest: Manifest) -> Mapping[str, str]:
    return {owner: path for path, owner in manifest.shared.items()}
