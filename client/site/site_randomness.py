"""Where the randomness of a site's trainings comes from: the operating system, or a seed in a test or simulation."""

from dataclasses import dataclass

from offsite.privacy.randomness import Randomness
from offsite.secagg.ring import Rounding


@dataclass(frozen=True)
class SiteRandomness:
    """The randomness of one site, by the name of a training.

    Attributes:
      site: name of the site; each site of a simulation has streams of its own.
      seed: seed of a simulation or a test; None on private data, where the operating system gives the randomness.
    """

    site: str
    seed: int | None = None

    def noise(self, training: str) -> Randomness:
        """Returns the randomness of sampling and noise."""
        if self.seed is None:
            return Randomness.from_os()
        return Randomness.for_simulation(self.seed, "noise", self.site, training)

    def rounding(self, training: str) -> Rounding | None:
        """Returns the randomness of stochastic rounding; None stands for the operating system's."""
        if self.seed is None:
            return None
        return Randomness.for_simulation(self.seed, "rounding", self.site, training).uniform
