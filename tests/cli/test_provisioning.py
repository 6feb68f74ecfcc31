"""The commands that set a federation up and change it, as people at two terminals type them."""

import dataclasses
import json
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from offsite.cli import client, coordinator
from offsite.client.home.installation import SiteHome
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.errors import DataError, Untrusted
from offsite.trust.chain import Chain
from offsite.trust.federation_manifest import check_signature, check_signatures
from offsite.trust.welcome import Welcome, write_welcome

SITES = ("east", "north", "west")


def run(app, *arguments, answer=""):
    """Runs a command as at a terminal, and returns its output; raises an `OffsiteError` of the command."""
    result = CliRunner().invoke(app, [str(one) for one in arguments], input=answer)
    if result.exception is not None:
        raise result.exception
    return result.output


def told(output, label):
    return next(line.split(": ")[1] for line in output.splitlines() if line.startswith(label))


def test_the_commands_from_nothing_to_a_signed_federation(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    home = tmp_path / "home"
    assert "identity: " in run(coordinator.app, "init", home, "--name", "demo")
    shown = [
        told(run(client.app, "init", tmp_path / name, "--name", name, "--data", tmp_path / "text.txt"), "fingerprint")
        for name in SITES
    ]
    assert told(run(client.app, "request", tmp_path / "north"), "fingerprint") == shown[1]
    requests = [tmp_path / name / "site.request" for name in SITES]
    with pytest.raises(Untrusted, match="nothing was changed"):
        run(coordinator.app, "approve", home, *requests, "--fingerprint", shown[0])
    with pytest.raises(Untrusted, match="answer=no"):
        run(coordinator.app, "approve", home, *requests, answer="n\n")
    with pytest.raises(Untrusted, match="answer=no"):
        run(coordinator.app, "approve", home, *requests)
    options = [part for one in shown for part in ("--fingerprint", one)]
    output = run(coordinator.app, "approve", home, *requests, *options)
    assert all(one in output for one in shown)
    compare = told(output, "fingerprint for every site")
    for name in SITES:
        welcome = home / "welcomes" / f"{name}.welcome"
        for wrong in ("", "0000"):
            with pytest.raises(Untrusted, match="do not join"):
                run(client.app, "sign", tmp_path / name, welcome, "--fingerprint", wrong)
        with pytest.raises(Untrusted, match="answer=no"):
            run(client.app, "sign", tmp_path / name, welcome, answer="n\n")
        assert not SiteHome.open(tmp_path / name).joined
        output = run(client.app, "sign", tmp_path / name, welcome, "--fingerprint", compare)
        assert "  added: west" in output
        assert told(output, "fingerprint") == compare
    opened = CoordinatorHome.open(home)
    for name in SITES:
        opened.add_signature(name, SiteHome.open(tmp_path / name).sign())
    check_signatures(opened.federation(), opened.signatures())


def test_a_weaker_federation_is_signed_by_its_sentence_or_not_at_all(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    home, north = tmp_path / "home", tmp_path / "north"
    run(coordinator.app, "init", home, "--accomplices", 0)
    for name in SITES:
        run(client.app, "init", tmp_path / name, "--name", name, "--data", tmp_path / "text.txt")
    requests = [tmp_path / name / "site.request" for name in SITES]
    sentence = "only while at most 0 of the 3 sites help it; usual is a third, which is 1"
    said = run(coordinator.app, "approve", home, *requests, "--yes")
    assert sentence in said
    sign = (client.app, "sign", north, home / "welcomes" / "north.welcome")
    for refused in ({"answer": "y\nn\n"}, {"answer": "y\n"}):
        with pytest.raises(Untrusted, match="do you sign this sentence"):
            run(*sign, **refused)
    with pytest.raises(Untrusted, match="do you sign this sentence"):
        run(*sign, "--fingerprint", told(said, "fingerprint for every site"))
    assert not SiteHome.open(north).joined
    assert sentence in run(*sign, "--fingerprint", told(said, "fingerprint for every site"), "--weaker")
    link = Chain(SiteHome.open(north).state / "audit.jsonl", "offsite audit").links()[-1]
    assert link.kind == "weaker federation signed"
    assert sentence in link.fields["sentence"]
    site = SiteHome.open(north)
    check_signature(site.federation(), "north", site.sign())


def audited(site):
    return [(link.kind, link.fields) for link in Chain(site.state / "audit.jsonl", "offsite audit").links()]


def knows(folder, *fingerprints):
    """Writes the fingerprints that the owner knows to site.toml."""
    path = folder / "site.toml"
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("known"))
    path.write_text(f"{text}\nknown = {json.dumps(list(fingerprints))}\n")


def test_invented_sites_are_shown_and_refused_until_confirmed(tmp_path):
    """The coordinator makes two sites of its own, which with it could subtract their updates from the sum."""
    (tmp_path / "text.txt").write_text("text")
    home, north, names = tmp_path / "home", tmp_path / "north", ("east", "invented", "north", "west")
    run(coordinator.app, "init", home)
    shown = {}
    for name in names:
        contact = f"{name.title()} clinic, +49 30 {len(name)}"
        made = run(
            client.app, "init", tmp_path / name, "--name", name, "--data", tmp_path / "text.txt", "--contact", contact
        )
        shown[name] = told(made, "fingerprint")
    requests = [tmp_path / name / "site.request" for name in names]
    approved = run(coordinator.app, "approve", home, *requests, "--yes")
    assert "  contact, as the other owners will see it: Invented clinic, +49 30 8" in approved
    sign = (client.app, "sign", north, home / "welcomes" / "north.welcome")
    heard = ("--fingerprint", told(approved, "fingerprint for every site"))
    knows(north, shown["east"].upper().replace("-", " "), shown["west"])
    for answer in ("", "n\n"):
        with pytest.raises(Untrusted, match="did the owners of these sites themselves read"):
            run(*sign, *heard, answer=answer)
    with pytest.raises(Untrusted, match="members=invented: their fingerprints are not among known"):
        SiteHome.open(north).join(sign[3].read_bytes(), now=datetime.now(UTC), expected=None)
    assert not SiteHome.open(north).joined
    output = run(*sign, *heard, "--member", shown["invented"])
    for name in names:
        assert f"  {name}, {name.title()} clinic, +49 30 {len(name)}\n    request {shown[name]}\n" in output
    site = SiteHome.open(north)
    assert told(output, "member list") == site.federation().members_fingerprint
    kind, fields = audited(site)[-1]
    assert (kind, fields["members"]) == ("members confirmed", {"invented": shown["invented"]})
    site.sign()


def test_an_owner_who_comes_to_name_members_has_to_confirm_the_others(home, tmp_path):
    north = tmp_path / "north"
    SiteHome.open(north).sign()
    knows(north, SiteHome.open(tmp_path / "east").fingerprint)
    with pytest.raises(Untrusted, match="members=west: their fingerprints are not among known"):
        SiteHome.open(north).sign()
    output = run(client.app, "sign", north, home.welcome("north"), answer="y\ny\n")
    assert f"not among known in site.toml: west {SiteHome.open(tmp_path / 'west').fingerprint}" in output
    site = SiteHome.open(north)
    assert audited(site)[-1][0] == "members confirmed"
    site.sign()
    renewed = home.renew(datetime.now(UTC))
    assert renewed.members_fingerprint == site.federation().members_fingerprint
    assert "not among known" not in run(client.app, "sign", north, home.welcome("north"), answer="y\n")
    run(client.app, "rotate", tmp_path / "west")
    run(coordinator.app, "approve", home.folder, tmp_path / "west" / "site.request", "--yes")
    with pytest.raises(Untrusted, match="did the owners of these sites themselves read"):
        run(client.app, "sign", north, home.welcome("north"), answer="y\nn\n")


def test_a_contact_that_the_coordinator_changed_is_refused_by_its_owner(home, tmp_path):
    """Else the other owners would call the coordinator's own desk."""
    federation = home.federation()
    members = tuple(dataclasses.replace(member, contact="our desk") for member in federation.members)
    altered = dataclasses.replace(federation, members=members, epoch=2, previous=federation.digest().hex())
    welcome = Welcome.from_bytes(home.welcome("north").read_bytes())
    forged = write_welcome(dataclasses.replace(welcome, federation=altered.to_bytes()), home.identity)
    with pytest.raises(Untrusted, match="contact='our desk'"):
        SiteHome.open(tmp_path / "north").join(forged.to_bytes(), now=datetime.now(UTC), expected=None)


@pytest.fixture
def home(tmp_path):
    """The home of a coordinator, beside three sites of its signed federation."""
    (tmp_path / "text.txt").write_text("text")
    run(coordinator.app, "init", tmp_path / "home", "--suite", 1)
    for name in SITES:
        run(client.app, "init", tmp_path / name, "--name", name, "--data", tmp_path / "text.txt", "--suite", 1)
    requests = [tmp_path / name / "site.request" for name in SITES]
    run(coordinator.app, "approve", tmp_path / "home", *requests, "--yes")
    home = CoordinatorHome.open(tmp_path / "home")
    for name in SITES:
        run(client.app, "sign", tmp_path / name, home.welcome(name), answer="y\n")
    return home


def test_the_commands_that_change_a_federation(home, tmp_path):
    output = run(coordinator.app, "revoke", home.folder, "west", answer="y\n")
    assert "epoch 2 of 'offsite', 2 sites" in output
    output = run(client.app, "sign", tmp_path / "north", home.welcome("north"), answer="y\n")
    assert "  removed: west" in output
    run(client.app, "rotate", tmp_path / "north")
    output = run(coordinator.app, "approve", home.folder, tmp_path / "north" / "site.request", "--yes")
    assert "new keys for north" in output
    output = run(client.app, "sign", tmp_path / "east", home.welcome("east"), answer="y\n")
    assert "  new keys: north" in output
    assert "epoch 4" in run(coordinator.app, "approve", home.folder, "--yes")
    assert "revoke DIR east" in run(client.app, "leave", tmp_path / "east", "--yes")
    with pytest.raises(Untrusted, match="has left"):
        run(client.app, "sign", tmp_path / "east", home.welcome("east"), answer="y\n")
    with pytest.raises(DataError, match="no such file"):
        run(client.app, "sign", tmp_path / "north", tmp_path / "nothing")


def test_a_month_before_the_end_people_are_warned(tmp_path):
    (tmp_path / "text.txt").write_text("text")
    run(coordinator.app, "init", tmp_path / "home", "--days", 20)
    run(client.app, "init", tmp_path / "north", "--name", "north", "--data", tmp_path / "text.txt")
    request = tmp_path / "north" / "site.request"
    output = run(coordinator.app, "approve", tmp_path / "home", request, "--yes")
    assert "warning: server expires in 19 days" in output
    assert "warning: authority" not in output
    output = run(
        client.app, "sign", tmp_path / "north", CoordinatorHome.open(tmp_path / "home").welcome("north"), answer="y\n"
    )
    assert "warning: certificate expires in 19 days" in output
    assert "warning: federation expires in 19 days" in output
