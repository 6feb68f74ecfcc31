"""`offsite client …`: run a site, look at offers and approve them, check everything, train without a network."""

import contextlib
import getpass
import json
import logging
import os
import signal
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from offsite.cli.client import app
from offsite.cli.confirm import warn_of_expiry
from offsite.client.home.installation import SETTINGS, SiteHome
from offsite.errors import DataError
from offsite.trust.files import alone

EXIT_WARNED, EXIT_STOPPED = 1, 143
SPLITS = {
    "truncate": "one of each text, cut after so many tokens",
    "blocks": "texts joined and cut, so that the job's tokenizer says how many there are",
}
IN_THE_OPEN = (
    "secure aggregation is OFF in this job: the coordinator sees this site's own update in every round; what protects "
    "the records from it is the noise of this site, and nothing else"
)
Place = Annotated[Path, typer.Argument(help="the site's folder, or its site.toml")]
log = logging.getLogger("offsite.client")
__all__ = ["app"]


def open_folder(path: Path) -> SiteHome:
    """Opens a site by its folder or by its site.toml."""
    return SiteHome.open(path.parent if path.name == SETTINGS else path)


def now() -> datetime:
    """Returns the time."""
    return datetime.now(UTC)


@app.command()
def run(folder: Place) -> None:
    """Run this site: connect, look at offers, train what is permitted, until stopped."""
    from offsite.client.network.node import Node
    from offsite.client.service.site_runtime import SiteRuntime, limit_resources

    installation = open_folder(folder)
    warn_of_expiry(installation.check(now()))
    with alone(installation.state, "a client"):
        opened = SiteRuntime.of(installation, now)
        limit_resources(opened.policy)
        if installation.settings.simulation_seed is not None:
            log.warning("noise follows from a seed: this run protects nobody, and is for tests on invented data only")
        opened.tidy()
        stopping = _stop_on_signals()
        mailbox = opened.mailbox()
        place = opened.node_place()
        opened.note("started", f"pid {os.getpid()}")
        log.info("site %s: connecting to %s", installation.settings.name, place.superlink)
        with contextlib.suppress(KeyboardInterrupt):
            Node(place, mailbox.answer, note=opened.note, stopping=lambda: bool(stopping)).run()
        opened.note("stopped", "by a signal")
    typer.echo("offsite: stopped; what was spent is in the ledger; start again with the same command", err=True)
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
    job: Annotated[str | None, typer.Argument(help="eight or more digits of a job's hash; none lists all")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Show what a coordinator asks for."""
    from offsite.client.home.jobs import Jobs

    installation = open_folder(folder)
    jobs = Jobs(installation.state / "jobs")
    if job is None:
        approved = jobs.approved()
        for digest in jobs.names():
            typer.echo(f"{digest}  {'approved' if digest in approved else 'not approved'}")
        return
    found = jobs.inspect(job, bytes.fromhex(installation.federation().coordinator))
    facts, own = json.loads(found.manifest.to_bytes()), found.manifest.emulator_of(installation.settings.name)
    if as_json:
        told = {"job": found.digest, "approved": found.approved, "emulator": own, "manifest": facts}
        typer.echo(json.dumps(told))
        return
    lines = _lines(found.digest, found.approved, facts, own)
    if found.manifest.aggregation.individuals:
        lines.insert(1, f"WARNING    {IN_THE_OPEN}")
    if others := {digest: sites for digest, sites in found.manifest.shipped().items() if digest != own}:
        lines.insert(2, f"others     {_others(others)}")
    typer.echo("\n".join(lines))


def _others(others: dict[str, tuple[str, ...]]) -> str:
    """Says in one sentence which sites get another emulator than this one."""
    told = ", ".join(f"{' and '.join(sites)} {digest[:16]}…" for digest, sites in others.items())
    return f"other sites train on other emulators than this one: {told}"


def _lines(digest: str, approved: bool, facts: dict[str, Any], emulator: str) -> list[str]:
    privacy, adapter, layout = facts["privacy"], facts["adapter"], facts["layout"]
    parameters = sum(_size(shape) for shape in layout["shapes"])
    rule = facts["aggregation"]
    return [
        f"job        {digest}  ({'approved' if approved else 'not approved'})",
        f"model      {facts['model']} ({facts['base'][:16]}…), task {facts['task']}, "
        f"emulator {emulator[:16]}…, tokenizer {facts['tokenizer'][:16]}…",
        f"refresh    {_refresh(facts['refresh'])}",
        f"adapter    {adapter['method']} rank {adapter['rank']}, {parameters} parameters in all"
        + "".join(f", {name} {value}" for name, value in adapter["options"].items()),
        f"training   {facts['rounds']} rounds (+{facts['spare_rounds']} spare) of {facts['local_steps']} steps, "
        f"{facts['length']} tokens a record, expected batch {privacy['batch']}",
        f"records    {SPLITS.get(facts['split'], 'cut in a way that this release does not know')} ({facts['split']})",
        f"privacy    epsilon {privacy['epsilon']} for the whole job, clip {privacy['max_grad_norm']:.4g}, "
        f"accountant {privacy['accountant']}",
        f"{'round' if rule['individuals'] else 'sum':<10} of at least {facts['n_min']} of {len(facts['roster'])} "
        f"sites: {', '.join(site for site, _ in facts['roster'])}",
        *_of_rule(rule, adapter["rank"]),
        f"leaves     one {'signed, plain' if rule['individuals'] else 'masked'} update a round; "
        f"metrics: {', '.join(facts['metrics']) or 'none'}",
        f"next       offsite client approve DIR {digest[:12]}",
    ]


def _of_rule(rule: dict[str, Any], rank: int) -> list[str]:
    """Says what the sites do for the coordinator's rule, where that is more than to train and send."""
    lines = []
    if rule["proximal"]:
        lines.append(f"pull       each step is pulled back to where the round began (FedProx), mu {rule['proximal']:g}")
    if rule["directions"]:
        count = rule["directions"]
        lines.append(f"forward    no gradients: a step looks along {count} directions, one number leaves for each")
    if rule["alternate"]:
        lines.append("turns      B is trained in odd rounds and A in even ones; only that part leaves")
    if rule["ranks"]:
        told = ", ".join(f"{site} {own}" for site, own in rule["ranks"])
        lines.append(f"ranks      of {rank} columns these sites train fewer: {told}")
    return lines


def _refresh(every: int) -> str:
    """Says whether the emulator stays what was vetted when its owner approved the job."""
    if not every:
        return "never: the emulator stays as it is fetched"
    return (
        f"after every {every} rounds the biases at the ends of the emulator's middle blocks may move, and nothing else "
        "of it; they are vetted before anything is trained on them"
    )


def _size(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


@app.command()
def approve(folder: Place, job: Annotated[str, typer.Argument(help="eight or more digits of a job's hash")]) -> None:
    """Approve one job, pinned to the hash of its manifest."""
    from offsite.client.home.jobs import Jobs

    installation = open_folder(folder)
    jobs = Jobs(installation.state / "jobs")
    offered = jobs.inspect(job, bytes.fromhex(installation.federation().coordinator))
    if offered.manifest.aggregation.individuals:
        typer.echo(f"WARNING {IN_THE_OPEN}")
    digest = jobs.approve(job, by=_user(), at=now().isoformat(timespec="seconds"))
    typer.echo(f"approved {digest}; any other manifest needs an approval of its own")


def _user() -> str:
    """Returns who approves: a login name, or the number where the system has none, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@app.command()
def doctor(folder: Place, as_json: Annotated[bool, typer.Option("--json", help="print as JSON")] = False) -> None:
    """Check versions, keys, certificates, clock, ports, disk, data, policy, ledger and audit log."""
    from offsite.client.service.doctor import FAILED, examine

    findings = examine(open_folder(folder), now)
    if as_json:
        typer.echo(json.dumps([{"check": f.check, "state": f.state, "detail": f.detail} for f in findings]))
    else:
        for found in findings:
            typer.echo(f"{found.state:<7} {found.check:<13} {found.detail}")
    if any(found.state == FAILED for found in findings):
        raise typer.Exit(EXIT_WARNED)


@app.command("dry-run")
def dry_run(folder: Place, job: Annotated[str, typer.Argument(help="digits of an offered job's hash")]) -> None:
    """Train one round of an offered job without a network; nothing leaves, and no privacy is spent."""
    from offsite.client.home.jobs import Jobs
    from offsite.client.service.site_runtime import SiteRuntime, limit_resources
    from offsite.client.site.release_log import CountingReleaseLog
    from offsite.secagg.journal import MemoryJournal

    installation = open_folder(folder)
    opened = SiteRuntime.of(installation, now)
    limit_resources(opened.policy)
    found = Jobs(installation.state / "jobs").inspect(job, bytes.fromhex(installation.federation().coordinator))
    package = installation.packages / found.manifest.emulator_of(installation.settings.name)
    if not package.is_dir():
        raise DataError(f"job={found.digest[:12]}: its package is not here yet; `offsite client run` fetches it")
    with tempfile.TemporaryDirectory() as scratch:
        books = CountingReleaseLog(found.manifest.releases)
        site = opened.site_with(found.manifest, package, books, MemoryJournal(), record=Path(scratch) / "rounds")
        line = site.rehearse()
    plan = site.plan
    typer.echo(
        f"records {plan.records}, sample rate {plan.sample_rate:.4g}, noise multiplier {plan.noise_multiplier:.4g}"
    )
    typer.echo(
        f"trained one round: batch sizes {line['batch_sizes']}, losses {line['losses']}, engine {line['engine']}"
    )
    typer.echo(
        f"the whole job would spend epsilon {plan.epsilon:.3f} at delta {plan.delta:.3g}; nothing left this site"
    )


audit = typer.Typer(help="The site's audit log.", no_args_is_help=True)
app.add_typer(audit, name="audit")


@audit.command()
def verify(folder: Place) -> None:
    """Check the hash chain of the audit log and of the ledger."""
    from offsite.client.home.audit import verify as check
    from offsite.client.service.site_runtime import SiteRuntime

    installation = open_folder(folder)
    entries = check(installation.state / "audit.jsonl")
    opened = SiteRuntime.of(installation, now)
    count, head = opened.ledger.head()
    typer.echo(f"audit log: {entries} entries, chain whole")
    spent, dataset = opened.ledger.spent(), installation.settings.dataset
    typer.echo(f"ledger of {dataset!r}: {count} entries, epsilon {spent:.4f}, head {head[:16]}…")
