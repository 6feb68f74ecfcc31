"""A site's folder: how its owner joins, follows, rotates and leaves, and which deceptions it refuses."""

import base64
import dataclasses
import multiprocessing
import os
import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

from offsite.client.home.consent import Consent
from offsite.client.home.installation import SiteHome
from offsite.client.home.policy import Policy
from offsite.client.home.settings import SiteSettings
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.errors import ConfigError, DataError, MalformedMessage, Untrusted
from offsite.trust.federation_manifest import check_signatures
from offsite.trust.files import alone
from offsite.trust.identity import Identity
from offsite.trust.keys import SiteKeys
from offsite.trust.request import SiteRequest
from offsite.trust.welcome import Welcome, write_welcome

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
LATER = NOW + timedelta(days=40)
SITES = ("east", "north", "west")


@pytest.fixture
def home(tmp_path):
    terms = {"name": "demo", "host": "127.0.0.1", "link_port": 8443, "depot_port": 8444, "n_min": 3, "max_epsilon": 8.0}
    return CoordinatorHome.create(tmp_path / "coordinator", **terms, now=NOW, suite=1)


@pytest.fixture
def sites(tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    return {name: make(tmp_path, name) for name in SITES}


def make(folder, name):
    return SiteHome.create(folder / name, name=name, data=folder / "text.txt", suite=1, now=NOW)


def request(site):
    return SiteRequest.from_bytes((site.folder / "site.request").read_bytes())


def joined(home, sites, now=NOW):
    """Approves all and lets every site join and sign."""
    home.approve([request(site) for site in sites.values()], now)
    for name, site in sites.items():
        site.join(home.welcome(name).read_bytes(), now=now, expected=None)
        home.add_signature(name, site.sign())
    return home.federation()


def offer(home, **changed):
    """The welcome of `north`, with other content that the coordinator did sign."""
    honest = Welcome.from_bytes(home.welcome("north").read_bytes())
    return write_welcome(dataclasses.replace(honest, **changed), home.identity).to_bytes()


def manifest(federation, **changed):
    return dataclasses.replace(federation, **changed).to_bytes()


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_all_join_and_sign(home, sites):
    federation = joined(home, sites)
    check_signatures(federation, home.signatures())
    for name, site in sites.items():
        again = SiteHome.open(site.folder)
        assert again.federation() == federation
        assert again.welcome.host == "127.0.0.1"
        assert again.check(NOW) == {"authority": 3650, "certificate": 365, "federation": 365}
        assert again.ca.read_bytes() == home.ca.read_bytes()
        assert (site.folder / "trust" / "federation" / "epoch-1.json").read_bytes() == federation.to_bytes()
        assert (site.folder / "trust" / "federation" / "epoch-1.sig").read_bytes() == home.signatures()[name]


def test_the_folder_is_private_and_its_policy_is_the_template(sites):
    site = sites["north"]
    assert site.policy.read_text() == Policy.template()
    assert stat.S_IMODE(site.folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in (site.folder / "keys").iterdir())
    assert site.settings == SiteSettings("north", str(site.folder.parent / "text.txt"))
    assert SiteHome.open(site.folder).data.read_text() == "some text"
    assert site.fingerprint == request(site).fingerprint
    with pytest.raises(ConfigError, match="not empty"):
        make(site.folder.parent, "north")
    for call in (site.federation, site.sign, lambda: site.rotate(NOW), lambda: site.check(NOW)):
        with pytest.raises(DataError, match="has not joined yet"):
            call()


def secret(path):
    """The private number or seed in a key file, without the zeros ahead that a number in OpenSSH's format lacks."""
    data = path.read_bytes()
    if b"PRIVATE" not in data:
        return data[-32:]
    load = load_ssh_private_key if b"OPENSSH" in data else load_pem_private_key
    key = load(data, None)
    number = key.private_numbers().private_value
    return number.to_bytes((number.bit_length() + 7) // 8)


def holds(data, key):
    """Whether a secret stands in the data: raw, in hexadecimal, or inside base64 at any of its three alignments."""
    flat = data.replace(b"\\n", b"").replace(b"\n", b"")
    forms = [key, key.hex().encode(), *(base64.b64encode(bytes(n) + key)[4 if n else 0 : -4] for n in range(3))]
    return any(form in flat or form in data for form in forms)


def test_no_private_key_ever_leaves_its_file(home, sites):
    """Every key of every party is looked for in every other file of every folder."""
    joined(home, sites)
    for site in sites.values():
        site.rotate(LATER)
    files = contents(home.folder.parent)
    keys = {path: secret(path) for path in files if path.suffix == ".key"}
    assert len(keys) == 3 + 2 * 4 * len(sites)
    for path, key in keys.items():
        assert [other for other, data in files.items() if holds(data, key)] == [path]


def test_a_weaker_federation_is_joined_by_its_own_sentence_only(tmp_path, sites):
    terms = {"name": "demo", "host": "127.0.0.1", "link_port": 8443, "depot_port": 8444, "n_min": 3, "max_epsilon": 8.0}
    home = CoordinatorHome.create(tmp_path / "weaker", **terms, now=NOW, suite=1, accomplices=0)
    home.approve([request(site) for site in sites.values()], NOW)
    data, sentence = home.welcome("north").read_bytes(), home.federation().weaker
    assert sentence
    for consent in (Consent(), Consent(weaker=f"{sentence} "), Consent(members=tuple(SITES))):
        with pytest.raises(Untrusted, match="withstands fewer helpers than usual"):
            sites["north"].join(data, now=NOW, expected=None, consent=consent)
        assert not sites["north"].joined
    sites["north"].join(data, now=NOW, expected=None, consent=Consent(weaker=sentence))
    assert sites["north"].joined


def test_a_wrong_fingerprint_pins_nothing(home, sites):
    home.approve([request(site) for site in sites.values()], NOW)
    data = home.welcome("north").read_bytes()
    right = Welcome.from_bytes(data).fingerprint
    before = contents(sites["north"].folder)
    for wrong in ("", right[:-1], right[:-1] + ("0" if right[-1] != "0" else "1"), sites["north"].fingerprint):
        with pytest.raises(Untrusted, match="do not join"):
            sites["north"].join(data, now=NOW, expected=wrong)
    assert contents(sites["north"].folder) == before
    sites["north"].join(data, now=NOW, expected=" " + right.upper().replace("-", " ") + "\n")


def test_what_is_not_for_this_site_is_refused(home, sites, tmp_path):
    north, federation = sites["north"], home.approve([request(site) for site in sites.values()], NOW)
    east = Welcome.from_bytes(home.welcome("east").read_bytes())
    without = manifest(federation, members=tuple(one for one in federation.members if one.site != "north"))
    own = federation.member("north")
    strange = dataclasses.replace(own, sealing=SiteKeys.create(tmp_path / "x", 1).sealing.public.hex())
    swapped = tuple(strange if one is own else one for one in federation.members)
    thief = Identity.generate()
    other_ca = CoordinatorHome.create(
        tmp_path / "c2", name="demo", host="h", link_port=1, depot_port=2, n_min=3, max_epsilon=1.0, now=NOW
    )
    attempts = [
        home.welcome("east").read_bytes(),
        offer(home, certificate=east.certificate),
        offer(home, federation=without),
        offer(home, federation=manifest(federation, members=swapped)),
        offer(home, ca=other_ca.ca.read_bytes()),
        write_welcome(Welcome.from_bytes(home.welcome("north").read_bytes()), thief).to_bytes(),
        home.welcome("north").read_bytes()[:-1],
        b"",
    ]
    before = contents(north.folder)
    for data in attempts:
        with pytest.raises((Untrusted, MalformedMessage)):
            north.join(data, now=NOW, expected=None)
    for now, state in ((NOW + timedelta(days=366), "expired"), (NOW - timedelta(days=1), "not yet valid")):
        with pytest.raises(Untrusted, match=state):
            north.join(home.welcome("north").read_bytes(), now=now, expected=None)
    short = offer(home, federation=manifest(federation, expires="2026-12-24T12:00:00Z"))
    with pytest.raises(Untrusted, match="epoch 1 of federation 'demo' is expired"):
        north.join(short, now=LATER, expected=None)
    assert contents(north.folder) == before


def test_a_site_follows_a_new_epoch_also_over_several(home, sites, tmp_path):
    joined(home, sites)
    home.approve([request(make(tmp_path, "south"))], NOW)
    home.revoke("south", NOW)
    latest = home.renew(LATER)
    assert sites["north"].join(home.welcome("north").read_bytes(), now=LATER, expected=None) == latest
    assert sites["north"].federation().epoch == 4
    assert sites["north"].check(LATER)["certificate"] == 365


def test_a_missing_step_between_epochs_is_refused(home, sites):
    joined(home, sites)
    home.renew(NOW)
    latest = home.renew(LATER)
    with pytest.raises(Untrusted, match="does not follow from the pinned epoch 1"):
        sites["north"].join(offer(home, earlier=()), now=LATER, expected=None)
    first, second = Welcome.from_bytes(home.welcome("north").read_bytes()).earlier
    for earlier in ((first,), (second, second), (first, first)):
        with pytest.raises(Untrusted):
            sites["north"].join(offer(home, earlier=earlier), now=LATER, expected=None)
    assert sites["north"].join(offer(home, earlier=(second,)), now=LATER, expected=None) == latest


def test_an_older_epoch_a_fork_and_another_coordinator_are_refused(home, sites, tmp_path):
    federation = joined(home, sites)
    north, old = sites["north"], home.welcome("north").read_bytes()
    pinned = contents(north.folder / "trust")
    other = offer(home, federation=manifest(federation, max_epsilon=80.0))
    with pytest.raises(Untrusted, match="pinned with another content"):
        north.join(other, now=NOW, expected=None)
    following = {"epoch": 2, "previous": federation.digest().hex()}
    for wrong in ({"previous": "00" * 32}, {"name": "demo2"}, {"epoch": 3}):
        with pytest.raises(Untrusted):
            north.join(offer(home, federation=manifest(federation, **(following | wrong))), now=NOW, expected=None)
    thief = Identity.generate()
    taken = manifest(federation, **following, coordinator=thief.public.hex())
    stolen = write_welcome(dataclasses.replace(Welcome.from_bytes(old), federation=taken), thief)
    with pytest.raises(Untrusted, match="another federation or coordinator"):
        north.join(stolen.to_bytes(), now=NOW, expected=None)
    assert contents(north.folder / "trust") == pinned
    home.renew(NOW)
    north.join(home.welcome("north").read_bytes(), now=NOW, expected=None)
    with pytest.raises(Untrusted, match="older than the pinned epoch 2"):
        north.join(old, now=NOW, expected=None)


def test_a_revoked_site_cannot_join_the_new_epoch(home, sites):
    joined(home, sites)
    federation = home.revoke("north", NOW)
    honest = Welcome.from_bytes(home.welcome("east").read_bytes())
    data = write_welcome(dataclasses.replace(honest, site="north"), home.identity).to_bytes()
    with pytest.raises(Untrusted, match="'north' is not in epoch 2"):
        sites["north"].join(data, now=NOW, expected=None)
    assert federation.epoch == 2


def test_rotation_serves_with_old_keys_until_the_new_epoch(home, sites):
    joined(home, sites)
    north, old = sites["north"], sites["north"].keys.identity.public
    north.rotate(LATER)
    new = SiteRequest.from_bytes(north.request(LATER).read_bytes())
    assert new.replaces == old.hex()
    assert SiteHome.open(north.folder).keys.identity.public == old
    north.rotate(LATER)
    assert request(north).identity == new.identity  # two requests, one new set of keys
    home.approve([request(north)], LATER)
    north.join(home.welcome("north").read_bytes(), now=LATER, expected=None)
    assert north.keys.identity.public.hex() == new.identity
    assert sorted(path.name for path in north.folder.glob("keys*")) == ["keys"]
    home.add_signature("north", north.sign())
    assert SiteRequest.from_bytes(north.request(LATER).read_bytes()).replaces == ""


def join_and_die(folder: Path, data: bytes, step: int) -> None:
    """Joins in a process that dies at one of its changes of the folder."""
    site, count = SiteHome.open(folder), 0

    def dying(name, original):
        def call(*arguments, **named):
            nonlocal count
            if count == step:
                os._exit(9)
            count += 1
            return original(*arguments, **named)

        setattr(Path if name != "rmtree" else shutil, name, call)

    for name in ("replace", "rename"):
        dying(name, getattr(Path, name))
    dying("rmtree", shutil.rmtree)
    site.join(data, now=LATER, expected=None)
    os._exit(0)


def test_after_a_kill_at_any_step_of_a_rotation_keys_and_pin_agree(home, sites):
    joined(home, sites)
    north, old = sites["north"], sites["north"].keys.identity.public.hex()
    north.rotate(LATER)
    home.approve([request(north)], LATER)
    data, saved = home.welcome("north").read_bytes(), north.folder.parent / "saved"
    shutil.copytree(north.folder, saved)
    identities, spawn = [], multiprocessing.get_context("fork")
    for step in range(12):
        shutil.rmtree(north.folder)
        shutil.copytree(saved, north.folder)
        process = spawn.Process(target=join_and_die, args=(north.folder, data, step))
        process.start()
        process.join(30)
        again = SiteHome.open(north.folder)
        member = again.federation().member("north")
        assert again.keys.identity.public.hex() == member.identity
        assert again.certificate.read_bytes() == again.welcome.certificate
        identities.append(member.identity)
        again.join(data, now=LATER, expected=None)
        assert again.keys.identity.public.hex() != old
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert identities[0] == old
    assert len(set(identities)) == 2
    assert len(identities) > 5


def test_leaving_destroys_keys_and_keeps_the_owners_books(home, sites):
    joined(home, sites)
    north = sites["north"]
    (north.state / "ledger.jsonl").write_text("spent\n")
    north.rotate(NOW)
    north.leave()
    assert not list(north.folder.rglob("*.key"))
    assert (north.state / "ledger.jsonl").read_text() == "spent\n"
    again = SiteHome.open(north.folder)
    for call in (lambda: again.keys, again.sign, lambda: again.request(NOW), lambda: again.rotate(NOW)):
        with pytest.raises(Untrusted, match="has left"):
            call()
    with pytest.raises(Untrusted, match="has left"):
        again.join(home.welcome("north").read_bytes(), now=NOW, expected=None)


def test_keys_that_stay_are_told(home, sites, monkeypatch):
    joined(home, sites)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as on a disk that can only be read
    with pytest.raises(DataError, match=r"keys=keys: cannot be removed"):
        sites["north"].leave()


def test_a_backup_without_its_empty_folders_opens(home, sites):
    joined(home, sites)
    for part in (sites["north"].state, sites["north"].packages):
        part.rmdir()
    again = SiteHome.open(sites["north"].folder)
    assert stat.S_IMODE(again.state.stat().st_mode) == 0o700
    with (
        alone(again.state, "a client"),
        pytest.raises(ConfigError, match="runs here already"),
        alone(again.state, "two"),
    ):
        pass
    with pytest.raises(DataError, match="cannot be opened"), alone(again.state / "nothing", "a client"):
        pass


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('name = "north"\ndata = "x"\nreadr = "csv"\n', "did you mean reader"),
        ('data = "x"\n', "name is missing"),
        ('name = "../x"\ndata = "x"\n', "must be 1 to 63"),
        ('name = "north"\ndata = ""\n', "data=''"),
        ('name = "north"\ndata = 3\n', "must be of type str"),
        ('name = "north"\ndata = "x"\ndataset = "a b"\n', "dataset='a b'"),
        ('name = "north"\ndata = "x"\nruntime_port = 65536\n', "runtime_port=65536"),
        ('name = "north"\ndata = "x"\nsimulation_seed = -1\n', "simulation_seed=-1"),
        ('name = "north"\ndata = "x"\nsimulation_seed = true\n', "must be of type int"),
        ('name = "north"\ndata = "x"\ncolumns = "body"\n', "columns='body': must be a table"),
        ('name = "north"\ndata = "x"\n[columns]\nlabel = 3\n', "columns.label=3: must be of type str"),
        ("name", "not valid TOML"),
    ],
)
def test_the_settings_file_is_read_strictly(sites, text, match):
    path = sites["north"].folder / "site.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        SiteHome.open(sites["north"].folder)


def test_places_that_are_none(tmp_path):
    with pytest.raises(DataError, match="offsite client init"):
        SiteHome.open(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        SiteHome.create(tmp_path / "a", name="a", data=tmp_path / "no", suite=1, now=NOW)
    with pytest.raises(ConfigError, match="name='coordinator'"):
        SiteHome.create(tmp_path / "a", name="coordinator", data=tmp_path, suite=1, now=NOW)
    assert not (tmp_path / "a").exists()


def test_columns_are_written_and_read_as_a_table(sites):
    """Also names that need quotes, and a file of an earlier release, which has no columns."""
    folder = sites["north"].folder
    settings = dataclasses.replace(sites["north"].settings, columns={"text": 'my "body"', "label": "spam"})
    (folder / "site.toml").write_text(settings.to_toml())
    assert SiteHome.open(folder).settings == settings
    (folder / "site.toml").write_text('name = "north"\ndata = "x"\n')
    assert SiteHome.open(folder).settings.columns == {}
