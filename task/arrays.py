"""Arrays of floating numbers in records, of a shape that a model wants."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from offsite.task.records import fault
from offsite.task.spec import Record


def floats(records: Sequence[Record], index: int, field: str, shape: tuple[int | None, ...]) -> Tensor | None:
    """Returns numbers of a record, float32, None where they are wrong and that is forgiven.

    Args:
      records: of a task.
      index: of the record among them.
      field: that holds the numbers.
      shape: that they must have; None in it is any length from 1.

    Raises:
      DataError: they are of another shape, or not finite, and the records are not `Forgiving`; names their place.
    """
    value = records[index][field]
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        fault(records, index, field, "must be an array of floating numbers; read it with 'npz'")
        return None
    alike = all(have == want or (want is None and have) for have, want in zip(value.shape, shape, strict=False))
    if value.ndim != len(shape) or not alike:
        wanted = " x ".join("any" if want is None else str(want) for want in shape)
        fault(records, index, field, f"its shape must be {wanted}, as the model's; make it again")
        return None
    found = torch.from_numpy(value.astype(np.float64)).float()  # numpy warns of what is too large for float32
    if not torch.isfinite(found).all():
        fault(records, index, field, "must be finite; make it again")
        return None
    return found
