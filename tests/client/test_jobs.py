"""Offers and approvals: what an owner inspected stays, and nothing else is approved by a name that looks like it."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from offsite.client.home.approvals import DAYS, MOST_DAYS
from offsite.client.home.jobs import MAX_UNSEEN, Jobs
from offsite.errors import ConfigError, DataError, UnknownName
from offsite.trust.chain import Chain
from tests.protos.test_manifest import JOB

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
HONEST, TWIN, OTHER = "3f2a91c07d5e" + "a" * 52, "3f2a91c07d5e" + "b" * 52, "77" * 32


class Offers:
    """The jobs of a site in a folder, and a coordinator that offers what it likes under any digest."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs, self._count = folder / "jobs", Jobs(folder / "jobs"), 0

    def offer(self, *digests: str) -> None:
        for digest in digests:
            self.jobs.keep(JOB.to_bytes(), bytes(64), digest)
            self._count += 1
            os.utime(self.folder / digest / "manifest.json", ns=(self._count, self._count))

    def approve(self, digest: str, days: int = DAYS) -> None:
        self.jobs.show(digest, now=NOW)
        self.jobs.approve(digest, by="owner", now=NOW, days=days)

    def approval(self, digest: str) -> Path:
        return self.folder / digest / "approved.json"

    def entries(self) -> list[tuple[str, dict[str, str]]]:
        links = Chain(self.folder.parent / "audit.jsonl", "offsite audit").links()
        return [(link.kind, link.fields) for link in links]


@pytest.fixture
def site(tmp_path: Path) -> Offers:
    return Offers(tmp_path)


def flood(count: int) -> list[str]:
    return [f"{number:064x}" for number in range(count)]


def test_offers_do_not_push_out_what_was_inspected(site: Offers) -> None:
    """A hundred offers once removed the oldest offer that was not approved, and a twin could take its place."""
    site.offer(HONEST, OTHER)
    site.jobs.show(HONEST, now=NOW)
    site.offer(*flood(150), TWIN)
    kept = site.jobs.names()
    assert HONEST in kept
    assert OTHER not in kept
    assert len(kept) == MAX_UNSEEN + 1
    with pytest.raises(UnknownName, match="all 64 if two jobs begin alike"):
        site.jobs.inspect(HONEST[:12], bytes(32))


def test_offers_do_not_push_out_what_was_approved(site: Offers) -> None:
    site.offer(HONEST)
    site.approve(HONEST)
    (site.folder / HONEST / "shown").unlink()
    site.offer(*flood(150))
    assert site.jobs.approved(NOW) == {HONEST}


def test_a_twin_is_not_approved_in_the_place_of_what_was_inspected(site: Offers) -> None:
    """Two jobs with the same twelve digits; such a twin took 72 s to make."""
    site.offer(HONEST)
    site.jobs.show(HONEST, now=NOW)
    site.offer(TWIN)
    for name, reason in (
        (HONEST[:8], "an approval takes all 64 digits"),
        (TWIN[:63], "an approval takes all 64 digits"),
        (TWIN, "was not inspected here"),
        (OTHER, "was not inspected here"),
        ("", "an approval takes all 64 digits"),
    ):
        with pytest.raises(UnknownName, match=reason):
            site.jobs.approve(name, by="owner", now=NOW)
    assert site.jobs.approved(NOW) == frozenset()
    assert site.jobs.digest_to_approve(None) == HONEST
    site.jobs.approve(HONEST, by="owner", now=NOW)
    assert site.jobs.approved(NOW) == {HONEST}


def test_without_a_hash_it_is_the_job_that_was_shown_last(site: Offers) -> None:
    with pytest.raises(UnknownName, match="none was inspected yet"):
        site.jobs.digest_to_approve(None)
    site.offer(HONEST, TWIN, OTHER)
    for minute, digest in enumerate((TWIN, OTHER, HONEST, TWIN)):
        site.jobs.show(digest, now=NOW + timedelta(minutes=minute))
        assert site.jobs.digest_to_approve(None) == digest
    with pytest.raises(UnknownName, match="newer offers took its place"):
        site.jobs.show("99" * 32, now=NOW)


