"""The privacy ledger of one data set: epsilon spent and set aside over rounds and jobs, never more than its cap."""

import math
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from offsite.errors import ConfigError, DataError, PrivacyRefusal, lookup
from offsite.privacy.accountants import ACCOUNTANTS, check_delta
from offsite.privacy.events import Event
from offsite.privacy.ledger_account import CLOSE, RESERVE, SPEND, LedgerAccount, UnknownEntry
from offsite.trust.chain import Chain, Link

_LABEL = "offsite privacy ledger"
_REMEMBERED = 16  # sums are asked for again and again, and cost 40 ms per distinct mechanism


@dataclass(frozen=True)
class Spend:
    """One release in the ledger.

    Attributes:
      number: place of the entry in the ledger, from 1.
      epsilon_before: epsilon that the data set had spent before this entry.
      epsilon_total: epsilon that the data set has spent with this entry.
      delta: delta of both epsilons.
      head: digest of this entry, the ledger's head after it, hexadecimal.
    """

    number: int
    epsilon_before: float
    epsilon_total: float
    delta: float
    head: str

    @property
    def epsilon_round(self) -> float:
        """Epsilon that this release added to the total."""
        return self.epsilon_total - self.epsilon_before


@dataclass(frozen=True)
class Standing:
    """How a ledger stands.

    Attributes:
      spent: epsilon of all releases.
      committed: epsilon of all releases and of all that is set aside for approved jobs.
      delta: delta of both epsilons.
    """

    spent: float
    committed: float
    delta: float


