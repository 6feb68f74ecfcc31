"""A second device without one: tensors that say they lie on `fakegpu:0`, compute on the CPU, and mix with none there.

As on a real accelerator, an operation that meets tensors of both devices is refused. Exceptions are PyTorch's own:
tensors without dimensions, and copies from one device to the other.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"
REAL = os.environ.get("OFFSITE_TEST_DEVICE", "")  # a device that is there: `bench/gpu.py` runs the same tests on it
DEVICE = REAL or f"{NAME}:0"
LIBRARIES: list[Any] = []  # registrations live as long as these objects
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class Mixed(RuntimeError):
    """An operation met tensors of both devices."""


class FakeTensor(torch.Tensor):
    """A tensor on the fake device, with its values in `inner`."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "FakeTensor":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(DEVICE),
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"FakeTensor({self.inner})"

    @property
    def data(self) -> torch.Tensor:
        """The values without a graph; what is assigned takes the place of values and type."""
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner if isinstance(value, FakeTensor) else value

    def tolist(self) -> Any:
        """Returns the values, as on every device."""
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuses, as on every other device than the CPU."""
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy; use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the inner tensors; results lie where the operation says, else where the arguments lie."""
    tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    fake = [isinstance(one, FakeTensor) for one in tensors]
    if any(fake) and func not in COPIES:
        strangers = [tuple(one.shape) for one, is_fake in zip(tensors, fake, strict=True) if not is_fake and one.ndim]
        if strangers:
            raise Mixed(f"{func}: expected all tensors to be on the same device, found {DEVICE} and cpu {strangers}")
    named = dict(kwargs)
    wrap = any(fake)
    if isinstance(device := named.get("device"), torch.device | str):
        wrap = torch.device(device).type == NAME
        named["device"] = torch.device("cpu") if wrap else device
    if func is torch.ops.aten.copy_.default:
        wrap = fake[0]
    plain_args, plain_named = pytree.tree_map_only(FakeTensor, lambda one: one.inner, (args, named))
    if func is torch.ops.aten._to_copy.default and wrap and not any(fake):
        result = func(*plain_args, **plain_named).clone()
    else:
        result = func(*plain_args, **plain_named)
    if not wrap:
        return result
    outputs = pytree.tree_map_only(torch.Tensor, FakeTensor, result)
    return return_and_correct_aliasing(func, args, kwargs, outputs)


class FakeDevice(TorchDispatchMode):
    """Catches what makes tensors on the fake device out of nothing, or out of the CPU's."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return compute(func, args, kwargs or {})


@cache
def register() -> None:
    if REAL:
        return
    _setup_privateuseone_for_python_backend(NAME)
    module: Any = getattr(torch, NAME)
    module.get_rng_state = lambda device=0: torch.zeros(1, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=0: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # recomputation asks for it, and uses none
    library = torch.library.Library("aten", "IMPL")  # what torch.tensor(..., device=...) needs below the modes
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    LIBRARIES.append(library)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> FakeTensor:
    return FakeTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    plain = source.inner if isinstance(source, FakeTensor) else source
    (target.inner if isinstance(target, FakeTensor) else target).copy_(plain)
    return target


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> FakeTensor:
    return FakeTensor(torch.empty(size, dtype=dtype))


@contextmanager
def fake_device() -> Iterator[torch.device]:
    """Gives the name of a device on which everything runs that runs on an accelerator."""
    if REAL:
        yield torch.device(REAL)
        return
    register()
    before = nn.Module._apply
    nn.Module._apply = _apply  # type: ignore[method-assign, assignment]
    try:
        with FakeDevice():
            yield torch.device(DEVICE)
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


def _apply(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """Changes parameters and buffers as `Module.to` does, with new parameters, and the same one where one was shared.

    A parameter on a real device keeps its Python object, whose content a wrapper cannot exchange.
    """
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for child in module.modules() if recurse else [module]:
        for name, parameter in child._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                new = nn.Parameter(change(parameter.detach()), requires_grad=parameter.requires_grad)
                new.__dict__.update({key: value for key, value in vars(parameter).items() if key != "inner"})
                made[id(parameter)] = parameter, new
            child._parameters[name] = made[id(parameter)][1]
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else change(buffer)
    return module
