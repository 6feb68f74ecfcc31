"""A site's folder: its keys, its settings, and the federation that its owner accepted."""

import dataclasses
import shutil
from datetime import datetime
from pathlib import Path

from offsite.client.home.audit import Audit
from offsite.client.home.consent import MEMBERS_CONFIRMED, WEAKER_SIGNED, Consent, check_consent, strangers
from offsite.client.home.policy import Policy
from offsite.client.home.settings import SETTINGS, SiteSettings
from offsite.errors import ConfigError, DataError, PolicyRefusal, Untrusted
from offsite.privacy.calibrate import LARGEST_DELTA
from offsite.privacy.ledger import Ledger
from offsite.trust import certificates
from offsite.trust.certificates import check_issued, check_valid, digits_of
from offsite.trust.federation_manifest import FederationManifest, sign
from offsite.trust.files import make_private, read, write_atomically
from offsite.trust.keys import SiteKeys
from offsite.trust.request import SiteRequest, write_request
from offsite.trust.toml_tables import read_settings
from offsite.trust.welcome import Welcome

POLICY, REQUEST = "policy.toml", "site.request"
ACCOUNTANT = "pld"
NOTHING_MORE = Consent()
_LEFT, _CURRENT, _NEXT, _OLD = "left", "keys", "keys.next", "keys.old"


