"""Who was approved and who was revoked at the coordinator, and the rules by which a site is admitted."""

import dataclasses
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from offsite.errors import ConfigError, DataError, MalformedMessage, OffsiteError, Untrusted, lookup
from offsite.trust import canonical
from offsite.trust.federation_manifest import FederationManifest, FederationMember
from offsite.trust.request import SiteRequest

FORMAT = 1


@dataclass(frozen=True)
class Approved:
    """An approved site: its request, and the certificate that it was given, PEM."""

    request: SiteRequest
    certificate: bytes

    @property
    def member(self) -> FederationMember:
        """The site's entry in a federation manifest."""
        one = self.request
        return FederationMember(one.name, one.identity, one.sealing, one.node, one.tls)


@dataclass(frozen=True)
class Revoked:
    """Keys that never count again, whatever name they come with."""

    site: str
    time: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class MemberRegistry:
    """The file `sites.json`; one write of it is one decision, and everything else follows from it.

    Attributes:
      sites: the approved, by name.
      revoked: in order of time.
      federation: the current epoch; None before the first approval.
    """

    sites: dict[str, Approved] = field(default_factory=dict)
    revoked: tuple[Revoked, ...] = ()
    federation: FederationManifest | None = None

    def to_bytes(self) -> bytes:
        """Returns the canonical bytes of the file."""
        sites = {
            name: {"request": one.request.to_bytes().decode(), "certificate": one.certificate.decode()}
            for name, one in self.sites.items()
        }
        content: dict[str, Any] = {"format": FORMAT, "sites": sites, "revoked": [vars(one) for one in self.revoked]}
        content["federation"] = self.federation.to_bytes().decode() if self.federation else ""
        return canonical.dump(content)

    @classmethod
    def from_bytes(cls, data: bytes) -> "MemberRegistry":
        """Reads the file.

        Raises:
          DataError: it is damaged.
        """
        try:
            content = canonical.load(data, "sites.json", ["format", "sites", "revoked", "federation"], limit=1 << 28)
            canonical.whole(content["format"], "sites.json format", lowest=FORMAT, highest=FORMAT)
            sites = {
                name: Approved(SiteRequest.from_bytes(one["request"].encode()), one["certificate"].encode())
                for name, one in content["sites"].items()
            }
            revoked = tuple(Revoked(one["site"], one["time"], tuple(one["keys"])) for one in content["revoked"])
            manifest = content["federation"].encode()
            return cls(sites, revoked, FederationManifest.from_bytes(manifest) if manifest else None)
        except (MalformedMessage, Untrusted, ConfigError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, OffsiteError) else type(error).__name__
            raise DataError(f"sites.json is damaged ({reason}); restore the coordinator's folder") from error

    def admit(self, request: SiteRequest, certificate: bytes, *, now: datetime) -> "MemberRegistry":
        """Returns the records with one more site, with renewed certificate, or with a site's rotated keys.

        Raises:
          Untrusted: revoked keys, a name or key of another site, a replayed request, or a handover by a stranger.
        """
        records = self
        known = self.sites.get(request.name)
        if known is not None and known.request.keys == request.keys:
            if request.created == known.request.created:
                return self
            if request.created < known.request.created:
                raise Untrusted(f"site={request.name!r}: its request is older than the approved one; ask for a new one")
        elif request.replaces:
            if known is None or known.request.identity != request.replaces:
                raise Untrusted(f"site={request.name!r}: its new keys replace an identity that is not approved; refuse")
            records = self.drop(request.name, now=now)
        elif known is not None:
            raise Untrusted(
                f"site={request.name!r} is approved with other keys; the site runs offsite client rotate, "
                "or revoke it first"
            )
        records._check_free(request)
        return dataclasses.replace(records, sites={**records.sites, request.name: Approved(request, certificate)})

    def drop(self, site: str, *, now: datetime) -> "MemberRegistry":
        """Returns the records without a site, whose keys never count again.

        Raises:
          UnknownName: no such site.
        """
        gone = lookup(self.sites, site, "site").request
        return dataclasses.replace(
            self,
            sites={name: one for name, one in self.sites.items() if name != site},
            revoked=(*self.revoked, Revoked(site, canonical.stamp(now), gone.keys)),
        )

    def _check_free(self, request: SiteRequest) -> None:
        for gone in self.revoked:
            if set(gone.keys) & set(request.keys):
                raise Untrusted(
                    f"site={request.name!r}: a key of its request was revoked with site {gone.site!r} on {gone.time}; "
                    "the site needs new keys"
                )
        for name, one in self.sites.items():
            if name == request.name:
                continue
            if name.lower() == request.name.lower() or set(one.request.keys) & set(request.keys):
                raise Untrusted(
                    f"site={request.name!r}: its name or a key of it belongs to site {name!r} already; refuse it"
                )
