"""MiSS: one shared block of `rank` rows, added to every shard of a weight matrix."""

from peft import MissConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_MISS_TARGET_MODULES_MAPPING as DEFAULTS
from torch import nn

from offsite.adapter.inject import inject, task_type, train_only
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import choose, default_targets, in_slots, is_linear
from offsite.errors import ConfigError, UnsupportedModel


def attach_miss(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Adds a matrix of shape (rank, outputs), zero at the start, to the targets' weights, tiled over their inputs.

    Kang and Yin 2024, arXiv 2409.15371, section 3.
    """
    targets = choose(in_slots(model, spec.slots, is_linear), spec, default_targets(model, DEFAULTS))
    for name, module in targets.items():
        if not isinstance(module, nn.Linear):
            raise UnsupportedModel(
                f"target={name!r} is a {type(module).__name__}, must be nn.Linear for method 'miss'; take method "
                "'ffa_lora'"
            )
        if spec.rank > module.in_features:
            raise ConfigError(f"rank={spec.rank} must be at most {module.in_features}, the inputs of {name}; lower it")
    config = MissConfig(
        r=spec.rank, miss_dropout=0.0, bias="none", target_modules=sorted(targets), task_type=task_type(model)
    )
    wrapped = inject(model, config)
    train_only(wrapped, lambda name: ".miss_block." in name)
    return wrapped
