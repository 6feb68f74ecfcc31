"""The jobs that were offered to a site: kept for the owner to read, and to approve by their hash."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.errors import DataError, UnknownName, Untrusted
from offsite.protos.job_manifest import JobManifest
from offsite.protos.signed_job import check_job
from offsite.trust.files import make_private, write_atomically

MAX_UNAPPROVED = 100  # offers that are kept for an owner who has not looked
SHORTEST = 8  # hexadecimal digits with which an owner may name a job


@dataclass(frozen=True)
class Offered:
    """One offered job: its manifest, the coordinator's signature, and whether the owner approved it."""

    manifest: JobManifest
    signature: bytes
    approved: bool

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, hexadecimal; each approval is pinned to this digest."""
        return self.manifest.digest().hex()


class Jobs:
    """The offered jobs of one site.

    Args:
      folder: folder with one sub-folder for each job, named by the manifest's digest.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, manifest: bytes, signature: bytes, digest: str) -> None:
        """Keeps an offer; a repeated offer changes nothing, and the oldest of too many unapproved offers is removed.

        Raises:
          DataError: the disk is full.
        """
        place = self._folder / digest
        make_private(place)
        write_atomically(place / "signature.hex", signature.hex().encode())
        write_atomically(place / "manifest.json", manifest)  # last: a folder without a manifest is not an offer
        waiting = [name for name in self.names() if name not in self.approved()]
        waiting.sort(key=lambda name: (name == digest, (self._folder / name / "manifest.json").stat().st_mtime_ns))
        for name in waiting[:-MAX_UNAPPROVED]:
            shutil.rmtree(self._folder / name)

    def approve(self, name: str, *, by: str, at: str) -> str:
        """Approves a job by its digest or the beginning of it, and returns the digest.

        Raises:
          UnknownName: no job, or more than one job, begins with the name.
          DataError: the disk is full.
        """
        digest = self._find(name)
        content = json.dumps({"approved": digest, "by": by, "at": at})
        write_atomically(self._folder / digest / "approved.json", content.encode())
        return digest

    def approved(self) -> frozenset[str]:
        """Returns the digests of all approved jobs."""
        return frozenset(path.parent.name for path in self._folder.glob("*/approved.json") if _approves(path))

    def inspect(self, name: str, coordinator: bytes) -> Offered:
        """Returns one job, verified again.

        Raises:
          UnknownName: no job, or more than one job, begins with the name.
          Untrusted: the kept manifest has another digest than its folder's name says.
        """
        digest = self._find(name)
        place = self._folder / digest
        signature = bytes.fromhex((place / "signature.hex").read_text(encoding="ascii"))
        manifest = check_job(coordinator, (place / "manifest.json").read_bytes(), signature)
        if manifest.digest().hex() != digest:
            raise Untrusted(f"job={digest[:12]}: its manifest has another hash; remove {place} and wait for the offer")
        return Offered(manifest, signature, digest in self.approved())

    def names(self) -> list[str]:
        """Returns the digests of all jobs, by name."""
        return sorted(path.name for path in self._folder.glob("*") if (path / "manifest.json").is_file())

    def _find(self, name: str) -> str:
        matches = [digest for digest in self.names() if digest.startswith(name)]
        if len(name) < SHORTEST or len(matches) != 1:
            known = ", ".join(digest[:12] for digest in self.names()) or "none"
            raise UnknownName(f"job={name!r}: give {SHORTEST} or more digits of one job's hash; known: {known}")
        return matches[0]


def _approves(path: Path) -> bool:
    """Says whether an approval names the job in whose folder the file lies; a copied file approves nothing."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"approval={str(path)!r} is not readable; approve the job again") from error
    return isinstance(content, dict) and content.get("approved") == path.parent.name
