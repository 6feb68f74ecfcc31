"""The table of adapter methods."""

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
from offsite.adapter.methods import blocks, clip_adapter, fed_sb, fusion, masked, soft_prompt, stacked, task_head
from offsite.adapter.methods.bottleneck import attach_bottleneck, attach_houlsby, attach_parallel
from offsite.adapter.methods.concept_tokens import attach_concept_tokens
from offsite.adapter.methods.ip_adapter import attach_ip_adapter
from offsite.adapter.methods.lora import attach_ffa_lora, attach_lora
from offsite.adapter.methods.miss import attach_miss
from offsite.adapter.methods.peft_tuner_table import TUNERS
from offsite.adapter.methods.peft_tuners import MOVED, SAME
from offsite.adapter.methods.refused import REFUSED
from offsite.adapter.methods.scaling import attach_ia3
from offsite.adapter.methods.selective import attach_bitfit, attach_norm
from offsite.adapter.options import Option, resolve
from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError, UnsupportedModel, lookup

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
      options: the scalars of its own; every method also takes `adapter.head.HEAD`.
      start: how the output with the new adapter compares with the plain model's: `adapter.tuners.SAME`, bit-identical,
        `ROUNDED`, but for the last digits of the dtype, or `MOVED`.
      shared: whether the slots share their parameters, which then have names of the first.
      takes: what it says of given tensors, where it takes some; `attach` is then `takes.attach`.
      task: the one whose records it alone looks at, and all of whose records it needs; empty where any will do.
    """

    name: str
    attach: Attach
    exact_mean: bool
    peft: bool
    why: str
    options: tuple[Option, ...] = ()
    start: str = SAME
    shared: bool = False
    takes: AuxiliarySpec | None = None
    task: str = ""


_LINES = "two trained layers with a non-linear function between are not linear"
_OWN = (
    Method("lora", attach_lora, False, True, "the product of two means is not the mean of products B A"),
    Method("ffa_lora", attach_ffa_lora, True, True, "A is frozen and common, so the effect B A is linear in B"),
    Method("fed_sb", fed_sb.attach_fed_sb, True, False, "A and B are frozen, so the effect B R A is linear in R"),
    Method("ia3", attach_ia3, True, True, "each weight is multiplied by a scale, so the effect is linear in it"),
    Method("miss", attach_miss, True, True, "the block is added to the weights, so the effect is linear in it"),
    Method("bitfit", attach_bitfit, True, False, "biases are added, so the effect is linear in them"),
    Method("norm", attach_norm, True, True, "norm weights multiply and biases add, so the effect is linear in them"),
    Method(
        "masked", masked.attach_masked, True, False, "values are added to weights at fixed places, so it is linear",
        masked.OPTIONS, takes=masked.TAKES,
    ),
    Method("blocks", blocks.attach_blocks, True, False, "changes are added to the weights themselves, so it is linear"),
    Method("head", task_head.attach_head, True, False, "a change is added to the head's weight: a linear effect"),
    Method("bottleneck", attach_bottleneck, False, False, _LINES),
    Method("houlsby", attach_houlsby, False, False, _LINES),
    Method("parallel", attach_parallel, False, False, _LINES),
    Method("clip_adapter", clip_adapter.attach_clip_adapter, False, False, _LINES, clip_adapter.OPTIONS),
    Method("madx", stacked.attach_madx, False, False, _LINES, start=MOVED, takes=stacked.TAKES),
    Method(
        "fusion", fusion.attach_fusion, False, False, "adapters are weighed by a softmax over them",
        fusion.OPTIONS, MOVED, takes=fusion.TAKES,
    ),
    Method(
        "soft_prompt", soft_prompt.attach_soft_prompt, False, False, "attention reads the tokens through a softmax",
        soft_prompt.OPTIONS, MOVED,
    ),
    Method("concept_tokens", attach_concept_tokens, False, False, "attention reads it through a softmax", start=MOVED),
    Method(
        "ip_adapter", attach_ip_adapter, False, False, "attention reads the keys through a softmax",
        task="image_prompt_to_image",
    ),
)  # fmt: skip
_PEFT = (Method(t.name, t.attach, t.exact_mean, True, t.why, t.options, t.start, t.shared) for t in TUNERS)
METHODS: dict[str, Method] = {method.name: method for method in (*_OWN, *_PEFT)}


def known(spec: AdapterSpec) -> Method:
    """Returns the method of a spec after a check of its options, before any model is loaded.

    Raises:
      UnknownName: no such method.
      UnsupportedModel: the method is known and not offered; the message says why.
      ConfigError: an option is none of the method's, or its value is not of the type or range.
    """
    if spec.method in REFUSED:
        raise UnsupportedModel(f"method={spec.method!r} is not offered: {REFUSED[spec.method]}")
    method = lookup(METHODS, spec.method, "method")
    resolve(spec.options, (*method.options, task_head.HEAD), spec.method)
    return method


def check_task(name: str, task: str) -> None:
    """Refuses a method of one task with another, and a task of one method with another: nothing would look at its data.

    Args:
      name: key in `METHODS`.
      task: key in `task.tasks.TASKS`.

    Raises:
      ConfigError: as said.
    """
    alone = {method.task: method.name for method in METHODS.values() if method.task}
    if METHODS[name].task not in ("", task) or alone.get(task, name) != name:
        one = METHODS[name].task or task
        raise ConfigError(
            f"model.task={task!r} with adapter.method={name!r}: records of {one!r} are seen by method {alone[one]!r} "
            "alone, and it needs them; take both or neither"
        )


def attach(model: nn.Module, spec: AdapterSpec, given: AuxiliaryTensors = NO_AUXILIARY) -> nn.Module:
    """Adds the adapter of a spec to a model, in place, and returns the model to use from now on.

    Afterwards `requires_grad` is True exactly for the adapter's parameters, which are float32 whatever the base is;
    they depend on nothing but the spec and the weights and shapes of `places`. The output compares with the plain
    model's as the method's `start` says.

    Args:
      model: without an adapter.
      spec: of the adapter.
      given: the tensors that `required_tensors` names, on the CPU; nothing of them is ever trained.

    Raises:
      MalformedMessage: the given tensors are not exactly the wanted ones; see `given.check_given`.
      UnknownName: no such method.
      UnsupportedModel: the method is not offered, the slots lack what it tunes, or the model carries an adapter.
      ConfigError: a value of the spec does not fit the method.
    """
    method = known(spec)
    refuse_second(model)
    plain, takes = _without_head(spec), method.takes
    check_auxiliary(
        required_tensors(model, spec), given, hint=takes.hint if takes else f"method {method.name!r} takes none"
    )
    path = task_head.head_path(model) if task_head.wants_head(spec.options) and spec.method != "head" else ""
    wrapped = takes.attach(model, plain, given) if takes else method.attach(model, plain)
    if path:
        task_head.add_head(model, path)  # the wrapper holds the same modules
    return wrapped


def required_tensors(model: nn.Module, spec: AdapterSpec) -> RequiredTensors:
    """Returns which given tensors `attach` needs for a spec; none for most.

    Raises:
      UnknownName, UnsupportedModel, ConfigError: as for `attach`.
    """
    takes = known(spec).takes
    return takes.wants(model, _without_head(spec)) if takes else {}


def dummy_tensors(model: nn.Module, spec: AdapterSpec) -> AuxiliaryTensors:
    """Returns given tensors that nobody made, from the spec's public seed, to try a method on; earlier ranks are its.

    Raises:
      UnknownName, UnsupportedModel, ConfigError: as for `attach`.
    """
    return dummy_tensors_for(required_tensors(model, spec), free=spec.rank, seed=spec.seed)


def frozen_count(spec: AdapterSpec) -> int:
    """Returns how many earlier bottleneck adapters a spec needs, in given tensors.

    Raises:
      UnknownName, UnsupportedModel, ConfigError: as for `known`.
    """
    takes = known(spec).takes
    return takes.frozen(_without_head(spec)) if takes else 0


def needs_public_data(spec: AdapterSpec) -> bool:
    """Whether the given tensors of a spec are computed from public data."""
    return spec.method == "masked" and masked.by_fisher(_without_head(spec))


def places(model: nn.Module, spec: AdapterSpec) -> tuple[str, ...]:
    """Returns the paths of the modules that `attach` adds something to or inside of: the slots, perhaps the head.

    Method head has its head alone, and method clip_adapter its projections in place of the slots.

    Args:
      model: before the adapter is attached.
      spec: of the adapter.

    Raises:
      UnsupportedModel: the head is asked for, and the model has none; or the method's place is missing.
    """
    if spec.method == "head":
        return (task_head.head_path(model),)
    own = clip_adapter.projections(model, spec) if spec.method == "clip_adapter" else spec.slots
    return (*own, task_head.head_path(model)) if task_head.wants_head(spec.options) else own


def _without_head(spec: AdapterSpec) -> AdapterSpec:
    return replace(spec, options=tuple(option for option in spec.options if option[0] != task_head.HEAD.name))
