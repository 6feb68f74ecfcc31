"""Rounds, noise and epsilon of a job, from the number of records that a site declares."""

from dataclasses import dataclass

from offsite.errors import PrivacyRefusal
from offsite.privacy.calibrate import calibrated, public_delta

DOUBLINGS = (1, 4)  # the rounds of the job, and more of them


@dataclass(frozen=True)
class PrivacyRow:
    """A job of so many rounds.

    Attributes:
      rounds: number of rounds.
      steps: number of private steps over all rounds.
      noise_multiplier: standard deviation of the noise over the clip; it keeps all steps within epsilon.
      epsilon: epsilon that all steps spend together, at `delta`.
      delta: delta of the guarantee.
      relative_noise: noise in one entry of a step's mean over all sites, as a share of the clip.
    """

    rounds: int
    steps: int
    noise_multiplier: float
    epsilon: float
    delta: float
    relative_noise: float


@dataclass(frozen=True)
class Terms:
    """The terms of a job's privacy.

    Attributes:
      records: declared number of records of a site.
      sites: number of sites.
      rounds: number of rounds.
      local_steps: private steps of a site in one round.
      batch: expected number of records of a step.
      epsilon: privacy parameter of the whole job at each site.
      accountant: name in `privacy.accountants.ACCOUNTANTS`.
    """

    records: int
    sites: int
    rounds: int
    local_steps: int
    batch: int
    epsilon: float
    accountant: str = "rdp"


def privacy_rows(terms: Terms) -> tuple[PrivacyRow, ...]:
    """Returns one row for the planned rounds, and one for four times as many.

    The bound by RDP takes milliseconds; the job itself takes the smaller of two bounds, which needs a little less
    noise.

    Raises:
      PrivacyRefusal: a site has fewer records than twice the batch, or no noise meets the target.
      ConfigError: a number is out of its range.
    """
    if terms.records < 2 * terms.batch:
        raise PrivacyRefusal(
            f"records={terms.records}: fewer than twice the expected batch={terms.batch}, so sampling hides too "
            "little; lower --batch, or leave such a site out"
        )
    rate, delta = terms.batch / terms.records, public_delta(terms.records)
    rows = []
    for times in DOUBLINGS:
        steps = times * terms.rounds * terms.local_steps
        noise, epsilon = calibrated(terms.epsilon, delta, rate, steps, terms.accountant)
        relative = noise / (terms.batch * terms.sites**0.5)
        rows.append(PrivacyRow(times * terms.rounds, steps, noise, epsilon, delta, relative))
    return tuple(rows)
