"""A job's packages, ready to hand out: each encrypted once as one stream, its key sealed to the sites that get it."""

import hashlib
import json
import logging
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from offsite.coordinator.job.emulators import folders
from offsite.coordinator.job.store import Store
from offsite.emulator.package import archive
from offsite.errors import DataError
from offsite.protos.job_manifest import JobManifest
from offsite.protos.signed_job import package_context
from offsite.trust import streaming
from offsite.trust.federation_manifest import FederationManifest
from offsite.trust.files import put_in_place, write_atomically
from offsite.trust.sealing import seal
from offsite.trust.streaming import COPIES_TO_OPEN

log = logging.getLogger("offsite.coordinator")
KEY_BYTES = 32


@dataclass(frozen=True)
class Delivery:
    """An encrypted package in the depot.

    Attributes:
      sha256: SHA-256 of the encrypted file, 32 bytes.
      size: size of the encrypted file in bytes.
      sealed: sealed key of the package by site, for the sites that get it.
    """

    sha256: bytes
    size: int
    sealed: dict[str, bytes]


def deliver_all(
    store: Store, depot: Path, manifest: JobManifest, federation: FederationManifest
) -> dict[str, Delivery]:
    """Puts every package of a job into the depot and returns each site's delivery; no site can open another's package.

    Args:
      store: run folder with the packages; keeps the returned deliveries too.
      depot: folder of the depot.
      manifest: the job.
      federation: members to whom the keys are sealed.

    Raises:
      DataError: the disk is full, or the depot's folder cannot be made.
    """
    deliveries: dict[str, Delivery] = {}
    places = folders(store, manifest)
    for digest, sites in manifest.shipped().items():
        package = places[digest]
        name = "delivery" if digest == manifest.emulator else f"delivery-{package.name}"
        facts = store.folder / f"{name}.json"
        deliveries |= dict.fromkeys(sites, deliver(package, depot, manifest, federation, facts, sites=sites))
    return deliveries


def deliver(
    package: Path,
    depot: Path,
    manifest: JobManifest,
    federation: FederationManifest,
    facts: Path,
    *,
    sites: Collection[str],
) -> Delivery:
    """Puts a package of a job into the depot and returns what its offers say; a restart returns the same again.

    Where the file or the facts are damaged, both are made anew, under another key and name. A site that had fetched a
    part under the old name begins again with its next offer; the old file, if whole, stays for sites that still fetch.

    Args:
      package: package folder.
      depot: folder of the depot; the file is named by its SHA-256.
      manifest: the job.
      federation: federation whose members get the package.
      facts: file that keeps the returned delivery.
      sites: names of the members to whom the key is sealed.

    Raises:
      DataError: the disk is full, or the depot's folder cannot be made.
    """
    if (known := _known(facts)) is not None and _is_whole(depot, known, sites):
        return known
    _make(depot)
    for left in depot.glob(".*"):  # left by a coordinator that was killed here; only one runs at a time
        left.unlink()
    key = secrets.token_bytes(KEY_BYTES)
    sealed_file = _encrypt(package, depot, key)
    digest = _sha256(sealed_file)
    path = depot / digest.hex()
    put_in_place(sealed_file, path)
    context = package_context(manifest, digest)
    sealed = {
        member.site: seal(federation.suite, bytes.fromhex(member.sealing), key, context)
        for member in federation.members
        if member.site in sites
    }
    boxes = {site: box.hex() for site, box in sealed.items()}
    delivery = Delivery(digest, path.stat().st_size, sealed)
    log.info(
        "package %s: %.2f GB; a site needs %.2f GB of disk while it unpacks the package",
        digest.hex()[:12],
        delivery.size / 1e9,
        COPIES_TO_OPEN * delivery.size / 1e9,
    )
    write_atomically(facts, json.dumps({"sha256": digest.hex(), "size": delivery.size, "sealed": boxes}).encode())
    return delivery


def _make(depot: Path) -> None:
    try:
        depot.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"depot={str(depot)!r}: cannot be made ({error.strerror}); free disk space") from error


def _known(facts: Path) -> Delivery | None:
    """Returns the delivery that an earlier start wrote down; None if there is none or it is damaged."""
    try:
        content = json.loads(facts.read_text(encoding="utf-8"))
        sealed = {site: bytes.fromhex(box) for site, box in content["sealed"].items()}
        return Delivery(bytes.fromhex(content["sha256"]), int(content["size"]), sealed)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("delivery=%r is damaged (%s); the package is encrypted anew", str(facts), type(error).__name__)
        return None


def _is_whole(depot: Path, delivery: Delivery, sites: Collection[str]) -> bool:
    """Returns whether a file matches its facts, for these sites; a damaged file is removed and not offered again."""
    path = depot / delivery.sha256.hex()
    if not path.is_file() or delivery.sealed.keys() != set(sites):
        return False
    if path.stat().st_size == delivery.size and _sha256(path) == delivery.sha256:
        return True
    log.warning("package=%r is damaged; it is encrypted anew", str(path))
    path.unlink()
    return False


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _encrypt(package: Path, depot: Path, key: bytes) -> Path:
    """Writes the encrypted stream of a package under a temporary name and returns its path."""
    name = secrets.token_hex(8)
    plain, target = depot / f".{name}.plain", depot / f".{name}.sealed"
    try:
        with plain.open("wb") as stream:
            archive.write(package, stream)
        with plain.open("rb") as stream, target.open("wb") as sealed:
            streaming.encrypt(stream, sealed, key)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise DataError(f"depot={str(depot)!r}: cannot be written ({error.strerror}); free disk space") from error
    finally:
        plain.unlink(missing_ok=True)
    return target
