"""The files of a begun run: lines and facts of earlier releases are readable, and new files have the same keys."""

import json
from pathlib import Path

import pytest

from offsite.coordinator.job.job_facts import EmulatorScores, JobFacts
from offsite.coordinator.job.json_form import encode
from offsite.coordinator.job.round_record import Dropped, RoundRecord
from offsite.coordinator.job.score import Score
from offsite.coordinator.job.store import Store
from offsite.errors import DataError

# As commit 552b21f wrote them.
LINE = (
    '{"round": 1, "members": ["ash", "birch"], "threshold": 2, "dropped": [{"site": "elm", "stage": "masked", '
    '"reason": "did not answer"}], "faulty": ["fir"], "update_norm": 0.0027, "bytes_down": 16628, "bytes_up": 10440, '
    '"upload_bytes": 1653, "payload_bytes": 1536, "individuals": false, "seconds": 0.246, "accepted": true, "reason": '
    '"taken over: public loss 3.0670 -> 3.0670, tolerance 0.05", "scale": 1.0, "correction": 0.0, "public_loss": 3.067}'
)
REFRESHED = LINE[:-1] + ', "refresh_bytes": 0, "refresh_share": 0.0, "refreshed": true, "emulator_loss": [4.1, null]}'
# The first releases knew less of a round.
FIRST = '{"round": 1, "members": ["ash"], "threshold": 3, "dropped": [], "public_loss": null, "accepted": false}'
FACTS = (
    '{"zero_shot": {"loss": 3.067, "targets": 120, "metrics": {"perplexity": 21.5}}, "emulators": [{"sites": ["ash"], '
    '"gradient_cosine": 0.99, "public": {"loss": 3.068, "targets": 120, "metrics": {}}}]}'
)


def run(folder: Path, *lines: str) -> Store:
    store = Store(folder)
    (folder / "rounds.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return store


def test_a_line_is_read_and_written_with_the_keys_of_today(tmp_path: Path) -> None:
    record = RoundRecord(
        round=1,
        members=("ash", "birch"),
        threshold=2,
        dropped=(Dropped("elm", "masked", "did not answer"),),
        faulty=("fir",),
        update_norm=0.0027,
        bytes_down=16628,
        bytes_up=10440,
        upload_bytes=1653,
        payload_bytes=1536,
        seconds=0.246,
        accepted=True,
        reason="taken over: public loss 3.0670 -> 3.0670, tolerance 0.05",
        public_loss=3.067,
    )
    assert run(tmp_path, LINE).rounds() == (record,)
    assert json.dumps(encode(record)) == LINE


def test_what_a_refresh_adds_is_there_only_where_there_was_one(tmp_path: Path) -> None:
    (record,) = run(tmp_path, REFRESHED).rounds()
    assert (record.refreshed, record.emulator_loss) == (True, (4.1, None))
    assert json.dumps(encode(record)) == REFRESHED


def test_a_line_of_the_first_release_is_read(tmp_path: Path) -> None:
    (record,) = run(tmp_path, FIRST).rounds()
    assert record == RoundRecord(1, ("ash",), 3, accepted=False, public_loss=None)
    assert not record.individuals


def test_a_torn_line_does_not_count_and_the_others_stay_as_they_are(tmp_path: Path) -> None:
    store = run(tmp_path, FIRST, LINE.replace('"round": 1', '"round": 2'), '{"round": 3, "memb')
    assert [record.round for record in store.rounds()] == [1, 2]
    store.drop_rounds_after(1)
    assert (tmp_path / "rounds.jsonl").read_text() == FIRST + "\n"  # no key of a later release came in


def test_a_line_that_is_no_round_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rounds.jsonl.round='1': is of another type"):
        run(tmp_path, LINE.replace('"round": 1', '"round": "1"')).rounds()
    with pytest.raises(DataError, match=r"rounds.jsonl.members: the key is missing"):
        run(tmp_path, '{"round": 1}').rounds()


def test_facts_of_a_prepared_job_are_read_and_written_as_before(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "job_facts.json").write_text(FACTS)
    score = Score(3.067, 120, {"perplexity": 21.5})
    facts = JobFacts(score, (EmulatorScores(("ash",), 0.99, Score(3.068, 120)),))
    assert store.job_facts() == facts
    assert json.dumps(encode(facts)) == FACTS
