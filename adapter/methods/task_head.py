"""Trains an update of a model's task head: a method of its own, and an option of every other method."""

from typing import Any

from torch import nn

from offsite.adapter.inject import train_only
from offsite.adapter.options import Option, Options
from offsite.adapter.side_modules import SIDE_MODULE, add_parallel, is_side_module, shallow_clone_at, zero_linear
from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError, UnsupportedModel

HEAD = Option("head", False)


def head_path(model: nn.Module) -> str:
    """Returns the path of a model's task head: the output embeddings, or else the last layer outside all towers.

    A tower is any `nn.ModuleList`. So classifier, score, qa_outputs and lm_head are found by structure.

    Raises:
      UnsupportedModel: the model has no head, or the head is not an `nn.Linear`.
    """
    getter = getattr(model, "get_output_embeddings", None)
    named: Any = getter() if getter is not None else None
    towers = [f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for path, module in reversed(list(model.named_modules())):
        owns = any(True for _ in module.parameters(recurse=False))
        if module is named or (named is None and owns and path and not path.startswith(tuple(towers))):
            if type(module) is not nn.Linear:
                raise UnsupportedModel(
                    f"heads=0: the last layer outside the blocks, {path!r}, is a {type(module).__name__} and not a "
                    "dense layer; leave the option head out"
                )
            return path
    raise UnsupportedModel("heads=0: the model has no dense layer outside its blocks; leave the option head out")


def attach_head(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Trains only the head: linear probing. The spec's slots stay as they are.

    Raises:
      ConfigError: the spec names targets.
      UnsupportedModel: as for `head_path`.
    """
    if spec.targets:
        raise ConfigError(f"targets={spec.targets!r}, method 'head' trains the model's head; leave targets empty")
    add_head(model, head_path(model))
    train_only(model, is_side_module)
    return model


def add_head(model: nn.Module, path: str) -> None:
    """Adds a trainable float32 dense layer, zero at the start, in parallel to the head.

    The head itself is not touched; see `side_modules.shallow_clone_at`.
    """
    holder = shallow_clone_at(model, path)
    outputs, inputs = holder.get_parameter("weight").shape
    device = holder.get_parameter("weight").device
    bias = getattr(holder, "bias", None) is not None
    add_parallel(holder, zero_linear(inputs, outputs, bias=bias, device=device))
    holder.get_submodule(SIDE_MODULE).requires_grad_(True)


def wants_head(options: Options) -> bool:
    """Whether a spec's options ask for the head to be trained as well.

    Raises:
      ConfigError: the option is not true or false.
    """
    return bool(HEAD.read(dict(options).get(HEAD.name, HEAD.default), "any"))
