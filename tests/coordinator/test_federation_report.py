"""The report of a job between organisations, from real sites in one process: its numbers, and its gaps."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from offsite.coordinator.job.prepare import Job
from offsite.coordinator.job.round_record import Dropped
from offsite.coordinator.job.store import Progress, Store
from offsite.coordinator.report.federation_outcome import Started, conclude, federation_report
from offsite.coordinator.report.json_report import read_report
from offsite.coordinator.report.model import Report
from offsite.coordinator.report.write import write_report
from offsite.coordinator.rounds.attempt import Attempts
from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.coordinator.rounds.exchange import MemoryExchange
from offsite.coordinator.rounds.round_loop import TrainingLoop
from tests.cli.test_golden import GOLDEN, differences
from tests.memory_federation import RunningSite, World, make_world, open_sites

STARTED = Started("0f" * 32, "2026-11-24T12:00:00+00:00")
FILES = ("privacy.json", "report.html", "report.json", "report.md")
UNKNOWN = (
    "records",
    "epsilon",
    "epsilon_by_round",
    "delta",
    "noise_multiplier",
    "sample_rate",
    "steps",
    "clipped_fraction",
)
# Every key that the first release wrote.
KEYS = {
    "": "format mode rounds_planned finished_rounds rounds privacy aggregation secagg emulator adapter provenance "
    "public",
    "privacy": "private target_epsilon accountant max_grad_norm known_here",
    "aggregation": "rule needs linear why",
    "secagg": "enabled suite threshold dropped",
    "emulator": "sites sha256 shipped_bytes package_bytes recipe embedding gradient_cosine public_loss variants",
    "adapter": "method rank parameters",
    "provenance": "config_sha256 job_sha256 versions",
    "public": "full_zero_shot emulator_zero_shot plug_in",
}


@dataclass(frozen=True)
class Concluded:
    """A job with all rounds whole, and the files of its report."""

    world: World
    job: Job
    store: Store
    progress: Progress
    report: Report
    sites: dict[str, RunningSite]

    def text(self, name: str) -> str:
        return (self.store.folder / name).read_text(encoding="utf-8")

    def json(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text(name))
        return found


@pytest.fixture(scope="module")
def concluded(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> Concluded:
    folder = tmp_path_factory.mktemp("concluded")
    world = make_world(fed, folder)
    store = Store(Path(shutil.copytree(world.run.store.folder, folder / "job")))
    sites = open_sites(world, folder / "sites")
    exchange = MemoryExchange({name: site.service.handle for name, site in sites.items()})
    attempts = Attempts(store.folder, lambda: bytes(32), MonotonicCounter(folder / "aggregations.txt"))
    job, config = world.run.open_job(), world.run.config
    progress = TrainingLoop(job, config, store, attempts).run(exchange, lambda record: None)
    report = conclude(config, store, job, progress, STARTED)
    return Concluded(world, job, store, progress, report, sites)


def test_a_real_job_has_all_four_files_and_its_adapter(concluded: Concluded) -> None:
    for name in (*FILES, "adapter/adapter_model.safetensors"):
        assert (concluded.store.folder / name).stat().st_size > 0, name
    assert read_report(concluded.store.folder) == concluded.report


def test_every_key_of_the_first_release_is_there(concluded: Concluded) -> None:
    written = concluded.json("report.json")
    for section, keys in KEYS.items():
        assert set(keys.split()) <= set(written[section] if section else written), section
    assert written["mode"] == "federation"
    assert written["public"] == written["quality"]["public"]
    assert [line["round"] for line in written["rounds"]] == [1, 2]
    assert all(line["members"] == list(concluded.world.sites) for line in written["rounds"])


def test_its_public_scores_are_those_of_a_simulation_with_the_same_noise(concluded: Concluded) -> None:
    golden = json.loads((GOLDEN / "report.json").read_text())
    written = concluded.json("report.json")
    assert differences(written["quality"]["public"], golden["quality"]["public"]) == []
    (size,) = differences(written["secagg"], golden["secagg"])
    assert size.startswith("/upload_bytes: ")  # a real site sends the newest entry of its ledger beside the update
    assert differences(written["emulator"], golden["emulator"]) == []
    assert differences(written["adapter"], golden["adapter"]) == []
    assert written["quality"]["private"] is None
    assert written["quality"]["gain_nats"] is None
    assert "plug_in" not in written["quality"]  # in a simulation that is a private score


def test_what_only_the_sites_know_stands_nowhere(concluded: Concluded) -> None:
    """The sites' own numbers are looked up at the sites, and searched for in all that the coordinator wrote."""
    (ledger,) = {site.ledger.spent() for site in concluded.sites.values()}
    golden = json.loads((GOLDEN / "report.json").read_text())["privacy"]["sites"][0]
    assert ledger > 0
    secrets = [f"{number:.5f}"[:6] for number in (ledger, golden["noise_multiplier"])]  # delta is public
    for name in FILES:
        words = re.sub(r"<svg.*?</svg>", "", concluded.text(name), flags=re.DOTALL)
        assert not [secret for secret in secrets if secret in words], name
    for site in concluded.json("report.json")["privacy"]["sites"]:
        assert {site[key] for key in UNKNOWN} == {None}
        assert site["rounds"] == 2
    for site in concluded.json("privacy.json")["sites"]:
        assert {site[key] for key in UNKNOWN if key in site} == {None}


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_its_words_are_those_of_a_real_job(concluded: Concluded, name: str) -> None:
    words = concluded.text(name).replace("&#x27;", "'").replace("&quot;", '"')
    assert "report of a job between organisations" in words
    for said in (
        "2 of 2 rounds are done, and 2 were taken over",
        "The coordinator cannot know how good the model is on the sites' own text",
        "epsilon 8.00 at most at delta 1e-6 over the whole job",
        "The coordinator cannot know the epsilon that a site has spent",
        "What is protected: one record: a block of 16 tokens of one site's data",
        "so that 8 records are drawn on average",
        "delta is min(1e-6, 1 / (100 records)) for its declared number of records",
        "each site's own randomness from its operating system",
        "offsite client dry-run FOLDER JOB",
        "offsite client audit verify FOLDER",
        "The coordinator cannot know what a round costs a site in time and memory",
        "federation, over Flower's SuperLink",
    ):
        assert said in words, said
    for untrue in ("simulation", "one process", "from a seed. The", "private text", "start-up probe", "peak memory"):
        assert untrue not in words, untrue


