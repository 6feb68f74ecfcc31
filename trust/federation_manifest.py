"""The federation manifest: the members, their keys and the outer terms of every job; every owner signs it.

Every change makes a new epoch, which names the digest of the epoch before.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from offsite.errors import MalformedMessage, ProtocolViolation, Untrusted
from offsite.trust import canonical
from offsite.trust.certificates import EARLY, check_dates, fingerprint
from offsite.trust.collusion import MIN_SITES, fewest_in_sum, weaker_sentence
from offsite.trust.identity import KEY_BYTES, Identity, verify
from offsite.trust.keys import check_node_public
from offsite.trust.request import MAX_CONTACT, fingerprint_of
from offsite.trust.sealing import CLASSIC, HYBRID, PUBLIC_BYTES
from offsite.trust.wire import Writer

FORMAT, RING_BITS = 1, 32
MAX_SITES = 1000
DIGEST_BYTES = 32
_LABEL, _MEMBERS = "offsite federation", "offsite federation members"


@dataclass(frozen=True)
class FederationMember:
    """One site.

    Attributes:
      site: the site's name.
      identity: Ed25519 public key, hexadecimal.
      sealing: public sealing key, hexadecimal.
      node: P-384 public key for Flower, an OpenSSH line.
      tls: SHA-256 of the public key of the site's client certificate, hexadecimal.
      contact: person or office, and telephone number, as the site's request says; empty where the site gave none.
    """

    site: str
    identity: str
    sealing: str
    node: str
    tls: str
    contact: str

    @property
    def keys(self) -> tuple[str, str, str, str]:
        """Identity, sealing, node and TLS key; no two sites may share one of them."""
        return self.identity, self.sealing, self.node, self.tls


@dataclass(frozen=True)
class FederationManifest:
    """One epoch of a federation.

    Attributes:
      name: the federation's name.
      epoch: number of the epoch, from 1; every change adds 1.
      previous: digest of the epoch before, hexadecimal; empty in epoch 1.
      suite: suite of every sealing key, 1 or 2.
      n_min: fewest sites whose sum a job may open, at least 3 and at least accomplices + 2.
      accomplices: number of members that may help the coordinator without any update of another member being open to
        it, at least 0; with fewer than a third of the members, every owner's signature covers `weaker`.
      clip: largest `update_bound` that a job may set, > 0.
      scale: bits of the ring of the secure sum.
      max_epsilon: largest epsilon that a job may plan, at a delta of at most 1e-6, > 0.
      coordinator: Ed25519 public key of the coordinator, hexadecimal.
      members: the sites, sorted by name.
      created: start of the epoch's validity, UTC.
      expires: end of the epoch's validity, UTC.
    """

    name: str
    epoch: int
    previous: str
    suite: int
    n_min: int
    accomplices: int
    clip: float
    scale: int
    max_epsilon: float
    coordinator: str
    members: tuple[FederationMember, ...]
    created: str
    expires: str

    def to_bytes(self) -> bytes:
        """Returns the canonical bytes; equal manifests give equal bytes."""
        return canonical.dump(dataclasses.asdict(self) | {"format": FORMAT})

    def digest(self) -> bytes:
        """Returns the SHA-256 of the canonical bytes, 32 bytes."""
        return hashlib.sha256(self.to_bytes()).digest()

    @property
    def weaker(self) -> str:
        """The sentence that every owner signs where fewer than a third of the members may help; empty elsewhere."""
        return weaker_sentence(self.accomplices, len(self.members))

    def fingerprint_of(self, site: str) -> str:
        """Returns the fingerprint of a member's request, which its owner reads to the other owners.

        Raises:
          Untrusted: the site is not a member.
        """
        member = self.member(site)
        return fingerprint_of(site, member.contact, self.suite, member.keys)

    @property
    def members_fingerprint(self) -> str:
        """The digits that the owners read to each other: the federation's name, and each member's name and keys."""
        writer = Writer().text(_MEMBERS).text(self.name)
        for member in self.members:
            writer.text(self.fingerprint_of(member.site))
        return fingerprint(writer.done())

    def member(self, site: str) -> FederationMember:
        """Returns a site's entry.

        Raises:
          Untrusted: the site is not a member.
        """
        for member in self.members:
            if member.site == site:
                return member
        raise Untrusted(
            f"site={site!r} is not in epoch {self.epoch} of {self.name!r}: it was revoked, or never approved; "
            "ask the coordinator"
        )

    def check_valid(self, now: datetime) -> int:
        """Returns the whole days for which this epoch still holds.

        Raises:
          Untrusted: the epoch does not hold yet, or has expired.
        """
        since, until = canonical.moment(self.created, "created"), canonical.moment(self.expires, "expires")
        return check_dates(since - EARLY, until, now, f"epoch {self.epoch} of federation {self.name!r}")

    @classmethod
    def from_bytes(cls, data: bytes) -> "FederationManifest":
        """Reads a manifest strictly; `check_signatures` checks its signatures.

        Raises:
          MalformedMessage: the bytes are no manifest of this release, or a field is out of its range.
          ConfigError: the federation's or a site's name is not allowed.
          Untrusted: two members share a name or key, or a key does not parse.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        content = canonical.load(data, "federation manifest", ["format", *names])
        canonical.whole(content.pop("format"), "federation format", lowest=FORMAT, highest=FORMAT)
        federation = cls(**content | {"members": _members(content["members"])})
        _check(federation)
        return federation


