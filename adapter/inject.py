"""Putting an adapter in: peft's own modules at full names, and what is trainable afterwards."""

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
OWN = "offsite_"  # first letters of the child modules our own methods add


def refuse_second(model: nn.Module) -> None:
    """Raises UnsupportedModel where a model carries an adapter already."""
    carried = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if carried or any(name.rpartition(".")[2].startswith(OWN) for name, _ in model.named_modules()):
        raise UnsupportedModel("adapters=1, a model carries at most one; load the model again")


def task_type(model: nn.Module) -> str | None:
    """Returns peft's task name for a model's class, or None for a class it has no wrapper for."""
    return "CAUSAL_LM" if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None


# What peft warns of though it is as meant: norm tuning of every norm there is, and a bias beside a layer without one.
AS_MEANT = ("Unsupported layer type", "Detected that the base layer has no bias term")


@contextmanager
def quiet() -> Iterator[None]:
    """Silences peft's warnings of what is as meant."""
    with warnings.catch_warnings():
        for message in AS_MEANT:
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


def inject(model: nn.Module, config: PeftConfig, *, seed: int = 0) -> Any:
    """Returns peft's wrapper of the model, with its layers at exactly the config's target modules.

    peft draws initial values from the global generator, in the order of the model's modules, so that they depend on the
    seed alone whatever lies between the slots; the generator's state is put back afterwards. From 20 names on it also
    shortens the list of targets to suffixes, which would mean more modules in a full model than in an emulator whose
    middle is skipped: the full names are written back.

    Raises:
      UnsupportedModel: peft does not take one of the modules, or tunes others than were named.
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
    """Makes the parameters whose name is chosen trainable, in float32, and freezes all others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def seeded(seed: int) -> torch.Generator:
    """Returns a CPU generator that depends on the seed alone, so every party draws the same values."""
    return torch.Generator(device="cpu").manual_seed(seed)


def copy_seeded(tensors: Iterable[Any], seed: int, draw: Callable[[Any, torch.Generator], Any]) -> None:
    """Fills tensors in the order given with float32 values drawn on the CPU from one seeded generator."""
    generator = seeded(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(draw(torch.empty(tensor.shape, dtype=torch.float32), generator))
