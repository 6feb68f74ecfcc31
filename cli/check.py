"""`offsite check`: everything that a federation reads, checked in seconds, before anything is written or computed."""

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offsite.cli.heartbeat import Heartbeat
from offsite.errors import ConfigError

if TYPE_CHECKING:
    from offsite.coordinator.config.federation_file import FedConfig
    from offsite.task.findings import Findings

EXIT_REFUSED = 2


def check(
    config: Annotated[Path, typer.Argument(help="federation file, for example fed.toml")],
    out: Annotated[Path | None, typer.Option(help="run folder of the later run, for the free room on its disk")] = None,
    device: Annotated[str | None, typer.Option(help="device of the later run, in place of the file's")] = None,
    dtype: Annotated[str | None, typer.Option(help="number format of the later run, in place of the file's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="findings as JSON, in place of the text")] = False,
) -> None:
    """Check a federation file with its model, and every record that it names; write nothing."""
    from offsite.coordinator.config.federation_file import read_with_faults
    from offsite.task.findings import Findings

    with Heartbeat("check the federation file") as heartbeat:
        findings = Findings(on_step=heartbeat.now)
        settings, faults = read_with_faults(config)
        for fault in faults:
            findings.add(str(fault))
        if settings is not None:
            _check(settings.on(device, dtype), out, findings, tuple(fault.key for fault in faults))
    if as_json:
        typer.echo(json.dumps({"errors": findings.errors, "warnings": findings.warnings}))
    else:
        _show(findings, files=settings is not None)
    if findings.errors:
        raise typer.Exit(EXIT_REFUSED)


def _show(findings: "Findings", *, files: bool) -> None:
    for line in findings.warnings:
        typer.echo(f"warning: {line}", err=True)
    for line in findings.errors:
        typer.echo(f"offsite: {line}", err=True)
    if not files:
        typer.echo("the files were not read; correct the federation file first", err=True)
    elif not findings.errors:
        typer.echo("all is well; nothing was written")


def _check(settings: "FedConfig", out: Path | None, findings: "Findings", left_out: tuple[str, ...]) -> None:
    """Checks a simulation where the file names its sites, and a federation where it has a coordinator; or both."""
    from offsite.coordinator.check.federation import Scope, check_coordinator

    scope = Scope(left_out)
    if settings.coordinator is None or settings.sites:
        from offsite.simulation.check import check_simulation

        check_simulation(settings, out or Path("runs/latest"), findings, scope)
    if settings.coordinator is not None:
        running = is_running(Path(settings.coordinator.home) / "link")
        if running:
            findings.warn("a coordinator runs in this folder now; its ports were not checked")
        with findings.gathering():
            check_coordinator(settings, out, datetime.now(UTC), findings, running=running, scope=scope)


def is_running(link: Path) -> bool:
    """Says whether a coordinator holds its folder now."""
    from offsite.trust.files import alone

    if not link.is_dir():
        return False
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone(link, "a coordinator"))
        except ConfigError:
            return True
    return False
