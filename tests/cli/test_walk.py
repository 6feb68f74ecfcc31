"""Mistakes of a first walk through the commands between organisations: each has one true line, and changes nothing."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from offsite.cli.main import _is_for_people, app
from offsite.client.home.installation import SiteHome
from offsite.errors import ConfigError, DataError, OffsiteError, Untrusted
from tests.memory_federation import NOW

NAMES = ("north", "south", "west")


def run(*arguments: object, answer: str | None = None) -> tuple[str, str]:
    """Returns standard output and standard error of a command that ends well."""
    result = CliRunner().invoke(app, [str(one) for one in arguments], input=answer)
    if result.exception is not None:
        raise result.exception
    return result.stdout, result.stderr


def refusal(*arguments: object, answer: str | None = None) -> tuple[OffsiteError, str, str]:
    """Returns the error of a command that is refused, and its standard output and error."""
    result = CliRunner().invoke(app, [str(one) for one in arguments], input=answer)
    assert isinstance(result.exception, OffsiteError), result.exception
    return result.exception, result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator that has admitted three sites; no site has signed yet."""
    place = tmp_path_factory.mktemp("walk")
    rows = "".join(f"how {number};so\r\n" for number in range(120))
    (place / "records.csv").write_text(f"\ufeffBefund;Maßnahme\r\n{rows}", encoding="utf-8")
    run("coordinator", "init", place / "home")
    for name in NAMES:
        run("client", "init", place / name, "--name", name, "--data", place / "records.csv")
    run("coordinator", "approve", place / "home", *(place / name / "site.request" for name in NAMES), "--yes")
    return place


def test_a_carried_file_that_is_not_there_is_told_from_one_that_is_too_large(folder: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 28)  # a hole
    for key, command in (
        ("welcome", ("client", "sign", folder / "north")),
        ("request", ("coordinator", "approve", folder / "home")),
    ):
        error, _, _ = refusal(*command, tmp_path / "none")
        assert isinstance(error, DataError)
        assert f"{key}={str(tmp_path / 'none')!r}: no such file; give the path of the {key} that" in str(error)
        error, _, _ = refusal(*command, large)
        assert f"has {1 << 28} bytes, and a {key} has at most" in str(error)
        error, _, _ = refusal(*command, tmp_path)
        assert f"is no file; give the path of the {key} itself" in str(error)


def test_another_sites_welcome_is_refused_before_the_owner_is_asked(folder: Path) -> None:
    error, said, asked = refusal(
        "client", "sign", folder / "north", folder / "home" / "welcomes" / "south.welcome", answer="y\n"
    )
    assert isinstance(error, Untrusted)
    assert "welcome is for site='south', this is 'north'" in str(error)
    assert (said, asked) == ("", "")


def test_a_device_that_is_not_here_is_refused_before_the_site_connects(folder: Path) -> None:
    run("client", "sign", folder / "west", folder / "home" / "welcomes" / "west.welcome", answer="y\n")
    error, _, _ = refusal("client", "run", folder / "west", "--device", "cuda:7")
    assert "device='cuda:7': PyTorch " in str(error)


def test_a_refused_signature_declares_no_records(folder: Path) -> None:
    """The number of records becomes public with a signature, and only then."""
    welcome, site = folder / "home" / "welcomes" / "north.welcome", SiteHome.open(folder / "north")
    kept = site.state / "records-main.json"
    settings = folder / "north" / "site.toml"
    text = settings.read_text()
    settings.write_text(text.replace("columns = {}", 'columns = { prompt = "Befund", completion = "Maßnahme" }'))
    error, said, _ = refusal("client", "sign", folder / "north", welcome, "--fingerprint", "1234-5678")
    assert "the coordinator read 1234-5678" in str(error)
    assert "public from now on" not in said
    assert not kept.exists()
    _, said, _ = refusal("client", "sign", folder / "north", welcome, answer="n\n")
    assert "public from now on" not in said
    assert not kept.exists()
    said, _ = run("client", "sign", folder / "north", welcome, answer="y\n")
    assert "records: 120, public from now on" in said
    assert kept.exists()
    settings.write_text(text)


def test_a_question_without_an_answer_ends_its_line(folder: Path) -> None:
    _, _, asked = refusal("coordinator", "revoke", folder / "home", "west", answer="")
    assert asked.endswith("\n")


def test_the_doctor_names_the_column_that_is_wrong_and_not_another_tasks(folder: Path) -> None:
    settings = folder / "south" / "site.toml"
    text = settings.read_text()
    for columns, wrong in (
        ('{ prompt = "Befund", completion = "Massnahme" }', "Massnahme"),
        ('{ prompt = "Befunde", completion = "Maßnahme" }', "Befunde"),
        ('{ source = "Befund", target = "Plan" }', "Plan"),
        ("{}", "text"),
    ):
        settings.write_text(text.replace("columns = {}", f"columns = {columns}"))
        said = CliRunner().invoke(app, ["client", "doctor", str(folder / "south")]).output
        (line,) = [line for line in said.splitlines() if line.split()[1] == "data"]
        assert re.match(rf"FAILED +data +column='{wrong}' is not in ", line), line
    settings.write_text(text.replace("columns = {}", 'columns = { prompt = "Befund", completion = "Maßnahme" }'))
    said = CliRunner().invoke(app, ["client", "doctor", str(folder / "south")]).output
    assert "120 records, for the tasks prompt_completion" in said
    settings.write_text(text)


def test_an_owner_who_looks_for_a_job_reads_why_it_was_refused(folder: Path) -> None:
    site = SiteHome.open(folder / "west")
    assert "no job was offered yet" in run("client", "inspect", folder / "west")[0]
    reason = "model='smol': policy.toml models permits none"
    site.audit.record("answered", now=NOW, stage="offer", answer="Refusal", error="PolicyRefusal", reason=reason)
    said, _ = run("client", "inspect", folder / "west")
    assert f"this site refused the job that was offered last: PolicyRefusal: {reason}; after a change of" in said
    assert f"start offsite client run {folder / 'west'} again" in said


def test_a_contact_of_other_letters_says_how_to_write_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write letters with accents without them"):
        run("client", "init", tmp_path / "x", "--name", "x", "--data", folder / "records.csv", "--contact", "Müller")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "level", "shown"),
    [("flwr", "DEBUG", False), ("flwr", "INFO", False), ("flwr", "WARNING", True), ("offsite.client", "INFO", True)],
)
def test_steps_of_a_library_are_not_shown_whatever_level_it_sets_itself(name: str, level: str, *, shown: bool) -> None:
    record: Any = logging.LogRecord(name, getattr(logging, level), "", 0, "Disconnected", None, None)
    assert _is_for_people(record) is shown
