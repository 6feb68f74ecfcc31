"""The default clipping bound, from public examples."""

import math
import statistics
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from offsite.errors import ConfigError, lookup
from offsite.privacy.batches import Batch, Losses
from offsite.privacy.engines import ENGINES
from offsite.privacy.ranges import check_range


def median_norm(model: nn.Module, losses_fn: Losses, batches: Iterable[Batch], engine: str = "bookkeeping") -> float:
    """Returns the median gradient norm of single examples, the default `max_grad_norm`.

    Clipping bounds differ by orders of magnitude between models and adapters, and a bound far above the norms drowns
    the update in noise. Andrew et al. 2021 (arXiv 1905.03871) find the median a good bound.

    Args:
      model: model with its adapter attached.
      losses_fn: (model, batch) -> one loss per example, (B,).
      batches: PUBLIC examples; a bound from private examples would itself have to be paid for.
      engine: a key of `privacy.engines.ENGINES`.

    Raises:
      ConfigError: no example has a finite gradient, or the median is no bound that a plan can have.
    """
    norms: list[float] = []
    with lookup(ENGINES, engine, "engine")(model) as opened:
        for batch in batches:
            norms += opened.add(losses_fn, batch, _nothing).norms
    median = statistics.median(norms) if norms else math.nan
    if not median > 0:
        raise ConfigError(f"median gradient norm={median} of {len(norms)} public examples must be > 0; add public text")
    check_range("median gradient norm", median)
    return median


def _nothing(norms: Tensor, positions: tuple[int, ...]) -> Tensor:
    return torch.zeros_like(norms)
