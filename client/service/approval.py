"""An owner's approval of a job: checked against policy, records and ledger, which then sets the whole job aside."""

from datetime import datetime

from offsite.client.home.approvals import DAYS, Approval
from offsite.client.home.declared_records import BLOCKS, check_count, places, read_records
from offsite.client.home.installation import SiteHome
from offsite.client.home.jobs import Jobs
from offsite.client.home.policy import Policy, permit_terms
from offsite.client.training.privacy_plan import SitePlan, plan_for
from offsite.errors import PolicyRefusal
from offsite.privacy.ledger import Ledger
from offsite.protos.job_manifest import JobManifest


def site_plan(policy: Policy, manifest: JobManifest, records: int) -> SitePlan:
    """Returns a job's plan at a site with so many declared records.

    Raises:
      PolicyRefusal: the number is below `min_records`.
      PrivacyRefusal: the number is too small for the job's batch, or no noise meets the job's epsilon.
    """
    if records < policy.min_records:
        raise PolicyRefusal(
            f"records={records}: policy.toml has min_records={policy.min_records}; add records or lower min_records"
        )
    return plan_for(manifest, records, delta_cap=policy.delta_cap)


def reserve(ledger: Ledger, manifest: JobManifest, plan: SitePlan, *, now: datetime) -> None:
    """Sets the whole job aside in the ledger; once more changes nothing.

    Raises:
      PrivacyRefusal: the cap does not cover the job, or the ledger has the job with other numbers.
      DataError: the ledger is damaged, or the disk is full.
    """
    job = manifest.digest().hex()
    ledger.reserve(plan.event, job=job, delta=plan.delta, records=plan.records, now=now)


def approve(home: SiteHome, digest: str, *, by: str, now: datetime, days: int = DAYS) -> tuple[Approval, SitePlan]:
    """Approves an inspected job after every check that its training makes, and returns the approval and the plan.

    The ledger sets the job aside first, so that a job is never approved without its privacy.

    Args:
      home: folder of the site.
      digest: digest of the job, all of its digits.
      by: login name of the person.
      now: current time.
      days: number of days for which the approval holds.

    Raises:
      UnknownName, Untrusted: no inspected job has this digest, or its signature does not hold.
      PolicyRefusal, PrivacyRefusal: policy, declared number or cap do not permit the job.
      ConfigError, DataError: the number of records is not declared, or the data hold another number.
    """
    jobs, policy = Jobs(home.state / "jobs"), home.read_policy()
    offered = jobs.inspect(jobs.digest_to_approve(digest), bytes.fromhex(home.federation().coordinator))
    manifest = offered.manifest
    permit_terms(policy, manifest, site=home.settings.name)
    number = places(home, manifest.split, manifest.task)
    if manifest.split != BLOCKS:
        check_count(home, len(read_records(home, manifest.task)))
    plan = site_plan(policy, manifest, number)
    reserve(home.ledger(policy), manifest, plan, now=now)
    return jobs.approve(offered.digest, by=by, now=now, days=days), plan


def withdraw(home: SiteHome, name: str, *, by: str, now: datetime) -> tuple[str, bool]:
    """Withdraws an approval and closes the job's reserve; returns the digest, and whether there was a reserve.

    Args:
      home: folder of the site.
      name: digest of the approved job, or the beginning of it.
      by: login name of the person.
      now: current time.

    Raises:
      UnknownName: no approved job, or more than one, begins with the name.
      DataError: the approval is withdrawn, and the audit log or the ledger cannot be written.
    """
    digest = Jobs(home.state / "jobs").withdraw(name, by=by, now=now)
    return digest, home.ledger(home.read_policy()).close(digest, now=now)
