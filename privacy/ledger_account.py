"""What the entries of a privacy ledger add up to: events that left, and steps that are set aside for jobs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from offsite.errors import ConfigError, PrivacyRefusal
from offsite.privacy.accountants import check_delta
from offsite.privacy.events import Event, compose
from offsite.trust.chain import Link

SPEND, RESERVE, CLOSE = "spend", "reserve", "close"


@dataclass
class LedgerAccount:
    """The state of a ledger after some of its entries.

    A job's reserve covers the whole job when it is opened; each release moves steps from the reserve to what is spent,
    and closing the reserve drops the rest. No release is entered without an open reserve that covers it, so a dropped
    rest can never be spent, and spent and reserved steps together never grow except by a reserve.

    Attributes:
      spent: events of all releases, equal mechanisms of one job together.
      open: steps that are still set aside, by job; a job whose steps are all spent has none.
      delta: smallest delta of any job that was reserved, 1 before the first.
    """

    spent: dict[tuple[str, float, float], int] = field(default_factory=dict)
    open: dict[str, Event | None] = field(default_factory=dict)
    delta: float = 1.0

    @classmethod
    def of(cls, links: Iterable[Link]) -> "LedgerAccount":
        """Returns the account of all entries.

        Raises:
          UnknownEntry: an entry is of no known kind, or lacks a number.
        """
        account = cls()
        for link in links:
            try:
                account._enter(link.kind, link.fields)
            except (ValueError, KeyError, TypeError, OverflowError, ConfigError) as error:
                raise UnknownEntry(link.number) from error
        return account

    def releases_of(self, job: str) -> tuple[Event, ...]:
        """Returns what the releases of one job have spent."""
        return tuple(Event(noise, rate, steps) for (name, noise, rate), steps in self.spent.items() if name == job)

    def spent_events(self) -> tuple[Event, ...]:
        """Returns all spent events, equal mechanisms together, in a fixed order."""
        return _composed(Event(noise, rate, steps) for (_, noise, rate), steps in self.spent.items())

    def committed_events(self) -> tuple[Event, ...]:
        """Returns spent and reserved events, equal mechanisms together, in a fixed order."""
        return _composed([*self.spent_events(), *(event for event in self.open.values() if event is not None)])

    def unreserved(self, whole: Event, job: str) -> Event | None:
        """Returns what a reserve of a whole job still has to set aside; None where all its steps are spent.

        Raises:
          PrivacyRefusal: the job has spent, or has reserved, with another mechanism.
        """
        earlier = [*self.releases_of(job), *([reserved] if (reserved := self.open.get(job)) is not None else [])]
        if any(not same_mechanism(event, whole) for event in earlier):
            raise PrivacyRefusal(
                f"job={job[:12]} noise_multiplier={whole.noise_multiplier:.6g} sample_rate={whole.sample_rate:.6g}: "
                "the ledger has this job with other numbers; did the declared number of records or delta_cap change? "
                "undo the change, or let the coordinator make a new job"
            )
        left = whole.steps - sum(event.steps for event in self.releases_of(job))
        return replace(whole, steps=left) if left > 0 else None

    def check_reserved(self, event: Event, job: str) -> None:
        """Checks that a job has a reserve that covers one more release.

        Raises:
          PrivacyRefusal: the job has no open reserve, or its reserve has other noise or too few steps.
        """
        reserved = self.open.get(job)
        if reserved is None or not same_mechanism(reserved, event) or reserved.steps < event.steps:
            raise PrivacyRefusal(
                f"job={job[:12]} steps={event.steps}: the ledger has no reserve of this job that covers them; approve "
                "the job, or let the coordinator offer it again"
            )

    def spend(self, event: Event, job: str) -> None:
        """Counts a release, and takes its steps out of its job's reserve.

        An entry that an older release of offsite wrote has no reserve, and counts in full.
        """
        key = (job, event.noise_multiplier, event.sample_rate)
        self.spent[key] = self.spent.get(key, 0) + event.steps
        reserved = self.open.get(job)
        if reserved is not None and same_mechanism(reserved, event):
            left = reserved.steps - event.steps
            self.open[job] = replace(reserved, steps=left) if left > 0 else None

    def _enter(self, kind: str, fields: Mapping[str, object]) -> None:
        job = fields["job"]
        if not isinstance(job, str):
            raise TypeError(job)
        if kind == CLOSE:
            self.open.pop(job, None)
            return
        event = Event(fields["noise_multiplier"], fields["sample_rate"], fields["steps"])  # type: ignore[arg-type]
        if kind == SPEND:
            self.spend(event, job)
        elif kind == RESERVE:
            delta = float(fields["job_delta"])  # type: ignore[arg-type]
            check_delta(delta)
            self.open[job], self.delta = event, min(self.delta, delta)
        else:
            raise ValueError(kind)


class UnknownEntry(Exception):
    """An entry that this release does not understand; its number is the only argument."""


def same_mechanism(one: Event, other: Event) -> bool:
    """Says whether two events differ in their number of steps only."""
    return (one.noise_multiplier, one.sample_rate) == (other.noise_multiplier, other.sample_rate)


def _composed(events: Iterable[Event]) -> tuple[Event, ...]:
    return tuple(sorted(compose(events), key=lambda event: (event.noise_multiplier, event.sample_rate)))
