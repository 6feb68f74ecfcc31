"""The coordinator's answer to a request: certificate, addresses and the federation manifest, signed by its identity."""

import dataclasses
from dataclasses import dataclass

from offsite.errors import ProtocolViolation, Untrusted
from offsite.trust import canonical
from offsite.trust.certificates import fingerprint
from offsite.trust.federation_manifest import FederationManifest
from offsite.trust.identity import SIGNATURE_BYTES, Identity, verify
from offsite.trust.wire import Writer

FORMAT, MAX_BYTES, MAX_PORT = 1, 1 << 26, 65535
MAX_EARLIER = 8
_LABEL, _FINGERPRINT = "offsite welcome", "offsite welcome fingerprint"


@dataclass(frozen=True)
class Welcome:
    """What one site needs to take part in one epoch.

    Attributes:
      site: for whom.
      ca: certificate of the coordinator's authority, PEM.
      certificate: the site's own, PEM.
      host: name or address of the coordinator.
      link_port: of the SuperLink.
      depot_port: of the depot.
      federation: the manifest, canonical bytes.
      earlier: manifests of the epochs before, oldest first, so that a site that missed some can follow.
      signature: of the coordinator over all of the above, hexadecimal.
    """

    site: str
    ca: bytes
    certificate: bytes
    host: str
    link_port: int
    depot_port: int
    federation: bytes
    earlier: tuple[bytes, ...] = ()
    signature: str = ""

    @property
    def manifest(self) -> FederationManifest:
        """The federation manifest, read."""
        return FederationManifest.from_bytes(self.federation)

    @property
    def fingerprint(self) -> str:
        """What the coordinator reads to every owner over the telephone: authority, coordinator's key, manifest."""
        manifest = self.manifest
        writer = Writer().text(_FINGERPRINT).field(self.ca).text(manifest.coordinator).field(manifest.digest())
        return fingerprint(writer.done())

    def to_bytes(self) -> bytes:
        """Returns the canonical bytes of the welcome file."""
        content = dataclasses.asdict(self) | {"format": FORMAT}
        for name in ("ca", "certificate", "federation"):
            content[name] = content[name].decode()
        content["earlier"] = [one.decode() for one in self.earlier]
        return canonical.dump(content)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Welcome":
        """Reads a welcome file; the signature must be that of the coordinator named in its manifest.

        Raises:
          MalformedMessage: not a welcome file of this release.
          ConfigError: a name cannot be one.
          Untrusted: the signature or a key is wrong.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        content = canonical.load(data, "welcome", ["format", *names], limit=MAX_BYTES)
        canonical.whole(content.pop("format"), "welcome format", lowest=FORMAT, highest=FORMAT)
        for name in ("ca", "certificate", "federation"):
            content[name] = canonical.text(
                content[name], f"welcome {name}", limit=canonical.MAX_BYTES, lines=True
            ).encode("ascii")
        earlier = content["earlier"] if isinstance(content["earlier"], list) else [None]
        content["earlier"] = tuple(
            canonical.text(one, "welcome earlier", limit=canonical.MAX_BYTES, lines=True).encode("ascii")
            for one in earlier
        )
        canonical.text(content["host"], "welcome host", limit=255)
        for name in ("link_port", "depot_port"):
            canonical.whole(content[name], f"welcome {name}", lowest=1, highest=MAX_PORT)
        canonical.hexadecimal(content["signature"], "welcome signature", size=SIGNATURE_BYTES)
        canonical.check_name(content["site"], "site")
        welcome = cls(**content)
        _check(welcome)
        return welcome


def write_welcome(welcome: Welcome, coordinator: Identity) -> Welcome:
    """Returns the welcome with the coordinator's signature."""
    return dataclasses.replace(welcome, signature=coordinator.sign(_signed(welcome)).hex())


def _check(welcome: Welcome) -> None:
    coordinator = bytes.fromhex(welcome.manifest.coordinator)
    try:
        verify(coordinator, _signed(welcome), bytes.fromhex(welcome.signature), sender="coordinator")
    except ProtocolViolation as error:
        raise Untrusted(
            f"welcome for site={welcome.site!r} is not signed by the coordinator of its manifest; ask for it again"
        ) from error


def _signed(welcome: Welcome) -> bytes:
    return Writer().text(_LABEL).field(dataclasses.replace(welcome, signature="").to_bytes()).done()
