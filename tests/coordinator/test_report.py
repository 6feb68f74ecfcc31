"""The written report against its input, read back as a program, a person and a browser would read it."""

import hashlib
import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from offsite.coordinator.job.round_record import RoundRecord
from offsite.coordinator.job.score import Score
from offsite.coordinator.report.emulator_facts import Composition, EmulatorFacts, ShippedEmulator
from offsite.coordinator.report.json_report import read_report
from offsite.coordinator.report.model import (
    AdapterFacts,
    DroppedInRound,
    PhaseCost,
    Provenance,
    Report,
    RuleFacts,
    SecaggFacts,
)
from offsite.coordinator.report.privacy_facts import PrivacyFacts, SitePrivacy
from offsite.coordinator.report.privacy_statement import privacy_statement
from offsite.coordinator.report.quality_facts import FourScores, Quality
from offsite.coordinator.report.quality_section import FOUR
from offsite.coordinator.report.svg import spread_out
from offsite.coordinator.report.write import write_report
from offsite.errors import DataError

SITES = ("andrew-jackson", "grover-cleveland", "harry-s-truman", "theodore-roosevelt")
NASTY = '<script src="http://evil.example/x.js">a & b | c</script>'


def score(loss: float) -> Score:
    return Score(loss, 6096, {"perplexity": math.exp(loss)})


def sample(*, private: bool = True, sites: tuple[str, ...] = SITES, rounds: int = 6) -> Report:
    """Returns a report of a simulation with plausible numbers; round 5 was not taken over."""
    own, public = (
        [score(loss) for loss in four] for four in ((3.667, 3.912, 3.871, 3.604), (4.121, 4.377, 4.381, 4.129))
    )
    phase = PhaseCost(2_474_070, 1_386_000, 251.3, 2_310_000_000)
    least = 2 * len(sites) // 3 + 1
    return Report(
        mode="simulation",
        engine="memory",
        finished_rounds=rounds,
        rounds_planned=rounds,
        quality=Quality(FourScores(*public), FourScores(*own)),
        emulators=EmulatorFacts(
            EMULATOR, Composition(269_030_016, 28_300_000, 30_081_024, 39_600_000, 0.281, 0.105, 0.6)
        ),
        adapter=AdapterFacts(
            method="ffa_lora",
            rank=4,
            alpha=8.0,
            targets=("v_proj",),
            slots=("model.layers.0", "model.layers.1", "model.layers.28", "model.layers.29"),
            parameters=3072,
            exact_mean=True,
            why="A is frozen and common, so the effect B A is linear in B",
            options={"use_rslora": True, "n_frequency": 64},
            peft=True,
            directory="adapter",
        ),
        privacy=PrivacyFacts(
            private=private,
            unit="one record: a block of 128 tokens of one site's data",
            accountant="pld",
            target_epsilon=8.0 if private else None,
            noise_source="derived from the run's seed: a simulation",
            sites=tuple(site_privacy(k, site, rounds, private) for k, site in enumerate(sites)),
        ),
        aggregation=RuleFacts("mean", "sum", True, "the mean update is added as it is"),
        secagg=SecaggFacts(
            enabled=True,
            suite=1,
            members=sites,
            threshold=least,
            accomplices=len(sites) // 3,
            sites=len(sites),
            dropped=(DroppedInRound(sites[0], "masked", "did not answer", 2),),
            upload_bytes=24_731,
            payload_bytes=24_576,
            rounds=rounds,
        ),
        rounds=tuple(record(i, sites, least) for i in range(rounds)),
        cost=dict.fromkeys(("build", "train", "evaluate", "total"), phase),
        warnings=("rounds [5] were not taken over: public loss rose by more than the tolerance",),
        provenance=Provenance(
            seed=0,
            config_sha256="0f" * 32,
            model_sha256="a7" * 32,
            job_sha256="3c" * 32,
            versions={"offsite": "0.1.0", "torch": "2.13.0", "opacus": "1.6.0"},
            started="2026-11-24T05:00:00+00:00",
            platform="Linux",
        ),
    )


EMULATOR = ShippedEmulator(SITES, "ab" * 32, 98_100_000, 99_000_000, ("int4:64",), "int8", 0.842, 4.377)


def site_privacy(k: int, site: str, rounds: int, private: bool) -> SitePrivacy:
    records, spent = 700 - 20 * k, tuple(8 * ((i + 1) / rounds) ** 0.6 - 0.01 * k for i in range(rounds))
    return SitePrivacy(
        site=site,
        records=records,
        epsilon=spent[-1] if private else math.inf,
        epsilon_by_round=spent if private else (),
        delta=1e-6,
        epsilon_at={"1e-5": 0.9 * spent[-1], "1e-6": spent[-1]} if private else None,
        noise_multiplier=0.395 if private else 0.0,
        max_grad_norm=0.127,
        sample_rate=16 / records,
        steps=rounds,
        engine="hooks",
        clipped_fraction=0.5,
    )


