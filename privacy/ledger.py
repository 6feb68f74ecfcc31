"""The privacy ledger of one data set: its spent epsilon over rounds and jobs, never more than its cap."""

import math
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from offsite.errors import ConfigError, DataError, PrivacyRefusal, lookup
from offsite.privacy.accountants import ACCOUNTANTS, check_delta
from offsite.privacy.events import Event, compose
from offsite.trust.chain import Chain, Link

_SPEND = "spend"
_LABEL = "offsite privacy ledger"
_REMEMBERED = 16  # sums are asked for again and again, and cost 40 ms per distinct mechanism


@dataclass(frozen=True)
class Spend:
    """One entry of the ledger.

    Attributes:
      number: place of the entry in the ledger, from 1.
      epsilon_before: epsilon that the data set had spent before this entry.
      epsilon_total: epsilon that the data set has spent with this entry.
      head: digest of this entry, the ledger's head after it, hexadecimal.
    """

    number: int
    epsilon_before: float
    epsilon_total: float
    head: str

    @property
    def epsilon_round(self) -> float:
        """Epsilon that this release added to the total."""
        return self.epsilon_total - self.epsilon_before


class Ledger:
    """The spent privacy of one data set, on disk.

    A debit is durable before it returns, and the caller releases only afterwards; so whatever is killed when, the
    recorded epsilon is at least the true one.

    Args:
      path: file of the chain.
      dataset: name of the data set; the ledger of another data set cannot take its place.
      epsilon_cap: largest total epsilon that releases may reach, > 0.
      delta: delta at which epsilon is computed, in (0, 1).
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
        def epsilon(events: tuple[Event, ...]) -> float:
            return account(events, delta)

        self._epsilon = epsilon

    def check(self, event: Event) -> float:
        """Returns the epsilon that the data set would have spent after one more release.

        Raises:
          PrivacyRefusal: this epsilon is above the cap.
          DataError: the ledger is damaged.
        """
        return self._checked(self._events(self._chain.links()), event)

    def debit(self, event: Event, *, job: str, round: int, now: datetime) -> Spend:
        """Enters a release, durably; only afterwards may the release leave.

        Raises:
          PrivacyRefusal: the total would be above the cap; nothing was entered.
          DataError: the ledger is damaged, or the disk is full.
        """
        with self._chain.locked() as file:
            before = self._events(self._chain.links_locked(file))
            total = self._checked(before, event)
            fields = {
                "job": job,
                "round": round,
                "noise_multiplier": event.noise_multiplier,
                "sample_rate": event.sample_rate,
                "steps": event.steps,
                "delta": self._delta,
                "epsilon_total": total,
            }
            link = self._chain.append_locked(file, _SPEND, fields, now=now)
        return Spend(link.number, self._epsilon(before), total, link.digest)

    def spent(self) -> float:
        """Returns the epsilon that the data set has spent."""
        return self._epsilon(self._events(self._chain.links()))

    def recorded(self) -> float:
        """Returns the epsilon that the data set has spent, as the newest entry records it.

        The number is that of `spent`, without the second that an accountant takes to load. Where the newest entry was
        made at another delta, the accountant computes the number after all.

        Raises:
          DataError: the ledger is damaged.
        """
        links = self._chain.links()
        events = self._events(links)
        if not links or links[-1].fields.get("delta") != self._delta:
            return self._epsilon(events)
        total = links[-1].fields.get("epsilon_total")
        if not isinstance(total, float | int) or isinstance(total, bool) or not math.isfinite(total):
            raise self._unknown(links[-1])
        return float(total)

    def releases(self, job: str) -> int:
        """Returns how many releases of one job were entered."""
        return sum(link.fields["job"] == job for link in self._chain.links())

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

    def _checked(self, before: tuple[Event, ...], event: Event) -> float:
        total = self._epsilon(tuple(compose([*before, event])))
        if total > self._cap:
            raise PrivacyRefusal(
                f"epsilon={total:.4g} after this release: the cap of data set {self.dataset!r} is {self._cap:g}, and "
                f"{self._epsilon(before):.4g} is spent; the owner may raise epsilon_cap in policy.toml"
            )
        return total

    def _events(self, links: list[Link]) -> tuple[Event, ...]:
        """Returns all spent events, equal mechanisms together; an entry that is not understood is never passed over."""
        events = []
        for link in links:
            try:
                if link.kind != _SPEND:
                    raise ValueError(link.kind)
                fields = link.fields
                events.append(Event(fields["noise_multiplier"], fields["sample_rate"], fields["steps"]))
            except (ValueError, KeyError, TypeError, ConfigError) as error:
                raise self._unknown(link) from error
        return tuple(compose(events))

    def _unknown(self, link: Link) -> DataError:
        return DataError(
            f"ledger of {self.dataset!r} entry {link.number} is unknown to this release; install the release that "
            "wrote the entry"
        )
