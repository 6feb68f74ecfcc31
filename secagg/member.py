"""A site's side of a round: five steps, each once, in order, after which no secret is left.

Bonawitz et al. 2017, section 4, figure 4, with the signed keys and the consistency round of the active-security form.
The class does no input or output besides the journal. Python cannot wipe memory: secrets are only dropped, so a process
per round is the sure way.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from secrets import randbelow

import numpy as np
from numpy.typing import NDArray

from offsite.errors import ConfigError, MalformedMessage, ProtocolViolation, TooFewSurvivors
from offsite.secagg import agreement, mask, ring, shamir, signed_bodies
from offsite.secagg.agreement import Agreed
from offsite.secagg.journal import Journal
from offsite.secagg.params import SecAggParams
from offsite.secagg.signed_bodies import KEYS, MASK_KEY, MASKED, SELF_MASK, SHARES, SURVIVORS, UNMASK, Signed
from offsite.trust.collusion import MIN_SITES
from offsite.trust.identity import Identity

_ORDER = (KEYS, SHARES, MASKED, SURVIVORS, UNMASK)
_SPENT = "spent"


@dataclass(repr=False)
class _Secrets:
    """Everything that must not outlive the round."""

    vector: NDArray[np.uint32] | None = None
    channel: int = 0
    mask: int = 0
    seed: int = 0
    channels: dict[str, bytes] = field(default_factory=dict)
    pairs: dict[str, bytes] = field(default_factory=dict)
    held: dict[str, tuple[int, int]] = field(default_factory=dict)


class Member:
    """One site in one round.

    Any call out of order and any message that breaks a rule raises, drops all secrets and ends the member's part.

    Args:
      terms: terms to which this site agreed, from its own copy of the manifest.
      site: id of this site in the roster.
      identity: this site's long-term key.
      journal: this site's durable memory of rounds and uploads.
      minimum: fewest sites in a sum by this site's own policy, >= 3; the strictest floor wins.

    Raises:
      ProtocolViolation: the site is not invited under this key.
      ConfigError: the minimum is below 3 or above the number of invited sites.
    """

    def __init__(
        self, terms: SecAggParams, site: str, identity: Identity, journal: Journal, *, minimum: int = MIN_SITES
    ) -> None:
        if terms.public_key(site) != identity.public:
            raise ProtocolViolation(f"site={site!r} is not invited under this key; compare the manifest with the key")
        if not MIN_SITES <= minimum <= len(terms.roster):
            raise ConfigError(
                f"minimum={minimum} with invited={len(terms.roster)}; {MIN_SITES} <= minimum <= invited; "
                "change the policy"
            )
        self.site = site
        self._terms = terms
        self._identity = identity
        self._journal = journal
        self._min_sites = max(terms.min_sites, minimum)
        self._next = KEYS
        self._secrets = _Secrets()
        self._keys: Signed | None = None
        self._agreed = Agreed(b"", {})
        self._update = self._upload = self._announced = b""
        self._survivors: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Member(site={self.site!r}, next={self._next!r})"

    def keys(self, update: NDArray[np.float32], *, rounding: ring.Rounding | None = None) -> Signed:
        """Enters the round: claims it in the journal, encodes the update, then makes the ephemeral keys.

        Args:
          update: float32 (d,), finite and within the clip of the terms.
          rounding: source of uniform numbers in [0, 1) for the stochastic rounding of a simulation; None for fresh
            ones.

        Raises:
          RangeError: the update may not be sent; no key was made.
          ProtocolViolation: the round is not newer than the last round, or the step is out of order.
        """
        with self._step(KEYS):
            terms, secret = self._terms, self._secrets
            self._journal.claim(terms.federation, terms.epoch, terms.round)
            secret.vector = ring.encode(
                update, clip=terms.clip, members=len(terms.roster), randomness=rounding, length=terms.length
            )
            self._update = hashlib.sha256(np.ascontiguousarray(update).data).digest()
            secret.channel, secret.mask = agreement.new_scalar(), agreement.new_scalar()
            secret.seed = randbelow(shamir.ORDER)
            body = signed_bodies.Keys(
                channel=agreement.public_of(secret.channel),
                mask=agreement.public_of(secret.mask),
                commitment=agreement.commit(terms, self.site, secret.seed),
            ).to_bytes()
            self._keys = signed_bodies.sign(self._identity, KEYS, terms.t0(), self.site, body)
            return self._keys

    def shares(self, roster: Sequence[Signed]) -> Signed:
        """Checks the signed keys of U1, fixes T1 and seals a share of both secrets to every peer.

        Raises:
          ProtocolViolation: a message is not valid, or this site's own message is missing or changed.
          TooFewSurvivors: U1 is smaller than the threshold or a floor.
        """
        with self._step(SHARES):
            agreed = self._agreed = agreement.agree(self._terms, roster)
            self._enough(len(agreed.keys), "keys")
            if self._keys not in roster:
                raise ProtocolViolation(f"site={self.site!r} does not find its own keys in the roster; leave the round")
            self._exchange(agreed)
            sealed = self._seal(agreed)
            self._secrets.channel = self._secrets.mask = 0
            return self._sign(SHARES, signed_bodies.write_sealed(sealed))

    def masked(self, inbox: Sequence[Signed]) -> tuple[Signed, NDArray[np.uint32]]:
        """Opens the peers' shares, fixes U2, marks the update as spent and returns it under all masks.

        Returns:
          The signed SHA-256 of y, and y: (d,) uint32 = update + PRG(self) +- sum of PRG(pair) modulo 2**32.

        Raises:
          ProtocolViolation: a share is not for this site, or the update was uploaded before.
          TooFewSurvivors: U2 is smaller than the threshold or a floor.
        """
        with self._step(MASKED):
            secret, transcript = self._secrets, self._agreed.transcript
            for message in inbox:
                self._open(message)
            self._enough(len(secret.held), "shares")
            self._journal.spend(self._update)
            own = agreement.self_key(secret.seed, transcript, self.site)
            pairs = {peer: secret.pairs[peer] for peer in secret.held if peer != self.site}
            vector, secret.vector, secret.pairs, secret.seed = secret.vector, None, {}, 0
            assert vector is not None  # noqa: S101 - set by keys(), which the order of steps guarantees
            # The site with the lower id adds and the other subtracts, so the pair cancels in the sum.
            mask.apply(
                vector,
                added=[own, *(key for peer, key in pairs.items() if self.site < peer)],
                subtracted=[key for peer, key in pairs.items() if self.site > peer],
            )
            self._upload = ring.digest(vector)
            return self._sign(MASKED, self._upload), vector

    def survivors(self, announcement: bytes) -> Signed:
        """Checks the survivor set U3 that the coordinator announces and signs it; a site signs at most one set.

        Raises:
          ProtocolViolation: the set is of another round, names a site outside U2, or lacks this site or its own upload.
          TooFewSurvivors: U3 is smaller than the threshold or a floor.
        """
        with self._step(SURVIVORS):
            transcript, digests = signed_bodies.read_announcement(announcement)
            if transcript != self._agreed.transcript:
                raise ProtocolViolation(
                    "survivors announced for another transcript; sites saw different keys; stop here"
                )
            if not digests.keys() <= self._secrets.held.keys():
                raise ProtocolViolation("survivors name a site whose shares never came; U3 lies in U2; stop here")
            if digests.get(self.site) != self._upload:
                raise ProtocolViolation(f"survivors lack site={self.site!r} with the upload it sent; leave the round")
            self._enough(len(digests), "survivors")
            self._survivors = tuple(digests)
            self._announced = hashlib.sha256(announcement).digest()
            return self._sign(SURVIVORS, self._announced)

    def unmask(self, signatures: Sequence[Signed]) -> Signed:
        """Checks that enough survivors signed the same set, releases one share per site of U2, and wipes the secrets.

        A site releases a survivor's self-mask share, or the mask-key share of a site that dropped, and never both of
        one site.

        Raises:
          ProtocolViolation: a signature is not valid, not on this set, not a survivor's, or occurs twice.
          TooFewSurvivors: fewer survivors than the threshold have signed.
        """
        with self._step(UNMASK):
            for message in signatures:
                self._check(UNMASK, message, self._survivors, step=SURVIVORS)
                if message.body != self._announced:
                    raise ProtocolViolation(f"sender={message.sender!r} signed another survivor set; stop here")
            signers = {message.sender for message in signatures}
            if len(signers) != len(signatures):
                raise ProtocolViolation("signatures repeat a site; each counts once; stop here")
            if len(signers) < self._terms.threshold:
                raise TooFewSurvivors(
                    f"signatures={len(signers)}; {self._terms.threshold} are needed; repeat the round"
                )
            released = {
                peer: (SELF_MASK, seed) if peer in self._survivors else (MASK_KEY, key)
                for peer, (seed, key) in self._secrets.held.items()
            }
            answer = self._sign(UNMASK, signed_bodies.write_released(released))
            self._wipe()
            return answer

    def _exchange(self, agreed: Agreed) -> None:
        secret = self._secrets
        channel, mask_key = agreement.private_of(secret.channel), agreement.private_of(secret.mask)
        for peer, keys in agreed.keys.items():
            if peer != self.site:
                secret.channels[peer] = agreement.exchange(channel, keys.channel, peer=peer)
                shared = agreement.exchange(mask_key, keys.mask, peer=peer)
                secret.pairs[peer] = agreement.pair_key(shared, agreed.transcript, self.site, peer)

    def _seal(self, agreed: Agreed) -> dict[str, bytes]:
        # Points are places in the invited roster, which T0 fixes, and not in the set that the coordinator forwards.
        points = {site: place for place, site in enumerate(self._terms.sites, start=1) if site in agreed.keys}
        threshold = self._terms.threshold
        seeds = shamir.split(self._secrets.seed, threshold=threshold, points=points.values())
        keys = shamir.split(self._secrets.mask, threshold=threshold, points=points.values())
        own = points.pop(self.site)
        self._secrets.held[self.site] = (seeds[own], keys[own])
        return {
            peer: agreement.seal(
                self._secrets.channels[peer], agreed.transcript, self.site, peer, (seeds[point], keys[point])
            )
            for peer, point in points.items()
        }

    def _open(self, message: Signed) -> None:
        sender = message.sender
        self._check(MASKED, message, self._agreed.keys, step=SHARES)
        if sender in self._secrets.held:
            raise ProtocolViolation(
                f"sender={sender!r} is in the inbox twice, or is this site; each peer sends once; stop here"
            )
        sealed = signed_bodies.read_sealed(message.body)
        if sealed.keys() != self._agreed.keys.keys() - {sender}:
            raise ProtocolViolation(
                f"sender={sender!r} did not seal a share for every peer; drop that site and repeat the round"
            )
        self._secrets.held[sender] = agreement.unseal(
            self._secrets.channels.pop(sender), self._agreed.transcript, sender, self.site, sealed[self.site]
        )

    def _check(
        self, where: str, message: Signed, allowed: Sequence[str] | dict[str, signed_bodies.Keys], *, step: str
    ) -> None:
        public = self._terms.public_key(message.sender)
        if public is None or message.sender not in allowed:
            raise ProtocolViolation(f"sender={message.sender!r} has no place in step={where}; stop here")
        signed_bodies.check(public, step, self._agreed.transcript, message)

    def _sign(self, step: str, body: bytes) -> Signed:
        return signed_bodies.sign(self._identity, step, self._agreed.transcript, self.site, body)

    def _enough(self, count: int, what: str) -> None:
        if count < self._min_sites:
            raise TooFewSurvivors(
                f"{what}={count} sites; this site needs {self._min_sites}; repeat the round with more"
            )

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        if self._next != name:
            expected, self._next = self._next, _SPENT
            self._wipe()
            raise ProtocolViolation(
                f"step={name} while next={expected}; each step is taken once, in order; start a new round"
            )
        self._next = _SPENT
        try:
            yield
        except MalformedMessage as error:
            self._wipe()
            raise ProtocolViolation(str(error)) from error
        except BaseException:
            self._wipe()
            raise
        place = _ORDER.index(name) + 1
        self._next = _ORDER[place] if place < len(_ORDER) else _SPENT

    def _wipe(self) -> None:
        self._secrets = _Secrets()
