"""Puts an adapter into a model: peft's modules at exact full names, and trainable parameters."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from offsite.errors import UnsupportedModel

ADAPTER = "default"  # peft's name for a model's only adapter; part of every parameter name
OWN = "offsite_"  # prefix of the names of child modules that our own methods add


def refuse_second(model: nn.Module) -> None:
    """Raises UnsupportedModel if a model already carries an adapter."""
    carried = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if carried or any(name.rpartition(".")[2].startswith(OWN) for name, _ in model.named_modules()):
        raise UnsupportedModel("adapters=1, a model carries at most one; load the model again")


def task_type(model: nn.Module) -> str | None:
    """Returns peft's task name for a model's class, or None where peft has no wrapper for the class."""
    return "CAUSAL_LM" if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None


# peft warns about two things that are intended here: tuning norms of every class, and a bias next to a layer without
# one.
INTENDED = ("Unsupported layer type", "Detected that the base layer has no bias term")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the warnings in `INTENDED`."""
    with warnings.catch_warnings():
        for message in INTENDED:
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


def inject(model: nn.Module, config: PeftConfig, *, seed: int = 0) -> Any:
    """Returns peft's wrapper of the model, with its layers at exactly the config's target modules.

    peft draws initial values from the global generator in the order of the model's modules. The generator is seeded
    here and put back afterwards, so the values depend on the seed alone, whatever lies between the slots. With 20 names
    or more, peft shortens the list of targets to suffixes; a suffix would match more modules in a full model than in an
    emulator whose middle is skipped, so the full names are written back.

    Raises:
      UnsupportedModel: peft does not take a module, or tunes other modules than the config names.
    """
    targets = set(config.target_modules)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.random.default_generator.manual_seed(seed)
        try:
            wrapped = get_peft_model(model, config, ADAPTER)
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UnsupportedModel(f"peft refuses a target: {reason}; choose other targets or options") from error
    wrapped.peft_config[ADAPTER].target_modules = targets
    tuned = {name for name, module in wrapped.base_model.model.named_modules() if isinstance(module, BaseTunerLayer)}
    if tuned != targets:
        raise UnsupportedModel(f"target={min(tuned ^ targets)!r} is not what peft tuned; choose other targets")
    return wrapped.train(model.training)


def train_only(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    """Makes the parameters with a chosen name trainable, in float32, and freezes all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def seeded(seed: int) -> torch.Generator:
    """Returns a CPU generator whose values depend on the seed alone, so every party draws the same values."""
    return torch.Generator(device="cpu").manual_seed(seed)


def copy_seeded(tensors: Iterable[Any], seed: int, draw: Callable[[Any, torch.Generator], Any]) -> None:
    """Fills tensors, in their order, with float32 values that one seeded generator draws on the CPU."""
    generator = seeded(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(draw(torch.empty(tensor.shape, dtype=torch.float32), generator))
