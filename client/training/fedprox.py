"""FedProx at a site: after each noisy step, a pull back to where the round began."""

from collections.abc import Callable

import torch

from offsite.privacy.mechanism import DpTraining


def proximal_pull(training: DpTraining, mu: float) -> Callable[[], None]:
    """Returns an `after_step` for `privacy.mechanism.train` that adds mu (w - w_start) to each step's mean gradient.

    The pull costs no privacy, because it follows from parameters that are noisy already. Li et al. 2020
    (arXiv 1812.06127), equation 2, with one gradient step of it.

    Args:
      training: the round's training, with the model as the round begins.
      mu: strength of the pull, >= 0.

    Raises:
      PrivacyRefusal: nothing trains.
    """
    parameters = training.parameters()
    start = [parameter.detach().clone() for parameter in parameters]
    before = [parameter.clone() for parameter in start]  # of the step that comes next
    factor = training.terms.learning_rate * mu

    @torch.no_grad()
    def pull() -> None:
        for parameter, here, home in zip(parameters, before, start, strict=True):
            parameter.sub_(factor * (here - home))
            here.copy_(parameter)

    return pull