class Ledger:
    """The privacy of one data set, spent and set aside, on disk.

    A whole job is set aside by `reserve` before it trains, and each release of it is taken from there by `debit`. A
    debit is durable before it returns, and the caller releases only afterwards; so whatever is killed when, the
    recorded epsilon is at least the true one. Every epsilon is counted at the smallest of the owner's delta and the
    deltas of all jobs that were ever reserved, so that the cap bounds what each job claims.

    Args:
      path: file of the chain.
      dataset: name of the data set; the ledger of another data set cannot take its place.
      epsilon_cap: largest total epsilon that releases and reserves may reach, > 0.
      delta: largest delta at which epsilon may be computed, in (0, 1).
      accountant: name in `privacy.accountants.ACCOUNTANTS`.

    Raises:
      ConfigError: cap or delta is out of its range.
      UnknownName: there is no such accountant.
    """

    def __init__(self, path: Path, *, dataset: str, epsilon_cap: float, delta: float, accountant: str) -> None:
        check_delta(delta)
        if not (math.isfinite(epsilon_cap) and epsilon_cap > 0):  # a comparison with NaN would permit everything
            raise ConfigError(f"epsilon_cap={epsilon_cap} must be finite and > 0; 8 is loose and 1 is strict")
        self._chain = Chain(path, f"{_LABEL} {dataset}")
        self.dataset, self._cap, self._delta = dataset, epsilon_cap, delta
        account = lookup(ACCOUNTANTS, accountant, "accountant")

        @lru_cache(maxsize=_REMEMBERED)
        def epsilon(events: tuple[Event, ...], delta: float) -> float:
            return account(events, delta)

        self._epsilon = epsilon

    def reserve(self, whole: Event, *, job: str, delta: float, records: int, now: datetime) -> None:
        """Sets a whole job aside, durably; what the job has spent or reserved already is not set aside again.

        Args:
          whole: all steps of the job.
          job: digest of the job manifest, hexadecimal.
          delta: delta that the job claims, in (0, 1).
          records: declared number of records, from which the numbers of the plan follow.
          now: current time.

        Raises:
          PrivacyRefusal: spent, reserved and this job together are above the cap, or the job is in the ledger with
            other numbers; nothing was entered.
          DataError: the ledger is damaged, or the disk is full.
        """
        check_delta(delta)
        with self._chain.locked() as file:
            account = self._account(self._chain.links_locked(file))
            left = account.unreserved(whole, job)
            if left is None:
                return
            entered = account.open.get(job) == left
            account.open[job], account.delta = left, min(account.delta, delta)
            self._check_cap(self._standing(account).committed, account, "with the whole job")
            if not entered:
                terms = {"job_delta": delta, "records": records}
                self._append(file, RESERVE, account, now, _event_fields(left, job) | terms)

    def close(self, job: str, *, now: datetime) -> bool:
        """Ends a job's reserve, durably, and says whether there was one; no release of the job can follow.

        The unspent rest returns to the data set, because no release is entered without an open reserve.

        Raises:
          DataError: the ledger is damaged, or the disk is full.
        """
        with self._chain.locked() as file:
            account = self._account(self._chain.links_locked(file))
            if job not in account.open:
                return False
            del account.open[job]
            self._append(file, CLOSE, account, now, {"job": job})
        return True

    def check(self, event: Event, *, job: str) -> float:
        """Returns the epsilon that the data set would have spent after one more release of a job.

        Raises:
          PrivacyRefusal: the job has no reserve that covers the release, or this epsilon is above the cap.
          DataError: the ledger is damaged.
        """
        account = self._account(self._chain.links())
        return self._checked(account, event, job)

    def debit(self, event: Event, *, job: str, round: int, now: datetime) -> Spend:
        """Enters a release, durably; only afterwards may the release leave.

        Raises:
          PrivacyRefusal: the job has no reserve that covers the release, or the total would be above the cap; nothing
            was entered.
          DataError: the ledger is damaged, or the disk is full.
        """
        with self._chain.locked() as file:
            account = self._account(self._chain.links_locked(file))
            before = self._standing(account)
            total = self._checked(account, event, job)
            link = self._append(file, SPEND, account, now, _event_fields(event, job) | {"round": round})
        return Spend(link.number, before.spent, total, before.delta, link.digest)

    def spent(self) -> float:
        """Returns the epsilon that the data set has spent."""
        return self._standing(self._account(self._chain.links())).spent

    def standing(self) -> Standing:
        """Returns what is spent and what is set aside, as the newest entry records both.

        The numbers are those of the accountant, without the second that an accountant takes to load. Where the newest
        entry was made at another delta or by an older release, the accountant computes them after all.

        Raises:
          DataError: the ledger is damaged.
        """
        links = self._chain.links()
        account = self._account(links)
        delta = self._delta_of(account)
        if not links or links[-1].fields.get("delta") != delta or "epsilon_committed" not in links[-1].fields:
            return self._standing(account)
        numbers: list[Any] = [links[-1].fields.get(name) for name in ("epsilon_total", "epsilon_committed")]
        for number in numbers:
            if not isinstance(number, float | int) or isinstance(number, bool) or not math.isfinite(number):
                raise self._unknown(links[-1].number)
        return Standing(float(numbers[0]), float(numbers[1]), delta)

    def reserved_jobs(self) -> frozenset[str]:
        """Returns the digests of the jobs that have an open reserve, also where all of it is spent."""
        return frozenset(self._account(self._chain.links()).open)

    def releases(self, job: str) -> int:
        """Returns how many releases of one job were entered."""
        return sum(link.kind == SPEND and link.fields["job"] == job for link in self._chain.links())

    def head(self) -> tuple[int, str]:
        """Returns the number of entries and the digest of the last."""
        return self._chain.head()

    def check_against(self, count: int, head: str) -> None:
        """Compares the ledger with a head that the coordinator countersigned.

        Raises:
          PrivacyRefusal: the ledger has fewer entries than the countersigned number, or another entry in that place.
        """
        links = self._chain.links()
        if count > len(links):
            raise PrivacyRefusal(
                f"ledger of {self.dataset!r} has {len(links)} entries, and the coordinator countersigned {count}: an "
                "old copy was restored; bring the newest back, since spent privacy does not come back"
            )
        if count and links[count - 1].digest != head:
            raise PrivacyRefusal(
                f"ledger of {self.dataset!r} entry {count} is not the entry that the coordinator countersigned; two "
                "copies of this site have run; bring the right copy back"
            )

    def _checked(self, account: LedgerAccount, event: Event, job: str) -> float:
        """Takes a release into an account, and returns the epsilon that is then spent."""
        account.check_reserved(event, job)
        account.spend(event, job)
        total = self._standing(account).spent
        self._check_cap(total, account, "after this release")
        return total

    def _check_cap(self, total: float, account: LedgerAccount, when: str) -> None:
        if total > self._cap:
            raise PrivacyRefusal(
                f"epsilon={total:.4g} {when} at delta={self._delta_of(account):.3g}: the cap of data set "
                f"{self.dataset!r} is {self._cap:g}; the owner may raise epsilon_cap in policy.toml, or withdraw a job"
            )

    def _append(self, file: int, kind: str, account: LedgerAccount, now: datetime, fields: dict[str, Any]) -> Link:
        """Adds an entry with the standing after it."""
        standing = self._standing(account)
        totals = {
            "delta": standing.delta,
            "epsilon_total": standing.spent,
            "epsilon_committed": standing.committed,
        }
        return self._chain.append_locked(file, kind, fields | totals, now=now)

    def _standing(self, account: LedgerAccount) -> Standing:
        delta = self._delta_of(account)
        spent, committed = account.spent_events(), account.committed_events()
        return Standing(self._epsilon(spent, delta), self._epsilon(committed, delta), delta)

    def _delta_of(self, account: LedgerAccount) -> float:
        return min(self._delta, account.delta)

    def _account(self, links: list[Link]) -> LedgerAccount:
        """Returns what all entries add up to; an entry that is not understood is never passed over."""
        try:
            return LedgerAccount.of(links)
        except UnknownEntry as error:
            raise self._unknown(error.args[0]) from error

    def _unknown(self, number: int) -> DataError:
        return DataError(
            f"ledger of {self.dataset!r} entry {number} is unknown to this release; install the release that "
            "wrote the entry"
        )


def _event_fields(event: Event, job: str) -> dict[str, Any]:
    return {
        "job": job,
        "noise_multiplier": event.noise_multiplier,
        "sample_rate": event.sample_rate,
        "steps": event.steps,
    }
