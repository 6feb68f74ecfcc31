"""Deterministic computation: the same device gives the same numbers for the same seeds, or refuses."""

import os
from typing import TYPE_CHECKING

from offsite.errors import TrainingFault

if TYPE_CHECKING:  # commands that need no model do not load torch
    import torch

WORKSPACE, DETERMINISTIC = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
_SIGN = "does not have a deterministic implementation"


def compute_deterministically(device: "torch.device") -> None:
    """Makes this process compute the same numbers on an accelerator every time; a CPU does so by itself.

    An operation for which PyTorch has no deterministic algorithm on the device raises, see `refusal_of`: it would make
    two runs with the same seeds differ without a word. Products of float32 are of float32 and not of TF32, and sums of
    16-bit products are kept in float32. The flags hold for the process, and have to be set before cuBLAS starts.

    Args:
      device: device that was chosen.
    """
    import torch

    if device.type == "cpu":
        return
    if os.environ.get(WORKSPACE) not in DETERMINISTIC:
        os.environ[WORKSPACE] = DETERMINISTIC[0]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory that it did not write


def refusal_of(error: BaseException) -> TrainingFault | None:
    """Returns the refusal for an operation that has no deterministic algorithm on its device; None for other errors."""
    if not isinstance(error, RuntimeError) or _SIGN not in str(error):
        return None
    operation = str(error).split()[0]
    return TrainingFault(
        f"operation={operation}: PyTorch has no deterministic algorithm for it on this device, so two runs with the "
        "same seeds would differ; set device = 'cpu', or take another adapter method or task"
    )
