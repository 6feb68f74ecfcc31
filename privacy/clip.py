"""The default clipping bound, from public examples."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from errors import DataError, lookup
from privacy.engines import ENGINES, Losses


def median_norm(model: nn.Module, losses: Losses, batches: Iterable[Any], engine: str) -> float:
    """Returns the median gradient norm of single public examples, the default of `max_grad_norm`.

    A bound far above it drowns the adapter in noise: noise grows with the bound, the signal does not. Private examples
    must not be used here, since the median itself would leak.

    Args:
      model: with the adapter at its start.
      losses: one loss per example.
      batches: public examples.
      engine: name in `ENGINES`.

    Raises:
      DataError: no example has a finite gradient that is not zero.
    """
    norms: list[float] = []
    with lookup(ENGINES, engine, "engine")(model) as gradients:
        for batch in batches:
            _, samples = gradients(losses, batch)
            norms += torch.stack([s.double().flatten(1).square().sum(1) for s in samples]).sum(0).sqrt().tolist()
    usable = sorted(norm for norm in norms if 0 < norm < float("inf"))
    if not usable:
        raise DataError("public examples give no finite gradient that is not zero; set privacy.max_grad_norm by hand")
    return usable[len(usable) // 2]
