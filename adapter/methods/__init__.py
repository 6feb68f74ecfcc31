"""The table of adapter methods, and the functions that attach a method to a model by its spec."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from offsite.adapter.auxiliary import (
    NO_AUXILIARY,
    AuxiliarySpec,
    AuxiliaryTensors,
    RequiredTensors,
    check_auxiliary,
    dummy_tensors_for,
)
from offsite.adapter.inject import refuse_second
from offsite.adapter.method_names import check_name
from offsite.adapter.methods import blocks, clip_adapter, fed_sb, fusion, masked, soft_prompt, stacked, task_head
from offsite.adapter.methods.bottleneck import attach_bottleneck, attach_houlsby, attach_parallel
from offsite.adapter.methods.concept_tokens import attach_concept_tokens
from offsite.adapter.methods.ip_adapter import attach_ip_adapter
from offsite.adapter.methods.lora import attach_ffa_lora, attach_lora
from offsite.adapter.methods.miss import attach_miss
from offsite.adapter.methods.peft_tuner_table import TUNERS
from offsite.adapter.methods.peft_tuners import MOVED, SAME
from offsite.adapter.methods.scaling import attach_ia3
from offsite.adapter.methods.selective import attach_bitfit, attach_norm
from offsite.adapter.options import Option, resolve
from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError

Attach = Callable[[nn.Module, AdapterSpec], nn.Module]


@dataclass(frozen=True)
class Method:
    """One way to adapt a model.

    Attributes:
      name: key in `METHODS`.
      attach: function that adds the adapter inside the spec's slots; see `attach`.
      exact_mean: whether the mean of the uploaded parameters has exactly the mean of their effects on the weights.
      peft: whether the export is in the format of Hugging Face PEFT.
      why: reason why the mean is exact or is not, as a sentence for the report.
      options: the method's own options; every method also takes `task_head.HEAD`.
      start: relation of the output with a new adapter to the plain model's output: `peft_tuners.SAME` (bit-identical),
        `ROUNDED` (equal but for the last digits of the dtype) or `MOVED` (different).
      shared: whether all slots share the same parameters, which then have the names of the first slot.
      auxiliary: the method's needs of auxiliary tensors, or None; `attach` is then not called, but `auxiliary.attach`.
      task: the only task whose records hold what the method reads, or empty for a method that fits any task; no other
        method fits that task.
    """

    name: str
    attach: Attach
    exact_mean: bool
    peft: bool
    why: str
    options: tuple[Option, ...] = ()
    start: str = SAME
    shared: bool = False
    auxiliary: AuxiliarySpec | None = None
    task: str = ""


_LINES = "two trained layers with a non-linear function between them are not linear"
_OWN = (
    Method("lora", attach_lora, False, True, "the product of two means is not the mean of products B A"),
    Method("ffa_lora", attach_ffa_lora, True, True, "A is frozen and common, so the effect B A is linear in B"),
    Method("fed_sb", fed_sb.attach_fed_sb, True, False, "A and B are frozen, so the effect B R A is linear in R"),
    Method("ia3", attach_ia3, True, True, "each weight is multiplied by a scale, so the effect is linear in it"),
    Method("miss", attach_miss, True, True, "the block is added to the weights, so the effect is linear in it"),
    Method("bitfit", attach_bitfit, True, False, "biases are added, so the effect is linear in them"),
    Method("norm", attach_norm, True, True, "norm weights multiply and biases add, so the effect is linear in them"),
    Method(
        "masked", masked.attach_masked, True, False, "values are added to weights at fixed places: a linear effect",
        masked.OPTIONS, auxiliary=masked.AUXILIARY,
    ),
    Method("blocks", blocks.attach_blocks, True, False, "changes are added to the weights themselves: a linear effect"),
    Method("head", task_head.attach_head, True, False, "a change is added to the head's weight: a linear effect"),
    Method("bottleneck", attach_bottleneck, False, False, _LINES),
    Method("houlsby", attach_houlsby, False, False, _LINES),
    Method("parallel", attach_parallel, False, False, _LINES),
    Method("clip_adapter", clip_adapter.attach_clip_adapter, False, False, _LINES, clip_adapter.OPTIONS),
    Method("madx", stacked.attach_madx, False, False, _LINES, start=MOVED, auxiliary=stacked.AUXILIARY),
    Method(
        "fusion", fusion.attach_fusion, False, False, "a softmax over the adapters weighs them",
        fusion.OPTIONS, MOVED, auxiliary=fusion.AUXILIARY,
    ),
    Method(
        "soft_prompt", soft_prompt.attach_soft_prompt, False, False, "attention reads the tokens through a softmax",
        soft_prompt.OPTIONS, MOVED,
    ),
    Method(
        "concept_tokens", attach_concept_tokens, False, False, "attention reads the tokens through a softmax",
        start=MOVED,
    ),
    Method(
        "ip_adapter", attach_ip_adapter, False, False, "attention reads the keys through a softmax",
        task="image_prompt_to_image",
    ),
)  # fmt: skip
_PEFT = (Method(t.name, t.attach, t.exact_mean, True, t.why, t.options, t.start, t.shared) for t in TUNERS)
METHODS: dict[str, Method] = {method.name: method for method in (*_OWN, *_PEFT)}
# Methods that read or change the weights of their slots' layers in ways of their own, so that these must be parameters.
# All others can stand on layers that make their weight anew at each call.
ON_PARAMETERS = frozenset(("blocks", "c3a", "fed_sb", "glora", "gralora", "houlsby", "masked", "parallel"))


def known(spec: AdapterSpec) -> Method:
    """Returns the method of a spec after a check of the spec's options; needs no model.

    Raises:
      UnknownName: there is no such method.
      UnsupportedModel: the method is known but not offered; the message says why.
      ConfigError: the method has no such option, or the value of an option has the wrong type or is out of range.
    """
    check_name(spec.method)
    method = METHODS[spec.method]
    resolve(spec.options, (*method.options, task_head.HEAD), spec.method)
    return method


def check_task(name: str, task: str) -> None:
    """Refuses a method and a task where the method would not find, or not read, a part of the task's records.

    A method and a task that `Method.task` ties together fit only each other.

    Args:
      name: key in `METHODS`.
      task: key in `task.tasks.TASKS`.

    Raises:
      ConfigError: the method is tied to another task, or the task to another method.
    """
    method_of = {method.task: method.name for method in METHODS.values() if method.task}
    if METHODS[name].task not in ("", task) or method_of.get(task, name) != name:
        tied = METHODS[name].task or task
        raise ConfigError(
            f"model.task={task!r} with adapter.method={name!r}: only method {method_of[tied]!r} reads all that records "
            f"of {tied!r} hold, and it reads no other records; take both or neither"
        )


def attach(model: nn.Module, spec: AdapterSpec, auxiliary: AuxiliaryTensors = NO_AUXILIARY) -> nn.Module:
    """Adds the adapter of a spec to a model, in place, and returns the model to use from now on.

    Afterwards `requires_grad` is True exactly for the adapter's parameters. These are float32, whatever the base is,
    and depend only on the spec and on the weights and shapes of `places`. `Method.start` says how the output compares
    with the plain model's output.

    Args:
      model: a model without an adapter.
      spec: the spec of the adapter.
      auxiliary: the tensors that `required_tensors` names, on the CPU; these are never trained.

    Raises:
      MalformedMessage: the auxiliary tensors are not exactly the required tensors; see `auxiliary.check_auxiliary`.
      UnknownName: there is no such method.
      UnsupportedModel: the method is not offered, the slots lack what the method tunes, or the model carries an
        adapter.
      ConfigError: a value of the spec does not fit the method.
    """
    method = known(spec)
    refuse_second(model)
    plain, needs = _without_head(spec), method.auxiliary
    check_auxiliary(
        required_tensors(model, spec), auxiliary, hint=needs.hint if needs else f"method {method.name!r} takes none"
    )
    path = task_head.head_path(model) if task_head.wants_head(spec.options) and spec.method != "head" else ""
    wrapped = needs.attach(model, plain, auxiliary) if needs else method.attach(model, plain)
    if path:
        task_head.add_head(model, path)  # the wrapper holds the same modules
    return wrapped


def required_tensors(model: nn.Module, spec: AdapterSpec) -> RequiredTensors:
    """Returns the specs of the auxiliary tensors that `attach` needs; an empty mapping for most methods.

    Raises:
      UnknownName, UnsupportedModel, ConfigError: as for `attach`.
    """
    needs = known(spec).auxiliary
    return needs.required(model, _without_head(spec)) if needs else {}


def dummy_tensors(model: nn.Module, spec: AdapterSpec) -> AuxiliaryTensors:
    """Returns random auxiliary tensors for a trial of a method, drawn from the spec's public seed.

    The earlier adapters among the tensors get the rank of the spec.

    Raises:
      UnknownName, UnsupportedModel, ConfigError: as for `attach`.
    """
    return dummy_tensors_for(required_tensors(model, spec), free=spec.rank, seed=spec.seed)


def frozen_count(spec: AdapterSpec) -> int:
    """Returns how many earlier bottleneck adapters a spec needs as auxiliary tensors.

    Raises:
      UnknownName, UnsupportedModel, ConfigError: as for `known`.
    """
    needs = known(spec).auxiliary
    return needs.frozen_count(_without_head(spec)) if needs else 0


def needs_public_data(spec: AdapterSpec) -> bool:
    """Whether the auxiliary tensors of a spec are computed from public data."""
    return spec.method == "masked" and masked.by_fisher(_without_head(spec))


def places(model: nn.Module, spec: AdapterSpec) -> tuple[str, ...]:
    """Returns the paths of the modules that `attach` changes: the slots, and the head where the spec trains the head.

    Method "head" changes only the head; method "clip_adapter" changes CLIP's projections and not the slots.

    Args:
      model: a model without an adapter.
      spec: the spec of the adapter.

    Raises:
      UnsupportedModel: the spec needs a head or projections, and the model has none.
    """
    if spec.method == "head":
        return (task_head.head_path(model),)
    own = clip_adapter.projections(model, spec) if spec.method == "clip_adapter" else spec.slots
    return (*own, task_head.head_path(model)) if task_head.wants_head(spec.options) else own


def _without_head(spec: AdapterSpec) -> AdapterSpec:
    return replace(spec, options=tuple(option for option in spec.options if option[0] != task_head.HEAD.name))
