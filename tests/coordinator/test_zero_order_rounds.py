"""Rounds of DP-ZO: a few numbers leave each site, and the coordinator's replay of the sum is the open computation."""

import json
from pathlib import Path

import numpy as np
import pytest

from offsite.adapter.spec import AdapterSpec
from offsite.coordinator.aggregation.compatibility import check_rule
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.rounds.exchange import MemoryExchange
from offsite.coordinator.rounds.round import RoundPlan, run_round
from offsite.errors import ConfigError, MalformedMessage
from offsite.privacy.zero_order import replay
from offsite.protos.aggregation import AggregationTerms
from offsite.protos.job_manifest import JobManifest
from offsite.protos.upload import directions_of, scatter_uploaded
from offsite.simulation.run_folder import Run, simulated_sessions
from tests.coordinator.test_rules_in_rounds import adapter_of, finished, summed, updates_of
from tests.memory_federation import make_world, open_sites

pytestmark = pytest.mark.slow  # whole simulations

DIRECTIONS, STEPS = 6, 2


@pytest.fixture(scope="module")
def forward(fed: Path) -> Path:
    """The tiny world's federation file with forward passes alone, and the mean as its rule."""
    text = fed.read_text().replace(
        "batch = 8", f"batch = 8\nlocal_steps = {STEPS}\ndirections = {DIRECTIONS}\nlearning_rate = 0.3"
    )
    text = text.replace("[aggregation]\nlearning_rate = 0.02\n", '[aggregation]\nrule = "mean"\n')
    path = fed.parent / "forward.toml"
    path.write_text(text.replace("[training]", '[privacy]\naccountant = "rdp"\n\n[training]'))
    return path


def test_the_replayed_sum_is_the_open_computation(forward: Path, tmp_path: Path) -> None:
    run, manifest, report = finished(forward, tmp_path)
    bench_start = adapter = run_start(run, manifest)
    for number in (1, 2):
        scale = run.store.rounds()[number - 1].scale
        updates = updates_of(run, manifest, adapter, number)
        assert {update.shape for update in updates.values()} == {(DIRECTIONS * STEPS,)}
        mean = summed(manifest, updates, number) / 4
        whole = scatter_uploaded(manifest, number, mean)
        adapter = (adapter + whole * scale).astype(np.float32)
        np.testing.assert_array_equal(
            replay(bench_start, mean, directions_of(manifest, number)), (bench_start + whole).astype(np.float32)
        )
    np.testing.assert_array_equal(adapter, adapter_of(run))
    assert (adapter != bench_start).any()
    lines = run.store.rounds()
    assert all(line.payload_bytes == 4 * DIRECTIONS * STEPS for line in lines)
    assert all(line.payload_bytes < manifest.layout.size for line in lines)
    assert report.privacy.sites[0].epsilon == pytest.approx(8, abs=0.01)
    assert report.privacy.sites[0].engine == "zero_order"
    statement = json.loads((run.store.folder / "privacy.json").read_text())
    assert statement["mechanism"].startswith("DP-ZO: no gradients are taken")


def run_start(run: Run, manifest: JobManifest) -> np.ndarray:
    session = simulated_sessions(run, manifest)["ash"]
    return session.layout.read(session.model)


def test_directions_differ_between_rounds_and_jobs(forward: Path, tmp_path: Path) -> None:
    _, manifest, _ = finished(forward, tmp_path, rounds=1)
    seeds = {directions_of(manifest, number).seed for number in (1, 2, 3)}
    other = JobManifest.from_bytes(manifest.to_bytes().replace(b'"rounds":1', b'"rounds":2'))
    assert len(seeds | {directions_of(other, 1).seed}) == 4


def test_rules_that_need_more_than_a_mean_refuse_forward_passes(forward: Path, tmp_path: Path) -> None:
    path = tmp_path / "fed.toml"
    path.write_text(forward.read_text().replace('rule = "mean"', 'rule = "fedprox"\nproximal = 0.5'))
    config, _ = read_config(path)
    with pytest.raises(ConfigError, match="directions=6"):
        check_rule(config, ("ash", "birch", "cedar", "elm"), 3)


@pytest.mark.parametrize(
    "terms",
    [
        AggregationTerms(directions=3),
        AggregationTerms(spacing=0.1),
        AggregationTerms(directions=3, spacing=2.0),
        AggregationTerms(directions=-1, spacing=0.1),
        AggregationTerms(directions=3, spacing=0.1, proximal=0.1),
        AggregationTerms(directions=1 << 20, spacing=0.1),
    ],
)
def test_terms_that_no_release_writes_are_refused(terms: AggregationTerms, forward: Path, tmp_path: Path) -> None:
    with pytest.raises(MalformedMessage):
        terms.check(AdapterSpec(), ["ash"], 1.0)
    AggregationTerms(directions=3, spacing=0.1).check(AdapterSpec(), ["ash"], 1.0)


def test_ledger_and_egress_report_are_of_the_numbers_that_leave(forward: Path, tmp_path: Path) -> None:
    """Real sites announce the few bytes of an upload, and debit the steps behind these bytes."""
    world = make_world(forward, tmp_path / "world")
    sites = open_sites(world, tmp_path)
    exchange = MemoryExchange({name: site.service.handle for name, site in sites.items()})
    result = run_round(world.manifest, RoundPlan(1, 1, bytes(32), world.sites), world.start, exchange)
    assert result.members == world.sites
    assert result.update.shape == (DIRECTIONS * STEPS,)
    for site in sites.values():
        lines = [json.loads(line) for line in (site.folder / "audit.jsonl").read_text().splitlines()]
        (report,) = [line["fields"] for line in lines if line["kind"] == "egress"]
        assert report["upload_bytes"] == 4 * DIRECTIONS * STEPS
        assert [name for name, _ in report["tensors"]] == ["directions"]
        assert site.ledger.releases(world.manifest.digest().hex()) == 1
