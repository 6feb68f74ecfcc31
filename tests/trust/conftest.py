"""A small federation's public files, made once: three sites, a coordinator, their requests, manifest and welcome."""

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from offsite.trust import certificates
from offsite.trust.federation_manifest import FederationManifest, FederationMember
from offsite.trust.identity import Identity
from offsite.trust.keys import SiteKeys
from offsite.trust.request import write_request
from offsite.trust.welcome import Welcome, write_welcome

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
SITES = ("east", "north", "west")


def make_world(folder: Path, suite: int) -> SimpleNamespace:
    """Returns keys, requests, authority, manifest and the welcome of `north`."""
    keys = {site: SiteKeys.create(folder / site / "keys", suite) for site in SITES}
    requests = {
        site: write_request(keys[site], site, now=NOW, contact=f"{site.title()} office, +49 30 1") for site in SITES
    }
    coordinator, authority = Identity.generate(), certificates.create_authority("demo", now=NOW)
    federation = FederationManifest(
        name="demo",
        epoch=1,
        previous="",
        suite=suite,
        n_min=3,
        accomplices=1,
        clip=100.0,
        scale=32,
        max_epsilon=8.0,
        coordinator=coordinator.public.hex(),
        members=tuple(
            FederationMember(s, r.identity, r.sealing, r.node, r.tls, r.contact) for s, r in sorted(requests.items())
        ),
        created="2026-11-24T12:00:00Z",
        expires="2027-11-24T12:00:00Z",
    )
    certificate = certificates.issue_client(authority, requests["north"].csr.encode(), "north", now=NOW)
    welcome = Welcome("north", authority.certificate, certificate, "127.0.0.1", 8443, 8444, federation.to_bytes())
    return SimpleNamespace(
        keys=keys,
        requests=requests,
        coordinator=coordinator,
        authority=authority,
        federation=federation,
        welcome=write_welcome(welcome, coordinator),
        now=NOW,
    )


@pytest.fixture(scope="session", params=[1, 2], ids=["x25519", "xwing"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_world(tmp_path_factory.mktemp("trust"), request.param)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return make_world(tmp_path_factory.mktemp("small"), 1)