def sign(federation: FederationManifest, identity: Identity) -> bytes:
    """Returns an owner's signature over the whole manifest, 64 bytes."""
    return identity.sign(_signed(federation))


def check_signature(federation: FederationManifest, site: str, signature: bytes) -> None:
    """Checks one owner's signature.

    Raises:
      Untrusted: the site is not a member, or did not sign this manifest.
    """
    try:
        verify(bytes.fromhex(federation.member(site).identity), _signed(federation), signature, sender=site)
    except ProtocolViolation as error:
        raise Untrusted(
            f"site={site!r} has not signed epoch {federation.epoch} of {federation.name!r} as it stands here; "
            "its owner runs offsite client sign"
        ) from error


def check_signatures(federation: FederationManifest, signatures: Mapping[str, bytes]) -> None:
    """Checks that every member signed, and nobody else.

    Raises:
      Untrusted: a signature is missing, wrong, or a stranger's.
    """
    names = {member.site for member in federation.members}
    if missing := sorted(names - signatures.keys()):
        raise Untrusted(
            f"sites={missing} have not signed epoch {federation.epoch} of {federation.name!r}; "
            "every owner runs offsite client sign"
        )
    for site, signature in signatures.items():
        check_signature(federation, site, signature)


def check_follows(federation: FederationManifest, previous: FederationManifest) -> None:
    """Checks that an epoch is the very next epoch of the same federation.

    Raises:
      Untrusted: the epoch belongs to another federation, coordinator or history, or skips an epoch.
    """
    where = f"epoch {federation.epoch} of {federation.name!r}"
    if federation.name != previous.name or federation.coordinator != previous.coordinator:
        raise Untrusted(f"{where} belongs to another federation or coordinator than the pinned one; refuse it")
    if federation.epoch != previous.epoch + 1 or federation.previous != previous.digest().hex():
        raise Untrusted(
            f"{where} does not follow from the pinned epoch {previous.epoch}: another history was signed here; "
            "ask the coordinator which epoch holds"
        )


