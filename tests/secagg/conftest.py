"""A federation in one process: real members, real messages, one collector, and sites that vanish on command."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offsite.secagg.collector import Collector, Sum
from offsite.secagg.journal import MemoryJournal
from offsite.secagg.member import Member
from offsite.secagg.params import SecAggParams
from offsite.secagg.signed_bodies import Signed
from offsite.trust.identity import Identity

STEPS = ("keys", "shares", "masked", "survivors", "unmask")


class Federation:
    """n sites "a", "b", ... with updates of `length` values within the clip; every message passes through here."""

    def __init__(self, n: int, *, length: int = 5, clip: float = 1.0, seed: int = 0, **changes: Any) -> None:
        self.sites = tuple(f"{chr(97 + place % 26)}{place // 26}" for place in range(n))
        self.sites = tuple(sorted(self.sites))
        self.identities = {site: Identity.generate() for site in self.sites}
        self.journals = {site: MemoryJournal() for site in self.sites}
        roster = tuple((site, self.identities[site].public) for site in self.sites)
        digests = {
            name: bytes([place]) * 32 for place, name in enumerate(("manifest", "emulator", "adapter", "config"))
        }
        self.terms = SecAggParams(
            federation="ward",
            epoch=1,
            round=1,
            nonce=bytes(16),
            roster=roster,
            n_min=max(3, n // 3 + 2),
            accomplices=n // 3,
            length=length,
            clip=clip,
            **digests,
        )
        self.terms = replace(self.terms, **changes)
        self.generator = np.random.default_rng(seed)
        self.updates = {
            site: self.generator.uniform(-clip, clip, length).astype(np.float32).clip(-clip, clip)
            for site in self.sites
        }
        self.open(self.terms)

    def open(self, terms: SecAggParams) -> None:
        """Starts a round with fresh members under the same identities and journals."""
        self.terms = terms
        self.members = {site: self.member(site) for site in self.sites}
        self.collector = Collector(terms)
        self.sent: dict[str, dict[str, Signed]] = {step: {} for step in STEPS}
        self.uploads: dict[str, np.ndarray] = {}
        self.announcement = b""

    def member(self, site: str, *, terms: SecAggParams | None = None, minimum: int = 3) -> Member:
        return Member(terms or self.terms, site, self.identities[site], self.journals[site], minimum=minimum)

    def rounding(self, site: str) -> Callable[[int], np.ndarray]:
        """Returns the same draws for a site every time, so that a reference can repeat them."""
        return np.random.default_rng(self.sites.index(site)).random

    def keys(self, sites: Collection[str] | None = None) -> list[Signed]:
        for site in self.sites if sites is None else sites:
            message = self.members[site].keys(self.updates[site], rounding=self.rounding(site))
            self.sent["keys"][site] = message
            self.collector.add_keys(message)
        return self.collector.roster()

    def shares(self, sites: Collection[str] | None = None) -> None:
        roster = self.collector.roster()
        for site in self.sent["keys"] if sites is None else sites:
            self.sent["shares"][site] = self.members[site].shares(roster)
            self.collector.add_shares(self.sent["shares"][site])

    def masked(self, sites: Collection[str] | None = None) -> bytes:
        for site in self.sent["shares"] if sites is None else sites:
            self.sent["masked"][site], self.uploads[site] = self.members[site].masked(self.collector.inbox(site))
            self.collector.add_masked(self.sent["masked"][site], self.uploads[site])
        self.announcement = self.collector.announcement()
        return self.announcement

    def survivors(self, sites: Collection[str] | None = None) -> list[Signed]:
        for site in self.sent["masked"] if sites is None else sites:
            self.sent["survivors"][site] = self.members[site].survivors(self.announcement)
            self.collector.add_survivors(self.sent["survivors"][site])
        return self.collector.signatures()

    def unmask(self, sites: Collection[str] | None = None) -> Sum:
        signatures = self.collector.signatures()
        for site in self.sent["survivors"] if sites is None else sites:
            self.sent["unmask"][site] = self.members[site].unmask(signatures)
            self.collector.add_unmask(self.sent["unmask"][site])
        return self.collector.sum()

    def until(self, step: str) -> "Federation":
        """Takes all steps before this one with every site."""
        for name in STEPS[: STEPS.index(step)]:
            getattr(self, name)()
        return self

    def run(self, vanish: Mapping[str, str] | None = None) -> Sum:
        """Takes all steps; a site in `vanish` sends nothing from that step on."""
        gone = {site: STEPS.index(step) for site, step in (vanish or {}).items()}
        result = None
        for place, step in enumerate(STEPS):
            result = getattr(self, step)([site for site in self.sites if gone.get(site, 9) > place])
        assert isinstance(result, Sum)
        return result


@pytest.fixture
def federation() -> type[Federation]:
    return Federation
