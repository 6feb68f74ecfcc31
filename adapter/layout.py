"""The order in which adapter parameters become one vector, and back."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from offsite.errors import DigestMismatch, MalformedMessage, RangeError, UnsupportedModel

if TYPE_CHECKING:  # a manifest has a layout, and is read where no model is
    from torch import nn

KEYS = ("names", "shapes")
MAX_AXES, MAX_LENGTH, MAX_SIZE = 16, 1 << 31, 1 << 40  # far beyond any adapter, and every size fits 64 bits


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the trainable parameters, sorted by name.

    Only parameters with `requires_grad` are in the layout: frozen tensors that a method generates from its seed never
    travel.

    Attributes:
      names: names of the parameters in ascending order, each once.
      shapes: shapes of the parameters, in the order of `names`.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Refuses a layout that `of` could not have made."""
        if len(self.names) != len(self.shapes) or not self.names:
            raise MalformedMessage(
                f"names={len(self.names)} shapes={len(self.shapes)} must be equal and above 0; ask for the layout again"
            )
        if list(self.names) != sorted(set(self.names)):
            raise MalformedMessage("layout names must be sorted and unique; ask for the layout again")
        if any(not 1 <= length <= MAX_LENGTH for shape in self.shapes for length in shape):
            raise MalformedMessage(f"layout shapes must have lengths from 1 to {MAX_LENGTH}; ask for the layout again")
        if any(len(shape) > MAX_AXES for shape in self.shapes) or self.size > MAX_SIZE:
            raise MalformedMessage(f"layout must have at most {MAX_SIZE} scalars; ask for the layout again")

    @classmethod
    def of(cls, model: "nn.Module") -> "Layout":
        """Returns the layout of a model's trainable parameters.

        Raises:
          UnsupportedModel: nothing in the model is trainable.
        """
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        if not shapes:
            raise UnsupportedModel("trainable parameters=0, must be at least 1; attach an adapter first")
        names = tuple(sorted(shapes))
        return cls(names, tuple(shapes[name] for name in names))

    @property
    def size(self) -> int:
        """Number of scalars."""
        return sum(math.prod(shape) for shape in self.shapes)

    def digest(self) -> bytes:
        """Returns the SHA-256 of names and shapes, 32 bytes; length prefixes keep any two layouts apart."""
        state = hashlib.sha256(b"offsite layout 1")
        for name, shape in zip(self.names, self.shapes, strict=True):
            encoded = name.encode()
            state.update(len(encoded).to_bytes(4, "big") + encoded + len(shape).to_bytes(4, "big"))
            for length in shape:
                state.update(length.to_bytes(8, "big"))
        return state.digest()

    def read(self, model: "nn.Module") -> NDArray[np.float32]:
        """Returns the parameters as one vector, float32 (size,)."""
        parts = [p.detach().cpu().float().reshape(-1).numpy() for p in self._parameters(model)]
        return np.concatenate(parts)

    def write(self, model: "nn.Module", vector: NDArray[Any]) -> None:
        """Copies a vector into the parameters, in place.

        Args:
          model: a model with this layout.
          vector: values in the order of the layout, any real dtype, (size,), finite also as float32.

        Raises:
          RangeError: the length is wrong or a value is not finite.
          DigestMismatch: the model has another layout.
        """
        import torch  # whoever has a model has loaded torch

        named = self.named(vector)
        parameters = self._parameters(model)
        with torch.no_grad():
            for parameter, values in zip(parameters, named.values(), strict=True):
                parameter.copy_(torch.from_numpy(values))

    def named(self, vector: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Returns the vector cut into named float32 arrays, each a copy in its own shape.

        Raises:
          RangeError: the length is wrong or a value is not finite.
        """
        if np.shape(vector) != (self.size,):
            raise RangeError(f"vector shape={np.shape(vector)} must be ({self.size},); use the layout of this vector")
        with np.errstate(over="ignore"):
            values = np.array(vector, dtype=np.float32)
        if not np.isfinite(values).all():
            raise RangeError(f"non-finite values={int((~np.isfinite(values)).sum())}, must be 0; drop this vector")
        return {name: values[span].reshape(shape) for name, shape, span in self._spans()}

    def to_dict(self) -> dict[str, object]:
        """Returns the JSON form."""
        return {"names": list(self.names), "shapes": [list(shape) for shape in self.shapes]}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Layout":
        """Returns the layout of a JSON object made by `to_dict`.

        Raises:
          MalformedMessage: the object has other keys or types.
        """
        if sorted(values) != list(KEYS):
            raise MalformedMessage(f"layout keys={sorted(values)} must be {list(KEYS)}; ask for the layout again")
        names, shapes = values["names"], values["shapes"]
        if not (_is_list_of(names, str) and _is_list_of(shapes, list)):
            raise MalformedMessage("layout names and shapes must be lists; ask for the layout again")
        lengths = cast("Sequence[Sequence[int]]", shapes)
        if not all(_is_list_of(shape, int) for shape in lengths):
            raise MalformedMessage("layout shapes must hold whole numbers; ask for the layout again")
        return cls(tuple(cast("Sequence[str]", names)), tuple(tuple(shape) for shape in lengths))

    def _spans(self) -> Iterator[tuple[str, tuple[int, ...], slice]]:
        start = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            stop = start + math.prod(shape)
            yield name, shape, slice(start, stop)
            start = stop

    def _parameters(self, model: "nn.Module") -> list[Any]:
        if Layout.of(model) != self:
            raise DigestMismatch(
                f"layout={self.digest().hex()[:12]} is not the model's; attach the adapter of the same spec"
            )
        parameters = dict(model.named_parameters())
        return [parameters[name] for name in self.names]


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
