"""Identities that are revoked, expired or there twice: refused with a reason, and the others go on."""

import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from offsite.client.home.installation import SiteHome
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.coordinator.rounds.round import run_round
from offsite.trust.request import SiteRequest
from tests.faults.conftest import SITES, Federation, wait_for
from tests.faults.hostile import HostileCoordinator
from tests.forked import offsite

pytestmark = pytest.mark.slow


@pytest.fixture
def stopped(fed: Path, tmp_path: Path) -> Iterator[Federation]:
    """Four sites that do not run yet."""
    made = Federation(tmp_path, fed, sites=(*SITES, "elm"))
    try:
        yield made
    finally:
        made.stop()


def sign_newest(federation: Federation, *sites: str) -> None:
    printed = offsite("coordinator", "approve", str(federation.home), *_requests(federation, sites), "--yes")
    fingerprint = re.search(r"to compare: (\S+)", printed)
    assert fingerprint is not None
    for site in sites:
        welcome = str(federation.home / "welcomes" / f"{site}.welcome")
        offsite("client", "sign", str(federation.site(site)), welcome, "--fingerprint", fingerprint[1])


def _requests(federation: Federation, sites: tuple[str, ...]) -> list[str]:
    return [str(federation.site(site) / "site.request") for site in sites]


def test_a_revoked_site_stays_out_and_is_told_why(stopped: Federation) -> None:
    offsite("coordinator", "revoke", str(stopped.home), "elm", "--yes")
    sign_newest(stopped, *SITES)
    stopped.start_sites()
    job = stopped.job("revoked", rounds=1)
    stopped.start_coordinator(job)
    assert stopped.finish() == 0, stopped.log("coordinator")
    assert set(stopped.status()["sites"]) == set(SITES)
    assert stopped.ledger("elm") == []
    assert re.search("does not let this site in yet, .* or the site was revoked", stopped.log("elm"))
    ended = [one["reason"] for one in stopped.audit("elm", "supernode ended")]
    assert len(ended) == len(set(ended))  # logged once, however often the site tried
    refusal = offsite("coordinator", "approve", str(stopped.home), *_requests(stopped, ("elm",)), "--yes", fails=True)
    assert "was revoked with site 'elm'" in refusal


def test_a_site_that_missed_an_epoch_is_told_to_sign(stopped: Federation) -> None:
    """The site is still a member, but its letters are under the epoch before."""
    offsite("coordinator", "revoke", str(stopped.home), "elm", "--yes")
    sign_newest(stopped, "ash", "birch")
    stopped.start_sites()
    job = stopped.job("missed", rounds=1, coordinator="")
    job.write_text(job.read_text().replace("patience = 60.0", "patience = 25.0"))
    stopped.start_coordinator(job)
    assert stopped.finish() == 2
    assert re.search(
        r"cedar: letter federation=\w+: \w+ holds here; if a new epoch was made, the site's owner signs",
        stopped.log("coordinator"),
    )


def test_an_expired_federation_does_not_start(stopped: Federation) -> None:
    """A year and a day ago the coordinator approved and the owners signed; nobody renewed anything since."""
    past = datetime.now(UTC) - timedelta(days=366)
    for folder in (stopped.home, *(stopped.site(site) for site in SITES)):
        shutil.rmtree(folder)
    home = CoordinatorHome.create(
        stopped.home, name="late", host="127.0.0.1", link_port=1, depot_port=2, n_min=3, max_epsilon=8.0, now=past
    )
    data = stopped.world / "data" / "public"
    made = [SiteHome.create(stopped.site(site), name=site, data=data, suite=2, now=past) for site in SITES]
    home.approve([SiteRequest.from_bytes((one.folder / "site.request").read_bytes()) for one in made], past)
    for site in made:
        site.join(home.welcome(site.settings.name).read_bytes(), now=past, expected=None)
    for command in (("client", "run", str(stopped.site("ash"))), ("coordinator", "run", str(stopped.job("late")))):
        told = offsite(*command, fails=True)
        assert "is expired: valid " in told
        assert "have the coordinator renew it" in told
        assert len(told.strip().splitlines()) == 1
    assert not list((stopped.site("ash") / "state").glob("audit*"))


def test_a_second_process_in_the_same_folder_is_refused(stopped: Federation) -> None:
    stopped.start_site("ash")
    wait_for(lambda: stopped.audit("ash", "started"))
    told = offsite("client", "run", str(stopped.site("ash")), fails=True)
    assert "a client runs here already; stop that process first" in told
    assert len(stopped.audit("ash", "started")) == 1
    stopped.start_coordinator(job := stopped.job("twice"))
    wait_for(lambda: stopped.status()["state"] == "waiting for sites")
    told = offsite("coordinator", "run", str(job), fails=True)
    assert "a coordinator runs here already" in told
    assert stopped.status()["state"] == "waiting for sites"


def test_a_copy_of_a_site_takes_no_part_beside_it_nor_after_it(stopped: Federation) -> None:
    """Beside it, Flower lets one node in under a key; after it, the copy's ledger is behind the countersigned head."""
    copy = stopped.folder / "copy"
    shutil.copytree(stopped.site("elm"), copy)
    stopped.start_sites()
    with HostileCoordinator(stopped, stopped.job("copied", rounds=1)) as coordinator:  # honest, in our hands
        assert coordinator.ready() == stopped.sites
        stopped.start("copy", "client", "run", str(copy))
        wait_for(lambda: "another copy of this site is connected" in stopped.log("copy"))
        plan = coordinator.plan()
        letters = coordinator.correspondence()
        result = run_round(coordinator.manifest, plan, coordinator.start(), letters, coordinator.ledgers.learn)
        assert result.members == stopped.sites
        assert not (copy / "state" / "ledger-main.jsonl").exists()
        stopped.kill("elm")
        wait_for(lambda: "elm" not in coordinator.link.node_ids())
        wait_for(lambda: "elm" in coordinator.link.node_ids())
        wait_for(lambda: coordinator.exchange.send("offer", {"elm": b""}))
        coordinator.answers_from["elm"] = copy
        refusal = coordinator.refused("elm", "offer", coordinator.offer("elm", coordinator.manifest))
        assert "has 0 entries, and the coordinator countersigned 2: an old copy was restored" in refusal


def test_keys_that_belong_to_another_site_are_not_admitted(stopped: Federation) -> None:
    """Somebody copies a site's folder and asks to be admitted under another name."""
    copy = stopped.folder / "copy"
    shutil.copytree(stopped.site("elm"), copy)
    settings = copy / "site.toml"
    settings.write_text(settings.read_text().replace('name = "elm"', 'name = "oak"'))
    shutil.rmtree(copy / "trust")
    (copy / "trust" / "federation").mkdir(parents=True)
    offsite("client", "request", str(copy))
    told = offsite("coordinator", "approve", str(stopped.home), str(copy / "site.request"), "--yes", fails=True)
    assert "belongs to site 'elm' already; refuse the request" in told