def record(i: int, sites: tuple[str, ...], least: int) -> RoundRecord:
    return RoundRecord(
        round=i + 1,
        accepted=i != 4,
        reason="not taken over: public loss 4.1120 -> 4.2210, tolerance 0.05: the new adapter is worse",
        public_loss=4.221 if i == 4 else 4.121 - 0.004 * i,
        update_norm=0.0123 / (i + 1),
        members=sites,
        threshold=least,
        seconds=41.2 + i,
        bytes_up=412_345,
        bytes_down=231_000,
        upload_bytes=24_731,
        payload_bytes=24_576,
        site_losses={s: 3.9 - 0.07 * k + 0.05 * math.sin(7 * i + k) - 0.01 * i for k, s in enumerate(sites)},
    )


def with_site(report: Report, index: int, **changed: Any) -> Report:
    sites = list(report.privacy.sites)
    sites[index] = replace(sites[index], **changed)
    return replace(report, privacy=replace(report.privacy, sites=tuple(sites)))


def with_round(report: Report, index: int, **changed: Any) -> Report:
    rounds = list(report.rounds)
    rounds[index] = replace(rounds[index], **changed)
    return replace(report, rounds=tuple(rounds))


def with_plug_in(report: Report, loss: float) -> Report:
    assert report.quality.private is not None
    own = replace(report.quality.private, plug_in=score(loss))
    return replace(report, quality=replace(report.quality, private=own))


def written(folder: Path, report: Report) -> dict[str, str]:
    write_report(folder, report)
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


