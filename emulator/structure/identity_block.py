"""Leaves a block out without moving a name: a parameter-free block of the same class that returns its input.

A block removed from its list would shift every later name and index (and, in transformers 5, need patches of the
configuration, `layer_idx` and `layer_types`). An empty block in its place keeps plug-in the identity on names.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from offsite.emulator.structure.replacements import PATCH
from offsite.errors import MalformedMessage, UnsupportedModel

# How a block hands its result on: ("tensor",), or ("tuple", ...) with one word for each member, see `output_form`.
Form = tuple[str, ...]


def output_form(block: nn.Module, arguments: Mapping[str, Any], output: Any) -> Form:
    """Returns the form in which a block hands its result on, read off one call.

    The form is ("tensor",) for a bare tensor; else "tuple" followed by "hidden" for the hidden states, "echo:NAME" for
    a member that is the very object of argument NAME (T5 passes its position biases from block to block in this way),
    and "none" for any other member.

    Args:
      block: the called block, for the message.
      arguments: arguments of the call by name, hidden states first.
      output: result of the call.

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
    """Returns a parameter-free block, of a subclass of the block's class, that returns its input in `form`.

    Plain attributes (a layer's index or attention type, which the model around the block may read) are carried over. A
    module that is set as the attribute `patch` later maps the input before it is returned.

    Raises:
      MalformedMessage: `output_form` returns no such form.
    """
    _check_form(form)
    kind = type(block)
    signature = inspect.signature(kind.forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return in_form(form, bind(signature, self, args, kwargs), self._modules.get(PATCH))

    vars(forward)["__signature__"] = signature  # for code that binds a call's arguments by name
    empty: Any = type(f"Skipped{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})
    identity: nn.Module = empty.__new__(empty)  # without the class's own __init__, which would make parameters
    nn.Module.__init__(identity)
    internal = vars(nn.Module())
    for name, value in vars(block).items():
        if name not in internal and name != "forward":  # a forward pass of the block's own object reads its weights
            setattr(identity, name, value)
    return identity.train(block.training)


def bind(
    signature: inspect.Signature, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of one call by name, hidden states first, `**kwargs` spread out."""
    bound = dict(signature.bind_partial(block, *args, **kwargs).arguments)
    bound.pop(next(iter(signature.parameters)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


def in_form(form: Form, arguments: dict[str, Any], patch: nn.Module | None) -> Any:
    """Returns the hidden states of one call in a block's own form; a patch that is not None maps them first."""
    hidden = next(iter(arguments.values()))
    hidden = hidden if patch is None else patch(hidden)
    if form == ("tensor",):
        return hidden
    rest = (arguments.get(word.removeprefix("echo:")) if word.startswith("echo:") else None for word in form[2:])
    return (hidden, *rest)


def _check_form(form: Form) -> None:
    words = all(word == "none" or word.startswith("echo:") for word in form[2:])
    if form != ("tensor",) and not (form[:2] == ("tuple", "hidden") and words):
        raise MalformedMessage(f"form={form!r} is not ('tensor',) or ('tuple', 'hidden', ...); build the package again")
