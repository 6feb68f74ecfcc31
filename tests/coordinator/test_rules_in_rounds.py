"""Whole simulations under other rules against an open, plain computation of the same rounds."""

import json
from pathlib import Path

import numpy as np
import pytest

from offsite.client.training.local_update import SiteJob, local_update
from offsite.coordinator.aggregation.factor_rules import read_earlier
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.report.model import Report
from offsite.coordinator.rounds.exchange import MemoryExchange
from offsite.coordinator.rounds.round import RoundPlan, run_round
from offsite.privacy.randomness import Randomness
from offsite.protos.job_manifest import JobManifest
from offsite.secagg import ring
from offsite.simulation.run_folder import Run, simulated_sessions, with_options
from offsite.simulation.simulate import simulate
from tests.cli.test_simulate import options
from tests.memory_federation import make_world, open_sites
from tests.rule_worlds import examples_of, mask_of, written

pytestmark = pytest.mark.slow  # whole simulations

SITES = ("ash", "birch", "cedar", "elm")


def finished(path: Path, folder: Path, rounds: int = 2) -> tuple[Run, JobManifest, Report]:
    settings, sha256 = read_config(path)
    run = Run.create(with_options(settings, seed=None, rounds=rounds, sites=None), sha256, folder / "run")
    report = simulate(run, options())
    manifest = run.store.job()
    assert manifest is not None
    return run, manifest, report


def updates_of(run: Run, manifest: JobManifest, adapter: np.ndarray, number: int) -> dict[str, np.ndarray]:
    """Trains each site by itself and returns its update."""
    session, found = simulated_sessions(run, manifest)["ash"], {}
    for name in SITES:
        examples, plan = examples_of(run, name, manifest, session), run.site(name, manifest, session).plan
        found[name] = local_update(
            SiteJob(name, manifest, session, examples, plan),
            adapter,
            randomness=Randomness.for_simulation(1, "noise", name, str(number)),
            number=number,
        ).update
    return found


def summed(manifest: JobManifest, updates: dict[str, np.ndarray], number: int) -> np.ndarray:
    """Returns the open sum of integers, in units of an update."""
    total = np.zeros(len(updates["ash"]), dtype=np.uint32)
    for name, update in updates.items():
        draw = Randomness.for_simulation(1, "rounding", name, str(number)).uniform
        total += ring.encode(update, clip=manifest.update_bound, members=4, randomness=draw)
    return ring.decode(total, clip=manifest.update_bound, members=4, summed=4)


def adapter_of(run: Run) -> np.ndarray:
    state = run.store.load_state()
    assert state is not None
    return state.server.adapter


def test_factors_in_turn(fed: Path, tmp_path: Path) -> None:
    run, manifest, report = finished(written(fed, "rolora", method="lora"), tmp_path)
    session = simulated_sessions(run, manifest)["ash"]
    adapter = start = session.layout.read(session.model)
    for number, factor in ((1, ".lora_B."), (2, ".lora_A.")):
        scale = run.store.rounds()[number - 1].scale
        moved = np.zeros(adapter.size)
        moved[mask_of(session, {factor: slice(None)})] = (
            summed(manifest, updates_of(run, manifest, adapter, number), number) / 4
        )
        adapter = (adapter + moved * scale).astype(np.float32)
    np.testing.assert_array_equal(adapter, adapter_of(run))
    assert [line.accepted for line in run.store.rounds()] == [True, True]
    assert (adapter != start).all()
    sizes = [line.payload_bytes for line in run.store.rounds()]
    assert sum(sizes) == 4 * manifest.layout.size
    assert sizes[0] != sizes[1]
    assert report.aggregation.rule == "rolora"
    earlier, named = read_earlier(str(run.store.adapter), manifest.layout), session.layout.named(adapter)
    assert set(earlier) == {name for name in named if ".lora_A." in name}  # olora reads this exported adapter
    for name, values in earlier.items():
        np.testing.assert_array_equal(values, named[name])


