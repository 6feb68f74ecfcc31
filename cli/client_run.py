"""`offsite client …`: run a site, look at offers and approve them, check everything, train without a network."""

import contextlib
import getpass
import json
import logging
import os
import signal
import tempfile
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from offsite.cli.client import app
from offsite.cli.confirm import warn_of_expiry
from offsite.cli.heartbeat import Heartbeat
from offsite.cli.typer_app import command_group
from offsite.client.home.approvals import DAYS
from offsite.client.home.installation import SiteHome
from offsite.client.home.package_room import PackageRoom
from offsite.client.home.settings import SETTINGS
from offsite.errors import DataError
from offsite.trust.files import alone

EXIT_WARNED, EXIT_STOPPED = 1, 143
Place = Annotated[Path, typer.Argument(help="folder of the site, or its file site.toml")]
Device = Annotated[
    str | None, typer.Option(help="device in place of the one in site.toml: auto, cpu, cuda, cuda:N or xpu")
]
Dtype = Annotated[
    str | None, typer.Option(help="number format in place of the one in site.toml: auto, float32, bfloat16 or float16")
]
log = logging.getLogger("offsite.client")
_NO_JOBS = (
    "no job was offered yet; an offer arrives while the coordinator runs a job and this site runs: "
    "offsite client run {folder}"
)
_REFUSED_JOB = (
    "this site refused the job that was offered last: {kind}: {reason}; after a change of policy.toml or site.toml, "
    "start offsite client run {folder} again"
)
__all__ = ["app"]


def open_folder(path: Path) -> SiteHome:
    """Opens a site by its folder or by its site.toml."""
    return SiteHome.open(path.parent if path.name == SETTINGS else path)


def now() -> datetime:
    """Returns the time."""
    return datetime.now(UTC)


@app.command()
def run(folder: Place, device: Device = None, dtype: Dtype = None) -> None:
    """Run this site until it is stopped: connect, read offers, and train what the policy permits."""
    installation = open_folder(folder).on(device, dtype)
    warn_of_expiry(installation.check(now()))
    # The model libraries take six seconds to load, and a wrong folder should not cost them.
    from offsite.client.network.node import Node
    from offsite.client.service.process_limits import limit_resources
    from offsite.client.service.site_runtime import SiteRuntime
    from offsite.client.service.stage_handler import StageHandler
    from offsite.protos.proxies import forget_proxies
    from offsite.task.device import choose_devices, too_many
    from offsite.task.number_format import check_dtype_on

    # A device that is not here, or does not compute in the format, is refused now, and not at the first job.
    settings = installation.settings
    devices = choose_devices(settings.device, settings.processes)
    check_dtype_on(settings.dtype, devices[0])
    with alone(installation.state, "a client"):
        runtime = SiteRuntime.of(installation, now)
        if ignored := forget_proxies():
            log.info("environment: %s: not used; site.toml alone names a proxy", ", ".join(ignored))
        limit_resources(runtime.policy)
        if warning := too_many(devices):
            log.warning("%s", warning)
        if settings.simulation_seed is not None:
            log.warning("noise follows from a seed: this run protects nobody, and is for tests on invented data only")
        runtime.tidy()
        stopping = _stop_on_signals()
        handler = StageHandler(runtime)
        answer = handler.endpoint().answer
        supernode = runtime.supernode()
        runtime.note("started", f"pid {os.getpid()}")
        log.info("site %s: connecting to %s; it answers only while it runs a job", runtime.name, supernode.superlink)
        with contextlib.suppress(KeyboardInterrupt):
            node = Node(supernode, answer, largest=handler.largest, note=runtime.note, stopping=lambda: bool(stopping))
            node.run()
        runtime.note("stopped", "by a signal")
    typer.echo("offsite: stopped; the ledger holds the spent privacy; start again with the same command", err=True)
    raise typer.Exit(EXIT_STOPPED)


def _stop_on_signals() -> list[int]:
    """Makes SIGTERM and SIGINT end the process between two steps of Python, also in the middle of a training."""
    stopping: list[int] = []

    def stop(number: int, _: Any) -> NoReturn:
        stopping.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return stopping


