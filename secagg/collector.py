"""The coordinator's side of a round: it relays, adds, and learns the sum.

Every rule that protects a site is checked by the site; what is checked here keeps one bad site from spoiling the round
for the others. The collector holds one accumulator and the upload that it is adding.
"""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from offsite.errors import MalformedMessage, ProtocolViolation, TooFewSurvivors
from offsite.secagg import agreement, mask, ring, signed_bodies
from offsite.secagg.agreement import Agreed
from offsite.secagg.params import SecAggParams
from offsite.secagg.recovery import Recovery
from offsite.secagg.signed_bodies import KEYS, MASK_KEY, MASKED, SELF_MASK, SHARES, SURVIVORS, UNMASK, Signed

T = TypeVar("T")
_DONE = "done"
_ORDER = (KEYS, SHARES, MASKED, SURVIVORS, UNMASK, _DONE)


@dataclass(frozen=True)
class Sum:
    """The sum of the survivors' updates.

    Attributes:
      ring: exact sum modulo 2**32, uint32 (d,).
      members: sites in the sum, sorted.
      decoded: sum in units of an update, float64 (d,).
    """

    ring: NDArray[np.uint32]
    members: tuple[str, ...]
    decoded: NDArray[np.float64]


class Collector:
    """The coordinator in one round.

    A message that breaks a rule raises `ProtocolViolation` and changes nothing, so the caller drops that site and goes
    on. Reading the outcome of a step (`roster`, `inbox`, `announcement`, `signatures`) ends that step.

    Args:
      terms: public terms of the round.
    """

    def __init__(self, terms: SecAggParams) -> None:
        self._terms = terms
        self._stage = KEYS
        self._keys: dict[str, Signed] = {}
        self._points: set[bytes] = set()
        self._probe = agreement.private_of(agreement.new_scalar())
        self._agreed = Agreed(b"", {})
        self._sealed: dict[str, Signed] = {}
        self._digests: dict[str, bytes] = {}
        self._total: NDArray[np.uint32] = np.zeros(terms.length, dtype=np.uint32)
        self._announcement = b""
        self._signed: dict[str, Signed] = {}
        self._released: dict[str, dict[str, tuple[bytes, int]]] = {}
        self._faulty: set[str] = set()
        self._sum: Sum | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """Sites still in the round, sorted: the sites of the last step that ended."""
        sets: dict[str, Collection[str]] = {KEYS: self._terms.sites, SHARES: self._keys, MASKED: self._sealed}
        return tuple(sorted(sets.get(self._stage, self._digests)))

    @property
    def dropped(self) -> tuple[str, ...]:
        """Invited sites that are no longer in the round, sorted."""
        return tuple(sorted(set(self._terms.sites) - set(self.members)))

    @property
    def faulty(self) -> tuple[str, ...]:
        """Sites whose share did not fit the polynomial on which the others agree; the sum left these shares out."""
        return tuple(sorted(self._faulty))

    def add_keys(self, message: Signed) -> None:
        """Takes the signed keys of a site.

        Raises:
          ProtocolViolation: the site is not invited, or its message is not signed for these terms, has a low-order or
            repeated point, or was sent before.
        """
        self._expect(KEYS)
        keys = _parsed(message, lambda: agreement.check_keys(self._terms, message))
        points = {keys.channel, keys.mask}
        for point in points:  # a member would refuse the whole roster over it
            agreement.exchange(self._probe, point, peer=message.sender)
        if message.sender in self._keys or len(points) != 2 or points & self._points:
            raise ProtocolViolation(f"sender={message.sender!r} repeats a key or a message; drop the message")
        self._points |= points
        self._keys[message.sender] = message

    def roster(self) -> list[Signed]:
        """Ends the keys step and returns the signed keys of U1, for every site in U1.

        Raises:
          TooFewSurvivors: U1 has fewer sites than the threshold or n_min.
        """
        if self._end(KEYS, len(self._keys), self._terms.min_sites):
            self._agreed = agreement.agree(self._terms, list(self._keys.values()))
        return [self._keys[site] for site in sorted(self._keys)]

    def add_shares(self, message: Signed) -> None:
        """Takes the sealed shares of a site of U1.

        Raises:
          ProtocolViolation: the site is not in U1, or its message is not signed for T1, does not hold exactly one
            ciphertext per peer, or was sent before.
        """
        self._check(SHARES, message, self._keys, self._sealed)
        sealed = _parsed(message, lambda: signed_bodies.read_sealed(message.body))
        if sealed.keys() != self._keys.keys() - {message.sender}:
            raise ProtocolViolation(f"sender={message.sender!r} did not seal a share for every peer; drop the site")
        self._sealed[message.sender] = message

    def inbox(self, site: str) -> list[Signed]:
        """Ends the shares step and returns the shares messages that a site of U2 reads.

        Raises:
          TooFewSurvivors: U2 has fewer sites than the threshold or n_min.
          ProtocolViolation: the site is not in U2.
        """
        self._end(SHARES, len(self._sealed), self._terms.min_sites)
        if site not in self._sealed:
            raise ProtocolViolation(f"site={site!r} sent no shares and has no inbox; it is out of this round")
        return [self._sealed[peer] for peer in sorted(self._sealed) if peer != site]

    def add_masked(self, message: Signed, vector: NDArray[np.uint32]) -> None:
        """Adds the masked upload of a site of U2 to the accumulator; the caller may free the vector afterwards.

        Args:
          message: signed SHA-256 of the upload.
          vector: the upload, uint32 (d,); read only.

        Raises:
          ProtocolViolation: the site is not in U2, or its message is not signed for T1, is the hash of another vector,
            or was sent before.
        """
        self._check(MASKED, message, self._sealed, self._digests)
        if vector.shape != self._total.shape or vector.dtype != np.uint32:
            raise ProtocolViolation(
                f"sender={message.sender!r} uploaded {vector.size} values of {vector.dtype}; "
                f"{self._total.size} of uint32 belong there; drop the upload"
            )
        if ring.digest(vector) != message.body:
            raise ProtocolViolation(f"sender={message.sender!r} signed the hash of another upload; drop the upload")
        self._total += vector
        self._digests[message.sender] = message.body

    def announcement(self) -> bytes:
        """Ends the masked step and returns the survivor set U3 with the hash of every upload.

        Raises:
          TooFewSurvivors: U3 has fewer sites than the threshold or n_min.
        """
        if self._end(MASKED, len(self._digests), self._terms.min_sites):
            self._announcement = signed_bodies.write_announcement(self._agreed.transcript, self._digests)
        return self._announcement

    def add_survivors(self, message: Signed) -> None:
        """Takes a survivor's signature on the announcement.

        Raises:
          ProtocolViolation: the site is not in U3, or its message is not signed for T1, names another set, or was sent
            before.
        """
        self._check(SURVIVORS, message, self._digests, self._signed)
        if message.body != hashlib.sha256(self._announcement).digest():
            raise ProtocolViolation(f"sender={message.sender!r} signed another survivor set; drop the message")
        self._signed[message.sender] = message

    def signatures(self) -> list[Signed]:
        """Ends the survivors step and returns the signatures on the survivor set.

        Raises:
          TooFewSurvivors: fewer survivors than the threshold have signed.
        """
        self._end(SURVIVORS, len(self._signed), self._terms.threshold)
        return [self._signed[site] for site in sorted(self._signed)]

    def add_unmask(self, message: Signed) -> None:
        """Takes the shares that a survivor releases.

        Raises:
          ProtocolViolation: the site is not in U3, or its message is not signed for T1, holds a share of the wrong kind
            or site, or was sent before.
        """
        self._check(UNMASK, message, self._digests, self._released)
        released = _parsed(message, lambda: signed_bodies.read_released(message.body))
        wanted = {site: SELF_MASK if site in self._digests else MASK_KEY for site in self._sealed}
        if {site: kind for site, (kind, _) in released.items()} != wanted:
            raise ProtocolViolation(
                f"sender={message.sender!r} released other shares than were asked; drop the message"
            )
        self._released[message.sender] = released

    def sum(self) -> Sum:
        """Reconstructs the released secrets, takes the masks off and returns the sum of the survivors' updates.

        Raises:
          TooFewSurvivors: fewer survivors than the threshold have answered; answers may still be added.
          ProtocolViolation: a reconstructed secret is not the announced secret; answers may still be added.
        """
        if self._sum is None:
            self._expect(UNMASK)
            added, subtracted = self._masks()
            self._stage = _DONE  # from here on the accumulator is changed and no second attempt is possible
            mask.apply(self._total, added=added, subtracted=subtracted)
            decoded = ring.decode(
                self._total, clip=self._terms.clip, members=len(self._terms.roster), summed=len(self._digests)
            )
            self._sum = Sum(self._total, tuple(sorted(self._digests)), decoded)
        return self._sum

    def _masks(self) -> tuple[list[bytes], list[bytes]]:
        """Returns the mask keys to add and to subtract, the reverse of what the members did."""
        recovery = Recovery(self._terms, self._agreed, self._released, self._faulty)
        survivors = sorted(self._digests)
        added: list[bytes] = []
        subtracted = [recovery.self_mask(site) for site in survivors]
        for site in self._sealed.keys() - self._digests.keys():
            for peer, key in recovery.pair_masks(site, survivors).items():
                (subtracted if peer < site else added).append(key)
        return added, subtracted

    def _check(self, step: str, message: Signed, allowed: Collection[str], before: Collection[str]) -> None:
        self._expect(step)
        public = self._terms.public_key(message.sender)
        if public is None or message.sender not in allowed:
            raise ProtocolViolation(f"sender={message.sender!r} has no place in step={step}; drop the message")
        if message.sender in before:
            raise ProtocolViolation(f"sender={message.sender!r} already sent step={step}; drop the second message")
        signed_bodies.check(public, step, self._agreed.transcript, message)

    def _expect(self, step: str) -> None:
        if self._stage != step:
            raise ProtocolViolation(f"step={step} while the round is at step={self._stage}; drop the message")

    def _end(self, step: str, count: int, needed: int) -> bool:
        """Ends a step if it is the current step; returns whether the step ended now."""
        if _ORDER.index(self._stage) > _ORDER.index(step):
            return False
        self._expect(step)
        if count < needed:
            raise TooFewSurvivors(f"{step}={count} sites; {needed} are needed; wait for more or repeat the round")
        self._stage = _ORDER[_ORDER.index(step) + 1]
        return True


def _parsed(message: Signed, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except MalformedMessage as error:
        raise ProtocolViolation(f"sender={message.sender!r} sent bytes that do not parse: {error}") from error
