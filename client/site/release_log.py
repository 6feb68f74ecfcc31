"""The account of a site: every update that leaves is checked, entered and only then released."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np

from offsite.client.home.audit import Audit
from offsite.client.site import egress
from offsite.client.site.egress import EgressReport
from offsite.errors import PrivacyRefusal
from offsite.privacy.events import Event
from offsite.privacy.ledger import Ledger
from offsite.protos.codec import LedgerHead
from offsite.protos.job_manifest import JobManifest


@dataclass(frozen=True)
class Release:
    """One update that is about to leave.

    Attributes:
      round: number of the training round.
      event: privacy that the update spends; None without privacy.
      update: update, float32 (d,); only its norm is written down.
      upload_bytes: size of the vector that leaves, bytes.
    """

    round: int
    event: Event | None
    update: np.ndarray
    upload_bytes: int


class ReleaseLog(Protocol):
    """The account of one site for one job."""

    def check(self, event: Event | None) -> None:
        """Refuses, before any training, a release that would exceed a limit."""

    def release(self, release: Release) -> LedgerHead | None:
        """Enters a release durably, before it may leave; returns the ledger's newest entry, None without a ledger."""


def ledger_name(dataset: str) -> str:
    """Returns the name under which the coordinator knows a ledger; the name hides that of the data set."""
    return hashlib.sha256(dataset.encode()).hexdigest()


class CountingReleaseLog:
    """The account of a simulated site: it counts releases, so that the planned noise covers all releases.

    Args:
      planned: number of releases that the noise was calibrated for.
    """

    def __init__(self, planned: int) -> None:
        self._planned, self._released = planned, 0

    def check(self, event: Event | None) -> None:
        """Refuses a release beyond the planned number.

        Raises:
          PrivacyRefusal: all planned releases were made.
        """
        refuse_unplanned(self._released, self._planned)

    def release(self, release: Release) -> LedgerHead | None:
        """Counts a release; a simulation has no ledger."""
        self._released += 1
        return None


class LedgerReleaseLog:
    """The account of a real site: the ledger of its data set, and an egress report for each release.

    Args:
      ledger: privacy ledger of the data set.
      manifest: manifest of the job.
      audit: audit log of the site.
      clock: source of the time.
    """

    def __init__(self, ledger: Ledger, manifest: JobManifest, *, audit: Audit, clock: Callable[[], datetime]) -> None:
        self._ledger, self._manifest, self._audit, self._clock = ledger, manifest, audit, clock
        self._job = manifest.digest().hex()

    def check(self, event: Event | None) -> None:
        """Refuses, before training, a release that was not planned or that the data set cannot afford.

        Raises:
          PrivacyRefusal: the job has no privacy, all planned releases were made, the ledger has no reserve of the job
            that covers the release, or the release would exceed the cap.
        """
        refuse_unplanned(self._ledger.releases(self._job), self._manifest.releases)
        self._ledger.check(_private(event), job=self._job)

    def release(self, release: Release) -> LedgerHead | None:
        """Debits the ledger, then writes the egress report; both are on disk before the update may leave.

        Raises:
          PrivacyRefusal, RangeError, DataError: the update may not leave.
        """
        now = self._clock()
        refuse_unplanned(self._ledger.releases(self._job), self._manifest.releases)
        spend = self._ledger.debit(_private(release.event), job=self._job, round=release.round, now=now)
        layout = self._manifest.upload_layout(release.round)
        report = EgressReport(
            job=self._job,
            round=release.round,
            tensors=tuple(zip(layout.names, layout.shapes, strict=True)),
            upload_bytes=release.upload_bytes,
            norm=float(np.linalg.norm(release.update.astype(np.float64))),
            epsilon_round=spend.epsilon_round,
            epsilon_total=spend.epsilon_total,
            delta=spend.delta,
        )
        egress.release(report, layout, self._audit, now=now)
        return LedgerHead(ledger_name(self._ledger.dataset), spend.number, spend.head)


def _private(event: Event | None) -> Event:
    if event is None:
        raise PrivacyRefusal("private=false: a real site releases nothing without differential privacy; switch it on")
    return event


def refuse_unplanned(released: int, planned: int) -> None:
    """Checks that the noise of a job was planned for one more release.

    Raises:
      PrivacyRefusal: all planned releases were made.
    """
    if released >= planned:
        raise PrivacyRefusal(
            f"releases={released}: the noise of this job was planned for {planned} and covers no more; "
            "go on with the next job, or set training.spare_rounds"
        )