def changes(old: FederationManifest | None, new: FederationManifest) -> tuple[str, ...]:
    """Returns what a new epoch changes, one line per change, for the owner to confirm."""
    before = {member.site: member for member in old.members} if old else {}
    after = {member.site: member for member in new.members}
    lines = [f"added: {site}" for site in sorted(after.keys() - before.keys())]
    lines += [f"removed: {site}" for site in sorted(before.keys() - after.keys())]
    both = sorted(after.keys() & before.keys())
    lines += [f"new keys: {site}" for site in both if after[site].keys != before[site].keys]
    lines += [f"new contact: {site}" for site in both if after[site].contact != before[site].contact]
    for name in ("name", "coordinator", "suite", "n_min", "accomplices", "clip", "scale", "max_epsilon", "expires"):
        value = getattr(new, name)
        if old is None:
            lines.append(f"{name}: {value}")
        elif getattr(old, name) != value:
            lines.append(f"{name}: {getattr(old, name)} becomes {value}")
    return tuple(lines)


def _members(content: Any) -> tuple[FederationMember, ...]:
    names = {f.name for f in dataclasses.fields(FederationMember)}
    if not isinstance(content, list) or len(content) > MAX_SITES:
        raise MalformedMessage(f"federation members: must be a list of at most {MAX_SITES}; ask for it again")
    for entry in content:
        if not isinstance(entry, dict) or entry.keys() != names:
            raise MalformedMessage("federation members: other fields than this release knows; ask for it again")
    return tuple(FederationMember(**entry) for entry in content)


def _check(federation: FederationManifest) -> None:
    canonical.check_name(federation.name, "federation")
    epoch = canonical.whole(federation.epoch, "federation epoch", lowest=1, highest=1 << 31)
    canonical.hexadecimal(federation.previous, "federation previous", size=DIGEST_BYTES if epoch > 1 else 0)
    canonical.whole(federation.suite, "federation suite", lowest=CLASSIC, highest=HYBRID)
    canonical.whole(federation.n_min, "federation n_min", lowest=MIN_SITES, highest=MAX_SITES)
    canonical.whole(federation.accomplices, "federation accomplices", lowest=0, highest=MAX_SITES)
    if federation.n_min < (needed := fewest_in_sum(federation.accomplices)):
        raise MalformedMessage(
            f"federation n_min={federation.n_min} with accomplices={federation.accomplices}: must be at least "
            f"{needed}, so that each sum holds two sites that do not help the coordinator; ask for it again"
        )
    canonical.whole(federation.scale, "federation scale", lowest=RING_BITS, highest=RING_BITS)
    canonical.positive(federation.clip, "federation clip")
    canonical.positive(federation.max_epsilon, "federation max_epsilon")
    canonical.hexadecimal(federation.coordinator, "federation coordinator", size=KEY_BYTES)
    created = canonical.moment(federation.created, "federation created")
    if canonical.moment(federation.expires, "federation expires") <= created:
        raise MalformedMessage("federation expires before it begins; ask for it again")
    _check_members(federation)


def _check_members(federation: FederationManifest) -> None:
    for member in federation.members:
        canonical.check_name(member.site, "site")
        canonical.hexadecimal(member.identity, "member identity", size=KEY_BYTES)
        canonical.hexadecimal(member.sealing, "member sealing", size=PUBLIC_BYTES[federation.suite])
        canonical.hexadecimal(member.tls, "member tls", size=DIGEST_BYTES)
        canonical.text(member.contact, "member contact", limit=MAX_CONTACT)
        check_node_public(canonical.text(member.node, "member node", limit=1 << 10, lines=True))
    names = [member.site for member in federation.members]
    if names != sorted(names):
        raise MalformedMessage("federation members: must be sorted by name; ask for it again")
    keys = [key for member in federation.members for key in member.keys]
    if len({name.lower() for name in names}) < len(names) or len(set(keys)) < len(keys):
        raise Untrusted(f"epoch {federation.epoch} of {federation.name!r}: two members share a name or key; refuse it")
    if federation.coordinator in keys:
        raise Untrusted(f"epoch {federation.epoch} of {federation.name!r}: the coordinator poses as a site; refuse it")


def _signed(federation: FederationManifest) -> bytes:
    writer = Writer().text(_LABEL).field(federation.digest())
    return (writer.text(federation.weaker) if federation.weaker else writer).done()
