"""A coordinator and a site that has joined, as folders: all that a link, a depot and a node need."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from offsite.client.home.installation import SiteHome
from offsite.coordinator.home.provision import CoordinatorHome
from offsite.trust.request import SiteRequest
from tests.ports import free_ports

PACKAGE = bytes(range(256)) * 999
DIGEST = hashlib.sha256(PACKAGE).hexdigest()


def now() -> datetime:
    return datetime.now(UTC)


def joined(folder: Path) -> tuple[CoordinatorHome, list[SiteHome]]:
    """Returns the folders of a coordinator, with a package in its depot, and of its sites."""
    (folder / "records.txt").write_text("a record")
    link, depot = free_ports(2)
    terms = {"name": "demo", "host": "127.0.0.1", "n_min": 3, "max_epsilon": 8.0}
    home = CoordinatorHome.create(folder / "home", **terms, link_port=link, depot_port=depot, now=now(), suite=1)
    sites = [
        SiteHome.create(folder / name, name=name, data=folder / "records.txt", suite=1, now=now())
        for name in ("ash", "birch", "cedar")
    ]
    home.approve([SiteRequest.from_bytes((site.folder / "site.request").read_bytes()) for site in sites], now())
    for site in sites:
        site.join(home.welcome(site.settings.name).read_bytes(), now=now(), expected=None)
    (home.folder / "depot").mkdir(exist_ok=True)
    (home.folder / "depot" / DIGEST).write_bytes(PACKAGE)
    return home, sites
