"""The structural whitelist: exactly the modules that the configuration gives, no hooks, no file of code."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offsite.emulator.package import package_folder
from offsite.emulator.package.apply_manifest import apply_manifest
from offsite.emulator.package.manifest import CONFIG, GIVEN, WEIGHTS, Manifest
from offsite.emulator.package.stored_weight import StoredWeight
from offsite.emulator.runtime.quantized_linear import own_weights, plain_class
from offsite.emulator.structure import identity_block
from offsite.emulator.structure.from_config import empty_model
from offsite.emulator.structure.towers import find_towers
from offsite.errors import UnsupportedModel

PLAIN_FILES = frozenset((WEIGHTS, CONFIG, GIVEN, *package_folder.TOKENIZER_FILES))
_CURVED = """
    gelu gelu_10 gelu_fast gelu_new gelu_python gelu_pytorch_tanh gelu_accurate quick_gelu gated-gelu gated-relu
    gated-silu mish relu relu2 relu6 silu swish tanh laplace xielu gelu-approximate geglu geglu-approximate swiglu
"""
_ACTIVATION_KEYS = """
    hidden_act activation activation_function hidden_activation feed_forward_proj dense_act_fn classifier_activation
    mlp_hidden_act act_fn activation_fn
"""
_HOOKS = """
    _forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks _state_dict_hooks _load_state_dict_pre_hooks
    _state_dict_pre_hooks _load_state_dict_post_hooks
"""
SKIP = identity_block.__name__
ACTIVATIONS = frozenset(_CURVED.split())
ACTIVATION_KEYS, HOOKS = tuple(_ACTIVATION_KEYS.split()), tuple(_HOOKS.split())
# (part of a key, lowest, highest) for numbers in a configuration; the first part that occurs in a key counts.
NUMBERS: tuple[tuple[str, float, float], ...] = (
    ("drop", 0.0, 0.5),
    ("eps", 1e-20, 1e-2),
    ("rope_theta", 10.0, 1e9),
    ("rotary_emb_base", 10.0, 1e9),
    ("multiplier", 1e-3, 1e3),
    ("scaling", 1e-3, 1e3),
    ("softcap", 1.0, 1e4),
    ("sliding_window", 2, 2**31),
)


def check_structure(folder: Path, model: nn.Module, manifest: Manifest) -> tuple[str, ...]:
    """Returns the paths of every tower's blocks that were not left out.

    Refuses a model that is not, module for module, the model that transformers makes of the package's configuration.

    Args:
      folder: the package's folder, already verified against its manifest.
      model: the emulator as `package_reader.load` returned it, before any adapter.
      manifest: the package's manifest.

    Raises:
      UnsupportedModel: a module, parameter, buffer, hook, file or configuration value is not an honest model's.
    """
    check_files(folder, manifest)
    check_numbers(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    text = (folder / CONFIG).read_text(encoding="utf-8")
    expected = empty_model(text, manifest.auto, _dtype(model), allocated=False)
    # Towers are found before the manifest is applied: left-out or narrowed blocks are not like their neighbours.
    blocks = tuple(path for tower in find_towers(expected) for path in tower.blocks)
    apply_manifest(expected, manifest, _dtype(model))
    _check_modules(model, expected)
    _check_plain(model)
    _check_tensors(model, expected)
    return tuple(path for path in blocks if path not in manifest.skipped)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Refuses a package with a file that is not tensors, configuration or a tokenizer's data.

    Raises:
      UnsupportedModel: a file is of another kind; the message names the file.
    """
    names = {path.name for path in folder.iterdir()} | set(manifest.files)
    if other := sorted(names - PLAIN_FILES - {"manifest.json"}):
        _refuse("file", other[0], "only weights, configuration and tokenizer files may lie in a package")
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in json.loads(settings.read_text(encoding="utf-8")):
        _refuse("tokenizer_config.json key", "auto_map", "a tokenizer may not bring code")


