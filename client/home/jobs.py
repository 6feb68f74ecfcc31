"""The jobs that were offered to a site: kept for the owner to inspect, and to approve by the digest that was shown."""

import json
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from offsite.client.home.approvals import DAYS, Approval, Approvals
from offsite.client.home.audit import Audit
from offsite.errors import UnknownName, Untrusted
from offsite.protos.job_manifest import DIGEST_BYTES, JobManifest
from offsite.protos.signed_job import check_job
from offsite.trust.files import make_private, write_atomically

MAX_UNSEEN = 100  # offers that are kept for an owner who has not looked
_PACKAGE, _COST = "package.json", "cost.txt"
SHORTEST = 8  # hexadecimal digits with which an owner may name a job to look at


@dataclass(frozen=True)
class Offered:
    """One offered job: its manifest, and the coordinator's signature."""

    manifest: JobManifest
    signature: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, hexadecimal; each approval is pinned to this digest."""
        return self.manifest.digest().hex()


class Jobs:
    """The offered jobs of one site.

    Args:
      folder: folder with one sub-folder for each job, named by the manifest's digest; the site's audit log lies beside
        the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._approvals = Approvals(folder, Audit(folder.parent / "audit.jsonl"))

    def keep(self, manifest: bytes, signature: bytes, digest: str) -> None:
        """Keeps an offer; a repeated offer changes nothing.

        The oldest of too many offers that nobody looked at is removed; an inspected or approved offer never is.

        Raises:
          DataError: the disk is full.
        """
        place = self._folder / digest
        make_private(place)
        write_atomically(place / "signature.hex", signature.hex().encode())
        write_atomically(place / "manifest.json", manifest)  # last: a folder without a manifest is not an offer
        looked_at = self._approvals.kept() | self._shown().keys()
        unseen = [name for name in self.names() if name not in looked_at]
        unseen.sort(key=lambda name: (name == digest, (self._folder / name / "manifest.json").stat().st_mtime_ns))
        for name in unseen[:-MAX_UNSEEN]:
            shutil.rmtree(self._folder / name)

    def keep_package(self, digest: str, package: bytes, size: int) -> None:
        """Keeps the SHA-256 and the size in bytes of a job's encrypted package, as the newest offer names both.

        Raises:
          DataError: the disk is full.
        """
        if self.package(digest) != (package.hex(), size):
            content = json.dumps({"sha256": package.hex(), "bytes": size})
            write_atomically(self._folder / digest / _PACKAGE, content.encode())

    def package(self, digest: str) -> tuple[str, int] | None:
        """Returns the SHA-256, hexadecimal, and the size in bytes of a job's encrypted package, or None."""
        try:
            content = json.loads((self._folder / digest / _PACKAGE).read_text(encoding="ascii"))
            return str(content["sha256"]), int(content["bytes"])
        except (OSError, ValueError, KeyError, TypeError):  # the next offer writes it anew
            return None

    def keep_cost(self, digest: str, line: str) -> None:
        """Keeps the sentence about what a job costs at this site, where the job is kept; it never leaves the site.

        Raises:
          DataError: the disk is full.
        """
        if (self._folder / digest).is_dir():
            write_atomically(self._folder / digest / _COST, line.encode())

    def cost(self, digest: str) -> str:
        """Returns what `keep_cost` kept; empty before the job's emulator was opened here."""
        try:
            return (self._folder / digest / _COST).read_text(encoding="utf-8")
        except OSError:
            return ""

    def show(self, digest: str, *, now: datetime) -> None:
        """Marks a job as shown to its owner: it is kept from now on, and may be approved.

        Raises:
          UnknownName: the job is no longer kept.
          DataError: the disk is full.
        """
        place = self._folder / digest
        if place.is_dir():
            write_atomically(place / "shown", now.isoformat().encode())
        if digest not in self.names():
            raise UnknownName(f"job={digest}: newer offers took its place just now; inspect again")

    def digest_to_approve(self, name: str | None) -> str:
        """Returns the digest that an owner approves: all of its digits, or without a name the last inspected job's.

        The first digits are not enough, because a second job that begins with them takes seconds to make.

        Raises:
          UnknownName: the name is not a whole digest, or `inspect` has not shown the job at this site.
        """
        shown = self._shown()
        if name is None:
            if not shown:
                raise UnknownName("job: none was inspected yet; offsite client inspect shows one")
            return max(shown, key=lambda digest: (shown[digest], digest))
        if len(name) != 2 * DIGEST_BYTES:
            raise UnknownName(
                f"job={name!r}: an approval takes all {2 * DIGEST_BYTES} digits, since a job with the same first "
                "digits is quickly made; offsite client inspect prints the command, or leave the hash out to approve "
                "the job that was inspected last"
            )
        if name not in shown:
            raise UnknownName(f"job={name!r} was not inspected here; offsite client inspect shows it before approval")
        return name

    def approve(self, digest: str, *, by: str, now: datetime, days: int = DAYS) -> Approval:
        """Approves a job that its owner inspected, by its whole digest.

        Raises:
          UnknownName: the name is not a whole digest, or the job was not shown.
          ConfigError: the number of days is out of its range.
          DataError: the audit log or the approval cannot be written.
        """
        return self._approvals.add(self.digest_to_approve(digest), by=by, now=now, days=days)

    def withdraw(self, name: str, *, by: str, now: datetime) -> str:
        """Withdraws the approval of a job by its digest or the beginning of it, and returns the digest.

        Raises:
          UnknownName: no approved job, or more than one, begins with the name.
          DataError: the approval is withdrawn, and the audit log cannot be written.
        """
        digest = _match(name, sorted(self._approvals.kept()), "approved jobs")
        self._approvals.withdraw(digest, by=by, now=now)
        return digest

    def approved(self, now: datetime) -> frozenset[str]:
        """Returns the digests of the jobs whose approval holds now; see `Approvals.valid`."""
        return self._approvals.valid(now)

    def inspect(self, name: str, coordinator: bytes) -> Offered:
        """Returns one job, verified again.

        Raises:
          UnknownName: no job, or more than one job, begins with the name.
          Untrusted: the kept manifest has another digest than its folder's name says.
        """
        digest = _match(name, self.names(), "jobs")
        place = self._folder / digest
        signature = bytes.fromhex((place / "signature.hex").read_text(encoding="ascii"))
        manifest = check_job(coordinator, (place / "manifest.json").read_bytes(), signature)
        if manifest.digest().hex() != digest:
            raise Untrusted(f"job={digest[:12]}: its manifest has another hash; remove {place} and wait for the offer")
        return Offered(manifest, signature)

    def names(self) -> list[str]:
        """Returns the digests of all jobs, by name."""
        return sorted(path.name for path in self._folder.glob("*") if (path / "manifest.json").is_file())

    def _shown(self) -> dict[str, str]:
        """Returns when each inspected job was last shown, ISO 8601, by digest."""
        paths = (self._folder / name / "shown" for name in self.names())
        return {path.parent.name: path.read_text(encoding="ascii") for path in paths if path.is_file()}


def _match(name: str, digests: list[str], what: str) -> str:
    matches = [digest for digest in digests if digest.startswith(name)]
    if len(name) < SHORTEST or len(matches) != 1:
        raise UnknownName(
            f"job={name!r}: give {SHORTEST} or more digits of one job's hash, all {2 * DIGEST_BYTES} if two jobs begin "
            f"alike; {what}: {', '.join(digests) or 'none'}"
        )
    return matches[0]
