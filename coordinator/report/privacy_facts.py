"""The privacy facts of a report: the terms of the job, and the known numbers of each site."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from offsite.coordinator.job.json_form import OMITTED

DELTAS = (1e-5, 1e-6)  # at which every report gives epsilon, whatever the sites' own deltas are


@dataclass(frozen=True)
class SitePrivacy:
    """The privacy numbers of one site; None stands for a number that only the site itself knows.

    Attributes:
      site: name of the site.
      records: number of records.
      epsilon: spent epsilon; None without privacy.
      epsilon_by_round: epsilon spent up to and including each round.
      delta: delta that belongs to epsilon, and to each epsilon of `epsilon_by_round`.
      epsilon_at: epsilon of the same steps at the deltas of `DELTAS`, by delta; None where only the site knows.
      noise_multiplier: standard deviation of the noise over `max_grad_norm`.
      max_grad_norm: bound on one record's contribution.
      sample_rate: probability with which a record is in a batch, from 0 to 1.
      steps: number of training steps.
      engine: name of the engine that computes each record's own contribution; empty where unknown.
      clipped_fraction: mean share of drawn records whose contribution was clipped, from 0 to 1.
      rounds: number of rounds in which the site's update counts; None in a simulation, which knows the steps.
      epsilon_by: name of the accounting that gave the epsilon, `pld` or `rdp` for the accountant `pld`, which takes the
        smaller of two bounds; None where the epsilon is not known.
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
    epsilon_at: Mapping[str, float] | None = field(default=None, metadata=OMITTED)
    epsilon_by: str | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True)
class PrivacyFacts:
    """The privacy of a job.

    Attributes:
      private: whether gradients were clipped and noised.
      unit: unit of privacy in words, as one record.
      accountant: name of the accountant that adds up the spent epsilon.
      target_epsilon: epsilon that each site plans its noise for, at a delta of at most 1e-6; None without privacy.
      noise_source: origin of the noise, in words.
      sites: privacy numbers of each site.
      not_known_here: sentences on the numbers that the coordinator cannot know, and on who can know them; None in a
        simulation, which knows all numbers.
      max_grad_norm: bound on one record's contribution; None in a simulation, where each site has the bound.
      expected_batch: expected number of records in a batch; None in a simulation, where the sites' sample rates say the
        same.
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
    def largest_delta(self) -> float | None:
        """The largest delta of any site, or None when no site's delta is known."""
        return max((site.delta for site in self.sites if site.delta is not None), default=None)

    def largest_epsilon_at(self, delta: float) -> float | None:
        """Returns the largest epsilon of any site at a delta of `DELTAS`, or None where it is unknown or not finite."""
        known = [(site.epsilon_at or {}).get(short_delta(delta), math.inf) for site in self.sites]
        return max(known) if known and all(map(math.isfinite, known)) else None

    @property
    def largest_epsilon(self) -> float | None:
        """The largest epsilon of any site, or None when the epsilon of a site is unknown or not finite."""
        known = [site.epsilon for site in self.sites if site.epsilon is not None and math.isfinite(site.epsilon)]
        return max(known) if known and len(known) == len(self.sites) else None


def short_delta(delta: float) -> str:
    """Returns a delta of `DELTAS` as a key, for example "1e-5"."""
    mantissa, exponent = f"{delta:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"
