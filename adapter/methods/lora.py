"""Low-rank adapters: LoRA trains both factors; FFA-LoRA trains only B, and the seed fixes A."""

import math
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS
from torch import nn

from offsite.adapter.inject import copy_seeded, inject, task_type, train_only
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import choose, default_targets, in_slots, is_linear


def attach_lora(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Adds B A alpha / rank to the targets' weights; A is drawn from the seed, B starts at zero, both are trained.

    Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    wrapped = _attach(model, spec)
    train_only(wrapped, lambda name: ".lora_A." in name or ".lora_B." in name)
    return wrapped


def attach_ffa_lora(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """As `attach_lora`, but A keeps its seeded values, so the mean of B is the mean of the effects.

    Sun et al. 2024, arXiv 2403.12313, section 3.
    """
    wrapped = _attach(model, spec)
    train_only(wrapped, lambda name: ".lora_B." in name)
    return wrapped


def _attach(model: nn.Module, spec: AdapterSpec) -> Any:
    """Returns the peft model; A is drawn in sorted order of names from peft's Kaiming uniform with a = sqrt(5)."""
    targets = choose(in_slots(model, spec.slots, is_linear), spec, default_targets(model, DEFAULTS))
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=0.0,  # a dropout mask would differ between an example alone and in its batch
        bias="none",
        target_modules=sorted(targets),
        fan_in_fan_out=any(not isinstance(module, nn.Linear) for module in targets.values()),
        task_type=task_type(model),
    )
    wrapped = inject(model, config)
    factors = {name: p for name, p in wrapped.named_parameters() if ".lora_A." in name}
    copy_seeded((factors[name] for name in sorted(factors)), spec.seed, _kaiming)
    return wrapped


def _kaiming(tensor: Any, generator: torch.Generator) -> Any:
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