def test_ledger_and_egress_report_are_of_the_part_that_leaves(fed: Path, tmp_path: Path) -> None:
    """At real sites, the audit log announces the factor of this round before the upload."""
    world = make_world(written(fed, "rolora", method="lora"), tmp_path / "world")
    sites = open_sites(world, tmp_path)
    exchange = MemoryExchange({name: site.service.handle for name, site in sites.items()})
    result = run_round(world.manifest, RoundPlan(1, 1, bytes(32), world.sites), world.start, exchange)
    assert result.members == world.sites
    assert result.update.shape == (world.manifest.upload_size(1),)
    for site in sites.values():
        lines = [json.loads(line) for line in (site.folder / "audit.jsonl").read_text().splitlines()]
        (report,) = [line["fields"] for line in lines if line["kind"] == "egress"]
        assert report["upload_bytes"] == result.payload_bytes == 4 * len(result.update)
        assert [name for name, _ in report["tensors"]] == [n for n in world.manifest.layout.names if ".lora_B." in n]
        assert site.ledger.releases(world.manifest.digest().hex()) == 1


def test_unequal_ranks_are_divided_by_who_trained_an_entry(fed: Path, tmp_path: Path) -> None:
    run, manifest, _ = finished(written(fed, "nested"), tmp_path)
    session = simulated_sessions(run, manifest)["ash"]
    adapter = session.layout.read(session.model)
    members = np.where(mask_of(session, {".lora_B.": slice(0, 1)}), 4, 3)
    for number in (1, 2):
        scale = run.store.rounds()[number - 1].scale
        updates = updates_of(run, manifest, adapter, number)
        assert (updates["elm"][members == 3] == 0).all()
        adapter = (adapter + summed(manifest, updates, number) / members * scale).astype(np.float32)
    np.testing.assert_array_equal(adapter, adapter_of(run))


def test_medians_of_updates_are_those_of_updates_trained_alone(fed: Path, tmp_path: Path) -> None:
    run, manifest, report = finished(written(fed, "median", secagg=False), tmp_path)
    session = simulated_sessions(run, manifest)["ash"]
    adapter = session.layout.read(session.model)
    for number in (1, 2):
        line = run.store.rounds()[number - 1]
        rows = np.stack([one.astype(np.float64) for one in updates_of(run, manifest, adapter, number).values()])
        adapter = (adapter + np.median(rows * line.scale, axis=0)).astype(np.float32)
        assert line.accepted
        assert line.members == SITES
        assert line.threshold == 3
    np.testing.assert_array_equal(adapter_of(run), adapter)
    _says_that_updates_were_seen(run, report)


def _says_that_updates_were_seen(run: Run, report: Report) -> None:
    assert report.secagg.enabled is False
    assert report.warnings[0].startswith("secure aggregation is OFF")
    for name in ("report.md", "report.html"):
        text = (run.store.folder / name).read_text()
        assert text.index("Secure aggregation is OFF") < text.index("The tuned model is"), name
    privacy = json.loads((run.store.folder / "privacy.json").read_text())
    assert "the update of every single site" in privacy["coordinator"]["sees"][0]
    assert privacy["coordinator"]["is_not_trusted_with"] == ["a record of any site"]
    assert privacy["secure_aggregation"]["enabled"] is False
    assert privacy["secure_aggregation"]["claim"].startswith("none")
    assert privacy["epsilon_largest"] <= 8.0  # each site's noise is unchanged


def test_the_products_are_the_best_of_the_rank_for_the_mean_product(fed: Path, tmp_path: Path) -> None:
    run, manifest, _ = finished(written(fed, "flexlora", method="lora", secagg=False), tmp_path, rounds=1)
    session = simulated_sessions(run, manifest)["ash"]
    start, (line,) = session.layout.read(session.model), run.store.rounds()
    assert line.accepted
    parts = [session.layout.named(start + one * line.scale) for one in updates_of(run, manifest, start, 1).values()]
    found = session.layout.named(adapter_of(run))
    for down in [name for name in found if ".lora_A." in name]:
        up = down.replace(".lora_A.", ".lora_B.")
        whole = sum(part[up].astype(np.float64) @ part[down] for part in parts) / len(parts)
        left, values, right = np.linalg.svd(whole, full_matrices=False)
        best = (left[:, :3] * values[:3]) @ right[:3]
        np.testing.assert_allclose(found[up].astype(np.float64) @ found[down], best, atol=1e-6 + 1e-4 * values[0])
        assert values[3] > 1e-4 * values[0]  # the mean of four sites has a rank above the adapter's
