"""Make the emulator worse where the slots' gradients do not look: a block writes no more along some directions."""

from fractions import Fraction

import torch
from torch import Tensor

from offsite.emulator.calibration.draft import Station
from offsite.emulator.calibration.least_squares import position_weights, rows
from offsite.emulator.compressors.arguments import fraction
from offsite.emulator.compressors.pairs import dense_pairs
from offsite.emulator.structure.geometry import PARALLEL
from offsite.emulator.structure.replacements import dense_like, weight_of
from offsite.errors import ConfigError

DAMPING = 1e-2
LOUD = 10.0


def elevate(station: Station, argument: str) -> None:
    """Takes a share of what a feed-forward network writes, along directions from which least comes back.

    The principle is LLEOT's (Findings ACL 2026), loss up and gradients aligned; this closed form is not theirs. What is
    taken out is gone, unlike noise that is added. The mean of what is written stays, also at loud positions. Where the
    blocks behind are linear the gradients turn less than with other directions; in a trained model they did not.

    Args:
      station: a block's.
      argument: the share of the written energy that goes, in (0, 1].

    Raises:
      ConfigError: the share is out of range, or the emulator is parallel: there the adapter sits in the very layer.
    """
    share = fraction("elevate", argument, "the share of written energy that goes")
    if station.middle.geometry.shape == PARALLEL:
        raise ConfigError(
            f"elevate={argument!r}: in a parallel emulator the adapter sits in the layer that would lose directions, "
            "and its own gradient turns; use shape sandwich"
        )
    head = str(station.span.stretch.head)
    for pair in dense_pairs("elevate", station):
        layer = station.span.module(pair.down)
        inputs = station.observe({pair.down: layer})[pair.down]
        weights = position_weights(rows(station.inputs))
        change = subtracted(weight_of(layer), inputs, weights, station.middle.cotangents[head], share)
        station.span.replace(pair.down, dense_like(layer, weight_of(layer) - change, getattr(layer, "bias", None)))


def subtracted(weight: Tensor, inputs: Tensor, weights: Tensor, moments: Tensor, share: Fraction) -> Tensor:
    """Returns what to take from a weight (out, in) so that a share of its output's energy is gone, float32.

    Args:
      weight: (out, in).
      inputs: (positions, in).
      weights: (positions,), > 0.
      moments: (out, out) of the cotangents: directions go in the order of what comes back along them, least first.
      share: in (0, 1], of the energy of the output beside its means; met exactly on these inputs.
    """
    free = weight.double() @ _beside(_means(inputs, weights), inputs)
    outputs = inputs.double() @ free.T
    directions = torch.linalg.eigh(moments).eigenvectors
    energy = (weights.double().unsqueeze(1) * (outputs @ directions).square()).sum(0)
    before = energy.cumsum(0) - energy
    part = ((float(share) * energy.sum() - before) / energy.clamp_min(torch.finfo(energy.dtype).tiny)).clamp(0, 1)
    # Of the direction in which the share is reached a factor goes, so that this part of its energy is gone.
    factors = 1 - (1 - part).sqrt()
    return ((directions * factors) @ (directions.T @ free)).float()


def _means(inputs: Tensor, weights: Tensor) -> Tensor:
    """Returns (in, 1 or 2): the mean input, and that of loud positions where there are any.

    Models keep one position of a text far louder than all others, for their attention to rest on (Sun et al. 2024,
    Massive Activations); where that is disturbed nothing works any more, and no gradient is right.
    """
    loud = weights < weights.median() / LOUD**2
    groups = [one for one in (inputs[~loud], inputs[loud]) if len(one)]
    return torch.stack([group.double().mean(0) for group in groups], dim=1)


def _beside(means: Tensor, inputs: Tensor) -> Tensor:
    """Returns the map (in, in) that sends the means to zero and changes other inputs least, measured by what enters."""
    x = inputs.double()
    moments = x.T @ x / len(x)
    moments.diagonal().add_(DAMPING * moments.diagonal().mean() + torch.finfo(torch.float64).tiny)
    solved = torch.linalg.solve(moments, means)
    return torch.eye(len(means), dtype=torch.float64) - means @ torch.linalg.lstsq(means.T @ solved, solved.T).solution
