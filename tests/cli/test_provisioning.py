"""The commands that set a federation up and change it, as people at two terminals type them."""

import pytest
from typer.testing import CliRunner

from offsite.cli import client, coordinator
from offsite.client.home.installation import SiteHome
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.errors import DataError, Untrusted
from offsite.trust.federation_manifest import check_signatures

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
