"""Opens a package with frozen layers in a stored form: at any time at most one of them exists as float32."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from offsite.adapter.methods import ON_PARAMETERS, places
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.package import storage
from offsite.emulator.package.manifest import Manifest
from offsite.emulator.package.package_reader import Hold, Taker, Users
from offsite.emulator.package.stored_weight import StoredWeight
from offsite.emulator.runtime.bitsandbytes_layers import ROUNDINGS, may_round, round_weight
from offsite.emulator.runtime.quantized_linear import can_hold, held_layer, is_held
from offsite.emulator.runtime.weight_forms import WEIGHT_FORMS, WIDENED
from offsite.errors import lookup
from offsite.task.number_format import in_dtype


def holding(weights: str, spec: AdapterSpec) -> Hold | None:
    """Returns the function by which `package_reader.load` holds frozen weights in a form; None widens them all.

    Dense layers and tables of words are held that the package stores narrower than they run, together with the layers
    that share their weight. Where an adapter is built of the weights in its places, these stay wide.

    Args:
      weights: key of `WEIGHT_FORMS`; "int8" and "nf4" round dense layers of the middle, see `bitsandbytes_layers`.
      spec: spec of the adapter that will be attached.

    Raises:
      UnknownName: there is no such form.
      ConfigError: the form needs bitsandbytes, which cannot be used; see `bitsandbytes_layers.library`.
    """
    lookup(WEIGHT_FORMS, weights, "weights")
    return None if weights == WIDENED else partial(_takers, weights, spec)


def in_format(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns a loaded emulator without an adapter in another number format, in place; codes stay codes."""
    stored: dict[int, StoredWeight] = {}
    for module in model.modules():
        if is_held(module):
            narrow = stored.setdefault(id(module.stored), replace(module.stored, dtype=dtype))
            module.stored = narrow
    return in_dtype(model, dtype)


def _takers(
    weights: str, spec: AdapterSpec, model: nn.Module, manifest: Manifest, users: Mapping[str, Users]
) -> Mapping[str, Taker]:
    """Returns, by tensor, the functions that put a stored weight into the model; see `package_reader.Hold`."""
    wide = [path for path in places(model, spec) if path not in spec.slots or spec.method in ON_PARAMETERS]
    apart = {id(module) for path in wide for module in model.get_submodule(path).modules()}
    paths = {id(module): path for path, module in model.named_modules()}
    rounded = may_round(model, manifest, weights) if weights in ROUNDINGS else frozenset()
    takers: dict[str, Taker] = {}
    for name, how in manifest.storage.items():
        layers = [module for module, leaf in users[name] if leaf == "weight" and can_hold(module)]
        if not layers or len(layers) != len(users[name]) or apart & {id(layer) for layer in layers}:
            continue
        at = {paths[id(layer)]: layer for layer in layers}
        if rounded >= at.keys():
            turned = isinstance(layers[0], Conv1D)
            takers[name] = partial(_taken, model, at, partial(round_weight, weights=weights, name=name, turned=turned))
        elif _is_narrow(how, layers[0].get_parameter("weight").dtype):
            takers[name] = partial(_taken, model, at, None)
    return takers


def _taken(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    rounding: Callable[[StoredWeight], StoredWeight] | None,
    stored: StoredWeight,
) -> Callable[[], None]:
    """Returns a function that replaces layers by layers that hold one stored weight together, rounded if asked for."""
    return partial(_put, model, layers, stored if rounding is None else rounding(stored))


def _put(model: nn.Module, layers: Mapping[str, nn.Module], stored: StoredWeight) -> None:
    for path, layer in layers.items():
        model.set_submodule(path, held_layer(layer, stored))


def _is_narrow(how: str, dtype: torch.dtype) -> bool:
    """Returns whether a storage takes less memory than a weight of a dtype."""
    return not storage.is_verbatim(how) or storage.DTYPES[how].itemsize < dtype.itemsize
