"""The first mistakes of a new coordinator or site: each gets a true sentence and the next step, and leaves nothing."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from offsite.cli.main import app
from offsite.coordinator.config.federation_file import parse_config
from offsite.errors import ConfigError, MalformedMessage, OffsiteError


def run(*arguments: object) -> tuple[int, str]:
    """Returns exit code and output; an error of ours is raised."""
    result = CliRunner().invoke(app, [str(word) for word in arguments])
    if isinstance(result.exception, OffsiteError):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    (folder / "text.csv").write_text("text\n" + "some words\n" * 120)
    run("coordinator", "init", folder / "home")
    for name in ("ash", "birch", "cedar"):
        run("client", "init", folder / name, "--name", name, "--data", folder / "text.csv")
    run(
        "coordinator",
        "approve",
        folder / "home",
        *(folder / name / "site.request" for name in ("ash", "birch")),
        "--yes",
    )
    return folder


@pytest.mark.parametrize(
    ("host", "step"),
    [
        ("fed.example.org:8443", "leave out the colon and the port; the ports are --link-port and --depot-port"),
        ("10.0.0.300", "four numbers from 0 to 255"),
        ("http://fed.example.org", "leave out http://"),
        ("fed.example.org.", "leave out the dot"),
        ("fed.example.org ", "leave out the spaces"),
        ("*.example.org", "write its whole name"),
        ("0.0.0.0", 'set bind = "0.0.0.0"'),
        ("[::1]", "without brackets"),
    ],
)
def test_a_host_that_no_site_can_reach_is_refused_before_a_key_is_made(tmp_path: Path, host: str, step: str) -> None:
    with pytest.raises(ConfigError, match=step) as refused:
        run("coordinator", "init", tmp_path / "home", "--host", host)
    assert f"host={host!r}" in str(refused.value)
    assert not (tmp_path / "home").exists()


def test_an_ipv6_address_is_shown_as_sites_write_it(tmp_path: Path) -> None:
    code, said = run("coordinator", "init", tmp_path / "home", "--host", "2001:db8::7")
    assert code == 0
    assert "sites reach it at [2001:db8::7]:8443 and 8444" in said


def test_the_wrong_file_of_the_two_that_people_send_is_named(folder: Path) -> None:
    welcome = folder / "home" / "welcomes" / "ash.welcome"
    with pytest.raises(
        MalformedMessage, match=r"a welcome is needed here, and this file is a site's request; .* approve"
    ):
        run("client", "sign", folder / "ash", folder / "ash" / "site.request")
    with pytest.raises(MalformedMessage, match=r"a request is needed here, and this file is a welcome; .* client sign"):
        run("coordinator", "approve", folder / "home", welcome, "--yes")


def test_before_a_site_has_joined_the_doctor_says_so_once_for_each_check(folder: Path) -> None:
    code, said = run("client", "doctor", folder / "cedar")
    assert code == 0, said
    assert "FAILED" not in said
    for check in ("certificates", "link", "depot", "clock"):
        (line,) = [line for line in said.splitlines() if line.split()[1] == check]
        assert line.startswith("warning")
        assert "has not joined yet; offsite client sign" in line
    assert "No such file" not in said


def test_a_site_without_jobs_says_how_jobs_arrive(folder: Path) -> None:
    code, said = run("client", "inspect", folder / "ash")
    assert code == 0
    assert "no job was offered yet; an offer arrives while the coordinator runs a job" in said
    assert f"offsite client run {folder / 'ash'}" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sites": {"name": "a"}}, r"\[sites\]: must be a list of tables; write \[\[sites\]\], with double brackets"),
        ({"data": [{"public": "p"}]}, r"\[\[data\]\]: must be one table; write \[data\], with single brackets"),
        ({"data": [{"public": "p"}, {}]}, r"\[\[data\]\]: must be one table"),
        ({"site": [{"name": "a"}]}, "key site is not known; did you mean sites"),
        ({"emulator": {"variants": {"sites": ["a"]}}}, r"write \[\[emulator.variants\]\], with double brackets"),
    ],
)
def test_single_and_double_brackets(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config({"model": {"path": "m"}, "data": {"public": "p"}} | change, tmp_path)
