"""The coordinator's answer to a request: certificate, addresses and the federation manifest, signed by its identity."""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise

from offsite.errors import ProtocolViolation, Untrusted
from offsite.trust import canonical
from offsite.trust.certificates import fingerprint
from offsite.trust.federation_manifest import FederationManifest, check_follows
from offsite.trust.identity import SIGNATURE_BYTES, Identity, verify
from offsite.trust.wire import Writer

FORMAT, MAX_BYTES, MAX_PORT = 1, 1 << 26, 65535
MAX_EARLIER = 8
_LABEL, _FINGERPRINT = "offsite welcome", "offsite welcome fingerprint"


@dataclass(frozen=True)
class Welcome:
    """What one site needs to take part in one epoch.

    Attributes:
      site: name of the site that the welcome is for.
      ca: certificate of the coordinator's authority, PEM.
      certificate: the site's own certificate, PEM.
      host: name or address of the coordinator.
      link_port: port of the SuperLink.
      depot_port: port of the depot.
      federation: the federation manifest, canonical bytes.
      earlier: manifests of earlier epochs, oldest first, so that a site that missed some can follow.
      signature: the coordinator's signature over every field above, hexadecimal.
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
        """The federation manifest, parsed."""
        return FederationManifest.from_bytes(self.federation)

    @property
    def fingerprint(self) -> str:
        """The digits that the coordinator reads to every owner by telephone: authority, coordinator's key, manifest."""
        manifest = self.manifest
        writer = Writer().text(_FINGERPRINT).field(self.ca).text(manifest.coordinator).field(manifest.digest())
        return fingerprint(writer.done())

    def check_history(self, pinned: FederationManifest) -> None:
        """Checks that the epoch is the pinned epoch, or follows from the pinned epoch step by step.

        Raises:
          Untrusted: the epoch is older, has another content, or belongs to another history.
        """
        federation = self.manifest
        if federation.epoch < pinned.epoch:
            raise Untrusted(
                f"epoch={federation.epoch} is older than the pinned epoch {pinned.epoch}; a replay; refuse it"
            )
        if federation.epoch == pinned.epoch:
            if federation.digest() != pinned.digest():
                raise Untrusted(
                    f"epoch={federation.epoch} is pinned with another content: the coordinator shows different "
                    "manifests to different sites or times; refuse it and talk to the other owners"
                )
            return
        earlier = [FederationManifest.from_bytes(content) for content in self.earlier]
        steps = [pinned, *(manifest for manifest in earlier if manifest.epoch > pinned.epoch), federation]
        for before, after in pairwise(steps):
            check_follows(after, before)

    def to_bytes(self) -> bytes:
        """Returns the canonical bytes of the welcome file."""
        content = dataclasses.asdict(self) | {"format": FORMAT}
        for name in ("ca", "certificate", "federation"):
            content[name] = content[name].decode()
        content["earlier"] = [manifest.decode() for manifest in self.earlier]
        return canonical.dump(content)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Welcome":
        """Reads a welcome file; its signature must be that of the coordinator named in its manifest.

        Raises:
          MalformedMessage: the bytes are no welcome file of this release.
          ConfigError: a name is not allowed.
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
            canonical.text(manifest, "welcome earlier", limit=canonical.MAX_BYTES, lines=True).encode("ascii")
            for manifest in earlier
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