def check_numbers(value: Any, key: str = "") -> None:
    """Refuses a configuration whose values would switch a block off or make it linear.

    Raises:
      UnsupportedModel: a value is out of range; the message names the key and the value.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            check_numbers(item, name)
    elif isinstance(value, list):
        for item in value:
            check_numbers(item, key)
    elif isinstance(value, str) and key in ACTIVATION_KEYS and value not in ACTIVATIONS:
        _refuse(f"config {key}", value, "it must be one of the usual curved activations; a linear block copies")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(key, float(value))


def _check_number(key: str, value: float) -> None:
    if not math.isfinite(value):
        _refuse(f"config {key}", value, "it must be a finite number")
    for part, lowest, highest in NUMBERS:
        if part in key:
            if not lowest <= value <= highest:
                _refuse(f"config {key}", value, f"it must lie in [{lowest:g}, {highest:g}]")
            return


def _check_modules(model: nn.Module, expected: nn.Module) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = dict(expected.named_modules(remove_duplicate=False))
    if different := sorted(modules.keys() ^ wanted.keys()):
        _refuse("module", different[0], "it is missing, or the configuration does not give it")
    for path, module in modules.items():
        kind, honest = plain_class(module), type(wanted[path])
        # Each left-out block has a class of its own; the class must come from `identity_block` and have the same base.
        left_out = honest.__module__ == SKIP and kind.__module__ == SKIP and kind.__bases__ == honest.__bases__
        if kind is not honest and not left_out:
            _refuse("module", f"{path} ({kind.__name__})", f"its class must be {honest.__name__}")


def _check_plain(model: nn.Module) -> None:
    for path, module in model.named_modules():
        hooked = [name for name in HOOKS if getattr(module, name, None)]
        replaced = [name for name in ("forward", "__call__", "_call_impl") if name in vars(module)]
        if hooked or replaced:
            _refuse("module", path or "model", f"nothing may be hooked in ({(hooked + replaced)[0]})")
        if module.training:
            _refuse("module", path or "model", "it must be in evaluation mode")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _refuse("parameter", name, "nothing is trainable before the adapter is attached")


def _check_tensors(model: nn.Module, expected: nn.Module) -> None:
    """Refuses other names, shapes or dtypes, and buffers that no file stores unless they equal the computed buffers."""
    stored = expected.state_dict().keys()
    mine, theirs = _tensors(model), _tensors(expected)
    if different := sorted(mine.keys() ^ theirs.keys()):
        _refuse("tensor", different[0], "the configuration gives another set of tensors")
    for name, tensor in mine.items():
        other = theirs[name]
        if tuple(tensor.shape) != tuple(other.shape) or tensor.dtype != other.dtype:
            _refuse("tensor", name, f"its shape must be {tuple(other.shape)} and its type {other.dtype}")
        if isinstance(tensor, StoredWeight):
            continue  # the checks of weights widen it, and pass no value that is not finite
        if name not in stored and not torch.equal(tensor.cpu(), other):
            _refuse("buffer", name, "it must be what the configuration computes")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            _refuse("tensor", name, "every value must be finite")


def _tensors(model: nn.Module) -> dict[str, Tensor | StoredWeight]:
    """Returns weights and buffers by name, also under the names that share a module or a weight."""
    modules = list(model.named_modules(remove_duplicate=False))
    weights = {f"{path}.{leaf}".lstrip("."): one for path, m in modules for leaf, one in own_weights(m).items()}
    return {**weights, **dict(model.named_buffers(remove_duplicate=False))}


def _dtype(model: nn.Module) -> torch.dtype:
    weights = (one for module in model.modules() for one in own_weights(module).values())
    dtypes = {one.dtype for one in weights if one.dtype.is_floating_point}
    if len(dtypes) != 1:
        _refuse("dtypes", sorted(map(str, dtypes)), "all parameters must share one")
    dtype: torch.dtype = dtypes.pop()
    return dtype


def _refuse(what: str, value: object, rule: str) -> None:
    raise UnsupportedModel(
        f"vetting {what}={value!r}: {rule}; do not train on this emulator, ask the coordinator for another"
    )
