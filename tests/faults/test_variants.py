"""Sites with different emulators, over real processes: each gets its own; the adapter equals the memory engine's."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from offsite.cli.display import PlainDisplay
from offsite.client.home.installation import SiteHome
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.report.json_report import read_report
from offsite.coordinator.report.model import FEDERATION
from offsite.protos.job_manifest import JobManifest
from offsite.simulation.memory_engine import memory_engine
from offsite.simulation.run_folder import Run, with_options
from offsite.simulation.simulate import Options, simulate
from tests.faults.conftest import Federation, wait_for
from tests.ports import has_ipv6

IPV6 = "::1"


@pytest.fixture(scope="module")
def varied_federation(varied: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """New interpreters, as users start them: here no import made before a fork hides a missing import.

    Over IPv6 where this machine has it; the other federations of the tests have IPv4.
    """
    host = IPV6 if has_ipv6() else "127.0.0.1"
    made = Federation(tmp_path_factory.mktemp("federation"), varied, host=host, plain=True)
    made.start_sites()
    try:
        yield made
    finally:
        made.stop()


def test_two_emulators_in_one_federation(varied_federation: Federation, varied: Path, tmp_path: Path) -> None:
    federation = varied_federation
    job = federation.job("varied", rounds=1, sites='["birch"]')
    job.write_text(job.read_text().replace("= 60.0", "= 300.0"))  # three trainings at once on a machine that is busy
    federation.start_coordinator(job)
    assert federation.finish(480.0) == 0, federation.log("coordinator")
    run = federation.run(job)
    manifest = JobManifest.from_bytes((run / "job.json").read_bytes())
    assert [site for site, _ in manifest.emulators] == ["birch"]

    for site in federation.sites:
        own = manifest.emulator_of(site)
        assert [path.name for path in (federation.site(site) / "packages").iterdir()] == [own]
        entries = [
            json.loads(line) for line in (federation.site(site) / "state" / "audit.jsonl").read_text().splitlines()
        ]
        assert [entry["fields"]["emulator"] for entry in entries if entry["kind"] == "vetted"] == [own]

    settings, sha256 = read_config(varied)
    memory = Run.create(with_options(settings, seed=None, rounds=1, sites=3), sha256, tmp_path / "memory")
    simulate(memory, Options(memory_engine, "memory", PlainDisplay(), "2026-01-01T00:00:00+00:00"))
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "memory" / weights).read_bytes()
    for name in ("report.html", "report.md", "report.json", "privacy.json"):
        assert (run / name).stat().st_size > 0, name
    report = read_report(run)
    assert (report.mode, report.quality.private, report.cost) == (FEDERATION, None, None)
    told = {site.site: (site.rounds, site.records, site.epsilon) for site in report.privacy.sites}
    assert told == dict.fromkeys(federation.sites, (1, None, None))
    assert "report of a job between organisations" in (run / "report.html").read_text()
    assert json.loads((run / "privacy.json").read_text())["simulated"] == []
    assert f"report: {run / 'report.html'}" in federation.log("coordinator")
    text = (run / "report.md").read_text()
    assert f"| {manifest.emulator_of('birch')[:16]} |" in text
    assert "| ash, cedar |" in text

    digest = manifest.digest().hex()
    shown = {
        site: federation.command("client", "inspect", str(federation.site(site)), digest) for site in federation.sites
    }
    assert f"other emulators than this site: birch {manifest.emulator_of('birch')[:16]}" in shown["ash"]
    assert f"other emulators than this site: ash and cedar {manifest.emulator[:16]}" in shown["birch"]
    assert f"emulator {manifest.emulator_of('birch')[:16]}" in shown["birch"]
    told = json.loads(federation.command("client", "inspect", str(federation.site("birch")), digest, "--json"))
    assert told["emulator"] == manifest.emulator_of("birch") != manifest.emulator
    federation.command("client", "dry-run", str(federation.site("birch")), digest)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no loopback address of IPv6, so that job ran over IPv4")
def test_that_federation_went_over_ipv6(varied_federation: Federation) -> None:
    """A site that joined this coordinator knows no other address, and listens on none itself."""
    for site in varied_federation.sites:
        wait_for(lambda log=varied_federation.log, site=site: "connecting to" in log(site))
        assert f"connecting to [{IPV6}]:{varied_federation.ports[0]}; " in varied_federation.log(site)
        assert SiteHome.open(varied_federation.site(site)).welcome.host == IPV6
