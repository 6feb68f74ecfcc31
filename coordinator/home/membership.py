"""The registry of approved and revoked sites, and the rules by which a site is admitted."""

import dataclasses
from dataclasses import dataclass, field
from datetime import datetime

from offsite.errors import ConfigError, DataError, MalformedMessage, OffsiteError, Untrusted, lookup
from offsite.trust import canonical
from offsite.trust.federation_manifest import FederationManifest, FederationMember
from offsite.trust.request import SiteRequest

FORMAT = 1


@dataclass(frozen=True)
class Approved:
    """An approved site.

    Attributes:
      request: the site's signed request.
      certificate: the certificate that the coordinator issued, PEM.
    """

    request: SiteRequest
    certificate: bytes

    @property
    def member(self) -> FederationMember:
        """The site's entry in a federation manifest."""
        request = self.request
        keys = request.identity, request.sealing, request.node, request.tls
        return FederationMember(request.name, *keys, contact=request.contact)


@dataclass(frozen=True)
class Revoked:
    """Keys that never count again, under any name.

    Attributes:
      site: name of the site that had the keys.
      time: time of the revocation, UTC.
      keys: identity key, sealing key, node key and TLS key.
    """

    site: str
    time: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class MemberRegistry:
    """The file `sites.json`; one write of it is one decision, from which all other files follow.

    Attributes:
      sites: approved sites by name.
      revoked: revoked keys in order of time.
      federation: manifest of the current epoch; None before the first approval.
    """

    sites: dict[str, Approved] = field(default_factory=dict)
    revoked: tuple[Revoked, ...] = ()
    federation: FederationManifest | None = None

    def to_bytes(self) -> bytes:
        """Returns the canonical bytes of the file."""
        sites = {
            name: {"request": site.request.to_bytes().decode(), "certificate": site.certificate.decode()}
            for name, site in self.sites.items()
        }
        revoked = [vars(entry) for entry in self.revoked]
        content: dict[str, object] = {"format": FORMAT, "sites": sites, "revoked": revoked}
        content["federation"] = self.federation.to_bytes().decode() if self.federation else ""
        return canonical.dump(content)

    @classmethod
    def from_bytes(cls, data: bytes) -> "MemberRegistry":
        """Reads the file.

        Raises:
          DataError: the file is damaged.
        """
        try:
            content = canonical.load(data, "sites.json", ["format", "sites", "revoked", "federation"], limit=1 << 28)
            canonical.whole(content["format"], "sites.json format", lowest=FORMAT, highest=FORMAT)
            sites = {
                name: Approved(SiteRequest.from_bytes(entry["request"].encode()), entry["certificate"].encode())
                for name, entry in content["sites"].items()
            }
            revoked = tuple(Revoked(entry["site"], entry["time"], tuple(entry["keys"])) for entry in content["revoked"])
            manifest = content["federation"].encode()
            return cls(sites, revoked, FederationManifest.from_bytes(manifest) if manifest else None)
        except (MalformedMessage, Untrusted, ConfigError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, OffsiteError) else type(error).__name__
            raise DataError(f"sites.json is damaged ({reason}); restore the coordinator's folder") from error

    def admit(self, request: SiteRequest, certificate: bytes, *, now: datetime) -> "MemberRegistry":
        """Returns the registry with a new site, with a renewed certificate, or with a site's rotated keys.

        Raises:
          Untrusted: the request has revoked keys, a name or key of another site, or a stranger's handover, or is
            replayed.
        """
        registry = self
        known = self.sites.get(request.name)
        if known is not None and known.request.keys == request.keys:
            if request.created == known.request.created:
                return self
            if request.created < known.request.created:
                raise Untrusted(
                    f"site={request.name!r}: its request is older than the approved request; ask for a new request"
                )
        elif request.replaces:
            if known is None or known.request.identity != request.replaces:
                raise Untrusted(
                    f"site={request.name!r}: its new keys replace an identity that is not approved; refuse the request"
                )
            registry = self.drop(request.name, now=now)
        elif known is not None:
            raise Untrusted(
                f"site={request.name!r} is approved with other keys; the site runs offsite client rotate, "
                "or revoke it first"
            )
        registry._check_free(request)
        return dataclasses.replace(registry, sites={**registry.sites, request.name: Approved(request, certificate)})

    def drop(self, site: str, *, now: datetime) -> "MemberRegistry":
        """Returns the registry without a site, whose keys never count again.

        Raises:
          UnknownName: the registry has no such site.
        """
        gone = lookup(self.sites, site, "site").request
        return dataclasses.replace(
            self,
            sites={name: approved for name, approved in self.sites.items() if name != site},
            revoked=(*self.revoked, Revoked(site, canonical.stamp(now), gone.keys)),
        )

    def _check_free(self, request: SiteRequest) -> None:
        for gone in self.revoked:
            if set(gone.keys) & set(request.keys):
                raise Untrusted(
                    f"site={request.name!r}: a key of its request was revoked with site {gone.site!r} on {gone.time}; "
                    "the site needs new keys"
                )
        for name, approved in self.sites.items():
            if name == request.name:
                continue
            if name.lower() == request.name.lower() or set(approved.request.keys) & set(request.keys):
                raise Untrusted(
                    f"site={request.name!r}: its name or a key belongs to site {name!r} already; refuse the request"
                )
