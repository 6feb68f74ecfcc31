"""Approvals of jobs by a site's owner: each approval, withdrawal and expiry is an entry of the audit log."""

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

from offsite.client.home.audit import Audit
from offsite.errors import ConfigError, DataError
from offsite.trust.files import write_atomically

APPROVED, WITHDRAWN, EXPIRED = "approved", "approval withdrawn", "approval expired"
DAYS, MOST_DAYS = 30, 365  # how long an approval holds


@dataclass(frozen=True)
class Approval:
    """The file `approved.json` in a job's folder.

    Attributes:
      approved: SHA-256 of the job's manifest, hexadecimal.
      by: login name of the person who approved.
      until: end of the approval, ISO 8601, UTC.
      entry: digest of the approval's entry in the audit log, hexadecimal.
    """

    approved: str
    by: str
    until: str
    entry: str


class Approvals:
    """The approvals of one site. An approval counts while its own entry is the audit log's last about its job.

    Args:
      folder: folder with one sub-folder for each job, named by the manifest's digest.
      audit: audit log of the site.
    """

    def __init__(self, folder: Path, audit: Audit) -> None:
        self._folder, self._audit = folder, audit
        self._on_record: set[Approval] = set()  # as found in the log; a withdrawal removes the file

    def add(self, digest: str, *, by: str, now: datetime, days: int = DAYS) -> Approval:
        """Approves a kept job; an approval that still holds is replaced.

        Raises:
          ConfigError: the number of days is out of its range.
          DataError: the log or the file cannot be written; the job is then not approved.
        """
        if not 1 <= days <= MOST_DAYS:
            raise ConfigError(f"days={days}: an approval holds for 1 to {MOST_DAYS} days; choose another number")
        until = (now + timedelta(days=days)).isoformat(timespec="seconds")
        link = self._audit.record(APPROVED, now=now, job=digest, by=by, until=until)
        approval = Approval(digest, by, until, link.digest)
        write_atomically(self._file(digest), json.dumps(asdict(approval)).encode())
        return approval

    def withdraw(self, digest: str, *, by: str, now: datetime) -> None:
        """Ends an approval at once, also where the disk has no room for the entry.

        Raises:
          DataError: the approval is withdrawn, and the audit log cannot be written.
        """
        self._file(digest).unlink(missing_ok=True)
        self._audit.record(WITHDRAWN, now=now, job=digest, by=by)

    def kept(self) -> frozenset[str]:
        """Returns the digests of the jobs with an approval, whether or not the approval still counts."""
        return frozenset(path.parent.name for path in self._folder.glob("*/approved.json"))

    def valid(self, now: datetime) -> frozenset[str]:
        """Returns the digests of the jobs that may train now; an approval that has run out gets its entry and goes.

        Raises:
          DataError: an approval or the audit log is damaged, or the entry cannot be written.
        """
        found = {path: _read(path) for path in sorted(self._folder.glob("*/approved.json"))}
        valid = set()
        for path, approval in found.items():
            if approval is None or approval.approved != path.parent.name:  # a copied file approves nothing
                continue
            if _moment(approval.until, path) <= now:
                self._audit.record(EXPIRED, now=now, job=approval.approved, until=approval.until)
                path.unlink(missing_ok=True)
            elif self._is_on_record(approval):
                valid.add(approval.approved)
        return frozenset(valid)

    def _is_on_record(self, approval: Approval) -> bool:
        if approval not in self._on_record:
            kinds = (APPROVED, WITHDRAWN, EXPIRED)
            last = {link.fields["job"]: link for link in self._audit.entries() if link.kind in kinds}
            link = last.get(approval.approved)
            if link is None or link.kind != APPROVED:
                return False
            if (link.digest, link.fields["until"]) != (approval.entry, approval.until):
                return False
            self._on_record.add(approval)
        return True

    def _file(self, digest: str) -> Path:
        return self._folder / digest / "approved.json"


def _read(path: Path) -> Approval | None:
    """Returns an approval; None where the file is gone meanwhile, or has other fields than this release writes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"approval={str(path)!r} is not readable; approve the job again") from error
    if not isinstance(content, dict) or content.keys() != Approval.__dataclass_fields__.keys():
        return None
    return Approval(**{name: str(value) for name, value in content.items()})


def _moment(text: str, path: Path) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise DataError(f"approval={str(path)!r}: until={text!r} is no time; approve the job again") from error
    if moment.tzinfo is None:
        raise DataError(f"approval={str(path)!r}: until={text!r} has no time zone; approve the job again")
    return moment
