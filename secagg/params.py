"""The public terms of one round, agreed before the round opens, and the hash T0 that ties every message to them."""

import hashlib
import math
import struct
from dataclasses import dataclass
from functools import cached_property

from offsite.errors import ConfigError
from offsite.secagg import ring
from offsite.trust.collusion import MIN_SITES, fewest_in_sum
from offsite.trust.identity import KEY_BYTES
from offsite.trust.wire import MAX_SITE_BYTES, Writer

SUITE = 1
MAX_SITES = 64  # a complete graph of pair masks; above it a sparse graph would be needed
DIGEST_BYTES = 32
NONCE_BYTES = (16, 64)
_OPEN = "offsite secagg open"
_NUMBER_LIMIT = 1 << 63


@dataclass(frozen=True)
class SecAggParams:
    """The public terms of a round; they have equal bytes at every site, or the signatures do not verify.

    Attributes:
      federation: id of the federation, UTF-8.
      epoch: version of the manifest, >= 0.
      round: number of the round in this epoch, >= 0.
      nonce: 16 to 64 random bytes chosen by the coordinator.
      manifest: SHA-256 of the manifest that every owner signed.
      emulator: SHA-256 of the emulator package.
      adapter: SHA-256 of the adapter layout and start values.
      config: SHA-256 of the training configuration.
      roster: invited sites, sorted by id, each with its raw Ed25519 public key.
      n_min: fewest sites in a sum, >= 3 and >= accomplices + 2.
      accomplices: number of sites that may help the coordinator, >= 0; counted against all members of the federation
        and not against the invited sites, because the coordinator picks who is invited.
      length: coordinates of an update, d.
      clip: per-coordinate bound of an update, finite and > 0; used as the nearest float32.
      suite: 1 (X25519, Ed25519, HKDF-SHA256, AES-256-GCM, AES-256-CTR).
    """

    federation: str
    epoch: int
    round: int
    nonce: bytes
    manifest: bytes
    emulator: bytes
    adapter: bytes
    config: bytes
    roster: tuple[tuple[str, bytes], ...]
    n_min: int
    accomplices: int
    length: int
    clip: float
    suite: int = SUITE

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_digests(self)
        _check_roster(self.roster)
        if not MIN_SITES <= self.n_min <= len(self.roster):
            raise ConfigError(
                f"n_min={self.n_min} with invited={len(self.roster)}; {MIN_SITES} <= n_min <= invited; "
                "invite more sites"
            )
        if self.n_min < (needed := fewest_in_sum(self.accomplices)):
            raise ConfigError(
                f"n_min={self.n_min} with accomplices={self.accomplices}; n_min >= {needed}, so that each sum holds "
                "two sites that do not help the coordinator; raise n_min"
            )

    @property
    def sites(self) -> tuple[str, ...]:
        """The invited ids in order; the place of a site, counted from one, is its Shamir point."""
        return tuple(site for site, _ in self.roster)

    @property
    def threshold(self) -> int:
        """Number of shares that reconstruct a secret: more than (n + a) / 2 and more than 2n / 3 of the *invited* n.

        Two survivor sets with this many signatures each share more than a signers, so one who signs one set only; the
        same holds for the two secrets of one site. A count of the sites that answered would let the coordinator choose
        the number. docs/secure-aggregation.md has the proof.
        """
        invited = len(self.roster)
        return max((invited + self.accomplices) // 2, 2 * invited // 3) + 1

    @property
    def min_sites(self) -> int:
        """Fewest sites of any set in this round: the larger of the threshold and n_min."""
        return max(self.threshold, self.n_min)

    def public_key(self, site: str) -> bytes | None:
        """Returns the site's Ed25519 public key, or None when it is not invited."""
        return self._public_keys.get(site)

    @cached_property
    def _public_keys(self) -> dict[str, bytes]:
        return dict(self.roster)

    def t0(self) -> bytes:
        """Returns T0, the SHA-256 over every term, each field with its length in front."""
        return self._t0

    @cached_property
    def _t0(self) -> bytes:
        writer = Writer().text(_OPEN).number(self.suite).text(self.federation).number(self.epoch).number(self.round)
        for value in (self.nonce, self.manifest, self.emulator, self.adapter, self.config):
            writer.field(value)
        writer.number(len(self.roster))
        for site, key in self.roster:
            writer.text(site).field(key)
        writer.number(self.n_min).number(self.accomplices).number(self.length).field(struct.pack(">d", self.clip))
        return hashlib.sha256(writer.done()).digest()


def _check_numbers(terms: SecAggParams) -> None:
    if terms.suite != SUITE:
        raise ConfigError(f"suite={terms.suite} is not implemented; suite {SUITE} is; change the manifest")
    for name, lowest in (("epoch", 0), ("round", 0), ("length", 1), ("n_min", MIN_SITES), ("accomplices", 0)):
        value = getattr(terms, name)
        if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value < _NUMBER_LIMIT:
            raise ConfigError(f"{name}={value!r}; a whole number of at least {lowest} is needed; change the manifest")
    if not isinstance(terms.clip, float) or not math.isfinite(terms.clip) or terms.clip <= 0:
        raise ConfigError(f"clip={terms.clip!r}; a finite number above zero is needed; change the manifest")
    ring.bound(terms.clip)


def _check_digests(terms: SecAggParams) -> None:
    if not terms.federation or len(terms.federation.encode()) > MAX_SITE_BYTES:
        raise ConfigError(f"federation={terms.federation!r}; 1 to {MAX_SITE_BYTES} bytes are needed; rename it")
    low, high = NONCE_BYTES
    if not isinstance(terms.nonce, bytes) or not low <= len(terms.nonce) <= high:
        raise ConfigError(f"nonce={len(terms.nonce)} bytes; {low} to {high} random bytes are needed; draw it again")
    for name in ("manifest", "emulator", "adapter", "config"):
        value = getattr(terms, name)
        if not isinstance(value, bytes) or len(value) != DIGEST_BYTES:
            raise ConfigError(f"{name}={value!r} is not a digest; pass the {DIGEST_BYTES} bytes of a SHA-256")


def _check_roster(roster: tuple[tuple[str, bytes], ...]) -> None:
    if not MIN_SITES <= len(roster) <= MAX_SITES:
        raise ConfigError(f"invited={len(roster)}; {MIN_SITES} to {MAX_SITES} sites make a round; change the cohort")
    sites = [site for site, _ in roster]
    if sites != sorted(set(sites)):
        raise ConfigError("roster has its ids out of order or twice; sort them and keep each once")
    for site, key in roster:
        if not site or len(site.encode()) > MAX_SITE_BYTES:
            raise ConfigError(f"site={site!r}; an id has 1 to {MAX_SITE_BYTES} bytes; rename the site")
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise ConfigError(f"site={site!r} has no raw Ed25519 key of {KEY_BYTES} bytes; correct the manifest")
    if len({key for _, key in roster}) != len(roster):
        raise ConfigError("roster lists one public key for two sites; every site needs its own; correct the manifest")
