"""Attaches any tuner of Hugging Face PEFT from an entry of a table; no tuner needs code of its own."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as ATTENTION_TARGETS
from torch import nn

from offsite.adapter.inject import inject, task_type, train_only
from offsite.adapter.options import Option, Scalar, resolve
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import Found, choose, default_targets, in_slots, is_linear, lengths
from offsite.errors import ConfigError, UnsupportedModel

# How the output with a new adapter compares with the plain model's output.
SAME = "same"  # bit-identical
ROUNDED = "rounded"  # equal but for the last digits of the dtype, because the same sum has another order
MOVED = "moved"  # different: from an equal start the method could not learn
DIVIDES = "divides"  # an option that must divide every target's inputs and outputs
DIVIDES_INPUTS = "divides inputs"
DIVIDES_OUTPUTS = "divides outputs"
ENTRIES = "entries"  # an option that may be at most the entries of the smallest target


@dataclass(frozen=True)
class Tuner:
    """The facts about a tuner of peft that `attach` needs.

    Attributes:
      name: key in `METHODS`.
      config: peft's configuration class.
      exact_mean: whether the mean of uploads has exactly the mean of their effects; measured by the contract suite.
      why: reason why the mean is exact or is not, as a sentence for the report.
      rank: field of the configuration for the spec's rank, or "" for a method without a rank.
      rank_step: number >= 1 that divides every allowed rank.
      alpha: field of the configuration for the spec's alpha, or "".
      seed: field of the configuration for the seed of generated frozen values, or "".
      fixed: (field, value) pairs that no spec may change.
      options: fields of the configuration that a spec may set.
      fitted: (option, rule) pairs for options that depend on the targets' widths. A default becomes the largest value
        up to the option's own default that keeps the rule; a value that a spec sets must keep the rule.
      conv1d: whether the tuner takes GPT-2's transposed layers.
      shared: whether all slots share the same parameters, which then have the names of the first slot.
      start: `SAME`, `ROUNDED` or `MOVED`.
      targets: default targets by model type, or None for those of LoRA.
      settle: function that changes each layer after peft has made it, or None.
    """

    name: str
    config: type[PeftConfig]
    exact_mean: bool
    why: str
    rank: str = "r"
    rank_step: int = 1
    alpha: str = ""
    seed: str = ""
    fixed: tuple[tuple[str, Any], ...] = ()
    options: tuple[Option, ...] = ()
    fitted: tuple[tuple[str, str], ...] = ()
    conv1d: bool = True
    shared: bool = False
    start: str = SAME
    targets: Mapping[str, Sequence[str]] | None = None
    settle: Callable[[Any], None] | None = None

    def attach(self, model: nn.Module, spec: AdapterSpec) -> nn.Module:
        """Adds the tuner's layers at the targets inside the slots.

        The same parameters train as in peft. All random values come from the spec's seed.

        Raises:
          UnsupportedModel: peft's layer does not take the kind or size of a target; load the model again.
          ConfigError: an option is unknown, out of range or does not fit the targets, or the rank does not fit.
        """
        values = dict(resolve(spec.options, self.options, self.name))
        defaults = default_targets(model, self.targets or ATTENTION_TARGETS)
        found = choose(in_slots(model, spec.slots, is_linear), spec, defaults)
        self._check(found, spec)
        sizes = [lengths(module) for module in found.values()]
        for option, rule in self.fitted:
            values[option] = _fit(option, rule, values[option], sizes, chosen=option in dict(spec.options))
        wrapped = inject(model, self._config(model, spec, found, values), seed=spec.seed)
        trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
        train_only(wrapped, trained.__contains__)
        if self.settle is not None:
            for name in found:
                self.settle(wrapped.base_model.model.get_submodule(name))
        return wrapped

    def _config(self, model: nn.Module, spec: AdapterSpec, found: Found, values: Mapping[str, Scalar]) -> Any:
        fields = {self.rank: spec.rank, self.alpha: spec.alpha, self.seed: spec.seed % 2**32}
        own = {field: value for field, value in fields.items() if field} | dict(self.fixed) | dict(values)
        if "fan_in_fan_out" in self.config.__dataclass_fields__:
            own["fan_in_fan_out"] = any(not isinstance(module, nn.Linear) for module in found.values())
        try:
            return self.config(target_modules=sorted(found), task_type=task_type(model), **own)
        except ValueError as error:
            raise ConfigError(f"method={self.name!r}: peft refuses {error}; choose other options") from error

    def _check(self, found: Found, spec: AdapterSpec) -> None:
        for name, module in found.items():
            if not (self.conv1d or isinstance(module, nn.Linear)):
                raise UnsupportedModel(
                    f"target={name!r} is a {type(module).__name__}, must be nn.Linear for method {self.name!r}; take "
                    "method 'ffa_lora'"
                )
            if self.rank and spec.rank > (width := min(lengths(module))):
                raise ConfigError(f"rank={spec.rank} must be at most {width}, the width of {name}; lower it")
        if self.rank and spec.rank % self.rank_step:
            raise ConfigError(
                f"rank={spec.rank} must be a multiple of {self.rank_step} for method {self.name!r}; change it"
            )


def _fit(name: str, rule: str, value: Scalar, sizes: Sequence[tuple[int, int]], *, chosen: bool) -> Scalar:
    """Returns an option's value for the targets, as `Tuner.fitted` says.

    Args:
      name: name of the option.
      rule: `ENTRIES`, `DIVIDES`, `DIVIDES_INPUTS` or `DIVIDES_OUTPUTS`.
      value: value that the spec set, or the default.
      sizes: (inputs, outputs) of each target.
      chosen: whether the spec set the value.

    Raises:
      ConfigError: the value that the spec set does not keep the rule.
    """
    if rule == ENTRIES:
        best = min(int(value), *(inputs * outputs for inputs, outputs in sizes))
    else:
        both = {DIVIDES: (0, 1), DIVIDES_INPUTS: (0,), DIVIDES_OUTPUTS: (1,)}[rule]
        common = math.gcd(*(size[end] for size in sizes for end in both))
        best = max(divisor for divisor in range(1, int(value) + 1) if common % divisor == 0)
    if chosen and best != value:
        raise ConfigError(f"option {name}={value} does not fit the targets ({rule}); set it to {best}")
    return best
