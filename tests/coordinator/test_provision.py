"""The coordinator's folder: admission of sites, new epochs, and the state after a kill."""

import dataclasses
import multiprocessing
import os
import stat
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from offsite.coordinator.home.provision import CoordinatorHome
from offsite.errors import ConfigError, DataError, UnknownName, Untrusted
from offsite.trust import certificates
from offsite.trust.federation_manifest import FederationManifest, check_follows, check_signatures, sign
from offsite.trust.keys import SiteKeys
from offsite.trust.request import SiteRequest, write_request
from offsite.trust.welcome import Welcome

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
LATER = NOW + timedelta(days=40)
SITES = ("east", "north", "west")
TERMS = {"name": "demo", "host": "127.0.0.1", "link_port": 8443, "depot_port": 8444, "n_min": 3, "max_epsilon": 8.0}


@pytest.fixture
def home(tmp_path):
    return CoordinatorHome.create(tmp_path / "coordinator", **TERMS, now=NOW, suite=1)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sites")
    return {site: SiteKeys.create(folder / site, 1) for site in (*SITES, "south", "rotated")}


def requests(keys, *names):
    return [write_request(keys[name], name, now=NOW) for name in names or SITES]


def welcome(home, site):
    return Welcome.from_bytes(home.welcome(site).read_bytes())


def test_approval_makes_one_epoch_certificates_and_welcomes(home, keys):
    federation = home.approve(requests(keys), NOW)
    assert [one.site for one in federation.members] == list(SITES)
    assert (federation.epoch, federation.previous, federation.expires) == (1, "", "2027-11-24T12:00:00Z")
    assert (federation.n_min, federation.max_epsilon, federation.name) == (3, 8.0, "demo")
    for site in SITES:
        told, member = welcome(home, site), federation.member(site)
        assert told.manifest == federation == home.federation()
        assert (told.site, told.host, told.link_port, told.depot_port) == (site, "127.0.0.1", 8443, 8444)
        certificates.check_issued(told.certificate, told.ca, "certificate")
        assert certificates.certificate_key(told.certificate) == member.tls == keys[site].tls_public()
        subject = x509.load_pem_x509_certificate(told.certificate).subject.rfc4514_string()
        assert subject == f"CN={site}"
        assert home.member_by_tls(member.tls) == site
        assert member.identity == keys[site].identity.public.hex()
    assert len({welcome(home, site).fingerprint for site in SITES}) == 1


def test_the_same_requests_again_change_nothing(home, keys):
    first = home.approve(requests(keys), NOW)
    before = {path: path.read_bytes() for path in (home.folder / "welcomes").iterdir()}
    assert home.approve(requests(keys), LATER) == first
    assert {path: path.read_bytes() for path in (home.folder / "welcomes").iterdir()} == before


def test_every_change_is_a_new_epoch_that_names_the_last(home, keys):
    first = home.approve(requests(keys), NOW)
    second = home.approve(requests(keys, "south"), NOW)
    third = home.revoke("east", NOW)
    fourth = home.renew(LATER)
    for before, after in ((first, second), (second, third), (third, fourth)):
        check_follows(after, before)
    assert [len(one.members) for one in (first, second, third, fourth)] == [3, 4, 3, 3]
    assert fourth.created == "2027-01-03T12:00:00Z"
    told = welcome(home, "north")
    assert [FederationManifest.from_bytes(one) for one in told.earlier] == [first, second, third]
    assert [FederationManifest.from_bytes(one) for one in welcome(home, "south").earlier] == [second, third]
    stored = [(home.folder / "federation" / f"epoch-{n}.json").read_bytes() for n in range(1, 5)]
    assert stored == [one.to_bytes() for one in (first, second, third, fourth)]


def test_a_changed_setting_counts_with_the_next_decision(home, keys):
    home.approve(requests(keys), NOW)
    path = home.folder / "coordinator.toml"
    path.write_text(path.read_text().replace("max_epsilon = 8.0", "max_epsilon = 4.0"))
    again = CoordinatorHome.open(home.folder)
    assert again.federation().epoch == 1
    changed = again.approve(requests(keys, "north"), NOW)
    assert (changed.epoch, changed.max_epsilon) == (2, 4.0)


