"""The task head of a model, trained beside its frozen self: a method of its own, and an option of all others."""

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

from adapter.beside import BESIDE, add_beside, is_beside, zero_linear
from adapter.inject import train_only
from adapter.options import Option, Options
from adapter.spec import AdapterSpec
from errors import ConfigError, UnsupportedModel

HEAD = Option("head", False)


def head_path(model: nn.Module) -> str:
    """Returns the path of a model's task head: of its output embeddings, or else its last dense layer in no tower.

    A tower is any `nn.ModuleList`. So classifier, score, qa_outputs and lm_head are found by structure.

    Raises:
      UnsupportedModel: there is none, or it is no `nn.Linear`.
    """
    getter = getattr(model, "get_output_embeddings", None)
    named: Any = getter() if getter is not None else None
    towers = [f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for path, module in reversed(list(model.named_modules())):
        if module is named or (named is None and isinstance(module, nn.Linear) and not path.startswith(tuple(towers))):
            if type(module) is not nn.Linear:
                raise UnsupportedModel(
                    f"head={path!r} is a {type(module).__name__}, must be nn.Linear; leave it frozen"
                )
            return path
    raise UnsupportedModel("heads=0: the model has no dense layer outside its blocks; leave the option head out")


def attach_head(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Trains nothing but the head: linear probing. Named in the slots is where other methods would sit.

    Raises:
      ConfigError: the spec names targets, which this method has none of.
      UnsupportedModel: as for `head_path`.
    """
    if spec.targets:
        raise ConfigError(f"targets={spec.targets!r}, method 'head' trains the model's head; leave targets empty")
    add_head(model, head_path(model))
    train_only(model, is_beside)
    return model


def add_head(model: nn.Module, path: str) -> None:
    """Adds a trainable float32 dense layer, zero at the start, beside the head.

    The head and the modules around it are not touched: twins that share their parameters stand in their places. So a
    model whose own attributes and slots are put back, as `emulator.fidelity.visiting` does, is the model it was.
    """
    holder = model
    holder._modules = dict(holder._modules)
    for name in path.split("."):
        twin = _twin(holder.get_submodule(name))
        holder._modules[name] = twin
        holder = twin
    outputs, inputs = holder.get_parameter("weight").shape
    device = holder.get_parameter("weight").device
    add_beside(holder, zero_linear(inputs, outputs, bias=holder.bias is not None, device=device))
    holder.get_submodule(BESIDE).requires_grad_(True)


def _twin(module: nn.Module) -> nn.Module:
    """Returns another module with the same parameters, buffers and children, which may get hooks and children alone."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin._forward_hooks = OrderedDict(module._forward_hooks)
    return twin


def wants_head(options: Options) -> bool:
    """Whether a spec's options ask for the head to be trained as well.

    Raises:
      ConfigError: the option is not true or false.
    """
    return bool(HEAD.read(dict(options).get(HEAD.name, HEAD.default), "any"))
