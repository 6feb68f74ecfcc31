"""A site's request to be admitted: its public keys, signed by its own identity; no private key, no data."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from offsite.errors import ConfigError, ProtocolViolation, Untrusted
from offsite.trust import canonical, certificates
from offsite.trust.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, verify
from offsite.trust.keys import SiteKeys, check_node_public
from offsite.trust.sealing import CLASSIC, HYBRID, read_public
from offsite.trust.wire import Writer

FORMAT, MAX_CONTACT = 1, 100
_LABEL, _HANDOVER = "offsite request", "offsite handover"


@dataclass(frozen=True)
class SiteRequest:
    """One site's request.

    Attributes:
      name: name of the site and of its certificate.
      suite: suite of the sealing key, 1 or 2.
      identity: Ed25519 public key, hexadecimal.
      sealing: public sealing key, hexadecimal.
      node: P-384 public key for Flower, an OpenSSH line.
      csr: request for a TLS certificate, PEM.
      contact: person or office, and telephone number, for the other owners to call; at most 100 characters, or empty.
      created: time of the request, UTC.
      replaces: identity from which the new keys take over, hexadecimal; empty for a new site.
      handover: the old identity's signature over the new keys, hexadecimal; empty for a new site.
      signature: the new identity's signature over every field above, hexadecimal.
    """

    name: str
    suite: int
    identity: str
    sealing: str
    node: str
    csr: str
    contact: str
    created: str
    replaces: str = ""
    handover: str = ""
    signature: str = ""

    @property
    def tls(self) -> str:
        """SHA-256 of the TLS public key, hexadecimal."""
        return certificates.key_digest(certificates.request_key(self.csr.encode(), self.name))

    @property
    def fingerprint(self) -> str:
        """The digits that the site reads to the coordinator and to other owners by telephone, see `fingerprint_of`."""
        return fingerprint_of(self.name, self.contact, self.suite, self.keys)

    @property
    def keys(self) -> tuple[str, str, str, str]:
        """Identity, sealing, node and TLS key; no two sites may share one of them."""
        return self.identity, self.sealing, self.node, self.tls

    def to_bytes(self) -> bytes:
        """Returns the canonical bytes of the request file."""
        return canonical.dump(dataclasses.asdict(self) | {"format": FORMAT})

    @classmethod
    def from_bytes(cls, data: bytes) -> "SiteRequest":
        """Reads a request file, whoever wrote it.

        Raises:
          MalformedMessage: the bytes are no request file of this release.
          ConfigError: the site's name is not allowed.
          Untrusted: a signature or a key is wrong.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        content = canonical.load(data, "request", ["format", *names], limit=1 << 16)
        canonical.whole(content.pop("format"), "request format", lowest=FORMAT, highest=FORMAT)
        canonical.whole(content["suite"], "request suite", lowest=CLASSIC, highest=HYBRID)
        for name in names:
            if name != "suite":
                canonical.text(content[name], f"request {name}", lines=True)
        request = cls(**content)
        _check(request)
        return request


def fingerprint_of(name: str, contact: str, suite: int, keys: Sequence[str]) -> str:
    """Returns the fingerprint of a site; equal names, contacts and keys give equal digits."""
    return certificates.fingerprint(_named_keys(name, contact, suite, keys))


def write_request(
    keys: SiteKeys, name: str, *, now: datetime, contact: str = "", previous: Identity | None = None
) -> SiteRequest:
    """Returns the signed request of a site.

    Args:
      keys: the site's private keys.
      name: the site's name.
      now: time of the request.
      contact: person or office, and telephone number.
      previous: identity from which these keys take over; None for a new site.
    """
    csr = certificates.make_request(keys.tls.read_bytes(), name).decode()
    request = SiteRequest(
        name=canonical.check_name(name, "site"),
        suite=keys.sealing.suite,
        identity=keys.identity.public.hex(),
        sealing=keys.sealing.public.hex(),
        node=keys.node_public(),
        csr=csr,
        contact=contact,
        created=canonical.stamp(now),
        replaces=previous.public.hex() if previous else "",
    )
    if previous is not None:
        request = dataclasses.replace(request, handover=previous.sign(_handed(request)).hex())
    return dataclasses.replace(request, signature=keys.identity.sign(_signed(request)).hex())


def _check(request: SiteRequest) -> None:
    canonical.check_name(request.name, "site")
    canonical.hexadecimal(request.identity, "request identity", size=KEY_BYTES)
    canonical.hexadecimal(request.signature, "request signature", size=SIGNATURE_BYTES)
    canonical.text(request.contact, "request contact", limit=MAX_CONTACT)
    canonical.moment(request.created, "request created")
    _verify(request.identity, _signed(request), request.signature, request.name)
    read_public(request.suite, bytes.fromhex(canonical.hexadecimal(request.sealing, "request sealing")))
    check_node_public(request.node)
    certificates.request_key(request.csr.encode(), request.name)
    if bool(request.replaces) != bool(request.handover):
        raise Untrusted(
            f"site={request.name!r}: a handover needs both the old identity and its signature; ask for a new request"
        )
    if request.replaces:
        canonical.hexadecimal(request.replaces, "request replaces", size=KEY_BYTES)
        canonical.hexadecimal(request.handover, "request handover", size=SIGNATURE_BYTES)
        _verify(request.replaces, _handed(request), request.handover, request.name)


def _verify(public: str, message: bytes, signature: str, site: str) -> None:
    try:
        verify(bytes.fromhex(public), message, bytes.fromhex(signature), sender=site)
    except (ProtocolViolation, ConfigError) as error:
        raise Untrusted(f"site={site!r}: its request is not signed by its identity; ask for a new request") from error


def _named_keys(name: str, contact: str, suite: int, keys: Sequence[str]) -> bytes:
    writer = Writer().text(name).text(contact).number(suite)
    for key in keys:
        writer.text(key)
    return writer.done()


def _handed(request: SiteRequest) -> bytes:
    new = _named_keys(request.name, request.contact, request.suite, request.keys)
    return Writer().text(_HANDOVER).text(request.replaces).field(new).done()


def _signed(request: SiteRequest) -> bytes:
    return Writer().text(_LABEL).field(dataclasses.replace(request, signature="").to_bytes()).done()