class SiteHome:
    """A site's folder, made by `create` or `open`; its pin, the accepted welcome file, decides everything else."""

    def __init__(self, folder: Path, settings: SiteSettings) -> None:
        self.folder, self.settings = folder, settings
        self.data = folder / Path(settings.data).expanduser()
        self.policy, self.state, self.packages = folder / POLICY, folder / "state", folder / "packages"
        self.ca, self.certificate = folder / "trust" / "ca.pem", folder / "trust" / "client.pem"
        self._pin, self._left = folder / "trust" / "welcome.json", folder / _LEFT

    def on(self, device: str | None, dtype: str | None = None) -> "SiteHome":
        """Returns the site with another device or number format than its settings name; None keeps theirs.

        Raises:
          ConfigError: no device or no number format has such a name.
        """
        own = self.settings
        device, dtype = own.device if device is None else device, own.dtype if dtype is None else dtype
        return SiteHome(self.folder, dataclasses.replace(own, device=device, dtype=dtype))

    @classmethod
    def create(cls, folder: Path, *, name: str, data: Path, suite: int, now: datetime, contact: str = "") -> "SiteHome":
        """Makes the folder with new keys, a policy that permits little, and the request file.

        Raises:
          ConfigError: the folder is not empty, or the name is not allowed.
          DataError: the data do not exist, or the folder cannot be written.
        """
        settings = SiteSettings(name, str(data.expanduser().absolute()), contact=contact)
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"folder={str(folder)!r} is not empty; keys are never overwritten; choose another")
        if not data.expanduser().exists():
            raise DataError(f"data={str(data)!r}: no such file or folder; give the place of the site's records")
        make_private(folder)
        for part in ("trust", "trust/federation", "state", "packages"):
            make_private(folder / part)
        SiteKeys.create(folder / _CURRENT, suite)
        write_atomically(folder / POLICY, Policy.template().encode(), mode=0o600)
        write_atomically(folder / SETTINGS, settings.to_toml().encode(), mode=0o600)
        installation = cls(folder, settings)
        installation.request(now)
        return installation

    @classmethod
    def open(cls, folder: Path) -> "SiteHome":
        """Opens a folder that `create` made.

        Raises:
          DataError: the folder is not a site's folder.
          ConfigError: `site.toml` is wrong.
        """
        if not (folder / SETTINGS).is_file():
            raise DataError(f"folder={str(folder)!r} is not a site's folder; offsite client init makes one")
        installation = cls(folder, read_settings(folder / SETTINGS, SiteSettings))
        for part in (installation.state, installation.packages):
            if not part.is_dir():  # many a backup leaves empty folders out
                make_private(part)
        installation._settle()
        return installation

    @property
    def keys(self) -> SiteKeys:
        """The keys in use.

        Raises:
          Untrusted: the site has left, or a key is damaged or readable by others.
          DataError: a key is missing.
        """
        if self._left.exists():
            raise Untrusted(f"site={self.settings.name!r} has left and destroyed its keys; offsite client init anew")
        return SiteKeys.load(self.folder / _CURRENT)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the keys in the request file, which the owner reads to the coordinator."""
        return SiteRequest.from_bytes(read(self.folder / REQUEST)).fingerprint

    @property
    def joined(self) -> bool:
        """Whether a welcome was accepted."""
        return self._pin.exists()

    @property
    def welcome(self) -> Welcome:
        """The welcome that the owner accepted.

        Raises:
          DataError: no welcome was accepted yet.
          Untrusted: the welcome was altered on disk.
        """
        if not self.joined:
            raise DataError(f"site={self.settings.name!r} has not joined yet; offsite client sign accepts a welcome")
        return Welcome.from_bytes(read(self._pin))

    def federation(self) -> FederationManifest:
        """Returns the pinned epoch; raises as `welcome` does."""
        return self.welcome.manifest

    def check(self, now: datetime) -> dict[str, int]:
        """Returns the days left of everything that expires; warn a person at `certificates.WARN_DAYS` and below.

        Raises:
          Untrusted: something has expired or is not valid yet.
        """
        welcome = self.welcome
        return {
            "authority": check_valid(welcome.ca, now, "authority certificate"),
            "certificate": check_valid(welcome.certificate, now, f"certificate of site {self.settings.name!r}"),
            "federation": welcome.manifest.check_valid(now),
        }

    def read_policy(self) -> Policy:
        """Returns what the owner permits.

        Raises:
          ConfigError, DataError: `policy.toml` is wrong, or not there.
          PolicyRefusal: `site.toml` asks for noise from a seed, and the policy does not permit it.
        """
        policy, seed = Policy.read(self.policy), self.settings.simulation_seed
        if seed is not None and not policy.allow_seeded_noise:
            raise PolicyRefusal(
                f"simulation_seed={seed}: noise from a seed protects nobody, and policy.toml has "
                "allow_seeded_noise=false; remove it from site.toml"
            )
        return policy

    def ledger(self, policy: Policy) -> Ledger:
        """Returns the ledger of the site's data set, with the policy's cap, at the smaller of its delta and ours."""
        return Ledger(
            self.state / f"ledger-{self.settings.dataset}.jsonl",
            dataset=self.settings.dataset,
            epsilon_cap=policy.epsilon_cap,
            delta=min(policy.delta_cap, LARGEST_DELTA),
            accountant=ACCOUNTANT,
        )

    @property
    def audit(self) -> Audit:
        """The audit log of the site."""
        return Audit(self.state / "audit.jsonl")

    def strangers(self, federation: FederationManifest) -> dict[str, str]:
        """Returns the fingerprints of the members whom the owner has to confirm first, by site; see `consent`."""
        return strangers(self.settings, federation, self.audit)

    def request(self, now: datetime) -> Path:
        """Writes the request file again, of the new keys where a rotation has begun, and returns its path."""
        current, following = self.keys, self._next()
        previous = current.identity if following else None
        name, contact = self.settings.name, self.settings.contact
        made = write_request(following or current, name, now=now, contact=contact, previous=previous)
        write_atomically(self.folder / REQUEST, made.to_bytes())
        return self.folder / REQUEST

    def checked_welcome(self, data: bytes, *, now: datetime, expected: str | None) -> Welcome:
        """Returns a welcome that this site may join, before its owner consents to anything; writes nothing.

        Args:
          data: bytes of the welcome file.
          now: current time, for the checks of dates.
          expected: fingerprint that the coordinator read to the owner; None where the owner compares the shown one.

        Raises:
          MalformedMessage: the data are not a welcome.
          Untrusted: the welcome has another fingerprint, holds other keys than this site's, has expired, or does not
            follow from the pinned epoch.
        """
        welcome = Welcome.from_bytes(data)
        if expected is not None and digits_of(expected) != digits_of(welcome.fingerprint):
            raise Untrusted(
                f"fingerprint={welcome.fingerprint}: the coordinator read {expected}; do not join; "
                "ask the coordinator by telephone"
            )
        federation = welcome.manifest
        self._check_own(welcome, federation)
        check_issued(welcome.certificate, welcome.ca, "certificate")
        check_valid(welcome.ca, now, "authority certificate")
        check_valid(welcome.certificate, now, f"certificate of site {self.settings.name!r}")
        federation.check_valid(now)
        if self.joined:
            welcome.check_history(self.federation())
        return welcome

    def join(
        self, data: bytes, *, now: datetime, expected: str | None, consent: Consent = NOTHING_MORE
    ) -> FederationManifest:
        """Accepts a welcome for its owner, who has compared its fingerprint, and pins its epoch.

        Args:
          data: bytes of the welcome file.
          now: current time, for the checks of dates.
          expected: fingerprint that the coordinator read to the owner; None where the owner confirmed the shown one.
          consent: consent of the owner to members that `site.toml` does not name, and to a weaker federation.

        Raises:
          MalformedMessage: the data are not a welcome.
          Untrusted: see `checked_welcome`; or the welcome needs a consent that is missing.
        """
        federation = self.checked_welcome(data, now=now, expected=expected).manifest
        check_consent(federation, self.strangers(federation), consent)
        self._record(federation, consent, now)
        write_atomically(self.folder / "trust" / "federation" / f"epoch-{federation.epoch}.json", federation.to_bytes())
        write_atomically(self._pin, data)
        self._settle()
        return federation

    def sign(self) -> bytes:
        """Returns this owner's signature of the pinned epoch, and keeps it beside the epoch.

        Raises:
          Untrusted: `site.toml` has come to name known members, and the owner never confirmed the others.
        """
        federation = self.federation()
        check_consent(federation, self.strangers(federation), Consent(weaker=federation.weaker))
        signature = sign(federation, self.keys.identity)
        write_atomically(self.folder / "trust" / "federation" / f"epoch-{federation.epoch}.sig", signature)
        return signature

    def rotate(self, now: datetime) -> Path:
        """Makes new keys and a request that the old identity signs; the old keys serve until a new welcome is pinned.

        Raises:
          DataError: the site has not joined yet.
        """
        suite = self.federation().suite
        if self._next() is None:
            SiteKeys.create(self.folder / _NEXT, suite)
        return self.request(now)

    def leave(self) -> None:
        """Destroys the site's keys and certificate; ledger, audit log and policy stay with the owner.

        Raises:
          DataError: a key is still there.
        """
        write_atomically(self._left, b"this site has left; its keys are destroyed\n")
        for name in (_CURRENT, _NEXT, _OLD):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for path in (self.certificate, self.folder / REQUEST):
            path.unlink(missing_ok=True)
        if still := [name for name in (_CURRENT, _NEXT, _OLD) if (self.folder / name).exists()]:
            raise DataError(f"keys={', '.join(still)}: cannot be removed; remove them yourself: they act for this site")

    def _record(self, federation: FederationManifest, consent: Consent, now: datetime) -> None:
        """Writes to the audit log what the owner consented to beside the fingerprint."""
        epoch = {"epoch": federation.epoch, "manifest": federation.digest().hex()}
        if unknown := self.strangers(federation):
            self.audit.record(MEMBERS_CONFIRMED, now=now, **epoch, members=unknown)
        if consent.weaker:
            self.audit.record(WEAKER_SIGNED, now=now, **epoch, sentence=consent.weaker)

    def _next(self) -> SiteKeys | None:
        return SiteKeys.load(self.folder / _NEXT) if (self.folder / _NEXT).exists() else None

    def _check_own(self, welcome: Welcome, federation: FederationManifest) -> None:
        """Checks that the manifest and the certificate name this site's own keys, current or next."""
        name, own = self.settings.name, federation.member(self.settings.name)
        if welcome.site != name:
            raise Untrusted(f"welcome is for site={welcome.site!r}, this is {name!r}; ask for this site's own welcome")
        for keys in (self.keys, self._next()):
            if keys is None or keys.identity.public.hex() != own.identity:
                continue
            mine = (own.identity, keys.sealing.public.hex(), keys.node_public(), keys.tls_public())
            if own.contact != self.settings.contact:
                raise Untrusted(
                    f"contact={own.contact!r}: the coordinator shows the other owners this contact for site={name!r}, "
                    f"and site.toml says {self.settings.contact!r}; send the file of offsite client request again"
                )
            if own.keys == mine and certificates.certificate_key(welcome.certificate) == own.tls:
                return
        raise Untrusted(f"site={name!r}: the manifest or certificate has other keys than this site's; do not join")

    def _settle(self) -> None:
        """Brings the folder in line with the pin, also after a kill in the middle of a rotation."""
        if self._left.exists() or not self.joined:
            return
        welcome, current, following = self.welcome, self.folder / _CURRENT, self.folder / _NEXT
        identity = welcome.manifest.member(self.settings.name).identity
        upcoming = self._next()
        if upcoming is not None and upcoming.identity.public.hex() == identity:
            if current.exists():
                shutil.rmtree(self.folder / _OLD, ignore_errors=True)
                current.rename(self.folder / _OLD)
            following.rename(current)
        if current.exists():
            shutil.rmtree(self.folder / _OLD, ignore_errors=True)
        for path, content in ((self.ca, welcome.ca), (self.certificate, welcome.certificate)):
            if not path.exists() or path.read_bytes() != content:
                write_atomically(path, content)
