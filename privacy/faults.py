"""Whose fault a failing step is: a record's, whose words stay at the site, or the machine's, which ends the training.

A record on which the model fails is left out without a word, since a refusal would be an answer about records that
nobody accounts for. A machine on which every record fails would so train on noise alone. Two rules tell these apart,
and neither tells of a record:

- Memory. How much a batch takes follows from its shape, and all records of a job have one shape. So too little memory
  is never a record's fault.
- Every other fault is tried again on invented records, which the site's own seed makes. If the model fails on these as
  well, no record is at fault, and the same refusal would come with any other records in their place. If the model does
  not fail on these, the training goes on without the records that fail, and nobody hears of the trial.
"""

from collections.abc import Callable
from typing import Any

from offsite.errors import OffsiteError, PrivacyRefusal, TrainingFault

# The name of torch's type and of other libraries'; importing torch for it would slow down commands that need no torch.
_TYPE = "OutOfMemoryError"
# How libraries say that memory is short, where the error has no type of its own.
_SHORT = ("allocate", "out of memory", "ALLOC_FAILED")


def is_memory(error: BaseException) -> bool:
    """Says whether an error means that memory is short, on the CPU or on another device."""
    if isinstance(error, MemoryError) or _TYPE in {kind.__name__ for kind in type(error).__mro__}:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _SHORT)


def failure(add: Callable[[Any], None], batch: Any) -> Exception | None:
    """Adds a batch, and returns the error by which the model failed on the batch, or None.

    Args:
      add: function that adds a batch to a sum, or fails and leaves the sum unchanged.
      batch: examples.

    Raises:
      PrivacyRefusal: the engine cannot tell the examples apart.
      MemoryError: memory is short.
    """
    try:
        add(batch)
    except PrivacyRefusal:
        raise
    except Exception as error:
        if is_memory(error):
            raise MemoryError(str(error)) from None  # without the frames, which hold the tensors of the failed step
        return error
    return None


def refuse_broken(add: Callable[[Any], None], invented: Any) -> None:
    """Refuses to go on where the model fails on invented records as well.

    Args:
      add: function that adds nothing of a batch to a sum, or fails.
      invented: invented examples, of the shape of all examples of the job.

    Raises:
      TrainingFault: the model fails; the message may name the error, since no record had a part in the error.
      PrivacyRefusal, MemoryError: as `failure`.
    """
    if (error := failure(add, invented)) is not None:
        lines = str(error).strip().splitlines()
        reason = error if isinstance(error, OffsiteError) else f"{type(error).__name__}: {lines[0] if lines else ''}"
        raise TrainingFault(
            f"training fails on invented records too, so no record is at fault: {reason}; put the site's libraries, "
            "its device and its settings right, then run again"
        ) from None