def test_its_page_has_the_plots_that_it_has_numbers_for(concluded: Concluded) -> None:
    html = concluded.text("report.html")
    drawn = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawn) == 2  # the models and the rounds; what was spent is not known here
    assert "Public text: loss of full model, before training 3.067" in html
    assert "Held-out" not in html


def test_its_statement_says_unit_relation_sampling_delta_and_trust(concluded: Concluded) -> None:
    statement = concluded.json("privacy.json")
    assert next(iter(statement.items())) == ("private", True)
    assert statement["unit"] == "one record: a block of 16 tokens of one site's data"
    assert statement["neighbouring_relation"].startswith("one record of one site is replaced by an empty record")
    assert "owner declares it" in statement["neighbouring_relation"]
    assert statement["sampling"]["expected_batch"] == 8
    assert statement["sampling"]["sample_rate"] == "expected_batch / records, at each site"
    assert statement["delta"].startswith(
        "of each site: min(1e-6, 1 / (100 records)) for its declared number of records"
    )
    assert statement["epsilon_largest_at"] == {"1e-5": 8.0, "1e-6": 8.0}
    assert statement["epsilon_at_most"] == 8.0
    assert statement["epsilon_largest"] is None
    assert "at most 8.0" in statement["claim"]
    assert statement["composition"]["over"].startswith(
        "all steps of all rounds of the job together, spare rounds included"
    )
    assert statement["simulated"] == []
    assert "allow_seeded_noise" in statement["noise_source"]
    assert statement["secure_aggregation"]["threshold"] == 3
    assert any("privacy ledger" in one for one in statement["coordinator"]["sees"])
    assert not any("how many records each site has" in one for one in statement["coordinator"]["sees"])
    assert any("the coordinator cannot check that" in one for one in statement["site"])
    assert all("cannot know" in one or "owner" in one for one in statement["not_known_here"])
    assert not any("in the report" in one for one in statement["not_protected"])  # it has no private scores


def rewritten(concluded: Concluded, folder: Path, change: Callable[[Report], Report]) -> dict[str, str]:
    write_report(folder, change(concluded.report))
    return {name: (folder / name).read_text(encoding="utf-8") for name in FILES}


def test_a_job_without_privacy_promises_nothing(concluded: Concluded, tmp_path: Path) -> None:
    def open_noise(report: Report) -> Report:
        return replace(report, privacy=replace(report.privacy, private=False, target_epsilon=None))

    files = rewritten(concluded, tmp_path, open_noise)
    assert "not private" in files["report.md"].splitlines()[2]
    assert "differential privacy with epsilon" not in files["report.md"]
    statement = json.loads(files["privacy.json"])
    assert statement["claim"].startswith("not private")
    assert statement["holds_against"] == "nobody"
    assert not any("noise" in one for one in statement["coordinator"]["is_not_trusted_with"])


def test_a_job_without_secure_aggregation_says_so_first(concluded: Concluded, tmp_path: Path) -> None:
    def open_updates(report: Report) -> Report:
        return replace(report, secagg=replace(report.secagg, enabled=False))

    files = rewritten(concluded, tmp_path, open_updates)
    assert files["report.md"].splitlines()[2].startswith("Secure aggregation is OFF: the coordinator sees each site's")
    assert json.loads(files["privacy.json"])["coordinator"]["sees"][0].startswith("the update of every single site")


def test_forward_passes_alone_are_no_gradients(concluded: Concluded, tmp_path: Path) -> None:
    def forward(report: Report) -> Report:
        sites = tuple(replace(site, engine="zero_order") for site in report.privacy.sites)
        return replace(report, privacy=replace(report.privacy, sites=sites))

    files = rewritten(concluded, tmp_path, forward)
    assert "No gradients are taken" in files["report.md"]
    assert "gradient is cut" not in files["report.md"]
    assert json.loads(files["privacy.json"])["mechanism"].startswith("DP-ZO")


def test_a_site_that_dropped_out_is_counted_out(concluded: Concluded, tmp_path: Path) -> None:
    first, second = concluded.report.rounds
    reason = "did not | <b>answer</b>"
    left = replace(second, members=second.members[:3], dropped=(Dropped("elm", "masked", reason),))
    config, quality = concluded.world.run.config, concluded.report.quality
    report = federation_report(config, concluded.job, concluded.progress, (first, left), quality, STARTED)
    assert {site.site: site.rounds for site in report.privacy.sites} == {"ash": 2, "birch": 2, "cedar": 2, "elm": 1}
    assert report.warnings == ("1 times a site dropped out of a round; see secagg.dropped",)
    text = rewritten(concluded, tmp_path, lambda _: report)["report.md"]
    assert "| elm | 2 | masked | did not \\| &lt;b>answer&lt;/b> |" in text
    assert "| elm | 1 |" in text