@app.command()
def inspect(
    folder: Place,
    job: Annotated[
        str | None, typer.Argument(help="first eight or more digits of a job's hash; all jobs by default")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, in place of the text")] = False,
) -> None:
    """List the offered jobs, or show what one of them asks for."""
    from offsite.cli.job_text import job_lines
    from offsite.client.home.declared_records import places_of
    from offsite.client.home.jobs import Jobs
    from offsite.privacy.calibrate import LARGEST_DELTA, public_delta

    installation = open_folder(folder)
    jobs = Jobs(installation.state / "jobs")
    approved = jobs.approved(now())
    if job is None:
        typer.echo(_listed(jobs.names(), approved) or _why_no_job(installation, folder))
        return
    offered = jobs.inspect(job, bytes.fromhex(installation.federation().coordinator))
    manifest, site = offered.manifest, installation.settings.name
    jobs.show(offered.digest, now=now())
    policy = installation.read_policy()
    room = _room(installation, manifest.emulator_of(site), jobs.package(offered.digest), policy.max_disk_gb)
    if as_json:
        facts = {"job": offered.digest, "approved": offered.digest in approved, "emulator": manifest.emulator_of(site)}
        if room is not None:
            facts["disk"] = {"needed": room.peak, "missing": room.missing, "limit": room.limit, "free": room.free}
        facts["cost"] = jobs.cost(offered.digest)
        typer.echo(json.dumps(facts | {"manifest": json.loads(manifest.to_bytes())}))
        return
    records = places_of(installation, manifest.split)
    delta = min(policy.delta_cap, public_delta(records) if records else LARGEST_DELTA)
    typer.echo(
        "\n".join(
            job_lines(
                manifest,
                site=site,
                folder=str(folder),
                approved=offered.digest in approved,
                records=records,
                delta=delta,
                room=room,
                cost=jobs.cost(offered.digest),
            )
        )
    )


def _room(
    installation: SiteHome, emulator: str, package: tuple[str, int] | None, permitted: float
) -> PackageRoom | None:
    """Returns the disk that a job's package takes, from what the newest offer said of the package."""
    return None if package is None else PackageRoom.of(installation.packages, emulator, *package, permitted)


def _why_no_job(installation: SiteHome, folder: Path) -> str:
    """Returns why no job can be shown: the newest offer was refused, or nobody has offered a job."""
    answers = [link.fields for link in installation.audit.entries() if link.kind == "answered"]
    if not answers or "error" not in answers[-1]:
        return _NO_JOBS.format(folder=folder)
    return _REFUSED_JOB.format(kind=answers[-1]["error"], reason=answers[-1]["reason"], folder=folder)


def _listed(names: Sequence[str], approved: Collection[str]) -> str:
    return "\n".join(f"{name}  {'approved' if name in approved else 'not approved'}" for name in names)


@app.command()
def approve(
    folder: Place,
    job: Annotated[
        str | None, typer.Argument(help="all 64 digits of an inspected job's hash; the last inspected job by default")
    ] = None,
    days: Annotated[int, typer.Option(help="days for which the approval holds")] = DAYS,
) -> None:
    """Approve one inspected job by the hash of its manifest, and set its whole privacy aside in the ledger."""
    from offsite.client.home.jobs import Jobs
    from offsite.client.service.approval import approve as approve_job
    from offsite.protos.aggregation import NO_SECAGG_WARNING

    installation = open_folder(folder)
    jobs = Jobs(installation.state / "jobs")
    digest = jobs.digest_to_approve(job)
    offered = jobs.inspect(digest, bytes.fromhex(installation.federation().coordinator))
    if offered.manifest.aggregation.individuals:
        typer.echo(f"WARNING {NO_SECAGG_WARNING}")
    with Heartbeat("read the records and plan the noise"):
        approval, plan = approve_job(installation, digest, by=_user(), now=now(), days=days)
    typer.echo(
        f"set aside in the ledger: {plan.statement(offered.manifest.privacy.accountant)}, for {plan.records} declared "
        f"records, sample rate {plan.sample_rate:.4g}, noise multiplier {plan.noise_multiplier:.4g}"
    )
    typer.echo(f"approved {digest} until {approval.until}; any other manifest needs an approval of its own")


@app.command()
def withdraw(
    folder: Place, job: Annotated[str, typer.Argument(help="first eight or more digits of an approved job's hash")]
) -> None:
    """Withdraw the approval of a job: no round of it is trained, and no update leaves, from now on."""
    from offsite.client.service.approval import withdraw as withdraw_job

    digest, closed = withdraw_job(open_folder(folder), job, by=_user(), now=now())
    typer.echo(
        f"withdrawn: {digest}; no update of it leaves from now on"
        + (", and what it had not spent is free again" if closed else "")
    )


def _user() -> str:
    """Returns the login name of the person who approves, or the user's number where a container has no such name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@app.command()
def doctor(
    folder: Place, as_json: Annotated[bool, typer.Option("--json", help="JSON, in place of the text")] = False
) -> None:
    """Check versions, keys, certificates, clock, ports, disk, data, policy, ledger and audit log."""
    from offsite.client.service.doctor import FAILED, examine

    with Heartbeat("check the data and the other parts of this site"):
        findings = examine(open_folder(folder), now)
    if as_json:
        typer.echo(json.dumps([{"check": f.check, "state": f.state, "detail": f.detail} for f in findings]))
    else:
        for finding in findings:
            typer.echo(f"{finding.state:<7} {finding.check:<13} {finding.detail}")
    if any(finding.state == FAILED for finding in findings):
        raise typer.Exit(EXIT_WARNED)


@app.command("dry-run")
def dry_run(
    folder: Place,
    job: Annotated[str, typer.Argument(help="first eight or more digits of the job's hash")],
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Train one round of an offered job without a network. Nothing leaves, and no privacy is spent."""
    from offsite.client.home.jobs import Jobs
    from offsite.client.service.process_limits import limit_resources
    from offsite.client.service.site_runtime import SiteRuntime

    installation = open_folder(folder).on(device, dtype)
    runtime = SiteRuntime.of(installation, now)
    limit_resources(runtime.policy)
    offered = Jobs(installation.state / "jobs").inspect(job, bytes.fromhex(installation.federation().coordinator))
    package = installation.packages / offered.manifest.emulator_of(installation.settings.name)
    if not package.is_dir():
        raise DataError(f"job={offered.digest[:12]}: its package is not here yet; `offsite client run` fetches it")
    with tempfile.TemporaryDirectory() as scratch, Heartbeat("vet the emulator and train one round"):
        site = runtime.open_dry_run(offered.manifest, package, Path(scratch) / "rounds")
        line = site.rehearse()
    plan = site.plan
    typer.echo(
        f"records {plan.records} (declared), sample rate {plan.sample_rate:.4g}, "
        f"noise multiplier {plan.noise_multiplier:.4g}"
    )
    if cost := Jobs(installation.state / "jobs").cost(offered.digest):
        typer.echo(f"cost: {cost}")
    typer.echo(
        f"trained one round: batch sizes {line['batch_sizes']}, losses {line['losses']}, engine {line['engine']}"
    )
    typer.echo(
        f"the whole job would spend {plan.statement(offered.manifest.privacy.accountant)}; nothing left this site"
    )


audit = command_group(about="The audit log of a site.")
app.add_typer(audit, name="audit")


@audit.command()
def verify(folder: Place) -> None:
    """Check the hash chain of the audit log and of the ledger."""
    from offsite.client.home.audit import verify as check

    site = open_folder(folder)
    entries = check(site.state / "audit.jsonl")
    ledger = site.ledger(site.read_policy())
    count, head = ledger.head()
    typer.echo(f"audit log: {entries} entries, chain whole")
    standing = ledger.standing()
    typer.echo(
        f"ledger of {ledger.dataset!r}: {count} entries, epsilon {standing.spent:.4f} spent and "
        f"{standing.committed:.4f} with what is set aside, at delta {standing.delta:.3g}, head {head[:16]}…"
    )
