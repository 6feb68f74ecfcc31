"""The table of adapter methods."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from adapter.bottleneck import attach_bottleneck
from adapter.inject import refuse_second
from adapter.lora import attach_ffa_lora, attach_lora
from adapter.miss import attach_miss
from adapter.scaling import attach_ia3
from adapter.selective import attach_bitfit, attach_norm
from adapter.spec import AdapterSpec
from errors import lookup

Attach = Callable[[nn.Module, AdapterSpec], nn.Module]


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
      name: the key in `METHODS`.
      attach: adds the adapter inside the spec's slots; see `attach`.
      exact_mean: whether the mean of uploaded parameters has the mean of their effects on the weights.
      peft: whether the export is in Hugging Face PEFT's format.
      why: why the mean is exact, or is not; a sentence for the report.
    """

    name: str
    attach: Attach
    exact_mean: bool
    peft: bool
    why: str


_TABLE = (
    Method("lora", attach_lora, False, True, "the product of two means is not the mean of products B A"),
    Method("ffa_lora", attach_ffa_lora, True, True, "A is frozen and common, so the effect B A is linear in B"),
    Method("ia3", attach_ia3, True, True, "each weight is multiplied by a scale, so the effect is linear in it"),
    Method("miss", attach_miss, True, True, "the block is added to the weights, so the effect is linear in it"),
    Method("bitfit", attach_bitfit, True, False, "biases are added, so the effect is linear in them"),
    Method("norm", attach_norm, True, True, "norm weights multiply and biases add, so the effect is linear in them"),
    Method("bottleneck", attach_bottleneck, False, False, "two trained layers with a GELU between are not linear"),
)
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}


def attach(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Adds the adapter of a spec to a model, in place, and returns the model to use from now on.

    Afterwards `requires_grad` is True exactly for the adapter's parameters, which are float32 whatever the base is;
    they depend on nothing but the spec and the slots' shapes, and the output is bit-identical to the plain model's.

    Raises:
      UnknownName: no such method.
      UnsupportedModel: the slots lack what the method tunes, or the model carries an adapter already.
      ConfigError: a value of the spec does not fit the method.
    """
    method = lookup(METHODS, spec.method, "method")
    refuse_second(model)
    return method.attach(model, spec)
