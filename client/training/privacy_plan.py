"""The privacy plan of one site: sampling, noise and epsilon, computed here and never taken from a message."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from offsite.errors import PrivacyRefusal
from offsite.privacy.accountants import taken
from offsite.privacy.calibrate import calibrated, public_delta
from offsite.privacy.events import Event
from offsite.protos.job_manifest import JobManifest, PrivacyTerms

if TYPE_CHECKING:
    from offsite.privacy.mechanism import DpSgdConfig


@dataclass(frozen=True)
class SitePlan:
    """The DP numbers of one site for a whole job.

    Attributes:
      records: number of records, which the site's owner has declared public.
      sample_rate: chance q of each record to be in a batch, expected batch / records.
      delta: delta of the guarantee, min(1e-6, 1 / (100 records)), or the owner's delta_cap where that is smaller.
      noise_multiplier: standard deviation sigma of the noise over `max_grad_norm`; 0 without privacy.
      epsilon: epsilon that all steps spend together; infinite without privacy.
      steps: number of DP-SGD steps over all rounds, spare rounds included.
    """

    records: int
    sample_rate: float
    delta: float
    noise_multiplier: float
    epsilon: float
    steps: int

    @property
    def event(self) -> Event:
        """All steps of the job together.

        Raises:
          ConfigError: the job has no privacy.
        """
        return Event(self.noise_multiplier, self.sample_rate, self.steps)

    def statement(self, accountant: str) -> str:
        """Returns what the whole job spends in words, with the accounting that gives the bound.

        Args:
          accountant: key of `privacy.accountants.ACCOUNTANTS`.
        """
        if not self.noise_multiplier:
            return "no privacy: epsilon is infinite"
        return f"epsilon {self.epsilon:.3f} at delta {self.delta:.3g} by {taken(accountant, [self.event], self.delta)}"


def plan_for(manifest: JobManifest, records: int, *, delta_cap: float = 1.0) -> SitePlan:
    """Returns the plan of a site with so many declared records.

    Args:
      manifest: manifest of the job.
      records: public number of records.
      delta_cap: largest delta that the owner permits.

    Raises:
      PrivacyRefusal: the site has fewer records than twice the expected batch, so that Poisson sampling would hide too
        little; or no noise meets the target.
    """
    terms = manifest.privacy
    check_batch(terms, records)
    rate, delta, steps = terms.batch / records, min(public_delta(records), delta_cap), manifest.steps
    if not terms.private:
        return SitePlan(records, rate, delta, 0.0, float("inf"), steps)
    sigma, epsilon = calibrated(terms.epsilon, delta, rate, steps, terms.accountant)
    return SitePlan(records, rate, delta, sigma, epsilon, steps)


def check_batch(terms: PrivacyTerms, records: int) -> None:
    """Checks that a site has records enough for the expected batch.

    Raises:
      PrivacyRefusal: the site has fewer records than twice the expected batch.
    """
    if records < 2 * terms.batch:
        raise PrivacyRefusal(
            f"records={records}: fewer than twice the expected batch={terms.batch}, so sampling hides too little; "
            "lower training.batch or leave this site out"
        )


def round_terms(manifest: JobManifest, plan: SitePlan, engine: str) -> "DpSgdConfig":
    """Returns the terms of one round's training."""
    from offsite.privacy.mechanism import DpSgdConfig  # needs torch, and an approval makes a plan without

    return DpSgdConfig(
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=manifest.privacy.max_grad_norm,
        sample_rate=plan.sample_rate,
        expected_batch_size=manifest.privacy.batch,
        steps=manifest.local_steps,
        learning_rate=manifest.learning_rate,
        physical_batch=manifest.physical_batch,
        engine=engine,
        private=manifest.privacy.private,
    )
