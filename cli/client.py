"""`offsite client …`: a site is set up, joins, renews its keys and leaves."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from offsite.cli.carried_file import read_carried
from offsite.cli.confirm import confirm, warn_of_expiry
from offsite.cli.heartbeat import Heartbeat
from offsite.cli.typer_app import command_group
from offsite.client.home.consent import Consent
from offsite.client.home.installation import SiteHome
from offsite.errors import CheckFailed, DataError
from offsite.trust.certificates import digits_of
from offsite.trust.federation_manifest import FederationManifest, changes
from offsite.trust.sealing import HYBRID
from offsite.trust.welcome import MAX_BYTES

app = command_group("client", about="A data owner's side of a federation.")
Folder = Annotated[Path, typer.Argument(help="folder of the site")]


@app.command()
def init(
    folder: Folder,
    name: Annotated[str, typer.Option(help="name of this site")],
    data: Annotated[Path, typer.Option(help="file or folder of the site's records")],
    suite: Annotated[int, typer.Option(help="kind of the sealing key, as the coordinator says")] = HYBRID,
    contact: Annotated[
        str, typer.Option(help="person or office, and telephone number, that the other owners see when they sign")
    ] = "",
) -> None:
    """Check the data, and make a site's folder with its keys, its policy and its request."""
    from offsite.client.home.data_check import check_own_data

    with Heartbeat("read the records"):
        found = check_own_data(data.expanduser().absolute(), reader="", column="", names={}, labels={})
    if found.faults:
        raise CheckFailed("\n".join(found.faults))
    site = SiteHome.create(folder, name=name, data=data, suite=suite, now=datetime.now(UTC), contact=contact)
    typer.echo(f"site {name!r} made in {folder}; {site.policy} permits no model and no method yet")
    for note in found.notes:
        typer.echo(f"warning: {note}", err=True)
    if found.unnamed:
        typer.echo(
            f"warning: {found.unnamed}; name reader, column and columns in {folder / 'site.toml'}, then: "
            f"offsite client doctor {folder}",
            err=True,
        )
    _show_request(site, folder / "site.request")


@app.command()
def request(folder: Folder) -> None:
    """Write the request file of the site again."""
    site = SiteHome.open(folder)
    _show_request(site, site.request(datetime.now(UTC)))


@app.command()
def sign(
    folder: Folder,
    welcome: Annotated[Path, typer.Argument(help="welcome file from the coordinator")],
    fingerprint: Annotated[
        str | None, typer.Option(help="fingerprint that the coordinator read to you, in place of the question")
    ] = None,
    member: Annotated[
        list[str] | None,
        typer.Option(help="fingerprint of a member who is not among known in site.toml, and whom you confirm"),
    ] = None,
    weaker: Annotated[
        bool,
        typer.Option("--weaker", help="consent to fewer helpers than a third of the sites, in place of the question"),
    ] = False,
) -> None:
    """Accept a welcome: show its changes, compare its fingerprint, pin it and sign it."""
    site, now = SiteHome.open(folder), datetime.now(UTC)
    data = read_carried(welcome, key="welcome", most=MAX_BYTES, sender="the coordinator")
    offered = site.checked_welcome(data, now=now, expected=fingerprint)
    manifest, pinned = offered.manifest, site.federation() if site.joined else None
    typer.echo(f"epoch {manifest.epoch} of {manifest.name!r}, coordinator at {offered.host}")
    for line in changes(pinned, manifest) or ("nothing changes but this site's own certificate or the addresses",):
        typer.echo(f"  {line}")
    typer.echo("\n".join(member_lines(manifest)))
    typer.echo(f"fingerprint: {offered.fingerprint}")
    if fingerprint is None:
        confirm(
            "did the coordinator read the same fingerprint to you, do you know each member, and do you accept this?",
            yes=False,
        )
        fingerprint = offered.fingerprint
    consent = _consent(site, manifest, confirmed=member or [], weaker=weaker)
    from offsite.client.home.declared_records import declare  # loads the readers

    counted = _counted(site)
    site.join(data, now=now, expected=fingerprint, consent=consent)
    site.sign()
    if counted is not None:
        typer.echo(
            f"records: {declare(site, counted=counted)}, public from now on: noise and sample rate follow from this "
            "number; records = N in site.toml declares another"
        )
    typer.echo(f"signed; next, to send the signature and wait for jobs: offsite client run {folder}")
    warn_of_expiry(site.check(now))


def _consent(site: SiteHome, manifest: FederationManifest, *, confirmed: list[str], weaker: bool) -> Consent:
    """Asks the owner about members who are not among those that the owner knows, and about a weaker federation."""
    known = {digits_of(digits) for digits in confirmed}
    unknown = {name: digits for name, digits in site.strangers(manifest).items() if digits_of(digits) not in known}
    if unknown:
        typer.echo("not among known in site.toml: " + ", ".join(f"{name} {digits}" for name, digits in unknown.items()))
        confirm("did the owners of these sites themselves read these fingerprints to you?", yes=False)
    if manifest.weaker:
        typer.echo(manifest.weaker)
        confirm("do you sign this sentence?", yes=weaker)
    return Consent((*confirmed, *unknown.values()), manifest.weaker)


def member_lines(manifest: FederationManifest) -> list[str]:
    """Returns the members with contact and fingerprint, and the fingerprint that the owners read to each other."""
    lines = [f"members: {len(manifest.members)}; an invented one helps the coordinator, so call every other owner"]
    for member in manifest.members:
        lines.append(f"  {member.site}, {member.contact or 'no contact given'}")
        lines.append(f"    request {manifest.fingerprint_of(member.site)}")
    return [*lines, f"member list, to compare with the other owners: {manifest.members_fingerprint}"]


@app.command()
def rotate(folder: Folder) -> None:
    """Make new keys. The old keys serve until the coordinator's new welcome is signed."""
    site = SiteHome.open(folder)
    _show_request(site, site.rotate(datetime.now(UTC)))


@app.command()
def leave(
    folder: Folder,
    yes: Annotated[bool, typer.Option("--yes", help="consent in place of the question")] = False,
) -> None:
    """Leave the federation and destroy this site's keys. Ledger and audit log stay."""
    site = SiteHome.open(folder)
    confirm(f"destroy the keys of {site.settings.name!r}? the site cannot come back with them", yes=yes)
    site.leave()
    typer.echo(f"keys destroyed; tell the coordinator: offsite coordinator revoke DIR {site.settings.name}")


def _counted(site: SiteHome) -> int | None:
    """Counts the records, and says so where no task can read them yet, since the site may join all the same.

    Raises:
      DataError: the data hold another number of records than is declared.
    """
    from offsite.client.home.declared_records import check_count, records_by_task

    try:
        with Heartbeat("read the records"):
            counts = [len(records) for records in records_by_task(site).values()]
    except DataError as error:
        typer.echo(f"warning: the records are not counted yet, but at the first approval: {error}", err=True)
        return None
    check_count(site, *counts)
    return max(counts)


def _show_request(site: SiteHome, path: Path) -> None:
    typer.echo(f"request: {path}\nfingerprint: {site.fingerprint}")
    typer.echo("next: send the request to the coordinator, and read the fingerprint to them by telephone")
