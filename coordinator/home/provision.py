"""The coordinator's folder: its keys and certificates, the sites that it approved, and the epochs that they sign."""

import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from offsite.coordinator.home.membership import Approved, MemberRegistry
from offsite.coordinator.home.settings import HomeSettings
from offsite.errors import ConfigError, DataError, Untrusted
from offsite.trust import canonical, certificates
from offsite.trust.addresses import address_of
from offsite.trust.certificates import DAYS, Authority
from offsite.trust.federation_manifest import RING_BITS, FederationManifest, check_signature
from offsite.trust.files import make_private, read, read_private, write_atomically, write_new
from offsite.trust.identity import SIGNATURE_BYTES, Identity
from offsite.trust.request import SiteRequest
from offsite.trust.sealing import HYBRID
from offsite.trust.toml_tables import read_settings
from offsite.trust.welcome import MAX_EARLIER, Welcome, write_welcome

SETTINGS, SITES = "coordinator.toml", "sites.json"
CA_KEY, CA, SERVER_KEY, SERVER, IDENTITY = "ca.key", "ca.pem", "server.key", "server.pem", "identity.key"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")  # names under which the coordinator itself reaches its SuperLink


class CoordinatorHome:
    """A coordinator's folder, from `create` or `open`. Each read is from disk, so a revocation counts at once.

    Args:
      folder: folder on disk.
      settings: content of `coordinator.toml`.
    """

    def __init__(self, folder: Path, settings: HomeSettings) -> None:
        self.folder, self.settings = folder, settings
        self.ca, self.server, self.server_key = folder / CA, folder / SERVER, folder / SERVER_KEY
        self.link, self.runs = folder / "link", folder / "runs"

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        name: str,
        host: str,
        link_port: int,
        depot_port: int,
        n_min: int,
        max_epsilon: float,
        now: datetime,
        suite: int = HYBRID,
        clip: float = 100.0,
        days: int = DAYS,
        accomplices: int | None = None,
    ) -> "CoordinatorHome":
        """Makes the folder with new keys and the coordinator's certificates.

        Raises:
          ConfigError: the folder holds something already, or a value is out of range.
          DataError: the folder cannot be written.
        """
        settings = HomeSettings(
            name, host, link_port, depot_port, suite, n_min, max_epsilon, clip, days, accomplices=accomplices
        )
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"folder={str(folder)!r} is not empty; keys are never overwritten; choose another")
        make_private(folder)
        for part in ("federation", "signatures", "welcomes", "link", "runs"):
            make_private(folder / part)
        home = cls(folder, settings)
        authority = certificates.create_authority(name, now=now)
        write_new(folder / CA_KEY, authority.key_pem())
        write_atomically(home.ca, authority.certificate)
        write_new(home.server_key, certificates.new_key())
        write_new(folder / IDENTITY, Identity.generate().to_bytes())
        home._issue_server(now)
        write_atomically(folder / SITES, MemberRegistry().to_bytes(), mode=0o600)
        write_atomically(folder / SETTINGS, settings.to_toml().encode())
        return home

    @classmethod
    def open(cls, folder: Path) -> "CoordinatorHome":
        """Opens a folder that `create` made.

        Raises:
          DataError: the folder is not a coordinator's.
          ConfigError: `coordinator.toml` is wrong.
        """
        if not (folder / SETTINGS).is_file():
            raise DataError(
                f"folder={str(folder)!r} is not a coordinator's folder; run offsite coordinator init to make one"
            )
        home = cls(folder, read_settings(folder / SETTINGS, HomeSettings))
        home._finish()
        return home

    @property
    def identity(self) -> Identity:
        """The coordinator's Ed25519 identity."""
        return Identity.from_bytes(read_private(self.folder / IDENTITY))

    def check(self, now: datetime) -> dict[str, int]:
        """Returns the days until each certificate and the epoch expire; at `certificates.WARN_DAYS` or fewer, warn.

        Raises:
          Untrusted: a certificate or the epoch has expired, or is not valid yet.
        """
        left = {
            "authority": certificates.check_valid(read(self.ca), now, "authority certificate"),
            "server": certificates.check_valid(read(self.server), now, "server certificate"),
        }
        if (federation := self._registry().federation) is not None:
            left["federation"] = federation.check_valid(now)
        return left

    def approve(self, requests: Sequence[SiteRequest], now: datetime) -> FederationManifest:
        """Admits sites, issues certificates and writes a welcome for every member; changed content makes a new epoch.

        Raises:
          Untrusted: a key was revoked, a name or key is another site's, or a request is replayed; nobody is admitted.
          ConfigError: a request is for another suite.
        """
        return self._decide(lambda registry: self._admit(registry, requests, now), now)

    def renew(self, now: datetime) -> FederationManifest:
        """Issues every certificate again and makes a new epoch that holds from now on."""

        def again(registry: MemberRegistry) -> MemberRegistry:
            sites = {
                name: dataclasses.replace(approved, certificate=self._certificate(approved.request, now))
                for name, approved in registry.sites.items()
            }
            return dataclasses.replace(registry, sites=sites)

        self._issue_server(now)
        return self._decide(again, now, anew=True)

    def revoke(self, site: str, now: datetime) -> FederationManifest:
        """Makes a new epoch without a site; the site's keys never count again.

        Raises:
          UnknownName: no site of this name is approved.
        """
        return self._decide(lambda registry: registry.drop(site, now=now), now)

    def federation(self) -> FederationManifest:
        """Returns the manifest of the current epoch.

        Raises:
          DataError: no site is approved yet.
        """
        federation = self._registry().federation
        if federation is None:
            raise DataError(f"folder={str(self.folder)!r}: no site is approved yet; run offsite coordinator approve")
        return federation

    def welcome(self, site: str) -> Path:
        """Returns the path of a site's welcome."""
        return self.folder / "welcomes" / f"{site}.welcome"

    def signatures(self) -> dict[str, bytes]:
        """Returns the owners' signatures of the current epoch that have arrived, by site."""
        federation = self.federation()
        paths = {member.site: self._signature(federation, member.site) for member in federation.members}
        return {site: path.read_bytes() for site, path in paths.items() if path.exists()}

    def add_signature(self, site: str, signature: bytes) -> None:
        """Keeps an owner's signature of the current epoch.

        Raises:
          Untrusted: the bytes are not this site's signature of this epoch.
        """
        federation = self.federation()
        if len(signature) != SIGNATURE_BYTES:
            raise Untrusted(f"site={site!r}: a signature has {SIGNATURE_BYTES} bytes, not {len(signature)}; ask again")
        check_signature(federation, site, signature)
        path = self._signature(federation, site)
        make_private(path.parent)
        write_atomically(path, signature)

    def member_by_tls(self, public_key_sha256: str) -> str:
        """Returns the site whose client certificate has this public key.

        Raises:
          Untrusted: no member of the current epoch has the key; the site may have been revoked.
        """
        for member in self.federation().members:
            if member.tls == public_key_sha256:
                return member.site
        raise Untrusted(f"tls={public_key_sha256[:12]}: no member of the current epoch has this key; was it revoked?")

    def _admit(self, registry: MemberRegistry, requests: Sequence[SiteRequest], now: datetime) -> MemberRegistry:
        for request in requests:
            if request.suite != self.settings.suite:
                raise ConfigError(
                    f"suite={request.suite}: site {request.name!r} made keys of another suite than this federation's "
                    f"{self.settings.suite}; it runs offsite client init --suite {self.settings.suite} in a new folder"
                )
            registry = registry.admit(request, self._certificate(request, now), now=now)
        return registry

    def _decide(
        self, change: Callable[[MemberRegistry], MemberRegistry], now: datetime, *, anew: bool = False
    ) -> FederationManifest:
        with self._lock():
            registry = change(self._registry())
            if not certificates.is_for(read(self.server), self._hosts()):  # host or bind was changed since
                self._issue_server(now)
            current, following = registry.federation, self._following(registry, now)
            if current is None or anew or _content(current) != _content(following):
                registry = dataclasses.replace(registry, federation=following)
            write_atomically(self.folder / SITES, registry.to_bytes(), mode=0o600)
            return self._publish(registry)

    def _following(self, registry: MemberRegistry, now: datetime) -> FederationManifest:
        settings, last = self.settings, registry.federation
        n_min, accomplices = settings.cohort(len(registry.sites))
        return FederationManifest(
            name=settings.name,
            epoch=last.epoch + 1 if last else 1,
            previous=last.digest().hex() if last else "",
            suite=settings.suite,
            n_min=n_min,
            accomplices=accomplices,
            clip=settings.clip,
            scale=RING_BITS,
            max_epsilon=settings.max_epsilon,
            coordinator=self.identity.public.hex(),
            members=tuple(registry.sites[name].member for name in sorted(registry.sites)),
            created=canonical.stamp(now),
            expires=canonical.stamp(now + timedelta(days=settings.days)),
        )

    def _publish(self, registry: MemberRegistry) -> FederationManifest:
        """Writes all files that follow from the registry, the epoch's file last."""
        federation = registry.federation
        if federation is None:
            raise DataError(f"folder={str(self.folder)!r}: nothing to publish; approve a site first")
        for name, approved in registry.sites.items():
            write_atomically(self.welcome(name), self._welcome_for(approved, federation).to_bytes())
        for path in (self.folder / "welcomes").glob("*.welcome"):
            if path.stem not in registry.sites:
                path.unlink()
        write_atomically(self._epoch(federation.epoch), federation.to_bytes())
        return federation

    def _finish(self) -> None:
        """Publishes an epoch whose decision was written just before a kill."""
        with self._lock():
            registry = self._registry()
            if registry.federation is not None and not self._epoch(registry.federation.epoch).exists():
                self._publish(registry)

    def _welcome_for(self, site: Approved, federation: FederationManifest) -> Welcome:
        settings, name = self.settings, site.request.name
        welcome = Welcome(
            site=name,
            ca=read(self.ca),
            certificate=site.certificate,
            host=settings.host,
            link_port=settings.link_port,
            depot_port=settings.depot_port,
            federation=federation.to_bytes(),
            earlier=self._earlier(federation, name),
        )
        return write_welcome(welcome, self.identity)

    def _earlier(self, federation: FederationManifest, site: str) -> tuple[bytes, ...]:
        """Returns the earlier epochs since a site joined; the site learns nothing about the time before."""
        earlier: list[bytes] = []
        for epoch in range(federation.epoch - 1, max(0, federation.epoch - 1 - MAX_EARLIER), -1):
            data = read(self._epoch(epoch))
            if site not in {member.site for member in FederationManifest.from_bytes(data).members}:
                break
            earlier.insert(0, data)
        return tuple(earlier)

    def _certificate(self, request: SiteRequest, now: datetime) -> bytes:
        return certificates.issue_client(
            self._authority(), request.csr.encode(), request.name, now=now, days=self.settings.days
        )

    def _issue_server(self, now: datetime) -> None:
        key = read_private(self.server_key)
        issued = certificates.issue_server(self._authority(), key, self._hosts(), now=now, days=self.settings.days)
        write_atomically(self.server, issued)

    def _hosts(self) -> list[str]:
        """Returns the names and addresses under which the coordinator is reached, by the sites and by itself."""
        settings = self.settings
        address = address_of(settings.bind)
        own = [settings.bind] if settings.bind and not (address and address.is_unspecified) else []
        return list(dict.fromkeys((settings.host, *own, *_LOOPBACK)))

    def _authority(self) -> Authority:
        return Authority(read(self.ca), read_private(self.folder / CA_KEY))

    def _registry(self) -> MemberRegistry:
        return MemberRegistry.from_bytes(read(self.folder / SITES))

    def _epoch(self, number: int) -> Path:
        return self.folder / "federation" / f"epoch-{number}.json"

    def _signature(self, federation: FederationManifest, site: str) -> Path:
        return self.folder / "signatures" / f"epoch-{federation.epoch}" / f"{site}.sig"

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Lets one process decide at a time."""
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _content(federation: FederationManifest) -> FederationManifest:
    return dataclasses.replace(federation, epoch=1, previous="", created="", expires="")