def test_every_approval_its_end_and_its_withdrawal_stand_in_the_audit_log(site: Offers) -> None:
    site.offer(HONEST, TWIN, OTHER)
    for digest in (HONEST, TWIN):
        site.approve(digest, days=2)
    with pytest.raises(UnknownName, match="all 64 if two jobs begin alike"):
        site.jobs.withdraw(HONEST[:12], by="owner", now=NOW)
    with pytest.raises(UnknownName):
        site.jobs.withdraw(OTHER, by="owner", now=NOW)
    assert site.jobs.withdraw(TWIN, by="owner", now=NOW) == TWIN
    end = NOW + timedelta(days=2)
    assert site.jobs.approved(end - timedelta(seconds=1)) == {HONEST}
    for _ in range(2):
        assert site.jobs.approved(end) == frozenset()
    until = end.isoformat(timespec="seconds")
    assert site.entries() == [
        ("approved", {"job": HONEST, "by": "owner", "until": until}),
        ("approved", {"job": TWIN, "by": "owner", "until": until}),
        ("approval withdrawn", {"job": TWIN, "by": "owner"}),
        ("approval expired", {"job": HONEST, "until": until}),
    ]
    site.approve(HONEST)
    assert site.jobs.approved(end) == {HONEST}


@pytest.mark.parametrize("days", [0, -1, MOST_DAYS + 1])
def test_an_approval_has_an_end(site: Offers, days: int) -> None:
    site.offer(HONEST)
    with pytest.raises(ConfigError, match=f"days={days}"):
        site.approve(HONEST, days=days)
    assert site.entries() == []


def test_an_approval_without_its_entry_counts_for_nothing(site: Offers, tmp_path: Path) -> None:
    """Neither a copy, nor a longer one, nor one that comes back after a withdrawal, also after a restart."""
    site.offer(HONEST, OTHER)
    site.approve(HONEST)
    genuine = site.approval(HONEST).read_bytes()
    content = json.loads(genuine)
    later = (NOW + timedelta(days=300)).isoformat(timespec="seconds")
    for forged in (
        content | {"until": later},
        content | {"entry": "00" * 32},
        {"approved": HONEST, "by": "owner", "at": "now"},
        [HONEST],
    ):
        site.approval(HONEST).write_text(json.dumps(forged))
        assert Jobs(site.folder).approved(NOW) == frozenset()
    for forged in (content, content | {"approved": OTHER}):
        site.approval(OTHER).write_text(json.dumps(forged))
        site.approval(HONEST).write_bytes(genuine)
        assert Jobs(site.folder).approved(NOW) == {HONEST}
    site.approval(OTHER).unlink()
    site.jobs.withdraw(HONEST, by="owner", now=NOW)
    site.approval(HONEST).write_bytes(genuine)
    assert Jobs(site.folder).approved(NOW) == frozenset()


def test_an_unreadable_approval_or_log_permits_nothing(site: Offers) -> None:
    site.offer(HONEST)
    site.approve(HONEST)
    for text in ("{", json.dumps(json.loads(site.approval(HONEST).read_text()) | {"until": "soon"})):
        site.approval(HONEST).write_text(text)
        with pytest.raises(DataError, match="approve the job again"):
            site.jobs.approved(NOW)
    site.approve(HONEST)
    log = site.folder.parent / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"by":"owner"', b'"by":"other"', 1))
    with pytest.raises(DataError, match="not what was written there"):
        Jobs(site.folder).approved(NOW)


def test_what_cannot_be_written_down_is_not_approved_and_yet_withdrawn(site: Offers) -> None:
    site.offer(HONEST, OTHER)
    site.approve(HONEST)
    site.jobs.show(OTHER, now=NOW)
    log = site.folder.parent / "audit.jsonl"
    log.rename(log.with_suffix(".kept"))
    log.mkdir()
    with pytest.raises(DataError):
        site.jobs.approve(OTHER, by="owner", now=NOW)
    with pytest.raises(DataError):
        site.jobs.withdraw(HONEST, by="owner", now=NOW)
    log.rmdir()
    log.with_suffix(".kept").rename(log)
    assert Jobs(site.folder).approved(NOW) == frozenset()