class Page(HTMLParser):
    """Collects the tags, references and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href", "data", "action"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_four_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    assert sorted(written(tmp_path, sample())) == ["privacy.json", "report.html", "report.json", "report.md"]


def test_json_is_strict_and_holds_the_report(tmp_path: Path) -> None:
    report = with_round(with_plug_in(sample(), math.inf), 0, public_loss=math.inf)
    back = strict(written(tmp_path, report)["report.json"])
    assert back["quality"]["gain_nats"] is None
    assert back["quality"]["private"]["plug_in"] == {"loss": None, "targets": 6096, "metrics": {"perplexity": None}}
    assert back["rounds"][0]["public_loss"] is None
    assert back["quality"]["private"]["full_zero_shot"] == {
        "loss": 3.667,
        "targets": 6096,
        "metrics": {"perplexity": math.exp(3.667)},
    }
    assert back["emulator"]["recipe"] == ["int4:64"]
    assert back["emulator"]["full_bytes"] == 269_030_016


def test_a_report_is_read_back_as_it_was(tmp_path: Path) -> None:
    report = sample()
    other = replace(EMULATOR, sites=(SITES[3],), recipe=("skip_uniform:0.5", "int4:64"))
    report = replace(report, emulators=replace(report.emulators, variants=(other,)))
    report = with_round(report, 2, refresh_bytes=12, refresh_share=0.01, refreshed=True, emulator_loss=(4.1, None))
    write_report(tmp_path, report)
    assert read_report(tmp_path) == report


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"rounds_planned": 6', '"rounds_planned": "6"', "rounds_planned='6': is of another type"),
        ('"unit"', '"unity"', "privacy.unit: the key is missing"),
        ('"accepted": true', '"accepted": 1', r"rounds\[0\].accepted=1: is of another type"),
        ('"mode"', "mode", "cannot be read"),
    ],
)
def test_what_is_no_report_is_said_with_its_place(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = written(tmp_path, sample())["report.json"]
    assert old in text
    (tmp_path / "report.json").write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=said):
        read_report(tmp_path)


def test_issue_keys_are_there(tmp_path: Path) -> None:
    back = strict(written(tmp_path, sample())["report.json"])
    for name in FOUR:
        for kind in ("private", "public"):
            assert {"loss", "targets", "metrics"} == back["quality"][kind][name].keys()
        assert back["quality"][name] == back["quality"]["private"][name]
    assert {"shipped_bytes", "full_bytes", "middle_ratio", "gradient_cosine"} <= back["emulator"].keys()
    for site in back["privacy"]["sites"]:
        assert {"epsilon", "delta", "noise_multiplier", "max_grad_norm", "sample_rate", "steps"} <= site.keys()
    assert {"members", "threshold", "dropped", "upload_bytes", "payload_bytes"} <= back["secagg"].keys()
    for phase in back["cost"].values():
        assert {"bytes_up", "bytes_down", "seconds", "peak_rss_bytes"} <= phase.keys()
    assert {"seed", "config_sha256", "model_sha256", "versions"} <= back["provenance"].keys()


def test_markdown_shows_the_four_numbers_of_both_texts(tmp_path: Path) -> None:
    report = sample()
    text = written(tmp_path, report)["report.md"]
    for name, words in FOUR.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {words} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
        assert report.quality.private is not None
        both = [getattr(four, name) for four in (report.quality.private, report.quality.public)]
        assert [float(cells[i].replace(",", "")) for i in (0, 2)] == pytest.approx([s.loss for s in both], abs=5e-4)
        assert [float(cells[i].replace(",", "")) for i in (1, 3)] == pytest.approx(
            [s.metrics["perplexity"] for s in both], abs=5e-2
        )


def test_who_got_which_emulator_is_said_where_they_differ(tmp_path: Path) -> None:
    report = sample()
    one = replace(EMULATOR, sites=SITES[:3])
    recipe = ("skip_uniform:0.5", "int4:64")
    other = ShippedEmulator((SITES[3],), "cd" * 32, 51_200_000, 52_300_000, recipe, "int4", 0.713, 4.902)
    assert "Emulators of the sites" not in written(tmp_path, report)["report.md"]
    files = written(tmp_path, replace(report, emulators=replace(report.emulators, default=one, variants=(other,))))
    section = files["report.md"].split("## Emulators of the sites")[1].split("## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "0." in line]
    assert cells == [
        [", ".join(SITES[:3]), "99.0 MB", "int4:64", "int8", "0.842", "4.377", "ab" * 8],
        [SITES[3], "52.3 MB", "skip\\_uniform:0.5, then int4:64", "int4", "0.713", "4.902", "cd" * 8],
    ]
    assert "2 emulators, of 51.2 MB to 98.1 MB, instead of" in files["report.md"].split("## ")[0]
    assert "Emulators of the sites" in " ".join(Page(files["report.html"]).words)
    (variant,) = strict(files["report.json"])["emulator"]["variants"]
    assert variant == {
        "sites": [SITES[3]],
        "sha256": "cd" * 32,
        "shipped_bytes": 51_200_000,
        "package_bytes": 52_300_000,
        "recipe": ["skip_uniform:0.5", "int4:64"],
        "embedding": "int4",
        "gradient_cosine": 0.713,
        "public_loss": 4.902,
    }


def test_the_answer_comes_first(tmp_path: Path) -> None:
    text = written(tmp_path, sample())["report.md"]
    head = text.split("\n## ")[0]
    for part in ("3.604", "3.667", "0.063", "epsilon 8.00", "98.1 MB", "269.0 MB", "better", "simulation"):
        assert part in head


def test_a_run_without_privacy_says_so_before_anything_else(tmp_path: Path) -> None:
    files = written(tmp_path, sample(private=False))
    assert "not private" in files["report.md"].splitlines()[2]
    page = Page(files["report.html"])
    assert "not private" in " ".join(page.words).split("tuned model")[0]
    statement = strict(files["privacy.json"])
    assert next(iter(statement.items())) == ("private", False)
    assert statement["claim"].startswith("not private")
    assert statement["epsilon_largest"] is None
    assert [site["epsilon"] for site in statement["sites"]] == [None] * len(SITES)
    assert strict(files["report.json"])["privacy"]["sites"][0]["epsilon"] is None


def test_a_model_that_is_not_better_is_not_called_better(tmp_path: Path) -> None:
    assert "not better" in written(tmp_path, with_plug_in(sample(), 3.687))["report.md"].splitlines()[2]


@pytest.mark.parametrize("key", ["unit", "neighbouring_relation", "sampling", "accountant", "coordinator"])
def test_statement_covers(key: str) -> None:
    assert privacy_statement(sample())[key]


def test_statement_names_trust_limits_and_simulation() -> None:
    text = json.dumps(privacy_statement(sample()))
    for words in ("sum", "block a round", "public", "not differential privacy", "malicious site", "subtract", "seed"):
        assert words in text
    assert "several records of one person" in text
    assert "their epsilons add up, and so do their deltas" in text
    assert "replaced by an empty record" in text
    assert "records held out for the scores" in text


def test_epsilon_stands_beside_its_delta_and_at_two_common_ones(tmp_path: Path) -> None:
    """In the answer, in the table, in the claim, and in the statement's numbers."""
    files = written(tmp_path, sample())
    answer, rest = files["report.md"].split("\n## ", 1)
    assert "Every record that a site trained on is protected" in answer
    assert "epsilon 8.00 at most at delta 1.00e-06 over all" in answer
    assert "held out for the scores above are not" in answer
    head = next(line for line in rest.splitlines() if line.startswith("| site | records | epsilon | delta |"))
    assert head.split(" | ")[4:6] == ["epsilon at 1e-5", "epsilon at 1e-6"]
    statement = strict(files["privacy.json"])
    assert "epsilon at most 8.0 at delta 1e-06" in statement["claim"]
    assert statement["delta_largest"] == 1e-6
    assert statement["epsilon_largest_at"] == pytest.approx({"1e-5": 7.2, "1e-6": 8.0})
    assert all(set(site["epsilon_at"]) == {"1e-5", "1e-6"} for site in statement["sites"])
    assert privacy_statement(with_site(sample(), 1, epsilon_at=None))["epsilon_largest_at"] == {
        "1e-5": None,
        "1e-6": None,
    }


