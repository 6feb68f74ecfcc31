"""Writes an adapter as a directory of config, weights and README, and loads the directory into a full model."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from offsite.adapter.auxiliary import NO_AUXILIARY, AuxiliaryTensors, check_auxiliary
from offsite.adapter.inject import ADAPTER, quiet, refuse_second
from offsite.adapter.layout import Layout
from offsite.adapter.methods import METHODS, attach, required_tensors
from offsite.adapter.methods.task_head import wants_head
from offsite.adapter.model_card import class_of, model_card
from offsite.adapter.spec import AdapterSpec
from offsite.errors import (
    ConfigError,
    DataError,
    DigestMismatch,
    MalformedMessage,
    RangeError,
    UnsupportedModel,
    lookup,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
OWN_KEYS = ("base_model_name_or_path", "offsite_method", "offsite_version", "spec")
VERSION = 1
GIVEN = "given."  # in the file before the names of auxiliary tensors, which lie beside the trained tensors


def export(
    model: nn.Module, spec: AdapterSpec, directory: Path | str, *, base: str, auxiliary: AuxiliaryTensors = NO_AUXILIARY
) -> None:
    """Writes the adapter of a model: config, weights and a README on its base model, the same bytes every time.

    A method of peft is written in peft's format, frozen factors included, so that
    `PeftModel.from_pretrained(full, directory)` needs nothing else. A method of our own, or any method with a trained
    head, is written with the key `offsite_method` in its config. `load` reads both formats.

    Args:
      model: the model that `attach` returned.
      spec: the spec of the model's adapter.
      directory: the adapter folder, created if missing; its three files are overwritten.
      base: the name of the base model in the config, from `model_card.base_name`; a public name, since the file is
        meant to travel.
      auxiliary: the tensors of the call of `attach`; the export holds them, so that `load` needs nothing else.

    Raises:
      MalformedMessage: the auxiliary tensors are not exactly the tensors that the spec needs.
    """
    check_auxiliary(
        required_tensors(model, spec), auxiliary, hint="pass the tensors that the adapter was attached with"
    )
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if in_peft_format(spec):
        config, tensors = _peft_form(model, spec, base)
    else:
        config, tensors = _own_form(model, spec, base)
    tensors |= {f"{GIVEN}{name}": tensor for name, tensor in auxiliary.items()}
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in sorted(tensors.items())}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = model_card(base, method=spec.method, peft=in_peft_format(spec), here=folder.name, loader=class_of(model))
    (folder / CARD).write_text(card, encoding="utf-8")


def in_peft_format(spec: AdapterSpec) -> bool:
    """Whether the export loads with `PeftModel.from_pretrained`: the method is peft's, and no head is trained."""
    return lookup(METHODS, spec.method, "method").peft and not wants_head(spec.options)


def load(model: nn.Module, directory: Path | str, *, auxiliary: AuxiliaryTensors | None = None) -> nn.Module:
    """Attaches an exported adapter to a plain full model, in place and frozen, and returns the model to use.

    Args:
      model: the full model.
      directory: the adapter folder that `export` wrote.
      auxiliary: tensors that replace the auxiliary tensors of the export, for example from
        `earlier.earlier_bottlenecks`: a task adapter that was trained on the adapter of one language then works on the
        adapter of another (MAD-X, arXiv 2005.00052, section 3.3).

    Raises:
      DataError: a file is missing or is not an adapter.
      MalformedMessage: the auxiliary tensors are not exactly the tensors that the method takes.
      UnsupportedModel: the adapter does not fit this model.
      RangeError: a tensor holds NaN or Inf.
    """
    folder = Path(directory)
    config, tensors = read(folder)
    refuse_second(model)
    if "offsite_method" in config:
        return _load_own(model, config, tensors, auxiliary).requires_grad_(False).eval()
    if auxiliary:
        raise MalformedMessage(
            f"auxiliary tensor={min(auxiliary)!r} has no use here: an adapter of peft takes none; leave it out"
        )
    loaded: nn.Module = _load_peft(model, folder, tensors)
    return loaded.requires_grad_(False).eval()


def _peft_form(model: Any, spec: AdapterSpec, base: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if not isinstance(model, PeftModel):
        raise UnsupportedModel(
            f"method={spec.method!r} is not attached to this model; pass the model that attach returned"
        )
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True
    config.base_model_name_or_path = base
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])
    if config.task_type is None:
        inner = type(model.get_base_model())
        values["auto_mapping"] = {"base_model_class": inner.__name__, "parent_library": inner.__module__}
    # save_embedding_layers="auto" would ask the hub for the base model's config
    return values, dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def _own_form(model: Any, spec: AdapterSpec, base: str) -> tuple[dict[str, Any], dict[str, Any]]:
    names = Layout.of(model).names
    parameters = dict(model.named_parameters())
    values = (base, spec.method, VERSION, spec.to_dict())
    return dict(zip(OWN_KEYS, values, strict=True)), {name: parameters[name] for name in names}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the config and the tensors of an adapter directory, without pickles and without the network.

    Raises:
      DataError: a file is missing or is not an adapter.
      RangeError: a tensor holds NaN or Inf.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(f"adapter={str(folder)!r} has no {name}; export it again")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise DataError(f"adapter={str(folder)!r} has a damaged file; export it again") from error
    if not isinstance(config, dict) or not ({"offsite_method", "peft_type"} & set(config)):
        raise DataError(f"adapter={str(folder)!r} has a config without a method; export it again")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RangeError(f"tensor={name!r} of the adapter holds NaN or Inf; take an earlier round")
    return config, tensors


def _load_peft(model: nn.Module, folder: Path, tensors: dict[str, Any]) -> Any:
    device = str(next(model.parameters()).device)
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=False, torch_device=device)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UnsupportedModel(
            f"adapter={str(folder)!r} does not fit this model; load the base the adapter was made for"
        ) from error
    known = set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
    if known != set(tensors):
        raise UnsupportedModel(
            f"tensor={min(known ^ set(tensors))!r} is only in the adapter or only in the model; load the base the "
            "adapter was made for"
        )
    return loaded


def own_spec(config: dict[str, Any]) -> AdapterSpec:
    """Returns the spec in the config of an adapter in our own format.

    Raises:
      DataError, ConfigError: `export` did not write this config.
    """
    if sorted(config) != list(OWN_KEYS) or config["offsite_version"] != VERSION:
        raise DataError(f"adapter config keys={sorted(config)} must be {list(OWN_KEYS)}; export it again")
    spec = AdapterSpec.from_dict(config["spec"])
    if spec.method != config["offsite_method"]:
        raise ConfigError(f"offsite_method={config['offsite_method']!r} is not spec={spec.method!r}; export it again")
    return spec


def _load_own(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Any], auxiliary: AuxiliaryTensors | None
) -> nn.Module:
    spec = own_spec(config)
    stored = {name.removeprefix(GIVEN): tensors.pop(name) for name in sorted(tensors) if name.startswith(GIVEN)}
    adapted = attach(model, spec, stored if auxiliary is None else auxiliary)
    layout = Layout.of(adapted)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != dict(zip(layout.names, layout.shapes, strict=True)):
        raise DigestMismatch(
            "adapter tensors do not have the layout of this model and spec; load the base the adapter was made for"
        )
    parameters = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return adapted