def test_a_revoked_site_is_out_at_once_and_its_keys_never_return(home, keys, tmp_path):
    home.approve(requests(keys, *SITES, "south"), NOW)
    running = CoordinatorHome.open(home.folder)  # a process that started before the revocation
    assert running.member_by_tls(keys["south"].tls_public()) == "south"
    home.revoke("south", NOW)
    with pytest.raises(Untrusted, match="was it revoked"):
        running.member_by_tls(keys["south"].tls_public())
    with pytest.raises(Untrusted, match="not in epoch 2"):
        running.add_signature("south", sign(home.federation(), keys["south"].identity))
    assert not home.welcome("south").exists()
    for name in ("south", "other"):
        with pytest.raises(Untrusted, match="was revoked with site 'south'"):
            home.approve([write_request(keys["south"], name, now=LATER)], LATER)
    mixed = stolen_tls(SiteKeys.create(tmp_path / "new", 1), keys["south"])
    with pytest.raises(Untrusted, match="was revoked"):
        home.approve([write_request(mixed, "south", now=LATER)], LATER)
    fresh = SiteKeys.create(tmp_path / "fresh", 1)
    assert home.approve([write_request(fresh, "south", now=LATER)], LATER).epoch == 3
    with pytest.raises(UnknownName, match="did you mean"):
        home.revoke("nort", NOW)


def stolen_tls(own, other):
    return dataclasses.replace(own, tls=other.tls)


def test_no_two_sites_share_a_name_or_a_key(home, keys, tmp_path):
    home.approve(requests(keys), NOW)
    before = (home.folder / "sites.json").read_bytes()
    own, north = SiteKeys.create(tmp_path / "own", 1), keys["north"]
    for field in ("identity", "sealing", "tls", "node"):
        mixed = dataclasses.replace(own, **{field: getattr(north, field)})
        with pytest.raises(Untrusted, match="belongs to site 'north' already"):
            home.approve([write_request(mixed, "thief", now=NOW)], NOW)
    with pytest.raises(Untrusted, match="approved with other keys"):
        home.approve([write_request(own, "north", now=NOW)], NOW)
    with pytest.raises(Untrusted, match="belongs to site 'north'"):
        home.approve([write_request(own, "NORTH", now=NOW)], NOW)
    with pytest.raises(Untrusted, match="belongs to site 'a'"):
        home.approve([write_request(own, "a", now=NOW), write_request(own, "b", now=NOW)], NOW)
    assert (home.folder / "sites.json").read_bytes() == before
    assert home.federation().epoch == 1


def test_a_rotation_needs_the_old_identity_and_ends_the_old_keys(home, keys):
    home.approve(requests(keys), NOW)
    old, new = keys["north"], keys["rotated"]
    stranger = write_request(new, "north", now=NOW, previous=keys["south"].identity)
    with pytest.raises(Untrusted, match="not approved"):
        home.approve([stranger], NOW)
    second = home.approve([write_request(new, "north", now=LATER, previous=old.identity)], LATER)
    assert second.member("north").identity == new.identity.public.hex()
    assert second.epoch == 2
    with pytest.raises(Untrusted):
        home.member_by_tls(old.tls_public())
    back = write_request(old, "north", now=LATER, previous=new.identity)
    with pytest.raises(Untrusted, match="was revoked"):
        home.approve([back], LATER)


def test_a_newer_request_renews_a_certificate_and_an_older_one_is_a_replay(home, keys):
    home.approve(requests(keys), NOW)
    again = write_request(keys["north"], "north", now=LATER)
    assert home.approve([again], LATER).epoch == 1
    assert certificates.check_valid(welcome(home, "north").certificate, LATER, "it") == 365
    with pytest.raises(Untrusted, match="older than the approved"):
        home.approve(requests(keys, "north"), LATER)


