"""Generated texts of a job: refused before any work where they cannot be had, and reported beside the loss."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offsite.coordinator.aggregation.rules import ServerState
from offsite.coordinator.check.model import check_model
from offsite.coordinator.check.names import check_names
from offsite.coordinator.config.federation_file import FedConfig, parse_config
from offsite.coordinator.job.generated import Writer
from offsite.coordinator.job.prepare import Job
from offsite.coordinator.job.score import GeneratedScores
from offsite.coordinator.job.store import Progress
from offsite.coordinator.report.federation_outcome import Started, conclude
from offsite.coordinator.report.json_report import read_report
from offsite.coordinator.report.summary import summarise
from offsite.coordinator.report.write import write_report
from offsite.emulator.runtime.plug_in import plug
from offsite.errors import ConfigError
from offsite.simulation.run_folder import Run
from offsite.task.findings import Findings
from offsite.task.text_measures import Comparison, compare
from tests.contracts.test_tasks_learn import OWNERS, config_for
from tests.coordinator.test_report import sample
from tests.task.test_generation import by_hand, without_ends
from tests.task_samples import SAMPLES, Sample, first_of

ASKED = {"measures": ["rouge", "chrf"], "generated_records": 9, "new_tokens": 7}
STARTED = Started("0f" * 32, "2026-11-24T12:00:00+00:00")


def content_for(task: Sample, folder: Path, **asked: Any) -> dict[str, Any]:
    content: dict[str, Any] = config_for(replace(task, dialects=False), folder)
    content["evaluation"] |= ASKED | asked
    return content


def checked(config: FedConfig) -> Findings:
    findings = Findings()
    check_names(config, list(OWNERS), findings)
    check_model(config, config.data.length, None, findings)
    return findings


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Job]:
    """A job of an encoder-decoder, as its coordinator holds it."""
    folder = tmp_path_factory.mktemp("generated")
    config = parse_config(content_for(first_of("seq2seq"), folder), folder)
    run = Run.create(config, "0" * 64, folder / "run")
    return run, run.open_job()


def test_a_coordinator_reports_texts_of_its_public_records(prepared: tuple[Run, Job]) -> None:
    run, job = prepared
    adapter = job.start + np.random.default_rng(1).normal(0, 2, job.layout.size).astype(np.float32)
    progress = Progress(ServerState.start(adapter), job.manifest.rounds, 1.0)
    conclude(run.config, run.store, job, progress, STARTED)
    assert np.array_equal(job.layout.read(job.full), adapter)  # what is exported afterwards
    texts = read_report(run.store.folder).quality.generated
    assert texts is not None
    assert (texts.part, texts.records, texts.left_out, texts.new_tokens) == ("public", 9, 0, 7)
    writer, rows = Writer.of(run.config, job.full), np.linspace(0, 23, 9).astype(int)
    records = [job.public.tested[row] for row in rows]
    prompts = [prompt for prompt in writer.prompts([records]) if prompt is not None]
    ends, written = {job.full.config.eos_token_id, writer.processor.eos_token_id}, []
    without_ends(job.full)
    for vector in (job.start, adapter):
        plug(job.full, job.layout, vector)
        ids = [by_hand(job.full, prompt) for prompt in prompts]
        cut = [own[: min((own.index(end) for end in ends if end in own), default=len(own))] for own in ids]
        written.append(writer.processor.texts(cut))
    assert written[0] != written[1]
    assert texts.measures == compare(ASKED["measures"], *written, [record["target"] for record in records])


def test_public_examples_and_their_records_belong_together(prepared: tuple[Run, Job]) -> None:
    run, job = prepared
    task, tested = job.task, job.public.tested
    facts = {"length": run.config.data.length, "split": "truncate", "model_config": job.full.config}
    again = task.encode(task.load_processor(run.config.model.path), list(tested), **facts)
    assert len(tested) == len(job.public.test) == 24
    assert again.labels.tolist() == job.public.test.labels.tolist()


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        (
            "seq2seq-bart",
            {"new_tokens": 39},
            "evaluation.new_tokens=39 and 2 tokens before the text: must be at most 40",
        ),
        ("image_text-llava", {"new_tokens": 40}, ""),
        ("seq2seq-t5", {"new_tokens": 4000}, ""),
        ("seq2seq-t5", {"measures": ["rouge", "blue"]}, "evaluation.measures='blue' is not known"),
        ("sequence_classification-bert", {}, "'sequence_classification' generates no text, since its model chooses am"),
        ("causal_lm-gpt2", {}, "'causal_lm' generates no text, since its records have no prompt"),
        ("text_to_image-pixart", {}, "'text_to_image' generates no text, since its model predicts noise"),
    ],
)
def test_what_cannot_be_had_is_refused_by_the_check(
    name: str, asked: dict[str, Any], said: str, tmp_path: Path
) -> None:
    chosen = next(one for one in SAMPLES if str(one) == name)
    config = parse_config(content_for(chosen, tmp_path, **asked), tmp_path)
    found = checked(config).errors
    assert [said in line for line in found] == [True] * bool(said), found
    plain = replace(config, evaluation=replace(config.evaluation, measures=()))
    assert checked(plain).errors == []


def test_a_package_that_is_missing_is_named_by_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # as where it is not installed
    config = parse_config(content_for(first_of("seq2seq"), tmp_path), tmp_path)
    (line,) = checked(config).errors
    assert "'chrf' needs the package sacrebleu, which is not installed; run pip install 'offsite[measures]'" in line


@pytest.mark.parametrize("key", ["generated_records", "new_tokens"])
def test_a_limit_below_1_is_refused_at_the_door(key: str, tmp_path: Path) -> None:
    content = content_for(first_of("seq2seq"), tmp_path, **{key: 0})
    with pytest.raises(ConfigError, match=rf"evaluation\.{key}=0: must be at least 1"):
        parse_config(content, tmp_path)


def test_a_report_says_what_was_generated_and_what_may_be_luck(tmp_path: Path) -> None:
    measures = {
        "rouge1": Comparison(0.2, 0.5, 0.1),
        "chrf": Comparison(31.25, 33.5, 4.0),
        "exact_match": Comparison(0.0, 0.25, None),
    }
    texts = GeneratedScores("held out", 12, 3, 64, 1, 2, measures)
    report = sample()
    report = replace(report, quality=replace(report.quality, generated=texts))
    write_report(tmp_path, report)
    assert read_report(tmp_path) == report
    line = (
        "In the texts that the full model generated for 12 held-out private records: ROUGE-1 0.500 against 0.200 "
        "before; chrF 33.5 against 31.2 before (within noise); exact match 0.250 against 0.000 before."
    )
    assert summarise(report).answer[1] == line
    for name in ("report.md", "report.html"):
        said = (tmp_path / name).read_text()
        assert "at most 64 tokens. 1 texts before training and 2 with the tuned adapter were cut" in said
        assert "3 more records were left out" in said
        assert "no text is generated for it" in said  # of perplexity
    assert "| ROUGE-1 | 0.200 | 0.500 | +0.300 | 0.100 |" in (tmp_path / "report.md").read_text()
    plain = sample()
    assert "generated" not in write_and_read(tmp_path / "plain", plain)
    none = replace(report, quality=replace(report.quality, generated=replace(texts, records=0, measures={})))
    assert summarise(none).answer[1].startswith("No text was generated, since no record was left. 3 more records")


def write_and_read(folder: Path, report: Any) -> str:
    folder.mkdir()
    write_report(folder, report)
    return (folder / "report.json").read_text()
