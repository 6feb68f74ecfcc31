"""Runs the very code of a step on the meta device, and counts the memory, work and traffic that it would take.

A meta tensor has a shape and no values, so a run costs milliseconds for a block of any size. The numbers follow the
code: no formula about activations has to be kept in step with the engines.
"""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

META = "meta"
MOST_READ = 1 << 20  # values that code may read off a meta tensor; they come out as ones
_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN._grouped_mm)
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Work:
    """What one run takes.

    Attributes:
      peak: largest number of bytes of all tensors that lived at once, without the model's own weights.
      flops: floating operations of matrix products and attention; a multiply-add is two.
      traffic: bytes that all other operations read and write.
    """

    peak: int = 0
    flops: int = 0
    traffic: int = 0

    def __add__(self, other: "Work") -> "Work":
        """Returns the work of two runs one after the other."""
        return Work(max(self.peak, other.peak), self.flops + other.flops, self.traffic + other.traffic)

    def times(self, count: float) -> "Work":
        """Returns the work of so many runs, one after the other."""
        return Work(self.peak if count else 0, round(self.flops * count), round(self.traffic * count))


class _Fused(TorchFunctionMode):
    """Takes the fused kernel of attention, as CPU and GPU do; on meta, torch would keep the scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **given)
        query, key, value = args[:3] if len(args) >= 3 else (given[name] for name in ("query", "key", "value"))
        mask = given.get("attn_mask", args[3] if len(args) > 3 else None)
        causal = bool(given.get("is_causal", False))
        width = value.shape[-1]
        value = functional.pad(value, (0, query.shape[-1] - width))  # nothing where keys and values are of one width
        return _ATTENTION(query, key, value, 0.0, causal, attn_mask=mask, scale=given.get("scale"))[0][..., :width]


class MetaRun(TorchDispatchMode):
    """Counts what happens within its context.

    Values that code reads (is this loss finite? which rows are kept?) are ones and True: all goes well.

    Args:
      resident: tensors that are there before, such as a model's weights; they are not counted.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._live = self._peak = self._flops = self._traffic = 0
        self._sizes: dict[int, int] = {}
        self._resident = list(resident)  # held, so that no id of theirs is given to another tensor
        self._known = {tensor.untyped_storage()._cdata for tensor in self._resident}
        self._fused = _Fused()

    @classmethod
    def on(cls, model: nn.Module) -> "MetaRun":
        """Returns a run on a model, whose parameters and buffers are not counted."""
        return cls([*model.parameters(), *model.buffers()])

    @property
    def work(self) -> Work:
        """What was counted so far."""
        return Work(self._peak, self._flops, self._traffic)

    def __enter__(self) -> "MetaRun":
        """Starts to count."""
        self._fused.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stops counting."""
        super().__exit__(*error)
        self._fused.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given, operation = dict(kwargs or {}), func.overloadpacket
        if operation is _ATEN._local_scalar_dense and args[0].is_meta:
            return args[0].dtype == torch.bool or (1.0 if args[0].is_floating_point() else 1)
        if operation is _ATEN._to_copy and args[0].is_meta and _leaves(given) and args[0].numel() <= MOST_READ:
            return torch.ones(args[0].shape, dtype=given.get("dtype") or args[0].dtype)
        if operation is _ATEN.nonzero and args[0].is_meta:  # code asks for exceptions so, and there are none
            return args[0].new_empty((0, args[0].dim()), dtype=torch.long)
        if operation is _ATEN.index:
            args = (args[0], [_all_true(index) for index in args[1]])
        experts = operation is _ATEN._grouped_mm and args[0].is_meta
        result = _of_experts(*args[:2]) if experts else func(*args, **given)
        if operation is not _ATEN.detach:
            self._count(operation, args, result)
        return result

    def _count(self, operation: Any, args: tuple[Any, ...], result: Any) -> None:
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        made = sum([self._see(tensor) for tensor in outputs])
        if operation in _PRODUCTS:
            self._flops += 2 * outputs[0].numel() * inputs[-2 if operation is not _ATEN._grouped_mm else 0].shape[-1]
        elif "flash_attention" in str(operation):
            scores = inputs[0].shape[-3] * inputs[0].shape[0] * inputs[0].shape[-2] ** 2
            self._flops += (4 if "backward" not in str(operation) else 10) * scores * inputs[0].shape[-1]
        elif made or str(operation).endswith("_"):
            self._traffic += made + sum(tensor.numel() * tensor.element_size() for tensor in inputs)

    def _see(self, tensor: Tensor) -> int:
        """Counts a tensor's memory until it is freed, and returns its bytes; 0 for a view of what is known."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return 0
        self._known.add(key)
        self._sizes[key] = size
        self._live += size
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._gone, key)
        return size

    def _gone(self, key: int) -> None:
        self._known.discard(key)
        self._live -= self._sizes.pop(key, 0)


def _leaves(arguments: Mapping[str, object]) -> bool:
    """Whether a copy goes from the meta device to another."""
    return arguments.get("device") is not None and torch.device(arguments["device"]).type != META


def _of_experts(rows: Tensor, experts: Tensor) -> Tensor:
    """Returns the product of sorted rows with their experts' matrices; torch's own rule takes bfloat16 only."""
    return rows.new_empty((*rows.shape[:-1], experts.shape[-1]))


def _all_true(index: Any) -> Any:
    """Returns a mask as the positions where it is true, as if it were true everywhere."""
    if not isinstance(index, Tensor) or index.dtype != torch.bool or not index.is_meta:
        return index
    return index.new_empty((index.numel(),), dtype=torch.long)
