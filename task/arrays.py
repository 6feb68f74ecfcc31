"""Reads arrays of floating-point numbers from records, with the shape that a model needs."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from offsite.task.records import fault
from offsite.task.spec import Record


def floats(records: Sequence[Record], index: int, field: str, shape: tuple[int | None, ...]) -> Tensor | None:
    """Returns the array in a field of a record, float32; None for a faulty array in `LenientRecords`.

    Args:
      records: records of a task.
      index: index of the record.
      field: name of the field that holds the array.
      shape: required shape; None stands for any length >= 1.

    Raises:
      DataError: the array has another shape or is not finite, and the records are not `LenientRecords`; the message
        names the record's place.
    """
    value = records[index][field]
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        fault(records, index, field, "must be an array of floating-point numbers; read it with reader 'npz'")
        return None
    alike = all(have == want or (want is None and have) for have, want in zip(value.shape, shape, strict=False))
    if value.ndim != len(shape) or not alike:
        wanted = " x ".join("any" if want is None else str(want) for want in shape)
        fault(records, index, field, f"shape must be {wanted}, the model's; make the array again")
        return None
    array = torch.from_numpy(value.astype(np.float64)).float()  # numpy would warn about numbers too large for float32
    if not torch.isfinite(array).all():
        fault(records, index, field, "must be finite; make the array again")
        return None
    return array
