"""Leave a block out without moving a name: a parameter-free block of the same class that returns its input.

Taking a block out of its list would shift every later name and index (and, in transformers 5, need the configuration,
`layer_idx` and `layer_types` patched); putting an empty one in its place keeps plug-in the identity on names.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from errors import ConfigError, MalformedMessage, UnsupportedModel

# How a block hands its result on: ("tensor",), or ("tuple", ...) with one word per member, see `output_form`.
Form = tuple[str, ...]
Calibration = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Observation:
    """What one block did on public examples.

    Attributes:
      form: how it hands its result on.
      influence: mean over positions of 1 - cosine(input, output), in 0..2. Block Influence, Men et al. 2024
        (ShortGPT), equation 1.
    """

    form: Form
    influence: float


def output_form(block: nn.Module, arguments: Mapping[str, Any], output: Any) -> Form:
    """Returns how a block hands its result on, read off one call.

    ("tensor",) for a bare tensor; else "tuple" followed by "hidden" for the hidden states, "echo:NAME" for a member
    that is the very object that came in as argument NAME (T5 passes its position biases from block to block so), and
    "none" for the rest.

    Args:
      block: the block called, for the message.
      arguments: the call's arguments by name, hidden states first.
      output: what it returned.

    Raises:
      UnsupportedModel: the result is neither a tensor nor a tuple, or its shape is not the input's.
    """
    hidden = next(iter(arguments.values()))
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor) or not isinstance(hidden, Tensor) or first.shape != hidden.shape:
        raise UnsupportedModel(
            f"block={type(block).__name__}: its output is not shaped like its input, so it cannot be skipped; "
            "use int8 or int4 instead of skip"
        )
    if isinstance(output, Tensor):
        return ("tensor",)
    incoming = {id(value): name for name, value in arguments.items() if value is not None and value is not hidden}
    rest = (f"echo:{incoming[id(member)]}" if id(member) in incoming else "none" for member in output[1:])
    return ("tuple", "hidden", *rest)


def skipped(block: nn.Module, form: Form) -> nn.Module:
    """Returns a block of a subclass of the given block's class, without parameters, that returns its input in `form`.

    Plain attributes (a layer's index or attention type, which the model around it may read) are carried over.

    Raises:
      MalformedMessage: the form is not one `output_form` returns.
    """
    _check_form(form)
    kind = type(block)
    signature = inspect.signature(kind.forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _in_form(form, _bind(signature, self, args, kwargs))

    empty: Any = type(f"Skipped{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})
    twin: nn.Module = empty.__new__(empty)  # without the class's own __init__, which would make parameters
    nn.Module.__init__(twin)
    internal = vars(nn.Module())
    for name, value in vars(block).items():
        if name not in internal:
            setattr(twin, name, value)
    return twin.train(block.training)


def observe(model: nn.Module, blocks: tuple[str, ...], calibration: Calibration | None) -> dict[str, Observation]:
    """Returns what each block did while `calibration` ran the model on public examples.

    Args:
      model: left as it was.
      blocks: module paths.
      calibration: calls the model with public examples only; its result is ignored, no gradient is kept.

    Raises:
      ConfigError: no calibration was given.
      UnsupportedModel: a block was not called, or cannot be skipped.
    """
    if calibration is None:
        raise ConfigError("calibration=None: skipping blocks needs public examples to run; give public text")
    seen: dict[str, list[tuple[Form, Tensor]]] = {path: [] for path in blocks}
    handles = [_watch(model.get_submodule(path), seen[path]) for path in blocks]
    try:
        with torch.no_grad():
            calibration(model)
    finally:
        for handle in handles:
            handle.remove()
    return {path: _summary(path, calls) for path, calls in seen.items()}


def _watch(block: nn.Module, calls: list[tuple[Form, Tensor]]) -> Any:
    signature = inspect.signature(type(block).forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arguments = _bind(signature, module, args, kwargs)
        form = output_form(module, arguments, output)
        before, after = next(iter(arguments.values())), output if isinstance(output, Tensor) else output[0]
        calls.append((form, 1 - functional.cosine_similarity(before.double(), after.double(), dim=-1).flatten()))

    return block.register_forward_hook(hook, with_kwargs=True)


def _summary(path: str, calls: list[tuple[Form, Tensor]]) -> Observation:
    forms = {form for form, _ in calls}
    if len(forms) != 1:
        raise UnsupportedModel(
            f"block={path}: it was called in {len(forms)} ways on the public examples, 1 is needed to skip it; "
            "use int8 or int4 instead of skip"
        )
    return Observation(forms.pop(), float(torch.cat([influence for _, influence in calls]).mean()))


def _bind(
    signature: inspect.Signature, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of one call by name, hidden states first, `**kwargs` spread out."""
    bound = dict(signature.bind_partial(block, *args, **kwargs).arguments)
    bound.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


def _in_form(form: Form, arguments: dict[str, Any]) -> Any:
    hidden = next(iter(arguments.values()))
    if form == ("tensor",):
        return hidden
    rest = (arguments.get(word.removeprefix("echo:")) if word.startswith("echo:") else None for word in form[2:])
    return (hidden, *rest)


def _check_form(form: Form) -> None:
    words = all(word == "none" or word.startswith("echo:") for word in form[2:])
    if form != ("tensor",) and not (form[:2] == ("tuple", "hidden") and words):
        raise MalformedMessage(f"form={form!r} is not ('tensor',) or ('tuple', 'hidden', ...); build the package again")