def test_expiry_is_told_and_renewed(home, keys):
    home.approve(requests(keys), NOW)
    assert home.check(NOW) == {"authority": 3650, "server": 365, "federation": 365}
    late = NOW + timedelta(days=340)
    assert home.check(late)["federation"] == 25 < certificates.WARN_DAYS
    with pytest.raises(Untrusted, match="expired: valid 2026-11-24"):
        home.check(NOW + timedelta(days=366))
    home.renew(late)
    assert home.check(late) == {"authority": 3310, "server": 365, "federation": 365}
    assert certificates.check_valid(welcome(home, "west").certificate, late, "it") == 365


def test_signatures_are_of_this_epoch_and_of_members(home, keys):
    first = home.approve(requests(keys), NOW)
    signatures = {site: sign(first, keys[site].identity) for site in SITES}
    for site, signature in signatures.items():
        home.add_signature(site, signature)
        with pytest.raises(Untrusted):
            home.add_signature(site, signatures["east" if site != "east" else "west"])
    for bad in (b"", signatures["north"][:-1], signatures["north"] + b"\x00"):
        with pytest.raises(Untrusted):
            home.add_signature("north", bad)
    for name in ("south", "../east", ""):
        with pytest.raises(Untrusted):
            home.add_signature(name, signatures["east"])
    assert home.signatures() == signatures
    check_signatures(home.federation(), home.signatures())
    home.renew(LATER)
    assert home.signatures() == {}
    with pytest.raises(Untrusted, match="has not signed epoch 2"):
        home.add_signature("north", signatures["north"])


def test_another_suite_is_refused(home, tmp_path):
    request = write_request(SiteKeys.create(tmp_path / "keys", 2), "north", now=NOW)
    with pytest.raises(ConfigError, match="--suite 1"):
        home.approve([request], NOW)