def test_one_infinite_epsilon_leaves_no_largest() -> None:
    assert privacy_statement(with_site(sample(), 1, epsilon=math.inf))["epsilon_largest"] is None
    assert privacy_statement(with_site(sample(), 1, epsilon=None))["epsilon_largest"] is None


def test_every_string_is_escaped(tmp_path: Path) -> None:
    report = with_round(sample(sites=(NASTY, "b", "c")), 4, reason=NASTY)
    report = replace(
        report,
        warnings=(NASTY,),
        provenance=replace(report.provenance, platform=NASTY),
        secagg=replace(report.secagg, dropped=(DroppedInRound(NASTY, NASTY, NASTY, 1),)),
    )
    files = written(tmp_path, report)
    page = Page(files["report.html"])
    assert "script" not in page.tags
    assert NASTY in " ".join(page.words)
    assert "<script" not in files["report.md"]
    head = next(line for line in files["report.md"].splitlines() if line.startswith("| site | round"))
    row = next(
        line for line in files["report.md"].splitlines() if line.startswith("| &lt;script") and "did not" not in line
    )
    assert head.count("|") == 5
    assert "a &amp; b \\| c" in row


def test_page_loads_nothing_and_its_ids_are_unique(tmp_path: Path) -> None:
    page = Page(written(tmp_path, sample())["report.html"])
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 3
    assert not {"link", "img", "iframe", "script", "object"} & set(page.tags)


def test_plots_are_well_formed_and_name_what_they_show(tmp_path: Path) -> None:
    html = written(tmp_path, sample())["report.html"]
    drawn = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    words = [" ".join(" ".join(node.itertext()).split()) for node in drawn]
    assert "3.604" in words[0]
    assert "round not taken over" in words[1]
    assert all(site in words[1] and site in words[2] for site in SITES)
    assert "target 8" in words[2]
    assert all("currentColor" in svg for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL))


def test_same_report_same_bytes(tmp_path: Path) -> None:
    sums = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files = written(tmp_path / name, sample())
        sums.append({file: hashlib.sha256(text.encode()).hexdigest() for file, text in files.items()})
    assert sums[0] == sums[1]


def test_a_run_without_rounds_and_losses_that_are_not_numbers(tmp_path: Path) -> None:
    report = replace(sample(), rounds=(), finished_rounds=0)
    for index in range(len(SITES)):
        report = with_site(report, index, epsilon=0.0, epsilon_by_round=())
    assert report.quality.private is not None
    lost = replace(report.quality.private, plug_in=Score(math.inf, 6096, {"perplexity": math.inf}))
    report = replace(report, quality=replace(report.quality, private=lost))
    assert Page(written(tmp_path, report)["report.html"]).tags.count("svg") >= 1


def test_many_sites_share_one_name(tmp_path: Path) -> None:
    report = sample(sites=tuple(f"site-{i:02d}" for i in range(30)), rounds=2)
    html = written(tmp_path, with_round(report, 0, public_loss=None))["report.html"]
    assert "30 sites" in html


def test_names_beside_a_plot_never_overlap() -> None:
    wanted = [0.5, 0.5, 0.51, 0.9, 0.02, 0.5]
    places = spread_out(wanted, 0.1)
    ordered = sorted(places)
    assert min(b - a for a, b in itertools.pairwise(ordered)) >= 0.1 - 1e-12
    assert [sorted(places).index(p) for p in (places[4], places[3])] == [0, 5]
    assert spread_out([0.1, 0.9], 0.1) == [0.1, 0.9]
