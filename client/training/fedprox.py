"""FedProx at a site: after each noisy step, a pull back to where the round began, which no record has a part in."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from offsite.privacy.batches import Losses, trainable
from offsite.privacy.mechanism import DpSgdConfig, Outcome, train
from offsite.privacy.randomness import Randomness


def train_near(
    model: nn.Module,
    losses_fn: Losses,
    select: Callable[[np.ndarray], Any],
    n: int,
    terms: DpSgdConfig,
    randomness: Randomness,
    *,
    proximal: float,
) -> Outcome:
    """Trains as `privacy.mechanism.train` does, with mu (w - w_start) added to the noisy mean gradient of each step.

    What is added follows from parameters that are noisy already, so the round spends what it spends without it: the
    event is that of all steps together. Li et al. 2020 (arXiv 1812.06127), equation 2, with one gradient step of it.

    Args:
      model: as for `train`.
      losses_fn: as for `train`.
      select: as for `train`.
      n: as for `train`.
      terms: as for `train`.
      randomness: as for `train`.
      proximal: mu, >= 0; 0 is `train`.

    Raises:
      PrivacyRefusal: as for `train`.
    """
    if not proximal:
        return train(model, losses_fn, select, n, terms, randomness)
    parameters = list(trainable(model).values())
    start = [parameter.detach().clone() for parameter in parameters]
    one = dataclasses.replace(terms, steps=1)
    outcomes = []
    for _ in range(terms.steps):
        before = [parameter.detach().clone() for parameter in parameters]
        outcomes.append(train(model, losses_fn, select, n, one, randomness))
        with torch.no_grad():
            for parameter, here, home in zip(parameters, before, start, strict=True):
                parameter.sub_(terms.learning_rate * proximal * (here - home))
    return _joined(outcomes, terms)


def _joined(outcomes: list[Outcome], terms: DpSgdConfig) -> Outcome:
    """Returns what all steps say together; the median norm is that of the steps' medians, and only for diagnosis."""
    sizes = [outcome.batch_sizes[0] for outcome in outcomes]
    medians = [outcome.norm_median for outcome in outcomes if np.isfinite(outcome.norm_median)]
    clipped = sum(outcome.clipped_fraction * size for outcome, size in zip(outcomes, sizes, strict=True))
    return Outcome(
        event=terms.event() if terms.private else None,
        losses=tuple(loss for outcome in outcomes for loss in outcome.losses),
        norm_median=float(np.median(medians)) if medians else float("nan"),
        batch_sizes=tuple(sizes),
        clipped_fraction=clipped / max(sum(sizes), 1),
        dropped=sum(outcome.dropped for outcome in outcomes),
    )
