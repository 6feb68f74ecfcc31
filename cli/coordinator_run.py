"""`offsite coordinator run` and `status`: a job between organisations."""

import json
import logging
import secrets
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from offsite.cli.confirm import warn_of_expiry
from offsite.cli.coordinator import app
from offsite.cli.heartbeat import Heartbeat
from offsite.errors import ConfigError, OffsiteError
from offsite.trust.files import alone

if TYPE_CHECKING:  # needs torch, and `status` does not
    from offsite.coordinator.config.federation_file import FedConfig
    from offsite.coordinator.home.provision import CoordinatorHome
    from offsite.coordinator.home.status import Status
    from offsite.coordinator.report.model import Report

EXIT_STOPPED = 143
AGAIN = "run the same command again"
log = logging.getLogger("offsite.coordinator")
__all__ = ["app"]


def now() -> datetime:
    """Returns the time."""
    return datetime.now(UTC)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="federation file with a table for the coordinator")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="run folder for the results; by default one in the coordinator's folder for each set of settings"
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="device in place of the file's: auto, cpu, cuda, cuda:N or xpu")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="number format in place of the file's: auto, float32, bfloat16 or float16")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="report as JSON on standard output, in place of the text")
    ] = False,
) -> None:
    """Run a job with the sites of the federation. After a stop, the same command continues the job."""
    from offsite.coordinator.config.federation_file import read_config

    settings, sha256 = read_config(config)  # before libraries that take seconds to load
    settings = settings.on(device, dtype)
    if settings.coordinator is None:
        raise ConfigError("config key coordinator is missing; add [coordinator] with home = the folder of init")
    from transformers.utils.logging import disable_progress_bar

    from offsite.cli.display import LiveDisplay, PlainDisplay
    from offsite.coordinator.home.provision import CoordinatorHome
    from offsite.coordinator.home.status import Status
    from offsite.coordinator.job.store import Store
    from offsite.coordinator.report.concluded import CONCLUDED
    from offsite.coordinator.report.federation_outcome import Started, conclude
    from offsite.coordinator.service import JobContext, run_job
    from offsite.protos.proxies import forget_proxies

    forget_proxies()
    disable_progress_bar()
    home = CoordinatorHome.open(Path(settings.coordinator.home))
    warn_of_expiry(home.check(now()))
    console = Console(stderr=True)
    display = LiveDisplay(console, settings.training.rounds) if console.is_terminal else PlainDisplay()
    with alone(home.link, "a coordinator"):
        if (done := _reported(home, settings, out, sha256)) is not None:
            display.step(CONCLUDED)
            _show(done[0], done[1], as_json=as_json)
            return
        place = _checked_place(home, settings, out)
        _interrupt_on_signals()
        context = JobContext(
            home=home,
            config=settings,
            store=Store(place),
            status=Status(home.folder / "status.json", now),
            nonce=lambda: secrets.token_bytes(32),
            now=now,
            on_step=display.step,
            on_round=lambda record: display.round(record, settings.training.rounds),
            on_notice=display.notice,
        )
        folder, started = context.store.folder, Started(sha256, now().isoformat(timespec="seconds"))
        again = ["offsite", "coordinator", "run", str(config), *(["--out", str(out)] if out else [])]
        again += [*(["--device", device] if device else []), *(["--dtype", dtype] if dtype else [])]
        with _ended(context.status, shlex.join([*again, *(["--json"] if as_json else [])])), display:
            job, progress = run_job(context)
            report = conclude(settings, context.store, job, progress, started)
        context.status.set("finished", detail=str(folder))
    _show(report, folder, as_json=as_json)


def _reported(
    home: "CoordinatorHome", settings: "FedConfig", out: Path | None, sha256: str
) -> "tuple[Report, Path] | None":
    """Returns report and folder of a concluded job, before model, records and ports are looked at; else None."""
    from offsite.coordinator.home.job_settings import JOB, run_folder
    from offsite.coordinator.home.status import Status
    from offsite.coordinator.job.store import Store
    from offsite.coordinator.report.concluded import concluded

    place = run_folder(home, settings, out)
    report = concluded(Store(place), sha256) if (place / JOB).is_file() else None
    if report is None:
        return None
    facts = {"job": report.provenance.job_sha256, "rounds": report.rounds_planned, "round": report.finished_rounds}
    Status(home.folder / "status.json", now).set("finished", detail=str(place), **facts)
    return report, place


def _show(report: "Report", folder: Path, *, as_json: bool) -> None:
    from offsite.coordinator.report.write import one_line

    if as_json:
        typer.echo(one_line(report))
        return
    typer.echo((folder / "report.md").read_text(encoding="utf-8").split("\n## ")[0].strip())
    typer.echo(f"\nreport: {folder / 'report.html'}\nadapter: {folder / 'adapter'}")


def _checked_place(home: "CoordinatorHome", settings: "FedConfig", out: Path | None) -> Path:
    """Returns the folder of the job, after a check of everything that can be known before any work."""
    from offsite.coordinator.check.federation import check_coordinator
    from offsite.coordinator.home.job_settings import keep_place, run_folder
    from offsite.task.findings import Findings

    place = run_folder(home, settings, out)
    with Heartbeat("check the federation file") as heartbeat:
        findings = Findings(on_step=heartbeat.now)
        check_coordinator(settings, place, now(), findings)
    for warning in findings.warnings:
        typer.echo(f"warning: {warning}", err=True)
    findings.check()
    keep_place(home, settings, place)
    return place


@contextmanager
def _ended(status: "Status", again: str) -> Iterator[None]:
    """Writes into the status how an unfinished job ended, since no state may stand for ever.

    Args:
      status: status file of the coordinator.
      again: the command that goes on with the job.
    """
    try:
        yield
    except KeyboardInterrupt:
        status.set(
            "stopped", detail="by a signal", next=f"run the same command again; the job goes on where it was: {again}"
        )
        typer.echo(f"offsite: stopped; go on with: {again}", err=True)
        raise typer.Exit(EXIT_STOPPED) from None
    except OffsiteError as error:
        with suppress(OffsiteError):  # a full disk may be the reason, and the raised error says so
            status.set(
                "stopped",
                detail=str(error),
                next=f"mend the cause and run the same command again; the job goes on: {again}",
            )
        raise
    except BaseException as error:
        with suppress(OffsiteError):
            status.set(
                "failed",
                detail=type(error).__name__,
                next=f"a bug; see the log, and run the same command again: {again}",
            )
        raise


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="folder of the coordinator")],
    as_json: Annotated[bool, typer.Option("--json", help="status as JSON, in place of the text")] = False,
) -> None:
    """Show which sites are there, which round runs, and whose answers are missing."""
    from offsite.coordinator.home.status import read_status

    facts = read_status(folder / "status.json")
    if as_json:
        typer.echo(json.dumps(facts))
        return
    of = f" of {facts['rounds']}" if "rounds" in facts else ""
    typer.echo(f"state    {facts['state']}, since {facts['updated']}\nround    {facts['round']}{of} whole")
    if facts.get("awaited"):
        typer.echo(f"awaited  {facts['stage']} from {', '.join(facts['awaited'])}")
    for name, site in sorted(facts["sites"].items()):
        typer.echo(f"site     {name}: {site['state']} {site['detail']}".rstrip())
    for key in ("detail", "next"):
        if facts.get(key):
            typer.echo(f"{key:<8} {facts[key]}")


def _interrupt_on_signals() -> None:
    def stop(number: int, _: Any) -> NoReturn:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
