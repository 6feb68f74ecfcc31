"""From a model to a configuration that names no code, and back to an empty model of the same structure."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.initialization import no_init_weights

from offsite.emulator.structure import denoisers
from offsite.errors import DataError, MalformedMessage, UnsupportedModel, lookup
from offsite.task.kinds import KINDS
from offsite.task.packed_format import packed_format

# A package names its kind of model by one of these keys; no name from a file is ever imported.
AUTO: dict[str, Any] = {**KINDS, "diffusion": denoisers.AutoDiffusion}
# Keys of a configuration that make transformers fetch or run something (remote code, kernels, quantisers), or that
# show where the owner keeps the model.
UNSAFE = ("auto_map", "attn_implementation", "experts_implementation", "quantization_config", "name_or_path")
MAX_MODULES = 100_000  # the largest models, of hundreds of experts in each block, have some tens of thousands
_HARMLESS = ("theta", "window", "seed")  # no table is as long as these numbers
MAX_ENTRIES = 1 << 26  # the longest positions are some ten millions, the largest vocabularies a million


def config_text(model: nn.Module) -> str:
    """Returns the configuration of a model as JSON, without anything that names code or a path.

    Raises:
      UnsupportedModel: the model has no configuration of transformers or diffusers, or is quantised already.
    """
    config: Any = getattr(model, "config", None)
    known = denoisers.is_diffusion(model) or hasattr(config, "to_diff_dict")
    if not known or getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            f"model={type(model).__name__}: it needs a transformers configuration and plain weights; load it from a "
            "Hugging Face folder with safetensors weights, not quantised"
        )
    if denoisers.is_diffusion(model):
        return _text(denoisers.to_document(model))
    return _text(json.loads(config.to_json_string(use_diff=True)))


def own_config_text(folder: Path) -> str:
    """Returns the configuration of a model's own folder, as `config_text` does for a loaded model.

    Raises:
      DataError: the folder has no readable configuration.
      UnsupportedModel: the model is of an unknown type, of diffusers, or quantised.
    """
    path = folder / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if denoisers.CLASS in document:
            raise UnsupportedModel(
                f"model={str(folder)!r}: a model of diffusers uses parts of its blocks from outside, so it cannot be "
                "read block by block; load it with from_pretrained and build from that"
            )
        config = CONFIG_MAPPING[document["model_type"]].from_dict(_without_unsafe(document))
    except (OSError, ValueError) as error:
        raise DataError(f"path={str(path)!r}: cannot be read ({error}); give a model folder") from error
    except (KeyError, TypeError) as error:
        raise UnsupportedModel(
            f"path={str(path)!r}: transformers does not know its model_type; update transformers"
        ) from error
    packed_format(folder, document)  # refuses what is not read here; the weights are widened, so the model is plain
    config.architectures = document.get("architectures")
    return _text(json.loads(config.to_json_string(use_diff=True)))


def kind_of(text: str) -> str:
    """Returns the key of `AUTO` under which transformers knows the class that a configuration names.

    Raises:
      UnsupportedModel: no entry of `AUTO` knows the class.
    """
    config = _parse_config(text)
    wanted = (config.architectures or [""])[0]
    for auto, kind in AUTO.items():
        known = kind._model_mapping.get(type(config), ())
        if wanted in [model.__name__ for model in (known if isinstance(known, tuple) else (known,))]:
            return auto
    raise UnsupportedModel(f"architectures={config.architectures!r}: not one of {', '.join(AUTO)}; use another model")


def empty_model(text: str, auto: str, dtype: torch.dtype, *, allocated: bool = True) -> nn.Module:
    """Returns a model of a configuration, its parameters not filled, weights tied, in evaluation mode.

    Memory that is not written is not used: the empty model costs almost nothing until the weights are copied in.

    Args:
      text: configuration as JSON.
      auto: key of `AUTO`.
      dtype: floating dtype of the parameters.
      allocated: whether the parameters have memory; False puts them on the meta device. Buffers are computed either
        way.

    Raises:
      MalformedMessage: the configuration does not parse, names code, is of an unknown model type, or asks for a model
        larger than any honest one.
      UnknownName: the key is not in `AUTO`.
    """
    kind = lookup(AUTO, auto, "auto")
    config = _parse_config(text)
    with no_init_weights(), _module_limit(MAX_MODULES), nullcontext() if allocated else _meta_parameters():
        model: nn.Module = kind.from_config(config, dtype=dtype, trust_remote_code=False)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()  # the context above turns tying off together with initialisation
        model.config.use_cache = False
    return model.requires_grad_(False).eval()


def find_auto(model: nn.Module, text: str, dtype: torch.dtype) -> tuple[str, nn.Module]:
    """Returns the key of `AUTO` that rebuilds a model's class, and the empty model of that key.

    Raises:
      UnsupportedModel: no key gives this class, or the empty model differs from the model in names, shapes, dtypes,
        tied weights or values that no file stores.
    """
    for auto in AUTO:
        try:
            empty = empty_model(text, auto, dtype)
        except ValueError:  # this auto class has no model for the configuration
            continue
        if type(empty) is type(model):
            _check_same(model, empty)
            return auto, empty
    raise UnsupportedModel(
        f"model={type(model).__name__}: no auto class builds it from its configuration; "
        f"load it through one of {', '.join(AUTO)}"
    )


def tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the earlier name of every tensor that is the very same object as an earlier one, by the later name.

    Args:
      tensors: tensors of `state_dict(keep_vars=True)`, by name; the values are the parameters themselves.
    """
    first: dict[int, str] = {}
    earlier = {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    return {name: other for name, other in earlier.items() if name != other}


def _check_same(model: nn.Module, empty: nn.Module) -> None:
    mine, other = (m.state_dict(keep_vars=True) for m in (model, empty))
    different = [name for name in mine if name not in other or _facts(mine[name]) != _facts(other[name])]
    different += [name for name in other if name not in mine]
    different += sorted(name for name, _ in tied_names(mine).items() ^ tied_names(other).items())
    # Buffers that are not stored (rotary frequencies) are computed from the configuration; both must be equal.
    computed = dict(empty.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in mine and not (name in computed and _equal(buffer.cpu(), computed[name])):
            different.append(name)
    if different:
        raise UnsupportedModel(
            f"tensor={different[0]}: the model's configuration does not rebuild it alike ({len(different)} differ); "
            "load the model with from_pretrained in one dtype and do not change it before building"
        )


def _equal(left: Tensor, right: Tensor) -> bool:
    return _facts(left) == _facts(right) and torch.equal(left, right)


def _facts(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _parse_config(text: str) -> Any:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"config.json: not JSON ({error}); build the package again") from error
    if not isinstance(document, dict) or document != _without_unsafe(document):
        raise MalformedMessage(f"config.json: no key may be one of {', '.join(UNSAFE)}; refuse this package")
    if denoisers.CLASS in document:
        _check_numbers(document)
        return denoisers.parse(document)
    if document.get("model_type") not in CONFIG_MAPPING:
        raise MalformedMessage(
            f"model_type={document.get('model_type')!r} is not known to the installed transformers; update transformers"
        )
    _check_numbers(document)
    return CONFIG_MAPPING[document["model_type"]].from_dict(document)


@contextmanager
def _module_limit(modules: int) -> Iterator[None]:
    """Stops the build of a model that registers more modules than a limit, before millions of blocks are built."""
    left = modules

    def count(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise MalformedMessage(f"config.json asks for over {modules} modules; refuse this package")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        raise MalformedMessage("config.json asks for more memory than there is; refuse this package") from error
    finally:
        handle.remove()


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Puts every parameter that this thread registers on the meta device; one that is registered twice stays one."""
    mine, made = threading.get_ident(), dict[int, tuple[nn.Parameter, nn.Parameter]]()

    def empty(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != mine or parameter.is_meta:
            return None
        if id(parameter) not in made:  # the original is held as well, since the id of a dead one is given again
            made[id(parameter)] = parameter, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        return made[id(parameter)][1]

    handle = register_module_parameter_registration_hook(empty)
    try:
        yield
    finally:
        handle.remove()


def _check_numbers(value: Any, key: str = "") -> None:
    """Refuses whole numbers that would make transformers compute huge tables before a tensor is compared."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_numbers(item, name)
    elif isinstance(value, list):
        for item in value:
            _check_numbers(item, key)
    elif type(value) is int and abs(value) > MAX_ENTRIES and not any(part in key for part in _HARMLESS):
        raise MalformedMessage(f"config {key}={value}: no honest model has over {MAX_ENTRIES}; refuse this package")


def _text(document: dict[str, Any]) -> str:
    return json.dumps(_without_unsafe(document), indent=2, sort_keys=True) + "\n"


def _without_unsafe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_unsafe(v) for key, v in value.items() if not key.lstrip("_").startswith(UNSAFE)}
    return [_without_unsafe(v) for v in value] if isinstance(value, list) else value
