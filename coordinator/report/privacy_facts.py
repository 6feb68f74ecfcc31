"""What a report says of privacy: the terms of the job, and the numbers of each site as far as they are known."""

import math
from dataclasses import dataclass, field

from offsite.coordinator.job.json_form import OMITTED


@dataclass(frozen=True)
class SitePrivacy:
    """The privacy numbers of one site; None stands for a number that only the site itself knows.

    Attributes:
      site: name of the site.
      records: count of records.
      epsilon: epsilon that was spent; None without privacy.
      epsilon_by_round: epsilon spent up to and including each round.
      delta: delta of epsilon.
      noise_multiplier: standard deviation of the noise over `max_grad_norm`.
      max_grad_norm: bound on one record's contribution.
      sample_rate: chance of each record to be in a batch.
      steps: training steps.
      engine: how each record's own contribution was found; empty where unknown.
      clipped_fraction: mean share of drawn records whose contribution was clipped.
      rounds: count of rounds in which the site's update counts; where a simulation knows the steps, None.
    """

    site: str
    records: int | None = None
    epsilon: float | None = None
    epsilon_by_round: tuple[float, ...] | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    max_grad_norm: float | None = None
    sample_rate: float | None = None
    steps: int | None = None
    engine: str = ""
    clipped_fraction: float | None = None
    rounds: int | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class PrivacyFacts:
    """The privacy of a job.

    Attributes:
      private: whether gradients were clipped and noised.
      unit: what is protected.
      accountant: name of the accountant that adds up what is spent.
      target_epsilon: epsilon that each site plans its noise for; None without privacy.
      noise_source: where the noise comes from.
      sites: numbers of each site.
      not_known_here: sentences on what the coordinator cannot know and who can; None in a simulation, which knows all.
      max_grad_norm: bound on one record's contribution; in a simulation with the sites.
      expected_batch: records in a batch on average; in a simulation the sites' rates say the same.
    """

    private: bool
    unit: str
    accountant: str
    target_epsilon: float | None
    noise_source: str
    sites: tuple[SitePrivacy, ...]
    not_known_here: tuple[str, ...] | None = field(default=None, metadata=OMITTED)
    max_grad_norm: float | None = field(default=None, metadata=OMITTED)
    expected_batch: int | None = field(default=None, metadata=OMITTED)

    @property
    def zero_order(self) -> bool:
        """Whether the sites trained by forward passes alone."""
        return bool(self.sites) and all(site.engine == "zero_order" for site in self.sites)

    @property
    def largest_epsilon(self) -> float | None:
        """The largest epsilon of any site, or None when one of them is unknown or not finite."""
        known = [site.epsilon for site in self.sites if site.epsilon is not None and math.isfinite(site.epsilon)]
        return max(known) if known and len(known) == len(self.sites) else None
