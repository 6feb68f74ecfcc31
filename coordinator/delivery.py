"""A job's package, made ready to hand out: one stream, encrypted once, its key sealed to each site."""

import hashlib
import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from coordinator.store import write_atomically
from emulator import archive
from errors import DataError
from protos.manifest import JobManifest
from protos.signed_job import package_context
from trust import streaming
from trust.federation import Federation
from trust.sealing import seal

KEY_BYTES = 32


@dataclass(frozen=True)
class Delivery:
    """An encrypted package in the depot.

    Attributes:
      sha256: of the encrypted file, 32 bytes.
      size: its bytes.
      sealed: the key, sealed to each site.
    """

    sha256: bytes
    size: int
    sealed: dict[str, bytes]


def deliver(package: Path, depot: Path, manifest: JobManifest, federation: Federation, facts: Path) -> Delivery:
    """Puts the package of a job into the depot and returns what its offers say; the same again after a restart.

    Args:
      package: package folder.
      depot: folder of the depot; the file is named by its SHA-256.
      manifest: the job.
      federation: whose members it is sealed to.
      facts: file that keeps what is returned.

    Raises:
      DataError: no room on the disk.
    """
    if facts.exists():
        content = json.loads(facts.read_text(encoding="utf-8"))
        if (depot / content["sha256"]).is_file():
            sealed = {site: bytes.fromhex(box) for site, box in content["sealed"].items()}
            return Delivery(bytes.fromhex(content["sha256"]), int(content["size"]), sealed)
    depot.mkdir(parents=True, exist_ok=True)
    for left in depot.glob(".*"):  # by a coordinator that was killed in the middle; there is one at a time
        left.unlink()
    key = secrets.token_bytes(KEY_BYTES)
    path = _encrypt(package, depot, key)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    path = path.rename(depot / digest.hex())
    context = package_context(manifest, digest)
    sealed = {
        member.site: seal(federation.suite, bytes.fromhex(member.sealing), key, context)
        for member in federation.members
    }
    boxes = {site: box.hex() for site, box in sealed.items()}
    delivery = Delivery(digest, path.stat().st_size, sealed)
    write_atomically(facts, json.dumps({"sha256": digest.hex(), "size": delivery.size, "sealed": boxes}).encode())
    return delivery


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