def test_keys_are_private_and_nothing_is_overwritten(home):
    for name in ("ca.key", "server.key", "identity.key", "sites.json"):
        assert stat.S_IMODE((home.folder / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE(home.folder.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match="not empty"):
        CoordinatorHome.create(home.folder, **TERMS, now=NOW)
    (home.folder / "identity.key").chmod(0o644)
    with pytest.raises(Untrusted, match="mode 644"):
        _ = CoordinatorHome.open(home.folder).identity
    with pytest.raises(DataError, match="no site is approved"):
        home.federation()
    with pytest.raises(DataError, match="offsite coordinator init"):
        CoordinatorHome.open(home.folder / "link")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a b"},
        {"host": "a b"},
        {"host": ""},
        {"link_port": 0},
        {"depot_port": 8443},
        {"depot_port": 70000},
        {"n_min": 2},
        {"n_min": 3, "accomplices": 2},
        {"accomplices": -1},
        {"max_epsilon": 0.0},
        {"max_epsilon": float("inf")},
        {"clip": float("nan")},
        {"suite": 3},
        {"days": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path, change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        CoordinatorHome.create(tmp_path / "home", **(TERMS | change), now=NOW)
    assert not (tmp_path / "home").exists()


def test_an_epoch_withstands_a_third_of_its_members_unless_told_otherwise(tmp_path):
    """Two epochs, of five and of six sites; at six, n_min = 3 would leave one honest site in a sum beside helpers."""
    names = [f"site{place}" for place in range(6)]
    asked = [write_request(SiteKeys.create(tmp_path / name, 1), name, now=NOW) for name in names]
    for folder, given, expected in (
        ("usual", {"n_min": 0}, ((3, 1), (4, 2))),
        ("more", {"n_min": 5, "accomplices": 3}, ((5, 3), (5, 3))),
        ("less", {"n_min": 3, "accomplices": 0}, ((3, 0), (3, 0))),
    ):
        home = CoordinatorHome.create(tmp_path / folder, **(TERMS | given), now=NOW, suite=1)
        home = CoordinatorHome.open(home.folder)
        epochs = home.approve(asked[:5], NOW), home.approve(asked[5:], NOW)
        assert tuple((epoch.n_min, epoch.accomplices) for epoch in epochs) == expected
        assert [bool(epoch.weaker) for epoch in epochs] == 2 * [folder == "less"]
    home = CoordinatorHome.create(tmp_path / "fixed", **TERMS, now=NOW, suite=1)
    five = home.approve(asked[:5], NOW)
    with pytest.raises(ConfigError, match=r"n_min=3 with accomplices=2: must be at least 4"):
        home.approve(asked[5:], NOW)
    assert home.federation() == five


def test_the_settings_file_is_read_strictly(home):
    path = home.folder / "coordinator.toml"
    text = path.read_text()
    for bad, match in (
        (text + "max_epsilom = 3.0\n", "did you mean max_epsilon"),
        (text.replace('name = "demo"\n', ""), "name is missing"),
        (text.replace("n_min = 3", 'n_min = "3"'), "must be of type int"),
        (text.replace("n_min = 3", "n_min = true"), "must be of type int"),
        (text + "[x]\n", "key x is not known"),
        (text + "=", "not valid TOML"),
    ):
        path.write_text(bad)
        with pytest.raises(ConfigError, match=match):
            CoordinatorHome.open(home.folder)
    path.write_text(text)
    assert CoordinatorHome.open(home.folder).settings == home.settings


def test_damaged_records_are_refused(home, keys):
    home.approve(requests(keys), NOW)
    path = home.folder / "sites.json"
    data = path.read_bytes()
    for bad in (b"", data[:-1], data + b" ", data.replace(b"north", b"nurth"), b'{"format":1}', b"{}"):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="damaged"):
            home.federation()


def kill_at(folder: Path, request: bytes, step: int) -> None:
    """Approves in a process that dies at one of the renames that put a file in place."""
    home, count, rename = CoordinatorHome.open(folder), 0, Path.replace

    def dying(self, target):
        nonlocal count
        if count == step:
            os._exit(9)
        count += 1
        return rename(self, target)

    Path.replace = dying
    home.approve([SiteRequest.from_bytes(request)], NOW)
    os._exit(0)


def test_after_a_kill_at_any_step_the_folder_is_of_one_epoch(home, keys):
    """After a kill at any replaced file, the epoch is the old or the new epoch, and every welcome belongs to it."""
    home.approve(requests(keys, "east", "north"), NOW)
    request = requests(keys, "west")[0]
    spawn, seen = multiprocessing.get_context("fork"), []
    for step in range(12):
        process = spawn.Process(target=kill_at, args=(home.folder, request.to_bytes(), step))
        process.start()
        process.join(30)
        opened = CoordinatorHome.open(home.folder)
        federation = opened.federation()
        seen.append(federation.epoch)
        for member in federation.members:
            assert welcome(opened, member.site).manifest == federation
        assert (home.folder / "federation" / f"epoch-{federation.epoch}.json").read_bytes() == federation.to_bytes()
        if process.exitcode == 0:
            break
        if federation.epoch == 2:
            opened.revoke("west", NOW)  # the next step begins from a folder without the site
            keys["west"] = SiteKeys.create(home.folder.parent / f"west-{step}", 1)
            request = requests(keys, "west")[0]
    assert process.exitcode == 0
    assert seen[0] == 1
    assert any(epoch > 1 for epoch in seen[:-1])


def approve_one(folder: Path, request: bytes) -> None:
    """Approves slowly, so that without a lock all processes would begin from the same registry."""
    issue = CoordinatorHome._certificate
    CoordinatorHome._certificate = lambda *arguments: time.sleep(0.3) or issue(*arguments)
    CoordinatorHome.open(folder).approve([SiteRequest.from_bytes(request)], NOW)


def test_two_processes_that_approve_at_once_lose_nobody(home, keys):
    spawn = multiprocessing.get_context("fork")
    made = [spawn.Process(target=approve_one, args=(home.folder, one.to_bytes())) for one in requests(keys)]
    for process in made:
        process.start()
    for process in made:
        process.join(30)
        assert process.exitcode == 0
    federation = home.federation()
    assert [one.site for one in federation.members] == list(SITES)
    assert federation.epoch == 3
