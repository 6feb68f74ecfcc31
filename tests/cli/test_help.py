"""The help: a text for everything, one suggestion for a slip, and names by the tab key."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from offsite.cli.main import app

ROOT = typer.main.get_command(app)
COMPLETION = """
eval "$(_OFFSITE_COMPLETE=source_bash "$1")"
COMP_WORDS=("$1" "${@:2}") COMP_CWORD=$(($# - 1))
_offsite_completion "$1"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def walk(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yields a command and all commands below it, each with the words that call it."""
    yield path, command
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from walk(below, (*path, name))


COMMANDS = dict(walk(ROOT))
each = pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "offsite")


def shown(*arguments: str) -> str:
    """Returns a command's output without frames and line breaks."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def program() -> str:
    """Returns the installed command."""
    return str(Path(sys.executable).with_name("offsite"))


def test_the_walk_meets_the_commands() -> None:
    assert {("simulate",), ("coordinator", "status"), ("client", "audit", "verify"), ("methods",)} < set(COMMANDS)


@each
def test_help_shows_the_text_of_the_command_and_of_each_of_its_arguments_and_options(path: tuple[str, ...]) -> None:
    command, text = COMMANDS[path], shown(*path, "--help")
    assert command.help
    assert " ".join(command.help.split()) in text
    for one in command.params:
        help_text = getattr(one, "help", None)
        assert help_text, one.name
        assert " ".join(help_text.split()) in text, one.name


@each
def test_h_is_help(path: tuple[str, ...]) -> None:
    assert shown(*path, "-h") == shown(*path, "--help")


def test_version_is_that_of_the_distribution() -> None:
    assert shown("--version") == f"offsite {version('offsite')}"


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("simulat", "simulate"),
        ("coordinater", "coordinator"),
        ("coordinator apprve", "approve"),
        ("client inspct", "inspect"),
        ("client audit verfy", "verify"),
        ("emulator buld", "build"),
        ("client doctor --jsn x", "--json"),
        ("simulate --round 3", "--rounds"),
    ],
)
def test_a_slip_is_answered_by_one_suggestion(slip: str, meant: str) -> None:
    result = CliRunner().invoke(app, slip.split())
    assert result.exit_code == 2
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())
    assert said.count("Did you mean") == 1, said
    assert f"'{meant}'" in said.partition("Did you mean")[2]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("cl",), {"client"}),
        (("coordinator", "re"), {"revoke"}),
        (("client", "audit", ""), {"verify"}),
        (("simulate", "--no"), {"--no-privacy"}),
    ],
)
def test_bash_completes_commands_and_options(words: tuple[str, ...], offered: set[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    done = subprocess.run(
        [bash, "-c", COMPLETION, "bash", program(), *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert set(done.stdout.split()) == offered, done.stderr


def test_completion_is_installed_for_the_shell_that_asks(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    done = subprocess.run(
        [bash, "-c", '"$0" --install-completion; exit $?', program()],
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bash completion installed in" in done.stdout
    assert "_OFFSITE_COMPLETE=complete_bash" in (tmp_path / ".bash_completions" / "offsite.sh").read_text()
    assert "offsite.sh" in (tmp_path / ".bashrc").read_text()
