"""The gradient of one example by plain autograd, and how far two gradients differ."""

import math

import torch
from torch import Tensor, nn

from offsite.errors import PrivacyRefusal
from offsite.privacy.batches import Batch, Losses, trainable
from offsite.privacy.per_example import checked_losses

Gradients = dict[str, Tensor]


def gradient_alone(model: nn.Module, losses_fn: Losses, batch: Batch, row: int) -> Gradients:
    """Returns the gradient of one example in a batch of its own, by parameter.

    Raises:
      PrivacyRefusal: the loss does not depend on a trainable parameter, or losses are not one number per example.
    """
    return gradient_of(checked_losses(losses_fn, model, batch.select([row]))[0], model)


def gradient_of(loss: Tensor, model: nn.Module) -> Gradients:
    """Returns the gradient of one loss by parameter; the graph stays for the other losses of the batch.

    Raises:
      PrivacyRefusal: the loss does not depend on a trainable parameter.
    """
    parameters = trainable(model)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    if unused:
        raise PrivacyRefusal(
            f"trainable parameter={unused[0]!r}: the loss does not depend on it; freeze it, or choose other slots"
        )
    return dict(zip(parameters, gradients, strict=True))


def norm_of(gradients: Gradients) -> float:
    """Returns the Euclidean norm of a whole gradient."""
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


def relative_error(gradients: Gradients, right: Gradients) -> float:
    """Returns the relative error of a gradient, or infinity for a gradient that is not finite."""
    difference = {name: gradients[name].double() - right[name].double() for name in right}
    error = norm_of(difference) / norm_of(right)
    return error if math.isfinite(error) else math.inf
