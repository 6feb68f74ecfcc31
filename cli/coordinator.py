"""`offsite coordinator …`: a federation is set up, its sites approved and revoked."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from offsite.cli.carried_file import read_carried
from offsite.cli.confirm import confirm, same_fingerprint, warn_of_expiry
from offsite.cli.typer_app import command_group
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.trust.addresses import with_port
from offsite.trust.federation_manifest import FederationManifest
from offsite.trust.request import SiteRequest
from offsite.trust.sealing import HYBRID
from offsite.trust.welcome import Welcome

app = command_group("coordinator", about="The model owner's side of a federation.")
Folder = Annotated[Path, typer.Argument(help="folder of the coordinator")]
MAX_REQUEST_BYTES = 1 << 16


@app.command()
def init(
    folder: Folder,
    name: Annotated[str, typer.Option(help="name of the federation")] = "offsite",
    host: Annotated[str, typer.Option(help="name or address under which sites reach this machine")] = "127.0.0.1",
    link_port: Annotated[int, typer.Option(help="port of the SuperLink, which carries the messages")] = 8443,
    depot_port: Annotated[int, typer.Option(help="port of the depot, from which sites fetch packages")] = 8444,
    n_min: Annotated[
        int,
        typer.Option(help="smallest number of sites whose sum a job may open; 0 takes the smallest allowed number"),
    ] = 0,
    accomplices: Annotated[
        int | None,
        typer.Option(
            help="number of sites that may help the coordinator without learning another's update; a third of all "
            "members by default, and fewer is weaker: every owner signs a sentence that says so"
        ),
    ] = None,
    max_epsilon: Annotated[
        float, typer.Option(help="largest epsilon that a job may plan, at a delta of at most 1e-6")
    ] = 8.0,
    clip: Annotated[float, typer.Option(help="largest bound on an update's entries that a job may set")] = 100.0,
    suite: Annotated[
        int,
        typer.Option(help="kind of the sealing keys: 2 for X-Wing, which is post-quantum; 1 for X25519"),
    ] = HYBRID,
    days: Annotated[int, typer.Option(help="lifetime of certificates and of each epoch, in days")] = 365,
) -> None:
    """Make the coordinator's folder with an authority, a server certificate and an identity."""
    home = CoordinatorHome.create(
        folder,
        name=name,
        host=host,
        link_port=link_port,
        depot_port=depot_port,
        n_min=n_min,
        accomplices=accomplices,
        max_epsilon=max_epsilon,
        now=datetime.now(UTC),
        suite=suite,
        clip=clip,
        days=days,
    )
    typer.echo(
        f"coordinator of {name!r} made in {folder}; sites reach it at {with_port(host, link_port)} and {depot_port}"
    )
    typer.echo(f"identity: {home.identity.public.hex()}")
    typer.echo(
        f"next: each site runs offsite client init and sends its request; then: offsite coordinator approve {folder} …"
    )


@app.command()
def approve(
    folder: Folder,
    requests: Annotated[
        list[Path] | None,
        typer.Argument(
            help="request files of the sites to admit; none by default, which renews certificates and epoch"
        ),
    ] = None,
    fingerprint: Annotated[
        list[str] | None,
        typer.Option(help="fingerprint that a site's owner read to you, once for each request; replaces the question"),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="consent in place of the question, for fingerprints that were compared before")
    ] = False,
) -> None:
    """Admit sites and write a welcome for every member. Without requests, renew certificates and epoch."""
    home, now = CoordinatorHome.open(folder), datetime.now(UTC)
    if not requests:
        confirm("renew every certificate and make a new epoch?", yes=yes)
        _show(home, home.renew(now), now)
        return
    read = [
        SiteRequest.from_bytes(read_carried(path, key="request", most=MAX_REQUEST_BYTES, sender="the site"))
        for path in requests
    ]
    for request in read:
        kind = "new keys for" if request.replaces else "request of"
        typer.echo(f"{kind} {request.name}: {request.fingerprint}")
        typer.echo(f"  contact, as the other owners will see it: {request.contact or 'none given'}")
    if fingerprint:
        same_fingerprint([request.fingerprint for request in read], fingerprint)
    else:
        confirm("did each site's owner read the same fingerprint to you?", yes=yes)
    _show(home, home.approve(read, now), now)


@app.command()
def revoke(
    folder: Folder,
    site: Annotated[str, typer.Argument(help="name of the site to revoke")],
    yes: Annotated[bool, typer.Option("--yes", help="consent in place of the question")] = False,
) -> None:
    """Remove a site. Its keys never count again, and the other sites sign a new epoch."""
    home, now = CoordinatorHome.open(folder), datetime.now(UTC)
    confirm(f"revoke {site!r}? its keys never count again", yes=yes)
    _show(home, home.revoke(site, now), now)


def _show(home: CoordinatorHome, federation: FederationManifest, now: datetime) -> None:
    """Prints the epoch, the place of each welcome, and the fingerprint that every owner compares."""
    typer.echo(f"epoch {federation.epoch} of {federation.name!r}, {len(federation.members)} sites")
    if federation.weaker:
        typer.echo(federation.weaker)
    for member in federation.members:
        typer.echo(f"welcome for {member.site}: {home.welcome(member.site)}")
    if federation.members:
        first = Welcome.from_bytes(home.welcome(federation.members[0].site).read_bytes())
        typer.echo(f"fingerprint for every site to compare: {first.fingerprint}")
        typer.echo("next: each site runs offsite client sign with its welcome")
    warn_of_expiry(home.check(now))
