"""One way to attach any tuner of Hugging Face PEFT: its facts are an entry, not code."""

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

# How a start compares with the plain model's output.
SAME = "same"  # bit-identical
ROUNDED = "rounded"  # equal but for the last digits of the dtype: the same sum in another order
MOVED = "moved"  # not equal: the method has no such start at which it could also learn
DIVIDES = "divides"  # an option that must divide every target's inputs and outputs
DIVIDES_INPUTS = "divides inputs"
DIVIDES_OUTPUTS = "divides outputs"
ENTRIES = "entries"  # an option that may be at most the entries of the smallest target


@dataclass(frozen=True)
class Tuner:
    """What has to be known of a tuner of peft to attach it.

    Attributes:
      name: the key in `METHODS`.
      config: peft's configuration class.
      exact_mean: whether the mean of uploads has the mean of their effects; measured by the contract suite.
      why: why it is, or is not; a sentence for the report.
      rank: the configuration's field for the spec's rank, or "" where the method has none.
      rank_step: the rank must be a multiple of it.
      alpha: the field for the spec's alpha, or "".
      seed: the field for the spec's seed of what the method generates and freezes, or "".
      fixed: (field, value) of what must not vary.
      options: fields that a spec may set.
      fitted: (option, rule) of those whose value depends on the targets' widths. A default is the largest value up to
        the option's own default that keeps the rule; a value that a spec sets must keep it.
      conv1d: whether it takes GPT-2's transposed layers.
      shared: whether the slots share their parameters, which then have names of the first.
      start: `SAME`, `ROUNDED` or `MOVED`.
      targets: peft's default targets by model type.
      settle: what is done to a layer after peft has made it, with the name of the adapter in it.
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

        Trained is what peft itself would train. Everything drawn comes from the spec's seed.

        Raises:
          UnsupportedModel: a target is of a kind or size that peft's layer does not take; load the model again.
          ConfigError: an option is not known, out of range or does not fit the targets, or the rank does not.
        """
        values = dict(resolve(spec.options, self.options, self.name))
        defaults = default_targets(model, self.targets or ATTENTION_TARGETS)
        found = choose(in_slots(model, spec.slots, is_linear), spec, defaults)
        self._check(found, spec)
        sizes = [lengths(module) for module in found.values()]
        for option, rule in self.fitted:
            values[option] = _fit(option, rule, values[option], sizes, given=option in dict(spec.options))
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
                    f"target={name!r} is a {type(module).__name__}, {self.name} needs nn.Linear; take method 'ffa_lora'"
                )
            if self.rank and spec.rank > (width := min(lengths(module))):
                raise ConfigError(f"rank={spec.rank} is above the width {width} of {name}; lower it")
        if self.rank and spec.rank % self.rank_step:
            raise ConfigError(f"rank={spec.rank}: method {self.name!r} needs a multiple of {self.rank_step}; change it")


def _fit(name: str, rule: str, value: Scalar, sizes: Sequence[tuple[int, int]], *, given: bool) -> Scalar:
    """Returns an option's value for targets of these (inputs, outputs), as `Tuner.fitted` says.

    Raises:
      ConfigError: a value that the spec set does not keep the rule.
    """
    if rule == ENTRIES:
        best = min(int(value), *(inputs * outputs for inputs, outputs in sizes))
    else:
        both = {DIVIDES: (0, 1), DIVIDES_INPUTS: (0,), DIVIDES_OUTPUTS: (1,)}[rule]
        common = math.gcd(*(size[end] for size in sizes for end in both))
        best = max(divisor for divisor in range(1, int(value) + 1) if common % divisor == 0)
    if given and best != value:
        raise ConfigError(f"option {name}={value} does not fit the targets ({rule}); {best} does")
    return best
