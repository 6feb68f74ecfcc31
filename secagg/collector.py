"""The coordinator's side of a round: it relays, adds, and learns the sum.

Every rule that protects a site is checked by the site; what is checked here keeps one bad site from spoiling the round
for the others. Memory is one accumulator and the upload that is being added.
"""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from offsite.errors import MalformedMessage, ProtocolViolation, TooFewSurvivors
from offsite.secagg import agreement, mask, messages, ring
from offsite.secagg.agreement import Agreed
from offsite.secagg.messages import KEYS, MASK_KEY, MASKED, SELF_MASK, SHARES, SURVIVORS, UNMASK, Signed
from offsite.secagg.params import SecAggParams
from offsite.secagg.recovery import Recovery

T = TypeVar("T")
_DONE = "done"
_ORDER = (KEYS, SHARES, MASKED, SURVIVORS, UNMASK, _DONE)


@dataclass(frozen=True)
class Sum:
    """The sum of the survivors' updates.

    Attributes:
      ring: (d,) uint32, exact sum modulo 2**32.
      members: the sites in it, sorted.
      decoded: (d,) float64, the sum in units of an update.
    """

    ring: NDArray[np.uint32]
    members: tuple[str, ...]
    decoded: NDArray[np.float64]


class Collector:
    """The coordinator in one round.

    A message that breaks a rule raises `ProtocolViolation` and changes nothing, so the caller drops that site and goes
    on. Reading the outcome of a step (`roster`, `inbox`, `announcement`, `signatures`) ends that step.
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
        """Sites still in the round: those of the last step that ended, sorted."""
        sets: dict[str, Collection[str]] = {KEYS: self._terms.sites, SHARES: self._keys, MASKED: self._sealed}
        return tuple(sorted(sets.get(self._stage, self._digests)))

    @property
    def dropped(self) -> tuple[str, ...]:
        """Invited sites that are not in the round any more, sorted."""
        return tuple(sorted(set(self._terms.sites) - set(self.members)))

    @property
    def faulty(self) -> tuple[str, ...]:
        """Sites whose share did not fit the polynomial that the others agree on; the sum went on without them."""
        return tuple(sorted(self._faulty))

    def add_keys(self, message: Signed) -> None:
        """Takes the signed keys of a site.

        Raises:
          ProtocolViolation: not invited, not signed for these terms, a low-order or repeated point, or sent twice.
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
        """Ends the keys step and returns the signed keys of U1, for every site in it.

        Raises:
          TooFewSurvivors: fewer sites than the threshold or n_min.
        """
        if self._end(KEYS, len(self._keys), self._terms.fewest):
            self._agreed = agreement.agree(self._terms, list(self._keys.values()))
        return [self._keys[site] for site in sorted(self._keys)]

    def add_shares(self, message: Signed) -> None:
        """Takes the sealed shares of a site of U1.

        Raises:
          ProtocolViolation: not in U1, not signed for T1, not one ciphertext per peer, or sent twice.
        """
        self._check(SHARES, message, self._keys, self._sealed)
        sealed = _parsed(message, lambda: messages.read_sealed(message.body))
        if sealed.keys() != self._keys.keys() - {message.sender}:
            raise ProtocolViolation(f"sender={message.sender!r} did not seal a share for every peer; drop the site")
        self._sealed[message.sender] = message

    def inbox(self, site: str) -> list[Signed]:
        """Ends the shares step and returns the shares messages of U2 that a site of it reads.

        Raises:
          TooFewSurvivors: fewer sites than the threshold or n_min.
          ProtocolViolation: the site is not in U2.
        """
        self._end(SHARES, len(self._sealed), self._terms.fewest)
        if site not in self._sealed:
            raise ProtocolViolation(f"site={site!r} sent no shares and has no inbox; it is out of this round")
        return [self._sealed[peer] for peer in sorted(self._sealed) if peer != site]

    def add_masked(self, message: Signed, vector: NDArray[np.uint32]) -> None:
        """Adds the masked upload of a site of U2 to the accumulator; the vector can be freed afterwards.

        Args:
          message: the signed SHA-256 of the upload.
          vector: (d,) uint32; read only.

        Raises:
          ProtocolViolation: not in U2, not signed for T1, another vector than was signed, or sent twice.
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
          TooFewSurvivors: fewer sites than the threshold or n_min.
        """
        if self._end(MASKED, len(self._digests), self._terms.fewest):
            self._announcement = messages.write_announcement(self._agreed.transcript, self._digests)
        return self._announcement

    def add_survivors(self, message: Signed) -> None:
        """Takes a survivor's signature on the announcement.

        Raises:
          ProtocolViolation: not in U3, not signed for T1, another set, or sent twice.
        """
        self._check(SURVIVORS, message, self._digests, self._signed)
        if message.body != hashlib.sha256(self._announcement).digest():
            raise ProtocolViolation(f"sender={message.sender!r} signed another survivor set; drop the message")
        self._signed[message.sender] = message

    def signatures(self) -> list[Signed]:
        """Ends the survivors step and returns the signatures on the survivor set.

        Raises:
          TooFewSurvivors: fewer signatures than the threshold.
        """
        self._end(SURVIVORS, len(self._signed), self._terms.threshold)
        return [self._signed[site] for site in sorted(self._signed)]

    def add_unmask(self, message: Signed) -> None:
        """Takes the shares that a survivor releases.

        Raises:
          ProtocolViolation: not in U3, not signed for T1, a share of the wrong kind or site, or sent twice.
        """
        self._check(UNMASK, message, self._digests, self._released)
        released = _parsed(message, lambda: messages.read_released(message.body))
        wanted = {site: SELF_MASK if site in self._digests else MASK_KEY for site in self._sealed}
        if {site: kind for site, (kind, _) in released.items()} != wanted:
            raise ProtocolViolation(
                f"sender={message.sender!r} released other shares than were asked; drop the message"
            )
        self._released[message.sender] = released

    def sum(self) -> Sum:
        """Reconstructs what the survivors released, takes the masks off and returns the sum of their updates.

        Raises:
          TooFewSurvivors: fewer answers than the threshold; more may still be added.
          ProtocolViolation: a reconstructed secret is not the announced one; more answers may still be added.
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
        messages.check(public, step, self._agreed.transcript, message)

    def _expect(self, step: str) -> None:
        if self._stage != step:
            raise ProtocolViolation(f"step={step} while the round is at step={self._stage}; drop the message")

    def _end(self, step: str, count: int, needed: int) -> bool:
        """Ends a step when it is the current one; says whether it did."""
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
